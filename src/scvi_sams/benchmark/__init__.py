"""Many methods on one screen: fitted, scored, summarised, and reported."""

from scvi_sams.benchmark._model import ModelMethod
from scvi_sams.benchmark._result import BenchmarkResult
from scvi_sams.benchmark._run import benchmark

__all__ = ["BenchmarkResult", "ModelMethod", "benchmark"]
