"""Norman data efficiency: every combination is tested, a fraction of its other cells is kept.

Data and models as in Norman-OOD. There are no numbers of the paper to print beside these.
"""

from experiment import N_STEPS, SCORING, SEEDS, Experiment
from norman_ood import MODELS

from scvi_sams.evaluation import norman_data_efficiency

EXPERIMENT = Experiment(
    models=MODELS,
    # Assumed: 64 / 16 / 20 % of the cells of each combination, the shares of Replogle-filtered.
    split=norman_data_efficiency,
    # Assumed: which fractions.
    fractions=(0.0, 0.25, 0.5, 0.75, 1.0),
    delimiter="+",
    published=(),
    reference=("sams-both", 0.0),
    seeds=SEEDS,
    n_steps=N_STEPS,
    scoring=SCORING,
)
