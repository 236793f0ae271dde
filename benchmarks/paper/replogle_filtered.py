"""Replogle-filtered: guides of a genome-wide CRISPRi screen, cells split at random.

The paper's data: 118,641 cells x 1,187 genes, 722 guides (K562, Replogle et al. 2022), already
filtered. The IWELBO depends on the genes: other data give other numbers.
"""

from functools import partial

from experiment import N_STEPS, SCORING, SEEDS, Experiment, Model, Published

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus, paper_settings
from scvi_sams.evaluation import random_cells

SAMS = paper_settings(SAMSVAE).model
CPA = paper_settings(CPAVAE).model

MODELS = {
    "conditional-vae": Model(ConditionalVAE, paper_settings(ConditionalVAE).model),
    "svae-plus": Model(SVAEPlus, paper_settings(SVAEPlus).model),
    "cpa-mean-field": Model(CPAVAE, {**CPA, "correlated_basal": False}),
    "cpa-correlated-basal": Model(CPAVAE, CPA),
    "sams-mean-field": Model(
        SAMSVAE, {**SAMS, "correlated_basal": False, "correlated_effects": False}
    ),
    "sams-correlated-effects": Model(SAMSVAE, {**SAMS, "correlated_basal": False}),
    "sams-correlated-basal": Model(SAMSVAE, {**SAMS, "correlated_effects": False}),
    "sams-both": Model(SAMSVAE, SAMS),
}

EXPERIMENT = Experiment(
    models=MODELS,
    split=partial(random_cells, fractions=(0.64, 0.16, 0.2), stratified=False),
    fractions=None,
    delimiter=None,  # a guide is a perturbation, whatever its name
    published=(
        Published("conditional-vae", None, -1766.10, 0.765),
        Published("svae-plus", None, -1761.42, 0.605),
        Published("cpa-mean-field", None, -1760.14, 0.523),
        Published("cpa-correlated-basal", None, -1756.57, 0.571),
        Published("sams-mean-field", None, -1757.72, 0.302),
        Published("sams-correlated-effects", None, -1758.08, 0.319),
        Published("sams-correlated-basal", None, -1756.40, 0.718),
        Published("sams-both", None, -1756.27, 0.765),
    ),
    reference=None,
    seeds=SEEDS,
    n_steps=N_STEPS,
    scoring=SCORING,
)
