"""The best sequences rather than random ones: found by search over beams, or chosen among those that were sampled.

What scores a sampled sequence is not known here; rewards and advantages of best-of-n are in their own folders.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxrl_post import models
from jaxrl_post.mesh import constrain
from jaxrl_post.rollout.generate import PLAIN, Prompts, assemble, check_requests, refused
from jaxrl_post.rollout.slots import Drawn, Requests, without_padding
from jaxrl_post.sampling.vocabulary import highest
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_STOP, Array, Params, Policy, PyTree, Rollouts

BEAM_SCORE = "beam_score"
"""`[P, K]` float32 or wider of `Rollouts.extras`: what `beam_search` has ranked the sequences by."""

EarlyStopping: TypeAlias = bool | Literal["never"]

NONE = -1e30
"""The score of a sequence that there is not; finite, so that sums and differences of it are."""


class _Beams(NamedTuple):
    """Some sequences of each prompt, `M` of them.

    Attributes:
        token: `[P, M, N]` int32, what follows the prompt.
        logp: `[P, M, N]` float32 or wider, nats.
        score: `[P, M]`, of that dtype: the sum of `logp`, divided by the length's power once the sequence has ended.
        count: `[P, M]` int32, tokens of those that have ended; 0 for the others.
    """

    token: Array
    logp: Array
    score: Array
    count: Array


class _Search(NamedTuple):
    """The loop's state.

    Attributes:
        running: `K` beams that go on, the best first.
        finished: the best `K` that have ended, the best first.
        open: `[P]` bool, whether a running beam may still displace a finished one.
        count: int32, tokens of the running beams.
        cache: of the policy, a row for each running beam.
    """

    running: _Beams
    finished: _Beams
    open: Array
    count: Array
    cache: PyTree


def beam_search(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    *,
    beams: int,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] = (),
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    version: Array | int = 0,
    cache_dtype: jnp.dtype | None = None,
) -> Rollouts:
    r"""The `K` completions of each prompt that a search over beams finds most probable, the best first.

    At every step the `K` running beams of a prompt are continued by every token; of all continuations the best
    `max(2, 1 + E) K` are looked at, where `E` is the number of stop tokens. Those among the first `K` that end are
    kept, ranked by $\sum_t \log p_t / n^{\alpha}$ with their `n` tokens; the best `K` that do not end run on. These are
    the rules and the numbers of `generate(num_beams=K, do_sample=False)` of transformers. Nothing is random.

    The whole search is one `lax.while_loop` on the device. The rows of the cache change places after every step, which
    moves the cache once for each token: the axis of rows is the one along which `policy.init_cache` grows with the
    batch, so that the search runs with any policy that can be decoded.

    Args:
        policy: the model.
        params: its parameters.
        prompts: `P` prompts of at most `L` tokens; `max_new_tokens` of them, if given, must be `[P]`.
        beams: `K`; static. With 1 the search may go on behind a stop token, where greedy decoding ends.
        max_new_tokens: `N`, static.
        stop_tokens: ids that end a sequence; static.
        length_penalty: $\alpha$: 0 ranks by log-prob, 1 by its mean over tokens, more prefers long sequences; static.
        early_stopping: when the search of a prompt ends before `N` tokens. True: with `K` finished sequences. False:
            once the best running beam, at its present length, scores below all of them. "never": once it does at the
            most favourable length. Static.
        version: recorded in `Rollouts.version`.
        cache_dtype: of the key-value cache; the model's own choice if None.

    Returns:
        `Rollouts` `[P, K]` with `T = L + N`, as of `generate`; `extras["beam_score"]` `[P, K]` holds the scores, and
        `logp` the untempered log-probs. A beam that there is not, as there are fewer sequences than beams, and all of a
        prompt whose logits hold NaN, are not `valid` and have `FINISH_ABORT`.

    Raises:
        ValueError: for wrong shapes, sizes below 1, an unknown `early_stopping`, or a vocabulary that is too small.

    Example:
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> prompts = Prompts(jnp.array([[2, 3, 0], [4, 5, 6]]), jnp.array([2, 3]))
        >>> def search(key):
        ...     return beam_search(policy, policy.init(key), prompts, beams=3, max_new_tokens=4, stop_tokens=(1,))
        >>> out = jax.eval_shape(search, jax.random.key(0))
        >>> out.tokens.shape, out.extras["beam_score"].shape
        ((6, 7), (2, 3))

    Reference: Sequence Transduction with Recurrent Neural Networks, arXiv 1211.3711; the length penalty as in Google's
    Neural Machine Translation System, arXiv 1609.08144, without its constants.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping must be True, False or "never", got {early_stopping!r}')
    early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
    if prompts.max_new_tokens is not None and prompts.max_new_tokens.ndim != 1:
        raise ValueError(
            f"prompts.max_new_tokens must be [P], one for all beams of a prompt, got {prompts.max_new_tokens.shape}"
        )
    requests = check_requests(prompts, max_new_tokens, beams)
    stops = jnp.asarray(tuple(int(token) for token in stop_tokens) or (-1,), jnp.int32)
    limit = jnp.full(requests.count, max_new_tokens) if requests.limit is None else requests.limit
    limit = limit[::beams, None]
    unembedding = policy.unembed(params)
    num_prompts, width = requests.tokens.shape
    rows = num_prompts * beams
    states, cache = _prefilled(policy, params, requests, width + max_new_tokens, cache_dtype)
    wide = jax.eval_shape(lambda: models.logits(unembedding, states)).dtype
    axes = _row_axes(policy, rows, width + max_new_tokens, cache_dtype)
    last = jnp.take_along_axis(requests.tokens, requests.length[:, None] - 1, axis=1).astype(jnp.int32)

    def is_running(state: _Search) -> Array:
        going = state.open
        if early_stopping is True:
            going &= ~jnp.all(state.finished.count > 0, axis=-1)
        return (state.count < max_new_tokens) & jnp.any(going)

    def step(state: _Search) -> _Search:
        running, count = state.running, state.count
        before = jax.lax.dynamic_index_in_dim(running.token, jnp.maximum(count - 1, 0), axis=2, keepdims=False)
        token = jnp.where(count == 0, last, before).reshape(-1, 1)
        position = jnp.repeat(requests.length, beams)[:, None] + count - 1
        hidden, cache = policy.decode(params, token, position, state.cache)
        logits = models.logits(unembedding, hidden[:, 0])
        looked_at = max(2, 1 + len(stop_tokens)) * beams
        continued, parent = _continue(running, jax.nn.log_softmax(logits, axis=-1), count, looked_at)

        new = jax.lax.dynamic_index_in_dim(continued.token, count, axis=2, keepdims=False)
        ends = jnp.any(new[..., None] == stops, axis=-1) | (count + 1 >= limit)
        score = continued.score / jnp.asarray(count + 1, wide) ** length_penalty
        admitted = ends & (jnp.arange(looked_at) < beams) & state.open[:, None]
        if early_stopping is True:
            admitted &= ~jnp.all(state.finished.count > 0, axis=-1, keepdims=True)
        ended = continued._replace(
            # Not a number is passed on, so that it is seen at the end.
            score=jnp.where(admitted | jnp.isnan(score), score, NONE),
            count=jnp.where(admitted, count + 1, 0),
        )
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, ended)
        finished, _ = _best(both, beams)
        running, chosen = _best(continued._replace(score=continued.score + jnp.where(ends, NONE, 0.0)), beams)
        source = jnp.take_along_axis(parent, chosen, axis=1)

        farthest = limit if early_stopping == "never" and length_penalty > 0 else count + 1
        possible = running.score[:, :1] / jnp.asarray(farthest, wide) ** length_penalty
        worst = jnp.where(finished.count > 0, finished.score[:, -1:], NONE)
        may_improve = jnp.any(possible > worst, axis=-1)
        return _Search(running, finished, state.open & may_improve, count + 1, _reordered(cache, source, axes))

    empty = jnp.zeros((num_prompts, beams, max_new_tokens), wide)
    nothing = jnp.zeros((num_prompts, beams), jnp.int32)
    none = jnp.full((num_prompts, beams), NONE, wide)
    # All beams are the prompt itself at first, and one of them is enough.
    start = _Beams(empty.astype(jnp.int32), empty, none.at[:, 0].set(0.0), nothing)
    state = _Search(start, start._replace(score=none), jnp.ones(num_prompts, bool), jnp.zeros((), jnp.int32), cache)
    found = jax.lax.while_loop(is_running, step, state).finished
    return _rollouts(requests, found, stops, version, prompts.prompt_id, length_penalty)


