"""Claims of advantages of single tokens, of turns, and of agents."""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import advantages, methods
from jaxrl_post.methods import Signals
from tests.claims import gradients, lab


def test_an_intermediate_lambda_estimates_advantages_better_than_returns_do():
    # Noisy rewards on every token, a critic that is a little wrong: the truth is each reward's own surprise.
    def outcome(lam, key):
        noise, error = jax.random.split(key)
        surprise = jax.random.normal(noise, (64, 50))
        values = 0.3 * jax.random.normal(error, (64, 1)) * jnp.linspace(1, 0, 50)
        found, _ = advantages.gae(surprise, values, jnp.ones((64, 50)), gamma=0.99, lam=lam, whiten=False)
        return -jnp.mean(jnp.square(found - surprise))

    lab.check("gae", outcome, method=0.95, baseline=1.0)


def test_a_critic_with_its_own_lambda_learns_the_value_of_the_beginning_of_long_answers():
    # 300 tokens, a reward of 0 or 1 at the end; the critic begins at -1, as one made from a reward model does.
    length, rate = 300, 0.3

    def outcome(estimate, key):
        def step(values, key):
            reward = jax.random.bernoulli(key, 0.5, (16, 1)).astype(jnp.float32)
            rewards = jnp.zeros((16, length)).at[:, -1:].set(reward)
            given = rewards, jnp.broadcast_to(values, (16, length)), jnp.ones((16, length))
            _, returns = lab.pick(estimate, lambda estimate: estimate(*given))
            return values + rate * (jnp.mean(returns, axis=0) - values), None

        values, _ = jax.lax.scan(step, jnp.full(length, -1.0), jax.random.split(key, 20))
        return -jnp.mean(jnp.abs(values[:100] - 0.5))

    def adaptive(rewards, values, mask):
        lam = advantages.length_adaptive_lam(jnp.sum(mask, axis=1))
        return advantages.decoupled_gae(rewards, values, mask, lam_policy=lam, lam_value=1.0)

    lab.check("vapo-gae", outcome, method=adaptive, baseline=functools.partial(advantages.gae, lam=0.95))


def _token_task():
    rewards = jax.random.uniform(jax.random.key(0), (3**4,))
    return lab.Task(1, 3, 4, lab.by_sequence(rewards))


def _peaked(key, task):
    """Some contexts almost decided, others open: tokens differ in how far they move the policy."""
    scale, draw = jax.random.split(key)
    shape = task.params().shape
    return 4 * jax.random.uniform(scale, (*shape[:2], 1)) * jax.random.normal(draw, shape)


def _reinforce(advantage):
    return methods.policy_gradient(advantage=advantage, loss="reinforce", aggregation="seq_mean_token_sum")


def _steadiness(task):
    def outcome(method, key):
        found = gradients.estimates(task, method, _peaked(key, task), key, group_size=4, batches=64)
        return -gradients.variance(found)

    return outcome


def test_the_optimal_token_baseline_has_less_variance_than_the_groups_mean():
    task = _token_task()

    lab.check("otb", _steadiness(task), method=_reinforce("otb"), baseline=_reinforce("dr_grpo"))


def test_the_token_baseline_keeps_its_lower_variance_when_tool_output_stands_between_the_turns():
    task = _token_task()

    def with_tools(s: Signals):
        # Tool output of random length before the third action of each sequence: 0, 1 or 2 tokens.
        gap = jax.random.randint(s.key, (s.mask.shape[0], 1), 0, 3)
        place = jnp.arange(5) + jnp.where(jnp.arange(5) >= 3, gap, 0)
        rows = jnp.arange(s.mask.shape[0])[:, None]

        def spread(x):
            return jnp.zeros((x.shape[0], 7)).at[rows, place].set(x)

        policy = s.stats["policy"]
        arrays = (spread(x) for x in (s.token_rewards, s.mask, policy.logp, policy.sum_p_squared))
        found = advantages.otb(*arrays, group_size=s.rollouts.group_size)
        return jnp.take_along_axis(found, place, axis=1)

    multi_turn = methods.Advantage(
        lambda state, s: (with_tools(s), state), needs={"policy": frozenset({"logp", "sum_p_squared"})}, min_group=2
    )

    lab.check("tir-otb", _steadiness(task), method=_reinforce(multi_turn), baseline=_reinforce("dr_grpo"))


def test_credit_for_each_token_brings_the_policy_to_the_teacher_sooner_than_credit_for_the_sequence():
    task = lab.Task(2, 3, 3, lab.by_sequence(jnp.zeros(27)))
    teacher = 2 * jax.random.normal(jax.random.key(0), task.params().shape)
    target = lab.probabilities(teacher, 3)

    def outcome(method, key):
        trained = lab.train(
            task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.1), roles=lambda _: {"teacher": teacher}
        )
        p = lab.probabilities(trained.params, 3)
        return -jnp.mean(jnp.sum(p * jnp.log(p / target), axis=1))

    def whole(state, s):
        gap = jnp.sum(s.mask * (s.stats["teacher"].logp - s.old_logp), axis=1)
        return advantages.rloo(gap.reshape(s.reward.shape), s.valid), state

    sequence = methods.Advantage(whole, needs={"teacher": frozenset({"logp"})})
    baseline = methods.policy_gradient(advantage=sequence, loss="reinforce")
    lab.check("opd", outcome, method=methods.opd(), baseline=baseline)


