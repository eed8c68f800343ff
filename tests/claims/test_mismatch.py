"""Claims about samplers that are not the trained policy: weights, masks, rejection."""

import jax
import jax.numpy as jnp

from jaxrl_post import methods
from tests.claims import lab

# A right second token is worth most after token 0, which is why the first token should be 0.
CHAIN = jnp.array([1.0, 0.0, 0.7, 0.5])


def _grpo(correction=None, **options):
    return methods.grpo(beta=0.0, aggregation="token_mean", old_logp="recompute", correction=correction, **options)


def _expected_reward(task, table, **options):
    def outcome(method, key):
        params = lab.train(task, method, key, **options).params
        return jnp.mean(jnp.sum(lab.probabilities(params, task.length) * table, axis=-1))

    return outcome


def _glitches(table):
    """An engine that gives out the last token in half of the rows, being sure of it, whatever the policy says."""

    def prepare(rollouts, key):
        glitch = jax.random.bernoulli(key, 0.5, (rollouts.batch_size, 1)) & (rollouts.mask > 0)
        tokens = jnp.where(glitch, table.shape[0] - 1, rollouts.tokens)
        rollouts = rollouts.replace(tokens=tokens, logp=jnp.where(glitch, 0.0, rollouts.logp))
        return lab.by_sequence(table)(rollouts, key)

    return prepare


ARMS = jnp.array([0.6, 1.0, 0.3, 0.2, 0.1, 0.0])
BANDIT = lab.Task(1, 6, 1, lab.by_sequence(ARMS), initial=[[[3.0, 1.0, 1.0, 0.0, 0.0, -1.0]]])


def test_truncated_importance_sampling_finds_the_best_arm_where_an_engines_glitches_settle_grpo_on_the_first():
    outcome = _expected_reward(BANDIT, ARMS, steps=60, group_size=16, optimizer=1.0, prepare=_glitches(ARMS))
    lab.check("tis", outcome, method=_grpo("tis"), baseline=_grpo(), margin=0.1)


def test_icepop_finds_the_best_arm_where_an_engines_glitches_settle_grpo_on_the_first():
    outcome = _expected_reward(BANDIT, ARMS, steps=60, group_size=16, optimizer=1.0, prepare=_glitches(ARMS))
    lab.check("icepop", outcome, method=_grpo("icepop"), baseline=_grpo(), margin=0.1)


def test_masked_importance_of_sequences_credits_a_first_token_that_truncated_importance_of_tokens_blames():
    # After token 0 the engine forgets what the policy knows. A token's own ratio repairs the choice of the second
    # token, but not the reward that the first one is credited with.
    table = jnp.array([1.0, 0.0, 0.6, 0.6])
    task = lab.Task(1, 2, 2, lab.by_sequence(table), initial=[[[0.0, 0.0], [1.0, -1.0], [0.0, 0.0]]])

    def forgets(params, key):
        return params.at[:, 1].set(0.0)

    outcome = _expected_reward(task, table, steps=80, group_size=16, optimizer=0.5, sampler=forgets)
    lab.check("mis", outcome, method=_grpo("mis"), baseline=_grpo("tis"), margin=0.1)


def _broken_half_of_the_time(params, key):
    """In half of the steps the engine prefers the second token that the policy avoids."""
    return jnp.where(jax.random.bernoulli(key), params.at[:, 1:].multiply(-1.0), params)


TREE = lab.Task(1, 2, 2, lab.by_sequence(CHAIN), initial=[[[0.0, 0.0], [1.0, -1.0], [1.0, -1.0]]])


def test_sequence_masked_tis_leaves_out_a_broken_engines_sequences_which_tis_of_tokens_learns_from():
    outcome = _expected_reward(TREE, CHAIN, steps=80, group_size=16, optimizer=0.5, sampler=_broken_half_of_the_time)
    masked = {"name": "seq_mask_tis", "low": 0.8, "high": 1.25}
    lab.check("seq-mask-tis", outcome, method=_grpo(masked), baseline=_grpo("tis"), margin=0.05)


def test_rejection_by_divergence_leaves_out_a_broken_engines_sequences_which_grpo_learns_from():
    outcome = _expected_reward(TREE, CHAIN, steps=80, group_size=16, optimizer=0.5, sampler=_broken_half_of_the_time)
    rejection = {"name": "rejection", "statistic": "k3", "reduce": "seq_mean", "high": 0.05}
    lab.check("rejection-sampling-is", outcome, method=_grpo(rejection), baseline=_grpo(), margin=0.05)


def test_the_off_policy_sequence_mask_keeps_stale_failures_from_destabilising_grpo():
    # Batches are used sixteen times. Pushing the same failures down again and again raises whatever is likely already.
    table = jnp.array([0.5, 0.4, 0.3, 0.2, 0.6, 0.7, 0.8, 1.0])
    task = lab.Task(4, 8, 1, lab.by_sequence(table, noise=0.1), initial=[[[2.0, 1, 1, 1, 1, 0, 0, 0]]])
    outcome = _expected_reward(task, table, steps=96, group_size=8, optimizer=4.0, reuse=16)
    lab.check("opsm", outcome, method=_grpo(off_policy_threshold=0.5), baseline=_grpo())
