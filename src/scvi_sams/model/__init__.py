"""The models as users see them."""

from scvi_sams.model._comparators import CPAVAE, ConditionalVAE, SVAEPlus
from scvi_sams.model._sams_vae import SAMSVAE

__all__ = ["CPAVAE", "SAMSVAE", "ConditionalVAE", "SVAEPlus"]
