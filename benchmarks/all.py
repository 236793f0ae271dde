"""Run all benchmarks at a small size: whether they work, and whether ratios are those recorded.

Every script runs in a process of its own with a time limit; together they take 10 to 15 minutes on
an idle machine with two cores. Printed are exit status, seconds, and the end of what each prints.
Sizes are so small that only the ratios in ``expected_ratios.json`` mean anything. Those are from
``RECORD.md``, and are measured with the genes and mini-batches of the record, but fewer repeats;
other ratios depend on size. Ratios to bare matrix products depend on the machine, too: they are
higher where products are faster than on the machine of the record.

Scripts without their data or their device are skipped. The exit status is 1 if a script fails, or
if a ratio is above those recorded by more than its tolerance.

    python benchmarks/all.py --quick [--only step_time masks ...] [--limit 240] [--lines 12]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from _common import print_conditions

HERE = Path(__file__).parent
EXPECTED: dict[str, dict[str, Any]] = json.loads((HERE / "expected_ratios.json").read_text())
RATIO = re.compile(r"^ratio of (.+): (\d+\.\d+) \(", re.MULTILINE)
FOLDER = "FOLDER"
"""Stands for a temporary folder among arguments."""


class Benchmark(NamedTuple):
    """Arguments that make a script small, and what it needs."""

    arguments: str = ""
    needs: str = ""


BENCHMARKS = {
    "beside_scvi": Benchmark("--cells 4096 --rounds 1"),
    "batch_sizes": Benchmark("FOLDER --screens simulated --seeds 0 --arms 512 --epochs 2"),
    "campaign": Benchmark("--features copies --rounds 1 --epochs 1"),
    "cells_per_perturbation": Benchmark("--quick"),
    "comparison": Benchmark(
        "FOLDER --data simulated --quick --seeds 0 --methods SAMS-VAE additive"
    ),
    "context_screens": Benchmark("--screens 'unseen pairs' --seeds 0 --epochs 2"),
    "contexts": Benchmark("kang --seeds 0 --models contexts --epochs 1", needs="data"),
    "cost_model": Benchmark("--quick --rounds 3"),
    "direct_effects": Benchmark("--perturbations 100 --genes 300"),
    "effects": Benchmark("panel --cells 20 --seeds 0 --epochs 2"),
    "entry_tests": Benchmark("--screens 40x50x60 --epochs 60"),
    "error_rates": Benchmark("--screens 40x50x60 --seeds 0 --epochs 4"),
    "files_per_step": Benchmark(),
    "first_calls": Benchmark("--processes 1"),
    "genome_wide": Benchmark("FOLDER --cells 4000 8000"),
    "gpu": Benchmark("--cells 20000 --rounds 1", needs="GPU"),
    "intervals": Benchmark("--screens '40 x 50 cells x 60 genes' --seeds 0 --epochs 2"),
    "learning_curves": Benchmark("FOLDER --screens simulated --seeds 0 --cells 10 --epochs 2"),
    "likelihoods": Benchmark("--quick --seeds 0 --models SAMS-VAE SVAE+"),
    "many_perturbations": Benchmark("--genes 200 --rounds 5"),
    "mask_starts": Benchmark("--screens 40x50x60 --epochs 4"),
    "masks": Benchmark("--quick --cases standard"),
    "memory": Benchmark("--cells 20000 --perturbations 200"),
    "papalexi21": Benchmark("--epochs 2", needs="data"),
    "paper/run": Benchmark("norman-ood --data simulated --quick --results FOLDER"),
    "predict_ate": Benchmark("--pairs 100"),
    "responses": Benchmark("--screens half --seeds 0 --epochs 2"),
    "scaling": Benchmark("--quick"),
    "simulated_screen": Benchmark("--quick"),
    "size_of_test": Benchmark("--screens 40x50x60 --permutations 3"),
    "step_time": Benchmark("--rounds 7"),
    "streaming": Benchmark("FOLDER --cells 40000 --rounds 1"),
    "time_to_quality": Benchmark("--quick --epochs 2 --seeds 0"),
    "unmeasured": Benchmark("simulated --seeds 0"),
    "whole_path": Benchmark("--screens small --epochs 1"),
}


class Outcome(NamedTuple):
    """What became of a script."""

    status: int | None
    """Exit status; ``None`` if it ran past its limit."""
    seconds: float
    printed: str
    errors: str


def reason_to_skip(benchmark: Benchmark) -> str:
    """Return why a script cannot run here, or nothing."""
    if benchmark.needs == "data" and not os.environ.get("SCVI_SAMS_DATA_DIR"):
        return "needs real screens: set SCVI_SAMS_DATA_DIR to the folder of their files"
    if benchmark.needs == "GPU" and not torch.cuda.is_available():
        return "needs a GPU"
    return ""


def run(script: Path, arguments: list[str], folder: Path, limit: float) -> Outcome:
    """Run a script in a folder; past its limit it is ended with all its processes."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=limit)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, errors = process.communicate()
            status = None
    return Outcome(status, time.perf_counter() - started, printed, errors)


