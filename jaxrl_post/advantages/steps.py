"""Steps of a trajectory: where they begin, what each of them earned, and what is still to come after it.

A step is a turn of a dialogue, a line of reasoning, or any other stretch of a sequence. Which token belongs to which
step is an array `[B, T]` of numbers from 0, as `Rollouts.step`; what a step has is `[B, S]`. `layout.from_turns` gives
every token what its step has.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def segment_by_delimiter(tokens: Array, mask: Array, delimiters: Sequence[Sequence[int]]) -> Array:
    """Steps that end with a delimiter, which belongs to the step that it ends.

    Delimiters that follow each other directly end one step, not several. Where none is found, the whole row is step 0.

    Args:
        tokens: `[B, T]` int.
        mask: `[B, T]`, nonzero where the policy chose the token. A delimiter counts where all of it is trained, and
            tokens of tools in the middle do not tear it apart.
        delimiters: sequences of one or more token ids, each of which ends a step.

    Returns:
        `[B, T]` int32, the step of each trained token from 0; -1 elsewhere.

    Raises:
        ValueError: if the shapes differ, or there is no delimiter or an empty one.

    Example:
        >>> tokens, mask = jnp.array([[5, 1, 9, 2, 9, 9, 3]]), jnp.array([[0, 1, 1, 1, 1, 1, 1]])
        >>> segment_by_delimiter(tokens, mask, [[9]]).tolist()
        [[-1, 0, 0, 1, 1, 1, 2]]
    """
    tokens, acts = _trained("tokens", tokens, mask)
    delimiters = [tuple(delimiter) for delimiter in delimiters]
    if not delimiters or not all(delimiters):
        raise ValueError(f"delimiters must be sequences of at least one token id each, got {delimiters}")
    # Trained tokens move to the front, so that what a tool wrote does not stand between them.
    order = jnp.argsort(~acts, axis=1, stable=True)
    packed = jnp.where(jnp.take_along_axis(acts, order, 1), jnp.take_along_axis(tokens, order, 1), -1)
    inside = jnp.zeros(packed.shape, bool)  # a token of a delimiter
    for delimiter in delimiters:
        found = jnp.ones(packed.shape, bool)
        for back, token in enumerate(reversed(delimiter)):
            found &= _shifted(packed, back, -1) == token
        for back in range(len(delimiter)):
            inside |= jnp.pad(found, ((0, 0), (0, back)))[:, back:]
    begins = _shifted(inside, 1, False) & ~inside
    step = jnp.cumsum(begins, axis=1).astype(jnp.int32)
    back_in_place = jnp.zeros_like(step).at[jnp.arange(step.shape[0])[:, None], order].set(step)
    return jnp.where(acts, back_in_place, -1)


def segment_by_length(mask: Array, *, num_steps: int) -> Array:
    r"""Steps of equally many tokens, $\lfloor i S / n \rfloor$ for the $i$-th of $n$ trained tokens.

    Args:
        mask: `[B, T]`, nonzero where the policy chose the token.
        num_steps: $S$; a row of fewer tokens has fewer steps.

    Returns:
        `[B, T]` int32, the step of each trained token; -1 elsewhere. The numbers of a short row may have gaps.

    Raises:
        ValueError: if `num_steps` is below 1.

    Example:
        >>> segment_by_length(jnp.array([[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]), num_steps=2).tolist()
        [[-1, 0, 0, 1, 1, -1], [-1, 0, -1, -1, -1, -1]]
    """
    _, acts = _trained("mask", mask, mask)
    _check_count(num_steps)
    place = jnp.cumsum(acts, axis=1) - 1
    count = jnp.maximum(jnp.sum(acts, axis=1, keepdims=True), 1)
    return jnp.where(acts, place * num_steps // count, -1).astype(jnp.int32)


def segment_by_entropy(entropy: Array, mask: Array, *, num_steps: int, fraction: float = 0.2) -> Array:
    r"""Steps that begin at uncertain tokens and hold about equally many of them.

    Tokens of the row's highest entropies are candidates for a cut. The $c$-th of $n$ candidates, and what follows it up
    to the next, is in step $\lfloor (c - 1) S / n \rfloor$; what comes before the first is in step 0.

    Args:
        entropy: `[B, T]` float, nats, of the distribution that the token was drawn from.
        mask: `[B, T]`, nonzero where the policy chose the token.
        num_steps: $S$.
        fraction: share of a row's tokens that are candidates, in (0, 1]; ties with the last one are candidates too.

    Returns:
        `[B, T]` int32, the step of each trained token; -1 elsewhere. Numbers may have gaps where there are fewer
        candidates than steps.

    Raises:
        ValueError: if the shapes differ, `num_steps` is below 1, or `fraction` is out of its range.

    Example:
        >>> entropy = jnp.array([[9.0, 0.1, 2.0, 0.1, 0.1, 3.0, 0.2]])
        >>> segment_by_entropy(entropy, jnp.array([[0, 1, 1, 1, 1, 1, 1]]), num_steps=2, fraction=0.3).tolist()
        [[-1, 0, 0, 0, 0, 1, 1]]

    Reference: GRPO-VPS: Enhancing Group Relative Policy Optimization with Verifiable Process Supervision for Effective
    Reasoning (arXiv 2604.20659); the rule is reconstructed from its description.
    """
    entropy, acts = _trained("entropy", masked.as_float(entropy), mask)
    _check_count(num_steps)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}; it is the share of tokens where a cut may be")
    threshold = masked.quantile(entropy, acts, 1 - fraction, axis=1, keepdims=True)
    candidate = acts & (entropy >= threshold)
    seen = jnp.cumsum(candidate, axis=1)
    count = jnp.maximum(seen[:, -1:], 1)
    return jnp.where(acts, jnp.maximum(seen - 1, 0) * num_steps // count, -1).astype(jnp.int32)


def step_exists(step: Array, mask: Array, *, num_steps: int) -> Array:
    """Which steps have a trained token, `[B, T] -> [B, S]` bool.

    Args:
        step: `[B, T]` int, the step of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.
        num_steps: `S`; tokens of later steps are ignored.

    Returns:
        `[B, S]` bool.

    Example:
        >>> step_exists(jnp.array([[-1, 0, 0, 2]]), jnp.array([[0, 1, 1, 1]]), num_steps=3).tolist()
        [[True, False, True]]
    """
    return step_sum(jnp.ones(jnp.shape(step)), step, mask, num_steps=num_steps) > 0


def step_sum(x: Array, step: Array, mask: Array, *, num_steps: int) -> Array:
    """The sum over each step's trained tokens, `[B, T] -> [B, S]`.

    Args:
        x: `[B, T]` float.
        step: `[B, T]` int, the step of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.
        num_steps: `S`; tokens of later steps are ignored.

    Returns:
        `[B, S]`, float32 or wider; 0 for a step that does not exist.

    Raises:
        ValueError: if the shapes differ or `num_steps` is below 1.

    Example:
        >>> x, step = jnp.array([[9.0, 1.0, 2.0, 4.0]]), jnp.array([[-1, 0, 0, 1]])
        >>> step_sum(x, step, jnp.ones((1, 4)), num_steps=2).tolist()
        [[3.0, 4.0]]
    """
    x, acts = _trained("x", masked.as_float(x), mask)
    step = jnp.asarray(step)
    masked.check_like("step", step, "x", x)
    _check_count(num_steps)
    place = jnp.where(acts & (step >= 0) & (step < num_steps), step, num_steps)
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros((x.shape[0], num_steps), x.dtype).at[rows, place].add(jnp.where(acts, x, 0.0), mode="drop")


def step_end(step: Array, mask: Array, *, num_steps: int) -> Array:
    """The position of each step's last trained token, `[B, T] -> [B, S]`; -1 where there is no such step.

    Args:
        step: `[B, T]` int, the step of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.
        num_steps: `S`.

    Returns:
        `[B, S]` int32.

    Example:
        >>> step_end(jnp.array([[-1, 0, 0, -1, 2]]), jnp.array([[0, 1, 1, 0, 1]]), num_steps=3).tolist()
        [[2, -1, 4]]
    """
    step, acts = _trained("step", jnp.asarray(step), mask)
    _check_count(num_steps)
    place = jnp.where(acts & (step >= 0) & (step < num_steps), step, num_steps)
    rows, columns = jnp.arange(step.shape[0])[:, None], jnp.arange(step.shape[1], dtype=jnp.int32)
    return jnp.full((step.shape[0], num_steps), -1, jnp.int32).at[rows, place].max(columns, mode="drop")


def step_returns(rewards: Array, exists: Array, *, gamma: float = 1.0) -> Array:
    r"""What a step and those after it earn, $R_k = r_k + \gamma R_{k'}$, $k'$ the next step that exists.

    Args:
        rewards: `[..., S]` float, per step.
        exists: `[..., S]`, nonzero where the step exists. Steps that do not exist earn nothing and discount nothing.
        gamma: discount per step.

    Returns:
        `[..., S]`, float32 or wider; 0 where the step does not exist.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> step_returns(jnp.array([[1.0, -0.5, 9.0, 2.0]]), jnp.array([[1, 1, 0, 1]]), gamma=0.5).tolist()
        [[1.25, 0.5, 0.0, 2.0]]
    """
    rewards, exists = masked.as_float(rewards), jnp.asarray(exists) != 0
    masked.check_like("exists", exists, "rewards", rewards)

    def back(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, there = now
        total = jnp.where(there, reward + gamma * later, later)
        return total, jnp.where(there, total, 0.0)

    steps = (jnp.moveaxis(jnp.where(exists, rewards, 0.0), -1, 0), jnp.moveaxis(exists, -1, 0))
    _, returns = jax.lax.scan(back, jnp.zeros(rewards.shape[:-1], rewards.dtype), steps, reverse=True)
    return jnp.moveaxis(returns, 0, -1)


def _trained(name: str, x: Array, mask: Array) -> tuple[Array, Array]:
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    masked.check_axes(name, x, "[B, T]")
    masked.check_like("mask", mask, name, x)
    return x, mask != 0


def _shifted(x: Array, places: int, fill: int | bool) -> Array:
    """`x` moved to the right by some places."""
    return x if places == 0 else jnp.pad(x, ((0, 0), (places, 0)), constant_values=fill)[:, : x.shape[1]]


def _check_count(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
