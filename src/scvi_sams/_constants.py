"""Keys under which registered data and results are found, in one place."""

from typing import Final, NamedTuple

from scvi import REGISTRY_KEYS as _SCVI_KEYS


class _RegistryKeys(NamedTuple):
    """Names of the tensors in a mini-batch: those of scvi-tools, and what cells are."""

    X: str = _SCVI_KEYS.X_KEY
    BATCH: str = _SCVI_KEYS.BATCH_KEY
    CATEGORICAL_COVARIATES: str = _SCVI_KEYS.CAT_COVS_KEY
    CONTINUOUS_COVARIATES: str = _SCVI_KEYS.CONT_COVS_KEY
    SIZE_FACTOR: str = _SCVI_KEYS.SIZE_FACTOR_KEY
    PERTURBATIONS: str = "perturbations"
    GUIDES: str = "guides"
    CONTEXTS: str = "contexts"


class _ResultKeys(NamedTuple):
    """Default slots of an AnnData that results are written to."""

    LATENT: str = "X_sams"
    """obsm, cells x latent: basal state of each cell."""
    LATENT_PERTURBED: str = "X_sams_perturbed"
    """obsm, cells x latent: basal state plus the effects of the cell's perturbations."""
    MASKS: str = "sams_masks"
    """uns, DataFrame perturbations x latent: posterior inclusion probabilities."""
    EFFECTS: str = "sams_effects"
    """uns, dict of DataFrames perturbations x latent: mean and sd of the masked effects."""
    DIRECT_EFFECTS: str = "sams_direct_effects"
    """uns, dict of arrays perturbations x genes: what perturbations do to single genes."""
    ATE: str = "sams_ate"
    """uns, dict: average treatment effects, their uncertainty and their units."""
    PROGRAMS: str = "sams_programs"
    """varm, DataFrame genes x latent: change of expression per unit of a latent dimension."""
    HITS: str = "sams_hits"
    """uns, DataFrame of perturbations: what each does, and how sure that is."""
    TESTS: str = "sams_tests"
    """uns, DataFrame of perturbations: whether their cells differ from control cells."""
    Q_VALUES: str = "sams_q_values"
    """uns, DataFrame perturbations x latent: false discovery rates at which entries are called."""
    TARGETS: str = "sams_targets"
    """uns, DataFrame of perturbations: how far each changes the gene that it targets."""
    INTERACTIONS: str = "sams_interactions"
    """uns, DataFrame of pairs: how far their effect is from the sum of the single ones."""
    DOSE_RESPONSE: str = "sams_dose_response"
    """uns, dict: effects over a grid of doses, their intervals and their units."""
    RESPONSE: str = "sams_response"
    """obs: posterior probability that each cell responded to its perturbations."""
    GUIDES: str = "sams_guides"
    """uns, DataFrame of guides: how often their cells respond, and how alike siblings are."""
    CONTEXT_EFFECTS: str = "sams_context_effects"
    """uns, DataFrame of pairs: in which contexts perturbations act, and where they differ."""
    PROVENANCE: str = "sams_provenance"
    """uns, dict: for each result of a model, what made the model, as JSON."""
    ELBO: str = "sams_elbo"
    """obs: evidence lower bound of each cell, in nats."""
    RECONSTRUCTION_ERROR: str = "sams_reconstruction_error"
    """obs: expected negative log-likelihood of each cell, in nats."""
    IWELBO: str = "sams_iwelbo"
    """obs: predictive importance-weighted bound of each cell, in nats."""


REGISTERED_DOSES: Final = "_scvi_doses"
"""uns, dict: where the doses of registered cells are, for functions that know no model."""
REGISTERED_LEVELS: Final = "_scvi_levels"
"""uns, array: columns of obs that models condition on, batch and categorical covariates."""
LARGEST_INPUT: Final = 1e9
"""Of doses, covariates, size factors and normalised values: squares must fit single precision."""
LARGEST_COUNT: Final = 2**24
"""Single precision, in which models compute, has every whole number up to here."""

REGISTRY_KEYS: Final = _RegistryKeys()
RESULT_KEYS: Final = _ResultKeys()
