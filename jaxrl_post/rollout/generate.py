"""Prefill and decode as one pure function of parameters, prompts and a key.

Scoring texts, filtering and batching prompts are not done here; how many sequences are decoded at a time, and who takes
the place of one that has ended, is in `slots`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrl_post.mesh import constrain
from jaxrl_post.models.paged_cache import page_width, pool_parts
from jaxrl_post.rollout.drawing import Drawer, flat_params
from jaxrl_post.rollout.slots import Drawn, Requests, Turns, decode_all, default_refill
from jaxrl_post.sampling import SamplingParams, is_truncating
from jaxrl_post.sampling.transforms import check
from jaxrl_post.types import FINISH_ABORT, Array, Params, Policy, Rollouts


class Prompts(NamedTuple):
    """Prompts of one call, padded on the right.

    Attributes:
        tokens: `[P, L]` int32; what stands at or after `length` is ignored.
        length: `[P]` int32, between 1 and `L`.
        prompt_id: `[P]` int32, index of the prompt in its data set; `arange(P)` if None.
        id: `[P, G]` uint32, the id of each sequence to be sampled, which with the key determines its random stream;
            `arange(P * G)` if None. Ids must not repeat under one key.
        max_new_tokens: `[P]` or `[P, G]` int32, most tokens to add to each, at least 1 and at most the static limit,
            which it is if None. What is traced and beyond these is cut to them.
    """

    tokens: Array
    length: Array
    prompt_id: Array | None = None
    id: Array | None = None
    max_new_tokens: Array | None = None


PLAIN = SamplingParams()


def generate(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    sampling: SamplingParams = PLAIN,
    max_new_tokens: int,
    group_size: int = 1,
    version: Array | int = 0,
    cache_dtype: jnp.dtype | None = None,
    slots: int | None = None,
    refill: int | None = None,
    cache_pages: int | None = None,
    alternatives: int = 0,
) -> Rollouts:
    """Sample `group_size` completions of each prompt.

    One prefill of each prompt, whatever the group's size, then one decode step per token inside a `lax.while_loop` that
    ends when every sequence has. Each sequence draws from a stream of its own,
    `fold_in(fold_in(key, id), position)`: the same prompt, id and key give the same tokens in any batch, batch size or
    mesh (to the rounding of the logits: a draw whose two best perturbed logits are closer than that may differ).

    With fewer `slots` than sequences, a sequence that ends makes room for the next in the queue, within the same
    program: no slot waits for the longest of a batch. Results are in the order of the prompts, and the same.

    `logp` is under the tempered distribution over all tokens, also where truncations, penalties or bans change what is
    drawn, and is what the losses use as the behaviour policy's log-prob; the log-prob under the distribution that was
    drawn from is then in `extras["sampler_logp"]`. `extras["entropy"]` is the entropy of the tempered distribution, in
    nats.

    A sequence whose logits hold NaN, or no token that may be drawn, ends before that token with `FINISH_ABORT` and is
    not `valid`; the others go on. So are those of a prompt whose length, if it is traced, is none.

    Args:
        policy: the model.
        params: its parameters.
        prompts: `P` prompts of at most `L` tokens.
        key: a typed key (`jax.random.key`) or a raw one.
        sampling: temperature, truncations, penalties, what ends a sequence; what may differ between sequences (see
            `SamplingParams`) is one for all, or has leading axes `[P]` or `[P, G]`.
        max_new_tokens: `N`, the largest number of tokens to add to each prompt; static.
        group_size: `G`; static.
        version: recorded in `Rollouts.version` for every sampled token.
        cache_dtype: of the key-value cache; the model's own choice if None. int8 takes half of what bfloat16 does;
            `logp` is then that of a slightly different model, which recomputing or a correction puts right.
        slots: sequences that are decoded at a time; None for all `P * G`; static.
        refill: how many slots must be free before the next sequences take them, so that their prompts are read
            together; None for an eighth of the slots; static.
        cache_pages: keep keys and values in a pool of so many pages of `models.page_width(L + N)` tokens, which
            sequences take as they grow and give back when they end: it may be smaller than `slots` sequences of `L + N`
            tokens. Where it is full, the sequence that came last gives its pages back and starts over later, with the
            same random stream. A group's prompt is then kept for each of its members. Devices that share the slots
            have equal parts of the pool, each for its own. None for room of its own for each slot; static.
        alternatives: `k`: of how many of the most probable tokens the ids and tempered log-probs are recorded at each
            place, in `extras["alternatives"]` and `extras["alternative_logp"]` `[B, T, k]`; 0 for none; static.

    Returns:
        `Rollouts` with `T = L + N`, reward 0 and `valid` True. A stop token, or the last of a stop sequence, is the
        last token of its sequence and inside the mask.

    Raises:
        ValueError: for wrong shapes, sizes below 1, sampling parameters out of range, slots that are refilled where
            the policy cannot insert rows into its cache, or pages that cannot hold one sequence of `L + N` tokens or
            that devices cannot share evenly.

    Example:
        >>> import jax
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> prompts = Prompts(jnp.array([[2, 3, 0], [4, 5, 6]]), jnp.array([2, 3]))
        >>> params, key = policy.init(jax.random.key(0)), jax.random.key(1)
        >>> out = generate(policy, params, prompts, key, max_new_tokens=4, group_size=2)
        >>> out.tokens.shape, out.length.tolist()
        ((4, 7), [[6, 6], [7, 7]])
    """
    check(sampling)
    requests = check_requests(prompts, max_new_tokens, group_size)
    drawn, finish = launch(
        policy,
        params,
        requests,
        key,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        slots=slots,
        refill=refill,
        cache_dtype=cache_dtype,
        cache_pages=cache_pages,
        alternatives=alternatives,
    )
    return assemble(requests, drawn, finish, sampling=sampling, version=version, prompt_id=prompts.prompt_id)


def launch(
    policy: Policy,
    params: Params,
    requests: Requests,
    key: Array,
    *,
    sampling: SamplingParams,
    max_new_tokens: int,
    slots: int | None,
    refill: int | None,
    cache_dtype: jnp.dtype | None,
    cache_pages: int | None = None,
    turns: Turns | None = None,
    alternatives: int = 0,
) -> tuple[Drawn, Array]:
    """`decode_all` of checked requests, with the defaults of `slots` and `refill`.

    Raises:
        ValueError: for slots or pages that do not fit.
    """
    if alternatives < 0:
        raise ValueError(f"alternatives must be at least 0 tokens, got {alternatives}")
    batch = requests.count
    slots = batch if slots is None else slots
    refill = default_refill(min(slots, batch)) if refill is None else refill
    if not 1 <= refill <= max(slots, 1) or slots < 1:
        raise ValueError(f"slots must be at least 1, and refill between 1 and slots, got {slots} and {refill}")
    slots, refill = min(slots, batch), min(refill, batch)
    if slots < batch and policy.insert is None:
        raise ValueError(
            f"{slots} slots for {batch} sequences need a policy whose cache takes rows (Policy.insert); give slots=None"
        )
    if cache_pages is not None:
        _check_pages(policy, cache_pages, slots, requests.tokens.shape[1], max_new_tokens)
    own = flat_params(sampling, len(requests.tokens), requests.group_size)
    drawn, finish = decode_all(
        policy,
        params,
        requests,
        Drawer(policy.unembed(params), own, key, requests, alternatives),
        max_new_tokens=max_new_tokens,
        slots=slots,
        refill=refill,
        cache_dtype=cache_dtype,
        cache_pages=cache_pages,
        turns=turns,
    )
    return refused(requests, drawn, finish)


def refused(requests: Requests, drawn: Drawn, finish: Array) -> tuple[Drawn, Array]:
    """What was drawn, `[B, N]`, without what stands behind no prompt, which is `FINISH_ABORT`."""
    if requests.sound is None:
        return drawn, finish
    sound = jnp.repeat(requests.sound, requests.group_size)
    mask, marks = jax.tree.map(lambda x: jnp.where(sound[:, None], x, 0).astype(x.dtype), (drawn.mask, drawn.marks))
    return drawn._replace(mask=mask, marks=marks), jnp.where(sound, finish, FINISH_ABORT).astype(finish.dtype)


def _check_pages(policy: Policy, pages: int, slots: int, width: int, max_new_tokens: int) -> None:
    if policy.insert is None or "pages" not in inspect.signature(policy.init_cache).parameters:
        raise ValueError(
            "cache_pages needs a policy whose cache takes rows and comes in pages: Policy.insert and "
            "init_cache(batch, capacity, dtype, pages=...), as models.decoder has them; leave cache_pages out"
        )
    columns, parts = page_width(width + max_new_tokens), pool_parts(slots)
    needed = -(-(width + max_new_tokens) // columns) * parts
    if pages < needed:
        each = f" on each of {parts} devices that share the slots" if parts > 1 else ""
        raise ValueError(
            f"cache_pages={pages} of {columns} tokens cannot hold one sequence of L + max_new_tokens = "
            f"{width} + {max_new_tokens}{each}; give at least {needed}"
        )


def assemble(
    requests: Requests,
    drawn: Drawn,
    finish: Array,
    *,
    sampling: SamplingParams,
    version: Array | int,
    prompt_id: Array | None = None,
    turn: Array | None = None,
) -> Rollouts:
    """The transcripts: each prompt, and directly behind it what was drawn, which `decode_all` gives without prompts.

    Args:
        requests: what was asked for.
        drawn: `[B, N]`.
        finish: `[B]` int8.
        sampling: how it was drawn.
        version: of the policy.
        prompt_id: `[P]`; `arange(P)` if None.
        turn: `[B, N]` int32, the turn of each token that the policy chose, from 1; 0 where it chose none. None: all are
            of one turn.
    """
    behind, total = behind_prompts(requests, drawn)
    prompt = constrain(jnp.repeat(requests.tokens, requests.group_size, axis=0), ("batch", None))
    length = jnp.repeat(requests.length, requests.group_size, axis=0)
    added = drawn.mask.shape[1]
    in_prompt = jnp.arange(prompt.shape[1] + added) < length[:, None]
    step = behind(drawn.mask.astype(jnp.int32) if turn is None else turn) - 1
    sampled = step >= 0
    extras = {"entropy": behind(drawn.entropy)}
    if is_truncating(sampling):
        extras["sampler_logp"] = behind(drawn.sampler_logp)
    if drawn.others:
        extras["alternatives"], extras["alternative_logp"] = map(behind, drawn.others)
    grouped = (len(requests.tokens), requests.group_size)
    prompt_id = jnp.arange(grouped[0], dtype=jnp.int32) if prompt_id is None else prompt_id
    return Rollouts(
        tokens=jnp.where(in_prompt, jnp.pad(prompt, ((0, 0), (0, added))), behind(drawn.token)),
        mask=sampled.astype(jnp.float32),
        logp=behind(drawn.logp),
        step=step,
        version=jnp.where(sampled, version, -1).astype(jnp.int32),
        reward=jnp.zeros(grouped, jnp.float32),
        rewards={},
        valid=finish.reshape(grouped) != FINISH_ABORT,
        length=total.reshape(grouped),
        finish=finish.reshape(grouped),
        id=requests.id.reshape(grouped),
        prompt_id=prompt_id.astype(jnp.int32),
        extras=extras,
    )


def behind_prompts(requests: Requests, drawn: Drawn) -> tuple[Callable[[Array], Array], Array]:
    """What moves `[B, N, ...]` from behind the padded prompt to directly behind it, and the lengths, `[B]`."""
    batch, added = drawn.mask.shape
    width = requests.tokens.shape[1] + added
    length = constrain(jnp.repeat(requests.length, requests.group_size, axis=0), ("batch",))
    total = length + jnp.sum(drawn.mask, axis=1).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    there = (positions >= length[:, None]) & (positions < total[:, None])
    source = jnp.clip(positions - length[:, None], 0, added - 1)

    def move(x: Array) -> Array:
        wide = (batch, width, *(1,) * (x.ndim - 2))
        moved = jnp.take_along_axis(x, source.reshape(wide), axis=1)
        return jnp.where(there.reshape(wide), moved, jnp.zeros((), x.dtype))

    return move, total


def check_requests(prompts: Prompts, max_new_tokens: int, group_size: int) -> Requests:
    """The sequences to be sampled, checked."""
    if prompts.tokens.ndim != 2 or prompts.length.shape != prompts.tokens.shape[:1]:
        raise ValueError(
            "prompts.tokens must be [P, L] and prompts.length [P], "
            f"got {prompts.tokens.shape} and {prompts.length.shape}"
        )
    num_prompts, width = prompts.tokens.shape
    if num_prompts < 1:
        raise ValueError("prompts hold no prompt; give at least one")
    reason = "a prompt needs at least one token, e.g. a beginning-of-sequence token"
    _check_range("prompts.length", prompts.length, width, "L", reason)
    if max_new_tokens < 1 or group_size < 1:
        raise ValueError(f"max_new_tokens and group_size must be at least 1, got {max_new_tokens} and {group_size}")
    grouped = (num_prompts, group_size)
    ids = jnp.arange(num_prompts * group_size, dtype=jnp.uint32).reshape(grouped) if prompts.id is None else prompts.id
    if ids.shape != grouped:
        raise ValueError(f"prompts.id must be [P, G] = [{num_prompts}, {group_size}], got {ids.shape}")
    if prompts.prompt_id is not None and prompts.prompt_id.shape != (num_prompts,):
        raise ValueError(f"prompts.prompt_id must be [P] = [{num_prompts}], got {prompts.prompt_id.shape}")
    limit = prompts.max_new_tokens
    if limit is not None:
        if limit.shape not in ((num_prompts,), grouped):
            raise ValueError(
                f"prompts.max_new_tokens must be [P] = [{num_prompts}] or [P, G] = {list(grouped)}, got {limit.shape}"
            )
        _check_range("prompts.max_new_tokens", limit, max_new_tokens, "max_new_tokens", "which is the static limit")
        limit = jnp.broadcast_to(limit if limit.ndim == 2 else limit[:, None], grouped).reshape(-1)
        limit = jnp.clip(limit, 1, max_new_tokens).astype(jnp.int32)
    tokens, length = (jnp.asarray(x, jnp.int32) for x in (prompts.tokens, prompts.length))
    sound = None
    if not is_known(length):
        sound = (length >= 1) & (length <= width)
        length = jnp.clip(length, 1, width)
    return Requests(tokens, length, jnp.asarray(ids, jnp.uint32).reshape(-1), limit, group_size, sound)


def is_known(values: Array) -> bool:
    """Whether the values can be read here: they are not traced, nor partly on devices of other processes."""
    return not isinstance(values, Tracer) and getattr(values, "is_fully_addressable", True)


def _check_range(name: str, values: Array, highest: int, bound: str, reason: str) -> None:
    """Raise ValueError for a value below 1 or above the bound, where the values are known already."""
    if not is_known(values):
        return
    found = np.asarray(values)
    wrong = np.argwhere((found < 1) | (found > highest))
    if wrong.size:
        raise ValueError(
            f"{name} must be between 1 and {bound}={highest}, got {found[tuple(wrong[0])]} for prompt {wrong[0][0]}; "
            f"{reason}"
        )
