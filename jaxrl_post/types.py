"""The nouns of the library: what happened, what a model says about it, and what a method is.

Every array field is documented with its shape, dtype and unit. Nothing here computes a loss or an advantage.

Symbols, here and everywhere: `P` prompts, `G` rollouts per prompt, `B = P * G` sequences (prompt-major: row
`p * G + g`), `T` positions (prompt included), `V` vocabulary, `D` model width.

Alignment: every `[B, T]` array speaks of its own token. `logp[b, t]` is the log-probability of `tokens[b, t]` given
`tokens[b, :t]`; position 0 is 0 and masked. Only a `Score` ever shifts by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Params: TypeAlias = Any

AggregationMode: TypeAlias = Literal[
    "token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm"
]
Unit: TypeAlias = Literal["token", "sequence", "group", "batch"]
LearnsFrom: TypeAlias = Literal["rollouts", "completions", "pairs"]

# Absent fields are None, but a method that declares in `needs` what it reads may rely on what it finds.
_ABSENT: Any = None

ANSWER_TOKENS = "answer_tokens"  # of `Method.wants`
PROBE = "probe/"  # how the names of probes begin in `Method.needs` and in stats

FINISH_NONE = 0  # still running, or not a sampled sequence
FINISH_STOP = 1  # ended by a stop token, which is the last token of the sequence and inside its mask
FINISH_LENGTH = 2  # cut at the limit of new tokens
FINISH_ABORT = 3  # given up: an error of the environment or of the engine


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What happened: `P` prompts with `G` sequences each.

    Attributes:
        tokens: `[B, T]` int32 token ids (or any pytree of `[B, T, ...]` actions). Prompt first, completion directly
            after it, then padding of any value.
        mask: `[B, T]` float32, 1 where the policy itself chose the token; the only truth about what is trained.
        logp: `[B, T]` float32, nats. Log-prob of the token under the distribution it was sampled from before
            truncation: temperature-adjusted, all tokens allowed. Where top-k, top-p or min-p cut the distribution,
            `extras["sampler_logp"]` holds the log-prob under the cut one.
        step: `[B, T]` int32, turn or reasoning step of the token, -1 elsewhere.
        version: `[B, T]` int32, version (training step) of the policy that sampled the token, -1 if none did.
        reward: `[P, G]` float32, the total reward of the sequence.
        rewards: components by name, each `[P, G]`, or `[B, T]` on the token where it was earned; NaN where one could
            not be scored, which contributes nothing to `reward`.
        valid: `[P, G]` bool; False takes the sequence out of group statistics and of the loss.
        length: `[P, G]` int32, tokens of prompt and completion; the only truth about padding.
        finish: `[P, G]` int8, one of the `FINISH_` constants.
        id: `[P, G]` uint32, unique in a run; with the position it determines the sequence's random stream.
        prompt_id: `[P]` int32, index of the prompt in its data set.
        extras: further arrays with a leading axis of `B` or `P`, e.g. `agent i32[B, T]`.

    A preference pair is a group of two, column 0 chosen; unpaired feedback is `G = 1` with a reward of +-1; a ranked
    list is `G = K`.
    """

    tokens: Any
    mask: Array
    logp: Array
    step: Array
    version: Array
    reward: Array
    rewards: dict[str, Array]
    valid: Array
    length: Array
    finish: Array
    id: Array
    prompt_id: Array
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        """`P`."""
        return self.reward.shape[0]

    @property
    def group_size(self) -> int:
        """`G`."""
        return self.reward.shape[1]

    @property
    def batch_size(self) -> int:
        """`B = P * G`."""
        return self.reward.shape[0] * self.reward.shape[1]

    @property
    def valid_mask(self) -> Array:
        """`[B, T]` float32: `mask` without the sequences that are not `valid`."""
        return self.mask * self.valid.reshape(-1, 1)

    def replace(self, **changes: Any) -> Rollouts:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """What a model says about given tokens: fields float32 or wider, None where not asked for, `[B, T]` but the last.

    Attributes:
        logp: log-prob of the token, nats.
        entropy: entropy of the distribution the token was drawn from, nats.
        value: the model's estimate of the return before the token is chosen.
        mean_logp: mean over the vocabulary of the log-probs, nats.
        sum_p_squared: sum over the vocabulary of the squared probabilities.
        max_prob: the largest probability of the distribution.
        logsumexp: log of the sum of the exponentiated logits, at the temperature of `logp`: the normaliser of `logp`.
        group_divergence: how much the distributions differ from which the completions of the token's group chose at its
            place, nats; without gradient, 0 at tokens that no policy chose. A method that reads it has `unit="group"`.
        group_log_divergence: the same by another measure, see `models.group_divergence`.
        router_chosen: `[B, L, E]`, of a model with experts: how many of the sequence's tokens, prompt and completion,
            the router of each of `L` layers sent to each of `E` experts.
        router_probability: `[B, L, E]`, sum over the same tokens of the probability that the router gave the expert.
    """

    logp: Array = _ABSENT
    entropy: Array = _ABSENT
    value: Array = _ABSENT
    mean_logp: Array = _ABSENT
    sum_p_squared: Array = _ABSENT
    max_prob: Array = _ABSENT
    logsumexp: Array = _ABSENT
    group_divergence: Array = _ABSENT
    group_log_divergence: Array = _ABSENT
    router_chosen: Array = _ABSENT
    router_probability: Array = _ABSENT

    def replace(self, **changes: Any) -> TokenStats:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


