"""Claims of baselines and scales of one advantage per sequence."""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import advantages, methods
from tests.claims import gradients, lab

ON_POLICY = {"aggregation": "seq_mean_token_sum", "loss": "reinforce"}


def _estimator(advantage):
    return methods.policy_gradient(advantage=advantage, **ON_POLICY)


def _unit_steps(size):
    """Steps of one length: what a method does is then a matter of direction, not of the size of its advantages."""
    return optax.chain(optax.normalize_by_update_norm(), optax.sgd(size))


def _success(params, rewards, length=1):
    return jnp.mean(jnp.sum(lab.probabilities(params, length) * rewards, axis=-1))


def test_reinforce_is_right_on_average_where_normalising_by_the_groups_spread_is_not():
    # Prompts of different difficulty: the division by the standard deviation tilts the mean gradient.
    rewards = jnp.eye(4)[jnp.zeros(6, int)]
    task = lab.Task(6, 4, 1, lab.by_sequence(rewards))
    params = jnp.linspace(-3, 3, 6)[:, None, None] * jnp.eye(4)[0]
    truth = gradients.exact(task, params, rewards)

    def outcome(method, key):
        found = gradients.estimates(task, method, params, key, group_size=8, batches=192)
        return gradients.cosine(jnp.mean(found, axis=0, keepdims=True), truth)

    lab.check("reinforce", outcome, method=_estimator("reinforce"), baseline=_estimator("grpo"))


def test_grpo_tells_good_answers_from_better_ones_where_online_rejection_sampling_does_not():
    quality = jnp.array([0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0])
    task = lab.Task(4, 8, 1, lab.by_sequence(quality))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        return _success(trained.params, quality)

    # Every answer that is right at all is reinforced alike, a wrong one not at all.
    baseline = methods.policy_gradient(advantage=lambda s: (s.reward > 0) * 1.0, aggregation="seq_mean_token_mean")
    lab.check("grpo", outcome, method=methods.grpo(beta=0.0), baseline=baseline)


def test_dr_grpo_does_not_make_wrong_answers_longer():
    # The first token is the answer, 1 is right and rare; then 1 goes on and 0 stops, and both are free.
    length = 6

    def judge(rollouts, key):
        del key
        tokens = rollouts.tokens
        stopped = jnp.cumsum((tokens == 0)[:, 2:], axis=1)
        alive = jnp.concatenate([jnp.ones((tokens.shape[0], 1)), stopped[:, :-1] == 0], axis=1)
        mask = rollouts.mask.at[:, 2:].multiply(alive)
        return rollouts.replace(mask=mask, reward=tokens[:, 1].reshape(rollouts.reward.shape).astype(jnp.float32))

    initial = jnp.zeros((4, 2**length - 1, 2)).at[:, 0, 0].set(2.0)
    task = lab.Task(4, 2, length, judge, initial)
    digits = (jnp.arange(2**length)[:, None] >> jnp.arange(length - 1, -1, -1)) & 1
    lengths = 2 + jnp.sum(jnp.cumprod(digits[:, 1:-1], axis=1), axis=1)
    wrong = digits[:, 0] == 0

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=_unit_steps(0.3))
        p = lab.probabilities(trained.params, length) * wrong
        return -jnp.mean(jnp.sum(p * lengths, axis=1) / jnp.sum(p, axis=1))

    lab.check("dr-grpo", outcome, method=methods.dr_grpo(horizon=length), baseline=methods.grpo(beta=0.0))


def test_leave_one_out_baselines_make_reinforce_less_noisy_and_leave_it_unbiased():
    rewards = 1 + jax.random.normal(jax.random.key(0), (4, 6))
    task = lab.Task(4, 6, 1, lab.by_sequence(rewards))

    def outcome(method, key):
        params = jax.random.normal(key, (4, 1, 6))
        found = gradients.estimates(task, method, params, key, group_size=4, batches=32)
        return -gradients.squared_error(found, gradients.exact(task, params, rewards))

    lab.check("rloo", outcome, method=methods.rloo(beta=0.0), baseline=methods.reinforce())


