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


Optimizer = optax.GradientTransformation | dict[str, optax.GradientTransformation] | float | Array


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
    powers = vocab ** np.arange(tokens.shape[1], dtype=np.int32)[::-1]
    return (tokens @ powers).reshape(rollouts.reward.shape)


def prefix_rows(tokens: Array, vocab: int) -> Array:
    """`[B, L]`: the row of the table in which each token `[B, L]` was chosen."""
    first = _firsts(tokens.shape[1], vocab)
    power = np.arange(first.size) - 1 - np.arange(first.size)[:, None]
    return first + tokens @ np.where(power >= 0, vocab ** np.maximum(power, 0), 0).astype(np.int32)


def _firsts(length: int, vocab: int) -> np.ndarray:
    """`[L]`: the first row of the table of each level."""
    return np.cumsum([0, *(vocab**level for level in range(length - 1))], dtype=np.int32)


def score(params: Array, rollouts: Rollouts, fields: frozenset[str], key: Array) -> TokenStats:
    """A `Score` of a table of logits; a role's parameters may also be `{"logits": ..., "value": [P, S]}`."""
    del key
    logits = params["logits"] if isinstance(params, dict) else params
    prompt = jnp.repeat(rollouts.prompt_id, rollouts.group_size)[:, None]
    tokens = rollouts.tokens[:, 1:]
    nodes = prefix_rows(tokens, logits.shape[-1])
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
    batch, shape, length = prompt.size, (task.prompts, group_size), task.length + 1

    def choose(code, level):
        first, noise = level
        log_p = jax.nn.log_softmax(params[prompt, first + code] / temperature)
        chosen = jnp.argmax(log_p + noise, axis=-1).astype(jnp.int32)
        return code * task.vocab + chosen, (chosen, jnp.take_along_axis(log_p, chosen[:, None], axis=1)[:, 0])

    # The noise of all levels at once, in one program of random numbers, which are most of what there is to compile.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(sample_key, jnp.arange(task.length))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (batch, task.vocab)))(keys)
    levels = jnp.asarray(_firsts(task.length, task.vocab)), noise
    _, (tokens, logps) = jax.lax.scan(choose, jnp.zeros(batch, jnp.int32), levels)
    rollouts = Rollouts(
        tokens=jnp.pad(tokens.T, ((0, 0), (1, 0))),
        mask=jnp.pad(jnp.ones((batch, task.length)), ((0, 0), (1, 0))),
        logp=jnp.pad(logps.T, ((0, 0), (1, 0))),
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


class Either(NamedTuple):
    """One of several methods or functions, which a traced number picks: what is alike for all is compiled once."""

    options: tuple[Any, ...]
    which: Array


def pick(choice: Any, function: Callable[[Any], Any]) -> Any:
    """`function(choice)`, of an `Either` of the option that it is."""
    if not isinstance(choice, Either):
        return function(choice)
    return jax.lax.switch(choice.which, [functools.partial(function, option) for option in choice.options])


class Trained(NamedTuple):
    """`params` of the policy after training, and what `observe` gave after each step, stacked."""

    params: Array
    trace: Any


def train(
    task: Task,
    method: Method | Either,
    key: Array,
    *,
    steps: int,
    group_size: int,
    optimizer: Optimizer | Callable[[Method], Optimizer] = 0.5,
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
        optimizer: a transformation, or the learning rate of plain gradient descent, or either by method.
        reuse: steps that are made on a batch before the next one is sampled: more than 1 makes it stale.
        epochs: updates within a step, whose targets are computed once.
        temperature: of sampling only; the score is at temperature 1.
        sampler: `(params, key) -> params` that are sampled from, e.g. with noise for an engine that differs.
        roles: `params -> parameters by role` beyond `policy`; a role not given is the initial policy.
        prepare: `(rollouts, key) -> rollouts` after sampling, e.g. what the sampler recorded.
        observe: `params -> anything`, after each step.
        score: of all roles, e.g. one that also reads a method's probes.
    """
    options, which = method if isinstance(method, Either) else ((method,), 0)
    chosen = [optimizer(option) if callable(optimizer) else optimizer for option in options]
    optimizers = [optax.sgd(x) if isinstance(x, float | int | Array) else x for x in chosen]
    steppers = [training.make_step(score, *both, epochs=epochs) for both in zip(options, optimizers, strict=True)]

    def of_seed(x: Array) -> Array:
        """The same: vmap traces a loop again for what only becomes different between seeds within it."""
        return x + (0 * jax.random.key_data(key)[0]).astype(x.dtype)

    def policy(states: tuple[training.TrainState, ...]) -> Array:
        return jax.lax.switch(which, [lambda s, i=i: s[i].params["policy"] for i in range(len(options))], states)

    @jax.jit
    def fresh(params: Array, number: Array, keys: Array) -> Rollouts:
        draw, noise, prepare_key = keys
        source = params if sampler is None else sampler(params, noise)
        made = sample(task, source, draw, group_size, temperature=temperature)
        made = made.replace(version=jnp.where(made.mask > 0, number, -1))
        return made if prepare is None else prepare(made, prepare_key)

    def update(states: tuple[training.TrainState, ...], rollouts: Rollouts) -> tuple[training.TrainState, ...]:
        def stepped(i: int) -> tuple[training.TrainState, ...]:
            return (*states[:i], steppers[i](states[i], rollouts)[0], *states[i + 1 :])

        return jax.lax.switch(which, [functools.partial(stepped, i) for i in range(len(options))])

    def one(carry, given):
        (states, rollouts), (number, keys) = carry, given
        if reuse == 1:
            batch = fresh(policy(states), number, keys)
        else:
            again = number % reuse != 0
            batch = rollouts = jax.lax.cond(again, lambda: rollouts, lambda: fresh(policy(states), number, keys))
        states = update(states, batch)
        return (states, rollouts), None if observe is None else observe(policy(states))

    numbers = jnp.arange(steps)
    keys = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number), 3))(numbers)
    start = of_seed(task.params())
    given = {"policy": start} | (roles(start) if roles else {})
    shapes = jax.eval_shape(fresh, start, numbers[0], keys[0])

    def begun(method: Method, optimizer: Optimizer) -> training.TrainState:
        by_role = {role: given.get(role, start) for role in method.roles | {"policy"}}
        state = training.init(by_role, method, optimizer, key, rollouts=shapes, num_prompts=task.prompts)
        opt_state, method_state = jax.tree.map(of_seed, (state.opt_state, state.method_state))
        return state.replace(opt_state=opt_state, method_state=method_state)

    nothing = None if reuse == 1 else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (states, _), trace = jax.lax.scan(one, (tuple(map(begun, options, optimizers)), nothing), (numbers, keys))
    return Trained(policy(states), trace)


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


def _alike(one: Any, other: Any) -> bool:
    """Whether the two may be options of one program."""
    if _is_option(one) or _is_option(other):
        return _is_option(one) and _is_option(other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return all(isinstance(x, float | np.ndarray | jax.Array) for x in (one, other))


def _is_option(x: Any) -> bool:
    return isinstance(x, Method) or callable(x)


def _either(options: tuple[Any, ...], which: Array) -> Any:
    if _is_option(options[0]):
        return Either(options, which)
    if isinstance(options[0], tuple):
        return tuple(_either(parts, which) for parts in zip(*options, strict=True))
    return jnp.stack([jnp.asarray(option) for option in options])[which]


def compare(outcome: Outcome, method: Any, baseline: Any, seeds: int) -> tuple[Comparison, Comparison]:
    """Outcomes of both in one program, vmapped over seeds, and the baseline in the method's place.

    The second comparison is of the baseline with itself, under other random numbers. Where method and baseline are
    `Method`s or functions, floats or arrays of one shape, or tuples of these, the outcome is traced once, with an
    `Either` (which `train` takes, and `pick` tells apart) or a traced number for both; otherwise once for each.
    """
    keys = jax.random.split(jax.random.key(2026), seeds)
    others = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)

    @jax.jit
    def once(runs: tuple[Array, Array]) -> Array:
        return jax.lax.map(
            lambda run: jax.vmap(functools.partial(outcome, _either((method, baseline), run[0])))(run[1]), runs
        )

    @jax.jit
    def each(keys: Array, others: Array) -> tuple[Array, Array, Array]:
        one = jax.vmap(functools.partial(outcome, method))(keys)
        two = jax.vmap(functools.partial(outcome, baseline))(jnp.concatenate([keys, others]))
        return one, two[:seeds], two[seeds:]

    if _alike(method, baseline):
        found = once((jnp.array([0, 1, 1]), jnp.stack([keys, keys, others])))
    else:
        found = each(keys, others)
    of_method, plain, again = (np.asarray(x, np.float64) for x in found)
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
