"""Preferences between a policy's own answers, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, losses, methods
from jaxrl_post.types import TokenStats
from tests.claims.offline import answers


def _rollouts(rewards, valid=None):
    """Answers of one token, in groups with these rewards."""
    rewards = jnp.array(rewards, jnp.float32)
    made = answers(jnp.zeros((*rewards.shape, 1), jnp.int32)).replace(reward=rewards)
    return made if valid is None else made.replace(valid=jnp.array(valid, bool))


def _stats(rollouts, **ratios):
    """Log-probs by role, of each answer's one token."""
    return {
        role: TokenStats(logp=jnp.array(values, jnp.float32).reshape(-1, 1) * rollouts.mask)
        for role, values in ratios.items()
    }


def _terms(method, rollouts, stats):
    targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
    terms = method.loss(stats, rollouts, targets)
    metrics = {name: float(metric.result()) for name, metric in method.metrics(stats, rollouts, targets).items()}
    return {name: float(t.weight * losses.aggregate(t.value, t.mask, t.mode)) for name, t in terms.items()}, metrics


def test_online_dpo_compares_the_best_with_the_worst_and_optimism_has_the_reported_numbers():
    rollouts = _rollouts([[1.0, 0.0], [2.0, 2.0]])
    stats = _stats(rollouts, policy=[[1.5, -0.5], [0.5, 0.5]], reference=[[0.0, 0.0], [0.0, 0.0]])
    terms, metrics = _terms(methods.online_dpo(beta=0.1, optimism=1.0), rollouts, stats)
    np.testing.assert_allclose([terms["preference"], terms["optimism"]], [0.598139, 0.05], atol=1e-6)
    assert metrics["pairs"] == 1
    np.testing.assert_allclose([metrics["rewards/chosen"], metrics["rewards/rejected"]], [0.15, -0.05], atol=1e-6)
    three = _rollouts([[1.0, -1.0, 0.0]])
    stats = _stats(three, policy=[[2.0, -1.0, -3.0]], reference=[[0.0, 0.0, 0.0]])
    terms, _ = _terms(methods.online_dpo(beta=0.1, optimism=1e-3), three, stats)
    np.testing.assert_allclose([terms["preference"], terms["optimism"]], [0.554355, 1e-4 * -2 / 3], atol=1e-6)
    every, _ = _terms(methods.online_dpo(beta=0.1, pairs="all"), three, stats)
    expected = np.mean([np.log1p(np.exp(-0.1 * x)) for x in (3.0, 5.0, -2.0)])
    np.testing.assert_allclose(every["preference"], expected, rtol=1e-6)


def test_direct_nash_has_the_reported_number_and_its_minimum_is_a_step_of_soft_policy_iteration():
    rollouts = _rollouts([[0.7, 0.3]])
    stats = _stats(rollouts, policy=[[0.2, 0.0]], reference=[[0.0, 0.0]])
    terms, _ = _terms(methods.online_dpo(beta=1.0, labels="soft"), rollouts, stats)
    np.testing.assert_allclose(terms["preference"], 0.678401, atol=1e-6)
    rng = np.random.default_rng(0)
    rewards, before = jnp.asarray(rng.random((3, 5)), jnp.float32), jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    valid = jnp.ones((3, 5), bool).at[0, 2].set(False)

    def loss(logp):
        return losses.dno(logp, before, rewards, valid, beta=0.4).sum()

    after = jax.nn.log_softmax(before + rewards / 0.4)
    np.testing.assert_allclose(jax.grad(loss)(after), 0.0, atol=1e-6)
    assert float(jnp.max(jnp.abs(jax.grad(loss)(before)))) > 1e-3
    assert jax.grad(loss)(before)[0, 2] == 0
    alone = losses.dno(before, before, rewards, valid & (jnp.arange(5) == 1))
    assert alone.tolist() == [0, 0, 0]


