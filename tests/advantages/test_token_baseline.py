import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)

OTB = jax.jit(advantages.otb, static_argnames=("group_size", "handle_zero_tail"))


def _random(seed=0, interior=True, shape=(8, 9)):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    for b, length in enumerate(rng.integers(1, 8, shape[0])):
        mask[b, 2 : 2 + length] = True
    if interior:
        mask &= rng.random(shape) < 0.7
    logits = rng.normal(size=(*shape, 5))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = rng.integers(0, 5, shape)
    logp = np.log(np.take_along_axis(p, chosen[..., None], -1)[..., 0])
    rewards = rng.normal(size=shape)
    return rewards, mask, logp, (p**2).sum(-1)


def _loop(rewards, mask, logp, squares, group_size, tail, ratio=None):
    """Turns are concatenated, one rollout and one action after the other, in float64."""
    out = np.zeros(mask.shape)
    ratio = np.ones(mask.shape) if ratio is None else ratio
    for start in range(0, mask.shape[0], group_size):
        rows = [b for b in range(start, start + group_size) if mask[b].any()]
        if len(rows) < 2:
            continue
        to_go = {b: rewards[b, mask[b]][::-1].cumsum()[::-1] for b in rows}
        energy = (1 - 2 * np.exp(logp) + squares) * ratio**2
        spent = {b: energy[b, mask[b]].cumsum() for b in rows}
        for b in rows:
            for k, t in enumerate(np.flatnonzero(mask[b])):
                alive = [j for j in rows if len(to_go[j]) > k]
                baseline = sum(spent[j][k] * to_go[j][k] for j in alive) / sum(spent[j][k] for j in alive)
                out[b, t] = to_go[b][k] - (0 if tail and len(alive) == 1 else baseline)
    return out


@pytest.mark.parametrize("interior", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_the_token_baseline_agrees_with_a_float64_loop_over_concatenated_turns(interior, tail):
    arrays = _random(1, interior)
    for group_size in (2, 4):
        given = OTB(*arrays, group_size=group_size, handle_zero_tail=tail)
        np.testing.assert_allclose(given, _loop(*arrays, group_size, tail), atol=2e-5)


def test_importance_ratios_enter_the_energy_squared():
    arrays = _random(2)
    ratio = np.exp(np.random.default_rng(3).normal(size=arrays[1].shape))
    given = OTB(*arrays, group_size=4, ratio=ratio)
    np.testing.assert_allclose(given, _loop(*arrays, 4, True, ratio), atol=2e-5)


def test_energy_is_the_squared_gradient_of_the_log_prob():
    logits = jnp.array([0.2, -1.0, 0.7])
    p = jax.nn.softmax(logits)
    for v in range(3):
        gradient = jax.grad(lambda z, v=v: jax.nn.log_softmax(z)[v])(logits)
        np.testing.assert_allclose(jnp.sum(gradient**2), 1 - 2 * p[v] + jnp.sum(p**2), rtol=1e-5)


def test_hand_worked_numbers_and_the_tail_of_the_longest_rollout():
    # Energies 1/2 everywhere: W = 1/2, 1, 3/2. Returns 1, 1, 1 and 0: B = 1/2 at the first action, alone after it.
    logp, squares = jnp.log(jnp.full((2, 3), 0.5)), jnp.full((2, 3), 0.5)
    rewards, mask = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), jnp.array([[1, 1, 1], [1, 0, 0]])
    assert OTB(rewards, mask, logp, squares, group_size=2).tolist() == [[0.5, 1, 1], [-0.5, 0, 0]]
    without = OTB(rewards, mask, logp, squares, group_size=2, handle_zero_tail=False)
    assert without.tolist() == [[0.5, 0, 0], [-0.5, 0, 0]]


def test_single_and_empty_rollouts_equal_returns_and_certain_tokens_are_finite():
    rewards, mask, logp, squares = (np.array(x) for x in _random(4))
    mask[:4] = False
    mask[0, 3] = True  # one rollout with one action
    mask[4:, 2] = True
    rewards[4:] = 0.3 * (np.cumsum(mask[4:], 1) == 1)
    logp[:], squares[:] = 0.0, 1.0  # certain tokens spend no energy
    function = functools.partial(OTB, group_size=4)
    given = np.asarray(function(np.where(mask, rewards, np.nan), mask, logp, squares))
    np.testing.assert_allclose(given[mask & (np.cumsum(mask, 1) == 1)], 0, atol=0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(function(rewards, mask, x, squares))))(jnp.asarray(logp))
    assert np.isfinite(gradient).all()
    assert not np.asarray(function(rewards, np.zeros_like(mask), logp, squares)).any()


def test_dtypes_and_wrong_shapes():
    x = jnp.ones((4, 3), jnp.bfloat16)
    assert jax.eval_shape(functools.partial(OTB, group_size=2), x, x, x, x).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"logp must have the shape of mask, \(4, 3\), got \(4,\)"):
        advantages.otb(x, x, x[:, 0], x, group_size=2)
    with pytest.raises(ValueError, match="group_size must be at least 1 and divide the number of rows, 4, got 3"):
        advantages.otb(x, x, x, x, group_size=3)
