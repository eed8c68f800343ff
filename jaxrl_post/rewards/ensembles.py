"""One reward from several reward models, and how far best-of-n by a reward can be trusted.

Models should be brought to a common scale first, e.g. by `zscore_by_input` or their mean and deviation on samples of
the first policy.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from jaxrl_post import masked
from jaxrl_post.types import Array

Combination = Literal["mean", "worst_case", "uncertainty"]


def ensemble_reward(
    scores: Array, *, combine: Combination = "uncertainty", weight: float | Array = 0.5, ddof: int = 0
) -> Array:
    r"""Reward from an ensemble of reward models, so that what only some of them like is not worth it.

    | combine | reward |
    |---|---|
    | `mean` | $\bar R$ |
    | `worst_case` (WCO) | $\min_k R_k$ |
    | `uncertainty` (UWO) | $\bar R - \lambda\, \mathrm{Var}_k R_k$ |

    Args:
        scores: `[K, ...]` float, of `K` models.
        combine: of the table.
        weight: $\lambda$, in units of one over the score; 0.5 for best-of-n and 0.1 to 0.5 for PPO in the paper.
        ddof: 0 for the population's variance, as the paper's code has it for best-of-n, 1 for the unbiased one, as for
            PPO.

    Returns:
        `[...]`, float32 or wider. With one model all three are its score.

    Raises:
        ValueError: if there is no axis of models, `combine` is unknown, or `ddof` is neither 0 nor 1.

    Example:
        >>> scores = jnp.array([1.0, 2.0, 3.0])
        >>> [round(float(ensemble_reward(scores, combine=how)), 4) for how in ("mean", "worst_case", "uncertainty")]
        [2.0, 1.0, 1.6667]

    Reference: Reward Model Ensembles Help Mitigate Overoptimization (arXiv 2310.02743).
    """
    if combine not in get_args(Combination):
        raise ValueError(f"combine must be one of {', '.join(get_args(Combination))}, got {combine!r}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    scores = masked.as_float(scores)
    if scores.ndim == 0 or scores.shape[0] == 0:
        raise ValueError(f"scores must be [K, ...] of K models, got shape {scores.shape}")
    if combine == "worst_case":
        return jnp.min(scores, axis=0)
    if combine == "mean":
        return jnp.mean(scores, axis=0)
    return jnp.mean(scores, axis=0) - weight * masked.var(scores, jnp.ones(scores.shape), 0, ddof=ddof)


def expected_best_of_n(proxy: Array, gold: Array, n: int) -> Array:
    r"""Expected gold score of the best of $n$ by a proxy, without bias, from $N \geq n$ samples.

    $$\sum_{i=n}^{N} \frac{\binom{i-1}{n-1}}{\binom{N}{n}}\, g_{(i)}$$

    with the gold scores in ascending order of the proxy: the mean over all subsets of $n$ samples.

    Args:
        proxy: `[N]` float, the scores that choose; of equal ones the later sample wins.
        gold: `[N]` float, the scores that count.
        n: samples of which the best is taken; static.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: if the arrays are not `[N]` of one length, or `n` is not in [1, N].

    Example:
        >>> round(float(expected_best_of_n(jnp.array([1.0, 3.0, 2.0]), jnp.array([0.0, 2.0, 1.0]), 2)), 6)
        1.666667

    Reference: Reward Model Ensembles Help Mitigate Overoptimization (arXiv 2310.02743).
    """
    proxy, gold = masked.as_float(proxy), masked.as_float(gold)
    masked.check_axes("proxy", proxy, "[N]")
    masked.check_like("gold", gold, "proxy", proxy)
    size = proxy.shape[0]
    if not 1 <= n <= size:
        raise ValueError(f"n must be between 1 and the number of samples, {size}, got {n}")
    of_all = math.lgamma(size + 1) - math.lgamma(n + 1) - math.lgamma(size - n + 1)
    ranks = np.arange(n, size + 1)
    log_share = [math.lgamma(i) - math.lgamma(n) - math.lgamma(i - n + 1) - of_all for i in ranks]
    share = jnp.asarray(np.exp(log_share), gold.dtype)
    return jnp.sum(share * gold[jnp.argsort(proxy, stable=True)][n - 1 :])


def best_of_n_kl(n: int) -> float:
    r"""Divergence of the best of $n$ from the policy that samples, $\log n - (n - 1) / n$, nats.

    It is exact where no two samples are equal, and else a bound.

    Example:
        >>> round(best_of_n_kl(4), 6)
        0.636294

    Reference: Theoretical guarantees on the best-of-n alignment policy (arXiv 2401.01879).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n
