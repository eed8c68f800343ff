import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from jaxrl_post.losses import pairwise
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)
pairwise = all_compiled(pairwise)

LOSSES = {
    "ppg": lambda logp, old, *rest: pairwise.ppg(logp, *rest),
    "separate": pairwise.p3o_separate,
    "joint": pairwise.p3o_joint,
}


def _random(seed=0):
    rng = np.random.default_rng(seed)
    logp = -rng.random((5, 4)) * 3
    old = logp + rng.normal(size=(5, 4)) * 0.4
    rewards = rng.normal(size=(5, 4))
    rewards[4] = 0.7
    valid = rng.random((5, 4)) < 0.7
    valid[0], valid[1], valid[2] = True, [False, True, False, False], False
    return logp, old, rewards, valid


def _loop(name, logp, old, rewards, valid):
    result = np.zeros(5)
    for p in range(5):
        losses = []
        for i, j in itertools.combinations(np.flatnonzero(valid[p]), 2):
            difference = rewards[p, i] - rewards[p, j]
            ratio = np.exp(logp[p] - old[p])
            margin = (logp[p, i] - logp[p, j]) / 2
            if name == "ppg":
                losses.append(-difference * margin)
            elif name == "separate":
                terms = [
                    min(a * r, a * np.clip(r, 0.8, 1.2)) for a, r in ((difference, ratio[i]), (-difference, ratio[j]))
                ]
                losses.append(-sum(terms) / 2)
            else:
                joint = ratio[i] * ratio[j]
                losses.append(-min(difference * joint * margin, difference * np.clip(joint, 0.8, 1.2) * margin))
        result[p] = np.mean(losses) if losses else 0
    return result


@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_with_a_loop_over_pairs_and_never_read_invalid_rows(name):
    logp, old, rewards, valid = _random()
    expected = _loop(name, logp, old, rewards, valid)
    given = [np.where(valid, x, np.nan).astype(np.float32) for x in (logp, old, rewards)]
    value, gradient = jax.jit(jax.value_and_grad(lambda *x: (LOSSES[name](*x, valid) * jnp.arange(1.0, 6)).sum()))(
        *given
    )
    np.testing.assert_allclose(value, (expected * np.arange(1, 6)).sum(), rtol=1e-4)
    np.testing.assert_allclose(LOSSES[name](*given, valid), expected, rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(gradient))
    assert not np.asarray(gradient)[[1, 2, 4]].any()  # one answer, none, equal rewards


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("group_size", [2, 5])
def test_on_policy_the_gradient_is_that_of_rloo(name, group_size):
    rng = np.random.default_rng(1)
    logp, rewards = rng.normal(size=(3, group_size)), rng.normal(size=(3, group_size))
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda x: LOSSES[name](x, logp, rewards).sum()))(logp)
        np.testing.assert_allclose(gradient, -advantages.rloo(rewards) / group_size, rtol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_prompt_adds_to_all_rewards_cancels_bitwise(name):
    logp, old, rewards, valid = _random(2)
    rewards = np.round(rewards * 8) / 8  # exact in float32 after the shift
    shift = np.array([[0.0], [64.0], [-256.0], [1024.0], [8.0]])
    value = jax.jit(jax.value_and_grad(lambda x, r: LOSSES[name](x, old, r, valid).sum()))
    for given, expected in zip(value(logp, rewards + shift), value(logp, rewards), strict=True):
        np.testing.assert_array_equal(given, expected)


def test_a_pair_gives_the_papers_coefficients_and_ratios():
    rewards = jnp.array([[3.0, 1.0]])
    gradient = jax.jit(jax.grad(lambda x: pairwise.ppg(x, rewards).sum()))(jnp.zeros((1, 2)))
    np.testing.assert_allclose(gradient, [[-1, 1]])
    old = jnp.zeros((1, 2))
    logp = jnp.array([[0.1, -0.05]])
    separate = jax.jit(jax.grad(lambda x: pairwise.p3o_separate(x, old, rewards).sum()))(logp)
    np.testing.assert_allclose(separate, [[-1.10517, 0.951229]], rtol=1e-5)
    joint = jax.jit(jax.grad(lambda x: pairwise.p3o_joint(x, old, rewards).sum()))(logp)
    np.testing.assert_allclose(joint, [[-1.051271, 1.051271]], rtol=1e-5)


def test_clipping_stops_the_ratio_that_went_far_enough_and_only_that_one():
    rewards, old = jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2))
    gradient = jax.jit(jax.grad(lambda x: pairwise.p3o_separate(x, old, rewards).sum()))
    np.testing.assert_allclose(gradient(jnp.log(jnp.array([[1.5, 0.9]]))), [[0, 0.45]], rtol=1e-5)
    np.testing.assert_allclose(gradient(jnp.log(jnp.array([[1.1, 0.5]]))), [[-0.55, 0]], rtol=1e-5)
    np.testing.assert_allclose(gradient(jnp.log(jnp.array([[0.5, 1.5]]))), [[-0.25, 0.75]], rtol=1e-5)
    joint = jax.jit(jax.grad(lambda x: pairwise.p3o_joint(x, old, rewards).sum()))
    # Product 3: ranked as the rewards do, its weight is 1.2; ranked the other way, it keeps 3.
    np.testing.assert_allclose(joint(jnp.log(jnp.array([[2.0, 1.5]]))), [[-0.6, 0.6]], rtol=1e-5)
    np.testing.assert_allclose(joint(jnp.log(jnp.array([[1.5, 2.0]]))), [[-1.5, 1.5]], rtol=1e-5)


def test_bfloat16_and_distant_policies_stay_finite():
    logp = jnp.array([[-900.0, -3.0], [-2.0, -800.0]], jnp.bfloat16)
    old = jnp.array([[-1.0, -700.0], [-2.0, -2.0]], jnp.bfloat16)
    rewards = jnp.array([[1.0, -1.0], [0.5, 0.25]], jnp.bfloat16)
    for name, loss in LOSSES.items():
        value, gradient = jax.jit(jax.value_and_grad(lambda x, loss=loss: loss(x, old, rewards).sum()))(logp)
        assert value.dtype == jnp.float32, name
        assert np.isfinite(value), name
        assert np.all(np.isfinite(np.asarray(gradient, np.float32))), name


def test_wrong_arguments_are_named():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"logp must be \[P, G\]"):
        pairwise.ppg(x[0], x[0])
    with pytest.raises(ValueError, match="rewards must have the shape of logp"):
        pairwise.p3o_joint(x, x, x[:1])
    for loss in (pairwise.p3o_separate, pairwise.p3o_joint):
        with pytest.raises(ValueError, match="clip_low must be >= 0"):
            loss(x, x, x, clip_low=-0.1)
