"""Advantages where several agents or roles share a trajectory, or one agent meets the same state again.

A baseline is fair only among rollouts that had the same chances: of one agent, one role, one proposed problem, one
state. Each function here says who is compared with whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.keyed import grpo_by_key
from jaxrl_post.advantages.layout import check_rewards, on_last_token
from jaxrl_post.advantages.step_groups import prompt_of, two_level
from jaxrl_post.advantages.temporal import reinforce_plus_plus
from jaxrl_post.types import Array


def dr_mas(
    rewards: Array,
    prompt: Array,
    agent: Array,
    valid: Array | None = None,
    *,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""Agent-wise GRPO: each turn is compared with the turns of the same agent on the same prompt.

    $$A_i = (r_i - \mu_{p(i), a(i)}) / (\sigma_{p(i), a(i)} + \epsilon)$$

    over turns: an agent that acts twice in a trajectory counts its reward twice. With one baseline for all agents, the
    second moment of an agent's gradient grows with the distance of its mean from the common one
    (`second_moment_factor`).

    Args:
        rewards: any shape, float, most often `[N]`: one element per turn, the reward of its trajectory.
        prompt: `rewards`' shape, int: the prompt of the turn.
        agent: `rewards`' shape, int: the agent that acted.
        valid: `rewards`' shape, bool, False where the turn does not count; None for all.
        normalize_std: False leaves the difference undivided.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to it, in units of the reward.

    Returns:
        `rewards`' shape, float32 or wider; 0 where not valid, and for the only turn of an agent on a prompt.

    Raises:
        ValueError: as `grpo_by_key`.

    Example:
        >>> rewards, agent = jnp.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0]), jnp.array([0, 0, 0, 0, 1, 1])
        >>> [round(a, 4) for a in dr_mas(rewards, jnp.zeros(6, int), agent, eps=0.0).tolist()]
        [0.5, 0.5, 0.5, -1.5, 0.7071, -0.7071]

    Reference: Dr. MAS: Stable Reinforcement Learning for Multi-Agent LLM Systems (arXiv 2602.08847).
    """
    return grpo_by_key(rewards, (prompt, agent), valid, normalize_std=normalize_std, ddof=ddof, eps=eps)


