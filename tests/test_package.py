"""What a user sees of the package before calling anything."""

import inspect
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
