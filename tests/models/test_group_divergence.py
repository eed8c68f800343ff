import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.models.group_divergence import GROUP_FIELDS
from tests import tiny

FIELDS = frozenset({"logp", *GROUP_FIELDS})
group_divergence = jax.jit(models.group_divergence, static_argnames="form")


def random_logp(seed, shape):
    logits = np.random.default_rng(seed).normal(size=shape) * 2
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def by_loop(logp, mask, valid, form, limit=11.0):
    """The formulas in float64, one completion and one token of the vocabulary after the other."""
    prompts, group, length, vocab = logp.shape
    result = np.zeros((prompts, length))
    for p in range(prompts):
        members = [g for g in range(group) if valid[p, g]]
        for t in range(length):
            if not any(mask[p, g, t] for g in members):
                continue
            rows = [logp[p, g, t] if mask[p, g, t] else np.full(vocab, -np.log(vocab)) for g in members]
            for row in rows:
                for v in range(vocab):
                    if form == "log_mean":
                        d = np.clip(np.mean([r[v] for r in rows]) - row[v], -limit, limit)
                        result[p, t] += (np.exp(d) - d - 1) / len(rows)
                    else:
                        mean = np.mean([np.exp(r[v]) for r in rows])
                        result[p, t] += np.exp(row[v]) * (row[v] - np.log(mean)) / len(rows)
    return result


@pytest.mark.parametrize("form", GROUP_FIELDS.values())
def test_both_forms_agree_with_a_float64_loop_over_ragged_groups_with_invalid_members(form):
    logp = random_logp(0, (3, 4, 5, 6))
    mask = np.arange(5) < np.array([[5, 2, 3, 1], [4, 4, 4, 4], [0, 3, 2, 2]])[..., None]
    valid = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1]], bool)
    found = group_divergence(jnp.asarray(logp, jnp.float32), mask, valid, form=form)
    np.testing.assert_allclose(found, by_loop(logp, mask, valid, form), rtol=2e-4, atol=2e-6)


def test_two_distributions_give_hand_worked_numbers():
    # p = (0.9, 0.1) and (0.1, 0.9): 0.9 log(0.9 / 0.5) + 0.1 log(0.1 / 0.5) = 0.368064. With the mean of log-probs
    # -1.203973 and d = -+1.098612 the sum of exp(d) - d - 1 is 3 + 1/3 - 2 = 1.333333 for each.
    logp = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))[None, :, None]
    np.testing.assert_allclose(group_divergence(logp, jnp.ones((1, 2, 1))), [[0.368064]], rtol=1e-5)
    found = group_divergence(logp, jnp.ones((1, 2, 1)), form="log_mean")
    np.testing.assert_allclose(found, [[4 / 3]], rtol=1e-5)


@pytest.mark.parametrize("form", GROUP_FIELDS.values())
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_equal_distributions_a_group_of_one_and_no_tokens_give_exactly_zero(form, dtype):
    logp = jnp.asarray(random_logp(1, (1, 1, 4, 7)), dtype)
    same = jnp.broadcast_to(logp, (2, 5, 4, 7))
    assert np.all(np.asarray(group_divergence(same, jnp.ones((2, 5, 4)), form=form)) == 0)
    found = group_divergence(logp, jnp.ones((1, 1, 4)), form=form)
    assert np.all(np.asarray(found) == 0)
    assert found.dtype == jnp.float32
    apart = jnp.asarray(random_logp(2, (1, 3, 4, 7)), dtype)
    every, alone = jnp.array([[True] * 3]), jnp.array([[True, False, False]])
    assert np.all(np.asarray(group_divergence(apart, jnp.zeros((1, 3, 4)), every, form=form)) == 0)
    assert np.all(np.asarray(group_divergence(apart, jnp.ones((1, 3, 4)), alone, form=form)) == 0)


