"""What a checkpoint is worth, measured: the subcommands of ``python -m glmjax.eval`` and what they share.

`text`, `needle`, `drafts` and `agreement` are one subcommand each; `arguments`, `rows`, `compression`, `rollout`,
`loops` and `report` serve them; `probe` is what a training run measures; `margins` tells rounding from faults, for the
comparison of served output with `generate`'s. Everything works on any checkpoint that `glmjax.load` can load.

It imports `model`, `glm`, `speculation`, and of `training` the corpus, its planted lines and the cross-entropy (none
needs the `train` extra; the probe does). Only entry points and tests import it.
"""
