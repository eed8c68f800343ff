"""Credit by progress: how much a step raised the chance of the right answer.

The chance comes from whoever can be asked: the policy's own belief in the known answer, read off by appending it after
every step, or the success rate of another policy that would finish from there. It is an array `[B, S + 1]`: before any
step, and after each.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import grpo
from jaxrl_post.advantages.layout import check_rewards, from_turns, is_last, per_token
from jaxrl_post.advantages.steps import step_end, step_exists, step_returns
from jaxrl_post.advantages.temporal import reinforce_plus_plus
from jaxrl_post.types import Array

Pooling: TypeAlias = Literal["separate", "joint"]
Discount: TypeAlias = Literal["turn", "token"]


def answer_belief(answer_logp: Array, answer_length: Array, *, normalize: bool = True, log: bool = False) -> Array:
    r"""How strongly a model believes in a given answer, $p = \exp(\frac{1}{L} \sum_j \log \pi(a_j | \cdot))$.

    Args:
        answer_logp: `[B, S + 1]` float, nats: sum of the log-probs of the answer's tokens, forced after `k` steps.
        answer_length: `[B]`, $L$, tokens of the answer; below 1 counts as 1.
        normalize: divide by $L$, the geometric mean over tokens; False gives the probability of the whole answer.
        log: $\log p$ instead of $p$.

    Returns:
        `[B, S + 1]`, float32 or wider, in [0, 1] or nats; without gradient.

    Raises:
        ValueError: if `answer_logp` is not `[B, S + 1]` or `answer_length` not `[B]`.

    Example:
        >>> belief = answer_belief(jnp.log(jnp.array([[0.01, 0.25]])), jnp.array([2]))
        >>> [round(p, 4) for p in belief[0].tolist()]
        [0.1, 0.5]

    Reference: Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents
    (arXiv 2510.14967).
    """
    answer_logp, length = masked.as_float(answer_logp), masked.as_float(answer_length)
    masked.check_axes("answer_logp", answer_logp, "[B, S+1]", "one column before the first step")
    masked.check_like("answer_length", length, "a column of answer_logp", answer_logp[:, 0])
    if normalize:
        answer_logp = answer_logp / jnp.maximum(length, 1)[:, None]
    return jax.lax.stop_gradient(answer_logp if log else jnp.exp(answer_logp))


def belief_gain(belief: Array, known: Array | None = None) -> Array:
    r"""What each step added, $\delta_k = p_k - p_{k-1}$; the gains of a row add up to $p_S - p_0$.

    A belief that is not known, or not finite, counts as the last one that is: its step gained nothing, and what came of
    it is the gain of the next step that can be judged.

    Args:
        belief: `[..., S + 1]` float: before any step and after each of them, as probabilities or log-probs.
        known: `[..., S + 1]`, nonzero where the belief was measured; None for all.

    Returns:
        `[..., S]`, float32 or wider, in units of `belief`; finite, without gradient.

    Raises:
        ValueError: if there is no step, or `known` has another shape.

    Example:
        >>> [round(d, 4) for d in belief_gain(jnp.array([[0.2, 0.5, 0.4, 0.9]]))[0].tolist()]
        [0.3, -0.1, 0.5]
        >>> [round(d, 4) for d in belief_gain(jnp.array([[0.2, jnp.nan, 0.4]]))[0].tolist()]
        [0.0, 0.2]

    References: GRPO-VPS: Enhancing Group Relative Policy Optimization with Verifiable Process Supervision for Effective
    Reasoning (arXiv 2604.20659); Information Gain-based Policy Optimization (arXiv 2510.14967).
    """
    belief = masked.as_float(belief)
    if belief.ndim == 0 or belief.shape[-1] < 2:
        raise ValueError(f"belief must be [..., S+1] with at least one step, got shape {belief.shape}")
    there = jnp.isfinite(belief)
    if known is not None:
        known = jnp.asarray(known)
        masked.check_like("known", known, "belief", belief)
        there &= known != 0
    places = jnp.where(there, jnp.arange(belief.shape[-1]), -1)
    last = jax.lax.cummax(places, axis=places.ndim - 1)
    carried = jnp.take_along_axis(jnp.where(there, belief, 0.0), jnp.maximum(last, 0), axis=-1)
    both = last[..., :-1] >= 0
    return jax.lax.stop_gradient(jnp.where(both, carried[..., 1:] - carried[..., :-1], 0.0))


def turn_rewards(
    gain: Array,
    outcome: Array,
    exists: Array,
    valid: Array | None = None,
    *,
    pooling: Pooling = "separate",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""Information gain of every turn but the last, which has the outcome, normalised within the group.

    $$\tilde r_{g,k} = \frac{\delta_{g,k} - \mu_\delta}{\sigma_\delta + \epsilon}\ (k < K_g), \qquad
    \tilde r_{g,K_g} = \frac{r_g - \mu_r}{\sigma_r + \epsilon}$$

    Args:
        gain: `[B, S]` float, see `belief_gain`; `B = P * G`, prompt-major. That of a row's last turn is not read.
        outcome: `[P, G]` float, the reward of the answer.
        exists: `[B, S]`, nonzero where there is such a turn.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        pooling: mean and deviation are those of all gains and of all outcomes of the group (`"separate"`), or of both
            together (`"joint"`, the paper's first version).
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to it.

    Returns:
        `[B, S]`, float32 or wider; 0 where the turn does not exist or is not valid, and in a pool of one number or of
        equal ones.

    Raises:
        ValueError: if the shapes do not fit, or `pooling` is unknown.

    Example:
        >>> gain, exists = jnp.array([[0.1, 9.0], [0.3, 9.0], [0.2, 9.0]]), jnp.ones((3, 2))
        >>> found = turn_rewards(gain, jnp.array([[0.0, 0.0, 0.0]]), exists, eps=0.0)
        >>> [[round(r, 4) for r in row] for row in found.tolist()]
        [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]

    Reference: Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents
    (arXiv 2510.14967).
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f'pooling must be "separate" or "joint", got {pooling!r}')
    outcome, valid = check_rewards(outcome, valid)
    gain, exists = masked.as_float(gain), jnp.asarray(exists) != 0
    masked.check_axes("gain", gain, "[B, S]")
    masked.check_like("exists", exists, "gain", gain)
    if gain.shape[0] != outcome.size:
        raise ValueError(
            f"gain must have P * G = {outcome.size} rows for outcome of shape {outcome.shape}, got shape {gain.shape}"
        )
    exists &= valid.reshape(-1, 1)
    last = is_last(exists)
    scale = {"ddof": ddof, "eps": eps}

    def pooled(x: Array, counts: Array) -> Array:
        groups = (outcome.shape[0], -1)
        return grpo(x.reshape(groups), counts.reshape(groups), **scale).reshape(x.shape)

    if pooling == "joint":
        return pooled(jnp.where(last, outcome.reshape(-1, 1), gain), exists)
    final = grpo(outcome, valid, **scale).reshape(-1, 1)
    return jnp.where(last, final, pooled(gain, exists & ~last))


def igpo(
    gain: Array,
    outcome: Array,
    step: Array,
    mask: Array,
    valid: Array | None = None,
    *,
    gamma: float = 1.0,
    discount: Discount = "turn",
    pooling: Pooling = "separate",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""Every token gets what its turn and those after it earned: returns of `turn_rewards`.

    $$A_{g,t} = \sum_{j \ge k(t)} \gamma^{j - k(t)}\, \tilde r_{g,j}$$

    Args:
        gain: `[B, S]` float, see `belief_gain`; `B = P * G`, prompt-major.
        outcome: `[P, G]` float, the reward of the answer.
        step: `[B, T]` int, the turn of the token, from 0; -1 elsewhere. Tokens of turns beyond `S` get 0.
        mask: `[B, T]`, nonzero where the policy chose the token.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        gamma: discount.
        discount: per `"turn"`, as the formula, or per trained `"token"`: rewards are then put on the last token of
            their turn. They agree for `gamma=1`.
        pooling: see `turn_rewards`.
        ddof: see `turn_rewards`.
        eps: see `turn_rewards`.

    Returns:
        `[B, T]`, float32 or wider; 0 where the mask is. A group of rollouts of one turn gets what `grpo` gives.

    Raises:
        ValueError: if the shapes do not fit, `gamma` is outside [0, 1], or `pooling` or `discount` is unknown.

    Example:
        >>> step = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1]])
        >>> found = igpo(jnp.array([[0.3, 0.0], [0.1, 0.0]]), jnp.zeros((1, 2)), step, jnp.ones((2, 4)), eps=0.0)
        >>> [[round(a, 4) for a in row] for row in found.tolist()]
        [[0.7071, 0.7071, 0.0, 0.0], [-0.7071, 0.0, 0.0, 0.0]]

    Reference: Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents
    (arXiv 2510.14967).
    """
    if discount not in get_args(Discount):
        raise ValueError(f'discount must be "turn" or "token", got {discount!r}')
    if isinstance(gamma, float | int) and not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    gain, step, mask = masked.as_float(gain), jnp.asarray(step), jnp.asarray(mask)
    masked.check_axes("gain", gain, "[B, S]")
    steps = gain.shape[1]
    exists = step_exists(step, mask, num_steps=steps)
    rewards = turn_rewards(gain, outcome, exists, valid, pooling=pooling, ddof=ddof, eps=eps)
    if discount == "turn":
        return from_turns(step_returns(rewards, exists, gamma=gamma), step, mask)
    end = step_end(step, mask, num_steps=steps)
    rows = jnp.arange(gain.shape[0])[:, None]
    placed = (
        jnp.zeros(step.shape, rewards.dtype).at[rows, jnp.where(exists, end, step.shape[1])].set(rewards, mode="drop")
    )
    counted = (mask != 0) & (step >= 0) & (step < steps)
    return jnp.where(counted, reinforce_plus_plus(placed, mask, gamma=gamma, whiten=False), 0.0)