def compared(name: str, printed: str) -> tuple[list[str], bool]:
    """Lines that compare printed ratios with those recorded, and whether none is too large."""
    lines, is_good = [], True
    found = dict(RATIO.findall(printed))
    for ratio, expected in EXPECTED.get(name, {}).items():
        low, high = min(expected["recorded"]), max(expected["recorded"])
        if ratio not in found:
            lines.append(f"NOT PRINTED: ratio of {ratio}")
            is_good = False
            continue
        value = float(found[ratio])
        verdict = "as recorded"
        if value > high * (1 + expected["tolerance"]):
            verdict, is_good = "ABOVE THE RECORD", False
        elif value < low * (1 - expected["tolerance"]):
            verdict = "below the record"
        lines.append(f"ratio of {ratio}: {value:.2f}, recorded {low}-{high}: {verdict}")
    return lines, is_good


def report(name: str, outcome: Outcome, limit: float, n_lines: int) -> str:
    """Print the end of what a script printed, and return a verdict."""
    lines = [f"    {line}" for line in outcome.printed.rstrip().splitlines()[-n_lines:]]
    if outcome.status == 0:
        of_ratios, is_good = compared(name, outcome.printed)
        lines += [f"  {line}" for line in of_ratios]
        verdict = "ok" if is_good else "FAILED: a ratio"
    else:
        lines += [f"    {line}" for line in outcome.errors.rstrip().splitlines()[-8:]]
        was_ended = outcome.status is None
        verdict = f"past {limit:.0f} s" if was_ended else f"exit status {outcome.status}"
        verdict = f"FAILED: {verdict}"
    print(*lines, sep="\n")
    return f"{outcome.seconds:.0f} s, {verdict}"


def main() -> int:
    """Run scripts one after the other; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = "small sizes (for full size, run each script as its docstring says)"
    parser.add_argument("--quick", action="store_true", required=True, help=text)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for each script")
    parser.add_argument("--lines", type=int, default=12, help="to print of each script")
    arguments = parser.parse_args()
    print_conditions()
    verdicts: dict[str, str] = {}
    for name in arguments.only:
        benchmark = BENCHMARKS[name]
        reason = reason_to_skip(benchmark)
        if reason:
            verdicts[name] = f"skipped: {reason}"
            continue
        print(f"\n{name} {benchmark.arguments}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            words = [folder if w == FOLDER else w for w in shlex.split(benchmark.arguments)]
            outcome = run(HERE / f"{name}.py", words, Path(folder), arguments.limit)
        verdicts[name] = report(name, outcome, arguments.limit, arguments.lines)
        print(f"  {verdicts[name]}", flush=True)
    print("\nAll scripts")
    for name, verdict in verdicts.items():
        print(f"  {name:24} {verdict}")
    return int(any("FAILED" in verdict for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
