"""The only place that touches private names of scvi-tools or differs by its version."""

# view_anndata_setup of scvi-tools 1.4.2 uses rich.pretty without importing it, which fails from
# rich 15 on.
import rich.pretty  # noqa: F401
from scvi.data._constants import _FIELD_REGISTRIES_KEY as FIELD_REGISTRIES_KEY
from scvi.data._constants import _MANAGER_UUID_KEY as MANAGER_UUID_KEY
from scvi.data._constants import _MODEL_NAME_KEY as MODEL_NAME_KEY
from scvi.data._constants import _SCVI_UUID_KEY as ADATA_UUID_KEY
from scvi.data._constants import _SETUP_ARGS_KEY as SETUP_ARGUMENTS_KEY
from scvi.data._constants import _STATE_REGISTRY_KEY as STATE_REGISTRY_KEY
from scvi.model._utils import parse_device_args
from scvi.model.base._constants import SAVE_KEYS
from scvi.train._logger import SimpleLogger
from scvi.train._metrics import ElboMetric

MODEL_FILE_NAME = SAVE_KEYS.MODEL_FNAME
DATA_FILE_NAME = SAVE_KEYS.ADATA_FNAME

__all__ = [
    "ADATA_UUID_KEY",
    "DATA_FILE_NAME",
    "FIELD_REGISTRIES_KEY",
    "MANAGER_UUID_KEY",
    "MODEL_FILE_NAME",
    "MODEL_NAME_KEY",
    "SETUP_ARGUMENTS_KEY",
    "STATE_REGISTRY_KEY",
    "ElboMetric",
    "SimpleLogger",
    "parse_device_args",
]
