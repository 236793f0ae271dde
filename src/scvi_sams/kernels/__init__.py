"""Loops compiled by numba for CPUs, with measurements of what each of them saves.

A loop is included only if it saves at least 5 % of what a user does with a screen (registration,
training, masks, effects, latent states, hits) on one of two screens. Accelerators do the same with
torch operations, and both pass the same tests. On one thread of a 2-core AMD EPYC
(``benchmarks/whole_path.py`` repeats it):

===========  =========================  =======================
CPU seconds  20,000 cells, 2,000 genes  19,619 cells, 299 genes
===========  =========================  =======================
with all     168                        38.4
without      178                        36.5
===========  =========================  =======================

``_negative_binomial`` has the likelihood with its gradient in one pass, and the tables of rising
factorials. Without it a training step with 2,000 genes takes 9 % longer (without the likelihood
alone 5 %, without the tables 4 %), with 299 genes 4 %. Compiling takes 1.5 s, once per
installation: later processes load the compiled code.

Its own ``exp`` and ``log1p`` make this possible: they take 0.21 and 0.32 ns per value. Those of the
C library, as numba calls them, take 2.3 and 6.9 ns, and the loops would be slower than torch.

Nothing here depends on models: functions take arrays and write to them.
"""
