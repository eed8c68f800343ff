"""Advantages from the distribution of scores of bundles of prompts: risk-averse, after tracked quantiles."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.advantages.scale import divide_by_spread, spread
from jaxrl_post.types import Array

BundleCredit: TypeAlias = Literal["uniform", "std", "sum_mean", "score"]


def update_quantiles(
    quantiles: Array, scores: Array, levels: Array, valid: Array | None = None, *, lr: float = 0.1
) -> Array:
    r"""One step of tracked quantiles, $q_\alpha \leftarrow q_\alpha + \eta\,(\alpha - \mathrm{mean}\,1[S < q_\alpha])$.

    Args:
        quantiles: `[L]` float, units of the score; zeros at the start.
        scores: any shape, float: the scores of the batch.
        levels: `[L]` float in (0, 1), $\alpha$.
        valid: `scores`' shape, bool; None for all.
        lr: $\eta$, units of the score: the most that a quantile moves per step.

    Returns:
        `[L]`, float32 or wider; unchanged where no score is valid.

    Raises:
        ValueError: if `quantiles` and `levels` are not `[L]`, or `valid` has another shape than `scores`.

    Example:
        >>> update_quantiles(jnp.zeros(2), jnp.array([1.0, 2.0, -1.0, 3.0]), jnp.array([0.5, 0.75]), lr=1.0).tolist()
        [0.25, 0.5]

    Reference: RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training (arXiv 2510.00911).
    """
    quantiles, scores, levels = masked.as_float(quantiles), masked.as_float(scores), masked.as_float(levels)
    masked.check_axes("quantiles", quantiles, "[L]")
    masked.check_like("levels", levels, "quantiles", quantiles)
    counts = jnp.ones(scores.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "scores", scores)
    below = jax.vmap(lambda q: masked.mean((scores < q).astype(quantiles.dtype), counts))(quantiles)
    return jax.lax.stop_gradient(jnp.where(jnp.any(counts), quantiles + lr * (levels - below), quantiles))


def mixed_value_at_risk(
    scores: Array,
    quantiles: Array,
    *,
    alpha_d: float = 0.2,
    alpha_u: float = 0.8,
    omega: float = 1.5,
    natural_baseline: bool = False,
) -> Array:
    r"""What a score contributes to a mixture of the range value at risk and the lower tail's expectation.

    $$A = \frac{\omega\, \mathrm{cvar} + \mathrm{rvar}}{\omega + 1}, \qquad
    \mathrm{rvar} = \frac{(S - q_d)^+ - (S - q_u)^+ + b}{\alpha_u - \alpha_d}, \qquad
    \mathrm{cvar} = -\frac{(q_d - S)^+}{\alpha_d}$$

    Scores below the lower quantile weigh most; above the upper one nothing more is to be had.

    Args:
        scores: any shape, float.
        quantiles: `[2]` float, $q_d$ and $q_u$, units of the score.
        alpha_d: level of the lower quantile.
        alpha_u: level of the upper quantile.
        omega: $\omega$, weight of the lower tail.
        natural_baseline: $b = q_d - q_u$, so that the best that can be had is 0; otherwise $b = 0$.

    Returns:
        `scores`' shape, float32 or wider, units of the score.

    Raises:
        ValueError: if `quantiles` is not `[2]`, or not `0 < alpha_d < alpha_u <= 1`.

    Example:
        >>> scores, quantiles = jnp.array([1.0, 3.0, 5.0]), jnp.array([2.0, 4.0])
        >>> [round(a, 4) for a in mixed_value_at_risk(scores, quantiles).tolist()]
        [-3.0, 0.6667, 1.3333]
        >>> [round(a, 4) for a in mixed_value_at_risk(scores, quantiles, natural_baseline=True).tolist()]
        [-4.3333, -0.6667, 0.0]

    Reference: RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training (arXiv 2510.00911).
    """
    if not 0 < alpha_d < alpha_u <= 1:
        raise ValueError(f"alpha_d and alpha_u must satisfy 0 < alpha_d < alpha_u <= 1, got {alpha_d} and {alpha_u}")
    scores, quantiles = masked.as_float(scores), masked.as_float(quantiles)
    if quantiles.shape != (2,):
        raise ValueError(f"quantiles must be [2], those of alpha_d and alpha_u, got shape {quantiles.shape}")
    low, high = quantiles[0], quantiles[1]
    base = low - high if natural_baseline else 0.0
    rvar = (jnp.maximum(scores - low, 0) - jnp.maximum(scores - high, 0) + base) / (alpha_u - alpha_d)
    cvar = -jnp.maximum(low - scores, 0) / alpha_d
    return (omega * cvar + rvar) / (omega + 1)


def riskpo(
    rewards: Array,
    quantiles: Array,
    valid: Array | None = None,
    *,
    bundle_size: int = 5,
    alpha_d: float = 0.2,
    alpha_u: float = 0.8,
    omega: float = 1.5,
    natural_baseline: bool = False,
    normalize_std: bool = True,
    credit: BundleCredit = "sum_mean",
    lr: float = 0.1,
    eps: float = 1e-6,
) -> tuple[Array, Array]:
    r"""Risk-based advantages: rollouts of several prompts are one paper, whose score is judged by tracked quantiles.

    The $g$-th rollouts of `bundle_size` adjacent prompts make the score $S_g = \sum_q r_{q,g}$;
    `mixed_value_at_risk` judges it; `credit` gives each member its part.

    Args:
        rewards: `[P, G]` float. The prompts of a batch come in random order, so adjacent ones are a random bundle; if
            `bundle_size` does not divide `P`, the last bundle is smaller.
        quantiles: `[2]` float, tracked quantiles of the levels `alpha_d` and `alpha_u`; zeros at the start.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        bundle_size: prompts per bundle.
        alpha_d: level of the lower quantile.
        alpha_u: level of the upper quantile.
        omega: weight of the lower tail.
        natural_baseline: see `mixed_value_at_risk`.
        normalize_std: divide by the standard deviation of the bundle's scores over `G`, plus `eps`.
        credit: what member `q` gets of its bundle's advantage: `"uniform"`, all of it; `"std"`, divided by the standard
            deviation of its own prompt's rewards (1 where below 0.001); `"sum_mean"`, in proportion to its difference
            from its prompt's mean, equal parts where the differences sum to 0; `"score"`, 1.5 times if its reward is
            not above 0, half otherwise.
        lr: of `update_quantiles`, with which the scores of this batch move the quantiles, after they were used.
        eps: added to the standard deviation.

    Returns:
        advantages: `[P, G]`, float32 or wider; 0 where not valid, and for the $g$-th rollouts of a bundle of which one
            is not valid: their score is unknown. With `normalize_std`, 0 where a bundle's scores are equal.
        quantiles: `[2]`, for the next call.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `bundle_size` is below 1, `credit` is unknown, or as
            `mixed_value_at_risk`.

    Example:
        >>> rewards = jnp.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
        >>> options = {"bundle_size": 2, "normalize_std": False, "credit": "uniform"}
        >>> advantages, quantiles = riskpo(rewards, jnp.array([1.0, 2.0]), **options)
        >>> [round(a, 4) for a in advantages[0].tolist()], [round(q, 4) for q in quantiles.tolist()]
        ([-3.0, 0.0, 0.6667], [0.9867, 2.0133])

    Reference: RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training (arXiv 2510.00911).
    """
    if credit not in get_args(BundleCredit):
        raise ValueError(f"credit must be one of {', '.join(get_args(BundleCredit))}, got {credit!r}")
    if bundle_size < 1:
        raise ValueError(f"bundle_size must be at least 1, got {bundle_size}")
    rewards, valid = check_rewards(rewards, valid)
    rewards = jnp.where(valid, rewards, 0.0)
    prompts = rewards.shape[0]
    bundle = jnp.arange(prompts) // bundle_size
    number = -(-prompts // bundle_size)

    def bundled(x: Array) -> Array:
        return jax.ops.segment_sum(x, bundle, num_segments=number)

    scores, missing = bundled(rewards), bundled((~valid).astype(jnp.int32))
    whole = missing == 0
    risk = {"alpha_d": alpha_d, "alpha_u": alpha_u, "omega": omega, "natural_baseline": natural_baseline}
    judged = mixed_value_at_risk(scores, quantiles, **risk)
    if normalize_std:
        judged = divide_by_spread(judged, spread(scores, whole, 1), eps)
    given = judged[bundle]
    if credit == "score":
        given = given * jnp.where(rewards <= 0, 1.5, 0.5)
    elif credit == "std":
        own = masked.std(rewards, valid, 1, keepdims=True)
        given = given / jnp.where(own < 1e-3, 1.0, own)
    elif credit == "sum_mean":
        difference = masked.center(rewards, valid, 1)
        total = bundled(difference)[bundle]
        clear = jnp.abs(total) > 1e-6
        size = bundled(jnp.ones_like(rewards))[bundle]
        given = given * jnp.where(clear, difference / jnp.where(clear, total, 1.0), 1 / size)
    advantages = jnp.where(valid & whole[bundle], given, 0.0)
    levels = jnp.array([alpha_d, alpha_u], jnp.result_type(quantiles, jnp.float32))
    return advantages, update_quantiles(quantiles, scores, levels, whole, lr=lr)
