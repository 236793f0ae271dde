"""Find published files: downloaded once and verified, or converted by the user."""

import os
from pathlib import Path
from typing import NamedTuple

import pooch

from scvi_sams._checks import check_text
from scvi_sams.exceptions import DataIntegrityError, SAMSError

CACHE_VARIABLE = "SCVI_SAMS_DATA_DIR"


class PublishedFile(NamedTuple):
    """Address of a published file, and its checksum."""

    url: str
    sha256: str


PUBLISHED_FILES = {
    "perturbench_devel.h5ad": PublishedFile(
        "https://raw.githubusercontent.com/altoslabs/perturbench/"
        "d357dfae3b50968e800e9f5f273ff145080ae67c/src/perturbench/data/resources/devel.h5ad",
        "220998f5630c813228c8661c86dd52244b9ac87127511289af90e0d900d8429b",
    ),
    "lowmoi_example_data.rda": PublishedFile(
        "https://raw.githubusercontent.com/Katsevich-Lab/sceptredata/"
        "ec722d5df90dfd34ace6cc9a5745ab6a5c2a6731/data/lowmoi_example_data.rda",
        "e3f8ad09bb4b1d0deeeec2850a2d96f8f5062fef31a9ab1cc080e60560421b6a",
    ),
    "covariate_data_frame_lowmoi.rda": PublishedFile(
        "https://raw.githubusercontent.com/Katsevich-Lab/sceptre/"
        "8da86f3304f3656a18d1ed1746465cd5745249de/data/covariate_data_frame_lowmoi.rda",
        "5c1f7f5b4ef74150f1c13f42bbbdd1dc7dac981f55ee7c25f16bbbe1eaa7a88f",
    ),
}


class ConvertedFile(NamedTuple):
    """An R object that the user converts to a file."""

    url: str
    sha256: str
    """Checksum of the published file; bytes of the converted file depend on the software."""
    commands: str
    """R commands to run after loading the published file."""


CONVERTED_FILES = {
    "kang18_subset.h5ad": ConvertedFile(
        "https://raw.githubusercontent.com/HelenaLC/muscat/"
        "017b290b414212c357e184d17edcca27f4302ace/data/example_sce.rda",
        "f66811fa513a01a91dae01bad308e96ed5238277246b911d8e1cd5f4425c3ed9",
        "load('example_sce.rda'); zellkonverter::writeH5AD(example_sce, 'kang18_subset.h5ad')",
    ),
}


def find_converted(name: str) -> Path:
    """Path of a file in the cache folder of :func:`fetch` that the user has converted.

    Raises
    ------
    DataIntegrityError
        If it is missing; the message describes how to make it.
    """
    folder = Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("scvi_sams"))
    if not (folder / name).is_file():
        raise DataIntegrityError(f"{folder / name} is missing. {how_to_convert(name)}")
    return folder / name


def how_to_convert(name: str) -> str:
    """Describe how to make a file that cannot be downloaded directly."""
    file = CONVERTED_FILES[name]
    return (
        f"Download {file.url} (sha256 {file.sha256}), convert it in R ({file.commands}) "
        f"and put {name!r} into the cache folder or a folder set by "
        f"{CACHE_VARIABLE}."
    )


def fetch(name: str) -> Path:
    """Path of a published file, downloaded into the cache folder unless it is already there.

    The cache folder is the environment variable ``SCVI_SAMS_DATA_DIR``, or the operating system's
    cache folder for ``scvi_sams``. A file that is already there with the correct sha256 is used
    without network access or writing, so the folder may be read-only.

    Parameters
    ----------
    name
        ``"perturbench_devel.h5ad"``, ``"lowmoi_example_data.rda"`` or
        ``"covariate_data_frame_lowmoi.rda"``.

    Returns
    -------
    pathlib.Path
        The file in the cache folder, with the published sha256.

    Raises
    ------
    SAMSError
        If there is no published file of that name.
    DataIntegrityError
        If the file is missing or wrong in the cache folder and cannot be downloaded, or the
        download is not the published file.
    """
    check_text(name=name)
    if name not in PUBLISHED_FILES:
        raise SAMSError(f"No published file {name!r}. Known files: {sorted(PUBLISHED_FILES)}.")
    file = PUBLISHED_FILES[name]
    cache = pooch.create(
        path=pooch.os_cache("scvi_sams"),
        base_url="",
        registry={name: f"sha256:{file.sha256}"},
        urls={name: file.url},
        env=CACHE_VARIABLE,
    )
    try:
        return Path(cache.fetch(name))
    except (OSError, ValueError) as error:  # requests raises OSError for network and disk errors
        state = "is not the published file" if (cache.abspath / name).exists() else "is missing"
        raise DataIntegrityError(
            f"{cache.abspath / name} {state} and could not be downloaded from {file.url} "
            f"({error}). Check the connection, or download it from that address by hand, save it "
            f"as {name!r} in {cache.abspath} (or in a folder set by {CACHE_VARIABLE}); its "
            f"sha256 must be {file.sha256}."
        ) from error
