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


def test_a_flawed_success_is_worth_as_much_as_its_group_makes_it():
    """The paper's numbers: it gains while more are wrong than sound, and loses afterwards."""

    def normalized(sound, flawed, wrong):
        correct = jnp.array([1] * (sound + flawed) + [0] * wrong)
        found = rewards.flawed_success(correct, jnp.array([0] * sound + [1] * (flawed + wrong)))
        scaled = advantages.grpo(found[None], ddof=0, eps=0.0)[0]
        return scaled[jnp.array([0, sound, sound + flawed])]

    np.testing.assert_allclose(normalized(2, 2, 4), [1.50755, 0.30151, -0.90453], atol=1e-5)
    np.testing.assert_allclose(normalized(5, 2, 1), [0.70711, -0.70711, -2.12132], atol=1e-5)
    assert rewards.flawed_success(jnp.array([1, 0]), jnp.array([1, 1]), penalty=0.25).tolist() == [0.75, -1.0]
    with pytest.raises(ValueError, match="penalty"):
        rewards.flawed_success(jnp.ones(1), jnp.ones(1), penalty=-1.0)
    with pytest.raises(ValueError, match="flawed"):
        rewards.flawed_success(jnp.ones(1), jnp.ones(2))


def test_a_bonus_is_worth_nothing_without_its_base():
    found = rewards.base_and_bonus(jnp.array([0.9, 0.1, 0.0, 1.0]), jnp.array([0.5, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(found, [0.72, 0.10, 0.0, 0.6], rtol=1e-6)
    with pytest.raises(ValueError, match="base_weight"):
        rewards.base_and_bonus(jnp.ones(1), jnp.ones(1), base_weight=1.5)


def test_evidence_counts_mostly_with_a_right_answer():
    f2 = 5 / 11
    found = rewards.grounded_answer(jnp.array([1.0, 0.0, 1.0, 0.0]), jnp.array([f2, f2, 0.0, 1.0]))
    np.testing.assert_allclose(found, [1.45455, 0.045455, 1.0, 0.1], rtol=1e-5)
    with pytest.raises(ValueError, match="eta"):
        rewards.grounded_answer(jnp.ones(1), jnp.ones(1), eta=-0.1)


def test_a_score_that_likes_the_wrong_answers_better_is_trusted_less():
    outcome = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    score = jnp.array([[0.2, 0.9, 0.7], [0.5, 0.4, 0.5], [0.0, 1.0, 0.5], [0.1, 0.2, 0.9]])
    np.testing.assert_allclose(rewards.trust(outcome, score), [np.exp(-0.6), 1.0, 1.0, np.exp(-0.75)], rtol=1e-6)
    valid = jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1]])
    assert abs(float(rewards.trust(outcome, score, valid)[0]) - np.exp(-0.7)) < 1e-6
    assert abs(float(rewards.trust(outcome, score, valid)[3]) - np.exp(-0.7)) < 1e-6
    gradient = jax.grad(lambda x: rewards.trust(outcome, x).sum())(score)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    with pytest.raises(ValueError, match="score"):
        rewards.trust(outcome, score[:, :2])


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


def test_layered_rewards_reach_the_advantage():
    nan = float("nan")
    found = _advantages(methods.fapo(correct="won", flawed="flaw"), won=[1.0, 1.0, 0.0], flaw=[nan, 1.0, 1.0])
    np.testing.assert_allclose(found, advantages.grpo(jnp.array([[1.0, 0.0, -1.0]]))[0], rtol=1e-6)
    plain = {"normalize_std": False}
    found = _advantages(methods.base_and_bonus(base="a", bonus="b", **plain), a=[0.9, 0.1], b=[0.5, 1.0])
    np.testing.assert_allclose(found, [0.31, -0.31], atol=1e-6)
    found = _advantages(methods.longrlvr(answer="a", grounding="b", **plain), a=[1.0, 0.0], b=[0.5, 1.0])
    np.testing.assert_allclose(found, [0.7, -0.7], atol=1e-6)


def test_the_score_of_reasoning_fades():
    method = methods.trust_grpo(outcome="won", score="judge", decay_steps=2.0, normalize_std=False)
    parts = {"won": jnp.array([[1.0, 0.0]]), "judge": jnp.array([[0.2, 0.8]])}
    made = answers(jnp.zeros((1, 2, 1), jnp.int32)).replace(rewards=parts)
    stats, key = {"policy": TokenStats(logp=made.logp)}, jax.random.key(0)
    state = method.init(made, 1)
    for step in range(3):
        targets, state = method.targets(state, made, stats, key)
        weight = 0.3 * np.exp(-0.6) * np.exp(-step / 2)
        np.testing.assert_allclose(targets.advantages[:, 1], np.array([0.5, -0.5]) * (1 - 0.6 * weight), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.fapo(correct="a", flawed="b", penalty=-1.0), "penalty"),
        (lambda: methods.base_and_bonus(base="a", bonus="b", base_weight=2.0), "base_weight"),
        (lambda: methods.longrlvr(answer="a", grounding="b", eta=2.0), "eta"),
        (lambda: methods.trust_grpo(outcome="a", score="b", decay_steps=0.0), "decay_steps"),
        (lambda: methods.trust_grpo(outcome="a", score="b", beta=0.1, kl_in="reward"), "kl_in"),
        (lambda: methods.verified_score(score="a", correct="b", alpha=0.0), "alpha"),
        (lambda: methods.verified_score(score="a", correct="b", beta=0.1, kl_in="reward"), "kl_in"),
        (lambda: methods.gated_rewards(levels="a"), "levels"),
        (lambda: methods.gated_rewards(levels=["a"], gates=[0.0, 1.0]), "gates"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
