"""Credit for tokens from pairs and demonstrations, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import losses, masked, methods
from jaxrl_post.types import TokenStats
from tests.claims.offline import answers


def _pair(tokens=2):
    return answers(jnp.zeros((1, 2, tokens), jnp.int32))


def _logp(*rows):
    """`[2, 1 + T]`, with the prompt's place in front."""
    return TokenStats(logp=jnp.pad(jnp.array(rows, jnp.float32), ((0, 0), (1, 0))))


def _value(method, rollouts, stats):
    targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
    terms = method.loss(stats, rollouts, targets).values()
    found = method.metrics(stats, rollouts, targets)
    total = sum(t.weight * losses.aggregate(t.value, t.mask, t.mode) for t in terms)
    return float(total), {name: float(m.result()) for name, m in found.items()}


def test_guided_dpo_has_the_reported_numbers():
    nothing = _logp([0.0, 0.0], [0.0, 0.0])
    stats = {
        "policy": _logp([1.0, 0.5], [-0.5, 0.2]),
        "reference": nothing,
        "guide": _logp([2.0, -1.0], [1.0, 0.0]),
    }
    loss, metrics = _value(methods.tgdpo(beta=0.1, alpha=0.5), _pair(), stats)
    np.testing.assert_allclose(loss, 0.604919, atol=1e-6)
    np.testing.assert_allclose([metrics["rewards/chosen"], metrics["rewards/rejected"]], [0.1575, -0.0275], atol=1e-6)
    plain, metrics = _value(methods.tgdpo(beta=0.1, alpha=0.0), _pair(), stats)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.18, atol=1e-6)
    np.testing.assert_allclose(plain, _value(methods.dpo(beta=0.1), _pair(), stats)[0], atol=1e-7)


def test_a_guides_weights_have_a_floor_a_sign_by_side_and_no_gradient():
    guide, chosen, mask = jnp.array([[-30.0, 5.0]] * 2), jnp.array([True, False]), jnp.array([[1, 1], [1, 0]])
    weights = losses.token_guidance(guide, 0 * guide, chosen, mask, floor=0.0)
    np.testing.assert_allclose(weights, [[0.0, 1.25], [2.5, 0.0]], atol=1e-6)
    slope = jax.grad(lambda x: losses.token_guidance(x, 0 * x, chosen, mask).sum())(guide)
    assert not np.asarray(slope).any()
    unseen = losses.token_guidance(guide.at[1, 1].set(jnp.nan), 0 * guide, chosen, mask)
    assert np.isfinite(unseen).all()
    with pytest.raises(ValueError, match="chosen must be"):
        losses.token_guidance(guide, guide, chosen[:1], mask)
    with pytest.raises(ValueError, match="alpha"):
        methods.tgdpo(alpha=-0.1)


