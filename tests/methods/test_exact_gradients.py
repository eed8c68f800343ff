"""The expected gradient of an estimator against the exact one, on policies small enough to enumerate every batch.

A policy over three tokens and sequences of two has nine sequences and 81 groups of two. Each group's gradient times
its probability, added up, is the estimator's expectation with no sampling error, in float64.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from tests.advantages.compiled import compiled
from tests.claims import lab

V, L, G = 3, 2, 2
REWARDS = np.array([0.0, 1.0, 0.3, 0.6, 0.0, 0.9, 0.2, 0.5, 1.5])
LOGITS = np.array([[[0.3, -0.2, 0.5], [0.1, 0.4, -0.6], [0.0, 0.7, 0.2], [-0.3, 0.2, 0.1]]])
REFERENCE = LOGITS + np.array([[[0.2, 0.0, -0.1], [0.0, 0.3, 0.0], [-0.2, 0.0, 0.1], [0.1, 0.0, 0.0]]])
TASK = lab.Task(prompts=1, vocab=V, length=L, judge=lab.by_sequence(REWARDS))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def group(sequences):
    """The rollouts of a group of sequences, given by their numbers, without log-probs."""
    like = lab.sample(TASK, jnp.asarray(LOGITS), jax.random.key(0), len(sequences))
    tokens = jnp.stack([jnp.zeros_like(sequences), sequences // V, sequences % V], axis=1).astype(jnp.int32)
    return like.replace(tokens=tokens, reward=jnp.asarray(REWARDS)[sequences][None])


def expected_gradient(method, group_size=G, old=LOGITS):
    """Sum over all groups of their probability under `old` times the gradient of the method's loss on them."""
    every = jnp.array(list(itertools.product(range(V**L), repeat=group_size)))
    p = np.asarray(compiled(lab.probabilities)(jnp.asarray(old), L))[0]
    chance = np.prod(p[np.asarray(every)], axis=1)

    def loss(logits, sequences):
        rollouts = group(sequences)
        rollouts = rollouts.replace(logp=lab.score(jnp.asarray(old), rollouts, frozenset({"logp"}), None).logp)
        roles = {"policy": logits, "reference": jnp.asarray(REFERENCE)}
        stats = {role: lab.score(roles[role], rollouts, fields, None) for role, fields in method.needs.items()}
        start = jax.lax.stop_gradient(stats)
        targets, _ = method.targets(method.init(rollouts, 1), rollouts, start, jax.random.key(0))
        terms = method.loss(stats, rollouts, jax.lax.stop_gradient(targets)).values()
        return sum(t.weight * losses.aggregate(t.value, t.mask, t.mode, horizon=t.horizon) for t in terms)

    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(jnp.asarray(LOGITS), every)
    return np.einsum("n,n...->...", chance, np.asarray(gradients))


def exact(objective):
    return np.asarray(jax.jit(jax.grad(objective))(jnp.asarray(LOGITS)))


def expected_reward(logits):
    return lab.probabilities(logits, L)[0] @ REWARDS


def divergence(logits):
    p, q = lab.probabilities(logits, L)[0], lab.probabilities(jnp.asarray(REFERENCE), L)[0]
    return jnp.sum(p * jnp.log(p / q))


SEQUENCE_SUM = {"aggregation": "seq_mean_token_sum"}


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        (methods.reinforce(), 1.0),
        (methods.reinforce(baseline="leave_one_out"), 1.0),
        (methods.policy_gradient(advantage="dr_grpo", **SEQUENCE_SUM), (G - 1) / G),
        (methods.policy_gradient(advantage="rloo", **SEQUENCE_SUM), 1.0),
        (
            methods.policy_gradient(
                advantage="dr_grpo", aggregation="seq_mean_token_sum_norm", horizon=L, loss="reinforce"
            ),
            (G - 1) / G / L,
        ),
    ],
    ids=["reinforce", "rloo", "dr_grpo", "rloo_by_ppo", "dr_grpo_by_horizon"],
)
def test_the_estimator_is_unbiased_up_to_a_known_factor(method, factor):
    # A group's own mean as baseline holds each reward against itself once in G: the factor of Dr. GRPO.
    np.testing.assert_allclose(expected_gradient(method), -factor * exact(expected_reward), rtol=1e-9, atol=1e-12)


