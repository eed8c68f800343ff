"""From the state of a sequence to its next token, with the statistics that are recorded of it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_post import models
from jaxrl_post.rollout.slots import Drawn, Requests
from jaxrl_post.sampling import (
    SamplingParams,
    SamplingState,
    alternatives,
    is_truncating,
    needs_state,
    row_keys,
    sample,
    token_statistics,
    transform,
)
from jaxrl_post.types import Array, Unembedding

PER_SEQUENCE = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "greedy",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
)
"""The fields of `SamplingParams` that sequences may have of their own."""


def flat_params(sampling: SamplingParams, num_prompts: int, group_size: int) -> SamplingParams:
    """`sampling` with `[B]` in the place of every `[P]` or `[P, G]`.

    Raises:
        ValueError: for an array of another shape.

    Example:
        >>> flat_params(SamplingParams(temperature=jnp.array([1.0, 2.0])), 2, 2).temperature.tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    grouped = (num_prompts, group_size)

    def flat(name: str) -> Array | float:
        value = getattr(sampling, name)
        if not getattr(value, "ndim", 0):
            return value
        if value.shape not in (grouped[:1], grouped):
            raise ValueError(
                f"sampling.{name} must be a number, [P] = [{num_prompts}] or [P, G] = {list(grouped)}, "
                f"got shape {value.shape}"
            )
        return jnp.broadcast_to(value if value.ndim == 2 else value[:, None], grouped).reshape(-1)

    return sampling._replace(**{name: flat(name) for name in PER_SEQUENCE})


class Drawer(NamedTuple):
    """Draws tokens of given sequences.

    Attributes:
        unembedding: the policy's.
        sampling: with numbers or `[B]`.
        key: of all random streams.
        requests: the sequences.
        alternatives: how many of the most probable tokens are recorded beside the one that is drawn.
    """

    unembedding: Unembedding
    sampling: SamplingParams
    key: Array
    requests: Requests
    alternatives: int = 0

    @property
    def vocab_size(self) -> int | None:
        """Size of the counts that the options need of each sequence; None if they need none."""
        if not needs_state(self.sampling):
            return None
        weight, _, bias = self.unembedding
        table = bias if weight is None else weight
        if table is None:
            raise ValueError("penalties and min_tokens need a policy that says how large its vocabulary is")
        return table.shape[0]

    def __call__(self, hidden: Array, request: Array, count: Array, counts: Array | None) -> Drawn:
        """The next token of each of `R` sequences.

        Args:
            hidden: `[R, D]`, the states that precede the tokens.
            request: `[R]` int32, which sequence a row is; one that does not exist may be drawn too.
            count: `[R]` int32, tokens behind its prompt.
            counts: `[R, V]`, how often it has sampled each, if `vocab_size` says that this is needed.
        """
        request = jnp.minimum(request, self.requests.count - 1)
        own = {
            name: value[request] if getattr(value, "ndim", 0) else value
            for name in PER_SEQUENCE
            for value in (getattr(self.sampling, name),)
        }
        greedy = own.pop("greedy")
        logits = models.logits(self.unembedding, hidden)
        tempered = transform(logits, temperature=own["temperature"])
        changed = is_truncating(self.sampling)
        allowed = tempered
        if changed:
            state = None if counts is None else SamplingState(counts, self._in_prompt(request, counts), count)
            bans = {name: getattr(self.sampling, name) for name in ("stop_tokens", "logit_bias", "allowed")}
            allowed = transform(logits, state, **own, **bans)
        start = self.requests.length[request // self.requests.group_size]
        token = None
        if greedy is not True:
            token = sample(row_keys(self.key, self.requests.id[request], start + count), allowed)
        if greedy is not False:
            best = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
            token = best if token is None else jnp.where(greedy, best, token)
        logp, entropy = token_statistics(tempered, token)  # type: ignore[arg-type]
        sampler_logp = token_statistics(allowed, token)[0] if changed else logp  # type: ignore[arg-type]
        # A NaN anywhere is in the sum; without a token that may be drawn the highest logit is -inf.
        sound = ~jnp.isnan(entropy) & jnp.isfinite(sampler_logp)
        others = alternatives(tempered, self.alternatives) if self.alternatives else ()
        return Drawn(token, sound.astype(jnp.float32), logp, sampler_logp, entropy, others=others)  # type: ignore[arg-type]

    def _in_prompt(self, request: Array, counts: Array) -> Array:
        """`[R, V]` bool: the tokens of the prompts."""
        row = request // self.requests.group_size
        tokens, length = self.requests.tokens[row], self.requests.length[row]
        inside = jnp.arange(tokens.shape[1]) < length[:, None]
        size = counts.shape[-1]
        rows = jnp.arange(len(tokens))[:, None]
        return jnp.zeros(counts.shape, bool).at[rows, jnp.where(inside, tokens, size)].set(True, mode="drop")
