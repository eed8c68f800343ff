"""The loop over tokens: a queue of sequences, and slots that they take, one after the other, in one program.

Where the cache is a pool of pages, a sequence needs room in it too, and may have to go back to the queue. What is drawn
from a state is not known here, nor who speaks between the policy's turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxrl_post.mesh import constrain, spread
from jaxrl_post.models.cache_kinds import release
from jaxrl_post.models.paged_cache import page_width, pool_parts
from jaxrl_post.rollout.endings import Said, kept_where, listen, nothing_said
from jaxrl_post.sampling import SamplingParams
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_NONE, FINISH_STOP, Array, Params, Policy, PyTree


class Requests(NamedTuple):
    """`B = P * G` sequences to be sampled.

    Attributes:
        tokens: `[P, L]`, the prompts, padded on the right.
        length: `[P]`.
        id: `[B]` uint32, of the sequences.
        limit: `[B]` int32, the most tokens of each; None for the static limit.
        group_size: `G`, sequences of a prompt.
        sound: `[P]` bool, whether it is a prompt: what was given as its length can be one; None if all are.
    """

    tokens: Array
    length: Array
    id: Array
    limit: Array | None
    group_size: int
    sound: Array | None = None

    @property
    def count(self) -> int:
        """`B`."""
        return self.tokens.shape[0] * self.group_size


class Drawn(NamedTuple):
    """What is kept of each token behind the prompt: `[R]` where it is drawn, `[B, N]` of all.

    Attributes:
        token: int32.
        mask: 1 where there is a token; where drawing has failed, 0.
        logp: nats, under the tempered policy.
        sampler_logp: nats, under what was drawn from.
        entropy: nats, of the tempered policy.
        marks: what `Turns` says of it besides; `()` without turns.
        others: the most probable tokens in its place, `[R, k]` int32, and their log-probs, nats; `()` if not asked for.
    """

    token: Array
    mask: Array
    logp: Array
    sampler_logp: Array
    entropy: Array
    marks: PyTree = ()
    others: PyTree = ()


class Draw(Protocol):
    """What `decode_all` asks of a drawer; see `drawing.Drawer`."""

    @property
    def sampling(self) -> SamplingParams:
        """What ends a sequence is in it."""
        ...

    def counted(self, width: int) -> int | None:
        """`V` where it wants the counts of each sequence; `width` is `D`."""
        ...

    def __call__(self, hidden: Array, request: Array, count: Array, counts: Array | None) -> Drawn:
        """The next token of each row."""
        ...


class Reply(NamedTuple):
    """What `Turns` makes of the tokens of one step.

    Attributes:
        state: of `Turns`, a row for each slot.
        marks: what is kept of the tokens, `[S]` each, of the types of `Turns.marks`.
        sampled: `[S]` bool, whether there is a token and the policy chose it.
        speaking: `[S]` bool, whether the policy's turn goes on, so that what it said may become a stop sequence.
        over: `[S]` bool, whether the sequence ends.
        finish: `[S]` int8, how, where it does.
    """

    state: PyTree
    marks: PyTree
    sampled: Array
    speaking: Array
    over: Array
    finish: Array


class Turns(Protocol):
    """What `decode_all` asks of whoever answers the policy; see `turns.Conversation`.

    Tokens that it feeds go through the model as sampled ones do. A stop token then ends the policy's turn, and only
    `reply` says when a sequence ends.
    """

    @property
    def marks(self) -> PyTree:
        """The dtype of each array that is kept."""
        ...

    def begin(self, request: Array) -> PyTree:
        """The state of each of `R` sequences before their first tokens; of one that does not exist, any."""
        ...

    def feed(self, state: PyTree, drawn: Drawn) -> Drawn:
        """`drawn`, with the token that is fed instead where one is."""
        ...

    def reply(self, state: PyTree, request: Array, token: Array, alive: Array, stopped: Array, left: Array) -> Reply:
        """What follows the tokens of one step.

        Args:
            state: its own.
            request: `[S]` int32, the sequence in each slot.
            token: `[S]` int32, which `feed` has seen.
            alive: `[S]` bool, whether there is a token; where there is none, the sequence is over.
            stopped: `[S]` bool, whether the token is, or completes, what stops.
            left: `[S]` int32, how many more tokens the sequence may have.
        """
        ...


class _Slots(NamedTuple):
    """The loop's state.

    Attributes:
        request: `[S]` int32, the sequence in each slot; `B` where there is none.
        count: `[S]` int32, its tokens.
        token: `[S]` int32, the last token that there is, at first that of the prompt.
        said: what has been sampled, as far as it may become an end.
        counts: `[S, V]` int32 how often it has sampled each, or None.
        ended: `[S]` bool.
        waiting: `[B]` bool, the sequences that have no slot and have not ended.
        cache: of the policy, a row for each slot.
        drawn: `[B, N]` of all sequences.
        finish: `[B]` int8.
        turns: the state of `Turns`; `()` without turns.
        crowded: bool, whether a sequence has gone back to the queue since the last one ended.
    """

    request: Array
    count: Array
    token: Array
    said: Said
    counts: Array | None
    ended: Array
    waiting: Array
    cache: PyTree
    drawn: Drawn
    finish: Array
    crowded: Array
    turns: PyTree = ()


def decode_all(
    policy: Policy,
    params: Params,
    requests: Requests,
    draw: Draw,
    *,
    max_new_tokens: int,
    slots: int,
    refill: int,
    cache_dtype: Any = None,
    cache_pages: int | None = None,
    turns: Turns | None = None,
) -> tuple[Drawn, Array]:
    """Sample all sequences; `rollout.generate` and `rollout.generate_turns` explain the arguments.

    Returns:
        `Drawn` `[B, N]`, zero behind the end of each sequence, and how each ended, `[B]` int8.
    """
    total, width = requests.count, requests.tokens.shape[1]
    capacity = width + max_new_tokens
    # Then every sequence has a slot from the beginning, and all have equally many tokens.
    at_once = slots == total and cache_pages is None
    limit = jnp.full(total, max_new_tokens, jnp.int32) if requests.limit is None else requests.limit
    # Of a pool that lies on several devices, each slot uses the pages of its own device.
    parts = 1 if cache_pages is None else pool_parts(slots)
    part_of = jnp.arange(slots, dtype=jnp.int32) // (slots // parts)

    def prefilled(tokens: Array, length: Array, cache: PyTree) -> tuple[Array, PyTree]:
        """The prompts' states, and a cache of them without their last tokens: the loop reads these, and goes on."""
        columns = jnp.arange(width, dtype=jnp.int32)
        positions = jnp.where(columns < length[:, None] - 1, columns, -1)
        return policy.prefill(params, without_padding(tokens, length), positions, cache)

    def last_of(request: Array) -> Array:
        row = jnp.minimum(request // requests.group_size, len(requests.tokens) - 1)
        return requests.tokens[row, requests.length[row] - 1].astype(jnp.int32)

    def pages(request: Array, count: Array | int) -> Array:
        """`[R]`, pages that sequences of so many tokens take with the next; of one that does not exist, none."""
        row = jnp.minimum(request, total - 1) // requests.group_size
        return jnp.where(request < total, (requests.length[row] + count - 1) // page_width(capacity) + 1, 0)

    def fit(request: Array, slot: Array, free: Array) -> Array:
        """`[R]`, whether sequences that come into slots have pages, of those that are free in each part."""
        part = part_of.at[slot].get(mode="clip")
        before = jnp.where(part[:, None] == jnp.arange(parts), pages(request, 0)[:, None], 0)
        return jnp.take_along_axis(jnp.cumsum(before, axis=0) <= free, part[:, None], axis=1)[:, 0]

    def begin() -> _Slots:
        """All slots filled with the first sequences of the queue, as far as there are pages for them."""
        first = jnp.arange(slots, dtype=jnp.int32)
        prompts = -(-slots // requests.group_size)
        fits = jnp.ones(slots, bool)
        if policy.insert is None:
            tokens = constrain(jnp.repeat(requests.tokens, requests.group_size, axis=0), ("batch", None))
            cache = policy.init_cache(slots, capacity, cache_dtype)
            states, cache = prefilled(tokens, jnp.repeat(requests.length, requests.group_size), cache)
        else:
            own = policy.init_cache(prompts, width, cache_dtype)
            states, own = prefilled(requests.tokens[:prompts], requests.length[:prompts], own)
            if at_once:
                cache = together(policy, own, slots, requests.group_size, width, max_new_tokens, cache_dtype)
            elif cache_pages is None:
                cache = policy.insert(policy.init_cache(slots, capacity, cache_dtype), own, requests.group_size)
            else:
                fits = fit(first, first, jnp.full(parts, cache_pages // parts))
                cache = policy.init_cache(slots, capacity, cache_dtype, pages=cache_pages)
                cache = policy.insert(cache, own, first // requests.group_size, jnp.where(fits, first, slots))
        size = draw.counted(states.shape[-1])
        counts = None if size is None else jnp.zeros((slots, size), jnp.int32)
        kept = jax.eval_shape(draw, jax.ShapeDtypeStruct((slots, states.shape[-1]), states.dtype), first, first, counts)
        if turns is not None:
            kept = kept._replace(marks=jax.tree.map(lambda kind: jax.ShapeDtypeStruct((slots,), kind), turns.marks))
        return _Slots(
            request=first,
            count=jnp.zeros(slots, jnp.int32),
            token=last_of(first),
            said=nothing_said(draw.sampling, slots),
            counts=counts,
            ended=~fits,
            waiting=jnp.ones(total, bool).at[:slots].set(~fits),
            cache=cache,
            drawn=jax.tree.map(lambda x: jnp.zeros((total, max_new_tokens, *x.shape[1:]), x.dtype), kept),
            finish=jnp.full(total, FINISH_NONE, jnp.int8),
            crowded=jnp.zeros((), bool),
            turns=() if turns is None else turns.begin(first),
        )

    def queue(state: _Slots) -> tuple[Array, Array]:
        """`[refill]` int32: the sequences that come next, `B` for none or one without room, and slots, `S` for none."""
        # A compiler that has split the arrays unevenly would count their padding too.
        waiting, ended = (constrain(x, ("batch",)) for x in (state.waiting, state.ended))
        request = jnp.nonzero(waiting, size=refill, fill_value=total)[0].astype(jnp.int32)
        if cache_pages is None:
            return request, jnp.nonzero(ended, size=refill, fill_value=slots)[0].astype(jnp.int32)
        held = pages(jnp.where(ended, total, state.request), state.count)
        free = cache_pages // parts - jnp.sum(held.reshape(parts, -1), axis=1)
        # The part with most pages comes first, as if each sequence that it has got took as many as any of them.
        each = jnp.max(pages(request, 0))
        earlier = jnp.cumsum(ended.reshape(parts, -1), axis=1) - 1
        left = jnp.where(ended.reshape(parts, -1), free[:, None] - each * earlier, jnp.iinfo(jnp.int32).min)
        order = jnp.argsort(left.reshape(-1), descending=True, stable=True)[:refill].astype(jnp.int32)
        slot = jnp.where(ended[order], order, slots)
        # Nobody comes before the one in front of him.
        comes = jnp.cumsum(~fit(request, slot, free)) == 0
        return jnp.where(comes, request, total), slot

    def admit(state: _Slots) -> _Slots:
        """The next `refill` sequences of the queue in slots that are free."""
        request, rows = queue(state)
        # Each prompt is read once, however many of its group come in. Where sequences have come back there may be more
        # prompts than are read: the others wait.
        first = jnp.minimum(request[0], total - 1) // requests.group_size
        prompts = min(refill, (refill - 2) // requests.group_size + 2)
        source = request // requests.group_size - first
        comes = (request < total) & (source < prompts)
        rows, request = jnp.where(comes, rows, slots), jnp.where(comes, request, total)
        read = jnp.minimum(first + jnp.arange(prompts), len(requests.tokens) - 1)
        cache = policy.init_cache(prompts, width, cache_dtype)
        _, cache = prefilled(requests.tokens[read], requests.length[read], cache)
        source = jnp.clip(source, 0, prompts - 1)
        insert: Callable[..., PyTree] = policy.insert  # type: ignore[assignment]
        drawn = state.drawn
        if cache_pages is not None:  # one that starts over leaves nothing of what it was
            drawn = jax.tree.map(lambda x: x.at[request].set(0, mode="drop"), drawn)

        def put(old: Array, new: Array) -> Array:
            return old.at[rows].set(new, mode="drop")

        return state._replace(
            request=state.request.at[rows].set(request, mode="drop"),
            count=state.count.at[rows].set(0, mode="drop"),
            token=state.token.at[rows].set(last_of(request), mode="drop"),
            said=jax.tree.map(put, state.said, nothing_said(draw.sampling, refill)),
            counts=None if state.counts is None else state.counts.at[rows].set(0, mode="drop"),
            ended=state.ended.at[rows].set(False, mode="drop"),
            waiting=state.waiting.at[request].set(False, mode="drop"),
            cache=insert(release(state.cache, state.ended), cache, source, rows),
            drawn=drawn,
            turns=() if turns is None else jax.tree.map(put, state.turns, turns.begin(request)),
        )

    def relieved(state: _Slots, most: int) -> _Slots:
        """The state with room for the next token in each slot in `most` pages a part: who came last goes back."""
        request = jnp.where(state.ended, total, state.request)
        own = pages(request, state.count)
        # The first of a part has room for itself alone, so that every sequence ends at some time.
        others = (request <= request[:, None]) & (part_of == part_of[:, None])
        needed = jnp.sum(jnp.where(others, own, 0), axis=1)
        leaves = ~state.ended & (needed > most)
        ended = state.ended | leaves
        return state._replace(
            ended=ended,
            waiting=state.waiting.at[jnp.where(leaves, request, total)].set(True, mode="drop"),
            crowded=state.crowded | jnp.any(leaves),
            cache=release(state.cache, ended),
        )

    def advance(state: _Slots) -> _Slots:
        """The state with a new token in each slot; those that are not running stay as they are."""
        if cache_pages is not None:
            state = relieved(state, cache_pages // parts)
        request, count = state.request, state.count
        # The cache's place of a sequence that has ended is marked as padding; its output is not used.
        known = jnp.minimum(request, total - 1)
        length = requests.length[known // requests.group_size]
        position = jnp.where(state.ended, -1, length + count - 1)
        hidden, cache = policy.decode(params, state.token[:, None], position[:, None], state.cache)
        drawn = draw(hidden[:, 0], request, count, state.counts)
        if turns is not None:
            drawn = turns.feed(state.turns, drawn)
        running = ~state.ended & (request < total)
        alive = jnp.where(running, drawn.mask, 0.0)
        token = jnp.where(alive > 0, drawn.token, 0)
        others = jax.tree.map(lambda x: jnp.where(alive[:, None] > 0, x, 0), drawn.others)
        drawn = Drawn(token, alive, *(jnp.where(alive > 0, x, 0.0) for x in drawn[2:5]), others=others)

        def write(buffer: Array, values: Array) -> Array:
            values = values.astype(buffer.dtype)
            if at_once:
                return jax.lax.dynamic_update_slice_in_dim(buffer, values[:, None], jnp.max(count), axis=1)
            return buffer.at[jnp.where(running, request, total), count].set(values, mode="drop")

        said, stopped = listen(draw.sampling, state.said, known, count, token)
        stopped &= alive > 0
        so_far, most = count + 1, limit[known]
        chosen, conversation = alive, ()
        if turns is None:
            full = so_far >= most
            finish = jnp.where(alive == 0, FINISH_ABORT, jnp.where(stopped, FINISH_STOP, FINISH_LENGTH))
            finish = finish.astype(jnp.int8)
            over = running & ((alive == 0) | stopped | full)
        else:
            reply = turns.reply(state.turns, request, token, alive > 0, stopped, most - so_far)
            conversation, drawn = reply.state, drawn._replace(marks=reply.marks)
            chosen, over, finish = reply.sampled, running & reply.over, reply.finish
            said = kept_where(reply.speaking, said, nothing_said(draw.sampling, slots))
        counts = state.counts
        if counts is not None:
            counts = counts.at[jnp.arange(slots), token].add(chosen.astype(counts.dtype))
        if at_once:
            ends = jnp.where(over, finish, state.finish)
        else:
            ends = state.finish.at[jnp.where(over, request, total)].set(finish, mode="drop")
        return state._replace(
            # Of rows that do not run the count goes on where all are written to one column.
            count=count + 1 if at_once else count + running,
            token=token,
            said=said,
            counts=counts,
            ended=~running | over,
            cache=cache,
            drawn=jax.tree.map(write, state.drawn, drawn),
            finish=ends,
            crowded=state.crowded & ~jnp.any(over),
            turns=conversation,
        )

    def is_running(state: _Slots) -> Array:
        """Whether a slot has a sequence, and not so many have none that the next take them."""
        free = jnp.sum(state.ended, dtype=jnp.int32)
        if at_once:
            return free < slots
        wanted = jnp.minimum(refill, jnp.sum(state.waiting, dtype=jnp.int32))
        ready = (wanted > 0) & (free >= wanted)
        if cache_pages is not None:
            # What has gone back would soon do so again: something has to end first.
            ready &= ~state.crowded & (jnp.sum(queue(state)[0] < total) >= wanted)
        return (free < slots) & ~ready

    def refilled(state: _Slots) -> _Slots:
        # A loop in a loop, and not a condition for each token, which would copy the cache whichever way it goes.
        state = jax.lax.while_loop(is_running, advance, state)
        return jax.lax.cond(jnp.any(state.waiting), admit, lambda state: state, state)

    state = begin()
    if at_once:
        state = jax.lax.while_loop(is_running, advance, state)
    else:
        state = jax.lax.while_loop(lambda state: ~jnp.all(state.ended) | jnp.any(state.waiting), refilled, state)
    return state.drawn, state.finish


def default_refill(slots: int) -> int:
    """How many slots must be free before others take them, where nobody says."""
    return max(slots // 8, 1)


def without_padding(tokens: Array, length: Array) -> Array:
    """Prompts `[R, L]` with their first token in the place of padding, whose embedding need not be a number."""
    return jnp.where(jnp.arange(tokens.shape[1]) < length[:, None], tokens, tokens[:, :1])


def together(
    policy: Policy, own: PyTree, slots: int, group_size: int, width: int, max_new_tokens: int, cache_dtype: Any
) -> PyTree:
    """A cache for sequences that begin at the same time, from that of their prompts.

    A group's prompt is kept once, and read once for a token of all its members, where it lies on their devices.

    Args:
        policy: whose caches they are.
        own: of the prompts, prefilled.
        slots: number of sequences.
        group_size: `G`, sequences of a prompt.
        width: `L`, columns of a prompt.
        max_new_tokens: `N`, columns of what follows.
        cache_dtype: of keys and values.
    """
    prompts = -(-slots // group_size)
    aligned = prompts * group_size == slots and spread(("batch",), (prompts,)) == spread(("batch",), (slots,))
    if policy.share is not None and group_size > 1 and aligned:
        return policy.share(policy.init_cache(slots, max_new_tokens, cache_dtype), own)
    cache = policy.init_cache(slots, width + max_new_tokens, cache_dtype)
    return policy.insert(cache, own, group_size)  # type: ignore[misc]