def test_dividing_by_the_groups_deviation_is_biased_towards_rare_success():
    found = expected_gradient(methods.policy_gradient(advantage={"name": "grpo", "eps": 0.0}, **SEQUENCE_SUM))
    plain = expected_gradient(methods.policy_gradient(advantage="dr_grpo", **SEQUENCE_SUM))
    # For groups of two every pair of different rewards counts the same, +-1/sqrt(2), whatever lies between them.
    signs = np.sign(REWARDS[:, None] - REWARDS[None])
    p = lab.probabilities(jnp.asarray(LOGITS), L)[0]

    def rank_objective(logits):
        return jnp.einsum("i,j,ij->", lab.probabilities(logits, L)[0], p, signs) / np.sqrt(2)

    np.testing.assert_allclose(found, -exact(rank_objective), rtol=1e-9, atol=1e-12)
    cosine = np.sum(found * plain) / np.linalg.norm(found) / np.linalg.norm(plain)
    assert cosine < 0.99


def test_stale_rollouts_weighted_by_ratios_of_tokens_are_biased_and_of_sequences_are_not():
    old = LOGITS + np.array([[[0.4, 0.0, -0.3], [0.3, 0.0, 0.0], [0.0, -0.4, 0.0], [0.0, 0.0, 0.5]]])

    def by_sequence(logp, old_logp, advantages, mask):
        gap = jnp.sum((logp - old_logp) * mask, axis=1)
        return -jnp.exp(gap) * jnp.sum(advantages * mask, axis=1) / jnp.sum(mask, axis=1)

    whole = methods.policy_gradient(advantage="reinforce", loss=by_sequence, aggregation="seq_mean_token_sum")
    unclipped = {"name": "ppo", "clip_low": 1.0, "clip_high": 1e9}
    tokens = methods.policy_gradient(advantage="reinforce", loss=unclipped, **SEQUENCE_SUM)
    np.testing.assert_allclose(expected_gradient(whole, 1, old), -exact(expected_reward), rtol=1e-9, atol=1e-12)
    assert np.max(np.abs(expected_gradient(tokens, 1, old) + exact(expected_reward))) > 1e-3


@pytest.mark.parametrize(
    ("estimator", "gradient"), [("k1", "zero"), ("k2", "reverse"), ("k3", "forward")], ids=["k1", "k2", "k3"]
)
def test_a_kl_term_has_the_gradient_that_its_estimator_is_known_for(estimator, gradient):
    # With every reward 0 only the KL term is left. Token by token, each at the prefixes that the policy reaches.
    no_reward = methods.policy_gradient(
        advantage=lambda s: jnp.zeros_like(s.reward), beta=1.0, kl_estimator=estimator, **SEQUENCE_SUM
    )
    found = expected_gradient(no_reward, 1)
    reach = jax.lax.stop_gradient(jnp.concatenate([jnp.ones(1), jax.nn.softmax(jnp.asarray(LOGITS[0, 0]))]))

    def rows(logits):
        p, q = jax.nn.softmax(logits[0]), jax.nn.softmax(jnp.asarray(REFERENCE[0]))
        kl = {"zero": 0.0 * p, "reverse": p * jnp.log(p / q), "forward": q * jnp.log(q / p)}[gradient]
        return jnp.sum(reach * jnp.sum(kl, axis=-1))

    np.testing.assert_allclose(found, exact(rows), rtol=1e-8, atol=1e-12)


def test_the_kl_inside_the_reward_has_the_gradient_of_the_whole_sequences_kl():
    method = methods.policy_gradient(
        advantage="reinforce", loss="reinforce", beta=0.7, kl_in="reward", kl_estimator="k1", **SEQUENCE_SUM
    )
    np.testing.assert_allclose(
        expected_gradient(method, 1), exact(lambda x: 0.7 * divergence(x) - expected_reward(x)), rtol=1e-9, atol=1e-12
    )


def test_an_entropy_bonus_has_the_gradient_of_the_entropy_where_prefixes_are_given():
    method = methods.policy_gradient(advantage=lambda s: jnp.zeros_like(s.reward), entropy_weight=0.3, **SEQUENCE_SUM)
    reach = jax.lax.stop_gradient(jnp.concatenate([jnp.ones(1), jax.nn.softmax(jnp.asarray(LOGITS[0, 0]))]))

    def rows(logits):
        p = jax.nn.softmax(logits[0])
        return 0.3 * jnp.sum(reach * jnp.sum(p * jnp.log(p), axis=-1))

    np.testing.assert_allclose(expected_gradient(method, 1), exact(rows), rtol=1e-9, atol=1e-12)
