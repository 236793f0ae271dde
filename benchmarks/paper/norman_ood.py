"""Norman-OOD: a quarter of the combinations is held out, a fraction of all combinations trains.

The paper's data: the CRISPRa screen of Norman et al. 2019 (K562), singles, pairs and controls. Its
"100 % of the combinations" are all that are not tested: a fraction of 0.75.
"""

from experiment import N_STEPS, SCORING, SEEDS, Experiment, Model, Published

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus, paper_settings
from scvi_sams.evaluation import norman_ood

SAMS = {
    **paper_settings(SAMSVAE).model,
    # q(e_t | m_t) of the variant with correlated effects.
    "effect_n_layers": 4,
    "effect_n_hidden": 400,
}

MODELS = {
    "conditional-vae": Model(ConditionalVAE, paper_settings(ConditionalVAE).model),
    # Combinations are perturbations of their own: one without training cells keeps its first mean.
    "svae-plus": Model(SVAEPlus, paper_settings(SVAEPlus).model),
    # Assumed: of the two variants of CPA-VAE the one that is better on Replogle.
    "cpa-correlated-basal": Model(CPAVAE, paper_settings(CPAVAE).model),
    "sams-correlated-basal": Model(SAMSVAE, {**SAMS, "correlated_effects": False}),
    "sams-both": Model(SAMSVAE, SAMS),
}

EXPERIMENT = Experiment(
    models=MODELS,
    split=norman_ood,
    # Assumed: the steps between the two ends, which are the paper's.
    fractions=(0.0, 0.25, 0.5, 0.75),
    delimiter="+",
    # IWELBO minus that of sams-both without combinations in training.
    published=(
        Published("conditional-vae", 0.0, -2.43, 0.689),
        Published("conditional-vae", 0.75, 9.29, 0.769),
        Published("svae-plus", 0.0, -3.55, -0.034),
        Published("svae-plus", 0.75, 8.35, 0.764),
        Published("cpa-correlated-basal", 0.0, 0.40, 0.643),
        Published("cpa-correlated-basal", 0.75, 10.84, 0.779),
        Published("sams-correlated-basal", 0.0, 2.24, None),
        Published("sams-correlated-basal", 0.75, 11.06, None),
        Published("sams-both", 0.0, 0.0, 0.682),
        Published("sams-both", 0.75, 11.19, 0.775),
    ),
    reference=("sams-both", 0.0),
    seeds=SEEDS,
    n_steps=N_STEPS,
    scoring=SCORING,
)