def _arms(offset, extras):
    """Rewards of six arms, plus `offset(rollouts, key)` that no choice can change, plus noise."""
    quality = jnp.linspace(0, 1, 6)

    def judge(rollouts, key):
        first, second = jax.random.split(key)
        scored = lab.by_sequence(quality, noise=0.2)(rollouts, first)
        made = extras(scored, second)
        return made.replace(reward=scored.reward + offset(made, second))

    return judge, quality


def _reward(params, quality):
    return jnp.mean(jnp.sum(lab.probabilities(params, 1) * quality, axis=1))


def test_a_baseline_of_its_own_role_steadies_self_play_with_one_game_per_prompt():
    # Role 0 has the better side of the game, by 2 points; which role is played changes from game to game.
    def extras(rollouts, key):
        role = jax.random.bernoulli(key, 0.5, rollouts.reward.shape).astype(jnp.int32)
        return rollouts.replace(extras={"agent": jnp.broadcast_to(role.reshape(-1, 1), rollouts.mask.shape)})

    def offset(rollouts, key):
        del key
        return jnp.where(rollouts.extras["agent"][:, 0] == 0, 1.0, -1.0).reshape(rollouts.reward.shape)

    judge, quality = _arms(offset, extras)
    task = lab.Task(8, 6, 1, judge)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=80, group_size=1, optimizer=optax.adam(0.05))
        return _reward(trained.params, quality)

    baseline = methods.policy_gradient(advantage="reinforce")
    lab.check("rae", outcome, method=methods.rae(roles=2), baseline=baseline)


def test_solvers_compared_within_an_episode_are_not_blamed_for_a_harder_problem():
    def extras(rollouts, key):
        del key
        episode = jnp.broadcast_to(jnp.arange(rollouts.group_size) // 2, rollouts.reward.shape)
        return rollouts.replace(extras={"episode": episode, "agent": jnp.ones(rollouts.mask.shape, jnp.int32)})

    def offset(rollouts, key):
        hardness = 2 * jax.random.normal(key, (rollouts.num_prompts, rollouts.group_size // 2))
        return jnp.repeat(hardness, 2, axis=1)

    judge, quality = _arms(offset, extras)
    task = lab.Task(4, 6, 1, judge)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        return _reward(trained.params, quality)

    method = methods.hierarchical_grpo(episode_agents=[1], normalize_std=True)
    lab.check("hierarchical-grpo", outcome, method=method, baseline=methods.grpo(beta=0.0))


def test_comparing_steps_from_the_same_state_learns_long_episodes_better_than_whole_episodes():
    # Five actions of two kinds; the state is the number of right ones so far, and all of them must be right.
    length = 5

    def judge(rollouts, key):
        right = jnp.cumsum(rollouts.tokens == 1, axis=1)
        step = jnp.broadcast_to(jnp.arange(-1, length), rollouts.mask.shape)
        state = jnp.pad(right[:, :-1], ((0, 0), (1, 0))) + 10 * jnp.arange(length + 1)
        share = right[:, -1].reshape(rollouts.reward.shape) / length
        noise = 0.3 * jax.random.normal(key, share.shape)
        return rollouts.replace(step=step, extras={"state": state}, reward=share + noise)

    task = lab.Task(2, 2, length, judge)
    digits = (jnp.arange(2**length)[:, None] >> jnp.arange(length)) & 1

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=25, group_size=16, optimizer=_unit_steps(0.3))
        return _reward_of(trained.params, jnp.mean(digits, axis=1), length)

    method = methods.gigpo(gamma=1.0, max_turns=length)
    lab.check("gigpo", outcome, method=method, baseline=methods.grpo(beta=0.0))


def _unit_steps(size):
    return optax.chain(optax.normalize_by_update_norm(), optax.sgd(size))


def _reward_of(params, rewards, length):
    return jnp.mean(jnp.sum(lab.probabilities(params, length) * rewards, axis=-1))


def test_agent_wise_normalisation_keeps_the_gradient_of_a_rare_agent_small():
    # A verifier acts only where the solver was unsure, which is where the reward is low.
    def outcome(estimator, key):
        unsure, draw = jax.random.split(key)
        verified = jax.random.bernoulli(unsure, 0.25, (64, 16))
        reward = jnp.where(verified, jax.random.bernoulli(draw, 0.15, (64, 16)), jax.random.bernoulli(draw, 0.9))
        rewards = jnp.stack([reward, reward], axis=2).astype(jnp.float32)
        agent = jnp.broadcast_to(jnp.arange(2), rewards.shape)
        prompt = jnp.broadcast_to(jnp.arange(64)[:, None, None], rewards.shape)
        acted = jnp.stack([jnp.ones_like(verified), verified], axis=2)
        keys = (prompt, agent) if estimator == "dr_mas" else (prompt,)
        found = advantages.grpo_by_key(rewards, keys, acted)
        moment = jnp.sum(jnp.square(found), axis=(0, 1)) / jnp.sum(acted, axis=(0, 1))
        return -jnp.max(moment)

    lab.check("dr-mas", outcome, method="dr_mas", baseline="grpo")
