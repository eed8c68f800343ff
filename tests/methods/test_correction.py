"""What corrections, masks and weighted estimators do to the terms of a method, on numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from jaxrl_post.types import TokenStats
from tests.methods.test_composition import rollouts

OLD = jnp.log(jnp.array([[1.0, 0.6, 1.0], [1.0, 0.2, 0.3]]))
SAMPLER = jnp.log(jnp.array([[1.0, 0.2, 1.0], [1.0, 0.4, 0.3]]))  # ratios 3 | 1/2, 1
STATS = {"policy": TokenStats(logp=OLD, entropy=jnp.array([[0, 0.1, 0], [0, 0.2, 0.9]]))}


def _batch():
    return rollouts([1.0, 3.0]).replace(logp=SAMPLER)


def _method(correction=None, **options):
    return methods.grpo(beta=0.0, aggregation="token_mean", old_logp="recompute", correction=correction, **options)


def _terms(method, batch, stats=STATS, later=None):
    made = method.targets(method.init(batch, 1), batch, stats, jax.random.key(0))[0]
    return method.loss(later or stats, batch, made), made


def _policy(method, batch=None, **given):
    terms, made = _terms(method, _batch() if batch is None else batch, **given)
    return np.asarray(terms["policy"].value), np.asarray(made.mask), terms["policy"].mask


@pytest.mark.parametrize(
    ("correction", "factors", "kept"),
    [
        ("tis", [[2.0, 0], [0.5, 1.0]], [[1, 0], [1, 1]]),
        ({"name": "tis", "high": None}, [[3.0, 0], [0.5, 1.0]], [[1, 0], [1, 1]]),
        ({"name": "icepop", "low": 0.4, "high": 2.0}, [[0.0, 0], [0.5, 1.0]], [[1, 0], [1, 1]]),
        ({"name": "mis", "high": 2.0}, [[0.0, 0], [0.5, 0.5]], [[1, 0], [1, 1]]),
        ({"name": "seq_mask_tis", "low": 0.6, "high": 2.0}, [[0.0, 0], [0.5, 1.0]], [[1, 0], [1, 1]]),
        ({"name": "rejection", "high": 2.5}, [[0.0, 0], [1.0, 1.0]], [[0, 0], [1, 1]]),
        (["tis", {"name": "rejection", "reduce": "token", "high": 2.5}], [[0.0, 0], [0.5, 1.0]], [[0, 0], [1, 1]]),
    ],
)
def test_weights_multiply_the_loss_and_only_rejection_changes_the_denominator(correction, factors, kept):
    plain, _, _ = _policy(_method())
    value, mask, of_term = _policy(_method(correction))
    np.testing.assert_allclose((value * mask)[:, 1:], plain[:, 1:] * factors, rtol=1e-5)
    np.testing.assert_array_equal(mask[:, 1:], kept)
    np.testing.assert_array_equal(of_term, mask)


def test_decoupled_ppo_may_leave_out_what_it_does_not_weigh():
    plain = methods.decoupled_ppo(aggregation="token_mean")
    value, mask, _ = _policy(methods.decoupled_ppo(aggregation="token_mean", correction={"name": "rejection"}))
    np.testing.assert_array_equal(mask[:, 1:], [[0, 0], [1, 1]])
    np.testing.assert_allclose(value[1], _policy(plain)[0][1])


LATER = {"policy": TokenStats(logp=OLD + jnp.array([[0, 0.3, 0], [0, -0.2, 0.1]]), entropy=None)}


def test_gmpo_weighs_sequences_by_the_geometric_mean_of_their_tokens_weights():
    plain, _, _ = _policy(methods.gmpo(old_logp="recompute"), later=LATER)
    value, _, _ = _policy(methods.gmpo(old_logp="recompute", correction="tis"), later=LATER)
    np.testing.assert_allclose(value, plain * np.sqrt([[4.0], [0.5]]), rtol=1e-5)
    # A token without weight takes no other with it.
    value, _, _ = _policy(methods.gmpo(old_logp="recompute", correction={"name": "icepop", "low": 0.8}), later=LATER)
    np.testing.assert_allclose(value, plain * [[3.0], [1.0]], rtol=1e-5)


def test_the_weights_of_vespo_are_a_factor_of_the_sequences_ratio():
    method = methods.vespo(old_logp="recompute", correction={"name": "tis", "high": 2.5})
    value, _, _ = _policy(method, later=LATER)
    log_w = np.array([0.3 + np.log(2.5), -0.1 + np.log(0.5)])
    advantages = np.array([-1.0, 1.0])  # of rewards 1 and 3
    k, lam = np.array([3.0, 2.0]), np.array([2.0, 3.0])
    phi = np.exp(k * log_w + lam * (1 - np.exp(log_w)))
    expected = -(phi * advantages)[:, None] * np.asarray(LATER["policy"].logp)
    np.testing.assert_allclose(value[0, 1], expected[0, 1] / np.sqrt(2), rtol=1e-4)
    np.testing.assert_allclose(value[1, 1:], expected[1, 1:] / np.sqrt(2), rtol=1e-4)


def test_the_log_probs_of_a_cut_distribution_are_taken_where_the_sampler_cut():
    # In `logp` the distribution is whole and equals the trained one: every ratio would be 1.
    batch = _batch().replace(logp=OLD, extras={"sampler_logp": SAMPLER})
    plain, _, _ = _policy(_method(), batch)
    value, _, _ = _policy(_method("tis"), batch)
    np.testing.assert_allclose(value[:, 1:], plain[:, 1:] * [[2.0, 0], [0.5, 1.0]], rtol=1e-5)


def test_the_off_policy_mask_looks_at_the_present_policy_and_at_failures_only():
    # The first sequence failed (negative advantage); the policy has since moved away from both by log 4 per token.
    later = {"policy": STATS["policy"].replace(logp=SAMPLER - np.log(4))}
    method = _method(off_policy_threshold=1.0)
    assert method.unit == "sequence"
    plain, _, _ = _policy(_method(), later=later)
    value, mask, _ = _policy(method, later=later)
    np.testing.assert_allclose(value, plain * mask * [[0.0], [1.0]], rtol=1e-6)
    assert np.any(plain[0, 1] != 0)
    near, mask, _ = _policy(_method(off_policy_threshold=1.5), later=later)
    np.testing.assert_allclose(near, plain * mask, rtol=1e-6)


def test_a_loss_per_sequence_is_weighted_by_the_mean_of_its_tokens_weights():
    def total(logp, advantages, mask):
        return -jnp.sum(logp * advantages * mask, axis=1)

    options = {"advantage": "grpo", "loss": total, "old_logp": "recompute"}
    plain, _, _ = _policy(methods.policy_gradient(**options))
    value, _, _ = _policy(methods.policy_gradient(**options, correction="tis"))
    np.testing.assert_allclose(value, plain * [2.0, 0.75], rtol=1e-5)


def test_the_weighted_kl_is_given_the_ratio_to_the_policy_of_the_start():
    later = {
        "policy": STATS["policy"].replace(logp=OLD - 0.1),
        "reference": TokenStats(logp=OLD - 0.4),
    }
    method = methods.grpo(beta=0.1, kl_estimator="k3_weighted", old_logp="recompute")
    terms, _ = _terms(method, _batch(), {**STATS, "reference": later["reference"]}, later)
    expected = np.exp(-0.1) * (np.exp(-0.3) - 1 + 0.3)  # x = 0.3, r = e^-0.1
    np.testing.assert_allclose(terms["kl"].value[:, 1:], np.full((2, 2), expected), rtol=1e-4)


def test_metrics_of_a_corrected_method_say_how_far_the_sampler_is():
    method = _method("tis")
    batch = _batch()
    _, made = _terms(method, batch)
    found = {name: float(metric.result()) for name, metric in method.metrics(STATS, batch, made).items()}
    assert found["sampling/ratio/max"] == pytest.approx(3.0, rel=1e-5)
    assert found["sampling/importance_weight/mean"] == pytest.approx(3.5 / 3, rel=1e-5)


def test_only_the_share_of_tokens_of_highest_entropy_carries_a_surrogate():
    value, mask, _ = _policy(_method(top_entropy=0.5))
    plain, _, _ = _policy(_method())
    # Entropies 0.1, 0.2 and 0.9: the median and what is above it stay, and the denominator with all three.
    np.testing.assert_allclose(value, plain * [[0, 0, 0], [0, 1, 1]], rtol=1e-6)
    assert mask.sum() == 3


def test_the_entropy_bonus_is_off_above_its_target_and_its_weight_moves():
    for target, applied, following in ((0.5, 0.1, 0.105), (0.3, 0.0, 0.095)):  # the mean entropy is 0.4
        method = _method(entropy_weight=0.1, entropy_target=target)
        batch = _batch()
        made, state = method.targets(method.init(batch, 1), batch, STATS, jax.random.key(0))
        assert float(method.loss(STATS, batch, made)["entropy"].weight) == pytest.approx(-applied)
        assert float(state["entropy_weight"]) == pytest.approx(following)


def test_positive_nll_counts_the_tokens_of_sequences_with_a_positive_reward():
    batch = rollouts([0.0, 1.0]).replace(logp=OLD)
    terms, _ = _terms(_method(nll_weight=0.1), batch)
    assert terms["nll"].weight == 0.1
    np.testing.assert_array_equal(terms["nll"].mask, [[0, 0, 0], [0, 1, 1]])
    reduced = losses.aggregate(terms["nll"].value, terms["nll"].mask, terms["nll"].mode)
    np.testing.assert_allclose(reduced, -(np.log(0.2) + np.log(0.3)) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "tiss"}, "correction: there is no 'tiss'; did you mean 'tis'"),
        ({"correction": {"name": "tis", "hihg": 3.0}}, "correction 'tis' has no keyword 'hihg'; did you mean 'high'"),
        ({"correction": {"name": "rejection", "high": -1.0}}, "correction: high must be above 0"),
        ({"correction": "tis", "old_logp": "rollout"}, "correction .*give old_logp='recompute'"),
        ({"off_policy_threshold": -0.1}, "off_policy_threshold must be at least 0"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_the_method_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        methods.grpo(**{"old_logp": "recompute", **options})
