"""Methods that learn from a part of what was sampled, against what the functions they are made of say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, masked, methods
from jaxrl_post.types import TokenStats
from tests.methods.test_shaped_rewards import batch, found


def test_pf_ppo_whitens_what_it_keeps():
    reward = [[1.0, -2.0, 3.0, 0.0]]
    made = batch(reward, 2)
    stats = {"policy": TokenStats(logp=made.logp), "critic": TokenStats(value=jnp.zeros_like(made.logp))}
    for whiten in (True, False):
        method = methods.pf_ppo(whiten=whiten, lam=1.0)
        targets, _ = method.targets((), made, stats, jax.random.key(0))
        assert targets.mask.sum(axis=1).tolist() == [0, 2, 2, 0]
        credit = jnp.repeat(jnp.array(reward[0])[:, None], 3, axis=1)
        wanted = masked.whiten(credit, targets.mask) if whiten else credit * targets.mask
        np.testing.assert_allclose(targets.advantages, wanted, atol=1e-6)
        np.testing.assert_allclose(targets.returns[:, 1], reward[0])


def test_prof_normalizes_over_what_is_left():
    scores = jnp.array([[0.9, 0.8, 0.6, 0.5, 0.2, 0.1, 0.3, 0.7]])
    made = batch([[1.0] * 5 + [0.0] * 3], 4, rewards={"judge": scores})
    method = methods.prof(process="judge", keep=4, steps={"name": "length", "num_steps": 2})
    targets = found(method, made)
    assert targets.mask.sum(axis=1).tolist() == [4, 4, 0, 0, 0, 4, 4, 0]
    kept = advantages.grpo(jnp.array([[1.0, 1.0, 0.0, 0.0]]))[0]
    np.testing.assert_allclose(targets.advantages[jnp.array([0, 1, 5, 6]), 1], kept, rtol=1e-6)


def test_reinforce_ada_keeps_halves_and_the_mean_of_all():
    reward = jnp.zeros((1, 16)).at[0, jnp.array([3, 7, 9])].set(1.0)
    targets = found(methods.reinforce_ada(keep=4), batch(reward))
    assert np.flatnonzero(targets.mask.sum(axis=1)).tolist() == [0, 1, 3, 7]
    np.testing.assert_allclose(targets.advantages[jnp.array([0, 1, 3, 7]), 1], [-0.1875, -0.1875, 0.8125, 0.8125])


def test_observe_r1_weighs_prompts_and_pays_for_brevity():
    reward = jnp.array([[1.0] * 4 + [0.0] * 4, [1.0] + [0.0] * 7, [1.0] * 8])
    made = batch(reward)
    targets = found(methods.observe_r1(), made)
    plain = advantages.grpo(reward)
    np.testing.assert_allclose(
        targets.advantages[:, 1].reshape(3, 8), plain * jnp.array([[1.8], [0.7875], [0.0]]), atol=1e-5
    )
    long = batch([[1.0, 1.0, 0.0]], 10)
    long = long.replace(mask=long.mask * (jnp.arange(11) <= jnp.array([10, 6, 3])[:, None]))
    targets = found(methods.observe_r1(min_length=5, normalize_std=False), long)
    bonus = np.array([1.0, 1.2, 0.0])
    np.testing.assert_allclose(targets.advantages[:, 1], 1.6 * (bonus - bonus.mean()), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.pf_ppo(keep="worst"), "keep"),
        (lambda: methods.prof(process="a", keep=1), "keep"),
        (lambda: methods.prof(process="a", keep=4, max_steps=1), "max_steps"),
        (lambda: methods.reinforce_ada(keep=1), "keep"),
        (lambda: methods.reinforce_ada(keep=4, beta=0.1, kl_in="reward"), "kl_in"),
        (lambda: methods.observe_r1(bonus=-1.0), "bonus"),
        (lambda: methods.observe_r1(peak=0.0), "peak"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
