"""Errors that say what is wrong with the data and what to do about it.

All are subclasses of :class:`ValueError`, so code that guards scvi-tools calls keeps working.
"""


class SAMSError(ValueError):
    """Base class of every error that this package raises on purpose."""


class InvalidArgumentError(SAMSError):
    """An argument is of the wrong type, out of range, or contradicts another one."""


class InvalidPerturbationLabelError(SAMSError):
    """A perturbation label is missing, empty or cannot be split into perturbations."""


class InvalidDosageError(SAMSError):
    """A dosage is missing, negative, not a number, or does not line up with its label."""


class MissingControlError(SAMSError):
    """No cell is a control cell, so there is nothing to compare the perturbations with."""


class UnknownPerturbationError(SAMSError):
    """A perturbation was asked for, or found in query data, that the model never saw."""


class InvalidCountsError(SAMSError):
    """The expression values cannot be what the chosen likelihood assumes."""


class InvalidCovariateError(SAMSError):
    """A batch, covariate or size factor is missing, no number, or was not in the training data."""


class MissingKeyError(SAMSError):
    """A column, layer or matrix named in the call is not in the AnnData."""


class RegistrationError(SAMSError):
    """The AnnData object cannot be registered as it is, for example because it is a view."""


class ChangedDataError(SAMSError):
    """Registered data are no longer what they were when the model first read them."""


class ScaleMismatchError(SAMSError):
    """Two tables or data sets are on different scales, or of different doses."""


class InvalidSplitError(SAMSError):
    """A split into training, validation and test cells cannot be used."""


class DataIntegrityError(SAMSError):
    """A downloaded or cached file is not the file that its publisher serves."""


class UnreadableDataError(SAMSError):
    """A file on disk, or some of its rows, cannot be read or cannot be what was written."""


class NotSupportedError(SAMSError, AttributeError):
    """A method of other models of scvi-tools does not exist for these; the message says why."""


class MissingPackageError(SAMSError, ImportError):
    """A package that this one does not require is needed here, and is not installed."""


class SavingError(SAMSError, OSError):
    """What was to be saved cannot be written there; what was there before is as it was."""


class TrainingDivergedError(SAMSError):
    """A term of the objective, or a gradient, became infinite or NaN; training was stopped.

    The weights are the last good ones, as the message says.
    """