@pytest.mark.parametrize("form", GROUP_FIELDS.values())
def test_impossible_tokens_keep_it_finite_and_no_gradient_flows(form):
    logp = jnp.log(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))[None, :, None]
    total = lambda x: jnp.sum(group_divergence(x, jnp.ones((1, 2, 1)), form=form))  # noqa: E731
    found, gradient = jax.jit(jax.value_and_grad(total))(logp)
    assert np.isfinite(found)
    assert np.all(np.asarray(gradient) == 0)
    if form == "jensen_shannon":  # log 2 - (3/4 log 3/4 ... ) = H(0.75, 0.25) - log(2) / 2
        expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) - 0.5 * np.log(2)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_float64_stays_float64_and_wrong_arguments_are_refused():
    with jax.enable_x64(True):
        assert group_divergence(random_logp(0, (1, 2, 3, 4)), np.ones((1, 2, 3))).dtype == jnp.float64
    with pytest.raises(ValueError, match="form must be one of jensen_shannon, log_mean, got 'kl'"):
        group_divergence(jnp.zeros((1, 2, 3, 4)), jnp.ones((1, 2, 3)), form="kl")
    with pytest.raises(ValueError, match=r"logp must be \[P, G, T, V\]"):
        group_divergence(jnp.zeros((2, 3, 4)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="mask must have the shape of logp without V"):
        group_divergence(jnp.zeros((1, 2, 3, 4)), jnp.ones((1, 2, 4)))


def batch(group_size=4):
    """Ragged completions after prompts of 1 to 3 tokens, one with a span that the policy did not choose."""
    rollouts = tiny.batch(group_size)
    hole = jnp.argmax(rollouts.mask[2] > 0) + 1
    return rollouts.replace(mask=rollouts.mask.at[2, hole].set(0))


@functools.cache
def larger():
    """Parameters whose distributions are far from uniform."""
    return jax.tree.map(lambda x: 4 * x, jax.jit(tiny.policy().init)(jax.random.key(0)))


def all_log_probs(policy, params, rollouts, temperature=1.0):
    """`[B, T, V]` float64, of the distribution that each token was drawn from."""
    batch_size, length = rollouts.tokens.shape
    inside = np.arange(length) < np.asarray(rollouts.length).reshape(-1, 1)
    tokens = np.where(inside, rollouts.tokens, 0)
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    hidden, _ = jax.jit(policy.hidden)(params, tokens, positions)
    logits = np.asarray(models.logits(policy.unembed(params), hidden), np.float64) / temperature
    logp = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return np.concatenate([np.zeros((batch_size, 1, logp.shape[-1])), logp[:, :-1]], axis=1)


def expected_fields(policy, params, rollouts, temperature):
    logp, mask = all_log_probs(policy, params, rollouts, temperature), np.asarray(rollouts.mask) > 0
    prompts, group = rollouts.reward.shape
    length = mask.shape[1]
    moved, there = np.zeros_like(logp), np.zeros_like(mask)
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        moved[row, : len(places)], there[row, : len(places)] = logp[row, places], True
    moved, there = moved.reshape(prompts, group, length, -1), there.reshape(prompts, group, length)
    fields = {}
    for name, form in GROUP_FIELDS.items():
        numbers = by_loop(moved, there, np.asarray(rollouts.valid), form)
        fields[name] = np.zeros(mask.shape)
        for row in range(len(mask)):
            if np.asarray(rollouts.valid).reshape(-1)[row]:
                places = np.flatnonzero(mask[row])
                fields[name][row, places] = numbers[row // group, : len(places)]
    return fields


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.nightly),
        pytest.param({"max_chosen": 4}, marks=pytest.mark.nightly),
        pytest.param({"shared_prompt": 3}, marks=pytest.mark.nightly),
        {"shared_prompt": 3, "max_chosen": 4},
    ],
)
def test_score_gives_each_chosen_token_the_number_of_its_place_in_the_completion(options):
    policy, rollouts, params = tiny.policy(), batch(), larger()
    score = models.score(policy, temperature=0.7, **options)
    stats = jax.jit(score, static_argnums=2)(params, rollouts, FIELDS, jax.random.key(1))
    for name, expected in expected_fields(policy, params, rollouts, 0.7).items():
        np.testing.assert_allclose(getattr(stats, name), expected, rtol=1e-3, atol=1e-5)
        assert np.max(expected) > 0.01
    plain = jax.jit(score, static_argnums=2)(params, rollouts, frozenset({"logp"}), jax.random.key(1))
    np.testing.assert_array_equal(stats.logp, plain.logp)


