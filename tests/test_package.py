"""What a user sees of the package before calling anything."""

import inspect
import json
import subprocess
import sys
from importlib import metadata, resources
from types import ModuleType

import pytest

import scvi_sams

MODELS = {"CPAVAE", "ConditionalVAE", "SAMSVAE", "SVAEPlus"}
NAMESPACES = {"datasets", "evaluation", "features", "pl", "tl"}


def test_version_is_the_installed_one():
    assert scvi_sams.__version__ == metadata.version("scvi-sams")


def test_type_hints_are_shipped():
    assert resources.files("scvi_sams").joinpath("py.typed").is_file()


def test_public_namespace_is_complete_and_declared():
    assert set(scvi_sams.__all__) >= MODELS | NAMESPACES


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_are_documented_classes_of_this_package(name: str):
    model_class = getattr(scvi_sams, name)
    assert inspect.isclass(model_class)
    assert model_class.__module__.startswith("scvi_sams.")
    assert model_class.__doc__


@pytest.mark.parametrize("name", sorted(NAMESPACES))
def test_namespaces_are_modules_whose_names_all_resolve(name: str):
    namespace = getattr(scvi_sams, name)
    assert isinstance(namespace, ModuleType)
    missing = [member for member in namespace.__all__ if not hasattr(namespace, member)]
    assert namespace.__all__
    assert missing == []


IMPORTED = """
import json, sys
import scvi_sams
loaded = [name for name in sys.modules if name.startswith("scvi_sams.")]
listed = dir(scvi_sams)
from scvi_sams import *
same = [pl is scvi_sams.plotting, tl is scvi_sams.interpretation]
print(json.dumps({"loaded": loaded, "listed": listed, "same": same}))
"""


def test_namespaces_are_imported_when_they_are_first_used():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, timeout=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert "scvi_sams.model._sams_vae" in found["loaded"]
    slow = {"evaluation", "benchmark", "plotting", "interpretation", "metrics", "baselines"}
    assert {name.split(".")[1] for name in found["loaded"]}.isdisjoint(slow)
    assert set(found["listed"]) >= MODELS | NAMESPACES
    assert found["same"] == [True, True]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'scvi_sams' has no attribute 'evaluate'"):
        scvi_sams.evaluate  # noqa: B018