def test_the_greedy_answers_reward_makes_single_sample_reinforce_less_noisy():
    table = 1 + jax.random.normal(jax.random.key(1), (4, 6))

    def outcome(method, key):
        params = jax.random.normal(key, (4, 1, 6))
        greedy = jnp.take_along_axis(table, jnp.argmax(params[:, 0], axis=1)[:, None], axis=1)[:, 0]

        def judge(rollouts, key):
            scored = lab.by_sequence(table)(rollouts, key)
            return scored.replace(extras={"greedy_reward": greedy})

        task = lab.Task(4, 6, 1, judge)
        found = gradients.estimates(task, method, params, key, group_size=1, batches=64)
        return -gradients.squared_error(found, gradients.exact(task, params, table))

    lab.check("remax", outcome, method=methods.remax(), baseline=methods.reinforce())


def test_the_length_weighted_baseline_has_less_variance_than_the_groups_mean():
    # Token 0 ends the answer. Longer answers earn less, and their gradients are larger.
    length = 5

    def judge(rollouts, key):
        ended = jnp.cumsum(rollouts.tokens[:, 1:] == 0, axis=1)
        alive = jnp.concatenate([jnp.ones((ended.shape[0], 1)), ended[:, :-1] == 0], axis=1)
        mask = rollouts.mask.at[:, 1:].multiply(alive)
        reward = 1.0 - jnp.sum(mask, axis=1).reshape(rollouts.reward.shape) / length
        return rollouts.replace(mask=mask, reward=reward + 0.3 * jax.random.normal(key, reward.shape))

    task = lab.Task(1, 3, length, judge)

    def outcome(method, key):
        params = 0.5 * jax.random.normal(key, task.params().shape)
        found = gradients.estimates(task, method, params, key, group_size=8, batches=32)
        return -gradients.variance(found)

    lab.check("opo", outcome, method=_estimator("opo"), baseline=_estimator("dr_grpo"))


def test_training_the_best_of_k_prefers_the_arm_that_sometimes_wins():
    # Arm 0 always earns 0.6; arm 1 earns 1 three times in ten. One answer does better with 0, the best of 4 with 1.
    def judge(rollouts, key):
        win = jax.random.bernoulli(key, 0.3, rollouts.reward.shape)
        chosen = rollouts.tokens[:, 1].reshape(rollouts.reward.shape)
        return rollouts.replace(reward=jnp.where(chosen == 1, win, 0.6).astype(jnp.float32))

    task = lab.Task(4, 2, 1, judge)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=4, optimizer=optax.adam(0.1))
        p = lab.probabilities(trained.params, 1)[:, 1]
        none = (1 - 0.3 * p) ** 4
        return jnp.mean(1 - none + 0.6 * (none - (0.7 * p) ** 4))

    lab.check("pass-at-k", outcome, method=methods.pass_at_k(), baseline=methods.grpo(beta=0.0))


def test_scaling_up_for_groups_without_signal_speeds_up_hard_prompts():
    # One right answer among 16: most groups of 4 are all wrong.
    task = lab.Task(8, 16, 1, lab.by_sequence(jnp.eye(16)[:8]))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=4, optimizer=1.0)
        return _success(trained.params, jnp.eye(16)[:8])

    baseline = methods.policy_gradient(advantage="dr_grpo", loss="reinforce")
    lab.check("gpg", outcome, method=methods.gpg(count="advantages"), baseline=baseline)


