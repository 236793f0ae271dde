"""Training on several processes: the same split and plate counts on each, and a loss that falls."""

import json
import subprocess
import sys

import numpy as np

# Lightning starts the second process by running the script again.
SCRIPT = """
import json
import os
import sys

import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback

from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen

folder = sys.argv[1]
rank = int(os.environ.get("LOCAL_RANK", 0))
# Different on every rank, as in a script that sets no seed.
torch.manual_seed(100 + rank)
np.random.seed(100 + rank)
adata = simulate_screen(
    n_genes=30, n_controls=60, n_perturbations=5, cells_per_perturbation=30, n_combinations=3,
    cells_per_combination=20, n_latent=4, library_size=300.0, mask_probability=0.5,
)
SAMSVAE.setup_anndata(adata)
model = SAMSVAE(adata, n_latent=4, n_hidden=16, effect_n_hidden=8)
losses = []


def record(trainer, *args):
    losses.append(float(trainer.callback_metrics["train_loss"]))


model.train(
    max_epochs=12,
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    batch_size=32,
    enable_progress_bar=False,
    plan_kwargs={"lr": 5e-3},
    callbacks=[LambdaCallback(on_train_epoch_end=record)],
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
    "state": state,
}
with open(f"{folder}/rank{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(report, file)
"""


def test_two_processes_train_one_model(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
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
    assert first["train"] == second["train"]
    assert first["validation"] == second["validation"]
    for name, value in first["state"].items():
        np.testing.assert_allclose(second["state"][name], value, rtol=1e-6, err_msg=name)
    assert first["state"]["masks.is_dense"] is False
