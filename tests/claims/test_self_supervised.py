"""Claims about rewards without labels: where agreement leads to what is right, and where it cannot."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import advantages, methods, rewards
from tests.claims import lab


def _chosen(rollouts):
    return rollouts.tokens[:, 1].reshape(rollouts.reward.shape)


def _on(name):
    return methods.policy_gradient(advantage=lambda s: advantages.grpo(s.component(name), s.valid))


def _trained(p, judge, method, key, steps):
    """The probabilities `[P, V]` after training from `p`."""
    task = lab.Task(len(p), p.shape[1], 1, judge, initial=np.log(p)[:, None])
    trained = lab.train(task, method, key, steps=steps, group_size=8, optimizer=optax.adam(0.05))
    return lab.probabilities(trained.params, 1)


def _shares(rollouts, key):
    del key
    return rollouts.replace(reward=rewards.empo_reward(_chosen(rollouts)))


def _gain(first):
    """Gain of accuracy where the right answer has the probability `first` at the start, and four others the rest."""
    p = np.array([[first, *[(1 - first) / 4] * 4]] * 4) if first > 0.2 else np.array([[first, 0.6, 0.1, 0.1, 0.05]] * 4)
    p = p / p.sum(axis=1, keepdims=True)

    def outcome(trains, key):
        after = _trained(p, _shares, methods.grpo(beta=0.0), key, 40)
        return jnp.where(trains > 0, jnp.mean(after[:, 0]), p[0, 0])

    return outcome


def test_agreement_raises_accuracy_where_the_right_answer_is_the_likeliest():
    """The baseline is the policy before training."""
    lab.check("empo", _gain(0.45), method=1.0, baseline=0.0, margin=0.2)


@pytest.mark.nightly
def test_agreement_lowers_accuracy_where_another_answer_is_the_likeliest():
    found, _ = lab.compare(_gain(0.15), 1.0, 0.0, 16)
    assert found.interval[1] < -0.05


def test_shares_keep_a_second_answer_that_is_as_likely_where_a_vote_drops_it():
    p = np.array([[0.41, 0.39, 0.1, 0.1]] * 4)

    def judge(rollouts, key):
        del key
        answer = _chosen(rollouts)
        vote = (answer == rewards.majority(answer)[:, None]).astype(jnp.float32)
        return rollouts.replace(rewards={"share": rewards.empo_reward(answer, high=2.5, alpha=0.75), "vote": vote})

    def outcome(method, key):
        """Entropy between the two likely answers."""
        after = _trained(p, judge, method, key, 15)[:, :2]
        two = after / jnp.sum(after, axis=1, keepdims=True)
        return -jnp.mean(jnp.sum(two * jnp.log(two), axis=1))

    lab.check("ttrv", outcome, method=_on("share"), baseline=_on("vote"), seeds=64)


def _views(tasks, views):
    """Probabilities of five answers under each wording: the right one is 0, each wording has a favourite of its own."""
    p = np.full((tasks, views, 5), 0.1)
    p[..., 0] = 0.35
    for view in range(views):
        p[:, view, 1 + view % 4] = 0.35
    return (p / p.sum(axis=2, keepdims=True)).reshape(-1, 5)


def test_labels_of_a_paraphrase_do_not_follow_the_favourite_of_a_wording():
    p = _views(4, 2)

    def judge(rollouts, key):
        del key
        answer = _chosen(rollouts)
        one, two = rewards.co_reward(answer[::2], answer[1::2])
        crossed = jnp.stack([one, two], axis=1).reshape(answer.shape)
        own = (answer == rewards.majority(answer)[:, None]).astype(jnp.float32)
        return rollouts.replace(rewards={"crossed": crossed, "own": own})

    def outcome(method, key):
        """Accuracy."""
        return jnp.mean(_trained(p, judge, method, key, 40)[:, 0])

    lab.check("co-reward", outcome, method=_on("crossed"), baseline=_on("own"), margin=0.1)


def test_answers_to_all_wordings_grow_alike_and_right():
    p, views = _views(1, 4), 4

    def judge(rollouts, key):
        del key
        answer = _chosen(rollouts)
        same = (answer[:, :, None, None] == answer[None, None]).astype(jnp.float32)
        parts = {"others": rewards.paraphrase_consistency(same), "own": rewards.answer_share(answer)}
        return rollouts.replace(rewards=parts)

    def outcome(method, key):
        """Chance that two wordings get the same, right answer."""
        after = _trained(p, judge, method, key, 60)[:, 0]
        pairs = after[:, None] * after[None, :] * (1 - jnp.eye(views))
        return jnp.sum(pairs) / (views * (views - 1))

    lab.check("ps-grpo", outcome, method=_on("others"), baseline=_on("own"), margin=0.1)
