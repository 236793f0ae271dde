import hashlib

import pooch
import pytest

from scvi_sams.datasets import _fetch, fetch
from scvi_sams.exceptions import DataIntegrityError, InvalidArgumentError, SAMSError

CONTENT = b"the published bytes"
NAME = "small.bin"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Use an empty cache folder and a registry of one small file."""
    published = _fetch.PublishedFile(
        url="https://data.invalid/small.bin", sha256=hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setattr(_fetch, "PUBLISHED_FILES", {NAME: published})
    monkeypatch.setenv("SCVI_SAMS_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(monkeypatch):
    """Replace the network: serves ``served["content"]``, or fails as requests does without it."""
    served = {"content": None, "urls": []}

    class Downloader:
        def __call__(self, url, output_file, pooch):
            served["urls"].append(url)
            if served["content"] is None:
                raise ConnectionError("no network")
            with open(output_file, "wb") as file:
                file.write(served["content"])

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *_, **__: Downloader())
    return served


def test_right_file_in_cache_needs_neither_network_nor_write(cache, downloads):
    cache.mkdir()
    (cache / NAME).write_bytes(CONTENT)
    before = (cache / NAME).stat().st_mtime_ns, cache.stat().st_mtime_ns
    assert fetch(NAME) == cache / NAME
    assert downloads["urls"] == []
    assert before == ((cache / NAME).stat().st_mtime_ns, cache.stat().st_mtime_ns)


def test_missing_file_is_downloaded_once(cache, downloads):
    downloads["content"] = CONTENT
    assert fetch(NAME).read_bytes() == CONTENT
    assert fetch(NAME) == cache / NAME
    assert downloads["urls"] == ["https://data.invalid/small.bin"]


def test_wrong_file_in_cache_is_replaced(cache, downloads):
    cache.mkdir()
    (cache / NAME).write_bytes(CONTENT + b"!")
    downloads["content"] = CONTENT
    assert fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("cached", "served", "state"),
    [
        (None, None, "is missing"),
        (b"corrupted", None, "is not the published file"),
        (None, b"something else", "is missing"),
        (b"corrupted", b"something else", "is not the published file"),
    ],
)
def test_error_says_what_to_do(cache, downloads, cached, served, state):
    if cached is not None:
        cache.mkdir()
        (cache / NAME).write_bytes(cached)
    downloads["content"] = served
    with pytest.raises(DataIntegrityError) as error:
        fetch(NAME)
    message = str(error.value)
    assert f"{cache / NAME} {state}" in message
    assert "https://data.invalid/small.bin" in message
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert "by hand" in message
    assert "SCVI_SAMS_DATA_DIR" in message
    assert (cache / NAME).exists() == (cached is not None)


def test_cache_folder_that_cannot_be_made(cache, downloads):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataIntegrityError, match="by hand"):
        fetch(NAME)


def test_unknown_name_lists_known_ones(cache):
    with pytest.raises(SAMSError, match=r"'other.bin'.*small\.bin"):
        fetch("other.bin")


def test_registry_is_pinned():
    assert len(_fetch.PUBLISHED_FILES) == 3
    for file in (*_fetch.PUBLISHED_FILES.values(), *_fetch.CONVERTED_FILES.values()):
        commit = file.url.removeprefix("https://raw.githubusercontent.com/").split("/")[2]
        assert len(bytes.fromhex(commit)) == 20
        assert len(bytes.fromhex(file.sha256)) == 32


@pytest.mark.parametrize("name", sorted(_fetch.PUBLISHED_FILES))
def test_published_files(data_dir, name):
    assert hashlib.sha256(fetch(name).read_bytes()).hexdigest() == (
        _fetch.PUBLISHED_FILES[name].sha256
    )


@pytest.mark.parametrize("name", [["a"], None, 3])
def test_a_file_is_named_by_text(name):
    with pytest.raises(InvalidArgumentError, match="`name` must be a name"):
        fetch(name)
