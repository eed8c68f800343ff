"""How the completions of a step are sampled, as one compiled program: plain or partial groups, early exits or turns.

Where prompts come from and what becomes of the completions is in `sampler`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpy.typing import NDArray

from jaxrl_post import data
from jaxrl_post.rollout import (
    Exits,
    Prompts,
    SamplingParams,
    begin,
    generate,
    generate_exits,
    generate_turns,
    host_turns,
    merge_groups,
    resume,
)
from jaxrl_post.rollout.host import Processes
from jaxrl_post.training.environment_setup import HostTurns, Turns
from jaxrl_post.types import FINISH_NONE, Array, Params, Policy, Rollouts


class Generation(NamedTuple):
    """How groups of completions are sampled; all static.

    Attributes:
        sampling: how tokens are drawn, and what ends a completion.
        max_new_tokens: longest completion.
        group_size: `G`.
        parts: prompts of a group, which share it evenly.
        exits: of serial groups, which are one longer than its count; None for completions that are sampled separately.
        slots: completions that are decoded at a time; None for all.
        cache_pages: of how many pages of keys and values the slots take theirs; None for room of each slot's own.
        cache_dtype: name of the type that keys and values are kept in; None for the model's own.
        turns: in which environment the policy acts; None for completions that nobody answers. `sample_on_host` is for
            one in Python, and no compiled program.
        tokens_per_step: the most tokens that a completion gets from one call, which then takes `Continued`; None for
            completions that end in the call they begin in.
    """

    sampling: SamplingParams
    max_new_tokens: int
    group_size: int
    parts: int = 1
    exits: Exits | None = None
    slots: int | None = None
    cache_pages: int | None = None
    cache_dtype: str | None = None
    turns: Turns | HostTurns | None = None
    tokens_per_step: int | None = None


class Tasks(NamedTuple):
    """Tasks of an environment, which makes their prompts.

    Attributes:
        number: `[P]` int32, of the task.
        prompt_id: `[P]` int32, index of the problem in its data.
        id: `[P, G]` uint32, see `Prompts`.
    """

    number: Array
    prompt_id: Array
    id: Array


class Continued(NamedTuple):
    """Completions that go on from one call to the next.

    Attributes:
        prompts: `P` prompts, each for a group all of whose completions have ended; the others are passed over.
        rollouts: `[P, G]`, as the last call left them, or `none_begun`.
    """

    prompts: Prompts
    rollouts: Rollouts


def sample_groups(
    policy: Policy,
    params: Params,
    prompts: Prompts | Tasks | Continued,
    key: Array,
    *,
    how: Generation,
    version: Array | int = 0,
) -> Rollouts:
    """Groups of completions: of one prompt each, of several prompts each, serial ones, or the next tokens of them.

    Args:
        policy: the model.
        params: its parameters.
        prompts: `P * parts` prompts, those of a group next to each other; `id` is `[P * parts, G / parts]`. Tasks
            where there is an environment, `Continued` where completions go on.
        key: of the random streams.
        how: they are sampled.
        version: recorded with every token.

    Returns:
        `Rollouts` of `[P, G]`; with `tokens_per_step`, `finish` is `FINISH_NONE` of what is to go on.
    """
    if isinstance(prompts, Continued):
        assert how.tokens_per_step is not None
        return resume(
            policy,
            params,
            renewed(prompts.rollouts, prompts.prompts),
            key,
            sampling=how.sampling,
            max_new_tokens=how.tokens_per_step,
            total=how.max_new_tokens,
            version=version,
            cache_dtype=None if how.cache_dtype is None else jnp.dtype(how.cache_dtype),
        )
    limits = {
        "sampling": how.sampling,
        "max_new_tokens": how.max_new_tokens,
        "version": version,
        "cache_dtype": None if how.cache_dtype is None else jnp.dtype(how.cache_dtype),
    }
    pool = {"slots": how.slots, "cache_pages": how.cache_pages}
    if isinstance(prompts, Tasks):
        assert isinstance(how.turns, Turns)
        sampled = generate_turns(
            policy,
            params,
            how.turns.environment,
            prompts.number,
            key,
            max_turns=how.turns.max_turns,
            max_turn_tokens=how.turns.max_turn_tokens,
            group_size=how.group_size,
            id=prompts.id,
            **pool,
            **limits,
        )
        return sampled.replace(prompt_id=prompts.prompt_id)
    if how.exits is not None:
        return generate_exits(policy, params, prompts, key, exits=how.exits, **limits)
    size = how.group_size // how.parts
    sampled = generate(policy, params, prompts, key, group_size=size, **pool, **limits)
    return sampled if how.parts == 1 else merge_groups(sampled, how.parts)


def none_begun(policy: Policy, params: Params, prompts: Prompts, *, how: Generation) -> Rollouts:
    """The rows of completions of which none goes on, as shapes.

    Args:
        policy: the model.
        params: its parameters, or their shapes.
        prompts: `P` prompts, or their shapes.
        how: completions are sampled.
    """
    assert how.tokens_per_step is not None
    first = functools.partial(
        begin,
        policy,
        sampling=how.sampling,
        max_new_tokens=how.tokens_per_step,
        total=how.max_new_tokens,
        group_size=how.group_size,
    )
    return jax.eval_shape(first, params, prompts, jax.random.key(0))


def renewed(rollouts: Rollouts, prompts: Prompts) -> Rollouts:
    """Groups all of whose completions have ended make room for other prompts, to be gone on with.

    Args:
        rollouts: `[P, G]`, rows of `T` places.
        prompts: `P` prompts of at most `T` tokens, with ids.
    """
    group, width = rollouts.group_size, rollouts.mask.shape[1]
    going = jnp.any(rollouts.finish == FINISH_NONE, axis=1)
    prompt_id, id = prompts.prompt_id, prompts.id
    assert prompt_id is not None
    assert id is not None
    tokens = jnp.pad(prompts.tokens, ((0, 0), (0, width - prompts.tokens.shape[1])))
    nothing = jax.tree.map(jnp.zeros_like, rollouts)
    fresh = nothing.replace(
        tokens=jnp.repeat(tokens, group, axis=0),
        step=nothing.step - 1,
        version=nothing.version - 1,
        valid=jnp.ones_like(rollouts.valid),
        length=jnp.broadcast_to(prompts.length[:, None], rollouts.length.shape),
        finish=jnp.full_like(rollouts.finish, FINISH_NONE),
        id=id,
        prompt_id=prompt_id,
    )

    def chosen(old: Array, new: Array) -> Array:
        keep = going if len(old) == len(going) else jnp.repeat(going, group)
        return jnp.where(keep.reshape(-1, *(1,) * (old.ndim - 1)), old, new.astype(old.dtype))

    return jax.tree.map(chosen, rollouts, fresh)


def sample_on_host(
    policy: Policy,
    params: Params,
    problems: Sequence[data.Problem],
    key: Array,
    *,
    how: Generation,
    tokenizer: data.Tokenizer,
    max_length: int,
    prompt_id: NDArray,
    id: NDArray,
    version: int,
    processes: Processes,
) -> Rollouts:
    """The same in an environment in Python, which is asked turn by turn.

    Args:
        policy: the model.
        params: its parameters.
        problems: `P`, what `reset` is given.
        key: of the random streams.
        how: they are sampled.
        tokenizer: of the policy.
        max_length: `T`, tokens of a sequence.
        prompt_id: `[P]`.
        id: `[P, G]` uint32.
        version: recorded with every token.
        processes: how several act together, each for problems of its own.
    """
    assert isinstance(how.turns, HostTurns)
    return host_turns(
        policy,
        params,
        how.turns.environment,
        problems,
        key,
        tokenizer=tokenizer,
        sampling=how.sampling,
        max_turns=how.turns.max_turns,
        max_turn_tokens=how.turns.max_turn_tokens,
        max_length=max_length,
        max_new_tokens=how.max_new_tokens,
        group_size=how.group_size,
        version=version,
        cache_dtype=None if how.cache_dtype is None else jnp.dtype(how.cache_dtype),
        prompt_id=jnp.asarray(prompt_id),
        id=jnp.asarray(id),
        processes=processes,
        timeout=how.turns.timeout,
        on_error=how.turns.on_error,
    )


@functools.lru_cache(maxsize=32)
def compiled_generate(policy: Policy, how: Generation) -> Callable[..., Rollouts]:
    """`sample_groups`, jitted; samplers of the same kind share it, so that training and evaluation compile once."""
    return jax.jit(functools.partial(sample_groups, policy, how=how))