def test_maxrl_solves_hard_prompts_that_grpo_leaves_behind_with_steps_of_the_same_length():
    # Success rates from 1 in 100 to 1 in 2; the outcome is the mean log success rate.
    rates = jnp.geomspace(0.01, 0.5, 12)
    initial = jnp.log(jnp.stack([rates, 1 - rates], axis=1))[:, None]
    task = lab.Task(12, 2, 1, lab.by_sequence(jnp.array([1.0, 0.0])), initial)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=16, optimizer=_unit_steps(0.2))
        return jnp.mean(jnp.log(lab.probabilities(trained.params, 1)[:, 0]))

    lab.check("maxrl", outcome, method=methods.maxrl(), baseline=methods.grpo(beta=0.0))


def _scales(key, prompts, rewards):
    """Rewards with a scale for each prompt, hence some prompts whose differences hardly matter, under noise."""
    scales = jnp.exp(1.5 * jax.random.normal(key, (prompts, 1)))
    return scales * rewards


def test_normalising_over_the_batch_keeps_the_sizes_of_rewards_that_small_groups_lose():
    base = jax.random.normal(jax.random.key(2), (16, 4))
    base = base - jnp.mean(base, axis=1, keepdims=True)

    def outcome(method, key):
        rewards = _scales(key, 16, base)
        task = lab.Task(16, 4, 1, lab.by_sequence(rewards, noise=0.3))
        params = jnp.zeros((16, 1, 4))
        found = gradients.estimates(task, method, params, key, group_size=2, batches=32)
        return gradients.cosine(found, gradients.exact(task, params, rewards))

    method, baseline = methods.reinforce_plus_plus(beta=0.0), methods.grpo(beta=0.0)
    lab.check("reinforce-plus-plus", outcome, method=method, baseline=baseline)


def test_the_groups_mean_with_the_batchs_scale_points_better_than_both_of_the_group():
    base = jax.random.normal(jax.random.key(3), (16, 4))
    offsets = 3 * jax.random.normal(jax.random.key(4), (16, 1))  # prompts differ in difficulty too

    def outcome(method, key):
        rewards = _scales(key, 16, base) + offsets
        task = lab.Task(16, 4, 1, lab.by_sequence(rewards, noise=0.3))
        params = jnp.zeros((16, 1, 4))
        found = gradients.estimates(task, method, params, key, group_size=4, batches=32)
        return gradients.cosine(found, gradients.exact(task, params, rewards))

    method, baseline = methods.reinforce_plus_plus_baseline(beta=0.0), methods.grpo(beta=0.0)
    # The KL term reads a reference; without it both are their advantages alone.
    lab.check("reinforce-plus-plus-baseline", outcome, method=method, baseline=baseline)


def test_the_batchs_standard_deviation_does_not_blow_up_prompts_that_are_almost_solved():
    # Half of the prompts are nearly solved: their rare failures, divided by a tiny spread, weigh as much as the rest.
    initial = jnp.zeros((16, 1, 4)).at[:8, 0, 0].set(4.0)
    rewards = jnp.eye(4)[jnp.zeros(16, int)]
    task = lab.Task(16, 4, 1, lab.by_sequence(rewards), initial)

    def outcome(method, key):
        found = gradients.estimates(task, method, initial, key, group_size=8, batches=32)
        return gradients.cosine(found, gradients.exact(task, initial, rewards))

    method = _estimator({"name": "grpo", "std_level": "batch"})
    lab.check("batch-std", outcome, method=method, baseline=_estimator("grpo"))


def test_the_median_of_a_few_heavy_tailed_rewards_gets_more_signs_right_than_the_mean():
    def outcome(estimator, key):
        rewards = jax.random.t(key, 1.5, (512, 3))  # expectation 0: the right sign is that of the reward
        found, keep = lab.pick(estimator, lambda estimator: estimator(rewards))
        return jnp.sum(keep & (jnp.sign(found) == jnp.sign(rewards))) / jnp.sum(keep)

    def mean(rewards):
        return advantages.grpo(rewards), jnp.ones(rewards.shape, bool)

    lab.check("mc-grpo", outcome, method=functools.partial(advantages.mc_grpo, max_abs=5.0), baseline=mean)
