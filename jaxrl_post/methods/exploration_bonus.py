"""A bonus for completions that are new: to their group, and to all of training."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, rewards
from jaxrl_post.advantages.scale import divide_by_spread
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.types import Array, Method

Bonus = Literal["product", "sum", "episodic", "global"]


class Visited(NamedTuple):
    """State of `novelty_bonus`.

    Attributes:
        counts: `[capacity]` int32, how often completions of each fingerprint came up.
        moments: of the bonuses.
        advantage: state of the advantage.
    """

    counts: Array
    moments: rewards.RunningMoments
    advantage: Any


def novelty_bonus(
    *,
    coef: float = 1.0,
    bonus: Bonus = "product",
    ridge: float | None = None,
    embedding_size: int | None = None,
    capacity: int | None = None,
    advantage: Choice | Advantage = "grpo",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""E3B with a global bonus: reward for completions unlike the others of their group, and seldom seen in training.

    $$r'_g = r_g + \mathrm{coef}\, b_g / \sigma_b, \qquad b_g = \phi_g^\top C_{-g}^{-1} \phi_g \cdot 1 / \sqrt{N_g}$$

    The first factor is the episodic bonus, the second the global one.

    A prompt's group is the episode; since its members have no order, each is held against all others. The global bonus
    counts completions, where the study's agents have a random network (`rewards.rnd_bonus`): one that is not alike in
    any token is another one. Neither enters what is reported as reward.

    Args:
        coef: weight of the bonus, in units of the reward per standard deviation of the bonus.
        bonus: `"product"`, `"sum"`, or one of the two alone: `"episodic"`, `"global"`.
        ridge: $\lambda$ of the episodic $C_{-g} = \lambda I + \sum_{j \neq g} \phi_j \phi_j^\top$; None for 0.1.
        embedding_size: $D$ of the embedding made of the tokens, `rewards.token_embedding`; None for 64. Unused where
            the rollouts bring their own.
        capacity: places for counts; fingerprints that share one are counted together; None for 65,536.
        advantage: see `policy_gradient`; of the reward with the bonus.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` whose state is the counts and the moments of the bonus. It reads `rollouts.extras["embedding"]`,
        `[B, D]` float, as $\phi$ where it is there.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> novelty_bonus(coef=0.1).min_group
        2

    References: A Study of Global and Episodic Bonuses for Exploration in Contextual MDPs (arXiv 2306.03236);
    Exploration via Elliptical Episodic Bonuses (arXiv 2210.05805).
    """
    checks.within("coef", coef, 0)
    checks.one_of("bonus", bonus, Bonus)
    checks.above("ridge", ridge, 0)
    checks.within("embedding_size", embedding_size, 1)
    checks.within("capacity", capacity, 1)
    checks.applies(bonus != "global", "bonus='global'", ridge=ridge, embedding_size=embedding_size)
    checks.applies(bonus != "episodic", "bonus='episodic'", capacity=capacity)
    if capacity is None:
        capacity = 1 if bonus == "episodic" else 65_536
    ridge = 0.1 if ridge is None else ridge
    size = 64 if embedding_size is None else embedding_size
    base = as_advantage(advantage)

    def init(rollouts: Any, num_prompts: int) -> Visited:
        counts = jnp.zeros(capacity, jnp.int32)
        return Visited(counts, rewards.RunningMoments.zero(), base.init(rollouts, num_prompts))

    def episodic(s: Signals) -> Array:
        phi = s.rollouts.extras.get("embedding")
        if phi is None:
            phi = rewards.token_embedding(s.rollouts.tokens, s.mask, size=size)
        norm = jnp.linalg.norm(phi, axis=-1, keepdims=True)
        phi = phi / jnp.where(norm > 0, norm, 1.0)  # directions count, and float32 has digits for no others
        return rewards.elliptical_bonus_of_group(phi.reshape(*s.reward.shape, -1), s.valid, ridge=ridge)

    def apply(state: Visited, s: Signals) -> tuple[Credit | Array, Visited]:
        place = (_mixed(rewards.fingerprint(s.rollouts.tokens, s.mask)) % jnp.uint32(capacity)).astype(jnp.int32)
        counts = state.counts.at[place].add(s.valid.reshape(-1).astype(jnp.int32))
        overall = rewards.count_bonus(counts[place]).reshape(s.reward.shape)
        if bonus == "global":
            found = overall
        elif bonus == "episodic":
            found = episodic(s)
        else:
            found = rewards.combine_bonuses(episodic(s), overall, mode=bonus)
        found = jnp.where(s.valid, found, 0.0)
        moments = state.moments.include(found, s.valid)
        known = moments.std > 1e-6 * jnp.abs(moments.mean)  # equal bonuses have a deviation of rounding alone
        extra = coef * divide_by_spread(found, jnp.where(known, moments.std, 0.0))
        shaped = s._replace(
            rollouts=s.rollouts.replace(reward=s.reward + extra),
            token_rewards=s.token_rewards + advantages.on_last_token(extra, s.mask),
        )
        credit, own = base.apply(state.advantage, shaped)
        return credit, Visited(counts, moments, own)

    return clipped(base._replace(apply=apply, init=init, contrasts=False), {}, options)


def _mixed(x: Array) -> Array:
    """uint32 of which every bit depends on all bits of `x`, as the low ones of a sum of products do not."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
