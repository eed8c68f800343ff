"""Steps of flows keep the marginals, have the log-probs of their Gaussians, and are trained by any method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxrl_post import diffusion, methods, training


def gaussian_velocity(x, time, mean=1.0, width=0.5):
    """The velocity of a flow to a Gaussian, exactly."""
    variance = ((1 - time) * width) ** 2 + time**2
    off = (x - (1 - time) * mean) / variance
    return time * off - mean - (1 - time) * width**2 * off


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_both_steps_end_in_the_data(level):
    keys = jax.random.split(jax.random.key(0), 201)
    x = jax.random.normal(keys[0], (20_000, 1))
    times = diffusion.flow_times(200)
    for k in range(200):
        mean, std = diffusion.sde_step(x, gaussian_velocity(x, times[k]), times[k], times[k + 1], level=level)
        x = mean + std * jax.random.normal(keys[k + 1], x.shape)
    np.testing.assert_allclose([jnp.mean(x), jnp.std(x)], [1.0, 0.5], atol=0.02)


def test_without_noise_the_stochastic_step_is_the_deterministic_one():
    x, v = jnp.array([[0.3, -1.0]]), jnp.array([[2.0, 0.5]])
    mean, std = diffusion.sde_step(x, v, 0.6, 0.4, level=0.0)
    np.testing.assert_allclose(mean, diffusion.ode_step(x, v, 0.6, 0.4), rtol=1e-6)
    assert float(std) == 0.0
    assert all(bool(jnp.all(jnp.isfinite(part))) for part in diffusion.sde_step(x, v, 1.0, 0.9))


def test_log_probs_are_those_of_the_gaussian():
    x, mean = np.array([[0.1, 0.9, -2.0]]), np.array([[0.0, 1.0, 0.5]])
    expected = stats.norm.logpdf(x, mean, 0.3)
    given = jnp.asarray(x), jnp.asarray(mean), 0.3
    np.testing.assert_allclose(diffusion.gaussian_logp(*given), expected.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(diffusion.gaussian_logp(*given, reduce="sum"), expected.sum(-1), rtol=1e-5)
    with pytest.raises(ValueError, match="reduce"):
        diffusion.gaussian_logp(*given, reduce="max")


def test_shifted_times_spend_more_steps_near_noise():
    times = diffusion.flow_times(4, shift=3.0)
    np.testing.assert_allclose(times, [1.0, 0.9, 0.75, 0.5, 0.0], atol=1e-6)
    with pytest.raises(ValueError, match="steps"):
        diffusion.flow_times(0)


def velocity(params, x, time, condition):
    return gaussian_velocity(x, time) + params["bias"] + params["slope"] * condition


def made(params, key, conditions=((-1.0,), (1.0,)), group_size=8):
    return diffusion.generate(
        velocity,
        params,
        jnp.asarray(conditions),
        key,
        times=diffusion.flow_times(5),
        dimensions=1,
        group_size=group_size,
        reduce="sum",
    )


START = {"bias": jnp.zeros(1), "slope": jnp.zeros(1)}


def test_a_trajectory_does_not_depend_on_those_beside_it():
    few, many = made(START, jax.random.key(3), group_size=4), made(START, jax.random.key(3), group_size=8)
    np.testing.assert_allclose(few.tokens, many.tokens[:8], rtol=1e-5, atol=1e-5)
    assert float(jnp.sum(few.mask[:, 0])) == 0


def test_other_fields_than_log_probs_are_refused():
    rollouts = made(START, jax.random.key(0))
    with pytest.raises(ValueError, match="entropy"):
        diffusion.score(velocity, times=diffusion.flow_times(5))(START, rollouts, frozenset({"entropy"}), None)


def test_a_method_of_language_models_trains_a_flow():
    """Rewards ask for data at the condition, which the flow does not know of."""
    times, method = diffusion.flow_times(5), methods.grpo(beta=0.0)
    score = diffusion.score(velocity, times=times, reduce="sum")

    def rewarded(params, key):
        rollouts = made(params, key, group_size=32)
        target = jnp.repeat(rollouts.extras["condition"], 32, axis=0)
        reward = -jnp.sum(jnp.square(rollouts.tokens[:, -1] - target), axis=-1)
        return rollouts.replace(reward=reward.reshape(rollouts.reward.shape))

    first = rewarded(START, jax.random.key(1))
    optimizer = optax.adam(0.1)
    state = training.init({"policy": START}, method, optimizer, jax.random.key(0), rollouts=first, num_prompts=2)
    step, sample = training.make_step(score, method, optimizer), jax.jit(rewarded)
    for number in range(30):
        state, _ = step(state, sample(state.params["policy"], jax.random.key(number)))
    after = rewarded(state.params["policy"], jax.random.key(1))
    assert float(jnp.mean(after.reward)) > float(jnp.mean(first.reward)) + 1.0
    assert float(state.params["policy"]["slope"][0]) < -0.3  # towards noise is away from data