def test_mirror_descent_has_the_reported_number_and_the_exact_step_for_its_minimum():
    two, one, zero = jnp.array([2.0]), jnp.array([1.0]), jnp.zeros(1)
    np.testing.assert_allclose(losses.inpo(two, zero, one, zero, 1.5 * one, zero), [4356.0], rtol=1e-5)
    at_reference = losses.inpo(two, zero, one, zero, 5 * one, zero, eta=0.3, tau=0.3)
    np.testing.assert_allclose(at_reference, losses.ipo(two, zero, one, zero, beta=0.3), rtol=1e-5)
    rng = np.random.default_rng(1)
    skew = rng.normal(size=(4, 4))
    wins = jax.nn.sigmoid(jnp.asarray(skew - skew.T))
    reference, before = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=4))) for _ in range(2))
    eta, tau, p = 0.5, 0.2, jnp.exp(before)
    after = (tau * reference + (eta - tau) * before + wins @ p) / eta
    i, j = np.divmod(np.arange(16), 4)

    def loss(logp):
        """Over pairs that the policy samples, and their labels."""

        def labelled(won, lost):
            return losses.inpo(
                logp[won], logp[lost], reference[won], reference[lost], before[won], before[lost], eta=eta, tau=tau
            )

        return jnp.sum(p[i] * p[j] * (wins[i, j] * labelled(i, j) + wins[j, i] * labelled(j, i)))

    np.testing.assert_allclose(jax.grad(loss)(after), 0.0, atol=1e-5)
    assert float(jnp.max(jnp.abs(jax.grad(loss)(before)))) > 1e-2


def test_inpo_takes_the_best_and_the_worst_of_a_group_and_leaves_out_equal_ones():
    rollouts = _rollouts([[0.2, 0.9, 0.1], [1.0, 1.0, 1.0]])
    stats = _stats(
        rollouts,
        policy=[[9.0, 2.0, 0.0], [1, 2, 3]],
        reference=[[9.0, 1.0, 0.0], [1, 2, 3]],
        previous=[[9.0, 1.5, 0.0], [1, 2, 3]],
    )
    terms, _ = _terms(methods.inpo(), rollouts, stats)
    np.testing.assert_allclose(terms["inpo"], 4356.0, rtol=1e-5)
    with pytest.raises(ValueError, match="tau"):
        methods.inpo(eta=0.1, tau=0.2)
    with pytest.raises(ValueError, match="tau"):
        losses.inpo(*[jnp.zeros(1)] * 6, eta=0.1, tau=0.2)


def test_win_rates_are_of_the_others_that_count():
    cycle = jnp.array([[[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]])
    assert advantages.win_rate(cycle).tolist() == [[0.5, 0.5, 0.5]]
    assert advantages.win_rate(advantages.order_wins(jnp.array([[3.0, 2.0, 1.0]]))).tolist() == [[1.0, 0.5, 0.0]]
    assert advantages.win_rate(cycle, jnp.array([[1, 1, 0]])).tolist() == [[1.0, 0.0, 0.0]]
    assert advantages.win_rate(cycle, jnp.array([[1, 0, 0]])).tolist() == [[0.5, 0.0, 0.0]]
    assert advantages.win_rate(jnp.ones((2, 1, 1))).tolist() == [[0.5], [0.5]]
    wins = advantages.order_wins(jnp.array([[jnp.nan, 2.0, 1.0]]), jnp.array([[0, 1, 1]]), scale=0.5)
    np.testing.assert_allclose(wins[0, 1], [0.5, 0.5, jax.nn.sigmoid(2.0)], rtol=1e-6)
    with pytest.raises(ValueError, match="each answer against each"):
        advantages.win_rate(jnp.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="scale"):
        advantages.order_wins(jnp.ones((1, 2)), scale=0.0)


def test_self_play_earns_the_win_rate_less_a_half():
    rollouts = _rollouts([[5.0, -1.0, 7.0], [0.0, 3.0, 9.0]], [[1, 1, 1], [1, 1, 0]])
    stats = _stats(rollouts, policy=[[0.0] * 3] * 2)
    by_score, _ = methods.spo().targets((), rollouts, stats, jax.random.key(0))
    np.testing.assert_allclose(by_score.advantages[:, 1], [0.0, -0.5, 0.5, -0.5, 0.5, 0.0])
    given = rollouts.replace(reward=jnp.array([[0.5, 0.25, 0.75], [0.0, 1.0, 9.0]]))
    by_rate, _ = methods.spo(reward="win_rate").targets((), given, stats, jax.random.key(0))
    np.testing.assert_allclose(by_rate.advantages[:, 1], [0.0, -0.25, 0.25, -0.5, 0.5, 0.0])
    for options, message in (
        ({"reward": "win_rate", "scale": 1.0}, "scale"),
        ({"reward": "elo"}, "reward"),
        ({"beta": 0.1, "kl_in": "reward"}, "kl_in"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.spo(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"labels": "soft", "pairs": "all"}, "pairs"), ({"labels": "x"}, "labels"), ({"optimism": -1.0}, "optimism")],
)
def test_impossible_options_of_online_dpo_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        methods.online_dpo(**options)


