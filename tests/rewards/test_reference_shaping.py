"""Rewards measured against reference answers, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxrl_post import rewards

REFERENCES = np.array([0.0, 1.0, 2.0], np.float32)


def test_the_probability_of_beating_the_references():
    found = rewards.preference_as_reward(jnp.array([2.0, -60.0, 60.0]), jnp.tile(REFERENCES, (3, 1)))
    np.testing.assert_allclose(found, [0.70395, 0.0, 1.0], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("sigmoid", np.mean(expit(2 * (2.5 - REFERENCES)))),
        ("slow", np.mean(expit(3 * (2 * (2.5 - REFERENCES) - 3)))),
        ("tanh", np.mean(np.tanh(2 * (2.5 - REFERENCES)))),
        ("log_sigmoid", np.log(expit(2 * (2.5 - 1 - 1.0364 * (np.std(REFERENCES) + 1e-5))))),
        ("centered", 3.0),
    ],
)
def test_shapes_are_those_of_the_paper_and_a_missing_reference_does_not_count(shape, wanted):
    references = jnp.array([np.nan, *REFERENCES, np.nan])
    function = jax.jit(lambda r: rewards.preference_as_reward(r, references, shape=shape, scale=2.0))
    np.testing.assert_allclose(function(jnp.float32(2.5)), wanted, rtol=1e-5)
    assert bool(jnp.isfinite(jax.grad(function)(2.5)))


def test_equal_references_have_a_quantile_and_none_at_all_give_no_reward():
    found = rewards.preference_as_reward(jnp.zeros(()), jnp.zeros(4), shape="log_sigmoid")
    np.testing.assert_allclose(found, -np.log(2), atol=1e-4)
    assert bool(jnp.isnan(rewards.preference_as_reward(jnp.zeros(()), jnp.full(2, jnp.nan))))


def test_a_running_scale_reads_all_rewards_so_far():
    moments = rewards.RunningMoments.zero().include(jnp.array([1.0, 3.0])).include(jnp.array([5.0]))
    std = np.std([1, 3, 5])
    given = jnp.array([1.0, 3.0, 9.0])
    np.testing.assert_allclose(rewards.running_scale(given, moments), (given - 3) / std, rtol=1e-6)
    clipped = rewards.running_scale(given, moments, shape="clip")
    np.testing.assert_allclose(clipped, [3 - std, 3, 3 + std], rtol=1e-6)
    once = rewards.RunningMoments.zero().include(jnp.array([2.0]))
    assert rewards.running_scale(jnp.array([5.0]), once).tolist() == [3.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": jnp.zeros((2, 3))}, "references"),
        ({"references": jnp.zeros((3, 0))}, "references"),
        ({"references": jnp.zeros((3, 2)), "shape": "cubic"}, "shape"),
        ({"references": jnp.zeros((3, 2)), "scale": 0.0}, "scale"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rewards.preference_as_reward(jnp.zeros(3), **options)
    with pytest.raises(ValueError, match="shape"):
        rewards.running_scale(jnp.zeros(3), rewards.RunningMoments.zero(), shape="minmax")
