"""Methods that shape the reward of a sequence, against what the functions they are made of say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, methods, rewards
from jaxrl_post.types import TokenStats
from tests.claims.offline import answers


def batch(reward, length=1, **changes):
    made = answers(jnp.zeros((*np.shape(reward), length), jnp.int32))
    return made.replace(reward=jnp.asarray(reward, jnp.float32), **changes)


def found(method, rollouts, **stats):
    given = {"policy": TokenStats(logp=rollouts.logp)} | {name: TokenStats(logp=x) for name, x in stats.items()}
    targets, _ = method.targets(method.init(rollouts, rollouts.num_prompts), rollouts, given, jax.random.key(0))
    return targets


def test_par_compares_with_the_references_there_are():
    reward = [[2.0, 0.0, 1.0], [5.0, 0.0, 1.0]]
    extras = {"a": jnp.array([0.0, jnp.nan]), "b": jnp.array([1.0, jnp.nan])}
    targets = found(methods.par(references=["a", "b"]), batch(reward, extras=extras))
    shaped = rewards.preference_as_reward(jnp.array(reward[:1]), jnp.broadcast_to(jnp.array([0.0, 1.0]), (1, 3, 2)))
    np.testing.assert_allclose(targets.advantages[:3, 1], (shaped - shaped.mean())[0], atol=1e-6)
    assert targets.mask.sum(axis=1).tolist() == [1, 1, 1, 0, 0, 0]  # no reference, no lesson
    with pytest.raises(ValueError, match=r"extras\['a'\]"):
        found(methods.par(references="a"), batch(reward))


def test_verpo_reads_a_component_for_each_test():
    passes = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]], jnp.float32)
    parts = {name: passes[None, :, i] for i, name in enumerate("abc")}
    targets = found(methods.verpo(tests=["a", "b", "c"], delta=0.0), batch(jnp.zeros((1, 4)), rewards=parts))
    np.testing.assert_allclose(targets.advantages[:, 1], [1.204898, -0.401633, -0.401633, -0.401633], rtol=1e-5)
    with pytest.raises(ValueError, match=r"rewards\['d'\]"):
        found(methods.verpo(tests=["d"]), batch(jnp.zeros((1, 4)), rewards=parts))


def test_verpo_credits_turns():
    made = batch(jnp.zeros((1, 2)), 4)
    step = jnp.array([[-1, 0, 0, 1, 1]] * 2)
    earned = jnp.array([[0, 0, 1, 0, 1], [0, 0, 0, 0, 1.0]])
    targets = found(methods.verpo(tests=["t"]), made.replace(step=step, rewards={"t": earned}))
    whole = advantages.verpo(jnp.array([[[1, 1], [0, 1]]])[..., None])
    np.testing.assert_allclose(targets.advantages[:, 1:], jnp.repeat(whole[0], 2, axis=1), atol=1e-6)


def test_grpo_care_reads_the_last_part_of_a_completion():
    made = batch([[1.0, 1.0, 0.0]], 4)
    logp = jnp.log(jnp.array([[1.0, 0.9, 0.9, 0.2, 0.2], [1.0, 0.1, 0.1, 0.6, 0.6], [1.0, 0.5, 0.5, 0.9, 0.9]]))
    method = methods.grpo_care(answer={"name": "length", "num_steps": 2}, normalize_std=False)
    targets = found(method, made, reference=logp)
    np.testing.assert_allclose(targets.advantages[:, 1], np.array([1.0, 1.5, 0.0]) - 2.5 / 3, atol=1e-6)
    undivided = methods.grpo_care(answer={"name": "length", "num_steps": 1}, normalize_std=False)
    targets = found(undivided, made, reference=logp)
    # Without an answer confidence is 0, for all alike.
    np.testing.assert_allclose(targets.advantages[:, 1], np.array([1.5, 1.5, 0.0]) - 1.0, atol=1e-6)


def test_harmo_takes_from_what_is_too_short():
    made = batch([[1.0, 0.0, 1.0]], 10)
    lengths = jnp.array([10, 4, 10])
    mask = made.mask * (jnp.arange(11) <= lengths[:, None])
    targets = found(methods.harmo(), made.replace(mask=mask))
    reward = np.array([1.0, -0.25, 1.0])
    np.testing.assert_allclose(targets.advantages[:, 1], reward - reward.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.par(references=[]), "references"),
        (lambda: methods.par(shape="cubic"), "shape"),
        (lambda: methods.par(scale=0.0), "scale"),
        (lambda: methods.par(beta=0.1, kl_in="reward"), "kl_in"),
        (lambda: methods.verpo(tests="a"), "tests"),
        (lambda: methods.verpo(tests=["a"], gamma=0.0), "gamma"),
        (lambda: methods.verpo(tests=["a"], sigma=-1.0), "sigma"),
        (lambda: methods.grpo_care(answer="nowhere"), "nowhere"),
        (lambda: methods.grpo_care(answer="turns", weight=-1.0), "weight"),
        (lambda: methods.harmo(tolerance=0.0), "tolerance"),
        (lambda: methods.harmo(max_penalty=-1.0), "max_penalty"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