def test_regret_has_the_reported_number_and_its_symmetries():
    first, second = jnp.array([-10.0]), jnp.array([-12.0])
    np.testing.assert_allclose(losses.cpl(first, second, beta=0.1, bias=0.5), [0.913015], atol=1e-6)
    np.testing.assert_allclose(  # without a bias the same may be added to both
        losses.cpl(first, second, bias=1.0), losses.cpl(first + 7, second + 7, bias=1.0), atol=1e-6
    )
    np.testing.assert_allclose(
        losses.cpl(first, second, first_better=jnp.array([0.0])), losses.cpl(second, first), atol=1e-6
    )
    half = losses.cpl(first, second, first_better=0.5)
    np.testing.assert_allclose(half, (losses.cpl(first, second) + losses.cpl(second, first)) / 2, atol=1e-6)
    for options in ({"bias": 0.0}, {"bias": 1.5}, {"beta": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            losses.cpl(first, second, **options)
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.cpl(**options)


def test_the_segments_of_a_batch_are_compared_by_their_scores():
    logp, scores = jnp.array([-3.0, -1.0, -2.0, jnp.nan]), jnp.array([0.0, 2.0, 2.0, 5.0])
    valid = jnp.array([True, True, True, False])
    found, slope = jax.value_and_grad(lambda x: losses.cpl_ranked(x, scores, valid, beta=0.5, bias=0.7))(logp)
    pairs = [(1, 0), (2, 0)]
    expected = np.mean([losses.cpl(logp[i : i + 1], logp[j : j + 1], beta=0.5, bias=0.7)[0] for i, j in pairs])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isfinite(slope).all()
    assert slope[3] == 0
    assert losses.cpl_ranked(logp[:2], jnp.ones(2)) == 0


def test_a_segment_is_discounted_over_its_own_actions():
    logp, mask = jnp.array([[jnp.nan, -1.0, -1.0, jnp.nan, -1.0]]), jnp.array([[0, 1, 1, 0, 1]])
    np.testing.assert_allclose(losses.segment_logp(logp, mask, gamma=0.5), [-1.75])
    np.testing.assert_allclose(losses.segment_logp(logp, mask, gamma=0.0), [-1.0])
    np.testing.assert_allclose(losses.segment_logp(logp, 0 * mask), [0.0])
    assert np.isfinite(jax.grad(lambda x: losses.segment_logp(x, mask).sum())(logp)).all()
    with pytest.raises(ValueError, match="gamma"):
        losses.segment_logp(logp, mask, gamma=1.1)


def test_regret_with_a_reference_and_without_a_bias_is_dpo():
    stats = {"policy": _logp([-1.0, -0.5], [-0.5, -2.0]), "reference": _logp([-1.5, -1.0], [-1.0, -1.0])}
    of_regret, metrics = _value(methods.cpl(beta=0.1, bias=1.0, reference=True), _pair(), stats)
    of_dpo, expected = _value(methods.dpo(beta=0.1), _pair(), stats)
    np.testing.assert_allclose(of_regret, of_dpo, rtol=1e-6)
    assert metrics == pytest.approx(expected)
    discounted, _ = _value(methods.cpl(beta=0.1, bias=0.5, gamma=0.5, nll_weight=2.0), _pair(), stats)
    expected = float(losses.cpl(jnp.array([-1.25]), jnp.array([-1.5]), beta=0.1, bias=0.5)[0]) + 2 * 0.75
    np.testing.assert_allclose(discounted, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("generator", "value", "weight"),
    [("total_variation", -0.15, 1.0), ("chi2", -0.144375, 0.925), ("hellinger", -0.130435, 0.756144)],
)
def test_demonstrations_weigh_less_the_further_the_policy_has_come(generator, value, weight):
    reference, policy = _logp([0.0] * 3, [0.0] * 3), _logp([0.1, -0.2, 0.4], [0.1, -0.2, 0.4])
    method, rollouts = methods.f_sft(generator=generator, beta=0.5), _pair(3)
    loss, metrics = _value(method, rollouts, {"policy": policy, "reference": reference})
    np.testing.assert_allclose([loss, metrics["rewards/chosen"]], [value, 0.15], atol=1e-6)
    targets, _ = method.targets((), rollouts, {"policy": policy, "reference": reference}, jax.random.key(0))

    def total(logp):
        term = method.loss({"policy": TokenStats(logp=logp), "reference": reference}, rollouts, targets)["f_sft"]
        return losses.aggregate(term.value, term.mask, term.mode)

    np.testing.assert_allclose(jax.grad(total)(policy.logp)[:, 1:], -weight * 0.5 / 2, atol=1e-6)
    tokens, _ = _value(
        methods.f_sft(generator=generator, beta=0.5, level="token"),
        rollouts,
        {"policy": policy, "reference": reference},
    )
    expected = np.mean([losses.f_sft(jnp.array([0.5 * x]), generator)[0] for x in (0.1, -0.2, 0.4)])
    np.testing.assert_allclose(tokens, expected, rtol=1e-5)


def test_hellinger_has_no_pole_and_keeps_its_slope():
    slope = jax.vmap(jax.grad(lambda r: losses.f_sft(r[None], "hellinger")[0]))
    below = jnp.array([-1e4, -1.0, -0.6, -0.5, -0.499])
    np.testing.assert_allclose(slope(below)[:3], -4.0)
    np.testing.assert_allclose(slope(below)[3:], -4.0, rtol=0.01)
    empty = answers(jnp.zeros((2, 1, 2), jnp.int32))
    empty = empty.replace(mask=empty.mask.at[0].set(0.0))
    stats = {"policy": _logp([5.0, 5.0], [1.0, 1.0]), "reference": _logp([0.0, 0.0], [0.0, 0.0])}
    alone, _ = _value(methods.f_sft(generator="chi2", beta=0.5), empty, stats)
    np.testing.assert_allclose(alone, -(1 - 0.25), rtol=1e-6)  # an answer without tokens is not there
    with pytest.raises(ValueError, match="generator"):
        losses.f_sft(jnp.zeros(1), "kl")


def test_the_credit_of_one_step_has_the_reported_numbers():
    policy, reference = jnp.log(jnp.array([[0.731059, 0.268941]])), jnp.log(jnp.array([[0.5, 0.5]]))
    credit = losses.implicit_reward(policy, reference, beta=1.0)
    value = np.log((np.e + 1) / 2)
    np.testing.assert_allclose(value, 0.620115, atol=1e-6)
    np.testing.assert_allclose(credit, [[1 - value, -value]], atol=1e-5)


def test_dpo_on_all_pairs_learns_the_optimal_advantage_of_every_token():
    """Bradley and Terry's probabilities of every pair of the 9 answers of two tokens, in place of labels."""
    beta, rng = 0.5, np.random.default_rng(0)
    reward, reference = rng.normal(size=(4, 3)), jax.nn.log_softmax(rng.normal(size=(4, 3)))
    first, second = np.divmod(np.arange(9), 3)
    total = reward[0, first] + reward[1 + first, second]
    wins = jax.nn.sigmoid(total[:, None] - total[None, :])
    value = beta * jax.nn.logsumexp(reference[1:] + reward[1:] / beta, axis=1)
    q = reward + np.concatenate([value[None], np.zeros((3, 3))])
    advantage = q - beta * jax.nn.logsumexp(reference + q / beta, axis=1, keepdims=True)

    def log_probs(logits):
        table = jax.nn.log_softmax(logits)
        return table[0, first] + table[1 + first, second]

    def loss(logits):
        own, ref = log_probs(logits), log_probs(reference)
        pairs = (
            x.reshape(-1) for x in (*jnp.broadcast_arrays(own[:, None], own), *jnp.broadcast_arrays(ref[:, None], ref))
        )
        return jnp.sum(wins.reshape(-1) * losses.dpo(*pairs, beta=beta))

    optimizer = optax.adam(0.05)

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = jax.lax.scan(step, (reference, optimizer.init(reference)), None, length=500)
    credit = losses.implicit_reward(jax.nn.log_softmax(logits), reference, beta=beta)
    np.testing.assert_allclose(credit, advantage, atol=0.01)
    assert masked.sum(jnp.exp(reference) * credit, jnp.ones((4, 3))) < 0  # the reference loses, as Gibbs would have it
