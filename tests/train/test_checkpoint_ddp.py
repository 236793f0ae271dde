"""A training in two processes that is killed goes on from its last epoch, in both of them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from model.builders import small_screen

# Lightning starts the second process by running the script again.
SCRIPT = """
import json
import os
import signal
import sys

import anndata
import scvi
import torch
from lightning.pytorch import Callback

from scvi_sams import SAMSVAE

folder, killed_in, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
lr_schedule = sys.argv[4]
rank = int(os.environ.get("LOCAL_RANK", 0))


class Kill(Callback):
    def on_train_batch_start(self, trainer, plan, batch, number):
        if trainer.current_epoch == killed_in and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


scvi.settings.seed = 3
adata = anndata.read_h5ad(folder + "/screen.h5ad")
SAMSVAE.setup_anndata(adata)
model = SAMSVAE(
    adata, n_latent=4, n_hidden=16, effect_n_hidden=8, perturbation_features="perturbation_features"
)
# Each process draws numbers of its own.
torch.manual_seed(100 + rank)
model.train(
    max_epochs=6, batch_size=16, plan_kwargs={"lr_schedule": lr_schedule},
    accelerator="cpu", devices=2, strategy="ddp",
    enable_progress_bar=False, logger=False,
    checkpoint_path=None if path == "none" else path, callbacks=[Kill()],
)
state = {name: value.tolist() for name, value in model.module.state_dict().items()}
with open(f"{folder}/rank{rank}.json", "w") as file:
    found = {"state": state, "random": torch.rand(3).tolist()}
    json.dump(found | {"ending": model.trainings_[-1]["ending"]}, file)
"""


def run(folder, lr_schedule, killed_in=-1, path="none"):
    script = folder / "train.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), str(folder), str(killed_in), str(path), lr_schedule],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        check=False,
    )


def results(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


# 4 is in the phase with masks, whose random numbers differ between the processes; where held-out
# cells decide, for both processes alike, it is the first of the decay.
@pytest.mark.parametrize(("lr_schedule", "epoch"), [("cosine", 4), ("held_out", 4)])
def test_two_killed_processes_go_on_to_the_same_weights(lr_schedule, epoch, tmp_path):
    small_screen(n_features=2).write_h5ad(tmp_path / "screen.h5ad")
    done = run(tmp_path, lr_schedule)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = results(tmp_path)
    path = tmp_path / "run.ckpt"
    assert run(tmp_path, lr_schedule, epoch, path).returncode != 0
    assert path.exists()
    done = run(tmp_path, lr_schedule, -1, path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.glob("run.ckpt*"))
    for resumed, expected in zip(results(tmp_path), whole, strict=True):
        for name, value in expected["state"].items():
            np.testing.assert_array_equal(resumed["state"][name], value, err_msg=name)
        assert resumed["random"] == expected["random"]
    assert whole[0]["random"] != whole[1]["random"]
    assert whole[0]["state"] == whole[1]["state"]
    assert whole[0]["ending"] == whole[1]["ending"]