def test_a_row_with_more_chosen_tokens_than_are_scored_shows_it():
    policy, rollouts = tiny.policy(), tiny.batch()
    score = jax.jit(models.score(policy, max_chosen=2), static_argnums=2)
    field = frozenset({"group_divergence"})
    found = score(larger(), rollouts, field, jax.random.key(1)).group_divergence
    place = np.cumsum(np.asarray(rollouts.mask), axis=1)
    chosen = (np.asarray(rollouts.mask) > 0) & np.asarray(rollouts.valid).reshape(-1, 1)
    assert np.all(np.isnan(np.asarray(found)) == (chosen & (place > 2)))


def test_padding_and_the_order_of_groups_and_members_change_nothing():
    policy, rollouts, params = tiny.policy(), batch(), larger()
    score = jax.jit(models.score(policy), static_argnums=2)

    def run(some):
        return np.asarray(score(params, some, FIELDS, jax.random.key(1)).group_divergence)

    plain = run(rollouts)
    padded = {
        field.name: jnp.pad(x, ((0, 0), (0, 2)), constant_values=9)
        for field in dataclasses.fields(rollouts)
        if getattr(x := getattr(rollouts, field.name), "shape", ()) == rollouts.mask.shape
    }
    padded["mask"] = jnp.pad(rollouts.mask, ((0, 0), (0, 2)))
    np.testing.assert_allclose(run(rollouts.replace(**padded))[:, :-2], plain, rtol=1e-4, atol=1e-6)
    order = np.array([2, 0, 3, 1])
    rows = (4 * np.arange(4)[:, None] + order).reshape(-1)
    swapped = {f: getattr(rollouts, f)[rows] for f in ("tokens", "mask")}
    swapped |= {f: getattr(rollouts, f)[:, order] for f in ("valid", "length")}
    np.testing.assert_allclose(run(rollouts.replace(**swapped)), plain[rows], rtol=1e-4, atol=1e-6)


def test_no_array_of_all_logits_comes_to_be():
    policy, rollouts = tiny.policy(), tiny.batch()
    params = jax.eval_shape(policy.init, jax.random.key(0))
    places = rollouts.tokens.shape[1]
    shapes = [f"[16,{n},{tiny.VOCAB}]" for n in (places, places - 1)] + [f"[{16 * places},{tiny.VOCAB}]"]

    def divergence(params):
        return models.score(policy)(params, rollouts, frozenset({"group_divergence"}), jax.random.key(1))

    def every_logit(params):
        hidden, _ = policy.hidden(params, rollouts.tokens, jnp.broadcast_to(jnp.arange(places), rollouts.tokens.shape))
        return models.logits(policy.unembed(params), hidden)

    assert not any(shape in str(jax.make_jaxpr(divergence)(params)) for shape in shapes)
    assert any(shape in str(jax.make_jaxpr(every_logit)(params)) for shape in shapes)


@pytest.mark.filterwarnings("ignore")
def test_a_model_known_by_its_logits_will_do():
    rollouts = tiny.batch()
    table = jnp.asarray(random_logp(3, (tiny.VOCAB, tiny.VOCAB)), jnp.float32)
    policy = models.from_apply(lambda params, tokens: params[tokens])
    found = jax.jit(models.score(policy), static_argnums=2)(table, rollouts, FIELDS, jax.random.key(1))
    for name, expected in expected_fields(policy, table, rollouts, 1.0).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-3, atol=1e-5)
