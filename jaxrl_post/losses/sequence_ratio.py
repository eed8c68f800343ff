r"""Surrogates whose importance weight belongs to more than a token: GSPO, GMPO and VESPO to the sequence, step-PPO to
a step of it.

All give one number per token, so that token advantages and every aggregation apply. A weight $s$ of the sequence meets
the gradient of a token as $s_t = \mathrm{sg}(s) \exp(\log\pi_t - \mathrm{sg}(\log\pi_t))$: it has the value of $s$,
and the mean over tokens has its gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_constant, as_tokens, check_at_least
from jaxrl_post.losses.policy import LOG_RATIO_LIMIT, log_ratio
from jaxrl_post.types import Array

_TOKENS = 1  # the axis of T


def _carry(value: Array, tokens: Array) -> Array:
    """`value` `[B, 1]`, with the gradient of `value * tokens` for each token; none for a token that cannot be."""
    tokens = jnp.where(jnp.isneginf(tokens), 0.0, tokens)
    return jax.lax.stop_gradient(value) * jnp.exp(tokens - jax.lax.stop_gradient(tokens))


def sequence_log_ratio(logp: Array, old_logp: Array, mask: Array, *, normalize_length: bool = True) -> Array:
    r"""Log of the sequence's importance ratio: mean over its tokens of $d_t = \log\pi_t - \log\pi_{old,t}$, or the sum.

    Its exponential is the geometric mean of the tokens' ratios, or their product. With it in the place of `logp`,
    `clipped_low` and `clipped_high` say which sequences `gspo` clips.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy at the start of the step. A constant.
        mask: `[B, T]`; 1 where the token counts.
        normalize_length: mean over tokens; False for the sum.

    Returns:
        `[B]`, float32 or wider, nats, within +-20; 0 for a sequence without tokens.

    Raises:
        ValueError: if `logp` is not `[B, T]` or the others have another shape.

    Example:
        >>> logp, mask = jnp.array([[0.2, 0.4, 9.0]]), jnp.array([[1, 1, 0]])
        >>> [round(float(sequence_log_ratio(logp, 0 * logp, mask, normalize_length=n)[0]), 4) for n in (True, False)]
        [0.3, 0.6]

    Reference: Group Sequence Policy Optimization (arXiv 2507.18071).
    """
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    reduce = masked.mean if normalize_length else masked.sum
    return jnp.clip(reduce(logp - old_logp, mask, _TOKENS), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def gspo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    normalize_length: bool = True,
) -> Array:
    r"""PPO's clipped surrogate with the ratio of the sequence, in its token form (GSPO-token).

    $$s = \exp(\mathrm{mean}_t\, d_t), \qquad s_t = \mathrm{sg}(s) \exp(\log\pi_t - \mathrm{sg}(\log\pi_t)), \qquad
    \ell_t = -\min(s_t A_t,\ \mathrm{clip}(s_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_t)$$

    With `aggregate(..., "seq_mean_token_mean")` and one advantage per sequence, value and gradient are those of the
    sequence form $-\min(s A, \mathrm{clip}(s) A)$ averaged over sequences. With `"seq_mean_token_sum"` each sequence
    weighs as much as it has tokens, which is LUSPO.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy at the start of the step. A constant.
        advantages: `[B, T]`, of the sequence or of each token. A constant.
        mask: `[B, T]`; 1 where the token counts.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1. A mean over tokens stays near 1, hence the small
            default.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.
        normalize_length: False for the product of the tokens' ratios, $s = \exp(\sum_t d_t)$, as sequence-level PPO and
            RLOO have it; the mean over tokens still has the gradient of the sequence form. Wants wide clips (0.2).

    Returns:
        `[B, T]`, float32 or wider: the loss of each token; all tokens of a sequence are clipped or none.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, or a clip distance is negative.

    Example:
        >>> logp, ones = jnp.array([[0.2, 0.4]]), jnp.ones((1, 2))
        >>> [round(float(gspo(logp, 0 * logp, ones, ones, clip_high=high)[0, 0]), 4) for high in (0.5, 0.1)]
        [-1.3499, -1.1]

    Reference: Group Sequence Policy Optimization (arXiv 2507.18071); the weighting by length is of Length-Unbiased
    Sequence Policy Optimization (arXiv 2602.05261).
    """
    check_at_least("clip_low", clip_low, 0, "a distance from 1, e.g. 3e-4")
    check_at_least("clip_high", clip_high, 0, "a distance from 1, e.g. 4e-4")
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    advantages = as_constant("advantages", advantages, logp)
    ratio = jnp.exp(sequence_log_ratio(logp, old_logp, mask, normalize_length=normalize_length))[:, None]
    # The gradient of a sum is as many times that of the mean as there are tokens.
    times = 1.0 if normalize_length else masked.sum(mask, mask != 0, _TOKENS, keepdims=True)
    ratio = _carry(ratio, times * logp)
    return jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)


def step_log_ratio(logp: Array, old_logp: Array, mask: Array, step: Array, *, normalize_length: bool = True) -> Array:
    r"""Log of the importance ratio of each token's step: mean over its tokens of $\log\pi - \log\pi_{old}$, or sum.

    `sequence_log_ratio` by segment: with one step per sequence it is the same number at every token.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy at the start of the step. A constant.
        mask: `[B, T]`; 1 where the token counts.
        step: `[B, T]` int, the step of the token, in [0, T). A counted token outside of it is a step of its own.
        normalize_length: mean over tokens; False for the sum.

    Returns:
        `[B, T]`, float32 or wider, nats, within +-20; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> logp, step = jnp.array([[0.2, 0.4, 0.5, 9.0]]), jnp.array([[0, 0, 1, -1]])
        >>> found = step_log_ratio(logp, 0 * logp, step >= 0, step)
        >>> [round(d, 4) for d in found[0].tolist()]
        [0.3, 0.3, 0.5, 0.0]

    Reference: Online Process Reward Leanring for Agentic Reinforcement Learning (arXiv 2509.19199).
    """
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    total = _over_step(mask * (logp - old_logp), mask, step)
    if normalize_length:
        total = total / jnp.maximum(_over_step(mask, mask, step), 1)
    return jnp.clip(total, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def step_ppo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    step: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalize_length: bool = True,
) -> Array:
    r"""PPO's clipped surrogate with the ratio of the token's step, in the token form of `gspo`.

    $$s_k = \exp(\mathrm{mean}_{t \in k}\, d_t), \qquad
    s_t = \mathrm{sg}(s_{k(t)}) \exp(\log\pi_t - \mathrm{sg}(\log\pi_t)), \qquad
    \ell_t = -\min(s_t A_t,\ \mathrm{clip}(s_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_t)$$

    With one advantage per step, the mean over a step's tokens has value and gradient of the step form
    $-\min(s A, \mathrm{clip}(s) A)$: a step is taken or clipped as a whole, its neighbours are not.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy at the start of the step. A constant.
        advantages: `[B, T]`, of the step or of each token. A constant.
        mask: `[B, T]`; 1 where the token counts.
        step: `[B, T]` int, the step of the token, in [0, T). A counted token outside of it is a step of its own.
        clip_low: $\epsilon_{low}$, distance of the lower bound from 1.
        clip_high: $\epsilon_{high}$, distance of the upper bound from 1.
        normalize_length: False for the product of the ratios of the step's tokens, $s_k = \exp(\sum_t d_t)$, the
            probability of the whole action; the mean over the step's tokens still has the gradient of the step form.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, or a clip distance is negative.

    Example:
        >>> logp, step = jnp.array([[0.2, 0.4, 0.0]]), jnp.array([[0, 0, 1]])
        >>> ones = jnp.ones((1, 3))
        >>> [round(x, 4) for x in step_ppo(logp, 0 * logp, ones, ones, step)[0].tolist()]
        [-1.2, -1.2, -1.0]

    Reference: Online Process Reward Leanring for Agentic Reinforcement Learning (arXiv 2509.19199).
    """
    check_at_least("clip_low", clip_low, 0, "a distance from 1, e.g. 0.2")
    check_at_least("clip_high", clip_high, 0, "a distance from 1, e.g. 0.2")
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    advantages = as_constant("advantages", advantages, logp)
    ratio = jnp.exp(step_log_ratio(logp, old_logp, mask, step, normalize_length=normalize_length))
    # The gradient of a sum is as many times that of the mean as there are tokens.
    times = 1.0 if normalize_length else _over_step(mask, mask, step)
    ratio = _carry(ratio, times * logp)
    return jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)


def _over_step(x: Array, mask: Array, step: Array) -> Array:
    """The sum of `x` `[B, T]` over the counted tokens of each token's step, `[B, T]`; 0 where the mask is."""
    step = jnp.asarray(step)
    masked.check_like("step", step, "logp", x)
    length = x.shape[_TOKENS]
    counts, known = mask != 0, (step >= 0) & (step < length)
    place = jnp.where(known, step, length + jnp.arange(length))
    rows = jnp.arange(x.shape[0])[:, None]
    totals = jnp.zeros((x.shape[0], 2 * length), x.dtype).at[rows, place].add(jnp.where(counts, x, 0.0))
    return jnp.where(counts, jnp.take_along_axis(totals, place, axis=_TOKENS), 0.0)


def gmpo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Array:
    r"""Geometric mean of the tokens' ratios, each clipped on the side to which its advantage pushes.

    $$\tilde d_t = \min(d_t, \epsilon_{high})\ \text{where}\ A_t > 0,\quad
    \max(d_t, -\epsilon_{low})\ \text{elsewhere}$$
    $$R = \exp(\mathrm{mean}_t\, \tilde d_t), \qquad
    \ell_t = -\mathrm{sg}(R) \exp(\tilde d_t - \mathrm{sg}(\tilde d_t))\, A_t$$

    With `aggregate(..., "seq_mean_token_mean")` and one advantage per sequence, value and gradient are those of
    $-R A$ averaged over sequences. Unlike in `gspo`, a clipped token loses its own gradient and no other's.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy at the start of the step. A constant.
        advantages: `[B, T]`, in the paper one number per sequence. A constant.
        mask: `[B, T]`; 1 where the token counts.
        clip_low: $\epsilon_{low}$, nats: the ratio's lower bound is $e^{-\epsilon_{low}}$.
        clip_high: $\epsilon_{high}$, nats: the ratio's upper bound is $e^{\epsilon_{high}}$.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token. On the side that is not clipped, log-ratios are clamped at
        20 nats; other implementations leave them free.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, or a clip distance is negative.

    Example:
        >>> logp, ones = jnp.array([[0.2, 3.0]]), jnp.ones((1, 2))
        >>> round(float(gmpo(logp, 0 * logp, ones, ones)[0, 0]), 4)  # exp((0.2 + 0.4) / 2)
        -1.3499

    Reference: Geometric-Mean Policy Optimization (arXiv 2507.20673).
    """
    check_at_least("clip_low", clip_low, 0, "nats, e.g. 0.4")
    check_at_least("clip_high", clip_high, 0, "nats, e.g. 0.4")
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    advantages = as_constant("advantages", advantages, logp)
    d = log_ratio(logp, old_logp)
    d = jnp.where(advantages > 0, jnp.minimum(d, clip_high), jnp.maximum(d, -clip_low))
    return -_carry(jnp.exp(masked.mean(d, mask, _TOKENS, keepdims=True)), d) * advantages


def vespo_weight(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Array:
    r"""The weight of `vespo`: $\phi(w) = w^k e^{\lambda (1 - w)}$ of the sequence's ratio $w = \exp(\sum_t d_t)$.

    $\phi(1) = 1$; it rises to its maximum at $w = k / \lambda$ and fades on both sides, without a clip.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy that sampled.
        advantages: `[B, T]`; the sign says which $k, \lambda$ hold.
        mask: `[B, T]`; 1 where the token counts. A masked token is not part of $w$.
        k_pos: $k$ where the advantage is not negative.
        lambda_pos: $\lambda$ there.
        k_neg: $k$ where the advantage is negative.
        lambda_neg: $\lambda$ there.

    Returns:
        `[B, T]`, float32 or wider, without gradient.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, or a constant is negative.

    Example:
        >>> logp = jnp.log(jnp.array([[2.0, 1.0], [0.5, 1.0]]))
        >>> weight = vespo_weight(logp, 0 * logp, jnp.ones((2, 2)), jnp.ones((2, 2)))
        >>> [round(w, 4) for w in weight[:, 0].tolist()]
        [0.1991, 1.1204]

    Reference: VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training
    (arXiv 2602.10693).
    """
    for name, value in (("k_pos", k_pos), ("lambda_pos", lambda_pos), ("k_neg", k_neg), ("lambda_neg", lambda_neg)):
        check_at_least(name, value, 0)
    log_w = sequence_log_ratio(logp, old_logp, mask, normalize_length=False)[:, None]
    advantages = as_constant("advantages", advantages, logp)
    k, lam = jnp.where(advantages >= 0, k_pos, k_neg), jnp.where(advantages >= 0, lambda_pos, lambda_neg)
    return jax.lax.stop_gradient(jnp.exp(k * log_w + lam * (1 - jnp.exp(log_w))))


def vespo(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Array:
    r"""Policy gradient weighted by a smooth function of the sequence's ratio: $\ell_t = -\phi(w)\, A_t \log\pi_t$.

    $\phi$ is `vespo_weight`. A sampler that differs from the policy at the start of the step is corrected by giving its
    log-probs as `old_logp`: $w$ is then the whole ratio, and no token can take the sequence with it by being masked.

    Args:
        logp: `[B, T]` float, nats; log-prob of the token under the trained policy.
        old_logp: `[B, T]`, nats; log-prob under the policy that sampled. A constant.
        advantages: `[B, T]`. A constant.
        mask: `[B, T]`; 1 where the token counts.
        k_pos: $k$ of $\phi(w) = w^k e^{\lambda(1 - w)}$ where the advantage is not negative.
        lambda_pos: $\lambda$ there.
        k_neg: $k$ where the advantage is negative.
        lambda_neg: $\lambda$ there.

    Returns:
        `[B, T]`, float32 or wider: the loss of each token. Its value says nothing; its gradient does.

    Raises:
        ValueError: if `logp` is not `[B, T]`, the others have another shape, or a constant is negative.

    Example:
        >>> logp, ones = jnp.array([[-1.0, -2.0]]), jnp.ones((1, 2))
        >>> vespo(logp, logp, 0.5 * ones, ones).tolist()
        [[0.5, 1.0]]

    Reference: VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training
    (arXiv 2602.10693).
    """
    logp, old_logp, mask = as_tokens(logp, old_logp, mask)
    constants = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    weight = vespo_weight(logp, old_logp, advantages, mask, **constants)
    return -weight * as_constant("advantages", advantages, logp) * logp
