"""Screens that stay on disk or on the device that trains, and how labels are spelled."""

from scvi_sams.data._open_screen import open_screen
from scvi_sams.data._resident import ResidentDataModule
from scvi_sams.data._streaming import StreamingDataModule
from scvi_sams.labels._spelling import canonical_label

__all__ = ["ResidentDataModule", "StreamingDataModule", "canonical_label", "open_screen"]
