"""Rewards from two language models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.rewards import density_ratio_reward, pair_accuracy


def test_the_tables_numbers():
    strong, weak = jnp.array([[-4.0, -6.0], [-5.0, -6.0]]), jnp.array([[-6.0, -6.0], [-5.5, -6.0]])
    one, other = jax.jit(density_ratio_reward)(strong, weak, jnp.ones((2, 2)))
    np.testing.assert_allclose([one, other], [2, 0.5])
    assert float(pair_accuracy(one[None], other[None])) == 1


def test_each_model_may_have_its_own_tokens_and_padding_may_hold_anything():
    strong, mask = jnp.array([[-1.0, -2.0, jnp.nan], [jnp.nan] * 3]), jnp.array([[1, 1, 0], [0, 0, 0]])
    weak, weak_mask = jnp.array([[-3.0, -jnp.inf], [-1.0, -1.0]]), jnp.array([[1, 0], [0, 0]])
    np.testing.assert_allclose(density_ratio_reward(strong, weak, mask, weak_mask), [0.0, 0.0])
    np.testing.assert_allclose(density_ratio_reward(strong, weak, mask, weak_mask, per_token=True), [1.5, 0.0])


def test_of_one_tokenizer_it_is_the_implicit_reward_without_its_scale():
    rng = np.random.default_rng(0)
    strong, weak = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    expected = losses.implicit_reward(strong.sum(1), weak.sum(1), beta=1.0)
    np.testing.assert_allclose(density_ratio_reward(strong, weak, np.ones((4, 5))), expected, rtol=1e-5)


def test_the_accuracy_counts_ties_half_and_what_is_not_valid_not_at_all():
    better, worse = jnp.array([1.0, 0.0, 2.0, jnp.nan]), jnp.array([0.0, 1.0, 2.0, 0.0])
    np.testing.assert_allclose(jax.jit(pair_accuracy)(better, worse, jnp.array([1, 1, 1, 0])), 0.5)
    assert float(pair_accuracy(better, worse, jnp.zeros(4))) == 0


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="weak_mask must have the shape of weak_logp"):
        density_ratio_reward(jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="weak_logp must have the 2 rows"):
        density_ratio_reward(jnp.ones((2, 3)), jnp.ones((1, 4)), jnp.ones((2, 3)), jnp.ones((1, 4)))
