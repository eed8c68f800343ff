"""Sequences that are sampled in several calls: a budget of tokens, a new version of the policy, then the next tokens.

What a call samples is `generate`'s; here is what is handed from one call to the next, and how it is put together.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrl_post.rollout.drawing import flat_params
from jaxrl_post.rollout.endings import completes
from jaxrl_post.rollout.generate import PLAIN, Prompts, generate
from jaxrl_post.sampling import SamplingParams
from jaxrl_post.sampling.transforms import is_off
from jaxrl_post.types import FINISH_ABORT, FINISH_LENGTH, FINISH_NONE, FINISH_STOP, Array, Params, Policy, Rollouts


def begin(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    key: Array,
    *,
    sampling: SamplingParams = PLAIN,
    max_new_tokens: int,
    total: int,
    group_size: int = 1,
    version: Array | int = 0,
    cache_dtype: jnp.dtype | None = None,
) -> Rollouts:
    """The first tokens of each completion, in rows with room for all of it: what `resume` goes on with.

    Args:
        policy: the model.
        params: its parameters.
        prompts: `P` prompts of at most `L` tokens. Their `max_new_tokens` are what each may have in all calls together,
            to be given to `resume` as `total` too.
        key: of the random streams; `resume` needs the same.
        sampling: see `generate`.
        max_new_tokens: the most tokens of this call; static.
        total: `N`, the most tokens of a completion in all calls together; static.
        group_size: `G`; static.
        version: recorded for every sampled token.
        cache_dtype: see `generate`.

    Returns:
        `Rollouts` with `T = L + N`. A sequence that this call's budget has cut is still running: `FINISH_NONE`.

    Raises:
        ValueError: as `generate`, or if `max_new_tokens` or a prompt's own limit is more than `total`.

    Example:
        >>> import functools, jax
        >>> from jaxrl_post import models
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> prompts = Prompts(jnp.array([[2, 3, 0], [4, 5, 6]]), jnp.array([2, 3]))
        >>> params, key = jax.eval_shape(policy.init, jax.random.key(0)), jax.random.key(1)
        >>> sample = functools.partial(begin, policy, max_new_tokens=1, total=4)
        >>> jax.eval_shape(sample, params, prompts, key).tokens.shape
        (2, 7)
    """
    if max_new_tokens > total:
        raise ValueError(
            f"max_new_tokens, of this call, must be at most total, of all calls, got {max_new_tokens} and {total}"
        )
    limit: Array | int = total
    own = prompts.max_new_tokens
    if own is not None:
        if not isinstance(own, Tracer) and np.any(np.asarray(own) > total):
            raise ValueError(
                f"prompts.max_new_tokens must be at most total={total}, got {int(np.max(own))}; raise total"
            )
        limit = own if own.ndim == 2 else own[:, None]
        prompts = prompts._replace(max_new_tokens=jnp.minimum(own, max_new_tokens))
    first = generate(
        policy,
        params,
        prompts,
        key,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        group_size=group_size,
        version=version,
        cache_dtype=cache_dtype,
    )
    sampled = jnp.sum(first.mask > 0, axis=1, dtype=jnp.int32).reshape(first.length.shape)
    cut = (first.finish == FINISH_LENGTH) & (sampled < limit)

    def widened(x: Array, fill: int = 0) -> Array:
        return jnp.pad(x, ((0, 0), (0, total - max_new_tokens)), constant_values=fill)

    return first.replace(
        tokens=widened(first.tokens),
        mask=widened(first.mask),
        logp=widened(first.logp),
        step=widened(first.step, -1),
        version=widened(first.version, -1),
        extras={name: widened(x) for name, x in first.extras.items()},
        finish=jnp.where(cut, FINISH_NONE, first.finish).astype(jnp.int8),
    )


def resume(
    policy: Policy,
    params: Params,
    rollouts: Rollouts,
    key: Array,
    *,
    sampling: SamplingParams = PLAIN,
    max_new_tokens: int,
    total: Array | int | None = None,
    step: Array | int | None = None,
    version: Array | int = 0,
    cache_dtype: jnp.dtype | None = None,
) -> Rollouts:
    """The next tokens of the sequences that are still running: partial rollouts.

    Sequences whose `finish` is `FINISH_NONE` go on, from behind their last token; the others stay as they are, to the
    bit. A sequence that the budget cuts again stays `FINISH_NONE`, so that the next call goes on with it. Under the
    same parameters and key, pieces of any size make the sequence that one `generate` makes, since its random stream
    depends on its id and the position only; what ends a sequence holds across the cuts too. Every call reads the whole
    transcript again, with the parameters of now.

    Args:
        policy: the model.
        params: its parameters, which may be newer than those that sampled what there is.
        rollouts: `[P, G]` with rows of `T` places, as `begin`, `resume` or an environment leaves them.
        key: of the random streams, that of the first call.
        sampling: see `generate`; arrays are of `[P]` or `[P, G]`.
        max_new_tokens: the most tokens that a sequence gets from this call; static. The loop ends with the last
            sequence that runs.
        total: the most tokens that are sampled of a sequence in all calls together, a number, `[P]` or `[P, G]`; None:
            as many as its row holds.
        step: turn that is recorded for the new tokens; None: that of the sequence's last. No stop sequence or string
            reaches from one step into the next.
        version: recorded for the new tokens; the others keep theirs, with their `logp` and entropy.
        cache_dtype: see `generate`.

    Returns:
        `Rollouts` of the same shapes, `extras["sampler_logp"]` among them where `sampling` truncates. A sequence that
        has `total` tokens or fills its row ends with `FINISH_LENGTH`. Rewards and other extras stay.

    Raises:
        ValueError: as `generate`; if `total` has another shape; if `presence_penalty` or `frequency_penalty` is on, or
            an array, of which that is not known: they count the tokens of the call, not all of the completion's.

    Example:
        >>> import functools, jax
        >>> from jaxrl_post import data, models
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> params, key = jax.jit(policy.init)(jax.random.key(0)), jax.random.key(1)
        >>> more = jax.jit(functools.partial(resume, policy, max_new_tokens=2, total=4))
        >>> out = more(params, data.to_rollouts([[2, 3], [4]], [[[5]], [[6]]], length=6), key, version=1)
        >>> out.length.tolist(), out.version[0].tolist(), out.finish.tolist()
        ([[5], [4]], [-1, -1, -1, 1, 1, -1], [[0], [0]])
        >>> out = more(params, out, key, version=2)
        >>> out.length.tolist(), out.version[0].tolist(), out.finish.tolist()
        ([[6], [5]], [-1, -1, -1, 1, 1, 2], [[2], [2]])

    Reference: Kimi k1.5: Scaling Reinforcement Learning with LLMs (arXiv 2501.12599), partial rollouts.
    """
    for name in ("presence_penalty", "frequency_penalty"):
        if not is_off(name, getattr(sampling, name)):
            raise ValueError(
                f"{name} counts the tokens that one call samples, and would forget those before the cut; turn it off, "
                "use repetition_penalty, which looks at the whole transcript, or sample the sequences in one generate"
            )
    grouped, width = rollouts.length.shape, rollouts.mask.shape[1]
    length = rollouts.length.reshape(-1)
    sampled = jnp.sum(rollouts.mask > 0, axis=1, dtype=jnp.int32)
    room = width - length
    if total is not None:
        room = jnp.minimum(room, _per_sequence("total", total, grouped) - sampled)
    running = (rollouts.finish.reshape(-1) == FINISH_NONE) & (room > 0)
    sampling = flat_params(sampling, *grouped)
    if not is_off("min_tokens", sampling.min_tokens):
        sampling = sampling._replace(min_tokens=jnp.maximum(sampling.min_tokens - sampled, 0))
    new = generate(
        policy,
        params,
        Prompts(
            tokens=rollouts.tokens,
            length=length,
            id=rollouts.id.reshape(-1, 1),
            # A row that does not run has its one token thrown away.
            max_new_tokens=jnp.where(running, jnp.clip(room, 1, max_new_tokens), 1),
        ),
        key,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        version=version,
        cache_dtype=cache_dtype,
    )
    fresh = running[:, None] & (new.mask[:, :width] > 0)
    last_step = jnp.maximum(jnp.max(rollouts.step, axis=1, keepdims=True), 0)
    now = jnp.broadcast_to(jnp.asarray(last_step if step is None else step, jnp.int32), fresh.shape)
    budget_spent = (new.finish.reshape(-1) == FINISH_LENGTH) & (jnp.sum(fresh, axis=1) < room)
    finish = jnp.where(budget_spent, FINISH_NONE, new.finish.reshape(-1))
    if max(map(len, sampling.stop_sequences), default=0) > 1 or sampling.stop_strings is not None:
        # `generate` has not seen what begins before the cut; what it sampled behind such an end is dropped.
        spoken = jnp.where(fresh, new.tokens[:, :width], jnp.where(rollouts.mask > 0, rollouts.tokens, -1))
        ends = fresh & completes(sampling, spoken, jnp.where(fresh, now, rollouts.step))
        ends &= jnp.cumsum(fresh, axis=1) > jnp.reshape(sampling.min_tokens, (-1, 1))
        fresh &= jnp.cumsum(ends, axis=1) - ends == 0
        finish = jnp.where(jnp.any(ends, axis=1), FINISH_STOP, finish)
    finish = jnp.where(running, finish, FINISH_LENGTH).astype(jnp.int8).reshape(grouped)
    return _joined(rollouts, new, fresh, now, finish)


def _joined(rollouts: Rollouts, new: Rollouts, fresh: Array, now: Array, finish: Array) -> Rollouts:
    """`rollouts` with the new tokens behind the old ones.

    Args:
        rollouts: with rows of `T` places.
        new: what `generate` made of them, with rows of at least `T`.
        fresh: `[B, T]` bool, the new tokens.
        now: `[B, T]` int32, their step.
        finish: `[P, G]` int8, for the sequences that were still running.
    """

    def joined(before: Array, after: Array) -> Array:
        return jnp.where(fresh, after[:, : fresh.shape[1]], before).astype(before.dtype)

    extras = dict(rollouts.extras)
    if "sampler_logp" in extras or "sampler_logp" in new.extras:
        # Where nothing was truncated, both log-probs are the same.
        before = extras.get("sampler_logp", rollouts.logp)
        extras["sampler_logp"] = joined(before, new.extras.get("sampler_logp", new.logp))
    if "entropy" in extras:
        extras["entropy"] = joined(extras["entropy"], new.extras["entropy"])
    unfinished = rollouts.finish == FINISH_NONE
    return rollouts.replace(
        tokens=joined(rollouts.tokens, new.tokens),
        mask=joined(rollouts.mask, new.mask),
        logp=joined(rollouts.logp, new.logp),
        step=joined(rollouts.step, now),
        version=joined(rollouts.version, new.version),
        valid=rollouts.valid & ~(unfinished & (finish == FINISH_ABORT)),
        length=rollouts.length + jnp.sum(fresh, axis=1, dtype=jnp.int32).reshape(finish.shape),
        finish=jnp.where(unfinished, finish, rollouts.finish).astype(jnp.int8),
        extras=extras,
    )


def _per_sequence(name: str, value: Array | int, grouped: tuple[int, ...]) -> Array:
    """`[B]` of a number, `[P]` or `[P, G]`."""
    value = jnp.asarray(value, jnp.int32)
    if value.shape not in ((), grouped[:1], grouped):
        raise ValueError(
            f"{name} must be a number, [P] = [{grouped[0]}] or [P, G] = {list(grouped)}, got shape {value.shape}"
        )
    return jnp.broadcast_to(value[:, None] if value.ndim == 1 else value, grouped).reshape(-1)