def hierarchical_grpo(
    rewards: Array,
    group: Array,
    episode: Array,
    agent: Array,
    valid: Array | None = None,
    *,
    episode_agents: Sequence[int],
    normalize_std: bool = False,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""Centred rewards of proposers and solvers: solvers within an episode, proposers across the episodes of a group.

    $A_i = r_i - \bar r_{k(i)}$ with the key $k$ = (group, agent, episode) for `episode_agents`, (group, agent) for the
    others. In an episode one agent sets a problem and another tries it several times; tries at one problem are compared
    with each other, problems set for one task with each other.

    Args:
        rewards: any shape, float, most often `[N]`: one element per trajectory of an agent.
        group: `rewards`' shape, int: the task that the episodes start from.
        episode: `rewards`' shape, int: the episode, unique within its group at least.
        agent: `rewards`' shape, int: the agent that acted.
        valid: `rewards`' shape, bool, False where the trajectory does not count; None for all.
        episode_agents: the agents that are compared within one episode.
        normalize_std: divide by the standard deviation of those compared.
        ddof: of that standard deviation.
        eps: added to it, in units of the reward.

    Returns:
        `rewards`' shape, float32 or wider; 0 where not valid, and where nobody is there to be compared with.

    Raises:
        ValueError: as `grpo_by_key`.

    Example:
        >>> agent, episode = jnp.array([0, 1, 1, 0, 1, 1]), jnp.array([0, 0, 0, 1, 1, 1])  # 0 proposes, 1 solves
        >>> rewards = jnp.array([0.5, 1.0, 0.0, 0.0, 0.0, 0.0])
        >>> hierarchical_grpo(rewards, jnp.zeros(6, int), episode, agent, episode_agents=[1]).tolist()
        [0.25, 0.5, -0.5, -0.25, 0.0, 0.0]

    Reference: prime-rl, its algorithm of this name (https://github.com/PrimeIntellect-ai/prime-rl).
    """
    agent, episode = jnp.asarray(agent), jnp.asarray(episode)
    masked.check_like("episode", episode, "agent", agent)
    within = jnp.isin(agent, jnp.asarray(list(episode_agents), agent.dtype))
    # The flag keeps the two kinds apart whatever numbers the episodes have.
    keys = (group, agent, within.astype(jnp.int32), jnp.where(within, episode, 0))
    return grpo_by_key(rewards, keys, valid, normalize_std=normalize_std, ddof=ddof, eps=eps)


def rae(
    rewards: Array,
    role: Array,
    ema: Array,
    valid: Array | None = None,
    *,
    decay: float = 0.95,
    order: Literal["sequence", "batch"] = "sequence",
) -> tuple[Array, Array]:
    r"""Role-conditioned advantage: the reward less a running mean of the rewards of the same role.

    $$A_i = r_i - b_{k}, \qquad b_k \leftarrow \alpha b_k + (1 - \alpha) r_i$$

    for the role $k$ of rollout $i$. In a zero-sum game the group's mean says nothing; a role's own past does.

    Args:
        rewards: any shape, float.
        role: `rewards`' shape, int in `[0, R)`: the role that the policy played.
        ema: `[R]` float, units of the reward: $b$; zeros at the start.
        valid: `rewards`' shape, bool, False where the rollout does not count; None for all.
        decay: $\alpha$ in [0, 1).
        order: `"sequence"` updates after each rollout, in the order of the array, so that later ones see a newer
            baseline; `"batch"` compares all with the baseline of the start and then moves it by
            $\alpha^n b + (1 - \alpha^n) \bar r$, which does not depend on the order.

    Returns:
        advantages: `rewards`' shape, float32 or wider; 0 where not valid.
        ema: `[R]`, the baselines for the next call.

    Raises:
        ValueError: if `role` or `valid` has another shape, `ema` is not `[R]`, a role that is known (not traced) is not
            in [0, R), `decay` is not in [0, 1), or `order` is unknown.

    Example:
        >>> advantages, ema = rae(jnp.array([1.0, -1.0, 1.0]), jnp.array([0, 1, 0]), jnp.zeros(2), decay=0.5)
        >>> advantages.tolist(), ema.tolist()
        ([1.0, -1.0, 0.5], [0.75, -0.5])

    Reference: SPIRAL: Self-Play on Zero-Sum Games Incentivizes Reasoning via Multi-Agent Multi-Turn Reinforcement
    Learning (arXiv 2506.24119).
    """
    if order not in ("sequence", "batch"):
        raise ValueError(f'order must be "sequence" or "batch", got {order!r}')
    if isinstance(decay, float | int) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}; 0 keeps the last reward only")
    rewards, ema, role = masked.as_float(rewards), masked.as_float(ema), jnp.asarray(role)
    masked.check_axes("ema", ema, "[R]", "one baseline per role, zeros at the start")
    masked.check_like("role", role, "rewards", rewards)
    counts = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "rewards", rewards)
    masked.check_indices("role", role, len(ema), counts)
    shape, (rewards, role, counts) = rewards.shape, (x.reshape(-1) for x in (rewards, role, counts))
    rewards = jnp.where(counts, rewards, 0.0)
    ema = ema.astype(jnp.promote_types(ema.dtype, rewards.dtype))

    if order == "batch":
        advantages = jnp.where(counts, rewards - ema[role], 0.0)
        number = jnp.zeros_like(ema).at[role].add(counts.astype(ema.dtype))
        offset = jnp.zeros_like(ema).at[role].add(advantages) / jnp.maximum(number, 1)
        return advantages.reshape(shape), ema + (1 - decay**number) * offset

    def one(ema: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        reward, role, counts = row
        advantage = jnp.where(counts, reward - ema[role], 0.0)
        return ema.at[role].add((1 - decay) * advantage), advantage

    ema, advantages = jax.lax.scan(one, ema, (rewards, role, counts))
    return advantages.reshape(shape), ema


def gigpo(
    rewards: Array,
    state: Array,
    exists: Array,
    valid: Array | None = None,
    *,
    step_rewards: Array | None = None,
    gamma: float = 0.95,
    episode_weight: float = 1.0,
    step_weight: float = 1.0,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""Group-in-group: a trajectory among those of its prompt, plus each step among those taken from the same state.

    $$A_{g,k} = w_E\, \mathrm{GRPO}(r)_g + w_S\, \mathrm{GRPO}(R)_{g,k}, \qquad R_{g,k} = r_{g,k} + \gamma R_{g,k+1}$$

    The second GRPO compares the discounted returns of all steps of the prompt's trajectories that started from an
    identical state.

    Args:
        rewards: `[P, G]` float, of whole trajectories.
        state: `[P, G, K]` int, a number (or hash) of the state in which step `k` was taken.
        exists: `[P, G, K]` bool, which steps there are.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        step_rewards: `[P, G, K]` float; None puts the trajectory's reward on its last step. NaN where a step could not
            be scored: it and those before it have the episode's part alone.
        gamma: discount per step.
        episode_weight: $w_E$.
        step_weight: $w_S$.
        normalize_std: False leaves both differences undivided.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to it, in units of the reward.

    Returns:
        `[P, G, K]`, float32 or wider; 0 where the step does not exist or is not valid. A step from a state that nobody
        else met has the episode's part alone.

    Raises:
        ValueError: if the shapes do not fit, or `gamma` is outside [0, 1].

    Example:
        >>> state = jnp.array([[[0, 1], [0, 2]]])
        >>> gigpo(jnp.array([[1.0, 0.0]]), state, jnp.ones((1, 2, 2)), normalize_std=False, gamma=0.5).tolist()
        [[[0.75, 0.5], [-0.75, -0.5]]]

    Reference: Group-in-Group Policy Optimization for LLM Agent Training (arXiv 2505.10978).
    """
    rewards, valid = check_rewards(rewards, valid)
    exists, state = jnp.asarray(exists) != 0, jnp.asarray(state)
    masked.check_axes("exists", exists, "[P, G, K]")
    if exists.shape[:2] != rewards.shape:
        raise ValueError(f"exists must be [P, G, K] with [P, G] = {rewards.shape}, got shape {exists.shape}")
    masked.check_like("state", state, "exists", exists)
    counts = exists & valid[:, :, None]
    rows = (rewards.size, exists.shape[2])
    if step_rewards is None:
        per_step = on_last_token(jnp.where(valid, rewards, 0.0), exists.reshape(rows))
    else:
        masked.check_like("step_rewards", jnp.asarray(step_rewards), "exists", exists)
        per_step = jnp.asarray(step_rewards).reshape(rows)
    returns = reinforce_plus_plus(per_step, counts.reshape(rows), gamma=gamma, whiten=False)
    return two_level(
        rewards,
        returns.reshape(exists.shape),
        (prompt_of(state), state),
        counts,
        valid,
        episode_weight=episode_weight,
        step_weight=step_weight,
        normalize_std=normalize_std,
        ddof=ddof,
        eps=eps,
    )
