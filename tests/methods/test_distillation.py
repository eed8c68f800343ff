"""What methods with a teacher minimise, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, losses, methods
from jaxrl_post.data import to_rollouts
from jaxrl_post.types import TokenStats


def _group(rewards, *, logp=-0.5):
    """One prompt whose answers have one token each."""
    made = to_rollouts([[0]], [[[0]] * len(rewards)], length=2)
    return made.replace(logp=logp * made.mask, reward=jnp.array([rewards], jnp.float32))


def _loss(method, rollouts, stats, state=None):
    """The reduced loss as a function of the policy's log-probs, and the state after the step."""
    state = method.init(rollouts, 1) if state is None else state
    targets, after = method.targets(state, rollouts, stats, jax.random.key(0))

    def reduced(logp):
        found = {**stats, "policy": stats["policy"].replace(logp=logp)}
        terms = method.loss(found, rollouts, targets).values()
        return sum(t.weight * losses.aggregate(t.value, t.mask, t.mode, horizon=t.horizon) for t in terms)

    return reduced, after


def _stats(rollouts, **roles):
    return {role: TokenStats(logp=logp * rollouts.mask) for role, logp in roles.items()}


def test_the_advantage_of_distillation_has_the_reported_numbers():
    student, base, teacher, mask = (jnp.full((1, 1), x) for x in (-1.0, -1.2, -0.5, 1.0))
    for factor, expected in ((1.0, 0.5), (1.25, 0.675), (0.0, -0.2)):
        found = advantages.opd(teacher, student, mask, base_logp=base, extrapolation=factor)
        np.testing.assert_allclose(found, [[expected]], atol=1e-6)
    np.testing.assert_allclose(advantages.opd(teacher, student, mask), [[0.5]], atol=1e-6)
    with pytest.raises(ValueError, match="give base_logp"):
        advantages.opd(teacher, student, mask, extrapolation=1.5)
    with pytest.raises(ValueError, match="base_logp"):
        advantages.opd(teacher, student, mask, base_logp=base[0])


def test_what_a_token_of_the_mask_holds_outside_of_it_is_not_read():
    nothing = jnp.array([[jnp.nan, -1.0]])
    found = advantages.opd(nothing, nothing, jnp.array([[0, 1]]), base_logp=nothing, extrapolation=2.0, clip=1.0)
    assert found.tolist() == [[0.0, 0.0]]


def test_extrapolation_reads_the_reference_and_a_number_of_the_data_picks_the_teacher():
    rollouts = to_rollouts([[0], [0]], [[[0]], [[0]]], length=2)
    rollouts = rollouts.replace(extras={"teacher": jnp.array([1.0, 0.0])})
    stats = _stats(rollouts, policy=-1.0, reference=-1.2, first=-0.5, second=-0.7)
    method = methods.opd(teachers=["first", "second"], extrapolation=1.25)
    assert method.wants == {"teacher"}
    assert sorted(methods.opd(teachers="first").needs) == ["first", "policy"]
    targets, _ = method.targets((), rollouts.replace(logp=-rollouts.mask), stats, jax.random.key(0))
    np.testing.assert_allclose(targets.advantages[:, 1], [1.25 * 0.5 - 0.2, 0.675], atol=1e-6)
    unknown = rollouts.replace(logp=-rollouts.mask, extras={"teacher": jnp.array([2.0, 0.0])})
    targets, _ = method.targets((), unknown, stats, jax.random.key(0))
    assert np.isnan(targets.advantages[0, 1])
    assert np.isfinite(targets.advantages[1, 1])


@pytest.mark.parametrize(("form", "value", "pull"), [("k2", 0.245, 0.7), ("k3", 0.196585, 0.503415)])
def test_the_pull_to_a_teacher_has_the_reported_numbers(form, value, pull):
    rollouts = _group([1.0, 0.0])
    stats = _stats(rollouts, policy=-0.5, teacher=-1.2)
    kwargs = {"normalize_std": False, "aggregation": "token_mean"}
    with_teacher, _ = _loss(methods.kdrl(form=form, teacher_weight=0.01, **kwargs), rollouts, stats)
    without, _ = _loss(methods.grpo(beta=0.0, **kwargs), rollouts, stats)
    logp = stats["policy"].logp
    np.testing.assert_allclose(with_teacher(logp) - without(logp), 0.01 * value, atol=1e-7)
    # Two tokens share the mean; the advantages are +-0.5.
    expected = -(np.array([0.5, -0.5]) - 0.01 * pull) / 2
    np.testing.assert_allclose(jax.grad(with_teacher)(logp)[:, 1], expected, atol=1e-6)


def test_a_teacher_is_asked_about_failures_alone():
    rewards, valid = jnp.array([[1.0, 0.0], [0.0, 9.0], [0.0, 0.0]]), jnp.array([[1, 1], [1, 0], [0, 0]], bool)
    assert advantages.failed(rewards, valid).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert advantages.failed(rewards, valid, by="group").tolist() == [[0, 0], [1, 0], [0, 0]]
    rollouts = _group([1.0, 0.0])
    stats = _stats(rollouts, policy=-0.5, teacher=-1.2)
    kwargs = {"teacher_weight": 1.0, "normalize_std": False, "aggregation": "token_mean"}
    logp = stats["policy"].logp
    slopes = {
        by: jax.grad(_loss(methods.kdrl(only_failed=by, **kwargs), rollouts, stats)[0])(logp)[:, 1].tolist()
        for by in (None, "response", "group")
    }
    np.testing.assert_allclose(slopes[None], [(-0.5 + 0.7) / 2, (0.5 + 0.7) / 2], atol=1e-6)
    np.testing.assert_allclose(slopes["response"], [-0.25, (0.5 + 0.7) / 2], atol=1e-6)
    np.testing.assert_allclose(slopes["group"], [-0.25, 0.25], atol=1e-6)


def test_the_weight_of_the_teacher_falls_to_its_end_and_stays_there():
    rollouts = _group([1.0, 0.0])
    stats = _stats(rollouts, policy=-0.5, teacher=-1.2)
    method = methods.kdrl(teacher_weight=0.3, final_weight=0.1, anneal_steps=2)
    state, weights = method.init(rollouts, 1), []
    for _ in range(4):
        targets, state = method.targets(state, rollouts, stats, jax.random.key(0))
        weights.append(float(targets.extras["teacher_weight"][0]))
    np.testing.assert_allclose(weights, [0.3, 0.2, 0.1, 0.1], rtol=1e-6)


def test_in_the_reward_the_teacher_is_compared_within_the_group():
    rollouts = _group([0.0, 0.0])
    rollouts = rollouts.replace(logp=jnp.array([[0.0, -0.5], [0.0, -1.5]]))
    stats = {"policy": TokenStats(logp=rollouts.logp), "teacher": TokenStats(logp=-1.0 * rollouts.mask)}
    method = methods.kdrl(form="k1_in_reward", teacher_weight=0.1, normalize_std=False)
    targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
    np.testing.assert_allclose(targets.advantages[:, 1], [-0.05, 0.05], atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "k1"}, "form"),
        ({"teacher_weight": -1.0}, "teacher_weight"),
        ({"final_weight": 1e-3}, "go together"),
        ({"final_weight": 1.0, "anneal_steps": 3}, "final_weight"),
        ({"only_failed": "all"}, "only_failed"),
        ({"beta": 0.1, "kl_in": "reward"}, "kl_in"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        methods.kdrl(**options)
    with pytest.raises(ValueError, match="teachers"):
        methods.opd(teachers=[])
