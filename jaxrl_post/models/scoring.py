"""From a model's states to what it says about given tokens: the only place that shifts by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_post.kernels import token_logprob
from jaxrl_post.kernels.token_logprob.reference import TokenLogprob, stats_of_logits, temper
from jaxrl_post.models.flattening import flatten, length_parts, unflatten
from jaxrl_post.models.group_divergence import GROUP_FIELDS, group_fields
from jaxrl_post.models.shared_prompt import share_prompts
from jaxrl_post.types import Array, Params, Policy, Rollouts, Score, TokenStats, Unembedding, Unit, typed_key

VOCABULARY_FIELDS = frozenset({"logp", "entropy", "mean_logp", "sum_p_squared", "max_prob", "logsumexp"})
"""Fields that come from the distribution over tokens; all others but the router's come from the policy's heads."""

ROUTER_FIELDS = frozenset({"router_chosen", "router_probability"})
"""Fields that come from what the experts of the model's layers report, a number for each sequence, layer and expert."""


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


def score(
    policy: Policy,
    *,
    temperature: Array | float = 1.0,
    max_chosen: int | None = None,
    shared_prompt: int | None = None,
) -> Score:
    """What a language model says about the tokens of rollouts.

    `logp[b, t] = log p(tokens[b, t] | tokens[b, :t])`, and every other field speaks of the same distribution or, for
    `value`, of the same moment: it comes from the state after `tokens[b, t-1]`, before token `t` is chosen.

    Positions are `0, 1, 2, ...` in every row. Rows are padded on the right, which a causal model cannot see.

    With `shared_prompt`, the `G` rollouts of a prompt are run as one row `[prompt | C_1 | ... | C_G]`, so that a prompt
    of `N` tokens costs `N + G L` tokens instead of `G (N + L)`. Values and gradients are the same: what is shared is
    what the group's valid rollouts begin with in common, wherever their prompt ends.

    Args:
        policy: a causal language model.
        temperature: logits are divided by it; the one that the rollouts were sampled with, so that log-probs agree.
        max_chosen: static bound on how many tokens of a row the policy chose (`rollouts.mask`). If given, only those
            are scored: prompts cost no logits, and the fields of the distribution are 0 at tokens that were not chosen.
            In a row with more chosen tokens than that, the surplus ones come out as NaN (with `shared_prompt`, if the
            group has more than `G * max_chosen` in all).
        shared_prompt: None, or the room for a prompt in a group's row; completions get the other `T - shared_prompt`
            places each. Give the limit of prompts' lengths where `T` is that plus the limit of completions. In a valid
            rollout of more than `T - shared_prompt` tokens after the shared ones, the surplus comes out as NaN. In a
            rollout that is not valid it comes out as 0, and so does all of one that does not share the prompt of the
            valid ones. On a TPU, attention skips most where both rooms are multiples of 512.

    Returns:
        A `Score`: `(params, rollouts, fields, key) -> TokenStats`. Fields are `logp`, `entropy`, `mean_logp`,
        `sum_p_squared`, `max_prob`, those of `GROUP_FIELDS` (which take all logits of one place of the completions at a
        time, and groups that are scored whole) and those fields of `TokenStats` that the policy's `heads` gives. Each
        is `[B, T]` float32 or wider, and 0 at position 0 and beyond the length of the row. A model with experts also
        gives `router_chosen` and `router_probability`. Its attribute `unit` is
        `"group"` with `shared_prompt`, which tells the train step to keep groups whole in micro-batches. Dropout of
        adapters has masks that the key and a row's id decide; `still` is the same score without it, which the step
        uses for what it does not differentiate.

    Raises:
        ValueError: from the score, if a field is unknown or the policy has no such head, tokens are not `[B, T]`,
            `shared_prompt` is not between 1 and `T - 1`, or the model cannot let completions share a prompt.

    Example:
        >>> import jax
        >>> from jaxrl_post import data
        >>> from jaxrl_post.models import decoder
        >>> policy = decoder(vocab_size=7, width=8, layers=1, heads=2)
        >>> params = jax.jit(policy.init)(jax.random.key(0))
        >>> rollouts = data.to_rollouts([[1, 2]], [[[3], [4, 5]]], length=4)
        >>> def run(**options):
        ...     scored = jax.jit(score(policy, **options), static_argnums=2)
        ...     return scored(params, rollouts, frozenset({"logp"}), jax.random.key(1)).logp
        >>> logp = run()
        >>> logp.shape, float(logp[0, 0]), bool(jnp.allclose(run(shared_prompt=2), logp, atol=1e-6))
        ((2, 4), 0.0, True)

    Reference: Prefix Grouper: Efficient GRPO Training through Shared-Prefix Forward, arXiv 2506.05433.
    """

    def run(params: Params, rollouts: Rollouts, fields: frozenset[str], key: Array | None) -> TokenStats:
        tokens = rollouts.tokens
        if getattr(tokens, "ndim", None) != 2:
            raise ValueError(
                f"rollouts.tokens must be an array [B, T] for a language model, got {type(tokens).__name__}"
            )
        batch, length = tokens.shape
        inside = jnp.arange(length) < rollouts.length.reshape(batch, 1)
        # Padding may hold any value, also one that is no row of the embedding.
        tokens = jnp.where(inside, tokens, 0)
        bound = None if max_chosen is None or max_chosen >= length - 1 else max_chosen
        of_groups, of_router = fields & set(GROUP_FIELDS), fields & ROUTER_FIELDS
        fields = fields - of_groups - of_router
        if shared_prompt is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
            if of_router:  # which counts every token that is no padding
                positions = jnp.where(inside, positions, -1)
            hidden, aux = policy.hidden(params, tokens, positions, key=row_keys(key, rollouts.id.reshape(-1)))
            # What is asked of a state is shifted, not the states: on a mesh these are large, and `T - 1` cannot be
            # split as `T` is.
            next_token, next_mask = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, rollouts.mask))
            found = _fields(policy, params, hidden, next_token, fields, temperature, next_mask, bound)
            found = {name: jnp.pad(field[:, :-1], ((0, 0), (1, 0))) for name, field in found.items()}

            def state_before(position: Array) -> Array:
                return jnp.take_along_axis(hidden, jnp.maximum(position - 1, 0)[:, None, None], axis=1)[:, 0]

        else:
            rows = share_prompts(rollouts, shared_prompt)
            keys = row_keys(key, rollouts.id[:, 0])
            hidden, aux = policy.hidden(params, rows.tokens, rows.positions, completion_starts=rows.starts, key=keys)
            if bound is not None:
                bound *= rollouts.group_size
            found = _fields(policy, params, rows.before(hidden), rows.tokens, fields, temperature, rows.chosen, bound)
            lost = jnp.where(rollouts.valid.reshape(batch, 1), jnp.nan, 0.0)
            found = {name: jnp.where(rows.fits, rows.spread(field), lost) for name, field in found.items()}
            if bound is not None:
                # A token that is shared may have been chosen in another rollout.
                scored = rollouts.mask != 0
                found = {
                    name: jnp.where(scored, x, 0.0) if name in VOCABULARY_FIELDS else x for name, x in found.items()
                }
            states = rows.before(hidden) if of_groups else hidden

            def state_before(position: Array) -> Array:
                place, fits = (jnp.take_along_axis(x, position[:, None], axis=1) for x in (rows.place, rows.fits))
                place = place.reshape(rollouts.reward.shape)
                state = jnp.take_along_axis(states, place[..., None], axis=1).reshape(batch, -1)
                return jnp.where(fits, state, jnp.nan)

        if of_groups:
            unembedding = policy.unembed(params)

            def log_probs(position: Array) -> Array:
                return jax.nn.log_softmax(logits(unembedding, state_before(position)) / temperature)

            chosen = jnp.where(inside, rollouts.mask, 0)
            found |= group_fields(log_probs, chosen, rollouts.valid, of_groups, max_chosen=max_chosen)

        def align(field: Array) -> Array:
            field = field.astype(jnp.promote_types(field.dtype, jnp.float32))
            return jnp.where(inside.at[:, 0].set(False), field, 0.0)

        found = {name: align(field) for name, field in found.items()}
        if missing := sorted(of_router - set(aux)):
            raise ValueError(f"{missing} need a model with experts, and this one reports {sorted(aux)}")
        for name in of_router:
            parts = aux[name]  # of each row, or its prompt and its completions
            own = parts if shared_prompt is None else parts[:, :1] + parts[:, 1:]
            found[name] = own.reshape(batch, *parts.shape[2:])
        return TokenStats(**found)

    return _LanguageScore(
        run,
        "token" if shared_prompt is None else "group",
        policy.cast or (lambda params: params),
        policy.round_late or (lambda params, cast: cast),
    )