def _prefilled(policy: Policy, params: Params, requests: Requests, capacity: int, dtype: Any) -> tuple[Array, PyTree]:
    """States of prompts, and a cache with `K` rows of each without its last token, which the search reads."""

    def read(tokens: Array, length: Array, cache: PyTree) -> tuple[Array, PyTree]:
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.where(columns < length[:, None] - 1, columns, -1)
        return policy.prefill(params, without_padding(tokens, length), positions, cache)

    cache, beams = policy.init_cache(requests.count, capacity, dtype), requests.group_size
    if policy.insert is None:
        tokens = constrain(jnp.repeat(requests.tokens, beams, axis=0), ("batch", None))
        return read(tokens, jnp.repeat(requests.length, beams), cache)
    own = policy.init_cache(len(requests.tokens), requests.tokens.shape[1], dtype)
    states, own = read(requests.tokens, requests.length, own)
    return states, policy.insert(cache, own, beams)


def _row_axes(policy: Policy, rows: int, capacity: int, dtype: Any) -> PyTree:
    """Of each array of a cache the axis of rows, -1 where it has none: the one that grows with the batch."""
    one, more = (jax.eval_shape(lambda n=n: policy.init_cache(n, capacity, dtype)) for n in (rows, rows + 1))

    def axis(a: Any, b: Any) -> int:
        grown = [i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if y == x + 1]
        return grown[0] if grown else -1

    return jax.tree.map(axis, one, more)


