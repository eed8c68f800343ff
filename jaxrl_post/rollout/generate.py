"""Prefill and decode as one pure function of parameters, prompts and a key.

Scoring texts, filtering and batching prompts are not done here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrl_post import models
from jaxrl_post.mesh import constrain
from jaxrl_post.sampling import SamplingParams, is_truncating, row_keys, sample, transform
from jaxrl_post.sampling.transforms import check
from jaxrl_post.types import FINISH_LENGTH, FINISH_STOP, Array, Params, Policy, Rollouts


class Prompts(NamedTuple):
    """Prompts of one call, padded on the right.

    Attributes:
        tokens: `[P, L]` int32; what stands at or after `length` is ignored.
        length: `[P]` int32, at least 1.
        prompt_id: `[P]` int32, index of the prompt in its data set; `arange(P)` if None.
        id: `[P, G]` uint32, the id of each sequence to be sampled, which with the key determines its random stream;
            `arange(P * G)` if None. Ids must not repeat under one key.
    """

    tokens: Array
    length: Array
    prompt_id: Array | None = None
    id: Array | None = None


PLAIN = SamplingParams()


class _Draw(NamedTuple):
    """What is kept of each sampled token; `[B]` in the loop, `[B, N]` as a buffer."""

    token: Array
    mask: Array
    logp: Array
    sampler_logp: Array
    entropy: Array


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
) -> Rollouts:
    """Sample `group_size` completions of each prompt.

    One prefill, then one decode step per token inside a `lax.while_loop` that ends when every sequence has. Each
    sequence draws from a stream of its own, `fold_in(fold_in(key, id), position)`: the same prompt, id and key give the
    same tokens in any batch, batch size or mesh (to the rounding of the logits: a draw whose two best perturbed logits
    are closer than that may differ).

    `logp` is under the tempered distribution over all tokens, also where top-k, top-p or min-p forbid some of them, and
    is what the losses use as the behaviour policy's log-prob; the log-prob under the truncated distribution is then in
    `extras["sampler_logp"]`. `extras["entropy"]` is the entropy of the tempered distribution, in nats.

    Args:
        policy: the model.
        params: its parameters.
        prompts: `P` prompts of at most `L` tokens.
        key: a typed key (`jax.random.key`) or a raw one.
        sampling: temperature, truncation, stop tokens.
        max_new_tokens: `N`, the largest number of tokens to add to each prompt; static.
        group_size: `G`; static.
        version: recorded in `Rollouts.version` for every sampled token.
        cache_dtype: of the key-value cache; the model's own choice if None.

    Returns:
        `Rollouts` with `T = L + N`, reward 0 and `valid` True. A stop token is the last token of its sequence and
        inside the mask.

    Raises:
        ValueError: for wrong shapes, sizes below 1, or sampling parameters out of range.

    Example:
        >>> policy = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
        >>> prompts = Prompts(jnp.array([[2, 3, 0], [4, 5, 6]]), jnp.array([2, 3]))
        >>> params, key = policy.init(jax.random.key(0)), jax.random.key(1)
        >>> out = generate(policy, params, prompts, key, max_new_tokens=4, group_size=2)
        >>> out.tokens.shape, out.length.tolist()
        ((4, 7), [[6, 6], [7, 7]])
    """
    check(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    if prompts.tokens.ndim != 2 or prompts.length.shape != prompts.tokens.shape[:1]:
        raise ValueError(
            "prompts.tokens must be [P, L] and prompts.length [P], "
            f"got {prompts.tokens.shape} and {prompts.length.shape}"
        )
    _check_lengths(prompts)
    if max_new_tokens < 1 or group_size < 1:
        raise ValueError(f"max_new_tokens and group_size must be at least 1, got {max_new_tokens} and {group_size}")
    num_prompts, prompt_width = prompts.tokens.shape
    batch = num_prompts * group_size
    ids = jnp.arange(batch, dtype=jnp.uint32).reshape(num_prompts, group_size) if prompts.id is None else prompts.id
    if ids.shape != (num_prompts, group_size):
        raise ValueError(f"prompts.id must be [P, G] = [{num_prompts}, {group_size}], got {ids.shape}")
    prompt_id = jnp.arange(num_prompts, dtype=jnp.int32) if prompts.prompt_id is None else prompts.prompt_id
    if prompt_id.shape != (num_prompts,):
        raise ValueError(f"prompts.prompt_id must be [P] = [{num_prompts}], got {prompt_id.shape}")

    prompt = constrain(jnp.repeat(prompts.tokens, group_size, axis=0), ("batch", None))
    length = constrain(jnp.repeat(prompts.length, group_size, axis=0), ("batch",))
    unembedding = policy.unembed(params)
    truncating = is_truncating(sampling)
    stop_tokens = jnp.asarray(sampling.stop_tokens or (-1,), jnp.int32)

    def draw(hidden: Array, count: Array | int, done: Array) -> _Draw:
        logits = models.logits(unembedding, hidden)
        tempered = transform(logits, temperature=sampling.temperature)
        log_probs = jax.nn.log_softmax(tempered, axis=-1)
        allowed = tempered
        if truncating:
            allowed = transform(
                logits,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
        if sampling.greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = sample(row_keys(key, ids.reshape(-1), length + count), allowed)
        chosen = token[:, None]
        logp = jnp.take_along_axis(log_probs, chosen, axis=-1)[:, 0]
        sampler_logp = logp
        if truncating:
            sampler_logp = jnp.take_along_axis(jax.nn.log_softmax(allowed, axis=-1), chosen, axis=-1)[:, 0]
        probs = jnp.exp(log_probs)
        entropy = -jnp.sum(probs * jnp.where(probs > 0, log_probs, 0.0), axis=-1)
        alive = jnp.where(done, 0.0, 1.0)
        return _Draw(jnp.where(done, 0, token), alive, logp * alive, sampler_logp * alive, entropy * alive)

    def ended(drawn: _Draw, done: Array) -> Array:
        return done | jnp.any(drawn.token[:, None] == stop_tokens, axis=-1)

    def write(buffer: Array, column: Array, index: Array | int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None].astype(buffer.dtype), index, axis=1)

    columns = jnp.arange(prompt_width)
    prompt_positions = jnp.where(columns < length[:, None], columns, -1)
    cache = policy.init_cache(batch, prompt_width + max_new_tokens - 1, cache_dtype)
    hidden, cache = policy.prefill(params, prompt, prompt_positions, cache)
    hidden = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    done = jnp.zeros(batch, bool)
    first = draw(hidden, 0, done)
    buffers = jax.tree.map(lambda x: write(jnp.zeros((batch, max_new_tokens), x.dtype), x, 0), first)

    def unfinished(carry) -> Array:
        count, _, done, _, _ = carry
        return (count < max_new_tokens) & ~jnp.all(done)

    def advance(carry):
        count, previous, done, cache, buffers = carry
        # The cache slot of a sequence that has ended is marked as padding; its output is not used.
        position = jnp.where(done, -1, length + count - 1)
        hidden, cache = policy.decode(params, previous[:, None], position[:, None], cache)
        drawn = draw(hidden[:, 0], count, done)
        buffers = jax.tree.map(lambda buffer, x: write(buffer, x, count), buffers, drawn)
        return count + 1, drawn.token, ended(drawn, done), cache, buffers

    carry = (jnp.asarray(1, jnp.int32), first.token, ended(first, done), cache, buffers)
    _, _, done, _, buffers = jax.lax.while_loop(unfinished, advance, carry)

    # Sampled tokens move from behind the padded prompt to directly behind each prompt.
    new_tokens = jnp.sum(buffers.mask, axis=1).astype(jnp.int32)
    total = length + new_tokens
    positions = jnp.broadcast_to(jnp.arange(prompt_width + max_new_tokens), (batch, prompt_width + max_new_tokens))
    in_prompt = positions < length[:, None]
    sampled = ~in_prompt & (positions < total[:, None])
    source = jnp.clip(positions - length[:, None], 0, max_new_tokens - 1)

    def behind_prompt(buffer: Array) -> Array:
        return jnp.where(sampled, jnp.take_along_axis(buffer, source, axis=1), jnp.zeros((), buffer.dtype))

    padded_prompt = jnp.pad(prompt, ((0, 0), (0, max_new_tokens)))
    extras = {"entropy": behind_prompt(buffers.entropy)}
    if truncating:
        extras["sampler_logp"] = behind_prompt(buffers.sampler_logp)
    grouped = (num_prompts, group_size)
    return Rollouts(
        tokens=jnp.where(in_prompt, padded_prompt, behind_prompt(buffers.token)),
        mask=sampled.astype(jnp.float32),
        logp=behind_prompt(buffers.logp),
        step=jnp.where(sampled, 0, -1).astype(jnp.int32),
        version=jnp.where(sampled, version, -1).astype(jnp.int32),
        reward=jnp.zeros(grouped, jnp.float32),
        rewards={},
        valid=jnp.ones(grouped, bool),
        length=total.reshape(grouped),
        finish=jnp.where(done, FINISH_STOP, FINISH_LENGTH).astype(jnp.int8).reshape(grouped),
        id=ids.astype(jnp.uint32),
        prompt_id=prompt_id.astype(jnp.int32),
        extras=extras,
    )


def _check_lengths(prompts: Prompts) -> None:
    """Raise ValueError for a prompt that is empty or longer than its row, where the lengths are known already."""
    length, width = prompts.length, prompts.tokens.shape[1]
    if isinstance(length, Tracer) or not getattr(length, "is_fully_addressable", True):
        return
    length = np.asarray(length)
    wrong = np.flatnonzero((length < 1) | (length > width))
    if wrong.size:
        raise ValueError(
            f"prompts.length must be between 1 and L={width}, got {length[wrong[0]]} for prompt {wrong[0]}; "
            "a prompt needs at least one token, e.g. a beginning-of-sequence token"
        )
