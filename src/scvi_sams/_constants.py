"""Keys of registered data and results, in one place."""

from typing import Final, NamedTuple

from scvi import REGISTRY_KEYS as _SCVI_KEYS


class _RegistryKeys(NamedTuple):
    """Names of the tensors in a mini-batch: those of scvi-tools, and those of perturbations."""

    X: str = _SCVI_KEYS.X_KEY
    BATCH: str = _SCVI_KEYS.BATCH_KEY
    CATEGORICAL_COVARIATES: str = _SCVI_KEYS.CAT_COVS_KEY
    CONTINUOUS_COVARIATES: str = _SCVI_KEYS.CONT_COVS_KEY
    SIZE_FACTOR: str = _SCVI_KEYS.SIZE_FACTOR_KEY
    PERTURBATIONS: str = "perturbations"
    GUIDES: str = "guides"
    CONTEXTS: str = "contexts"


class _ResultKeys(NamedTuple):
    """Default AnnData slots of results."""

    LATENT: str = "X_sams"
    """obsm, cells x latent: basal state of each cell."""
    LATENT_PERTURBED: str = "X_sams_perturbed"
    """obsm, cells x latent: basal state plus the effects of the cell's perturbations."""
    MASKS: str = "sams_masks"
    """uns, DataFrame perturbations x latent: posterior inclusion probabilities."""
    EFFECTS: str = "sams_effects"
    """uns, dict of DataFrames perturbations x latent: mean and SD of the masked effects."""
    DIRECT_EFFECTS: str = "sams_direct_effects"
    """uns, dict of arrays perturbations x genes: effects on single genes."""
    ATE: str = "sams_ate"
    """uns, dict: average treatment effects, their uncertainty and their units."""
    PROGRAMS: str = "sams_programs"
    """varm, DataFrame genes x latent: change of expression per unit of a latent dimension."""
    HITS: str = "sams_hits"
    """uns, DataFrame of perturbations: effects of each, and their certainty."""
    TESTS: str = "sams_tests"
    """uns, DataFrame of perturbations: whether their cells differ from control cells."""
    Q_VALUES: str = "sams_q_values"
    """uns, DataFrame perturbations x latent: false discovery rates at which entries are called."""
    TARGETS: str = "sams_targets"
    """uns, DataFrame of perturbations: change of the gene that each targets."""
    INTERACTIONS: str = "sams_interactions"
    """uns, DataFrame of pairs: difference of their effect from the sum of the single ones."""
    DOSE_RESPONSE: str = "sams_dose_response"
    """uns, dict: effects over a grid of doses, their intervals and their units."""
    RESPONSE: str = "sams_response"
    """obs: posterior probability that each cell responded to its perturbations."""
    GUIDES: str = "sams_guides"
    """uns, DataFrame of guides: how often their cells respond, and similarity to siblings."""
    CONTEXT_EFFECTS: str = "sams_context_effects"
    """uns, DataFrame of pairs: contexts in which perturbations act, and where they differ."""
    PROVENANCE: str = "sams_provenance"
    """uns, dict: provenance of the model of each result, as JSON."""
    ELBO: str = "sams_elbo"
    """obs: evidence lower bound of each cell, in nats."""
    RECONSTRUCTION_ERROR: str = "sams_reconstruction_error"
    """obs: expected negative log-likelihood of each cell, in nats."""
    IWELBO: str = "sams_iwelbo"
    """obs: predictive importance-weighted bound of each cell, in nats."""


REGISTERED_DOSES: Final = "_scvi_doses"
"""uns, dict: slots of the doses of registered cells, for functions that do not take a model."""
REGISTERED_LEVELS: Final = "_scvi_levels"
"""uns, array: columns of obs that models condition on, batch and categorical covariates."""
LARGEST_INPUT: Final = 1e9
"""Limit of doses, covariates, size factors and normalised values: squares must be finite in single
precision."""
LARGEST_COUNT: Final = 2**24
"""Integers up to here are exact in single precision, in which models compute."""

REGISTRY_KEYS: Final = _RegistryKeys()
RESULT_KEYS: Final = _ResultKeys()
