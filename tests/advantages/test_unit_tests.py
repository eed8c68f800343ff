"""Credit by unit tests, against numbers that were computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages

PASSES = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]])[None, :, None]


def test_the_papers_group():
    weights = advantages.unit_test_weights(PASSES, delta=0.0)
    np.testing.assert_allclose(weights, [[0.067668, 0.067668, 0.606531]], rtol=1e-5)
    found = advantages.verpo(PASSES, delta=0.0)[0, :, 0]
    np.testing.assert_allclose(found, [1.204898, -0.401633, -0.401633, -0.401633], rtol=1e-5)
    alone = advantages.unit_test_weights(PASSES, sigma=0.0, delta=0.0)
    np.testing.assert_allclose(alone, [np.exp([-2.0, -2.0, -0.5])], rtol=1e-6)


def test_a_group_that_is_alike_has_no_advantage_and_a_test_that_none_passes_changes_nothing():
    same = jnp.tile(PASSES[:, :1], (1, 4, 1, 1))
    np.testing.assert_allclose(advantages.verpo(same), 0.0, atol=1e-6)
    # One more test that all fail, far from the rates of the others: the outcome is 0 for all, the turns stay.
    more = jnp.concatenate([PASSES, jnp.zeros((1, 4, 1, 1), int)], axis=-1)
    turns = advantages.verpo(PASSES, sigma=0.01) - jnp.array([0.75, -0.25, -0.25, -0.25])[:, None]
    np.testing.assert_allclose(advantages.verpo(more, sigma=0.01), turns, rtol=1e-5)


def test_turns_that_are_missing_and_trajectories_that_are_not_valid_count_nowhere():
    key = jax.random.key(0)
    passes = jax.random.bernoulli(key, 0.5, (2, 4, 3, 5))
    exists = jnp.arange(3) < jnp.array([[3, 2, 1, 3], [2, 2, 0, 1]])[..., None]
    valid = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    whole = jax.jit(advantages.verpo)(passes, exists, valid)
    assert bool(jnp.all(jnp.where(exists & (valid[..., None] != 0), True, whole == 0)))
    without = advantages.verpo(passes[:1, :3], exists[:1, :3])
    np.testing.assert_allclose(whole[:1, :3], without, rtol=1e-5, atol=1e-6)
    shuffled = advantages.verpo(jnp.where(exists[..., None], passes, True), exists, valid)
    np.testing.assert_allclose(shuffled, whole, atol=1e-6)


def test_a_longer_way_to_the_end_is_worth_less():
    passes = jnp.array([[[1, 1], [0, 0]], [[0, 1], [1, 1]], [[0, 0], [0, 0]]])[None]
    exists = jnp.array([[[1, 0], [1, 1], [1, 1]]])
    found = advantages.verpo(passes, exists, gamma=0.5, beta=0.0)[0]
    ends = np.array([0.5, 0.25, 0.0])
    np.testing.assert_allclose(found, (ends - ends.mean())[:, None] * exists[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"), [({"alpha": -1.0}, "alpha"), ({"sigma": -1.0}, "sigma"), ({"gamma": 0.0}, "gamma")]
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        advantages.verpo(PASSES, **options)
    with pytest.raises(ValueError, match="exists"):
        advantages.verpo(PASSES, jnp.ones((1, 4, 2)))
    with pytest.raises(ValueError, match="valid"):
        advantages.verpo(PASSES, None, jnp.ones((1, 3)))
