"""Claims about learning from pairs, on policies whose answers can be enumerated."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import losses, methods
from jaxrl_post.types import TokenStats
from tests.claims import lab
from tests.claims.offline import answers, learned


def _pairs(chosen, rejected):
    """Pairs of answers `[N]` of one token, which is the answer's number."""
    return answers(jnp.stack([chosen, rejected], axis=1)[..., None])


def _learned(method, logits, params, rollouts, **options):
    """Parameters that a method learns from pairs; `logits(params)` are those of the answers, at first the reference."""
    return learned(method, lambda w: jax.nn.log_softmax(logits(w))[rollouts.tokens], params, rollouts, **options)


def test_dpo_finds_the_policy_that_maximises_the_reward_under_a_constraint_on_the_kl():
    """Of a known reward, from labels alone; the baseline learns the chosen answers: the paper's Preferred-FT."""
    beta, number = 0.5, 20_000

    def outcome(method, key):
        """Minus the total variation between what is learned and `ref * exp(r / beta) / Z`."""
        keys = jax.random.split(key, 4)
        reward, start = jax.random.normal(keys[0], (5,)), jax.random.normal(keys[1], (5,))
        offered = jax.random.categorical(keys[2], start, shape=(2, number))
        margin = reward[offered[0]] - reward[offered[1]]
        first = jax.random.uniform(keys[3], (number,)) < jax.nn.sigmoid(margin)  # Bradley and Terry's labels
        rollouts = _pairs(jnp.where(first, *offered), jnp.where(first, *offered[::-1]))

        def learned(method):
            own = rollouts
            if method.learns_from == "completions":
                own = rollouts.replace(mask=rollouts.mask.at[1::2].set(0.0))
            return _learned(method, lambda z: z, start, own, steps=150, learning_rate=0.1)

        best = jax.nn.softmax(start + reward / beta)
        return -0.5 * jnp.sum(jnp.abs(jax.nn.softmax(lab.pick(method, learned)) - best))

    found = lab.check("dpo", outcome, method=methods.dpo(beta=beta), baseline=methods.sft(), seeds=8, margin=0.1)
    assert found.method.mean() > -0.03


def _of_three_answers(method, key):
    """Probabilities of three answers, of which the pairs know two; what tells these apart is stronger in the third."""
    chosen, rejected, noise = 0.5 * jax.random.normal(key, (3, 4))
    features = jnp.stack([chosen + 1, rejected, 2 * (chosen + 1) - rejected + 2 * noise])
    rollouts = _pairs(jnp.zeros(8, jnp.int32), jnp.ones(8, jnp.int32))

    def found(method):
        return _learned(method, lambda w: features @ w, jnp.zeros(4), rollouts, steps=300, learning_rate=0.03)

    return jax.nn.softmax(features @ lab.pick(method, found))


def test_rpo_leaves_the_answers_alone_that_no_label_speaks_of_where_dpo_moves_to_them():
    rpo, dpo = methods.rpo(beta=0.5, eta=0.5), methods.dpo(beta=0.5)
    third = lambda method, key: -_of_three_answers(method, key)[2]  # noqa: E731
    found = lab.check("rpo-sft", third, method=rpo, baseline=dpo, seeds=32, margin=0.3)
    assert found.baseline.mean() < -0.6 < -1 / 3 - 0.05 < found.method.mean()


def test_pessimism_about_answers_without_labels_earns_more_offline():
    """The third answer is worse than both that the labels compare."""
    reward = jnp.array([1.0, 0.0, -1.0])

    def outcome(method, key):
        return _of_three_answers(method, key) @ reward

    pessimistic, dpo = methods.rpo(beta=0.1, eta=1.0), methods.dpo(beta=0.1)
    lab.check("vpo-value-incentivized", outcome, method=pessimistic, baseline=dpo, seeds=32, margin=0.5)


def test_the_reported_numbers_of_both_rows():
    policy, nothing = jnp.array([2.0, -0.5]), jnp.zeros(1)
    loss, slope = jax.value_and_grad(lambda x: losses.dpo(x[:1], x[1:], nothing, nothing, beta=0.1).sum())(policy)
    np.testing.assert_allclose([loss, *slope], [0.575939, -0.043782, 0.043782], atol=1e-6)
    rollouts = _pairs(jnp.array([0]), jnp.array([1]))
    logp = jnp.array([[0.0, -20.0], [0.0, -12.0]])
    stats = {"policy": TokenStats(logp=logp), "reference": TokenStats(logp=logp + jnp.array([[0, -1.0], [0, 1.0]]))}
    method = methods.rpo(beta=0.1, eta=0.005)
    targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
    terms = method.loss(stats, rollouts, targets).values()
    total = sum(term.weight * losses.aggregate(term.value, term.mask, term.mode) for term in terms)
    np.testing.assert_allclose(total, 0.608139, atol=1e-6)


def test_pairs_that_a_judge_doubts_teach_less_of_what_is_wrong():
    """Three labels in ten are flipped; the judge's passes under dropout disagree where they are."""

    def outcome(method, key):
        """Expected reward of one of ten answers."""
        keys = jax.random.split(key, 4)
        reward = jax.random.normal(keys[0], (10,))
        offered = jax.random.randint(keys[1], (2, 200), 0, 10)
        flipped = jax.random.bernoulli(keys[2], 0.3, (200,))
        first = (reward[offered[0]] > reward[offered[1]]) ^ flipped
        passes = 1.5 * jax.random.normal(keys[3], (10, 200)) * jnp.where(flipped, 2.0, 0.5) + 1.0
        doubt = losses.information_gain(jax.nn.sigmoid(passes))
        rollouts = _pairs(jnp.where(first, *offered), jnp.where(first, *offered[::-1]))
        rollouts = rollouts.replace(extras={"uncertainty": doubt})

        def found(method):
            return _learned(method, lambda z: z, jnp.zeros(10), rollouts, steps=60, learning_rate=0.1)

        return jnp.sum(jax.nn.softmax(lab.pick(method, found)) * reward)

    method = methods.upo(beta=0.5, mu=3.0)
    lab.check("upo-uncertainty", outcome, method=method, baseline=methods.dpo(beta=0.5), margin=0.02)
