"""Methods without a verifier, and with a judge of steps, against what the functions they are made of say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, data, methods
from jaxrl_post.types import TokenStats


def test_reasoning_earns_what_it_makes_the_answer_worth():
    rollouts = data.to_rollouts([[5], [6]], [[[1, 2], [3]], [[4], [4, 4]]], length=4)
    rollouts = rollouts.replace(extras={"answer_tokens": jnp.array([[8, 9], [7, -1]])})
    for form in ("log_prob", "prob", "group"):
        method = methods.likelihood_reward(form=form, prefix=[3])
        probe, role = method.probes(rollouts)["answer"]
        assert role == "policy"
        assert probe.tokens.shape[0] == 2 * 3
        logp = jnp.log(jnp.linspace(0.1, 0.9, 6))[:, None] * probe.mask
        stats = {"policy": TokenStats(logp=rollouts.logp), "probe/answer": TokenStats(logp=logp)}
        targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
        total = jnp.sum(logp, axis=1).reshape(2, 3)[:, 1:]
        wanted = {
            "log_prob": advantages.rloo(total),
            "prob": advantages.rloo(jnp.exp(total)),
            "group": advantages.jepo(total),
        }[form]
        np.testing.assert_allclose(targets.advantages[:, 1], wanted.reshape(-1), rtol=1e-5)


def test_a_prompt_without_an_answer_is_not_trained_on():
    rollouts = data.to_rollouts([[5], [6]], [[[1, 2], [3]], [[4], [4, 4]]], length=4)
    rollouts = rollouts.replace(extras={"answer_tokens": jnp.array([[8], [-1]])})
    method = methods.likelihood_reward()
    probe, _ = method.probes(rollouts)["answer"]
    stats = {
        "policy": TokenStats(logp=rollouts.logp),
        "probe/answer": TokenStats(logp=jnp.full(probe.tokens.shape, -1.0)),
    }
    targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
    assert targets.mask.sum(axis=1).tolist() == [2, 1, 0, 0]


def test_clipped_differences_stand_on_the_ends_of_steps_and_the_outcome_on_the_last():
    rollouts = data.to_rollouts([[5]], [[[1, 1, 2, 2, 3]]], length=6)
    rollouts = rollouts.replace(
        step=jnp.array([[-1, 0, 0, 1, 1, 2]]),
        reward=jnp.ones((1, 1)),
        rewards={"judge": jnp.array([[0, 0.9, 0, 0.8, 0, 0.95]])},
    )
    value = TokenStats(value=jnp.zeros((1, 6)))
    stats = {"policy": TokenStats(logp=rollouts.logp), "critic": value}

    def returns(**options):
        method = methods.pr_clip_delta(process="judge", alpha=0.5, whiten=False, **options)
        targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
        return targets.advantages[0, 1:]

    # From each token the return is half of the score of its step, clipped, and the outcome.
    np.testing.assert_allclose(returns(threshold=0.85), [1.0, 1.0, 0.975, 0.975, 1.0], atol=1e-6)
    np.testing.assert_allclose(returns(threshold=None), [1.45, 1.45, 1.4, 1.4, 1.0], atol=1e-6)
    farmed = returns(threshold=None, delta=False)
    np.testing.assert_allclose(farmed, [2.325, 2.325, 1.875, 1.875, 1.475], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.likelihood_reward(form="odds"), "form"),
        (lambda: methods.likelihood_reward(beta=0.1, kl_in="reward"), "kl_in"),
        (lambda: methods.pr_clip_delta(process="a", threshold=0.5, alpha=-1.0), "alpha"),
        (lambda: methods.pr_clip_delta(process="a", threshold=0.5, beta=-1.0), "beta"),
        (lambda: methods.pr_clip_delta(process="a", threshold=0.5, steps="nowhere"), "nowhere"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
