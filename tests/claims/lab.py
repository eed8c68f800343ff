"""A laboratory small enough to be solved exactly: tabular policies over short sequences, many seeds at once.

A policy is a table of logits for every prompt and every prefix, so that probabilities, expected rewards and gradients
can be enumerated. Methods are trained by the library's own step, one program for all seeds. A claim compares what a
method reaches with what a baseline reaches; with the baseline in the method's place it must not hold.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats as scipy_stats

from jaxrl_post import methods, models, training
from jaxrl_post.types import FINISH_STOP, Array, Method, Rollouts, Score, TokenStats

Judge = Callable[[Rollouts, Array], Rollouts]
"""`(rollouts, key) -> rollouts` with `reward` (and `rewards`, `extras`, `valid`, ...) filled in."""


class Task(NamedTuple):
    """Prompts, each with the same tree of sequences: `length` tokens out of `vocab`.

    Attributes:
        prompts: `P`, number of prompts; all of them are in every batch.
        vocab: `V`, number of tokens (arms, if `length` is 1).
        length: tokens of a completion.
        judge: gives the rewards.
        initial: `[P, S, V]` logits that training starts from, `S = sum_l V**l` prefixes in order of length and then of
            their tokens as digits; None for zeros.
    """

    prompts: int
    vocab: int
    length: int
    judge: Judge
    initial: Any = None

    @property
    def prefixes(self) -> int:
        """`S`."""
        return sum(self.vocab**level for level in range(self.length))

    def params(self) -> Array:
        """The logits that training starts from."""
        shape = (self.prompts, self.prefixes, self.vocab)
        return jnp.zeros(shape) if self.initial is None else jnp.broadcast_to(jnp.asarray(self.initial, float), shape)


def by_sequence(values: Any, noise: float = 0.0) -> Judge:
    """Rewards from a table `[P, V**L]` (or `[V**L]`) by sequence, with Gaussian noise."""

    def judge(rollouts: Rollouts, key: Array) -> Rollouts:
        table = jnp.asarray(values, jnp.float32)
        index = sequence_index(rollouts, round(table.shape[-1] ** (1 / (rollouts.tokens.shape[1] - 1))))
        rows = rollouts.prompt_id[:, None] if table.ndim == 2 else None
        reward = table[index] if rows is None else table[rows, index]
        return rollouts.replace(reward=reward + noise * jax.random.normal(key, reward.shape))

    return judge


def sequence_index(rollouts: Rollouts, vocab: int) -> Array:
    """`[P, G]` int: the completion's tokens as digits to the base `vocab`."""
    tokens = rollouts.tokens[:, 1:]
    index = jnp.zeros(tokens.shape[0], jnp.int32)
    for place in range(tokens.shape[1]):
        index = index * vocab + tokens[:, place]
    return index.reshape(rollouts.reward.shape)


def _nodes(tokens: Array, vocab: int) -> Array:
    """`[B, L]`: the row of the table in which each token `[B, L]` was chosen."""
    code, first, nodes = jnp.zeros(tokens.shape[0], jnp.int32), 0, []
    for level in range(tokens.shape[1]):
        nodes.append(first + code)
        first, code = first + vocab**level, code * vocab + tokens[:, level]
    return jnp.stack(nodes, axis=1)


def score(params: Array, rollouts: Rollouts, fields: frozenset[str], key: Array) -> TokenStats:
    """A `Score` of a table of logits; a role's parameters may also be `{"logits": ..., "value": [P, S]}`."""
    del key
    logits = params["logits"] if isinstance(params, dict) else params
    prompt = jnp.repeat(rollouts.prompt_id, rollouts.group_size)[:, None]
    tokens = rollouts.tokens[:, 1:]
    nodes = _nodes(tokens, logits.shape[-1])
    log_p = jax.nn.log_softmax(logits[prompt, nodes])
    found = {
        "logp": lambda: jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0],
        "entropy": lambda: -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        "mean_logp": lambda: jnp.mean(log_p, axis=-1),
        "sum_p_squared": lambda: jnp.sum(jnp.exp(2 * log_p), axis=-1),
        "max_prob": lambda: jnp.exp(jnp.max(log_p, axis=-1)),
        "logsumexp": lambda: jax.nn.logsumexp(logits[prompt, nodes], axis=-1),
        "value": lambda: params["value"][prompt, nodes],
    }
    of_groups = {"group_divergence", "group_log_divergence"} & fields
    result = {name: jnp.pad(found[name](), ((0, 0), (1, 0))) for name in fields - of_groups}
    if of_groups:
        at = lambda t: jnp.take_along_axis(log_p, jnp.maximum(t - 1, 0)[:, None, None], axis=1)[:, 0]  # noqa: E731
        result |= models.group_fields(at, rollouts.mask, rollouts.valid, of_groups)
    return TokenStats(**result)


