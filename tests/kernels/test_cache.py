"""Compiled loops are kept for later processes, wherever there is a place for them."""

import json
import os
import subprocess
import sys

import numpy as np

from scvi_sams.kernels import _negative_binomial

# The file alone, without the package: numba is all that it imports.
SCRIPT = """
import json, os, sys
import numpy as np
folder, name = os.path.split(sys.argv[1])
sys.path.insert(0, folder)
loops = __import__(name.removesuffix(".py"))
counts = np.float32([[3, 0, 1], [0, 2, 5]])
theta = np.float32([2, 2, 2])
values, logits = np.empty(2, np.float32), np.zeros((2, 3), np.float32)
loops.terms(
    False, logits, counts, theta, 1 / theta, np.ones(2, np.float32),
    np.full(2, 60, np.float32), values, np.empty(3, np.float32),
)
hits = sum(loops.terms.stats.cache_hits.values())
print(json.dumps({"values": values.tolist(), "hits": hits}))
"""


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, _negative_binomial.__file__],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )


def result_of(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(output)


def test_a_later_process_loads_what_several_compiled_at_once(tmp_path):
    at_once = [result_of(process) for process in [start(tmp_path), start(tmp_path)]]
    later = result_of(start(tmp_path))
    assert later["hits"] == 1
    # With means of 1 and theta 2: -(x + 2) log(1.5), summed over genes.
    expected = -np.array([4 + 6, 7 + 6]) * np.log(1.5)
    for found in (*at_once, later):
        np.testing.assert_allclose(found["values"], expected, rtol=1e-6)


def test_without_a_place_to_keep_them_loops_are_compiled():
    """Numba has no place for what is not in a file, as for an installation without any."""
    names = {}
    exec("def doubled(x):\n    return 2 * x", names)
    doubled = _negative_binomial.compiled()(names["doubled"])
    assert doubled(2.5) == 5.0
    assert len(doubled.signatures) == 1