def test_a_batch_without_any_pair_has_no_loss_and_no_gradient():
    rollouts = _rollouts([[1.0, 0.0], [2.0, 2.0]], [[1, 0], [1, 1]])
    reference = _stats(rollouts, reference=[[0.0, 0.0], [0.0, 0.0]])
    method = methods.online_dpo()
    targets, _ = method.targets((), rollouts, reference, jax.random.key(0))

    def loss(logp):
        term = method.loss({**reference, "policy": TokenStats(logp=logp)}, rollouts, targets)["preference"]
        return losses.aggregate(term.value, term.mask, term.mode)

    value, slope = jax.value_and_grad(loss)(rollouts.mask * 0.3)
    assert value == 0
    assert not np.asarray(slope).any()


def test_a_step_of_nash_md_has_the_reported_numbers_and_its_end_is_the_equilibrium():
    wins = jnp.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    policy, uniform = jnp.array([0.5, 0.3, 0.2]), jnp.full(3, 1 / 3)
    after, mixture = advantages.nash_md_step(policy, uniform, wins, eta=1.0, tau=0.1)
    np.testing.assert_allclose(mixture, [0.483132, 0.305071, 0.211797], atol=1e-6)
    np.testing.assert_allclose(wins @ mixture, [0.546637, 0.364333, 0.589030], atol=1e-6)
    np.testing.assert_allclose(after, [0.504139, 0.265285, 0.230576], atol=1e-6)
    for _ in range(500):
        policy, _ = advantages.nash_md_step(policy, uniform, wins)
    np.testing.assert_allclose(policy, uniform, atol=1e-5)
    assert float(advantages.exploitability(policy, wins)) < 1e-5
    with pytest.raises(ValueError, match="eta \\* tau"):
        advantages.nash_md_step(policy, uniform, wins, eta=2.0, tau=0.6)
    with pytest.raises(ValueError, match="wins must be"):
        advantages.exploitability(policy, wins[:2])


@pytest.mark.parametrize("kl", ["token", "sequence"])
def test_the_gradient_of_nash_md_is_the_win_rate_less_a_half_and_the_kl(kl):
    made = answers(jnp.zeros((2, 1, 2), jnp.int32)).replace(reward=jnp.array([[0.9], [0.2]]))
    logp = jnp.array([[0.0, -1.0, -0.5], [0.0, -2.0, -0.1]])
    made = made.replace(logp=logp)
    stats = {"policy": TokenStats(logp=logp), "reference": TokenStats(logp=logp - jnp.array([0.0, 0.3, -0.7]))}
    method = methods.nash_md(tau=0.1, kl=kl)
    targets, _ = method.targets((), made, stats, jax.random.key(0))

    def loss(logp):
        terms = method.loss({**stats, "policy": TokenStats(logp=logp)}, made, targets).values()
        return sum(t.weight * losses.aggregate(t.value, t.mask, t.mode) for t in terms)

    ratio = np.array([0.3, -0.7]) if kl == "token" else np.full(2, -0.4)
    expected = -(np.array([[0.4], [-0.3]]) - 0.1 * ratio) / 2
    np.testing.assert_allclose(jax.grad(loss)(logp)[:, 1:], expected, atol=1e-6)
    assert set(methods.nash_md(tau=0.0).needs) == {"policy"}
    with pytest.raises(ValueError, match="kl"):
        methods.nash_md(kl="none")


def test_listwise_labels_have_the_reported_numbers():
    scores, nothing = jnp.array([[2.0, 1.0, 0.0]]), jnp.zeros((1, 3))
    np.testing.assert_allclose(losses.listwise(nothing, nothing, scores), [np.log(3)], rtol=1e-6)
    slope = jax.grad(lambda x: losses.listwise(x, nothing, scores, beta=0.5).sum())(nothing)
    np.testing.assert_allclose(slope, [0.5 * (1 / 3 - np.array([0.66524, 0.24473, 0.09003]))], atol=1e-5)
    valid = jnp.array([[1, 0, 1], [1, 0, 0]])
    unknown = jnp.array([[2.0, jnp.nan, 0.0]] * 2)
    found, slope = jax.value_and_grad(lambda x: losses.listwise(x, unknown, unknown, valid, temperature=2.0).sum())(
        unknown
    )
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(slope, [[0.1 * (0.5 - 0.731059), 0, 0.1 * (0.5 - 0.268941)], [0, 0, 0]], atol=1e-6)
    rollouts = _rollouts([[2.0, 1.0, 0.0]])
    stats = _stats(rollouts, policy=[[0.0] * 3], reference=[[0.0] * 3])
    terms, _ = _terms(methods.online_dpo(labels="listwise"), rollouts, stats)
    np.testing.assert_allclose(terms["preference"], np.log(3), rtol=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        methods.online_dpo(temperature=1.0)