def sample(task: Task, params: Array, key: Array, group_size: int, *, temperature: float = 1.0) -> Rollouts:
    """`group_size` sequences of every prompt, judged. Column 0 of `tokens` stands for the prompt."""
    sample_key, judge_key = jax.random.split(key)
    prompt = jnp.repeat(jnp.arange(task.prompts), group_size)
    tokens = jnp.zeros((prompt.size, 0), jnp.int32)
    logps = []
    for level in range(task.length):
        node = _nodes(jnp.pad(tokens, ((0, 0), (0, 1))), task.vocab)[:, level]
        log_p = jax.nn.log_softmax(params[prompt, node] / temperature)
        chosen = jax.random.categorical(jax.random.fold_in(sample_key, level), log_p)
        tokens = jnp.concatenate([tokens, chosen[:, None].astype(jnp.int32)], axis=1)
        logps.append(jnp.take_along_axis(log_p, chosen[:, None], axis=1)[:, 0])
    batch, shape = prompt.size, (task.prompts, group_size)
    length = task.length + 1
    rollouts = Rollouts(
        tokens=jnp.pad(tokens, ((0, 0), (1, 0))),
        mask=jnp.pad(jnp.ones((batch, task.length)), ((0, 0), (1, 0))),
        logp=jnp.pad(jnp.stack(logps, axis=1), ((0, 0), (1, 0))),
        step=jnp.pad(jnp.zeros((batch, task.length), jnp.int32), ((0, 0), (1, 0)), constant_values=-1),
        version=jnp.pad(jnp.zeros((batch, task.length), jnp.int32), ((0, 0), (1, 0)), constant_values=-1),
        reward=jnp.zeros(shape),
        rewards={},
        valid=jnp.ones(shape, bool),
        length=jnp.full(shape, length, jnp.int32),
        finish=jnp.full(shape, FINISH_STOP, jnp.int8),
        id=jnp.arange(batch, dtype=jnp.uint32).reshape(shape),
        prompt_id=jnp.arange(task.prompts, dtype=jnp.int32),
    )
    return task.judge(rollouts, judge_key)


class Trained(NamedTuple):
    """`params` of the policy after training, and what `observe` gave after each step, stacked."""

    params: Array
    trace: Any


def train(
    task: Task,
    method: Method,
    key: Array,
    *,
    steps: int,
    group_size: int,
    optimizer: optax.GradientTransformation | float = 0.5,
    reuse: int = 1,
    epochs: int = 1,
    temperature: float = 1.0,
    sampler: Callable[[Array, Array], Array] | None = None,
    roles: Callable[[Array], dict[str, Any]] | None = None,
    prepare: Judge | None = None,
    observe: Callable[[Array], Any] | None = None,
    score: Score = score,
) -> Trained:
    """Train a method on a task with the library's own step.

    Args:
        task: the task.
        method: the method.
        key: of the seed.
        steps: updates (times `epochs`).
        group_size: `G`.
        optimizer: a transformation, or the learning rate of plain gradient descent.
        reuse: steps that are made on a batch before the next one is sampled: more than 1 makes it stale.
        epochs: updates within a step, whose targets are computed once.
        temperature: of sampling only; the score is at temperature 1.
        sampler: `(params, key) -> params` that are sampled from, e.g. with noise for an engine that differs.
        roles: `params -> parameters by role` beyond `policy`; a role not given is the initial policy.
        prepare: `(rollouts, key) -> rollouts` after sampling, e.g. what the sampler recorded.
        observe: `params -> anything`, after each step.
        score: of all roles, e.g. one that also reads a method's probes.
    """
    optimizer = optax.sgd(optimizer) if isinstance(optimizer, float | int) else optimizer
    start = task.params()
    given = {"policy": start} | (roles(start) if roles else {})
    by_role = {role: given.get(role, start) for role in method.roles | {"policy"}}
    shapes = jax.eval_shape(lambda: sample(task, start, jax.random.key(0), group_size))
    state = training.init(by_role, method, optimizer, key, rollouts=shapes, num_prompts=task.prompts)
    step = training.make_step(score, method, optimizer, epochs=epochs)

    def one(carry, number):
        state, rollouts = carry
        draw, noise, prepare_key = jax.random.split(jax.random.fold_in(key, number), 3)

        def fresh(_):
            source = state.params["policy"] if sampler is None else sampler(state.params["policy"], noise)
            made = sample(task, source, draw, group_size, temperature=temperature)
            made = made.replace(version=jnp.where(made.mask > 0, state.step, -1))
            return made if prepare is None else prepare(made, prepare_key)

        rollouts = fresh(None) if reuse == 1 else jax.lax.cond(number % reuse == 0, fresh, lambda _: rollouts, None)
        state, _ = step(state, rollouts)
        return (state, rollouts), None if observe is None else observe(state.params["policy"])

    first = sample(task, start, jax.random.key(0), group_size)
    first = first if prepare is None else prepare(first, key)
    (state, _), trace = jax.lax.scan(one, (state, first), jnp.arange(steps))
    return Trained(state.params["policy"], trace)


