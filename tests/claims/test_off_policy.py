"""What the papers claim of REINFORCE on rollouts of another policy, or of one sign."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import methods
from tests.claims import lab


def test_topr_does_not_push_failures_of_a_fixed_data_set_without_end():
    good = np.arange(50) % 5 == 0
    task = lab.Task(1, 50, 1, lab.by_sequence(np.where(good, 1.0, -1.0)))

    def trained(method, key):
        # One batch, of the uniform policy, for all steps.
        return lab.train(task, method, key, steps=150, group_size=100, optimizer=2.0, reuse=150).params

    def lowest(method, key):
        return jnp.min(jax.nn.log_softmax(trained(method, key)[0, 0]))

    naive = methods.policy_gradient(advantage="reinforce", loss="reinforce", aggregation="seq_mean_token_sum")
    lab.check("topr", lowest, method=methods.topr(), baseline=naive)
    solved = jax.jit(jax.vmap(lambda key: lab.probabilities(trained(methods.topr(), key), 1)[0] @ good))
    assert np.min(solved(jax.random.split(jax.random.key(0), 4))) > 0.9  # and it has learned


def test_a_wide_clip_without_importance_weights_learns_faster_than_grpo_from_stale_rollouts():
    values = np.random.default_rng(2).random(10)
    task = lab.Task(2, 10, 1, lab.by_sequence(values, noise=0.5))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=16, optimizer=1.0, reuse=20)
        return jnp.mean(lab.probabilities(trained.params, 1) @ values)

    grpo = methods.grpo(beta=0.0, aggregation="token_mean")
    lab.check("rec", outcome, method=methods.rec(clip_low=0.6, clip_high=2.0), baseline=grpo)


def test_failures_alone_keep_all_right_answers_alive_where_grpo_settles_on_some_at_equal_accuracy():
    # Rewards of 1 and 0 and of 0 and -1 have the same expected gradient, so that tables of logits differ only in what
    # sampling does: what is reinforced because it was drawn is drawn more often. Six of twelve answers are right.
    right = np.arange(12) < 6
    task = lab.Task(8, 12, 1, lab.by_sequence(right.astype(float)))

    def observe(params):
        p = lab.probabilities(params, 1) * right
        accuracy = jnp.sum(p, axis=1)
        return jnp.mean(accuracy), jnp.mean(jnp.sum(jax.scipy.special.entr(p / accuracy[:, None]), axis=1))

    def entropy_of_right_answers(method, key):
        trained = lab.train(task, method, key, steps=150, group_size=8, optimizer=8.0, observe=observe)
        accuracy, entropy = trained.trace
        return jnp.where(jnp.any(accuracy >= 0.9), entropy[jnp.argmax(accuracy >= 0.9)], 0.0)

    grpo = methods.grpo(beta=0.0, aggregation="token_mean")
    lab.check("nsr", entropy_of_right_answers, method=methods.nsr(), baseline=grpo)


def test_stable_reinforce_survives_wrong_labels_and_a_stale_sample_where_reinforce_plus_plus_does_not():
    def judge(rollouts, key):
        right = (rollouts.tokens[:, 1] == 0).reshape(rollouts.reward.shape)
        wrong_label = jax.random.bernoulli(key, 1 / 64, right.shape)
        return rollouts.replace(reward=(right ^ wrong_label).astype(jnp.float32))

    def one_stale(rollouts, key):
        del key
        return rollouts.replace(logp=rollouts.logp.at[0, 1].add(-12.0))

    # A policy that is right 99 times in 100.
    task = lab.Task(1, 2, 1, judge, initial=np.array([5.0, 0.0]))

    def accuracy(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=64, optimizer=1.0, prepare=one_stale)
        return lab.probabilities(trained.params, 1)[0, 0]

    plain = methods.policy_gradient(advantage="reinforce_plus_plus", loss="ppo", aggregation="seq_mean_token_mean")
    lab.check("stable-reinforce", accuracy, method=methods.stable_reinforce(), baseline=plain)
