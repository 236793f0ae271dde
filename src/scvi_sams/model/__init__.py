"""The models as users see them."""

from scvi_sams.model._conditional_vae import ConditionalVAE
from scvi_sams.model._cpa_vae import CPAVAE
from scvi_sams.model._sams_vae import SAMSVAE
from scvi_sams.model._svae_plus import SVAEPlus

__all__ = ["CPAVAE", "SAMSVAE", "ConditionalVAE", "SVAEPlus"]
