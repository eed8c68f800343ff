import jax.numpy as jnp
import pytest

from jaxrl_post.rewards.consistency import consistency_reward


def test_coherence_pays_only_where_the_result_is_right():
    result, consistency = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0]), jnp.array([1.0, 0.0, -1.0, 1.0, 0.0])
    assert consistency_reward(result, consistency, jnp.ones(5)).tolist() == [2.0, 1.5, 1.0, 0.5, 0.5]
    assert consistency_reward(result, consistency, jnp.zeros(5), consistency_weight=1.0).tolist() == [2, 1, 0, 0, 0]


def test_shapes_that_differ_are_refused_by_name():
    with pytest.raises(ValueError, match=r"consistency must have the shape of result, \(3,\), got \(2,\)"):
        consistency_reward(jnp.ones(3), jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"format must have the shape of result, \(3,\), got \(2,\)"):
        consistency_reward(jnp.ones(3), jnp.ones(3), jnp.ones(2))
