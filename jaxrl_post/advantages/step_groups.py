"""Steps of trajectories compared with each other: which steps form a group, and how that adds to the comparison of
whole trajectories.

GiGPO compares the steps taken from one state, SRGPO steps that chance puts together, OPRL all steps of a prompt. All
three are `two_level` with other keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import grpo, rloo
from jaxrl_post.advantages.keyed import grpo_by_key, rloo_by_key
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array

Blocks: TypeAlias = Literal["batch", "prompt", "sequence"]


def two_level(
    rewards: Array,
    step_rewards: Array,
    keys: Array | Sequence[Array],
    exists: Array,
    valid: Array | None = None,
    *,
    episode_weight: float = 1.0,
    step_weight: float = 1.0,
    estimator: Literal["grpo", "rloo"] = "grpo",
    by_step: bool = False,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""A trajectory among those of its prompt, plus each step among the steps of its own group.

    $$A_{g,k} = w_E\, \mathrm{GRPO}(R)_g + w_S\, \mathrm{GRPO}_{\mathrm{key}(g,k)}(r)_{g,k}$$

    Args:
        rewards: `[P, G]` float, of whole trajectories.
        step_rewards: `[P, G, S]` float, what is compared of each step: its reward, or its return. NaN where a step
            could not be scored: it has only the first summand, and is in no group.
        keys: `[P, G, S]` int, or several of them: steps that agree in all of them are a group. Steps of different
            prompts are compared unless a key keeps them apart.
        exists: `[P, G, S]`, nonzero where the step exists.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        episode_weight: $w_E$.
        step_weight: $w_S$.
        estimator: `"grpo"`, or `"rloo"`: the mean of the others is the baseline of both, and nothing is divided by a
            standard deviation.
        by_step: the trajectories' mean and deviation are taken over steps: a trajectory counts once for each of its
            steps, so that long ones count more. Not with `"rloo"`.
        normalize_std: False leaves both differences undivided.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to it, in units of the reward.

    Returns:
        `[P, G, S]`, float32 or wider; 0 where there is no step or the rollout is not valid. A step that is alone in its
        group, or whose group has equal rewards, has only the first summand; a prompt with equal rewards only the
        second.

    Raises:
        ValueError: if the shapes do not fit, `estimator` is unknown, or it is `"rloo"` with `by_step`.

    Example:
        >>> steps = jnp.array([[[1.0, 0.0], [0.0, 0.0]]])
        >>> two_level(jnp.array([[1.0, 0.0]]), steps, 0 * steps.astype(int), steps >= 0, normalize_std=False).tolist()
        [[[1.25, 0.25], [-0.75, -0.75]]]

    References: Group-in-Group Policy Optimization for LLM Agent Training (arXiv 2505.10978); SeeNav-Agent: Enhancing
    Vision-Language Navigation with Visual Prompt and Step-Level Policy Optimization (arXiv 2512.02631).
    """
    if estimator not in ("grpo", "rloo"):
        raise ValueError(f'estimator must be "grpo" or "rloo", got {estimator!r}')
    if estimator == "rloo" and by_step:
        raise ValueError(
            'by_step does not apply to estimator="rloo": the others of a step would be other steps of its own '
            "trajectory too, and the baseline would depend on what it is taken from; give by_step=False"
        )
    rewards, counts = _check_steps(rewards, exists, valid)
    step_rewards = masked.as_float(step_rewards)
    masked.check_like("step_rewards", step_rewards, "exists", counts)
    scale = {"normalize_std": normalize_std, "ddof": ddof, "eps": eps}
    scored = counts & ~jnp.isnan(step_rewards)
    if estimator == "rloo":
        step = rloo_by_key(step_rewards, keys, scored)
    else:
        step = grpo_by_key(step_rewards, keys, scored, **scale)
    if by_step:
        per_episode = jnp.broadcast_to(rewards[:, :, None], counts.shape)
        episode = grpo_by_key(per_episode, prompt_of(counts), counts, **scale)
    else:
        whole = rloo(rewards, valid) if estimator == "rloo" else grpo(rewards, valid, **scale)
        episode = whole[:, :, None]
    return jnp.where(counts, episode_weight * episode + step_weight * step, 0.0)


