"""Losses of reward models that learn against the policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)


def test_the_hinge_of_the_table_and_of_a_loop():
    np.testing.assert_allclose(losses.discriminator_hinge(jnp.array([0.4]), jnp.array([-0.2])), 0.7, rtol=1e-6)
    rng = np.random.default_rng(0)
    reference, generated, mask = 2 * rng.normal(size=(3, 4)), 2 * rng.normal(size=7), rng.random(7) < 0.6
    expected = np.maximum(1 - reference, 0).mean() / 2 + np.maximum(1 + generated[mask], 0).mean() / 2
    found = losses.discriminator_hinge(reference, np.where(mask, generated, np.nan), None, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_samples_that_are_told_apart_well_have_no_gradient_and_no_samples_no_loss():
    slope = jax.jit(jax.grad(losses.discriminator_hinge, (0, 1)))
    assert not any(np.any(g) for g in slope(jnp.array([2.0, 1.5]), jnp.array([-3.0])))
    np.testing.assert_allclose(slope(jnp.array([0.0, 2.0]), jnp.array([0.0]))[0], [-0.25, 0])
    assert float(losses.discriminator_hinge(jnp.ones(2), jnp.ones(2), jnp.zeros(2), jnp.zeros(2))) == 0


def test_patches_count_by_their_weight():
    whole, patches = jnp.array([1.0, -2.0]), jnp.array([[0.5, 0.7], [1.0, 3.0]])
    np.testing.assert_allclose(losses.patch_reward(whole, patches), [0.7 + 0.3 * 0.6, -1.4 + 0.6], rtol=1e-5)
    np.testing.assert_allclose(losses.patch_reward(whole, patches, patch_weight=0.0), whole)


def test_a_scorer_is_updated_only_where_it_prefers_the_policys_samples():
    assert not losses.scorer_is_fooled(jnp.array([1.0, 3.0]), jnp.array([2.0]))
    assert losses.scorer_is_fooled(jnp.array([1.0, 3.0]), jnp.array([2.1]))


def test_turns_go_round():
    turns = [bool(losses.discriminators_turn(jnp.asarray(step), updates=1)) for step in range(4)]
    assert turns == [True, False, True, False]
    assert not losses.discriminators_turn(jnp.asarray(5), updates=0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="generated_mask must have the shape of generated"):
        losses.discriminator_hinge(jnp.ones(2), jnp.ones(2), None, jnp.ones(3))
    with pytest.raises(ValueError, match="patches must be"):
        losses.patch_reward(jnp.ones(2), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="patch_weight must be in"):
        losses.patch_reward(jnp.ones(2), jnp.ones((2, 2)), patch_weight=2.0)
    with pytest.raises(ValueError, match="updates must be >= 0"):
        losses.discriminators_turn(0, updates=-1)