Score: TypeAlias = Callable[[Params, Rollouts, frozenset[str], Array], TokenStats]
"""`(params, rollouts, fields, key) -> TokenStats`: all that training knows about a model."""


class Unembedding(NamedTuple):
    """The last linear map of a language model.

    Attributes:
        weight: `[V, D]`; None where `hidden` already holds logits (a model known only by its logits).
        softcap: logits become `softcap * tanh(logits / softcap)`; None for no cap.
        bias: `[V]` or None.
    """

    weight: Array | None
    softcap: float | None = None
    bias: Array | None = None


class Policy(NamedTuple):
    """A language model as pure functions.

    Attributes:
        init: `(key) -> params`.
        hidden: `(params, tokens[B, T], positions[B, T], segment_ids=None, *, key=None) -> (f[B, T, D], aux)`; `aux`
            is a dict, empty for most models. One with experts gives `router_chosen` and `router_probability`
            `[B, S, L, E]`, see `TokenStats`, for each of the `S` parts of a row: the row itself, or prompt and
            completions as below. A model that lets completions
            share a prompt also takes `completion_starts`, a static tuple of places: the row is then
            `[prompt | C_1 | C_2 | ...]`, a completion sees the prompt and itself but no other completion, positions
            say where each token stands in its own sequence, and a position of -1 marks padding. `key` is for noise
            (dropout), of which there is none without it: one for all rows or, as `models.score` gives, one for each.
        unembed: `(params) -> Unembedding`.
        heads: `(params, hidden[B, T, D]) -> dict[str, [B, T]]`, e.g. `value`; empty if the model has none.
        init_cache: `(batch, capacity, dtype) -> cache`; one that can share a pool of pages among its rows also takes
            `pages`, see `models.PagedCache`.
        prefill: `(params, tokens[B, T], positions[B, T], cache) -> (hidden, cache)` on an empty cache; a position of -1
            marks padding.
        decode: the same signature, on a cache that holds something.
        axes: `() -> pytree` of the structure of `params`: a tuple of logical axis names (or None) for each parameter;
            None if the model names no axes and is replicated.
        insert: `(cache, rows, source[R], slots[R]) -> cache`, which puts rows of a prefilled cache into slots of a
            larger one, in the place of what they held, or `(cache, rows, k)`, which fills all slots of an empty one
            with each row `k` times, as `models.insert_rows` does; None if the cache cannot, and slots are not refilled.
        cast: `(params) -> params`, matrices in the precision that the model multiplies in, which it would round them to
            anyway; the train step keeps gradients of a pass, and sums them over devices, in that. Parts of the tree may
            be None. None if the model has no such precision.
        round_late: `(params, cast) -> params`, where `cast` is what `cast` made of them: parameters that the functions
            above take too, and that are rounded where they are multiplied with, so that no rounded copy of them all is
            made; their gradient is that of `cast`. None if the model needs the copy.
        share: `(cache, rows) -> cache`: an empty cache for what is added to `B = P * G` sequences, and that of their
            `P` prefilled prompts, as one in which the prompts stay where they are, as `models.share_prompts` does; None
            if the cache cannot, and each sequence gets a copy of its prompt.
    """

    init: Callable[..., Params]
    hidden: Callable[..., tuple[Array, dict[str, Array]]]
    unembed: Callable[[Params], Unembedding]
    heads: Callable[[Params, Array], dict[str, Array]]
    init_cache: Callable[..., PyTree]
    prefill: Callable[..., tuple[Array, PyTree]]
    decode: Callable[..., tuple[Array, PyTree]]
    axes: Callable[[], PyTree] | None = None
    insert: Callable[..., PyTree] | None = None
    cast: Callable[[Params], Params] | None = None
    round_late: Callable[[Params, Params], Params] | None = None
    share: Callable[..., PyTree] | None = None


