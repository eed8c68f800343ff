"""How far labels are trusted, and what that does to DPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from jaxrl_post.types import TokenStats
from tests.claims.offline import answers


def test_passes_that_disagree_have_the_reported_information_and_equal_ones_none():
    found = losses.information_gain(jnp.array([[0.9, 0.7, 0.0, 1.0], [0.1, 0.7, 1.0, 1.0]]))
    np.testing.assert_allclose(found, [0.368064, 0.0, np.log(2), 0.0], atol=1e-6)


def test_certain_pairs_come_more_often_and_uncertain_labels_are_smoothed():
    doubt, valid = jnp.array([0.0, 0.5, 0.2]), jnp.array([True, True, False])
    np.testing.assert_allclose(losses.certainty(doubt, valid, mu=2.0), [0.8, 0.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(losses.certainty(doubt, mu=0.0), np.full(3, 1 / 3), rtol=1e-6)
    assert losses.certainty(doubt, jnp.zeros(3, bool)).tolist() == [0, 0, 0]
    np.testing.assert_allclose(losses.uncertain_smoothing(doubt), doubt / (2 * np.log(2)), rtol=1e-6)
    np.testing.assert_allclose(
        losses.uncertain_smoothing(doubt, valid, rule="printed", mu=2.0), [1 / 1.8, 1 / 1.2, 1.0], rtol=1e-6
    )
    with pytest.raises(ValueError, match="mu"):
        losses.certainty(doubt, mu=-1.0)
    with pytest.raises(ValueError, match="rule"):
        losses.uncertain_smoothing(doubt, rule="none")


def _loss(method, rollouts, policy):
    nothing = TokenStats(logp=0.0 * rollouts.mask)
    stats = {"policy": TokenStats(logp=policy * rollouts.mask), "reference": nothing}
    targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
    terms = method.loss(stats, rollouts, targets).values()
    return float(sum(t.weight * losses.aggregate(t.value, t.mask, t.mode) for t in terms))


def test_the_loss_is_a_weighted_mean_of_smoothed_ones():
    rollouts = answers(jnp.zeros((3, 2, 1), jnp.int32))
    doubt = jnp.array([0.0, 0.5, 0.1])
    rollouts = rollouts.replace(
        extras={"uncertainty": doubt, "chosen_score": jnp.array([2.0, -4.0, 1.0])},
        valid=rollouts.valid.at[2, 1].set(False),
    )
    policy = jnp.array([-1.0, -3.0, -2.0, -1.0, 5.0, 5.0])[:, None]
    margins, weights, smoothing = np.array([2.0, -1.0]), np.array([1.0, 0.25]) / 1.25, np.array([0.0, 0.25 / np.log(2)])
    each = (1 - smoothing) * np.log1p(np.exp(-0.5 * margins)) + smoothing * np.log1p(np.exp(0.5 * margins))
    found = _loss(methods.upo(beta=0.5, mu=2.0), rollouts, policy)
    np.testing.assert_allclose(found, np.sum(weights * each), rtol=1e-6)
    nll = np.sum(weights * np.array([1.0 / 2, 2.0 / 4]))
    found = _loss(methods.upo(beta=0.5, mu=2.0, nll_weight=0.3), rollouts, policy)
    np.testing.assert_allclose(found, np.sum(weights * each) + 0.3 * nll, rtol=1e-6)
    certain = rollouts.replace(extras={"uncertainty": jnp.zeros(3)})
    np.testing.assert_allclose(
        _loss(methods.upo(beta=0.5), certain, policy), _loss(methods.dpo(beta=0.5), certain, policy), rtol=1e-6
    )
    level = answers(jnp.zeros((1, 2, 1), jnp.int32)).replace(extras={"uncertainty": jnp.array([0.4])})
    np.testing.assert_allclose(_loss(methods.upo(), level, jnp.zeros((2, 1))), np.log(2), rtol=1e-6)


def test_impossible_options_are_refused():
    for options in ({"beta": 0.0}, {"mu": -1.0}, {"rule": "none"}, {"nll_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.upo(**options)
