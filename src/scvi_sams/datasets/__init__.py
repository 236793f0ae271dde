"""Example screens: simulated with known truth, and three small published ones."""

from scvi_sams.datasets._fetch import fetch
from scvi_sams.datasets._kang18 import kang18_subset
from scvi_sams.datasets._norman19 import norman19_subset
from scvi_sams.datasets._papalexi21 import papalexi21
from scvi_sams.datasets._simulate import simulate_benchmark_screen, simulate_screen
from scvi_sams.datasets._simulated_truth import (
    simulated_ate,
    simulated_log_likelihood,
    simulated_rates,
)

__all__ = [
    "fetch",
    "kang18_subset",
    "norman19_subset",
    "papalexi21",
    "simulate_benchmark_screen",
    "simulate_screen",
    "simulated_ate",
    "simulated_log_likelihood",
    "simulated_rates",
]
