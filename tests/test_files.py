"""Files that are there as a whole or not at all."""

import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from scvi_sams._files import write_h5ad

# Files may grow to so many bytes: a full disk for whoever writes them.
FULL_DISK = """
import resource, signal, sys
import anndata as ad
import numpy as np
from scvi_sams._files import write_h5ad

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        write_h5ad(ad.AnnData(np.random.rand(300, 40)), sys.argv[1])
    except OSError as error:
        print("OSError", error.errno)
"""


@pytest.mark.parametrize("limit", [1_000, 9_000, 60_000])
def test_a_full_disk_is_an_error_and_does_not_end_python(tmp_path, limit):
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.h5ad"), str(limit)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (0, "OSError 27\n" * 3)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_what_is_written_is_what_anndata_reads(tmp_path, compression):
    values = sparse.random(40, 7, 0.3, "csr", random_state=np.random.default_rng(0))
    written = ad.AnnData(values, obsm={"Z": np.eye(40, 3)}, uns={"a": {"b": 1.5}})
    write_h5ad(written, tmp_path / "a.h5ad", compression=compression)
    found = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), values.toarray())
    np.testing.assert_array_equal(found.obsm["Z"], np.eye(40, 3))
    assert found.uns["a"]["b"] == 1.5
