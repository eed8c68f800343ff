"""Texts that are not trained on but scored: what a model thinks of an answer now, or of a text after another prompt.

A method names them in `Method.probes`; the train step scores each under its role at the start of the step, and the
method reads the result in `targets` as `stats["probe/<name>"]`. Each is a `Rollouts` of its own, whose mask says which
tokens matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.steps import step_end
from jaxrl_post.types import FINISH_NONE, FINISH_STOP, Array, Rollouts


class Belief(NamedTuple):
    """What a model thinks of an answer before the first step and after each.

    Attributes:
        logp: `[B, 1 + S]` float32, nats: log-prob of the whole answer; 0 where it is not known.
        length: `[B]` float32: tokens of the answer.
        known: `[B, 1 + S]` bool: False where there is no such step, no answer, or no room for it.
    """

    logp: Array
    length: Array
    known: Array


def append_after_steps(
    rollouts: Rollouts,
    step: Array,
    answer: Array,
    *,
    num_steps: int,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    max_length: int | None = None,
) -> Rollouts:
    """Every trajectory up to the end of each of its steps, with an answer put behind it.

    `P` prompts make `P` groups of `1 + G S`: column 0 is the prompt and the answer, column `1 + g S + k` is trajectory
    `g` up to the end of its step `k`, the prefix, the answer and the suffix. A stop token that ends a trajectory is
    left out. What tools wrote within the steps is kept.

    Args:
        rollouts: `P` groups of `G`.
        step: `[B, T]` int, the step of each trained token from 0; -1 elsewhere.
        answer: `[P, A]` int, tokens of the right answer; -1 for no token, only at the end.
        num_steps: `S`; later steps are left out.
        prefix: token ids before the answer, e.g. of "The answer is".
        suffix: token ids after it, which are read but not scored; most often none.
        max_length: room for each text; None for as much as the longest may need. A text that does not fit is not
            valid.

    Returns:
        `Rollouts` with `P` groups of `1 + G S`, whose mask is 1 on the answer. Texts of steps that do not exist, of
        invalid trajectories and of empty answers are not valid.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> from jaxrl_post import data
        >>> rollouts = data.to_rollouts([[5]], [[[1, 2]]], length=3)
        >>> probe = append_after_steps(rollouts, jnp.array([[-1, 0, 1]]), jnp.array([[8]]), num_steps=2, prefix=[9])
        >>> [row[:n] for row, n in zip(probe.tokens.tolist(), probe.length[0].tolist())]
        [[5, 9, 8], [5, 1, 9, 8], [5, 1, 2, 9, 8]]
        >>> probe.mask.tolist()[1]
        [0.0, 0.0, 0.0, 1.0, 0.0]
    """
    tokens, answer, step = rollouts.tokens, jnp.asarray(answer), jnp.asarray(step)
    masked.check_like("step", step, "rollouts.tokens", tokens)
    prompts, group = rollouts.num_prompts, rollouts.group_size
    if answer.ndim != 2 or answer.shape[0] != prompts:
        raise ValueError(f"answer must be [P, A] with P = {prompts}, one answer per prompt, got shape {answer.shape}")
    before, after = jnp.asarray(tuple(prefix), jnp.int32), jnp.asarray(tuple(suffix), jnp.int32)
    most = tokens.shape[1] + before.size + answer.shape[1] + after.size
    width = most if max_length is None else min(max_length, most)
    if width < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")

    ends = step_end(step, rollouts.mask, num_steps=num_steps) + 1
    total = rollouts.length.reshape(-1, 1)
    stopped = (rollouts.finish.reshape(-1, 1) == FINISH_STOP) & (ends == total)
    cuts = (ends - stopped).reshape(prompts, group * num_steps)
    exists = (ends > 0) & rollouts.valid.reshape(-1, 1)
    acts = rollouts.mask != 0
    prompt_end = jnp.where(jnp.any(acts, axis=1), jnp.argmax(acts, axis=1), rollouts.length.reshape(-1))
    cut = jnp.concatenate([prompt_end.reshape(prompts, group)[:, :1], cuts], axis=1)
    there = jnp.concatenate([jnp.any(rollouts.valid, axis=1)[:, None], exists.reshape(prompts, -1)], axis=1)

    columns = 1 + group * num_steps
    source = jnp.repeat(tokens.reshape(prompts, group, -1), num_steps, axis=1)
    source = jnp.concatenate([tokens.reshape(prompts, group, -1)[:, :1], source], axis=1)
    length = jnp.sum(answer >= 0, axis=1)[:, None, None]
    start = cut[..., None] + before.size
    end, total = start + length, start + length + after.size
    place = jnp.arange(width)

    def pick(x: Array, index: Array) -> Array:
        if x.shape[-1] == 0:
            return jnp.zeros(index.shape, tokens.dtype)
        x = jnp.broadcast_to(x, (*index.shape[:-1], x.shape[-1])).astype(tokens.dtype)
        return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[-1] - 1), axis=-1)

    shape = (prompts, columns, width)
    place = jnp.broadcast_to(place, shape)
    text = jnp.where(place < cut[..., None], pick(source, place), pick(before, place - cut[..., None]))
    text = jnp.where(place >= start, pick(answer[:, None], place - start), text)
    text = jnp.where(place >= end, pick(after, place - end), text)
    scored = (place >= start) & (place < end)
    valid = there & (length[..., 0] > 0) & (total[..., 0] <= width)
    rows, grouped = prompts * columns, (prompts, columns)
    scored &= valid[..., None]
    return Rollouts(
        tokens=jnp.where(place < total, text, 0).reshape(rows, width),
        mask=scored.astype(jnp.float32).reshape(rows, width),
        logp=jnp.zeros((rows, width), jnp.float32),
        step=jnp.where(scored, 0, -1).astype(jnp.int32).reshape(rows, width),
        version=jnp.full((rows, width), -1, jnp.int32),
        reward=jnp.zeros(grouped, jnp.float32),
        rewards={},
        valid=valid,
        length=jnp.minimum(total[..., 0], width).astype(jnp.int32),
        finish=jnp.full(grouped, FINISH_NONE, jnp.int8),
        id=jnp.arange(rows, dtype=jnp.uint32).reshape(grouped),
        prompt_id=rollouts.prompt_id,
    )


def belief(logp: Array, probe: Rollouts, *, group_size: int) -> Belief:
    r"""The log-prob of the answer before and after each step, from the log-probs of `append_after_steps`.

    $$s_{i,k} = \sum_j \log\pi(a_j \mid x, z_{i, \le k}, a_{<j})$$

    Divide by `length` for the mean per token, whose exponential is the geometric mean of the answer's probabilities.

    Args:
        logp: `[P (1 + G S), T']` float, nats: of `probe`'s tokens.
        probe: what `append_after_steps` made.
        group_size: `G` of the rollouts that it was made of.

    Returns:
        `Belief` of the `B = P G` trajectories.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> from jaxrl_post import data
        >>> rollouts = data.to_rollouts([[5]], [[[1, 2]]], length=3)
        >>> probe = append_after_steps(rollouts, jnp.array([[-1, 0, 1]]), jnp.array([[8]]), num_steps=2)
        >>> found = belief(jnp.full((3, 4), -0.5), probe, group_size=1)
        >>> found.logp.tolist(), found.length.tolist(), found.known.tolist()
        ([[-0.5, -0.5, -0.5]], [1.0], [[True, True, True]])
    """
    logp = masked.as_float(logp)
    masked.check_like("logp", logp, "probe.mask", probe.mask)
    columns = probe.group_size - 1
    if columns % group_size:
        raise ValueError(f"probe has {columns} texts after steps, which {group_size} trajectories cannot share evenly")
    total = jnp.sum(jnp.where(probe.mask != 0, logp, 0.0), axis=1).reshape(probe.valid.shape)
    count = jnp.sum(probe.mask != 0, axis=1).reshape(probe.valid.shape)

    def by_trajectory(x: Array) -> Array:
        first = jnp.repeat(x[:, :1], group_size, axis=0)
        return jnp.concatenate([first, x[:, 1:].reshape(-1, columns // group_size)], axis=1)

    length = jnp.repeat(jnp.max(count, axis=1), group_size).astype(logp.dtype)
    return Belief(by_trajectory(total), length, by_trajectory(probe.valid))


def insert_after_prompt(rollouts: Rollouts, tokens: Sequence[int]) -> Rollouts:
    """The same completions after a longer prompt: some tokens are put between the prompt and what the policy wrote.

    Args:
        rollouts: any.
        tokens: `N` token ids, e.g. of "Write a better answer."

    Returns:
        `Rollouts` whose rows have `T + N` places; what is said of tokens moves with them, and inserted ones have mask
        0. `rewards` and `extras` are left out. `removed_again` undoes the shift.

    Raises:
        ValueError: if there are no tokens.

    Example:
        >>> from jaxrl_post import data
        >>> probe = insert_after_prompt(data.to_rollouts([[5]], [[[1, 2]]], length=3), [7, 8])
        >>> probe.tokens.tolist(), probe.mask.tolist()
        ([[5, 7, 8, 1, 2]], [[0.0, 0.0, 0.0, 1.0, 1.0]])
    """
    inserted = jnp.asarray(tuple(tokens), rollouts.tokens.dtype)
    if inserted.size == 0:
        raise ValueError("tokens must be at least one token id to insert, got none")
    start, count = _first_trained(rollouts), inserted.size
    place = jnp.arange(rollouts.tokens.shape[1] + count)
    new = (place >= start) & (place < start + count)
    source = jnp.clip(jnp.where(place < start, place, place - count), 0, rollouts.tokens.shape[1] - 1)

    def moved(x: Array, fill: float | int) -> Array:
        return jnp.where(new, jnp.asarray(fill, x.dtype), jnp.take_along_axis(x, source, axis=1))

    between = inserted[jnp.clip(place - start, 0, count - 1)]
    return rollouts.replace(
        tokens=jnp.where(new, between, jnp.take_along_axis(rollouts.tokens, source, axis=1)),
        mask=moved(rollouts.mask, 0),
        logp=moved(rollouts.logp, 0),
        step=moved(rollouts.step, -1),
        version=moved(rollouts.version, -1),
        length=rollouts.length + count,
        rewards={},
        extras={},
    )


def removed_again(x: Array, rollouts: Rollouts) -> Array:
    """What was said of the tokens of `insert_after_prompt`, at the places that they have in the rollouts.

    Args:
        x: `[B, T + N]`, e.g. log-probs of the probe.
        rollouts: what the probe was made of.

    Returns:
        `[B, T]`; 0 where `rollouts.mask` is.

    Example:
        >>> from jaxrl_post import data
        >>> rollouts = data.to_rollouts([[5]], [[[1, 2]]], length=3)
        >>> removed_again(jnp.array([[0.0, 0.1, 0.2, 0.3, 0.4]]), rollouts).tolist()
        [[0.0, 0.30000001192092896, 0.4000000059604645]]
    """
    length = rollouts.mask.shape[1]
    source = jnp.arange(length) + jnp.where(jnp.arange(length) < _first_trained(rollouts), 0, x.shape[1] - length)
    return jnp.where(rollouts.mask != 0, jnp.take_along_axis(x, source, axis=1), 0.0)


def exchange_completions(rollouts: Rollouts) -> Rollouts:
    """Each prompt with the completion of the next row, the last with that of the first: answers to other questions.

    Args:
        rollouts: groups of one, two of them at least.

    Returns:
        `Rollouts` of the same shapes, whose mask is that of the completions; what does not fit in `T` places is not
        valid, nor is what is made of a row that is not. `rewards` and `extras` are left out.

    Raises:
        ValueError: for larger groups, or a single row.

    Example:
        >>> from jaxrl_post import data
        >>> probe = exchange_completions(data.to_rollouts([[5, 6], [7]], [[[1]], [[2, 3]]], length=4))
        >>> probe.tokens.tolist(), probe.mask.tolist()
        ([[5, 6, 2, 3], [7, 1, 0, 0]], [[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    """
    if rollouts.group_size != 1 or rollouts.num_prompts < 2:
        raise ValueError(
            "completions are exchanged between prompts with one each, of which there must be two at least, got "
            f"[P, G] = {list(rollouts.reward.shape)}"
        )
    tokens, mask = rollouts.tokens, rollouts.mask
    start, there = _first_trained(rollouts), rollouts.length
    place = jnp.arange(tokens.shape[1])
    theirs = jnp.roll(start, -1, axis=0)
    length = start + jnp.roll(there, -1, axis=0) - theirs
    source = jnp.clip(place - start + theirs, 0, tokens.shape[1] - 1)
    inside = (place >= start) & (place < length)

    def of_next(x: Array) -> Array:
        return jnp.where(inside, jnp.take_along_axis(jnp.roll(x, -1, axis=0), source, axis=1), 0)

    valid = rollouts.valid & jnp.roll(rollouts.valid, -1, axis=0) & (length <= tokens.shape[1])
    acts = of_next(mask) * valid
    return rollouts.replace(
        tokens=jnp.where(place < start, tokens, of_next(tokens)),
        mask=acts,
        logp=jnp.zeros_like(rollouts.logp),
        step=jnp.where(acts > 0, 0, -1).astype(rollouts.step.dtype),
        version=jnp.full_like(rollouts.version, -1),
        valid=valid,
        length=jnp.minimum(length, tokens.shape[1]).astype(rollouts.length.dtype),
        rewards={},
        extras={},
    )


def _first_trained(rollouts: Rollouts) -> Array:
    """`[B, 1]`: where the completion begins; the length of a row without one."""
    acts = rollouts.mask != 0
    first = jnp.where(jnp.any(acts, axis=1), jnp.argmax(acts, axis=1), rollouts.length.reshape(-1))
    return first[:, None]
