import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)

STEP = np.array([[-1, 0, 0, -1, 1, 1, 1, 3], [-1, 2, 2, 2, 2, 2, 2, 2]])
MASK = np.array([[0, 1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0, 0, 0]])


def _random(seed=0):
    rng = np.random.default_rng(seed)
    old = rng.uniform(-2, -0.1, STEP.shape)
    advantages = np.zeros(STEP.shape)
    for b in range(2):
        for k in range(4):
            advantages[b, STEP[b] == k] = rng.normal()
    return old + rng.normal(0, 0.3, STEP.shape), old, advantages * MASK


@pytest.mark.parametrize("normalize_length", [True, False])
def test_every_step_has_the_value_and_the_gradient_of_its_own_ppo(normalize_length):
    logp, old, advantages = _random()

    def step_form(logp):
        total = 0.0
        for b in range(2):
            for k in range(4):
                on = np.flatnonzero((STEP[b] == k) & (MASK[b] > 0))
                if on.size:
                    d = jnp.sum((logp - old)[b, on]) / (on.size if normalize_length else 1)
                    ratio, a = jnp.exp(d), advantages[b, on[0]]
                    total += jnp.maximum(-ratio * a, -jnp.clip(ratio, 0.9, 1.2) * a)
        return total

    def token_form(logp):
        value = losses.step_ppo(
            logp, old, advantages, MASK, STEP, clip_low=0.1, clip_high=0.2, normalize_length=normalize_length
        )
        total = 0.0
        for b in range(2):
            for k in range(4):
                on = np.flatnonzero((STEP[b] == k) & (MASK[b] > 0))
                total += jnp.mean(value[b, on]) if on.size else 0.0
        return total

    by_token, by_step = (jax.jit(jax.value_and_grad(form))(logp) for form in (token_form, step_form))
    np.testing.assert_allclose(by_token[0], by_step[0], rtol=1e-5)
    np.testing.assert_allclose(by_token[1], by_step[1], atol=1e-5)


def test_one_step_per_sequence_is_the_ratio_of_the_sequence_and_one_per_token_is_ppo():
    logp, old, advantages = (jnp.asarray(x, jnp.float32) for x in _random(1))
    whole = jnp.zeros(STEP.shape, int)
    clips = {"clip_low": 0.1, "clip_high": 0.1}
    sequence = losses.gspo(logp, old, advantages, MASK, **clips)
    inside = MASK > 0
    np.testing.assert_allclose(
        losses.step_ppo(logp, old, advantages, MASK, whole, **clips)[inside], sequence[inside], rtol=1e-5
    )
    single = jnp.broadcast_to(jnp.arange(8), STEP.shape)
    token = losses.ppo(logp, old, advantages, **clips)
    for step in (single, -single - 1, single + 8):  # tokens of no step are steps of their own
        given = losses.step_ppo(logp, old, advantages, MASK, step, **clips)
        np.testing.assert_allclose(given[inside], token[inside], rtol=1e-5)


def test_clipping_a_step_takes_the_gradient_of_that_step_and_of_no_other():
    logp, step, ones = jnp.array([[0.5, 0.5, 0.05, 0.05]]), jnp.array([[0, 0, 1, 1]]), jnp.ones((1, 4))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(losses.step_ppo(x, 0 * logp, ones, ones, step))))(logp)
    np.testing.assert_allclose(gradient[0], [0, 0, -np.exp(0.05), -np.exp(0.05)], rtol=1e-5)


def test_a_step_log_ratio_is_clamped_and_masked_places_are_not_read():
    logp = jnp.array([[jnp.nan, 30.0, 30.0, 1.0]])
    step, mask = jnp.array([[0, 0, 0, 1]]), jnp.array([[0, 1, 1, 1]])
    given = losses.step_log_ratio(logp, jnp.zeros((1, 4)), mask, step)
    np.testing.assert_allclose(given, [[0, 20, 20, 1]])
    ones = jnp.ones((1, 4))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(losses.step_ppo(x, 0 * ones, ones, mask, step))))(logp)
    assert bool(jnp.isfinite(gradient).all())
    with pytest.raises(ValueError, match=r"step must have the shape of logp, \(1, 4\), got \(1, 3\)"):
        losses.step_log_ratio(logp, logp, mask, step[:, :3])
    with pytest.raises(ValueError, match="clip_low must be >= 0"):
        losses.step_ppo(logp, logp, logp, mask, step, clip_low=-0.1)
