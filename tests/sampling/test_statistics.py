"""`sampling.token_statistics` and `sampling.alternatives` against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.sampling import alternatives, token_statistics, transform


def expected(logits):
    """Log-probs of all tokens and the entropy, in float64."""
    z = np.asarray(logits, np.float64)
    d = z - z.max(-1, keepdims=True)
    logp = d - np.log(np.exp(d).sum(-1, keepdims=True))
    p = np.exp(logp)
    return logp, -np.where(p > 0, p * np.where(p > 0, logp, 0.0), 0.0).sum(-1)


def rows():
    random = np.random.default_rng(0)
    logits = np.concatenate(
        [s * random.standard_normal((4, 60)) + c for s, c in ((0.1, 0.0), (3.0, 500.0), (40.0, -9.0))]
    )
    logits[::3, 10:20] = -np.inf
    return logits.astype(np.float32), random.integers(20, 60, 12)


def test_log_prob_and_entropy_are_those_of_float64_at_any_spread_and_offset():
    logits, tokens = rows()
    logp, entropy = jax.jit(token_statistics)(jnp.asarray(logits), jnp.asarray(tokens))
    right, entropies = expected(logits)
    np.testing.assert_allclose(logp, right[np.arange(12), tokens], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(entropy, entropies, rtol=1e-6, atol=2e-6)


def test_a_row_of_equal_tokens_has_the_entropy_of_their_number_and_a_certain_one_none():
    logits = jnp.array([[2.0] * 8, [0.0] + [-jnp.inf] * 7])
    logp, entropy = token_statistics(logits, jnp.array([3, 0]))
    np.testing.assert_allclose(logp, [-np.log(8), 0.0], rtol=1e-6)
    np.testing.assert_allclose(entropy, [np.log(8), 0.0], rtol=1e-6)


def test_no_log_prob_is_positive_where_logits_are_large():
    logits = jax.random.normal(jax.random.key(0), (64, 100))

    @jax.jit
    def drawn(logits, temperature):
        return token_statistics(transform(logits, temperature=temperature), jnp.argmax(logits, axis=-1))

    for temperature in (1e-1, 1e-3, 1e-6):
        logp, entropy = drawn(logits, temperature)
        assert np.all(logp <= 0)
        assert np.all(entropy >= 0)


def test_a_nan_anywhere_and_a_row_of_forbidden_tokens_show_in_both_numbers():
    logits = jnp.zeros((3, 4)).at[0, 2].set(jnp.nan).at[1].set(-jnp.inf)
    for found in token_statistics(logits, jnp.zeros(3, int)):
        assert np.isnan(np.asarray(found)).tolist() == [True, True, False]


def test_sixteen_bit_logits_give_float32_statistics():
    logp, entropy = token_statistics(jnp.zeros((1, 5), jnp.bfloat16), jnp.array([0]))
    assert logp.dtype == entropy.dtype == jnp.float32
    assert alternatives(jnp.zeros((1, 5), jnp.bfloat16), 2)[1].dtype == jnp.float32


def test_alternatives_are_the_most_probable_tokens_in_order_with_their_log_probs():
    logits, _ = rows()
    tokens, logp = jax.jit(alternatives, static_argnums=1)(jnp.asarray(logits), 5)
    right, _ = expected(logits)
    order = np.argsort(-right, axis=-1, kind="stable")[:, :5]
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(logp, np.take_along_axis(right, order, -1), rtol=1e-6, atol=2e-6)


def test_of_equally_probable_tokens_the_smaller_id_comes_first():
    tokens, logp = alternatives(jnp.log(jnp.array([[0.125, 0.25, 0.25, 0.25, 0.125]])), 4)
    assert tokens.tolist() == [[1, 2, 3, 0]]
    np.testing.assert_allclose(jnp.exp(logp), [[0.25, 0.25, 0.25, 0.125]], rtol=1e-6)


@pytest.mark.parametrize("k", [0, 6])
def test_more_alternatives_than_tokens_and_none_are_refused(k):
    with pytest.raises(ValueError, match=f"between 1 and the vocabulary of 5, got {k}"):
        alternatives(jnp.zeros((2, 5)), k)


def test_tokens_of_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"logits must be \[R, V\] and tokens \[R\], got \(2, 5\) and \(3,\)"):
        token_statistics(jnp.zeros((2, 5)), jnp.zeros(3, int))


def test_gradients_are_those_of_the_formulas_where_tokens_are_forbidden():
    logits = jnp.array([[0.3, -0.2, -jnp.inf]])
    p = np.exp([0.3, -0.2]) / np.exp([0.3, -0.2]).sum()
    entropy = -(p * np.log(p)).sum()
    slope = jax.jit(jax.grad(lambda z: token_statistics(z, jnp.array([0]))[1].sum()))(logits)
    np.testing.assert_allclose(slope[0], [*(-p * (np.log(p) + entropy)), 0.0], atol=1e-6)
    slope = jax.jit(jax.grad(lambda z: token_statistics(z, jnp.array([0]))[0].sum()))(logits)
    np.testing.assert_allclose(slope[0], [1 - p[0], -p[1], 0.0], atol=1e-6)
