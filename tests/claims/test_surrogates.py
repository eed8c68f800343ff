"""What the papers of the surrogate losses claim, against the baselines they name."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import methods
from tests.claims import lab

GRPO = methods.grpo(beta=0.0, aggregation="token_mean")
UNCLIPPED = methods.policy_gradient(loss={"name": "ppo", "clip_low": 1.0, "clip_high": math.inf})

_rng = np.random.default_rng(0)
ARMS = _rng.random((4, 8))
TREE = _rng.random((2, 81))


def expected_reward(task, table, **training):
    """Outcome: the exact expected reward after training."""
    table = jnp.asarray(table)

    def outcome(method, key):
        p = lab.probabilities(lab.train(task, method, key, **training).params, task.length)
        return jnp.mean(jnp.sum(p * table, axis=-1))

    return outcome


def shifted_sampler(scale):
    """A sampler whose logits differ from the trained policy's by noise, as those of an old policy do."""
    return lambda params, key: params + scale * jax.random.normal(key, params.shape)


def misjudged(scale):
    """An engine that records log-probs with independent noise on every token."""
    return lambda rollouts, key: rollouts.replace(
        logp=rollouts.logp + scale * jax.random.normal(key, rollouts.logp.shape) * rollouts.mask
    )


def rare_right_answer(logit):
    """Ten answers of which one is right, and unlikely at the start."""
    initial, table = np.zeros((4, 1, 10)), np.zeros(10)
    initial[..., 0], table[0] = logit, 1.0
    return lab.Task(4, 10, 1, lab.by_sequence(table), initial=initial), table


def test_the_clip_lets_ppo_make_many_epochs_on_a_batch():
    task = lab.Task(4, 8, 1, lab.by_sequence(ARMS, noise=1.0))
    outcome = expected_reward(task, ARMS, steps=30, group_size=8, optimizer=4.0, epochs=8)
    lab.check("ppo", outcome, method=methods.policy_gradient(loss="ppo"), baseline=UNCLIPPED)


def test_the_dual_clip_bounds_what_a_far_away_sampler_does_to_ppo():
    task = lab.Task(4, 8, 1, lab.by_sequence(ARMS))
    outcome = expected_reward(
        task, ARMS, steps=60, group_size=8, optimizer=optax.adam(0.1), sampler=shifted_sampler(2.0)
    )
    dual = methods.grpo(beta=0.0, aggregation="token_mean", dual_clip=3.0)
    lab.check("dual-clip", outcome, method=dual, baseline=GRPO)


def test_truncated_ratios_learn_from_a_far_away_sampler_where_raw_ones_are_too_noisy():
    task = lab.Task(4, 8, 1, lab.by_sequence(ARMS))
    outcome = expected_reward(
        task, ARMS, steps=60, group_size=8, optimizer=optax.adam(0.1), sampler=shifted_sampler(2.0)
    )
    loss = {"name": "topr", "positive": (0.0, 1.0), "negative": (0.0, 1.0), "level": "token"}
    raw = methods.policy_gradient(loss={"name": "cispo", "clip_high": 1e9})
    lab.check("tis-loss", outcome, method=methods.policy_gradient(loss=loss), baseline=raw)


def with_noisy_log_probs(scale):
    """Longer answers whose recorded log-probs are noisy: Adam, because the losses differ in scale."""
    task = lab.Task(2, 3, 4, lab.by_sequence(TREE))
    return expected_reward(task, TREE, steps=60, group_size=8, optimizer=optax.adam(0.05), prepare=misjudged(scale))


def test_gspo_withstands_noise_of_token_ratios_better_than_grpo():
    lab.check("gspo", with_noisy_log_probs(1.0), method=methods.gspo(), baseline=methods.grpo(beta=0.0))


def test_gmpo_withstands_outliers_of_token_ratios_better_than_grpo():
    lab.check("gmpo", with_noisy_log_probs(1.0), method=methods.gmpo(), baseline=methods.grpo(beta=0.0))


def test_sapo_learns_more_than_grpo_from_noisy_token_ratios():
    lab.check("sapo", with_noisy_log_probs(1.0), method=methods.sapo(), baseline=methods.grpo(beta=0.0))


