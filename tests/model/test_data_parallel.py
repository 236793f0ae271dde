"""Training on several processes: the same split and plate counts on each, and a loss that falls."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from scvi_sams.datasets import simulate_screen

# Lightning starts the second process by running the script again.
SCRIPT = """
import json
import os
import sys

import anndata
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback

from scvi_sams import SAMSVAE
from scvi_sams.data import open_screen

folder, place = sys.argv[1:]
rank = int(os.environ.get("LOCAL_RANK", 0))
# Different on every rank, as in a script that sets no seed.
torch.manual_seed(100 + rank)
np.random.seed(100 + rank)
path = f"{folder}/screen.h5ad"
adata = open_screen(path) if place == "disk" else anndata.read_h5ad(path)
adata.obs["number"] = np.arange(adata.n_obs) / 10
SAMSVAE.setup_anndata(adata, continuous_covariate_keys=["number"])
model = SAMSVAE(adata, n_latent=4, n_hidden=16, effect_n_hidden=8)
losses, steps = [], []
read = {"train": [], "validation": []}


def record(trainer, *args):
    losses.append(float(trainer.callback_metrics["train_loss"]))


def cells_of(batch):
    return (batch["extra_continuous_covs"].ravel() * 10).round().int().tolist()


def record_cells(trainer, plan, outputs, batch, number):
    steps.append((trainer.current_epoch, float(outputs["loss"]), len(batch["X"])))
    if trainer.current_epoch == 0:
        read["train"] += cells_of(batch)


def record_validation(trainer, plan, outputs, batch, number, dataloader_idx=0):
    if trainer.current_epoch == 0 and not trainer.sanity_checking:
        read["validation"] += cells_of(batch)


model.train(
    max_epochs=12,
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    batch_size=32,
    enable_progress_bar=False,
    plan_kwargs={"lr": 5e-3},
    data_on_device=place == "device",
    callbacks=[
        LambdaCallback(
            on_train_epoch_end=record,
            on_train_batch_end=record_cells,
            on_validation_batch_end=record_validation,
        )
    ],
)
state = {name: value.tolist() for name, value in model.module.state_dict().items()}
counts = np.zeros(len(model.perturbations))
for label in adata.obs["perturbation"].astype(str).iloc[model.train_indices]:
    for name in label.split("+"):
        if name != "control":
            counts[model.perturbations.index(name)] += 1
report = {
    "world_size": torch.distributed.get_world_size(),
    "backend": torch.distributed.get_backend(),
    "train": np.sort(model.train_indices).tolist(),
    "validation": np.sort(model.validation_indices).tolist(),
    "n_batches": len(model.trainer.train_dataloader),
    "counts": counts.tolist(),
    "losses": losses,
    "steps": steps,
    "read": read,
    "state": state,
}
with open(f"{folder}/rank{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(report, file)
"""


@pytest.mark.parametrize("place", ["memory", "disk", "device"])
def test_two_processes_train_one_model(place, tmp_path):
    simulate_screen(
        n_genes=30,
        n_controls=60,
        n_perturbations=5,
        cells_per_perturbation=30,
        n_combinations=3,
        cells_per_combination=20,
        n_latent=4,
        library_size=300.0,
        mask_probability=0.5,
    ).write_h5ad(tmp_path / "screen.h5ad")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), place],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for report in (first, second):
        assert report["world_size"] == 2
        assert report["backend"] == "gloo"
        # Each rank sees half of the training cells, but counts all of them.
        assert report["n_batches"] == -(-len(report["train"]) // 2 // 32)
        assert report["state"]["cells_per_perturbation"] == report["counts"]
        assert np.isfinite(report["losses"]).all()
        assert len(report["losses"]) == 12
        assert np.mean(report["losses"][-3:]) < report["losses"][0] - 0.3
    # What is logged is the mean over the cells of both processes.
    steps = first["steps"] + second["steps"]
    for epoch, loss in enumerate(first["losses"]):
        of_epoch = np.array([(loss, n_cells) for at, loss, n_cells in steps if at == epoch])
        assert loss == pytest.approx(np.average(of_epoch[:, 0], weights=of_epoch[:, 1]), rel=1e-5)
    assert second["losses"] == first["losses"]
    assert first["train"] == second["train"]
    assert first["validation"] == second["validation"]
    for name, value in first["state"].items():
        np.testing.assert_allclose(second["state"][name], value, rtol=1e-6, err_msg=name)
    assert first["state"]["masks.is_dense"] is False
    for part in ("train", "validation"):
        # In memory a cell is read twice where the processes cannot share them equally.
        both = first["read"][part] + second["read"][part]
        assert sorted(set(both) if place == "memory" else both) == first[part]
        assert abs(len(first["read"][part]) - len(second["read"][part])) <= 1


DYING = """
import os
import signal
import sys

from lightning.pytorch import Callback

from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen


class Die(Callback):
    def on_train_batch_start(self, trainer, plan, batch, number):
        if trainer.global_rank == 1 and trainer.current_epoch == 2:
            open(sys.argv[1] + "/dying", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)


adata = simulate_screen(
    n_genes=12, n_controls=60, n_perturbations=3, cells_per_perturbation=30, n_combinations=0,
    n_latent=3, library_size=100.0
)
SAMSVAE.setup_anndata(adata)
model = SAMSVAE(adata, n_latent=3, n_hidden=8, effect_n_hidden=8)
model.train(
    max_epochs=1000, accelerator="cpu", devices=2, strategy="ddp", batch_size=32,
    enable_progress_bar=False, callbacks=[Die()]
)
print("FINISHED")
"""


def test_a_process_that_dies_ends_training_with_an_error(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DYING)
    # A process that waited for the dead one would do so until the time is up, which raises.
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert (tmp_path / "dying").exists()
    assert done.returncode != 0
    # Whichever notices first: the other process, in a sum of gradients, or Lightning's watch.
    assert re.search(r"Connection (reset|closed) by peer|Child process .* terminated", done.stderr)
    assert "FINISHED" not in done.stdout
