"""Errors that describe what is wrong with the data and how to fix it.

All are subclasses of :class:`ValueError`, so that code which handles errors of scvi-tools works.
"""


class SAMSError(ValueError):
    """Base class of all errors that this package raises deliberately."""


class InvalidArgumentError(SAMSError):
    """An argument is of the wrong type, out of range, or contradicts another one."""


class InvalidPerturbationLabelError(SAMSError):
    """A perturbation label is missing, empty or cannot be split into perturbations."""


class InvalidDosageError(SAMSError):
    """A dosage is missing, negative, not a number, or does not fit its label."""


class MissingControlError(SAMSError):
    """No cell is a control cell, so perturbations cannot be compared with controls."""


class UnknownPerturbationError(SAMSError):
    """A perturbation was requested, or found in query data, that the model does not know."""


class InvalidCountsError(SAMSError):
    """The expression values do not fit the likelihood."""


class InvalidCovariateError(SAMSError):
    """A batch, covariate or size factor is missing, not a number, or not in the training data."""


class MissingKeyError(SAMSError):
    """A column, layer or matrix named in the call is not in the AnnData."""


class RegistrationError(SAMSError):
    """The AnnData object cannot be registered in its current state, for example a view."""


class ChangedDataError(SAMSError):
    """Registered data have changed since the model first read them."""


class ScaleMismatchError(SAMSError):
    """Two tables or data sets have different scales or doses."""


class InvalidSplitError(SAMSError):
    """A split into training, validation and test cells is invalid."""


class DataIntegrityError(SAMSError):
    """A downloaded or cached file differs from the published file."""


class UnreadableDataError(SAMSError):
    """A file on disk, or some of its rows, cannot be read or is damaged."""


class NotSupportedError(SAMSError, AttributeError):
    """A method of scvi-tools models does not apply to these models; the message explains why."""


class MissingPackageError(SAMSError, ImportError):
    """An optional package is required here, and is not installed."""


class SavingError(SAMSError, OSError):
    """A file cannot be written; an existing file is unchanged."""


class TrainingDivergedError(SAMSError):
    """A term of the objective, or a gradient, became infinite or NaN; training was stopped.

    The model keeps the last finite weights, as described in the message.
    """
