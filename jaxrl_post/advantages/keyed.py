"""Group-relative advantages where the group is given by keys: agents, episodes, states, instead of a row of `[P, G]`.

All arrays have one shape, most often `[N]`, one element per turn or trajectory. Keys are integers of any value; the
elements that agree in all keys are a group. Groups may be of any size, and no number of groups has to be known.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.scale import divide_by_spread
from jaxrl_post.types import Array


def _dense(keys: Sequence[Array]) -> Array:
    """Group numbers `[N]` in `[0, N)` of flat keys `[N]`; equal where all keys are."""
    order = jnp.lexsort(tuple(reversed(keys)))
    new = jnp.zeros(order.shape, bool)
    for key in keys:
        ordered = key[order]
        new |= jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.cumsum(new).astype(jnp.int32))


def _prepare(rewards: Array, keys: Array | Sequence[Array], valid: Array | None) -> tuple[Array, Array, Array]:
    rewards = masked.as_float(rewards)
    keys = [jnp.asarray(key) for key in (keys if isinstance(keys, tuple | list) else (keys,))]
    if rewards.size == 0 or not keys:
        raise ValueError(f"rewards and at least one key must not be empty, got shape {rewards.shape}, {len(keys)} keys")
    for number, key in enumerate(keys):
        masked.check_like(f"key {number}", key, "rewards", rewards, "give every element its key")
        if not jnp.issubdtype(key.dtype, jnp.integer):
            raise ValueError(f"key {number} must hold integers, got {key.dtype}; number what it stands for")
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", valid, "rewards", rewards)
    return jnp.where(valid, rewards, 0.0).reshape(-1), valid.reshape(-1), _dense([key.reshape(-1) for key in keys])


def _sum(x: Array, ids: Array) -> Array:
    """The sum over each element's group, at the element."""
    return jax.ops.segment_sum(x, ids, num_segments=ids.shape[0])[ids]


def _moments(rewards: Array, valid: Array, ids: Array, ddof: int) -> tuple[Array, Array, Array]:
    """Each element's difference from its group's mean, its group's spread and size; two passes, as `masked`."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 1 (unbiased) or 0 (population), got {ddof}")
    count = _sum(valid.astype(rewards.dtype), ids)
    some = jnp.maximum(count, 1)
    first = _sum(rewards, ids) / some
    mean = first + jax.lax.stop_gradient(_sum(jnp.where(valid, rewards - first, 0.0), ids) / some)
    centered = jnp.where(valid & (count > 1), rewards - mean, 0.0)
    variance = _sum(jnp.square(centered), ids) / jnp.maximum(count - ddof, 1)
    largest = jax.ops.segment_max(jnp.abs(rewards), ids, num_segments=ids.shape[0])[ids]
    none = variance <= jnp.square(8 * jnp.finfo(rewards.dtype).eps * largest)  # not of NaN, which stays
    return centered, jnp.where(none, 0.0, jnp.sqrt(jnp.where(none, 1.0, variance))), count


def grpo_by_key(
    rewards: Array,
    keys: Array | Sequence[Array],
    valid: Array | None = None,
    *,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""GRPO over groups that keys define, $A_i = (r_i - \bar r_{k(i)}) / (\mathrm{std}(r_{k(i)}) + \epsilon)$.

    Args:
        rewards: any shape, float; one element per turn, trajectory or step.
        keys: integers of `rewards`' shape, or several of them: elements that agree in all of them are a group.
        valid: `rewards`' shape, bool, False where the element does not count; None for all.
        normalize_std: False leaves the difference undivided; `ddof` and `eps` then play no part.
        ddof: 1 for the unbiased standard deviation (n - 1), 0 for the population's (n).
        eps: added to the standard deviation, in units of the reward.

    Returns:
        `rewards`' shape, float32 or wider; 0 where not valid, in a group with one valid element, and in a group whose
        rewards are equal to within the resolution of their dtype.

    Raises:
        ValueError: if a key or `valid` has another shape, a key is not of integers, or `ddof` is neither 0 nor 1.

    Example:
        >>> rewards, prompt = jnp.array([1.0, 3.0, 5.0, 9.0]), jnp.array([7, 7, 7, 2])
        >>> grpo_by_key(rewards, prompt, eps=0.0).tolist()
        [-1.0, 0.0, 1.0, 0.0]

    Reference: DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (arXiv 2402.03300).
    """
    shape = jnp.shape(rewards)
    rewards, valid, ids = _prepare(rewards, keys, valid)
    centered, spread, _ = _moments(rewards, valid, ids, ddof)
    return (divide_by_spread(centered, spread, eps) if normalize_std else centered).reshape(shape)


