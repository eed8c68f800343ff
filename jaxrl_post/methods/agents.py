"""Methods for several agents, several roles of one policy, and agents that meet the same state again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.types import Method


def dr_mas(*, normalize_std: bool = True, max_turns: int | None = None, **options: Unpack[ClippedOptions]) -> Method:
    r"""Dr. MAS: GRPO in which every turn is compared with the turns of the same agent on the same prompt.

    $$A_i = (r_i - \mu_{p(i), a(i)}) / (\sigma_{p(i), a(i)} + \epsilon)$$

    Args:
        normalize_std: divide by the standard deviation.
        max_turns: turns of a sequence that count, the rest has advantage 0; None for all.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.step` and `rollouts.extras["agent"]`, `[B, T]` int; groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> dr_mas(max_turns=4).min_group
        2

    Reference: Dr. MAS: Stable Reinforcement Learning for Multi-Agent LLM Systems (arXiv 2602.08847).
    """
    return clipped({"name": "dr_mas", "normalize_std": normalize_std, "max_turns": max_turns}, {}, options)


def gigpo(
    *,
    step_reward: str | None = None,
    gamma: float = 0.95,
    episode_weight: float = 1.0,
    step_weight: float = 1.0,
    normalize_std: bool = True,
    max_turns: int | None = None,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""GiGPO: GRPO of trajectories, plus GRPO of the steps that were taken from one and the same state.

    $$A_{g,k} = w_E\, \mathrm{GRPO}(r)_g + w_S\, \mathrm{GRPO}(R)_{g,k}, \qquad R_{g,k} = r_{g,k} + \gamma R_{g,k+1}$$

    Args:
        step_reward: the component of the reward that steps earn, $r_{g,k}$: `rollouts.rewards[step_reward]`, `[B, T]`
            on the tokens where it was earned, e.g. `"environment"` of `rollout.generate_turns`, in a configuration
            `"environment_tokens"`. NaN on a token leaves its step, and those before, with the first summand. None: the
            last step earns all of the sequence's reward.
        gamma: discount per step.
        episode_weight: $w_E$.
        step_weight: $w_S$.
        normalize_std: divide by the standard deviations.
        max_turns: steps of a sequence that count; the rest has advantage 0 and, by `step_reward`, earns nothing. None
            for all.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.step` and `rollouts.extras["state"]`, `[B, T]` int, at the first token of each
        step a number of the state it was taken from; groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> gigpo(max_turns=50).min_group
        2

    Reference: Group-in-Group Policy Optimization for LLM Agent Training (arXiv 2505.10978).
    """
    own = {"step_reward": step_reward, "gamma": gamma, "episode_weight": episode_weight, "step_weight": step_weight}
    return clipped({"name": "gigpo", **own, "normalize_std": normalize_std, "max_turns": max_turns}, {}, options)


def hierarchical_grpo(
    *, episode_agents: Sequence[int], normalize_std: bool = False, **options: Unpack[ClippedOptions]
) -> Method:
    r"""Hierarchical GRPO: solvers are compared within the episode of their problem, proposers across episodes.

    $$A_i = r_i - \bar r_{k(i)}$$

    Args:
        episode_agents: the agents that are compared within one episode.
        normalize_std: divide by the standard deviation of those compared.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.extras["agent"]`, `[B, T]` int (a sequence is the trajectory of one agent), and
        `rollouts.extras["episode"]`, `[P, G]` int; groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> hierarchical_grpo(episode_agents=[1]).min_group
        2

    Reference: prime-rl, its algorithm of this name (https://github.com/PrimeIntellect-ai/prime-rl).
    """
    choice = {"name": "hierarchical_grpo", "episode_agents": tuple(episode_agents), "normalize_std": normalize_std}
    return clipped(choice, {}, options)


def rae(
    *,
    roles: int = 2,
    decay: float = 0.95,
    order: Literal["sequence", "batch"] = "sequence",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Role-conditioned advantages for self-play: the baseline is a running mean of the rewards of the same role.

    $$A_i = r_i - b_k, \qquad b_k \leftarrow \alpha b_k + (1 - \alpha) r_i$$

    Args:
        roles: number of roles; agents are numbered from 0.
        decay: $\alpha$.
        order: `"sequence"` or `"batch"`, see `advantages.rae`.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` whose state is the baselines; it reads `rollouts.extras["agent"]`, `[B, T]` int (a sequence is played
        in one role). One sequence per prompt is enough.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> rae(roles=2).min_group
        1

    Reference: SPIRAL: Self-Play on Zero-Sum Games Incentivizes Reasoning via Multi-Agent Multi-Turn Reinforcement
    Learning (arXiv 2506.24119).
    """
    return clipped({"name": "rae", "roles": roles, "decay": decay, "order": order}, {}, options)