def prompt_of(x: Array) -> Array:
    """The prompt's number at every element of `[P, G, S]`, a key for those that are compared within a prompt.

    Args:
        x: `[P, G, S]`, of any dtype.

    Returns:
        `[P, G, S]` int32.

    Example:
        >>> prompt_of(jnp.zeros((2, 1, 2))).tolist()
        [[[0, 0]], [[1, 1]]]
    """
    masked.check_axes("x", x, "[P, G, S]")
    return jnp.broadcast_to(jnp.arange(jnp.shape(x)[0], dtype=jnp.int32)[:, None, None], jnp.shape(x))


def random_blocks(
    key: Array, exists: Array, *, size: int | None = 16, within: Array | None = None, id: Array | None = None
) -> Array:
    r"""A random partition of the steps into blocks of `size`, the last of which may be smaller.

    The steps are shuffled, and the $i$-th of them is in block $\lfloor i / K \rfloor$.

    Args:
        key: random key.
        exists: `[P, G, S]`, nonzero where the step exists; the others are in no block.
        size: $K$, steps of a block; None, or more than there are steps, for one block of all.
        within: `[P, G, S]` int: steps that differ in it are never in one block (and block numbers repeat); None for
            blocks that run through the whole batch.
        id: `[P, G]` int, unique among the sequences: a step's place in the shuffle depends on it and on the step's
            number, not on where the sequence lies in the batch. None for their order.

    Returns:
        `[P, G, S]` int32, the number of the block from 0 (of those that share `within`); -1 where there is no step.

    Raises:
        ValueError: if `exists` is not `[P, G, S]`, another array has another shape, or `size` is below 1.

    Example:
        >>> blocks = random_blocks(jax.random.key(0), jnp.ones((1, 2, 5)), size=4)
        >>> jnp.bincount(blocks.reshape(-1)).tolist()
        [4, 4, 2]

    Reference: SeeNav-Agent: Enhancing Vision-Language Navigation with Visual Prompt and Step-Level Policy Optimization
    (arXiv 2512.02631).
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}; None puts all steps into one block")
    exists = jnp.asarray(exists) != 0
    masked.check_axes("exists", exists, "[P, G, S]")
    rows = exists.shape[0] * exists.shape[1]
    sequences = jnp.arange(rows).reshape(exists.shape[:2]) if id is None else jnp.asarray(id)
    masked.check_like("id", sequences, "one step of exists", exists[..., 0])
    apart = jnp.zeros(exists.shape, jnp.int32) if within is None else jnp.asarray(within)
    masked.check_like("within", apart, "exists", exists)
    if size is None:
        return jnp.where(exists, 0, -1).astype(jnp.int32)

    def draw(sequence: Array) -> Array:
        own = jax.random.fold_in(key, sequence)
        steps = jnp.arange(exists.shape[2])
        return jax.vmap(lambda step: jax.random.bits(jax.random.fold_in(own, step)))(steps)

    noise = jax.vmap(draw)(sequences.reshape(-1)).reshape(-1)
    flat, there = apart.reshape(-1), exists.reshape(-1)
    order = jnp.lexsort((noise, flat, ~there))  # steps that do not exist come last
    first = jnp.concatenate([jnp.ones(1, bool), flat[order][1:] != flat[order][:-1]])
    place = jnp.arange(flat.size)
    place = place - jax.lax.cummax(jnp.where(first, place, 0))
    blocks = jnp.zeros(flat.shape, jnp.int32).at[order].set((place // size).astype(jnp.int32))
    return jnp.where(there, blocks, -1).reshape(exists.shape)


def srgpo(
    key: Array,
    rewards: Array,
    step_rewards: Array,
    exists: Array,
    valid: Array | None = None,
    *,
    block_size: int | None = 16,
    step_weight: float = 1.0,
    blocks: Blocks = "batch",
    by_step: bool = True,
    normalize_std: bool = True,
    id: Array | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""Trajectories among those of their prompt, steps among the steps of a random block.

    $$A_{g,k} = \mathrm{GRPO}(R)_g + w\, \mathrm{GRPO}_{\mathrm{block}(g,k)}(r)_{g,k}$$

    A step reward that can be verified in any state (the distance to the goal fell) needs no equal states to be compared
    with, so that chance may form the groups; GiGPO finds nothing to compare where no state is met twice.

    Args:
        key: random key, for the blocks.
        rewards: `[P, G]` float, of whole trajectories.
        step_rewards: `[P, G, S]` float; NaN where a step could not be scored, which is then in no block.
        exists: `[P, G, S]`, nonzero where the step exists.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        block_size: steps of a block; None, or more than there are, for all of them.
        step_weight: $w$; the authors also use 0.5.
        blocks: what a block is drawn from: all steps of the `"batch"`, those of one `"prompt"`, or of one `"sequence"`.
        by_step: of `two_level`; the authors' default.
        normalize_std: False leaves both differences undivided.
        id: `[P, G]` int, of `random_blocks`.
        ddof: 1 for the unbiased standard deviation, 0 for the population's.
        eps: added to it, in units of the reward.

    Returns:
        `[P, G, S]`, float32 or wider; 0 where there is no step or the rollout is not valid.

    Raises:
        ValueError: if the shapes do not fit, `block_size` is below 1, or `blocks` is unknown.

    Example:
        >>> steps = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
        >>> found = srgpo(jax.random.key(0), jnp.ones((1, 2)), steps, jnp.ones((1, 2, 2)), block_size=4)
        >>> [[round(a, 5) for a in row] for row in found[0].tolist()]
        [[0.86602, -0.86602], [-0.86602, 0.86602]]

    Reference: SeeNav-Agent: Enhancing Vision-Language Navigation with Visual Prompt and Step-Level Policy Optimization
    (arXiv 2512.02631).
    """
    rewards, counts = _check_steps(rewards, exists, valid)
    if blocks not in ("batch", "prompt", "sequence"):
        raise ValueError(f'blocks must be "batch", "prompt" or "sequence", got {blocks!r}')
    prompt = prompt_of(counts)
    sequence = jnp.arange(rewards.size, dtype=jnp.int32).reshape(rewards.shape)[:, :, None]
    apart = {"batch": jnp.zeros_like(prompt), "prompt": prompt, "sequence": jnp.broadcast_to(sequence, prompt.shape)}
    step_rewards = masked.as_float(step_rewards)
    masked.check_like("step_rewards", step_rewards, "exists", counts)
    block = random_blocks(key, counts & ~jnp.isnan(step_rewards), size=block_size, within=apart[blocks], id=id)
    return two_level(
        rewards,
        step_rewards,
        (apart[blocks], block),
        counts,
        valid,
        step_weight=step_weight,
        by_step=by_step,
        normalize_std=normalize_std,
        ddof=ddof,
        eps=eps,
    )


def _check_steps(rewards: Array, exists: Array, valid: Array | None) -> tuple[Array, Array]:
    """Rewards `[P, G]`, 0 where not valid, and `[P, G, S]` bool: the steps that exist in valid rollouts."""
    rewards, known = check_rewards(rewards, valid)
    exists = jnp.asarray(exists) != 0
    masked.check_axes("exists", exists, "[P, G, S]")
    if exists.shape[:2] != rewards.shape:
        raise ValueError(f"exists must be [P, G, S] with [P, G] = {rewards.shape}, got shape {exists.shape}")
    return jnp.where(known, rewards, 0.0), exists & known[:, :, None]