def _reordered(cache: PyTree, source: Array, axes: PyTree) -> PyTree:
    """The cache whose row `(p, k)` is what row `(p, source[p, k])` was; `source` is `[P, K]`."""

    def moved(x: Array, axis: int) -> Array:
        if axis < 0:
            return x
        grouped = x.reshape(*x.shape[:axis], *source.shape, *x.shape[axis + 1 :])
        # Within each prompt, so that prompts on several devices stay where they are.
        taken = jax.vmap(lambda rows, k: jnp.take(rows, k, axis=axis), in_axes=(axis, 0), out_axes=axis)
        return taken(grouped, source).reshape(x.shape)

    return jax.tree.map(moved, cache, axes)


def _continue(running: _Beams, log_probs: Array, count: Array, number: int) -> tuple[_Beams, Array]:
    """The best continuations of a prompt's beams by a token, and the beam `[P, number]` of each.

    Args:
        running: `K` beams.
        log_probs: `[P * K, V]`.
        count: how many tokens the beams have.
        number: of continuations.
    """
    prompts, beams, size = *running.score.shape, log_probs.shape[-1]
    if number > beams * size:
        raise ValueError(
            f"{number} continuations of {beams} beams need a vocabulary of {-(-number // beams)}, got {size}; "
            "give fewer stop tokens"
        )
    # Of each beam first, then of all: the vocabulary may lie on several devices.
    each = highest(running.score.reshape(-1, 1) + log_probs, min(number, size))
    logp = jnp.take_along_axis(log_probs, each[1], axis=1)
    score, token, logp = (x.reshape(prompts, -1) for x in (*each, logp))
    score, place = jax.lax.top_k(score, number)
    parent = place // each[0].shape[1]
    token, logp = (jnp.take_along_axis(x, place, axis=1) for x in (token, logp))

    def added(buffer: Array, value: Array) -> Array:
        kept = jnp.take_along_axis(buffer, parent[..., None], axis=1)
        return jax.lax.dynamic_update_index_in_dim(kept, value, count, axis=2)

    return _Beams(added(running.token, token), added(running.logp, logp), score, jnp.zeros_like(token)), parent


def _best(beams: _Beams, number: int) -> tuple[_Beams, Array]:
    """Those of the highest scores, the best first, and where `[P, number]` they stood."""
    chosen = jax.lax.top_k(beams.score, number)[1]

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, beams), chosen


