"""Reward models with a latent for each user."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)


def test_the_divergence_is_that_of_an_integral():
    mean, log_variance = np.array([0.5, -1.0]), np.array([0.3, -0.8])
    expected = 0.0
    for m, v in zip(mean, log_variance, strict=True):
        q, p = stats.norm(m, np.exp(v / 2)), stats.norm()
        expected += integrate.quad(lambda x, q=q, p=p: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -12, 12)[0]
    np.testing.assert_allclose(losses.gaussian_kl(mean, log_variance), expected, rtol=1e-5)
    assert float(losses.gaussian_kl(jnp.zeros(3), jnp.zeros(3))) == 0
    np.testing.assert_allclose(losses.gaussian_kl(jnp.array([0.5, -0.5]), jnp.zeros(2)), 0.25)


def test_the_tables_numbers_add_up_and_a_user_without_comparisons_pays_the_divergence_alone():
    better, worse = jnp.array([[1.0, jnp.nan], [jnp.nan, jnp.nan]]), jnp.zeros((2, 2))
    mean, valid = jnp.array([[0.5, -0.5], [0.5, -0.5]]), jnp.array([[1, 0], [0, 0]])
    found = losses.vpl(better, worse, mean, jnp.zeros((2, 2)), valid, kl_weight=1.0)
    np.testing.assert_allclose(found, [0.31326 + 0.25, 0.25], atol=1e-5)
    slope = jax.jit(jax.grad(lambda x: losses.vpl(x, worse, mean, 0 * mean, valid).sum()))(better)
    np.testing.assert_allclose(slope, [[-1 / (1 + np.e), 0], [0, 0]], atol=1e-6)


def test_draws_have_the_mean_and_the_variance_and_carry_gradients_to_both():
    mean, log_variance = jnp.array([1.0, -2.0]), jnp.log(jnp.array([0.25, 4.0]))
    draw = lambda key, m, v: losses.draw_latent(key, m, v)  # noqa: E731
    z = jax.jit(jax.vmap(draw, (0, None, None)))(jax.random.split(jax.random.key(0), 4000), mean, log_variance)
    np.testing.assert_allclose(z.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(z.var(0), [0.25, 4.0], rtol=0.1)
    gradients = jax.jit(jax.grad(lambda m, v: draw(jax.random.key(1), m, v).sum(), (0, 1)))(mean, log_variance)
    np.testing.assert_allclose(gradients[0], 1)
    assert np.all(gradients[1] != 0)


def test_a_draw_on_the_sphere_has_the_norm_of_the_dimension_and_zero_stays_zero():
    z = losses.draw_latent(jax.random.key(0), jnp.ones((5, 3)), jnp.zeros((5, 3)), on_sphere=True)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), np.sqrt(3), rtol=1e-5)
    nothing = jnp.full(3, -jnp.inf)
    of_zero = lambda m: losses.draw_latent(jax.random.key(0), m, nothing, on_sphere=True)  # noqa: E731
    assert not of_zero(jnp.zeros(3)).any()
    assert np.isfinite(jax.jit(jax.grad(lambda m: of_zero(m).sum()))(jnp.zeros(3))).all()


def test_the_annealing_is_half_a_cosine_that_starts_anew():
    steps = np.arange(20)
    found = [float(losses.cyclical_annealing(jnp.asarray(step), period=8, floor=0.2)) for step in steps]
    np.testing.assert_allclose(found, 0.2 + 0.4 * (1 - np.cos(np.pi * (steps % 8) / 8)), rtol=1e-5)


def test_expected_wins_do_not_depend_on_a_users_offset():
    rng = np.random.default_rng(0)
    scores, others = rng.normal(size=(3, 4)), rng.normal(size=(3, 5))
    offset = np.array([[0.0], [5.0], [-3.0]])
    found = losses.expected_win(scores + offset, others + offset)
    expected = np.mean(1 / (1 + np.exp(others[:, None] - scores[:, :, None])), axis=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wrong_arguments_are_named():
    one = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="mean must have a row for each of the 2 users"):
        losses.vpl(one, one, jnp.zeros((3, 2)), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="log_variance must have the shape of mean"):
        losses.gaussian_kl(one, jnp.zeros(3))
    with pytest.raises(ValueError, match="others must have a row for each of the 2 users"):
        losses.expected_win(one, jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="floor must be in"):
        losses.cyclical_annealing(0, period=3, floor=2.0)
    with pytest.raises(ValueError, match="kl_weight must be >= 0"):
        losses.vpl(one, one, one, one, kl_weight=-1.0)
