"""What is published: the archive and its metadata, and files beside them that have to agree."""

import email
import re
import tarfile
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from packaging.requirements import Requirement

import scvi_sams

ROOT = Path(__file__).parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONFIGURATION["project"]
CONDA_NAMES = {"matplotlib": "matplotlib-base", "torch": "pytorch"}
WITH_ADDRESSES = (
    "pyproject.toml",
    "*.md",
    "CITATION.cff",
    ".conda/*",
    ".github/**/*.yml",
    ".github/**/*.yaml",
    "docs/**/*.md",
    "docs/conf.py",
    "docs/_static/*.json",
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Contents of the source distribution: text by path below its one folder."""
    folder = tmp_path_factory.mktemp("dist")
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(folder))
    with tarfile.open(path) as packed:
        return {
            PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix(): packed.extractfile(
                member
            ).read()
            for member in packed.getmembers()
            if member.isfile()
        }


def without_version(text):
    """Name and bounds of a requirement of pyproject.toml, as conda writes them."""
    requirement = Requirement(text)
    name = CONDA_NAMES.get(requirement.name, requirement.name).lower()
    bounds = ",".join(sorted(str(requirement.specifier).split(","), reverse=True))
    return f"{name} {bounds}".strip()


@pytest.fixture(scope="module")
def recipe():
    """The conda recipe with its variables filled in."""
    text = (ROOT / ".conda" / "meta.yaml").read_text(encoding="utf-8")
    for name, value in re.findall(r'\{% set (\w+) = "(.*)" %\}', text):
        text = text.replace(f"{{{{ {name} }}}}", value)
    return yaml.safe_load(re.sub(r"\{%.*%\}", "", text).replace("{{ PYTHON }}", "python"))


def test_files_that_tests_and_documentation_read_are_in_the_source_distribution(archive):
    assert {"tests/conftest.py", "docs/bad_input.md", "docs/anndata.md", "Makefile"} <= set(archive)
    for folder, pattern in (
        ("tests", "**/*.py"),
        ("tests/fixtures", "**/*.h5ad"),
        ("tests/plotting/baseline", "*.png"),
        ("benchmarks", "**/*.py"),
        ("demo", "*.py"),
        ("docs", "*.md"),
        ("docs/figures", "*"),
        ("src", "**/*.py"),
        ("tutorials", "*.ipynb"),
        (".github", "**/*.yml"),
    ):
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern)}
        there = {path for path in there if "__pycache__" not in path}
        assert there
        assert there <= set(archive)


def test_nothing_built_is_in_the_source_distribution(archive):
    built = re.compile(r"__pycache__|\.pyc$|docs/(_build|tutorials|api/generated)/|demo_output/")
    assert [path for path in archive if built.search(path)] == []


def test_package_index_shows_absolute_links_to_files_that_exist(archive):
    text = email.message_from_bytes(archive["PKG-INFO"]).get_payload()
    assert text.startswith("# scvi_sams")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    tagged = f"{PROJECT['urls']['Source']}/blob/v{scvi_sams.__version__}/"
    to_files = [link.removeprefix(tagged) for link in links if link.startswith(tagged)]
    assert len(to_files) > 5
    assert [path for path in to_files if not (ROOT / path.split("#")[0]).exists()] == []
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_metadata_names_licence_versions_and_addresses(archive):
    metadata = email.message_from_bytes(archive["PKG-INFO"])
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Version"] == scvi_sams.__version__
    assert metadata["Author-email"]
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(urls)
    assert all(url.startswith("https://") for url in urls.values())


def test_every_file_names_the_repository_and_the_site_of_pyproject():
    repository = PROJECT["urls"]["Source"]
    site = PROJECT["urls"]["Documentation"]
    assert PROJECT["urls"]["Homepage"] == repository
    paths = sorted({path for pattern in WITH_ADDRESSES for path in ROOT.glob(pattern)})
    found = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        addresses = re.findall(r"https://github\.com/[\w.-]+/scvi-sams\b", text)
        addresses += re.findall(r"https://scvi-sams[\w-]*\.readthedocs\.io", text)
        found[path.relative_to(ROOT).as_posix()] = set(addresses)
    others = {path: names - {repository, site} for path, names in found.items()}
    assert {path: names for path, names in others.items() if names} == {}
    assert repository in found["CITATION.cff"]
    assert repository in found[".github/ISSUE_TEMPLATE/config.yml"]


def test_citation_recipe_and_ecosystem_entry_have_the_version_and_licence(recipe):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entry = yaml.safe_load((ROOT / ".github/ecosystem/meta.yaml").read_text(encoding="utf-8"))
    versions = (citation["version"], recipe["package"]["version"], entry["version"])
    assert versions == (scvi_sams.__version__,) * 3
    licences = (citation["license"], recipe["about"]["license"], entry["license"])
    assert licences == (PROJECT["license"],) * 3


def test_conda_recipe_has_the_requirements_of_the_package(recipe):
    python, *run = recipe["requirements"]["run"]
    assert python == f"python {PROJECT['requires-python']}"
    assert run == sorted(without_version(line) for line in PROJECT["dependencies"])
    needed_to_build = {without_version(line) for line in CONFIGURATION["build-system"]["requires"]}
    assert needed_to_build < set(recipe["requirements"]["host"])


def test_every_python_version_that_is_promised_is_tested():
    promised = {line.split(" :: ")[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert set(matrix["python-version"]) == promised
    systems = {*matrix["os"], *(row["os"] for row in matrix["include"])}
    assert {name.split("-")[0] for name in systems} == {"macos", "ubuntu"}
    resolutions = {
        row["resolve"] for row in workflow["jobs"]["dependencies"]["strategy"]["matrix"]["include"]
    }
    assert resolutions == {"--resolution lowest-direct", "--prerelease allow"}
