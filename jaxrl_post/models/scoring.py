"""From a model's states to what it says about given tokens: the only place that shifts by one."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob.reference import TokenLogprob, stats_of_logits, temper
from jaxrl_post.types import Array, Params, Policy, Rollouts, Score, TokenStats, Unembedding

VOCABULARY_FIELDS = frozenset({"logp", "entropy", "mean_logp", "sum_p_squared", "max_prob"})
"""Fields that come from the distribution over tokens; all others come from the policy's heads."""


def logits(unembedding: Unembedding, hidden: Array) -> Array:
    """`softcap(hidden W^T + bias)` in float32 or wider, at temperature 1.

    Args:
        unembedding: the model's last map; with `weight` None, `hidden` holds the logits already.
        hidden: `[..., D]`, or `[..., V]` if `weight` is None.

    Returns:
        `[..., V]`.

    Example:
        >>> logits(Unembedding(jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])), jnp.array([3.0, 1.0])).tolist()
        [3.0, 2.0, 4.0]
    """
    weight = unembedding.weight
    if weight is not None:
        wide = jnp.promote_types(jnp.promote_types(hidden.dtype, weight.dtype), jnp.float32)
        hidden = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=wide)
    return temper(hidden, unembedding.bias, 1.0, unembedding.softcap)


def score(policy: Policy, *, temperature: Array | float = 1.0, max_chosen: int | None = None) -> Score:
    """What a language model says about the tokens of rollouts.

    `logp[b, t] = log p(tokens[b, t] | tokens[b, :t])`, and every other field speaks of the same distribution or, for
    `value`, of the same moment: it comes from the state after `tokens[b, t-1]`, before token `t` is chosen.

    Positions are `0, 1, 2, ...` in every row. Rows are padded on the right, which a causal model cannot see.

    Args:
        policy: a causal language model.
        temperature: logits are divided by it; the one that the rollouts were sampled with, so that log-probs agree.
        max_chosen: static bound on how many tokens of a row the policy chose (`rollouts.mask`). If given, only those
            are scored: prompts cost no logits, and the fields of the distribution are 0 at tokens that were not chosen.
            In a row with more chosen tokens than that, the surplus ones come out as NaN.

    Returns:
        A `Score`: `(params, rollouts, fields, key) -> TokenStats`. Fields are `logp`, `entropy`, `mean_logp`,
        `sum_p_squared`, `max_prob` and those fields of `TokenStats` that the policy's `heads` gives. Each is `[B, T]`
        float32 or wider, and 0 at position 0 and beyond the length of the row.

    Raises:
        ValueError: from the score, if a field is unknown or the policy has no such head, or tokens are not `[B, T]`.

    Example:
        >>> import jax
        >>> from jaxrl_post.models import decoder
        >>> policy = decoder(vocab_size=7, width=8, layers=1, heads=2)
        >>> row = jnp.zeros((1, 1))
        >>> rollouts = Rollouts(
        ...     tokens=jnp.array([[1, 2, 3]]), mask=jnp.array([[0.0, 1.0, 1.0]]), logp=jnp.zeros((1, 3)),
        ...     step=jnp.full((1, 3), -1), version=jnp.full((1, 3), -1), reward=row, rewards={}, valid=row == 0,
        ...     length=jnp.array([[3]]), finish=row, id=row, prompt_id=jnp.array([0]),
        ... )
        >>> stats = score(policy)(policy.init(jax.random.key(0)), rollouts, frozenset({"logp"}), jax.random.key(1))
        >>> stats.logp.shape, float(stats.logp[0, 0])
        ((1, 3), 0.0)
    """

    def run(params: Params, rollouts: Rollouts, fields: frozenset[str], key: Array) -> TokenStats:
        tokens = rollouts.tokens
        if getattr(tokens, "ndim", None) != 2:
            raise ValueError(
                f"rollouts.tokens must be an array [B, T] for a language model, got {type(tokens).__name__}"
            )
        batch, length = tokens.shape
        inside = jnp.arange(length) < rollouts.length.reshape(batch, 1)
        # Padding may hold any value, also one that is no row of the embedding.
        tokens = jnp.where(inside, tokens, 0)
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        hidden, _ = policy.hidden(params, tokens, positions, key=key)
        states = hidden[:, :-1]

        found: dict[str, Array] = {}
        outputs = tuple(sorted(VOCABULARY_FIELDS & fields))
        if outputs:
            stats = vocabulary_stats(
                policy.unembed(params), states, tokens[:, 1:], temperature, outputs, rollouts.mask[:, 1:], max_chosen
            )
            found = {name: getattr(stats, name) for name in outputs}
        if fields - VOCABULARY_FIELDS:
            # A head that TokenStats has no place for can be trained through, but not returned.
            places = {field.name for field in dataclasses.fields(TokenStats)}
            heads = {name: out for name, out in policy.heads(params, states).items() if name in places}
            if unknown := sorted(fields - VOCABULARY_FIELDS - set(heads)):
                raise ValueError(
                    f"unknown fields {unknown}: this policy gives {sorted(VOCABULARY_FIELDS | set(heads))}"
                    + ("" if "value" in heads else "; a value needs a model with a value head")
                )
            found |= {name: heads[name] for name in fields - VOCABULARY_FIELDS}

        def align(field: Array) -> Array:
            field = field.astype(jnp.promote_types(field.dtype, jnp.float32))
            return jnp.where(inside, jnp.pad(field, ((0, 0), (1, 0))), 0.0)

        return TokenStats(**{name: align(field) for name, field in found.items()})

    return run


def vocabulary_stats(
    unembedding: Unembedding,
    states: Array,
    targets: Array,
    temperature: Array | float,
    outputs: tuple[str, ...],
    chosen: Array | None = None,
    max_chosen: int | None = None,
) -> TokenLogprob:
    """The asked-for fields, each `[B, T]`, of states `[B, T, D]` and the tokens `[B, T]` that follow them.

    With `max_chosen`, only of the first so many tokens of each row for which `chosen` `[B, T]` is not 0.
    """
    weight, softcap, bias = unembedding
    if chosen is not None and max_chosen is not None and weight is not None and max_chosen < targets.shape[1]:
        # Row by row, so that on a mesh no token leaves its device.
        place = jnp.argsort(chosen == 0, axis=1, stable=True)[:, :max_chosen]
        few = vocabulary_stats(
            unembedding,
            jnp.take_along_axis(states, place[..., None], axis=1),
            jnp.take_along_axis(targets, place, axis=1),
            temperature,
            outputs,
        )

        def spread(field: Array) -> Array:
            lost = jnp.full(targets.shape, jnp.nan, field.dtype)
            rows = jnp.arange(targets.shape[0])[:, None]
            return jnp.where(chosen != 0, lost.at[rows, place].set(field), 0.0)

        return TokenLogprob(*(None if field is None else spread(field) for field in few))
    if weight is None:  # the states are logits: nothing is left to save by going through them in chunks
        return stats_of_logits(temper(states, bias, temperature, softcap), targets, outputs)
    flat = token_logprob(
        states.reshape(-1, states.shape[-1]),
        weight,
        targets.reshape(-1),
        temperature=temperature,
        softcap=softcap,
        bias=bias,
        outputs=outputs,
    )
    return TokenLogprob(*(None if field is None else field.reshape(targets.shape) for field in flat))
