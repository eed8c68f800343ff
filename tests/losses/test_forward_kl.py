import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.losses.forward_kl import forward_kl, reweighted_logp
from tests.advantages.compiled import compiled

forward_kl, reweighted_logp = map(compiled, (forward_kl, reweighted_logp))


def test_the_estimate_has_the_numbers_of_three_ratios():
    found = forward_kl(jnp.zeros(3), jnp.log(jnp.array([2.0, 0.5, 1.0])))
    np.testing.assert_allclose(found, [0.386294, 0.153426, 0.0], atol=1e-6)


def test_its_mean_over_the_policys_tokens_is_the_divergence_from_the_target():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(9), 2)
    with jax.enable_x64(True):
        found = np.sum(p * np.asarray(forward_kl(np.log(p), np.log(q))))
    np.testing.assert_allclose(found, np.sum(q * np.log(q / p)), rtol=1e-10)


def test_its_mean_gradient_is_that_of_half_the_squared_log_ratio_under_the_target():
    rng = np.random.default_rng(1)
    logits, q = rng.normal(size=7), rng.dirichlet(np.ones(7))

    def squared(logits):
        log_p = logits - np.logaddexp.reduce(logits)
        return 0.5 * np.sum(q * (np.log(q) - log_p) ** 2)

    step = 1e-6 * np.eye(7)
    expected = np.array([(squared(logits + h) - squared(logits - h)) / 2e-6 for h in step])
    with jax.enable_x64(True):

        def estimate(logits):
            log_p = jax.nn.log_softmax(logits)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * forward_kl(log_p, np.log(q)))

        found = jax.jit(jax.grad(estimate))(logits)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_far_from_the_target_values_and_gradients_are_finite_and_nothing_flows_into_it():
    logp, target = jnp.array([-90.0, 0.0, -1.0]), jnp.array([0.0, -90.0, -1.0])
    for dtype in (jnp.float32, jnp.bfloat16):
        value, slope = jax.jit(jax.value_and_grad(lambda x, y: forward_kl(x, y).sum(), argnums=(0, 1)))(
            logp.astype(dtype), target.astype(dtype)
        )
        assert value.dtype == jnp.float32
        assert bool(jnp.isfinite(value))
        assert not np.any(np.asarray(slope, np.float32))  # clamped at both ends, at its least in the middle
    # Clamped at 10 nats: w = e^10, and 1 - 11 e^-10 at the other end.
    np.testing.assert_allclose(forward_kl(logp, target), [9 * np.exp(10) + 1, 1 - 11 * np.exp(-10), 0], rtol=1e-6)


def test_a_power_of_zero_leaves_no_reference_and_one_of_one_all_of_it():
    ref = jnp.array([[-2.0, -1.0], [-2.0, -1.0], [-2.0, -1.0]])
    power = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(reweighted_logp(ref, power), [[0, 0], [-1, -0.5], [-2, -1]])
    found = np.exp(reweighted_logp(ref, power, vocab_size=10))
    np.testing.assert_allclose(found[0], [0.1, 0.1], rtol=1e-6)  # the uniform distribution
    np.testing.assert_allclose(found[2], np.exp(ref[2]), rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_what_divides_with_a_vocabulary_bounds_the_true_normaliser(power):
    p = np.random.default_rng(2).dirichlet(np.ones(12))
    found = np.exp(reweighted_logp(jnp.log(p)[None], jnp.array([power]), vocab_size=12))
    assert found.sum() <= 1 + 1e-5
    if power in (0.0, 1.0):
        np.testing.assert_allclose(found.sum(), 1.0, rtol=1e-5)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="power must have the shape of a column of ref_logp"):
        reweighted_logp(jnp.zeros((2, 3)), jnp.zeros(3))
    with pytest.raises(ValueError, match="vocab_size must be >= 1"):
        reweighted_logp(jnp.zeros((2, 3)), jnp.zeros(2), vocab_size=0)
    with pytest.raises(ValueError, match="target_logp must have the shape of logp"):
        forward_kl(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match="limit must be >= 0"):
        forward_kl(jnp.zeros(2), jnp.zeros(2), limit=-1.0)
