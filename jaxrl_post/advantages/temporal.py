"""Advantages of single tokens from rewards along the sequence.

Time runs over the tokens that the policy chose. Where the mask is 0 (prompt, tool output, padding) value, return and
advantage are carried through unchanged, so that discounting counts actions only and the credit of a later turn reaches
the earlier ones. A reward is read only where the mask is 1: it belongs on the token that earned it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import dr_grpo
from jaxrl_post.advantages.layout import check_groups_fit, is_last
from jaxrl_post.types import Array


@jax.jit  # one compilation where it is called outside of jit, instead of one for each of its log T steps
def _from_the_right(slope: Array, offset: Array) -> Array:
    """`y[t] = slope[t] * y[t + 1] + offset[t]` with `y[T] = 0`, in O(log T) parallel steps."""

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], earlier[0] * later[1] + earlier[1]

    return jax.lax.associative_scan(compose, (slope, offset), reverse=True, axis=1)[1]


def _check_discounts(**discounts: float | Array) -> None:
    for name, number in discounts.items():
        if isinstance(number, float | int) and not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")


def _per_row(name: str, x: float | Array, mask: Array) -> Array:
    """A scalar, or one number per row as `[B, 1]`, so that it broadcasts over `[B, T]`."""
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape == (mask.shape[0], 1):
        return x
    if x.shape != (mask.shape[0],):
        raise ValueError(
            f"{name} must be a scalar, [B] or [B, 1] with B = {mask.shape[0]}, got shape {x.shape}; "
            "give one number per sequence"
        )
    return x[:, None]


def _prepare(x: Array, name: str, mask: Array) -> Array:
    x = masked.as_float(x)
    masked.check_axes(name, x, "[B, T]", "put a sequence's reward on its last trained token")
    masked.check_like("mask", mask, name, x)
    return jnp.where(mask != 0, x, 0.0)


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    gamma: float | Array = 1.0,
    lam: float | Array = 1.0,
    truncated: Array | None = None,
    whiten: bool = True,
) -> tuple[Array, Array]:
    r"""Generalised advantage estimation over the tokens that the policy chose.

    $$\delta_t = r_t + \gamma V_{t'} - V_t, \qquad A_t = \delta_t + \gamma \lambda A_{t'}, \qquad R_t = A_t + V_t$$

    where $t'$ is the next token with mask 1, and $V_{t'} = A_{t'} = 0$ after the last one. In a truncated sequence the
    value after the last token is not 0 but unknown; the last known one takes its place, $V_{t'} = V_t$ (extended GAE).

    Args:
        rewards: `[B, T]` float; read where the mask is 1.
        values: `[B, T]` float, units of the return; the critic's estimate before the token is chosen, read where the
            mask is 1.
        mask: `[B, T]`, nonzero where the policy chose the token.
        gamma: discount per trained token, in [0, 1].
        lam: $\lambda$ in [0, 1], a scalar or one per sequence as `[B]` or `[B, 1]` (see `length_adaptive_lam`): 1 for
            the Monte-Carlo return less the value, 0 for one-step differences.
        truncated: `[B]` bool, True for sequences that were cut before they ended; None for none.
        whiten: bring the advantages of the whole batch to zero mean and unit variance (`masked.whiten`).

    Returns:
        advantages: `[B, T]`, float32 or wider; 0 where the mask is, after whitening too.
        returns: `[B, T]`, units of the return; the critic's targets, taken before whitening; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, `gamma` or `lam` is outside [0, 1], or `lam` or
            `truncated` does not have one number per sequence.

    Example:
        >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 9.0, 0.25]])
        >>> advantages, returns = gae(rewards, values, jnp.array([[1, 0, 1]]), gamma=0.5, lam=0.5, whiten=False)
        >>> advantages.tolist(), returns.tolist()
        ([[-0.1875, 0.0, 0.75]], [[0.3125, 0.0, 1.0]])

    References: High-Dimensional Continuous Control Using Generalized Advantage Estimation (arXiv 1506.02438);
    Truncated Proximal Policy Optimization (arXiv 2506.15050) for truncated sequences.
    """
    _check_discounts(gamma=gamma, lam=lam)
    mask = jnp.asarray(mask)
    rewards, values = _prepare(rewards, "rewards", mask), _prepare(values, "values", mask)
    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    acts = (mask != 0).astype(dtype)
    skips = 1 - acts
    lam = _per_row("lam", lam, mask)
    value_from_here = _from_the_right(skips, acts * values)  # of the first trained token at or after t
    next_value = jnp.pad(value_from_here[:, 1:], ((0, 0), (0, 1)))
    if truncated is not None:
        cut = _per_row("truncated", truncated, mask) != 0
        next_value = jnp.where(cut & is_last(mask), values, next_value)
    delta = acts * (rewards + gamma * next_value - values)
    advantages = acts * _from_the_right(skips + acts * gamma * lam, delta)
    returns = advantages + values
    return masked.whiten(advantages, acts) if whiten else advantages, returns


def decoupled_gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    gamma: float | Array = 1.0,
    lam_policy: float | Array = 0.95,
    lam_value: float | Array = 1.0,
    truncated: Array | None = None,
    whiten: bool = True,
) -> tuple[Array, Array]:
    r"""GAE with one $\lambda$ for the policy's advantages and another for the critic's targets.

    The critic learns from unbiased returns ($\lambda = 1$), so that a reward at the end of a long sequence reaches its
    beginning; the policy keeps a smaller $\lambda$ for its variance. VAPO is
    `lam_policy=length_adaptive_lam(lengths)`.

    Args:
        rewards: `[B, T]` float; read where the mask is 1.
        values: `[B, T]` float, units of the return; see `gae`.
        mask: `[B, T]`, nonzero where the policy chose the token.
        gamma: discount per trained token, in [0, 1].
        lam_policy: $\lambda$ of the advantages, in [0, 1]; a scalar, `[B]` or `[B, 1]`.
        lam_value: $\lambda$ of the returns, in [0, 1]; a scalar, `[B]` or `[B, 1]`.
        truncated: `[B]` bool, True for sequences that were cut before they ended; None for none.
        whiten: bring the advantages of the whole batch to zero mean and unit variance.

    Returns:
        advantages: `[B, T]`, float32 or wider, from `lam_policy`; 0 where the mask is.
        returns: `[B, T]`, units of the return, from `lam_value`; 0 where the mask is.

    Raises:
        ValueError: as `gae`.

    Example:
        >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]])
        >>> [x.tolist() for x in decoupled_gae(rewards, values, jnp.ones((1, 2)), lam_policy=0.0, whiten=False)]
        [[[-0.25, 0.75]], [[1.0, 1.0]]]

    References: What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret (arXiv 2503.01491); VAPO:
    Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks (arXiv 2504.05118).
    """
    _check_discounts(lam_policy=lam_policy, lam_value=lam_value)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam_policy, truncated=truncated, whiten=whiten)
    _, returns = gae(rewards, values, mask, gamma=gamma, lam=lam_value, truncated=truncated, whiten=False)
    return advantages, returns


def length_adaptive_lam(lengths: Array, *, alpha: float = 0.05) -> Array:
    r"""GAE's $\lambda$ by the length of the sequence, $\lambda_b = 1 - 1 / \max(\alpha L_b, 1)$.

    The weights $\lambda^k$ of the temporal differences then sum to about $\alpha L$: the horizon grows with the length.

    Args:
        lengths: `[B]` int or float, trained tokens of each sequence.
        alpha: $\alpha$, the horizon as a share of the length.

    Returns:
        `[B]`, float32 or wider, in [0, 1); 0 for sequences of at most $1 / \alpha$ tokens.

    Raises:
        ValueError: if `alpha` is not above 0.

    Example:
        >>> [round(lam, 4) for lam in length_adaptive_lam(jnp.array([10, 100, 1000])).tolist()]
        [0.0, 0.8, 0.98]

    Reference: VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks (arXiv 2504.05118).
    """
    if isinstance(alpha, float | int) and alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha}; 1 / alpha is the longest sequence with lambda 0")
    return 1 - 1 / jnp.maximum(alpha * masked.as_float(lengths), 1)


def reinforce_plus_plus(rewards: Array, mask: Array, *, gamma: float | Array = 1.0, whiten: bool = True) -> Array:
    r"""Discounted reward-to-go, normalised over all tokens of the batch.

    $$G_t = r_t + \gamma G_{t'}, \qquad A = \mathrm{whiten}(G)$$

    where $t'$ is the next token with mask 1. A penalty for the KL divergence goes into the rewards.

    Args:
        rewards: `[B, T]` float; read where the mask is 1.
        mask: `[B, T]`, nonzero where the policy chose the token.
        gamma: discount per trained token, in [0, 1].
        whiten: False leaves the reward-to-go as it is.

    Returns:
        `[B, T]`, float32 or wider; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, or `gamma` is outside [0, 1].

    Example:
        >>> reinforce_plus_plus(jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[1, 0, 1]]), gamma=0.5, whiten=False).tolist()
        [[0.5, 0.0, 1.0]]

    Reference: REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models
    (arXiv 2501.03262).
    """
    _check_discounts(gamma=gamma)
    mask = jnp.asarray(mask)
    rewards = _prepare(rewards, "rewards", mask)
    acts = (mask != 0).astype(rewards.dtype)
    returns = acts * _from_the_right(1 - acts + acts * gamma, rewards)
    return masked.whiten(returns, acts) if whiten else returns


def reinforce_plus_plus_baseline(rewards: Array, mask: Array, valid: Array | None = None) -> Array:
    r"""Reward less its group's mean, then normalised over all tokens of the batch.

    $$A_{g,t} = \mathrm{whiten}(m_{g,t}\,(r_g - \bar r))$$

    The group's mean is the baseline; the batch's tokens, not the group, give the scale.

    Args:
        rewards: `[P, G]` float.
        mask: `[B, T]`, nonzero where the policy chose the token; `B = P * G`, prompt-major.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[B, T]`, float32 or wider; 0 where the mask is. Rollouts that are not valid, or that are the only valid one of
        their group and hence have no baseline, get 0 and stay out of the batch's statistics too.

    Raises:
        ValueError: if `rewards` is not `[P, G]`, `valid` has another shape, or `mask` is not `[P * G, T]`.

    Example:
        >>> advantages = reinforce_plus_plus_baseline(jnp.array([[1.0, 0.0]]), jnp.array([[0, 1, 1], [0, 1, 1]]))
        >>> [round(a, 4) for a in advantages[:, 1].tolist()]
        [0.866, -0.866]

    Reference: REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models
    (arXiv 2501.03262).
    """
    rewards, mask = masked.as_float(rewards), jnp.asarray(mask)
    check_groups_fit("rewards", rewards, mask)
    centered = dr_grpo(rewards, valid)
    counts = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid) != 0
    counts &= jnp.sum(counts, axis=1, keepdims=True) > 1
    trained = (mask != 0) & counts.reshape(-1, 1)
    return masked.whiten(jnp.broadcast_to(centered.reshape(-1, 1), mask.shape), trained)
