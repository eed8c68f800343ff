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
from jaxrl_post.sampling.transforms import NUMBERS, OVER_VOCABULARY
from jaxrl_post.types import Array, Unembedding

PER_SEQUENCE = {**dict.fromkeys(NUMBERS, 0), **dict.fromkeys(("stop_tokens", *OVER_VOCABULARY), 1)}
"""The fields of `SamplingParams` that sequences may have of their own, and the axes of one that all share."""


def own_of_sequences(sampling: SamplingParams) -> tuple[str, ...]:
    """Names of what each sequence has of its own.

    Example:
        >>> own_of_sequences(SamplingParams(temperature=jnp.ones(2), allowed=jnp.ones(8, bool)))
        ('temperature',)
    """
    return tuple(name for name, shared in PER_SEQUENCE.items() if getattr(getattr(sampling, name), "ndim", 0) > shared)


def flat_params(sampling: SamplingParams, num_prompts: int, group_size: int) -> SamplingParams:
    """`sampling` with `[B, ...]` in the place of every `[P, ...]` or `[P, G, ...]`.

    Raises:
        ValueError: for an array of another shape.

    Example:
        >>> flat_params(SamplingParams(temperature=jnp.array([1.0, 2.0])), 2, 2).temperature.tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    grouped = (num_prompts, group_size)

    def flat(name: str) -> Array:
        value = getattr(sampling, name)
        rows = value.ndim - PER_SEQUENCE[name]
        rest = value.shape[rows:]
        if value.shape[:rows] not in (grouped[:1], grouped):
            axis = "K" if name == "stop_tokens" else "V"
            one, tail = (f"[{axis}]", f", {axis}") if rest else ("a number", "")
            raise ValueError(
                f"sampling.{name} must be {one}, [P{tail}] with P = {num_prompts}, or [P, G{tail}] with P, G = "
                f"{num_prompts}, {group_size}; got shape {value.shape}"
            )
        each = value if rows == 2 else value[:, None]
        return jnp.broadcast_to(each, (*grouped, *rest)).reshape(-1, *rest)

    return sampling._replace(**{name: flat(name) for name in own_of_sequences(sampling)})


class Drawer(NamedTuple):
    """Draws tokens of given sequences.

    Attributes:
        unembedding: the policy's.
        sampling: as `flat_params` has it.
        key: of all random streams.
        requests: the sequences.
        alternatives: how many of the most probable tokens are recorded beside the one that is drawn.
    """

    unembedding: Unembedding
    sampling: SamplingParams
    key: Array
    requests: Requests
    alternatives: int = 0

    def counted(self, width: int) -> int | None:
        """`V` where the options need the counts of each sequence, None if they need none; `width` is `D`."""
        if not needs_state(self.sampling):
            return None
        weight = self.unembedding.weight
        return width if weight is None else weight.shape[0]

    def __call__(self, hidden: Array, request: Array, count: Array, counts: Array | None) -> Drawn:
        """The next token of each of `R` sequences.

        Args:
            hidden: `[R, D]`, the states that precede the tokens.
            request: `[R]` int32, which sequence a row is; one that does not exist may be drawn too.
            count: `[R]` int32, tokens behind its prompt.
            counts: `[R, V]`, how often it has sampled each, if `counted` says that this is needed.
        """
        request = jnp.minimum(request, self.requests.count - 1)
        own = {name: getattr(self.sampling, name) for name in PER_SEQUENCE}
        own |= {name: own[name][request] for name in own_of_sequences(self.sampling)}
        greedy = own.pop("greedy")
        logits = models.logits(self.unembedding, hidden)
        tempered = transform(logits, temperature=own["temperature"])
        changed = is_truncating(self.sampling)
        allowed = tempered
        if changed:
            state = None if counts is None else SamplingState(counts, self._in_prompt(request, counts), count)
            allowed = transform(logits, state, **own)
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
