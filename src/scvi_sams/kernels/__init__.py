"""Loops that numba compiles for processors: what is here, and what each of them buys.

A loop is here only if it saves at least 5 % of all that a user does with a screen (registration,
training, masks, effects, latent states, hits) on one of two screens. Accelerators have the same in
operations of torch, and both are held to the same tests. On one thread of a 2-core AMD EPYC
(``benchmarks/whole_path.py`` repeats it):

===========  =========================  =======================
CPU seconds  20,000 cells, 2,000 genes  19,619 cells, 299 genes
===========  =========================  =======================
with all     168                        38.4
without      178                        36.5
===========  =========================  =======================

``_negative_binomial`` has the likelihood with its gradient in one pass, and the tables of rising
factorials. Without it a step of training on 2,000 genes takes 9 % longer (without the likelihood
alone 5 %, without the tables 4 %), on 299 genes 4 %. Compiling takes 1.5 s, once per installation:
later processes load what was compiled.

What makes it so fast are its own ``exp`` and ``log1p``, which take .21 and .32 ns a value. The C
library's, as numba calls them, take 2.3 and 6.9, and the loops would be slower than torch.

Nothing here knows of models: arrays go in, and are written to.
"""
