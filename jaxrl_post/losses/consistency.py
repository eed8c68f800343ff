r"""Squared-consistency losses: at the optimum of a KL-regularised reward, reward and log-ratio differ by a constant.

The optimum of $E[r] - \beta\, KL(\pi \| \pi_0)$ satisfies
$r(y) - \beta \log(\pi(y) / \pi_0(y)) = \beta \log Z$ for every answer of a prompt. The losses here square the
deviation from that, each with its own stand-in for $\log Z$. They need no importance ratio, so the answers may come
from any policy. All read log-probs of whole sequences, summed over their trained tokens, in groups `[P, G]`;
log-ratios are not exponentiated and hence not clamped.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.policy import importance_ratio
from jaxrl_post.types import Array

_GROUP = 1  # the axis of G
_SUM_HINT = "sum token log-probs with masked.sum(logp, mask, axis=1), then as_groups(logp, group_size=8)"


def check_positive(name: str, number: float | Array) -> None:
    """Raise ValueError unless a Python number is above 0; traced numbers pass."""
    if isinstance(number, float | int) and not number > 0:
        raise ValueError(f"{name} must be above 0, got {number}")


def prepare_group(logp: Array, valid: Array | None, **constants: Array) -> tuple[Array, Array, list[Array]]:
    """Check `[P, G]` arrays, stop the gradient of all but `logp`, and put 0 where a row is not valid.

    Args:
        logp: `[P, G]` float, nats.
        valid: `[P, G]` bool, or None for all.
        **constants: further arrays by argument name, each `[P, G]`.

    Returns:
        `logp`, `valid` as bool, and the constants in their order; all floats are float32 or wider.

    Raises:
        ValueError: if `logp` is not `[P, G]` or another array has another shape.

    Example:
        >>> logp, valid, (rewards,) = prepare_group(jnp.ones((1, 2)), None, rewards=jnp.ones((1, 2)))
        >>> valid.tolist()
        [[True, True]]
    """
    logp = masked.as_float(logp)
    masked.check_axes("logp", logp, "[P, G]", _SUM_HINT)
    valid = jnp.ones(logp.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "logp", logp)
    cleaned = []
    for name, x in constants.items():
        x = masked.as_float(x)
        masked.check_like(name, x, "logp", logp)
        cleaned.append(jax.lax.stop_gradient(jnp.where(valid, x, 0.0)))
    return jnp.where(valid, logp, 0.0), valid, cleaned


def log_mean_exp(x: Array, valid: Array | None = None) -> Array:
    r"""$\log \frac1n \sum_j e^{x_j}$ over the valid members of each group.

    Args:
        x: `[P, G]` float, nats.
        valid: `[P, G]` bool, False where the member does not count; None for all.

    Returns:
        `[P]`, float32 or wider, nats; 0 with zero gradient for a group without valid members. A member may be -inf.

    Raises:
        ValueError: if `x` is not `[P, G]` or `valid` has another shape.

    Example:
        >>> round(float(log_mean_exp(jnp.log(jnp.array([[1.0, 3.0]])))[0]), 6)
        0.693147
    """
    x = masked.as_float(x)
    masked.check_axes("x", x, "[P, G]")
    valid = jnp.ones(x.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "x", x)
    counts = valid & (x > -jnp.inf)
    shift = jax.lax.stop_gradient(masked.max(x, counts, _GROUP, keepdims=True))
    total = masked.sum(jnp.exp(jnp.where(counts, x - shift, 0.0)), counts, _GROUP)
    number = jnp.sum(valid, axis=_GROUP)
    mean = jnp.log(jnp.where(total > 0, total, 1.0)) - jnp.log(jnp.maximum(number, 1).astype(x.dtype)) + shift[:, 0]
    return jnp.where(total > 0, mean, jnp.where(number > 0, -jnp.inf, 0.0))


def copg(
    logp: Array,
    ref_logp: Array,
    rewards: Array,
    valid: Array | None = None,
    *,
    beta: float = 0.1,
    form: Literal["policy_gradient", "leave_one_out"] = "policy_gradient",
) -> Array:
    r"""Contrastive policy gradient: each answer's regularised reward is the baseline of the others.

    $$R_i = r_i - \beta (\log\pi(y_i) - \log\pi_{ref}(y_i)), \qquad
    \ell = \frac{2}{n(n-1)} \sum_{i<j} \frac{(R_i - R_j)^2}{2\beta} \quad\text{or}\quad
    \ell = \frac{1}{n-1} \sum_{i<j} (R_i - R_j)^2$$

    The unique minimiser is $\pi \propto \pi_{ref} e^{r / \beta}$ whatever policy the answers come from. The gradient of
    one pair is $-(R_i - R_j) \nabla(\log\pi(y_i) - \log\pi(y_j))$; on the policy's own answers it is twice that of the
    leave-one-out baseline on $R$ (RLOO). A pair with $r_w - r_l = 1/2$ gives IPO's loss times $\beta / 2$.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        ref_logp: `[P, G]` float, nats; the same under the frozen reference. A constant.
        rewards: `[P, G]` float. A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all. A pair needs both.
        beta: strength of the KL constraint, in units of the reward per nat.
        form: `"policy_gradient"`, the first formula, or `"leave_one_out"`, the second, which is `beta * n` times the
            first.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient for fewer than two valid answers.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, `beta` is not above 0, or `form` is unknown.

    Example:
        >>> loss = copg(jnp.array([[0.4, -0.2]]), jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), beta=0.5)
        >>> round(float(loss[0]), 6)
        0.49

    Reference: Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion
    (arXiv 2406.19185).
    """
    if form not in ("policy_gradient", "leave_one_out"):
        raise ValueError(f'form must be "policy_gradient" or "leave_one_out", got {form!r}')
    check_positive("beta", beta)
    logp, valid, (ref_logp, rewards) = prepare_group(logp, valid, ref_logp=ref_logp, rewards=rewards)
    # The mean of (R_i - R_j)^2 over pairs is twice the unbiased variance: no pair is ever formed.
    variance = masked.var(rewards - beta * (logp - ref_logp), valid, _GROUP)
    if form == "policy_gradient":
        return variance / beta
    return jnp.sum(valid, axis=_GROUP).astype(variance.dtype) * variance


def gvpo(logp: Array, old_logp: Array, rewards: Array, valid: Array | None = None, *, beta: float = 0.1) -> Array:
    r"""Group variance policy optimisation: implicit and actual rewards must agree up to the group's mean.

    $$\ell = \frac{1}{2 (n - 1)} \sum_i \big(\beta (d_i - \bar d) - (r_i - \bar r)\big)^2, \qquad
    d_i = \log\pi(y_i) - \log\pi_{old}(y_i)$$

    It is `copg` against the policy at the start of the step, times $\beta / 2$: of one group, the unbiased variance of
    $r - \beta d$.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        old_logp: `[P, G]` float, nats; the same under the policy that the KL constraint refers to. A constant.
        rewards: `[P, G]` float. A constant; centring or shifting it changes nothing.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        beta: strength of the KL constraint, in units of the reward per nat.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient for fewer than two valid answers.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `beta` is not above 0.

    Example:
        >>> loss = gvpo(jnp.array([[0.4, -0.2]]), jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), beta=0.5)
        >>> round(float(loss[0]), 6)
        0.1225

    Reference: GVPO: Group Variance Policy Optimization for Large Language Model Post-Training (arXiv 2504.19599).
    """
    masked.check_like("old_logp", jnp.asarray(old_logp), "logp", jnp.asarray(logp))
    return beta / 2 * copg(logp, old_logp, rewards, valid, beta=beta)


def opmd(
    logp: Array,
    old_logp: Array,
    rewards: Array,
    valid: Array | None = None,
    *,
    tau: float = 0.1,
    baseline: Literal["mean", "log_mean_exp"] = "mean",
) -> Array:
    r"""Online policy mirror descent of Kimi k1.5: a policy gradient with a quadratic pull to the sampling policy.

    $$\ell_j = -(r_j - b)\, d_j + \frac{\tau}{2} d_j^2, \qquad d_j = \log\pi(y_j) - \log\pi_{old}(y_j)$$

    with $b = \bar r$, or the value it approximates, $b = \tau \log \frac1n \sum_j e^{r_j / \tau}$. Up to a constant and
    the factor $2\tau$ it is the squared consistency $(r_j - b - \tau d_j)^2$. Per token, with ready-made advantages,
    it is the loss called DRO.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        old_logp: `[P, G]` float, nats; the same under the policy at the start of the iteration. A constant.
        rewards: `[P, G]` float. A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        tau: $\tau$, strength of the KL constraint, in units of the reward per nat.
        baseline: $b$: `"mean"` or `"log_mean_exp"`.

    Returns:
        `[P, G]`, float32 or wider: the loss of each sequence; 0 where not valid. With one valid answer the baseline is
        its reward, and only the quadratic term acts.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, `tau` is not above 0, or `baseline` is unknown.

    Example:
        >>> loss = opmd(jnp.array([[0.1, -0.1]]), jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), tau=0.1)
        >>> [round(x, 6) for x in loss[0].tolist()]
        [-0.0495, -0.0495]

    Reference: Kimi k1.5: Scaling Reinforcement Learning with LLMs (arXiv 2501.12599).
    """
    if baseline not in ("mean", "log_mean_exp"):
        raise ValueError(f'baseline must be "mean" or "log_mean_exp", got {baseline!r}')
    check_positive("tau", tau)
    logp, valid, (old_logp, rewards) = prepare_group(logp, valid, old_logp=old_logp, rewards=rewards)
    if baseline == "mean":
        advantages = masked.center(rewards, valid, _GROUP)
    else:
        advantages = jnp.where(valid, rewards - tau * log_mean_exp(rewards / tau, valid)[:, None], 0.0)
    d = logp - old_logp
    return tau / 2 * jnp.square(d) - advantages * d


def optimal_value(rewards: Array, valid: Array | None = None, *, beta: float = 0.5) -> Array:
    r"""Value of the optimal KL-regularised policy from samples of the reference, $V^* = \beta \log E[e^{r/\beta}]$.

    Args:
        rewards: `[P, N]` float; rewards of answers that the reference sampled.
        valid: `[P, N]` bool, False where the answer does not count; None for all.
        beta: $\beta_1$, strength of the KL constraint; towards infinity the mean, towards 0 the maximum.

    Returns:
        `[P]`, float32 or wider, in units of the reward; 0 for a prompt without valid answers.

    Raises:
        ValueError: if `rewards` is not `[P, N]`, `valid` has another shape, or `beta` is not above 0.

    Example:
        >>> round(float(optimal_value(jnp.array([[1.0, 0.0]]), beta=0.5)[0]), 6)
        0.71689

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression (arXiv 2505.20686).
    """
    check_positive("beta", beta)
    return beta * log_mean_exp(masked.as_float(rewards) / beta, valid)


def a2po(
    logp: Array,
    ref_logp: Array,
    rewards: Array,
    optimal_value: Array,
    valid: Array | None = None,
    *,
    beta: float = 1e-3,
) -> Array:
    r"""Regression on the optimal advantage (A*-PO): $\ell = (\beta_2 \log(\pi / \pi_{ref}) - (r - V^*))^2$.

    $V^*$ is estimated once, offline (`optimal_value`), so that one answer per prompt is enough online.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        ref_logp: `[P, G]` float, nats; the same under the frozen reference. A constant.
        rewards: `[P, G]` float. A constant.
        optimal_value: `[P]` float, in units of the reward; see `optimal_value`. A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        beta: $\beta_2$, in units of the reward per nat.

    Returns:
        `[P, G]`, float32 or wider: the loss of each sequence; 0 where not valid.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, `optimal_value` is not `[P]`, or `beta` is not above 0.

    Example:
        >>> loss = a2po(jnp.array([[-1.0]]), jnp.array([[-3.0]]), jnp.ones((1, 1)), jnp.array([0.75]), beta=0.1)
        >>> round(float(loss[0, 0]), 6)
        0.0025

    Reference: Accelerating RL for LLM Reasoning with Optimal Advantage Regression (arXiv 2505.20686).
    """
    check_positive("beta", beta)
    logp, valid, (ref_logp, rewards) = prepare_group(logp, valid, ref_logp=ref_logp, rewards=rewards)
    optimal_value = masked.as_float(optimal_value)
    masked.check_like("optimal_value", optimal_value, "the prompts", logp[:, 0], "one number per prompt")
    advantages = rewards - jax.lax.stop_gradient(optimal_value)[:, None]
    return jnp.where(valid, jnp.square(beta * (logp - ref_logp) - advantages), 0.0)


def flowrl(
    logp: Array,
    old_logp: Array,
    ref_logp: Array,
    rewards: Array,
    lengths: Array,
    log_z: Array,
    valid: Array | None = None,
    *,
    beta: float = 15.0,
    weight_low: float = 0.0,
    weight_high: float = 10.0,
) -> Array:
    r"""FlowRL: trajectory balance, so that answers are drawn in proportion to $\pi_{ref}\, e^{\beta r}$.

    $$\ell = w \Big(\log Z(x) + \tfrac{1}{\lvert y\rvert} \log\pi(y) - \beta \hat r
    - \tfrac{1}{\lvert y\rvert} \log\pi_{ref}(y)\Big)^2, \qquad
    w = \mathrm{clip}(\pi(y) / \pi_{old}(y), w_{low}, w_{high})$$

    The gradient flows into `logp` and `log_z`; $w$ is a constant.

    Args:
        logp: `[P, G]` float, nats; log-prob of the sequence under the trained policy, summed over tokens.
        old_logp: `[P, G]` float, nats; the same under the policy that sampled. A constant.
        ref_logp: `[P, G]` float, nats; the same under the frozen reference. A constant.
        rewards: `[P, G]` float; $\hat r$, normalised within the group (`advantages.grpo`). A constant.
        lengths: `[P, G]` int or float, trained tokens of each sequence.
        log_z: `[P]` or `[P, G]` float, nats; the learned log-partition function of the prompt.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        beta: inverse temperature of the target, per unit of the reward.
        weight_low: smallest importance weight; the paper's $1 - \epsilon$, 0 in the released code.
        weight_high: largest importance weight; the paper's $1 + \epsilon$, 10 in the released code.

    Returns:
        `[P, G]`, float32 or wider: the loss of each sequence; 0 where not valid.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, `log_z` is neither `[P]` nor `[P, G]`, or
            `weight_high` is below `weight_low`.

    Example:
        >>> loss = flowrl(*map(jnp.atleast_2d, (-2.0, -2.0, -3.0, 0.1, 2)), jnp.array([0.5]), beta=5.0)
        >>> round(float(loss[0, 0]), 6)
        0.25

    Reference: FlowRL: Matching Reward Distributions for LLM Reasoning (arXiv 2509.15207).
    """
    if isinstance(weight_low, float | int) and isinstance(weight_high, float | int) and weight_high < weight_low:
        raise ValueError(f"weight_high must be at least weight_low = {weight_low}, got {weight_high}")
    logp, valid, (old_logp, ref_logp, rewards, lengths) = prepare_group(
        logp, valid, old_logp=old_logp, ref_logp=ref_logp, rewards=rewards, lengths=lengths
    )
    log_z = masked.as_float(log_z)
    masked.check_axes("log_z", log_z, "[P] or [P, G]")
    if log_z.shape not in (logp.shape, logp.shape[:1]):
        raise ValueError(f"log_z must be [P] or [P, G] of logp's {logp.shape}, got {log_z.shape}")
    log_z = jnp.broadcast_to(log_z[:, None], logp.shape) if log_z.ndim == 1 else log_z
    weight = jnp.clip(jax.lax.stop_gradient(importance_ratio(logp, old_logp)), weight_low, weight_high)
    residual = jnp.where(valid, log_z, 0.0) + (logp - ref_logp) / jnp.maximum(lengths, 1) - beta * rewards
    return jnp.where(valid, weight * jnp.square(residual), 0.0)