def with_progress(advantages: Array, gain: Array, step: Array, mask: Array, *, alpha: float = 1.0) -> Array:
    r"""The advantage of the whole sequence plus what the token's own step gained.

    $$A_{g,t} = A_g + \alpha\, \delta_{g,k(t)}$$

    With gains of the policy's belief in the known answer it is GRPO-VPS; with advantages of a step under a prover
    (`rewards.prover_advantage`) the effective reward of process advantage verifiers.

    Args:
        advantages: `[P, G]` float, of whole sequences.
        gain: `[B, S]` float, see `belief_gain`; `B = P * G`, prompt-major.
        step: `[B, T]` int, the step of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.
        alpha: $\alpha$, weight of the gain. GRPO-VPS's value is not known; process advantage verifiers use 3 to 5.

    Returns:
        `[B, T]`, float32 or wider; 0 where the mask is. A token of no step has the advantage alone.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> gain = belief_gain(jnp.array([[0.2, 0.5, 0.4, 0.9]]))
        >>> found = with_progress(jnp.array([[1.0]]), gain, jnp.array([[-1, 0, 1, 2, 2]]), jnp.array([[0, 1, 1, 1, 1]]))
        >>> [round(a, 4) for a in found[0].tolist()]
        [0.0, 1.3, 0.9, 1.5, 1.5]

    References: GRPO-VPS (arXiv 2604.20659); Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning
    (arXiv 2410.08146).
    """
    return per_token(advantages, mask) + alpha * from_turns(gain, step, mask)