def _rollouts(
    requests: Requests,
    found: _Beams,
    stops: Array,
    version: Array | int,
    prompt_id: Array | None,
    length_penalty: float,
) -> Rollouts:
    count = found.count.reshape(-1)
    there = jnp.arange(found.token.shape[-1]) < count[:, None]
    token, logp = (jnp.where(there, x.reshape(there.shape), 0) for x in (found.token, found.logp))
    final = jnp.take_along_axis(token, jnp.maximum(count - 1, 0)[:, None], axis=1)
    ended = jnp.where(jnp.any(final == stops, axis=-1), FINISH_STOP, FINISH_LENGTH)
    # A beam that never was has a log-prob near that of none.
    total = found.score.reshape(-1) * jnp.maximum(count, 1) ** length_penalty
    sound = (count > 0) & (total > NONE / 1e3)
    finish = jnp.where(sound, ended, FINISH_ABORT).astype(jnp.int8)
    drawn = Drawn(token, there.astype(jnp.float32), logp, logp, jnp.zeros_like(logp))
    drawn, finish = refused(requests, drawn, finish)
    out = assemble(requests, drawn, finish, sampling=PLAIN, version=version, prompt_id=prompt_id)
    return out.replace(extras={BEAM_SCORE: found.score})


def best_of_n(rollouts: Rollouts, scores: Array, n: int = 1) -> Rollouts:
    """The best `n` members of each group by their scores, the best first.

    What the best of `n` samples is worth in expectation needs no choice: `training.evaluate.pass_at_k` estimates it
    from the correct ones among all `G`, without bias.

    Args:
        rollouts: `P` groups of `G`. Arrays of `extras` and `rewards` that are `[P, G, ...]` or have a row for each of
            the `B` sequences go with the members; others, e.g. `[P]`, stay.
        scores: `[P, G]`, the higher the better. Of equal ones the first is taken; those of members that are not
            `valid`, and NaN, rank behind all others.
        n: how many are kept, static.

    Returns:
        `Rollouts` `[P, n]`. A group with fewer than `n` valid members is filled with others, which stay not valid.

    Raises:
        ValueError: if `scores` is not `[P, G]` or `n` not between 1 and `G`.

    Example:
        >>> from jaxrl_post.data import to_rollouts
        >>> group = to_rollouts([[2]], [[[3], [4], [5]]], length=2)
        >>> best_of_n(group, jnp.array([[0.0, 2.0, 1.0]]), n=2).tokens.tolist()
        [[2, 4], [2, 5]]

    Reference: WebGPT, arXiv 2112.09332 (best-of-n, there rejection sampling).
    """
    prompts, size = shape = rollouts.reward.shape
    if scores.shape != shape:
        raise ValueError(f"scores must be [P, G] = {list(shape)}, got shape {scores.shape}")
    if not 1 <= n <= size:
        raise ValueError(f"n must be between 1 and the group size {size}, got {n}")
    usable = rollouts.valid & ~jnp.isnan(scores)
    # The negative of an integer may be none of its type; its complement orders them the other way round too.
    falling = -scores if jnp.issubdtype(scores.dtype, jnp.inexact) else ~scores
    order = jnp.lexsort((jnp.where(usable, falling, 0), ~usable), axis=-1)[:, :n]

    def members(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    def rows(x: Array) -> Array:
        return members(x.reshape(prompts, size, *x.shape[1:])).reshape(prompts * n, *x.shape[1:])

    def either(x: Array) -> Array:
        if x.shape[:2] == shape:
            return members(x)
        return rows(x) if x.ndim and x.shape[0] == prompts * size else x

    by_member = {name: members(getattr(rollouts, name)) for name in ("reward", "valid", "length", "finish", "id")}
    each_token = ("tokens", "mask", "logp", "step", "version")
    by_token = {name: jax.tree.map(rows, getattr(rollouts, name)) for name in each_token}
    more = {name: jax.tree.map(either, getattr(rollouts, name)) for name in ("rewards", "extras")}
    return rollouts.replace(**by_member, **by_token, **more)
