"""How the completions of a step are sampled, as one compiled program: plain groups, sub-groups, early exits, or turns.

Where prompts come from and what becomes of the completions is in `sampler`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post.rollout import Exits, Prompts, SamplingParams, generate, generate_exits, merge_groups
from jaxrl_post.types import Array, Params, Policy, Rollouts


class Generation(NamedTuple):
    """How groups of completions are sampled; all static.

    Attributes:
        sampling: how tokens are drawn, and what ends a completion.
        max_new_tokens: longest completion.
        group_size: `G`.
        parts: prompts of a group, which share it evenly.
        exits: of serial groups, which are one longer than its count; None for completions that are sampled separately.
        slots: completions that are decoded at a time; None for all.
        cache_dtype: name of the type that keys and values are kept in; None for the model's own.
    """

    sampling: SamplingParams
    max_new_tokens: int
    group_size: int
    parts: int = 1
    exits: Exits | None = None
    slots: int | None = None
    cache_dtype: str | None = None


def sample_groups(
    policy: Policy, params: Params, prompts: Prompts, key: Array, *, how: Generation, version: Array | int = 0
) -> Rollouts:
    """Groups of completions: of one prompt each, of several prompts each, or serial ones.

    Args:
        policy: the model.
        params: its parameters.
        prompts: `P * parts` prompts, those of a group next to each other; `id` is `[P * parts, G / parts]`.
        key: of the random streams.
        how: they are sampled.
        version: recorded with every token.

    Returns:
        `Rollouts` of `[P, G]`.
    """
    limits = {
        "sampling": how.sampling,
        "max_new_tokens": how.max_new_tokens,
        "version": version,
        "cache_dtype": None if how.cache_dtype is None else jnp.dtype(how.cache_dtype),
    }
    if how.exits is not None:
        return generate_exits(policy, params, prompts, key, exits=how.exits, **limits)
    size = how.group_size // how.parts
    sampled = generate(policy, params, prompts, key, group_size=size, slots=how.slots, **limits)
    return sampled if how.parts == 1 else merge_groups(sampled, how.parts)


@functools.lru_cache(maxsize=32)
def compiled_generate(policy: Policy, how: Generation) -> Callable[..., Rollouts]:
    """`sample_groups`, jitted; samplers of the same kind share it, so that training and evaluation compile once."""
    return jax.jit(functools.partial(sample_groups, policy, how=how))
