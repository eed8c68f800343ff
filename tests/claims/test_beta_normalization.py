"""BNPO's variance beside that of the two normalisations that it contains."""

import jax
import jax.numpy as jnp

from jaxrl_post import advantages
from tests.claims import lab

PROMPTS, GROUP, RESAMPLES = 64, 16, 100
SPREADS = (6.0, 3.0, 1.0, 0.3)  # of the logits of success: from U-shaped to peaked at a half

ESTIMATORS = {
    "bnpo": advantages.bnpo,
    "grpo": lambda rewards: advantages.grpo(rewards, ddof=0),
    "reinforce": advantages.dr_grpo,
}


def relative_variance(advantage, spread, key):
    """Variance of the gradient of logistic policies over resamples, by the square of its mean."""
    draw, noise = jax.random.split(key)
    rate = jax.nn.sigmoid(spread * jax.random.normal(draw, (PROMPTS,)))
    rewards = (jax.random.uniform(noise, (RESAMPLES, PROMPTS, GROUP)) < rate[:, None]).astype(jnp.float32)
    gradient = jnp.mean(jax.vmap(advantage)(rewards) * (rewards - rate[:, None]), axis=-1)
    mean = jnp.mean(gradient, axis=0)
    return jnp.sum(jnp.var(gradient, axis=0)) / jnp.sum(jnp.square(mean))


def outcome(names, key):
    """Minus the log of the variance, averaged over how success rates are spread; of several, the best in each."""
    every = [
        jnp.stack([relative_variance(ESTIMATORS[name], spread, jax.random.fold_in(key, i)) for name in names]).min()
        for i, spread in enumerate(SPREADS)
    ]
    return -jnp.mean(jnp.log(jnp.stack(every)))


def test_bnpo_varies_no_more_than_the_better_of_its_special_cases_whatever_the_success_rates():
    # It does not come out: the weights are fitted to the batch, and their own noise is part of the variance.
    lab.check("bnpo", outcome, method=("bnpo",), baseline=("grpo", "reinforce"), margin=-0.02, held=False)
