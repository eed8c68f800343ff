import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.advantages.entropy_bonus import egpo
from tests.advantages.compiled import compiled

egpo = compiled(egpo)


@pytest.mark.parametrize(
    ("advantage", "entropy", "expected"),
    [
        (-1.0, 1.5, -0.5),  # min(0.6, 0.5)
        (1.0, 1.5, 1.5),
        (2.0, 0.5, 2.2),  # the entropy's share is the smaller one
        (-2.0, 0.5, -1.8),
        (1.0, 0.0, 1.0),  # no reasoning, no bonus
        (0.0, 9.0, 0.0),  # all rewards equal
    ],
)
def test_the_bonus_is_the_smaller_of_two_shares(advantage, entropy, expected):
    np.testing.assert_allclose(egpo(jnp.array([[advantage]]), jnp.array([[entropy]])), [[expected]], rtol=1e-6)


def test_no_advantage_changes_its_sign_and_none_falls():
    rng = np.random.default_rng(0)
    advantages, entropy = rng.normal(size=(50, 8)), rng.gamma(1, 5, (50, 8))
    for kappa in (1.5, 2.0, 10.0):
        found = np.asarray(jax.jit(egpo, static_argnames="kappa")(advantages, entropy, kappa=kappa))
        assert np.all(np.sign(found) == np.sign(advantages.astype(np.float32)))
        assert np.all(found >= advantages - 1e-6)
        assert np.all(found - advantages <= np.abs(advantages) / kappa + 1e-6)


def test_it_is_the_same_per_sequence_and_per_token_and_raises_16_bits():
    a, h = jnp.array([[1.0, -1.0]]), jnp.array([[0.1, 0.2]])
    np.testing.assert_array_equal(egpo(a[0], h[0]), egpo(a, h)[0])
    assert egpo(a.astype(jnp.bfloat16), h.astype(jnp.bfloat16)).dtype == jnp.float32


def test_no_gradient_flows_into_the_entropy():
    a, h = jnp.array([[1.0, 0.0]]), jnp.array([[0.1, 0.2]])
    assert jax.jit(jax.grad(lambda h: egpo(a, h).sum()))(h).tolist() == [[0.0, 0.0]]
    assert jax.jit(jax.grad(lambda a: egpo(a, h).sum()))(a).tolist() == [[1.0, 1.0]]


def test_constants_that_would_turn_an_advantage_round_are_refused():
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="kappa must be >= 1"):
        egpo(x, x, kappa=0.5)
    with pytest.raises(ValueError, match="alpha must be >= 0"):
        egpo(x, x, alpha=-0.4)
    with pytest.raises(ValueError, match="entropy must have the shape of advantages"):
        egpo(x, x[:, :1])