def mean_by_key(
    x: Array, keys: Array | Sequence[Array], valid: Array | None = None, *, once_per: Array | None = None
) -> Array:
    r"""The mean over each element's group, at the element: $\bar x_{k(i)}$.

    Args:
        x: any shape, float.
        keys: integers of `x`'s shape, or several of them: elements that agree in all of them are a group.
        valid: `x`'s shape, bool, False where the element does not count; None for all.
        once_per: integers of `x`'s shape: elements of a group that agree in it too weigh as one of them, e.g. the
            visits of one trajectory to a state; None weighs every element alike.

    Returns:
        `x`'s shape, float32 or wider; 0 where not valid.

    Raises:
        ValueError: as `grpo_by_key`.

    Example:
        >>> x, key = jnp.array([1.0, 1.0, -2.0, 5.0]), jnp.array([0, 0, 0, 1])
        >>> mean_by_key(x, key).tolist()
        [0.0, 0.0, 0.0, 5.0]
        >>> mean_by_key(x, key, once_per=jnp.array([0, 0, 1, 1])).tolist()
        [-0.5, -0.5, -0.5, 5.0]
    """
    shape = jnp.shape(x)
    flat, counts, ids = _prepare(x, keys, valid)
    weight = counts.astype(flat.dtype)
    if once_per is not None:
        several = list(keys) if isinstance(keys, tuple | list) else [jnp.asarray(keys)]
        _, _, visits = _prepare(x, [*several, once_per], valid)
        weight = weight / jnp.maximum(_sum(weight, visits), 1)
    total = _sum(weight, ids)
    some = jnp.where(total > 0, total, 1.0)
    first = _sum(weight * flat, ids) / some
    # The second pass removes the rounding of the first, as in `masked.mean`: equal numbers have that number as mean.
    mean = first + jax.lax.stop_gradient(_sum(weight * (flat - first), ids) / some)
    return jnp.where(counts, mean, 0.0).reshape(shape)


def rloo_by_key(rewards: Array, keys: Array | Sequence[Array], valid: Array | None = None) -> Array:
    r"""Leave-one-out over groups that keys define, $A_i = r_i - \mathrm{mean}_{j \neq i} r_j$, $j$ of the group of $i$.

    Args:
        rewards: any shape, float; one element per turn, trajectory or step.
        keys: integers of `rewards`' shape, or several of them: elements that agree in all of them are a group.
        valid: `rewards`' shape, bool, False where the element does not count; None for all.

    Returns:
        `rewards`' shape, float32 or wider; 0 where not valid, and in a group with one valid element.

    Raises:
        ValueError: as `grpo_by_key`.

    Example:
        >>> rloo_by_key(jnp.array([1.0, 3.0, 5.0, 9.0]), jnp.array([7, 7, 7, 2])).tolist()
        [-3.0, 0.0, 3.0, 0.0]

    Reference: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
    (arXiv 2402.14740).
    """
    shape = jnp.shape(rewards)
    rewards, valid, ids = _prepare(rewards, keys, valid)
    centered, _, count = _moments(rewards, valid, ids, ddof=0)
    return (centered * count / jnp.maximum(count - 1, 1)).reshape(shape)


def second_moment_factor(
    rewards: Array, group: Array, part: Array, valid: Array | None = None, *, ddof: int = 0
) -> Array:
    r"""How much a group's common baseline and scale inflate the gradient of one part of it (an agent, say).

    $$f_k = (s_k^2 + (\mu_k - \mu)^2) / s^2$$

    with mean and deviation of part $k$ and of the whole group. The second moment of the gradient of part $k$ has this
    factor under group-wise normalization, and 1 under part-wise normalization (`dr_mas`).

    Args:
        rewards: any shape, float.
        group: integers of that shape: the prompt.
        part: integers of that shape: the agent.
        valid: that shape, bool; None for all.
        ddof: 1 for unbiased variances, 0 for the population's, with which the factors of a group average to 1.

    Returns:
        `rewards`' shape, float32 or wider: the factor of the element's part; 0 where not valid, and where the rewards
        of the whole group are equal.

    Raises:
        ValueError: as `grpo_by_key`.

    Example:
        >>> rewards, agent = jnp.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0]), jnp.array([0, 0, 0, 0, 1, 1])
        >>> [round(f, 4) for f in second_moment_factor(rewards, jnp.zeros(6, int), agent).tolist()]
        [0.875, 0.875, 0.875, 0.875, 1.25, 1.25]

    Reference: Dr. MAS: Stable Reinforcement Learning for Multi-Agent LLM Systems (arXiv 2602.08847).
    """
    shape = jnp.shape(rewards)
    flat, counts, whole = _prepare(rewards, group, valid)
    _, _, parts = _prepare(rewards, (group, part), valid)
    from_whole, spread_whole, _ = _moments(flat, counts, whole, ddof)
    _, spread_part, count = _moments(flat, counts, parts, ddof)
    offset = _sum(from_whole, parts) / jnp.maximum(count, 1)
    real = counts & ~(spread_whole <= 0)
    scale = jnp.where(real, spread_whole, 1.0)
    return jnp.where(real, (jnp.square(spread_part) + jnp.square(offset)) / jnp.square(scale), 0.0).reshape(shape)