@dataclasses.dataclass(frozen=True)
class _LanguageScore:
    """A score that may save work where the rollouts of a `unit` are scored together, and has a form without noise."""

    run: Callable[[Params, Rollouts, frozenset[str], Array | None], TokenStats]
    unit: Unit
    cast: Callable[[Params], Params]
    round_late: Callable[[Params, Params], Params]

    def __call__(self, params: Params, rollouts: Rollouts, fields: frozenset[str], key: Array) -> TokenStats:
        return self.run(params, rollouts, fields, key)

    def still(self, params: Params, rollouts: Rollouts, fields: frozenset[str], key: Array) -> TokenStats:
        """The same without dropout."""
        del key
        return self.run(params, rollouts, fields, None)


def row_keys(key: Array | None, ids: Array) -> Array | None:
    """A key for each row, which its id decides: neither its micro-batch nor its device does."""
    return None if key is None else jax.vmap(lambda id: jax.random.fold_in(typed_key(key), id))(ids)


def _fields(
    policy: Policy,
    params: Params,
    states: Array,
    targets: Array,
    fields: frozenset[str],
    temperature: Array | float,
    chosen: Array,
    max_chosen: int | None,
) -> dict[str, Array]:
    """The asked-for fields by name, each of the shape of `targets`, from the states that precede them."""
    found: dict[str, Array] = {}
    outputs = tuple(sorted(VOCABULARY_FIELDS & fields))
    if outputs:
        stats = vocabulary_stats(policy.unembed(params), states, targets, temperature, outputs, chosen, max_chosen)
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
    return found


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
    if chosen is not None and max_chosen is not None and weight is not None and max_chosen < targets.shape[-1]:
        # Row by row, and of a row that a mesh splits part by part, so that no token leaves its device.
        batch, length = targets.shape
        parts = length_parts(batch, length)
        states, wanted, among = (
            x.reshape(batch, parts, length // parts, *x.shape[2:]) for x in (states, targets, chosen != 0)
        )
        place = jnp.argsort(~among, axis=2, stable=True)[..., :max_chosen]
        few = vocabulary_stats(
            unembedding,
            jnp.take_along_axis(states, place[..., None], axis=2),
            jnp.take_along_axis(wanted, place, axis=2),
            temperature,
            outputs,
        )
        number = jnp.clip(jnp.cumsum(among, axis=2) - 1, 0, place.shape[2] - 1)
        fits = jnp.cumsum(chosen != 0, axis=1) <= max_chosen

        def spread(field: Array) -> Array:
            field = jnp.take_along_axis(field, number, axis=2).reshape(batch, length)
            return jnp.where(chosen != 0, jnp.where(fits, field, jnp.nan), 0.0)

        return TokenLogprob(*(None if field is None else spread(field) for field in few))
    if weight is None:  # the states are logits: nothing is left to save by going through them in chunks
        return stats_of_logits(temper(states, bias, temperature, softcap), targets, outputs)
    flat = token_logprob(
        flatten(states, targets.ndim),
        weight,
        flatten(targets, targets.ndim),
        temperature=temperature,
        softcap=softcap,
        bias=bias,
        outputs=outputs,
    )
    return TokenLogprob(*(None if field is None else unflatten(field, targets.shape) for field in flat))
