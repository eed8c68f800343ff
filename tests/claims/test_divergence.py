"""Claims of discriminative training, and of policy gradients of other divergences."""

import jax.numpy as jnp
import numpy as np

from jaxrl_post import methods
from tests.claims import lab


def test_disco_solves_more_of_the_hard_prompts_than_grpo_at_the_same_pace_on_the_medium_ones():
    # One right answer of V; prompts differ in how likely it is at first.
    share = np.array([0.05, 0.05, 0.1, 0.5])
    initial = np.zeros((4, 1, 8))
    initial[:, 0, 0] = np.log(7 * share / (1 - share))
    task = lab.Task(4, 8, 1, lab.by_sequence(np.eye(8)[0]), initial=initial)

    def outcome(spec, key):
        method, rate = spec
        trained = lab.train(task, method, key, steps=25, group_size=16, optimizer=rate)
        return jnp.mean(lab.probabilities(trained.params, 1)[:2, 0])

    # GRPO's weight sqrt(p (1 - p)) is a half where p is: with twice the rate the two move alike there.
    lab.check(
        "disco",
        outcome,
        method=(methods.disco(beta=0.0), 1.0),
        baseline=(methods.grpo(beta=0.0), 2.0),
    )


def test_f_dpg_with_jensen_shannon_keeps_the_diversity_of_the_target_that_reverse_kl_loses():
    reference = np.random.default_rng(0).normal(size=20)
    allowed = np.arange(20) % 5 == 0
    task = lab.Task(1, 20, 1, lab.by_sequence(allowed.astype(float)), initial=reference)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=150, group_size=16, optimizer=3.0)
        p = lab.probabilities(trained.params, 1)[0, allowed]
        return -jnp.sum(p * jnp.log(p))

    js, reverse = (methods.f_dpg(divergence=divergence, beta=0.1) for divergence in ("js", "reverse_kl"))
    lab.check("f-dpg", outcome, method=js, baseline=reverse)
