"""What every surrogate loss has in common: at ratio 1 it is REINFORCE, and it is finite everywhere."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.losses.off_policy import dro, rec, topr
from jaxrl_post.losses.sequence_ratio import gmpo, gspo, vespo
from jaxrl_post.losses.surrogates import cispo, dppo, sapo
from jaxrl_post.losses.trust import decoupled_ppo

ALL = {
    "ppo": losses.ppo,
    "ppo with dual clip": functools.partial(losses.ppo, dual_clip=3.0),
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": dppo,
    "dppo_kl": functools.partial(dppo, divergence="kl"),
    "gspo": gspo,
    "gspo of sums": functools.partial(gspo, normalize_length=False),
    "gmpo": gmpo,
    "vespo": vespo,
    "topr": topr,
    "topr of tokens": functools.partial(topr, level="token"),
    "rec": rec,
    "rec ring": functools.partial(rec, clip="ring", importance_weight=True, penalty="opmd"),
    "rec of sequences": functools.partial(rec, level="sequence"),
    "dro": dro,
    "dro of tokens": functools.partial(dro, level="token"),
    "decoupled_ppo": decoupled_ppo,
}


def _call(name, logp, old_logp, advantages, mask):
    available = {"logp": logp, "old_logp": old_logp, "advantages": advantages, "mask": mask, "sampler_logp": old_logp}
    parameters = inspect.signature(ALL[name]).parameters.values()
    wanted = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return ALL[name](**{key: available[key] for key in wanted})


@functools.cache
def _value_and_grad(name):
    def total(logp, old_logp, advantages, mask):
        return losses.aggregate(_call(name, logp, old_logp, advantages, mask), mask, "seq_mean_token_mean")

    return jax.jit(jax.value_and_grad(total))


def _grad(name, *arrays):
    return _value_and_grad(name)(*arrays)


def _batch(seed=0, rows=4, length=5):
    rng = np.random.default_rng(seed)
    logp = jnp.asarray(-rng.random((rows, length)) * 3)
    advantages = jnp.asarray(np.repeat(rng.normal(size=(rows, 1)), length, axis=1))
    mask = jnp.asarray((rng.random((rows, length)) < 0.7).astype(np.float32)).at[:, 0].set(1)
    return logp, advantages, mask


@pytest.mark.parametrize("name", ALL)
def test_where_the_ratio_is_one_the_gradient_is_that_of_reinforce(name):
    logp, advantages, mask = _batch()
    _, gradient = _grad(name, logp, logp, advantages, mask)
    # One token's share of the mean over sequences of means over tokens.
    reinforce = -advantages * mask / mask.sum(axis=1, keepdims=True) / len(mask)
    if name == "gspo of sums":  # the product of the ratios: every token counts for the whole sequence
        reinforce = reinforce * mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, reinforce, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "options"), [("cispo", {"clip_high": 1e9}), ("dppo", {"delta_low": 2, "delta_high": 2})]
)
def test_without_bounds_the_gradient_is_that_of_the_importance_weighted_advantage(name, options):
    loss = {"cispo": cispo, "dppo": dppo}[name]
    logp, advantages, _ = _batch(1)
    old_logp = jax.random.normal(jax.random.key(0), logp.shape) * 0.5 + logp
    gradient = jax.grad(lambda x: loss(x, old_logp, advantages, **options).sum())(logp)
    weighted = jax.grad(lambda x: -jnp.sum(jnp.exp(x - old_logp) * advantages))(logp)
    np.testing.assert_allclose(gradient, weighted, rtol=1e-5)


def test_gmpo_and_gspo_of_one_token_are_the_importance_weighted_advantage():
    logp, old_logp = jnp.array([[-1.0], [-0.3]]), jnp.array([[-1.1], [-0.1]])
    advantages, ones = jnp.array([[2.0], [-1.0]]), jnp.ones((2, 1))
    expected = -np.exp(np.asarray(logp - old_logp)) * np.asarray(advantages)
    for loss in (gmpo, functools.partial(gspo, clip_low=1.0, clip_high=1.0)):
        gradient = jax.grad(lambda x, loss=loss: loss(x, old_logp, advantages, ones).sum())(logp)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_no_input_makes_a_surrogate_or_its_gradient_infinite(name):
    far = jnp.array([[0.0, -1e4, -500.0, -0.0], [-30.0, 0.0, -1e-8, -700.0]])
    near = jnp.array([[-1e4, 0.0, -0.5, -1e30], [-1e-3, -30.0, 0.0, 0.0]])
    for advantages in (jnp.ones((2, 4)), -jnp.ones((2, 4)), jnp.zeros((2, 4))):
        for mask in (jnp.ones((2, 4)), jnp.array([[1.0, 0, 0, 1], [0, 0, 0, 0]]), jnp.zeros((2, 4))):
            value, gradient = _grad(name, far, near, advantages, mask)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
            assert np.all(np.asarray(gradient)[np.asarray(mask) == 0] == 0)


@pytest.mark.parametrize("name", ALL)
def test_narrow_dtypes_are_raised_and_wide_ones_kept(name):
    assert jax.eval_shape(functools.partial(_call, name), *[jnp.ones((2, 3), jnp.bfloat16)] * 4).dtype == jnp.float32
    with jax.enable_x64(True):
        assert jax.eval_shape(functools.partial(_call, name), *[jnp.ones((2, 3))] * 4).dtype == jnp.float64


@pytest.mark.parametrize("name", ALL)
def test_only_the_trained_log_probs_have_a_gradient(name):
    logp, advantages, mask = _batch(2)
    gradients = jax.jit(jax.grad(lambda *x: _call(name, *x).sum(), argnums=(1, 2)))(logp, logp - 0.1, advantages, mask)
    assert all(np.all(np.asarray(gradient) == 0) for gradient in gradients)


@pytest.mark.parametrize("name", ALL)
def test_rows_are_independent_and_vmap_equals_a_loop(name):
    logp, advantages, mask = _batch(3)
    old_logp = logp - 0.3 * jnp.sign(advantages)
    whole = _call(name, logp, old_logp, advantages, mask)
    rows = jax.jit(jax.vmap(lambda *row: _call(name, *(x[None] for x in row))[0]))(logp, old_logp, advantages, mask)
    np.testing.assert_allclose(rows, whole, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_shapes_that_differ_are_refused_by_name(name):
    one = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"advantages must have the shape of logp, \(2, 3\), got \(2,\); .*per_token"):
        _call(name, one, one, jnp.zeros(2), one)
