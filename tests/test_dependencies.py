"""Each dependency is needed and has its reason written down; nothing executes what it reads."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "scvi_sams").rglob("*.py"))
MODULES = {"scikit-learn": "sklearn", "scvi-tools": "scvi"}
# Held below a version for scanpy's sake.
NOT_IMPORTED = {"pynndescent"}
# Beside scvi-tools' own, for types or where it is installed, and extras: no dependencies.
OPTIONAL = {"cupy", "decoupler", "gseapy", "mlflow", "rdkit"}
EXECUTING = {"eval", "exec", "compile", "__import__"}


@pytest.fixture(scope="module")
def required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}


def trees():
    assert len(SOURCES) > 50
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported():
    """Modules that are imported anywhere, at the top of a file or in a function."""
    names = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names


def test_what_is_imported_is_required_and_what_is_required_is_imported(required):
    others = imported() - set(sys.stdlib_module_names) - {"scvi_sams"} - OPTIONAL
    assert others == {MODULES.get(name, name) for name in required - NOT_IMPORTED}


def test_each_dependency_has_its_reason_in_the_contributing_guide(required):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## Why each dependency is there")[1].split("\n## ")[0]
    reasons = dict(re.findall(r"^\| ([\w-]+) \| (.{5,}) \|$", section, flags=re.MULTILINE))
    reasons.pop("package", None)
    assert set(reasons) == required


def test_nothing_executes_what_it_reads():
    found = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = ast.unparse(node.func)
                pickling = name.startswith("pickle.") or name in ("os.system", "os.popen")
                if name in EXECUTING or pickling or name.startswith("subprocess."):
                    found.append((path.name, name))
                arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
                safely = arguments.get("weights_only") == "True"
                if (name == "torch.load" and not safely) or arguments.get(
                    "allow_pickle", "False"
                ) != "False":
                    found.append((path.name, name))
    # The file that scvi-tools reads next in the same way.
    assert found == [("_saving.py", "torch.load")]
