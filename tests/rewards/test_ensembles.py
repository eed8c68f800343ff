"""Several reward models as one, and best-of-n."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import best_of_n_kl, ensemble_reward, expected_best_of_n


def test_the_tables_numbers():
    scores = jnp.array([[1.0], [2.0], [3.0]])
    for combine, ddof, expected in (
        ("mean", 0, 2),
        ("worst_case", 0, 1),
        ("uncertainty", 0, 1.666667),
        ("uncertainty", 1, 1.5),
    ):
        np.testing.assert_allclose(ensemble_reward(scores, combine=combine, ddof=ddof), [expected], rtol=1e-5)
    np.testing.assert_allclose(expected_best_of_n(jnp.arange(3.0), jnp.arange(3.0), 2), 1.666667, rtol=1e-5)
    np.testing.assert_allclose(best_of_n_kl(4), 0.636294, rtol=1e-5)
    assert best_of_n_kl(1) == 0


@pytest.mark.parametrize("combine", ["mean", "worst_case", "uncertainty"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_one_model_is_itself_with_a_finite_gradient(combine, ddof):
    scores = jnp.array([[3.0, -1.0]])
    reward, pull = jax.vjp(lambda x: ensemble_reward(x, combine=combine, ddof=ddof), scores)
    np.testing.assert_allclose(reward, scores[0])
    np.testing.assert_allclose(pull(jnp.ones(2))[0], np.ones((1, 2)))


@pytest.mark.parametrize("n", [1, 3, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=7), rng.normal(size=7)
    subsets = [gold[max(rows, key=lambda i: proxy[i])] for rows in combinations(range(7), n)]
    np.testing.assert_allclose(
        jax.jit(expected_best_of_n, static_argnums=2)(proxy, gold, n), np.mean(subsets), rtol=1e-5
    )


def test_best_of_many_has_weights_that_sum_to_one():
    np.testing.assert_allclose(expected_best_of_n(jnp.arange(12600.0), jnp.ones(12600), 1000), 1, rtol=1e-4)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="combine must be one of mean, worst_case, uncertainty"):
        ensemble_reward(jnp.ones((2, 3)), combine="best")
    with pytest.raises(ValueError, match="ddof must be 0 or 1"):
        ensemble_reward(jnp.ones((2, 3)), ddof=2)
    with pytest.raises(ValueError, match="scores must be"):
        ensemble_reward(jnp.array(1.0))
    with pytest.raises(ValueError, match="n must be between 1 and the number of samples, 3"):
        expected_best_of_n(jnp.ones(3), jnp.ones(3), 4)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n_kl(0)
