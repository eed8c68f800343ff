"""Methods for several objectives: weights and constraints on numbers that can be worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import methods
from jaxrl_post.methods.constrained import c_morl
from jaxrl_post.methods.grounding import gui_g1
from jaxrl_post.methods.multi_objective import (
    gradient_weighting,
    hypervolume_factor,
    hypervolume_weighting,
    objective_means,
)
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import compiled
from tests.methods import tabular

BOTH = ("first", "second")


def batch(seed=0, scale=1.0):
    made = tabular.batch(seed)
    noise = jax.random.normal(jax.random.key(seed + 7), made.reward.shape)
    return made.replace(rewards={"first": made.reward + 3, "second": scale * noise + 3, "third": made.mask * 0.5})


def step_once(method, rollouts, step=None, **options):
    return (step or tabular.make_step(method, **options))(tabular.start(method, rollouts=rollouts), rollouts)


@functools.cache
def leave_one_out():
    """The method without weights, and its step."""
    method = methods.policy_gradient(advantage="rloo", beta=0.1)
    return method, tabular.make_step(method)


def assert_same(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), left, right)


def test_the_table_s_gradients_move_the_weights_as_it_says():
    method = gradient_weighting(objectives=BOTH, step_size=0.1)
    state = method.init(None, 0)
    gradients = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    weights, state = method.combine(state, gradients @ gradients.T, ("objective/first", "objective/second"))
    np.testing.assert_allclose(weights, [0.425557, 0.574443], rtol=1e-5)
    # Terms that are no objective keep their weight, wherever they stand.
    gram = jnp.zeros((3, 3)).at[1:, 1:].set(gradients @ gradients.T)
    weights, _ = method.combine(method.init(None, 0), gram, ("kl", "objective/first", "objective/second"))
    np.testing.assert_allclose(weights, [1.0, 0.425557, 0.574443], rtol=1e-5)


def test_a_window_averages_influences_before_the_weights_move():
    method = gradient_weighting(objectives=BOTH, step_size=0.1, window=2, bounds=(0.0, 0.3))
    state, names = method.init(None, 0), ("objective/first", "objective/second")
    weights, state = method.combine(state, jnp.diag(jnp.array([1.0, 2.0])), names)
    np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-6)
    weights, state = method.combine(state, jnp.diag(jnp.array([3.0, 8.0])), names)
    scores = np.exp(np.minimum(0.1 * np.array([2.0, 5.0]), 0.3))
    np.testing.assert_allclose(weights, scores / scores.sum(), rtol=1e-6)
    assert state.influence.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_with_linear_advantages_the_update_is_that_of_the_weighted_reward(micro_batches):
    rollouts = batch(scale=5.0)
    found, metrics = step_once(
        gradient_weighting(objectives=BOTH, step_size=2.0, beta=0.1), rollouts, micro_batches=micro_batches
    )
    w = [float(metrics[f"gradient_weight/objective/{name}"]) for name in BOTH]
    assert w[1] > 0.6, w  # the objective with the larger gradient
    np.testing.assert_allclose(sum(w), 1.0, rtol=1e-6)
    assert float(metrics["gradient_weight/kl"]) == 1.0
    mixed = rollouts.replace(reward=w[0] * rollouts.rewards["first"] + w[1] * rollouts.rewards["second"])
    method, step = leave_one_out()
    expected, plain = step_once(method, mixed, step)
    assert_same(found.params, expected.params, 2e-6)
    np.testing.assert_allclose(metrics["loss/kl"], plain["loss/kl"], rtol=1e-4)
    np.testing.assert_allclose(np.exp(found.method_state.log_weights), w, rtol=1e-6)


def test_the_first_factor_is_one_and_then_follows_the_volume_that_a_batch_adds():
    np.testing.assert_allclose(hypervolume_factor(jnp.array(0.2)), 0.796063, rtol=1e-6)
    method = hypervolume_weighting(objectives=BOTH, weights=(0.25, 0.75))
    first, second = batch(0), batch(1)

    def mixed(rollouts, factor=1.0):
        return rollouts.replace(reward=factor * (0.25 * rollouts.rewards["first"] + 0.75 * rollouts.rewards["second"]))

    plain = methods.policy_gradient(advantage="rloo")
    step, plain_step = tabular.make_step(method), tabular.make_step(plain)
    state, metrics = step_once(method, first, step)
    expected, _ = step_once(plain, mixed(first), plain_step)
    assert_same(state.params, expected.params)
    assert float(metrics["hypervolume_factor"]) == 1.0
    p, q = (np.asarray(objective_means(rollouts, BOTH), np.float64) for rollouts in (first, second))
    added = max(np.prod(q) - np.prod(np.minimum(p, q)), 0.0)
    new, metrics = step(state, second)
    np.testing.assert_allclose(metrics["hypervolume_factor"], 0.5 + 1.5 * np.tanh(added), rtol=1e-4)
    again, _ = plain_step(expected, mixed(second, 0.5 + 1.5 * np.tanh(added)))
    assert_same(new.params, again.params, 2e-6)
    assert int(new.method_state["advantage"].archive.valid.sum()) in (1, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda advantage: hypervolume_weighting(objectives=BOTH, weights=(1.0, 0.0), advantage=advantage),
        lambda advantage: c_morl(objective="first", constraints=("second",), barrier="ratio", advantage=advantage),
    ],
)
def test_an_advantage_of_tokens_is_given_the_objectives_and_not_the_total(make):
    rollouts = batch()
    expected = methods.policy_gradient(advantage="reinforce_plus_plus")
    found = {}
    for total in (1.0, 100.0):
        method = make("reinforce_plus_plus")
        rows, stats = rollouts.replace(reward=total * rollouts.reward), {"policy": TokenStats(logp=rollouts.logp)}
        state = tabular.start(method, rollouts=rows).method_state
        found[total], _ = compiled(method.targets)(state, rows, stats, jax.random.key(0))
    np.testing.assert_array_equal(found[1.0].advantages, found[100.0].advantages)
    first = rollouts.replace(reward=rollouts.rewards["first"])
    plain, _ = compiled(expected.targets)(expected.init(first, 4), first, stats, jax.random.key(0))
    np.testing.assert_allclose(found[1.0].advantages, plain.advantages, rtol=1e-6)


def test_c_morl_adds_the_held_objective_s_advantages_with_the_slope_of_the_barrier():
    rollouts = batch()
    means = np.asarray(objective_means(rollouts, BOTH), np.float64)
    found, metrics = step_once(c_morl(objective="first", constraints=("second",), t=2.0), rollouts)
    slack = means[1] - 0.9 * means[1]
    np.testing.assert_allclose(metrics["constraint_slack"], slack, rtol=1e-4)
    reward = rollouts.rewards["first"] + rollouts.rewards["second"] / (2.0 * slack)
    expected, _ = step_once(methods.policy_gradient(advantage="dr_grpo"), rollouts.replace(reward=reward))
    assert_same(found.params, expected.params, 2e-6)
    np.testing.assert_allclose(found.method_state["advantage"].returns, means, rtol=1e-5)


def test_c_morl_remembers_where_it_started_or_is_told():
    method = c_morl(objective="first", constraints=("second", "third"), start={"second": 2.0, "third": 1.0})
    state, metrics = step_once(method, batch())
    assert state.method_state["advantage"].returns.tolist() == [0.0, 2.0, 1.0]
    means = objective_means(batch(), ("second", "third"))
    np.testing.assert_allclose(metrics["constraint_slack"], min(means[0] - 1.8, means[1] - 0.9), rtol=1e-5)
    fresh = c_morl(objective="first", constraints=("second",))
    step = tabular.make_step(fresh)
    state, _ = step_once(fresh, batch(0), step)
    begun = np.array(state.method_state["advantage"].returns)
    state, _ = step(state, batch(1))
    np.testing.assert_array_equal(state.method_state["advantage"].returns, begun)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_released_barrier_is_a_term_of_its_own(micro_batches):
    method = c_morl(objective="first", constraints=("second",), barrier="ratio")
    rollouts = batch()
    _, metrics = step_once(method, rollouts, micro_batches=micro_batches)
    mean = float(objective_means(rollouts, BOTH)[1])
    np.testing.assert_allclose(metrics["loss/barrier"], -np.log(0.1 * mean) / 20, rtol=1e-3)


def test_components_of_tokens_are_summed_over_their_sequence():
    rollouts = batch()
    lengths = np.asarray(rollouts.mask).sum(1)[np.asarray(rollouts.valid).reshape(-1)]
    np.testing.assert_allclose(objective_means(rollouts, ["third"]), [0.5 * lengths.mean()], rtol=1e-5)


def test_gui_g1_weighs_prompts_of_dr_grpo():
    rollouts = tabular.batch()
    weight = jnp.array([2.0, 0.0, 0.5, 1.5])
    rollouts = rollouts.replace(extras={**rollouts.extras, "prompt_weight": weight})
    found, _ = step_once(gui_g1(horizon=4), rollouts)
    dr_grpo = methods.grpo(normalize_std=False, beta=0.0, aggregation="seq_mean_token_sum_norm", horizon=4)
    scaled = rollouts.replace(reward=rollouts.reward * weight[:, None])
    step = tabular.make_step(dr_grpo)
    expected, _ = step_once(dr_grpo, scaled, step)
    assert_same(found.params, expected.params)
    unweighted, _ = step_once(gui_g1(horizon=4, prompt_weight=None), rollouts)
    plain, _ = step_once(dr_grpo, rollouts, step)
    assert_same(unweighted.params, plain.params)
    with pytest.raises(ValueError, match="column of that name"):
        step_once(gui_g1(), tabular.batch())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradient_weighting(objectives=["a"]), "two or more different components"),
        (lambda: gradient_weighting(objectives=["a", "a"]), "two or more different components"),
        (lambda: gradient_weighting(objectives=BOTH, weights=[1.0]), "a number for each of 2 objectives"),
        (lambda: gradient_weighting(objectives=BOTH, window=0), "window must be at least 1"),
        (lambda: gradient_weighting(objectives=BOTH, step_size=-1), "step_size must be at least 0"),
        (lambda: hypervolume_weighting(objectives=BOTH, reference=[0.0]), "a number for each of 2 objectives"),
        (lambda: hypervolume_weighting(objectives=BOTH, capacity=0), "capacity must be at least 1"),
        (lambda: c_morl(objective="a", constraints=()), "two or more different components"),
        (lambda: c_morl(objective="a", constraints=("b",), keep=1.5), "keep must be between 0 and 1"),
        (lambda: c_morl(objective="a", constraints=("b",), t=0), "t must be above 0"),
        (
            lambda: c_morl(objective="a", constraints=("b",), start={"a": 1.0}),
            r"start must give a value for each of \[",
        ),
        (lambda: c_morl(objective="a", constraints=("b",), barrier="x"), "barrier must be one of returns, ratio"),
        (
            lambda: step_once(c_morl(objective="a", constraints=("b",)), batch()),
            "no component 'a'; it has first, second",
        ),
    ],
)
def test_keywords_without_meaning_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
