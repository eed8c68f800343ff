"""Rewards from several, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, methods, rewards
from jaxrl_post.types import TokenStats
from tests.claims.offline import answers


def test_every_right_answer_is_above_every_wrong_one_and_the_score_ranks_within():
    found = rewards.verified_score(jnp.array([2.0, 2.0, -100.0, 100.0]), jnp.array([1, 0, 1, 0]))
    np.testing.assert_allclose(found, [0.73106, -0.26894, 0.0, 0.0], atol=1e-5)
    assert float(found[2]) > 0 > float(found[3])
    with pytest.raises(ValueError, match="alpha"):
        rewards.verified_score(found, found, alpha=0.0)
    with pytest.raises(ValueError, match="correct"):
        rewards.verified_score(found, found[:2])


def test_an_easy_reward_counts_only_behind_open_gates():
    form, tool = jnp.full(4, 0.2), jnp.array([0.3, 0.3, 0.0, 0.3])
    outcome = jnp.array([0.0, 1.0, 1.0, 0.5])
    np.testing.assert_allclose(rewards.gated_sum([form, tool, outcome]), [0.0, 1.5, 1.0, 1.0], rtol=1e-6)
    gated = jax.jit(lambda *levels: rewards.gated_sum(levels, [0.0, 0.25, 0.6]))(form, tool, outcome)
    np.testing.assert_allclose(gated, [0.0, 1.5, 1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rewards.gated_sum([form]), form)
    open_gates = rewards.gated_sum([form, tool, outcome], [-jnp.inf] * 3)
    np.testing.assert_allclose(open_gates, form + tool + outcome, rtol=1e-6)
    for levels, gates, message in (
        ([], None, "at least one"),
        ([form], [0.0, 1.0], "gates"),
        ([form, form[:2]], None, "levels"),
    ):
        with pytest.raises(ValueError, match=message):
            rewards.gated_sum(levels, gates)


def test_zones_order_answers_of_equal_outcome_and_small_differences_make_none():
    correct, near = jnp.array([0.0, 0.0, 0.0, 1.0, 0.0]), jnp.array([0.7, 0.55, -0.1, 1.0, 1.0])
    np.testing.assert_allclose(rewards.sweet_spot(correct, near), [1 / 3, 1 / 3, 0.0, 1.5, 0.5], rtol=1e-6)
    amplified = rewards.sweet_spot(correct, near, ladder="amplified")
    np.testing.assert_allclose(amplified, [3 / 14, 3 / 14, 0.0, 1.5, 0.5], rtol=1e-6)
    assert rewards.sweet_spot(correct, near, zones=1).tolist() == correct.tolist()
    fine = rewards.sweet_spot(correct[:2], near[:2], zones=10**6)
    np.testing.assert_allclose(fine, [0.35, 0.275], atol=1e-5)
    for options in ({"zones": 0}, {"alpha": -1.0}, {"ladder": "none"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            rewards.sweet_spot(correct, near, **options)
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.sweet_spot(correct="a", proximity="b", **options)


def _advantages(method, **components):
    parts = {name: jnp.array([values], jnp.float32) for name, values in components.items()}
    made = answers(jnp.zeros((1, len(next(iter(components.values()))), 1), jnp.int32)).replace(rewards=parts)
    targets, _ = method.targets((), made, {"policy": TokenStats(logp=made.logp)}, jax.random.key(0))
    return targets.advantages[:, 1]


def test_methods_take_components_by_name_and_compare_what_is_made_of_them():
    nan = float("nan")
    score, correct = [2.0, nan, -1.0, 2.0], [1.0, 0.0, 1.0, 0.0]
    found = _advantages(methods.verified_score(score="rm", correct="right"), rm=score, right=correct)
    shaped = rewards.verified_score(jnp.array([[2.0, 0.0, -1.0, 2.0]]), jnp.array([correct]))
    np.testing.assert_allclose(found, advantages.grpo(shaped)[0], rtol=1e-6)
    wrong = _advantages(methods.verified_score(score="rm", correct="right"), rm=[1.0, 2.0], right=[0.0, 0.0])
    assert float(wrong[1]) > 0.5  # a group of wrong answers is not lost
    found = _advantages(
        methods.gated_rewards(levels=["form", "won"], normalize_std=False), form=[0.2, 0.2, 0.0], won=[0.0, 1.0, 1.0]
    )
    np.testing.assert_allclose(found, np.array([0.0, 1.2, 1.0]) - 2.2 / 3, atol=1e-6)
    found = _advantages(
        methods.sweet_spot(correct="won", proximity="near", normalize_std=False),
        won=[0.0, 1.0],
        near=[0.7, float("nan")],
    )
    np.testing.assert_allclose(found, [-1 / 3, 1 / 3], atol=1e-6)
    with pytest.raises(ValueError, match=r"no component 'form' of the reward.*there are won"):
        _advantages(methods.gated_rewards(levels=["form", "won"]), won=[0.0, 1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.verified_score(score="a", correct="b", alpha=0.0), "alpha"),
        (lambda: methods.verified_score(score="a", correct="b", beta=0.1, kl_in="reward"), "kl_in"),
        (lambda: methods.gated_rewards(levels="a"), "levels"),
        (lambda: methods.gated_rewards(levels=["a"], gates=[0.0, 1.0]), "gates"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
