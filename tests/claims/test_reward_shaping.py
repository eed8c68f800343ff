"""Claims of advantages from several rewards, from bundles of prompts, and from other prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import methods
from tests.claims import lab


def _both(first, second):
    """Judge of two rewards from tables `[V]`, which are components and, added, the reward; `second` may be noisy."""

    def judge(rollouts, key):
        chosen = rollouts.tokens[:, 1].reshape(rollouts.reward.shape)
        one, two = first(chosen, key), second(chosen, key)
        return rollouts.replace(rewards={"one": one, "two": two}, reward=one + two)

    return judge


def test_gdpo_learns_a_hard_reward_that_a_wide_easy_one_drowns_in_grpo():
    # Style is worth 3 under noise of 3, correctness 1 without noise; some arms have both.
    style = jnp.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    right = jnp.array([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0])

    def wide(chosen, key):
        return 3 * style[chosen] + 3 * jax.random.normal(key, chosen.shape)

    task = lab.Task(4, 8, 1, _both(wide, lambda chosen, key: right[chosen]))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        p = lab.probabilities(trained.params, 1)
        return jnp.mean(jnp.minimum(p @ style, p @ right))

    lab.check("gdpo", outcome, method=methods.gdpo(), baseline=methods.grpo(beta=0.0))


def test_taming_a_heavy_tailed_reward_lets_the_other_one_be_learned():
    quality = jnp.linspace(0.2, 1.0, 8)
    level = jnp.array([0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0])

    def heavy(chosen, key):
        return level[chosen] * jnp.exp(1.5 * jax.random.normal(key, chosen.shape))

    task = lab.Task(4, 8, 1, _both(lambda chosen, key: quality[chosen], heavy))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
        return jnp.mean(lab.probabilities(trained.params, 1) @ quality)

    lab.check("paco-grpo", outcome, method=methods.paco_grpo(), baseline=methods.grpo(beta=0.0))


def test_copo_trains_on_groups_whose_rewards_agree():
    # Half of the prompts are solved or hopeless: within their groups nothing differs.
    initial = jnp.zeros((16, 1, 4)).at[:4, 0, 0].set(6.0).at[4:8, 0, 0].set(-6.0)
    task = lab.Task(16, 4, 1, lab.by_sequence(jnp.eye(4)[0]), initial)

    def outcome(method, key):
        rollouts = lab.sample(task, initial, key, 6)
        return lab.pick(method, lambda method: share_of_moved_tokens(method, rollouts, key))

    def share_of_moved_tokens(method, rollouts, key):
        stats = {"policy": lab.score(initial, rollouts, method.needs["policy"], key)}
        targets, _ = method.targets(method.init(rollouts, 16), rollouts, stats, key)

        def loss(logp):
            term = method.loss({"policy": stats["policy"].replace(logp=logp)}, rollouts, targets)["policy"]
            return jnp.sum(term.value * term.mask)

        moved = jax.grad(loss)(stats["policy"].logp) != 0
        return jnp.sum(moved * rollouts.mask) / jnp.sum(rollouts.mask)

    lab.check("copo", outcome, method=methods.copo(), baseline=methods.grpo(beta=0.0))


def test_riskpo_still_solves_hard_prompts_in_k_tries_when_grpo_has_collapsed_on_the_easy_ones():
    # One policy for all prompts, as a model is: what it does on one it does on all. Seven have the answer 0, three have
    # answers of their own, which an average does not miss.
    answers = np.array([0, 1, 0, 2, 0, 0, 3, 0, 0, 0])
    rewards = jnp.eye(8)[answers]
    task = lab.Task(10, 8, 1, lab.by_sequence(rewards))
    share = optax.stateless(lambda updates, params: jnp.broadcast_to(jnp.mean(updates, 0), params.shape))

    def outcome(method, key):
        optimizer = optax.chain(share, optax.adam(0.05))
        trained = lab.train(task, method, key, steps=120, group_size=8, optimizer=optimizer)
        solved = jnp.sum(lab.probabilities(trained.params, 1) * rewards, axis=1)[answers > 0]
        return jnp.mean(1 - (1 - solved) ** 8)

    lab.check("riskpo", outcome, method=methods.riskpo(), baseline=methods.grpo(beta=0.0))