class Targets(NamedTuple):
    """What a step trains towards; computed once per step, without gradient, and held over its epochs.

    Attributes:
        advantages: `[B, T]`, zero where `mask` is.
        mask: `[B, T]`, at most `rollouts.mask`: a method may drop rows or tokens from the loss and its denominators.
        old_logp: `[B, T]`, nats: the denominator of the importance ratio.
        returns: `[B, T]` or None: the critic's regression target.
        extras: further arrays with a leading axis of `B` or `P`, or scalars.
    """

    advantages: Array
    mask: Array
    old_logp: Array
    returns: Array = _ABSENT
    extras: Mapping[str, Array] = {}


class Term(NamedTuple):
    """One summand of a loss, not yet reduced.

    Attributes:
        value: `[B, T]`, `[B]` or `[P]`.
        mask: of the same shape. It may depend on rollouts and targets only, never on the stats of the trained model,
            because denominators are computed over the whole batch before any micro-batch is run.
        mode: how it is reduced, see `losses.aggregate`.
        weight: factor of the reduced value.
        horizon: fixed length for `mode="seq_mean_token_sum_norm"`.
    """

    value: Array
    mask: Array
    mode: AggregationMode
    weight: float | Array = 1.0
    horizon: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that knows how it is reduced over micro-batches, epochs and hosts.

    Attributes:
        value: scalar; for `reducer="mean"` the weighted sum.
        weight: scalar; the sum of the weights for `reducer="mean"`, otherwise unused.
        reducer: `"mean" | "sum" | "min" | "max"`.
    """

    value: Array
    weight: Array
    reducer: str = dataclasses.field(metadata={"static": True})

    @staticmethod
    def mean(value: Array, mask: Array | None = None) -> Metric:
        """Mean of `value` where `mask` is nonzero; an empty mask gives 0."""
        mask = jnp.ones_like(value) if mask is None else mask
        return Metric(jnp.sum(jnp.where(mask > 0, value * mask, 0.0)), jnp.sum(mask), "mean")

    @staticmethod
    def sum(value: Array) -> Metric:
        """Sum of `value`."""
        return Metric(jnp.sum(value), jnp.ones(()), "sum")

    @staticmethod
    def max(value: Array, mask: Array) -> Metric:
        """Largest `value` where `mask` is nonzero; -inf if there is none."""
        return Metric(jnp.max(jnp.where(mask > 0, value, -jnp.inf)), jnp.sum(mask), "max")

    @staticmethod
    def min(value: Array, mask: Array) -> Metric:
        """Smallest `value` where `mask` is nonzero; inf if there is none."""
        return Metric(jnp.min(jnp.where(mask > 0, value, jnp.inf)), jnp.sum(mask), "min")

    def merge(self) -> Metric:
        """Reduce a metric whose fields carry one leading axis (as `lax.scan` stacks them)."""
        reduce = {"mean": jnp.sum, "sum": jnp.sum, "min": jnp.min, "max": jnp.max}[self.reducer]
        return Metric(reduce(self.value, axis=0), jnp.sum(self.weight, axis=0), self.reducer)

    def result(self) -> Array:
        """The reduced number; NaN where nothing was there to reduce."""
        if self.reducer == "sum":
            return self.value
        empty = self.weight <= 0
        value = self.value / jnp.where(empty, 1.0, self.weight) if self.reducer == "mean" else self.value
        return jnp.where(empty, jnp.nan, value)


Stats: TypeAlias = Mapping[str, TokenStats]
"""`TokenStats` by role: `stats["policy"].logp`."""


def _stateless(rollouts: Any, num_prompts: int) -> tuple[()]:
    del rollouts, num_prompts
    return ()


class Method(NamedTuple):
    """A training method: the counterpart of `optax.GradientTransformation`.

    Attributes:
        init: `(rollouts, num_prompts) -> state`; `rollouts` holds shapes only. The state is an explicit pytree and is
            checkpointed with everything else.
        targets: `(state, rollouts, stats, key) -> (Targets, state)`: whole batch, no gradient, stats of the start of
            the step. Stats that it does not use are not computed.
        loss: `(stats, rollouts, targets) -> dict[str, Term]`: differentiated, never reduced.
        needs: the fields that are read of each role's stats, e.g. `{"policy": frozenset({"logp"})}`; of a role that
            scores nothing but probes, none.
        trains: the roles whose parameters are updated.
        unit: the smallest piece a micro-batch may not split. Below `group`, `loss` may be given groups of one.
        probes: `rollouts -> {name: (Rollouts, role)}`: other texts that a role scores once, at the start of the step.
            `needs["probe/<name>"]` says which fields; they arrive in `targets` as `stats["probe/<name>"]`, of the
            probe's shape, and what the loss needs of them goes on in `Targets.extras`. See `methods.probing`.
        metrics: `(stats, rollouts, targets) -> dict[str, Metric]`: diagnostics of one (micro-)batch, without gradient.
        learns_from: what the sequences are: `rollouts` the policy samples, `completions` the data gives (`G = 1`), or
            `pairs` of which column 0 is preferred (`G = 2`).
        min_group: the smallest group that gives any advantage.
        wants: names in `rollouts.extras` that are read and that sampling alone does not give: `greedy_reward` `[P]`,
            the reward of a greedy completion of each prompt; `answer_tokens` `[P, A]` int32, the tokens of the data's
            answer, -1 behind them; `budget` and `exit` `[P, G]`, what `rollout.budgets` and `rollout.exits` of a
            configuration give each completion; any other name is a column of numbers of the data.
        batch: `(state, rollouts) -> (rollouts, state)`: what is trained on instead of the step's rollouts, e.g. those
            of the step before, kept in the state. It comes before `targets`, and gives rollouts of the same shapes.
        combine: `(state, gram[N, N], names) -> (weights[N], state)`: the update follows `sum_i weights_i g_i`, where
            `g_i` is the gradient of term `names[i]` (its own weight included) over the whole batch and all trained
            roles, and `gram[i, j] = <g_i, g_j>`. Costs a backward pass and a gradient's memory per term.
        stages: methods run in this order in each step, each scored with the parameters that the one before left; see
            `methods.chain`. Their states are the method's state by the same names; `targets` and `loss` are not used.
        partial: it learns from sequences that are still running (`finish` is `FINISH_NONE`) as well: they are valid,
            and have no reward yet.
        contrasts: it learns from differences between the rewards of a group alone, so that sampling a batch in which no
            group has any is for nothing.
    """

    targets: Callable[..., tuple[Targets, PyTree]]
    loss: Callable[[Stats, Rollouts, Targets], dict[str, Term]]
    needs: Mapping[str, frozenset[str]]
    init: Callable[[Any, int], PyTree] = _stateless
    trains: frozenset[str] = frozenset({"policy"})
    unit: Unit = "token"
    probes: Callable[[Rollouts], Mapping[str, tuple[Rollouts, str]]] | None = None
    metrics: Callable[[Stats, Rollouts, Targets], dict[str, Metric]] | None = None
    learns_from: LearnsFrom = "rollouts"
    min_group: int = 1
    wants: frozenset[str] = frozenset()
    batch: Callable[[PyTree, Rollouts], tuple[Rollouts, PyTree]] | None = None
    combine: Callable[[PyTree, Array, tuple[str, ...]], tuple[Array, PyTree]] | None = None
    stages: Mapping[str, Method] = {}
    partial: bool = False
    contrasts: bool = False

    @property
    def roles(self) -> frozenset[str]:
        """The roles that it reads or trains."""
        return frozenset(name for name in self.needs if not name.startswith(PROBE)) | self.trains


class Curriculum(NamedTuple):
    """Which prompts to try next, and how often.

    Attributes:
        init: `(num_prompts) -> state`.
        select: `(state, key, budget) -> (prompt_id i32[P], counts i32[P], hints)`; ragged groups are slots with
            `valid=False`.
        observe: `(state, prompt_id, rewards[P, G], valid[P, G]) -> state`.
    """

    init: Callable[[int], PyTree]
    select: Callable[..., tuple[Array, Array, Any]]
    observe: Callable[..., PyTree]


def typed_key(key: Array) -> Array:
    """The threefry key (or keys) that a key stands for, typed or raw, of whatever kind.

    Of the kinds of JAX's keys only threefry gives what a key of a batch draws by itself: under `vmap` the others, as
    `rbg`, draw by the first key of all.

    Example:
        >>> typed_key(jax.random.key(3, impl="rbg")) == typed_key(jax.random.PRNGKey(3))
        Array(True, dtype=bool)
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) == "threefry2x32":
            return key
        key = jax.random.key_data(key)
    return jax.random.wrap_key_data(key[..., :2], impl="threefry2x32")