def probabilities(params: Array, length: int) -> Array:
    """`[P, V**L]`: the exact probability of every sequence, in order of its tokens as digits."""
    vocab = params.shape[-1]
    p, first = jnp.ones((params.shape[0], 1)), 0
    for level in range(length):
        rows = jax.nn.softmax(params[:, first : first + vocab**level])
        p, first = (p[..., None] * rows).reshape(params.shape[0], -1), first + vocab**level
    return p


def entropy(params: Array, length: int) -> Array:
    """`[P]`, nats: entropy of the sequence, exactly."""
    p = probabilities(params, length)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)


class Comparison(NamedTuple):
    """Outcomes `[seeds]` of a method and of its baseline, with the same random numbers for a seed of both."""

    method: np.ndarray
    baseline: np.ndarray

    @property
    def effect(self) -> float:
        """Mean of the differences, method less baseline."""
        return float(np.mean(self.method - self.baseline))

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the effect (Student's t over seeds)."""
        difference = self.method - self.baseline
        spread = scipy_stats.sem(difference) * scipy_stats.t.ppf(0.975, difference.size - 1)
        return self.effect - float(spread), self.effect + float(spread)


Outcome = Callable[[Any, Array], Array]
"""`(method or whatever is compared, key) -> scalar`, more is better."""


def compare(outcome: Outcome, method: Any, baseline: Any, seeds: int) -> tuple[Comparison, Comparison]:
    """Outcomes of both in one program, vmapped over seeds, and the baseline in the method's place.

    The second comparison is of the baseline with itself, under other random numbers.
    """

    @jax.jit
    def both(keys: Array) -> tuple[Array, Array]:
        others = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        one = jax.vmap(functools.partial(outcome, method))(keys)
        return one, jax.vmap(functools.partial(outcome, baseline))(jnp.concatenate([keys, others]))

    of_method, of_baseline = (np.asarray(x, np.float64) for x in both(jax.random.split(jax.random.key(2026), seeds)))
    plain, again = of_baseline[:seeds], of_baseline[seeds:]
    return Comparison(of_method, plain), Comparison(plain, again)


def check(
    claim_id: str,
    outcome: Outcome,
    *,
    method: Any,
    baseline: Any,
    seeds: int = 32,
    margin: float = 0.0,
    held: bool = True,
) -> Comparison:
    """Assert that a claim holds, that it fails with the baseline in the method's place, and what the catalog says.

    Args:
        claim_id: the row's id.
        outcome: what is claimed to be larger for the method.
        method: a `Method` or whatever `outcome` takes.
        baseline: what the paper compares with.
        seeds: runs of each.
        margin: the interval's lower end must be above it.
        held: False if the claim does not come out, and is recorded so.

    A claim that is recorded as not held needs no control. The catalog's record is compared with what was measured:
    `held` must agree, and the intervals must overlap, to the digits recorded. Where the environment names a file in
    `CLAIM_RESULTS`, the result is appended to it instead (see `record`).
    """
    found, control = compare(outcome, method, baseline, seeds)
    low, high = found.interval
    assert (low > margin) == held, f"{claim_id}: effect {found.effect:.4g} in [{low:.4g}, {high:.4g}], margin {margin}"
    if held:
        assert control.interval[0] <= margin, f"{claim_id} holds with the baseline in the method's place: {control}"
    result = {
        "held": held,
        "method": round(float(found.method.mean()), 6),
        "baseline": round(float(found.baseline.mean()), 6),
        "interval": [round(low, 6), round(high, 6)],
        "seeds": seeds,
    }
    if path := os.environ.get("CLAIM_RESULTS"):
        with open(path, "a") as file:
            file.write(json.dumps({"id": claim_id, **result}) + "\n")
        return found
    recorded = {record.id: record for record in methods.catalog()}[claim_id].claim_result
    assert recorded is not None, f"{claim_id}: the catalog has no result; run python -m tests.claims.record"
    assert recorded["held"] == held
    (was_low, was_high), (low, high) = recorded["interval"], result["interval"]
    slack = 1e-3 * max(abs(found.effect), 1e-3)  # of an interval without width, the compiler's version moves the digits
    assert was_low <= high + slack, f"{claim_id}: recorded {recorded}, measured {result}"
    assert was_high >= low - slack, f"{claim_id}: recorded {recorded}, measured {result}"
    return found
