import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from jaxrl_post.rewards import submodular
from tests.rewards.compiled import compiled

SETS = jnp.array([[1, 1, 0], [0, 1, 1], [0, 1, 0]])


def test_coverage_gives_the_papers_marginals_and_reward_to_go():
    values = submodular.coverage(jnp.array([[0, 1, 2]]), SETS)
    gains = submodular.marginal_gains(values)
    np.testing.assert_allclose(values, [[2, 3, 3]])
    np.testing.assert_allclose(gains, [[2, 1, 0]])
    to_go = advantages.reinforce_plus_plus(gains, jnp.ones((1, 3)), whiten=False)
    np.testing.assert_allclose(to_go, [[3, 1, 0]])


def test_steps_without_mask_visit_nothing():
    states, mask = jnp.array([[2, 0, 2, 1]]), jnp.array([[1, 0, 1, 1]])
    values = submodular.coverage(states, SETS, mask, weights=jnp.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(values, [[2, 2, 2, 6]])
    np.testing.assert_allclose(submodular.marginal_gains(values, mask), [[2, 0, 0, 4]])
    assert not np.asarray(submodular.coverage(states, SETS, jnp.zeros((1, 4)))).any()


_RNG = np.random.default_rng(0)
_COVERS, _SIMILARITY, _ROOT = _RNG.random((5, 7)) < 0.5, _RNG.random((5, 4)), _RNG.normal(size=(5, 3))
SET_FUNCTIONS = {
    "coverage": lambda s: submodular.coverage(s, _COVERS),
    "facility location": lambda s: submodular.facility_location(s, _SIMILARITY),
    "information gain": lambda s: submodular.information_gain(s, _ROOT @ _ROOT.T, noise_variance=0.5),
    "distinct ngrams": submodular.distinct_ngrams,
}


@pytest.mark.parametrize("name", SET_FUNCTIONS)
def test_set_functions_are_monotone_with_diminishing_returns(name):
    # The gain of a last state after a prefix, and after the same prefix with one state more in front.
    short = np.array(list(itertools.product(range(5), repeat=2)))
    longer = np.array([(extra, *row) for row in short for extra in range(5)])
    last_gain = jax.jit(lambda s: submodular.marginal_gains(SET_FUNCTIONS[name](s))[:, -1])
    gain_short, gain_longer = np.asarray(last_gain(short)), np.asarray(last_gain(longer))
    assert np.all(gain_short >= -1e-5)
    assert np.all(gain_longer <= np.repeat(gain_short, 5) + 1e-5)


def test_the_information_gain_is_the_log_determinant_of_every_prefix():
    rng = np.random.default_rng(2)
    root = rng.normal(size=(4, 4))
    kernel, states, mask = root @ root.T, np.array([[0, 2, 2, 3], [1, 1, 0, 2]]), np.array([[1, 1, 1, 1], [1, 0, 1, 1]])
    with jax.enable_x64(True):
        given = compiled(submodular.information_gain)(states, kernel, mask, noise_variance=0.3)
        given = np.asarray(given)
    for b, t in itertools.product(range(2), range(4)):
        at = states[b, : t + 1][mask[b, : t + 1] > 0]
        expected = 0.5 * np.linalg.slogdet(np.eye(len(at)) + kernel[np.ix_(at, at)] / 0.3)[1]
        np.testing.assert_allclose(given[b, t], expected, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_distinct_ngrams_agree_with_a_set(n):
    rng = np.random.default_rng(n)
    tokens, mask = rng.integers(0, 3, (4, 8)), rng.random((4, 8)) < 0.85
    given = np.asarray(compiled(submodular.distinct_ngrams)(tokens, mask, n=n))
    for b in range(4):
        seen = set()
        for t in range(8):
            window = range(t - n + 1, t + 1)
            if window[0] >= 0 and all(mask[b, i] for i in window):
                seen.add(tuple(tokens[b, i] for i in window))
            assert given[b, t] == len(seen)


def test_modular_sets_make_the_gains_an_ordinary_reward():
    # Disjoint sets, each state visited once: a gain does not depend on what came before.
    gains = submodular.marginal_gains(
        submodular.coverage(jnp.array([[2, 0, 1]]), jnp.eye(3), weights=jnp.arange(1.0, 4))
    )
    np.testing.assert_allclose(gains, [[3, 1, 2]])


@pytest.mark.parametrize("state", [-1, 3])
def test_a_state_that_is_not_in_the_table_is_an_error_and_traced_it_gives_nan(state):
    states, mask = jnp.array([[0, state]]), jnp.array([[1, 0]])
    for value, table in ((submodular.coverage, jnp.eye(3)), (submodular.information_gain, jnp.eye(3))):
        with pytest.raises(ValueError, match=rf"states must be in \[0, 3\), got {state}"):
            value(states, table)
        assert np.isnan(jax.jit(value)(states, table)).tolist() == [[False, True]]
        np.testing.assert_array_equal(value(states, table, mask)[0, 1], value(states[:, :1], table)[0, 0])


def test_wrong_arguments_are_named():
    states = jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match=r"states must be \[B, T\]"):
        submodular.coverage(states[0], SETS)
    with pytest.raises(ValueError, match="weights must have the shape"):
        submodular.coverage(states, SETS, weights=jnp.ones(2))
    with pytest.raises(ValueError, match=r"kernel must be \[S, S\]"):
        submodular.information_gain(states, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="noise_variance must be above 0"):
        submodular.information_gain(states, jnp.eye(2), noise_variance=0.0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        submodular.distinct_ngrams(states, n=0)
