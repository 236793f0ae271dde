"""Screens on disk or on the training device, and the spelling of labels."""

from scvi_sams.data._data_modules import ResidentDataModule, StreamingDataModule
from scvi_sams.data._open_screen import open_screen
from scvi_sams.labels._spelling import canonical_label

__all__ = ["ResidentDataModule", "StreamingDataModule", "canonical_label", "open_screen"]