def test_longer_answers_are_found_by_luspo_sooner_than_by_gspo():
    def judge(rollouts, key):
        # Token 0 ends the answer; the longer it is, the likelier it is right.
        ends = rollouts.tokens[:, 1:] == 0
        mask = jnp.pad((jnp.cumsum(ends, axis=1) - ends == 0).astype(jnp.float32), ((0, 0), (1, 0)))
        right = jax.random.bernoulli(key, 0.1 + 0.8 * (jnp.sum(mask, axis=1) - 1) / 5)
        return rollouts.replace(mask=mask, reward=right.astype(jnp.float32).reshape(rollouts.reward.shape))

    lengths = np.array([f"{i:06b}0".index("0") + 1 if "0" in f"{i:06b}" else 6 for i in range(64)])
    task = lab.Task(2, 2, 6, judge)

    def outcome(method, key):
        optimizer = optax.adam(0.1)
        trained = lab.train(task, method, key, steps=60, group_size=16, optimizer=optimizer, reuse=2)
        return jnp.mean(lab.probabilities(trained.params, 6) @ lengths)

    gspo = methods.gspo(clip_low=2e-3, clip_high=2.5e-3)
    lab.check("luspo", outcome, method=methods.luspo(), baseline=gspo)


def test_cispo_learns_rare_tokens_faster_than_the_clip_of_dapo():
    task, table = rare_right_answer(-4.0)
    outcome = expected_reward(task, table, steps=64, group_size=16, optimizer=4.0, reuse=8)
    lab.check("cispo", outcome, method=methods.cispo(), baseline=methods.dapo())


def test_dppo_does_not_hold_unlikely_tokens_back_as_the_ratio_clip_does():
    task, table = rare_right_answer(-4.0)
    outcome = expected_reward(task, table, steps=64, group_size=16, optimizer=4.0, reuse=8)
    lab.check("dppo", outcome, method=methods.dppo(), baseline=GRPO)


def test_dapo_gives_unlikely_right_answers_more_room_than_grpo():
    task, table = rare_right_answer(-2.0)
    outcome = expected_reward(task, table, steps=64, group_size=16, optimizer=4.0, reuse=4)
    lab.check("dapo", outcome, method=methods.dapo(), baseline=GRPO)


def with_stale_rollouts(**training):
    """Each batch is used for eight steps of two epochs."""
    task = lab.Task(4, 8, 1, lab.by_sequence(ARMS))
    return expected_reward(task, ARMS, steps=48, group_size=8, optimizer=1.0, reuse=8, epochs=2, **training)


def test_vespo_learns_more_than_grpo_from_stale_rollouts():
    lab.check("vespo", with_stale_rollouts(), method=methods.vespo(), baseline=GRPO)


def test_decoupling_the_clip_from_the_sampler_lets_ppo_use_stale_rollouts():
    lab.check("decoupled-ppo", with_stale_rollouts(), method=methods.decoupled_ppo(), baseline=GRPO)


def test_m2po_learns_more_than_the_clip_from_stale_rollouts():
    lab.check("m2po", with_stale_rollouts(), method=methods.m2po(), baseline=GRPO)


def _kto(logp, old_logp, advantages, mask, *, beta=0.1):
    """KTO's value function of single answers, whose labels are the signs of the advantages."""
    log_ratio = jnp.sum((logp - old_logp) * mask, axis=1)
    return -jax.nn.sigmoid(beta * jnp.sign(jnp.sum(advantages * mask, axis=1)) * log_ratio)


def test_dro_gains_more_than_kto_from_a_fixed_set_of_answers_with_graded_rewards():
    values = np.random.default_rng(1).random(20)
    task = lab.Task(2, 20, 1, lab.by_sequence(values, noise=0.1))
    outcome = expected_reward(task, values, steps=200, group_size=40, optimizer=4.0, reuse=200)
    kto = methods.policy_gradient(advantage="dr_grpo", loss=functools.partial(_kto, beta=0.1))
    lab.check("dro", outcome, method=methods.dro(beta_ratio=0.1), baseline=kto)
