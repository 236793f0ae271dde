"""Names of a sample of the mutants of ``mutmut``, the same ones in each run.

``mutmut run $(python tests/mutation/sample.py 600)`` tries 600 of them; all take hours.
"""

from __future__ import annotations

import fnmatch
import io
import random
import sys
import tomllib
from pathlib import Path

SEED = 0


def names_of_mutants() -> list[str]:
    # Here, because pytest looks for examples in every module, also where there is no mutmut.
    from mutmut.__main__ import write_all_mutants_to_file

    configuration = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]
    names = []
    for path in sorted(Path("src").rglob("*.py")):
        if any(fnmatch.fnmatch(str(path), pattern) for pattern in configuration["only_mutate"]):
            made = write_all_mutants_to_file(
                out=io.StringIO(), source=path.read_text(), filename=path
            )
            module = ".".join(path.relative_to("src").with_suffix("").parts)
            names += [f"{module}.{name}" for name in made.mutant_names]
    return names


if __name__ == "__main__":
    names = names_of_mutants()
    print(*sorted(random.Random(SEED).sample(names, int(sys.argv[1]))), sep="\n")
