"""Claims about measures: of reward models, of data sets, of policies, and of rewards that mean nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import advantages, control, curation, losses, masked, methods, rewards
from tests.claims import lab


def _chosen(rollouts):
    return rollouts.tokens[:, 1].reshape(rollouts.reward.shape)


def _correlation(x, y):
    every = jnp.ones(x.shape, bool)
    x, y = (masked.whiten(v, every, eps=1e-6) for v in (x, y))
    return jnp.mean(x * y)


def test_one_against_nine_of_the_same_style_tells_which_reward_model_chooses_well():
    """Twelve reward models of quality, a liking for a style, and noise; in pairs the better answer has the style."""

    def outcome(many, key):
        """Correlation of the benchmark with the quality of the best of 16 answers."""
        keys = jax.random.split(key, 8)
        style_weight = jnp.linspace(-2.0, 3.0, 12)[:, None, None]
        noise = jax.random.permutation(keys[0], jnp.linspace(0.2, 1.5, 12))[:, None, None]

        def score(quality, style, key):
            return quality + style_weight * style + noise * jax.random.normal(key, (12, *quality.shape))

        quality = jnp.zeros((100, 10)).at[:, 0].set(1.0)
        scores = score(quality, 0.3 * jax.random.normal(keys[1], quality.shape), keys[2])
        one_of_ten = jax.vmap(lambda s: rewards.one_to_many(s).accuracy)(scores)
        styled = jnp.where(quality[:, :2] > 0, 1.0, 0.0)
        pairs = jax.vmap(lambda s: rewards.one_to_many(s).accuracy)(score(quality[:, :2], styled, keys[3]))

        answers = jax.random.normal(keys[4], (100, 32))
        proxy = score(answers, jax.random.normal(keys[5], answers.shape), keys[6])
        best = jax.vmap(jax.vmap(lambda s, a: rewards.expected_best_of_n(s, a, 16)), (0, None))(proxy, answers)
        gold = jnp.mean(best, axis=1)
        return _correlation(jnp.where(many > 0, one_of_ten, pairs), gold)

    lab.check("rewardmath", outcome, method=1.0, baseline=0.0, seeds=16, margin=0.3)


def test_a_detector_of_what_rewards_are_blind_for_keeps_the_quality():
    """Arms by quality and by artefacts, which three rewards do not see and even like a little."""
    quality = jnp.array([0.0, 0.4, 0.8, 0.6])
    artefact = jnp.array([0.0, 0.0, 0.0, 1.0])

    def judge(rollouts, key):
        arm = _chosen(rollouts)
        of_rewards, of_detector = jax.random.split(key)
        noise = 0.2 * jax.random.normal(of_rewards, (3, *arm.shape))
        parts = {f"reward{i}": quality[arm] + 0.4 * artefact[arm] + noise[i] for i in range(3)}
        # What a frozen model says to "is there an artefact?".
        logit = 3 * artefact[arm] - 1.5 + 0.5 * jax.random.normal(of_detector, arm.shape)
        clean = 3 * (1 - jax.nn.sigmoid(logit))
        proxy = sum(parts.values())
        return rollouts.replace(reward=proxy + clean, rewards={"proxy": proxy})

    task = lab.Task(1, 4, 1, judge)

    def outcome(method, key):
        """Quality less artefacts."""
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 1)[0] @ (quality - artefact)

    blind = methods.policy_gradient(advantage=lambda s: advantages.grpo(s.component("proxy"), s.valid))
    lab.check("artifact-reward", outcome, method=methods.policy_gradient(), baseline=blind, margin=0.3)


def test_wrong_labels_cost_a_policy_that_is_mostly_right_less():
    """GRPO on labels of which a third are wrong, from policies that are right with 75% and with 25%."""

    def judge(rollouts, key):
        right = (_chosen(rollouts) == 0).astype(jnp.float32)
        wrong = rewards.random_reward(key, right.shape, rate=0.35)
        return rollouts.replace(reward=jnp.where(wrong > 0, 1 - right, right))

    def outcome(start, key):
        """Right answers per advantage that was lost, after training: accuracy less that of right labels."""
        reached = []
        for labels in (judge, lambda r, key: r.replace(reward=(_chosen(r) == 0).astype(jnp.float32))):
            task = lab.Task(4, 2, 1, labels, initial=jnp.stack([start, 0.0 * start]))
            trained = lab.train(task, methods.dr_grpo(horizon=1), key, steps=20, group_size=8, optimizer=1.0)
            reached.append(jnp.mean(lab.probabilities(trained.params, 1)[:, 0]))
        return reached[0] - reached[1]

    lab.check("rlvr-clip-entropy-spurious", outcome, method=jnp.float32(np.log(3)), baseline=jnp.float32(-np.log(3)))


def test_cloning_follows_the_quality_of_data_and_offline_learning_its_coverage():
    """Twelve data sets of a bandit with contexts: of a middling policy, and of any of so many arms, in some share."""
    contexts, arms, size = 8, 8, 96
    worth = jax.random.uniform(jax.random.key(0), (contexts, arms))
    scale = {"best": float(jnp.mean(jnp.max(worth, axis=1))), "random": float(jnp.mean(worth))}
    ranked = jnp.argsort(worth, axis=1)
    share, breadth = jnp.tile(jnp.array([0.1, 0.4, 0.7, 0.9]), 3), jnp.repeat(jnp.array([2, 4, 8]), 4)

    def learned(share, breadth, key):
        """Quality and coverage of a data set, and what cloning and offline learning make of it."""
        of_state, of_policy, of_arm = jax.random.split(key, 3)
        state = jax.random.randint(of_state, (size,), 0, contexts)
        any_arm = jnp.floor(jax.random.uniform(of_arm, (size,)) * breadth).astype(jnp.int32)
        middling = jax.random.bernoulli(of_policy, share, (size,))
        action = jnp.where(middling, ranked[state, arms - 3], any_arm)
        seen = jnp.zeros((contexts, arms)).at[state, action].add(1.0)
        quality = curation.trajectory_quality(worth[state, action], **scale)
        cloned = jnp.mean(jnp.sum(seen * worth, axis=1) / jnp.maximum(jnp.sum(seen, axis=1), 1))
        offline = jnp.mean(jnp.max(jnp.where(seen > 0, worth, 0.0), axis=1))
        return quality, jnp.sum(seen > 0) / (contexts * arms), cloned, offline

    def outcome(matched, key):
        """Mean correlation of the two learners' returns, with the measure that is theirs, or with the other one."""
        quality, coverage, cloned, offline = jax.vmap(learned)(share, breadth, jax.random.split(key, 12))
        theirs = _correlation(cloned, quality) + _correlation(offline, coverage)
        other = _correlation(cloned, coverage) + _correlation(offline, quality)
        return jnp.where(matched > 0, theirs, other) / 2

    lab.check("sacotq", outcome, method=1.0, baseline=0.0, seeds=16, margin=0.3)


def test_the_direction_of_instability_is_the_feature_that_should_not_have_been_trusted():
    """A network learns from a small feature that is always right, beside eight that are mostly right and robust."""
    size, count = 9, 128

    def outcome(robust, key):
        """Share of the direction that lies on the feature; the baseline is trained on states that are attacked."""
        of_data, of_params, of_states = jax.random.split(key, 3)
        label = jnp.where(jnp.arange(count) % 2 == 0, 1.0, -1.0)
        states = 0.6 * label[:, None] + jax.random.normal(of_data, (count, size))
        states = states.at[:, 0].set(0.3 * label)
        keys = jax.random.split(of_params)
        params = {"in": jax.random.normal(keys[0], (size, 16)) / 3, "out": jax.random.normal(keys[1], (16, 2)) / 4}

        def logits(params, state):
            return jnp.tanh(state @ params["in"]) @ params["out"]

        def loss(params, states):
            found = jax.nn.log_softmax(logits(params, states))
            return -jnp.mean(jnp.where(label > 0, found[:, 0], found[:, 1]))

        optimizer = optax.adam(0.02)

        def step(carry, _):
            params, state = carry
            attacked = states + robust * 0.4 * jnp.sign(jax.grad(loss, argnums=1)(params, states))
            updates, state = optimizer.update(jax.grad(loss)(params, attacked), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=200)
        shown = states + 0.1 * jax.random.normal(of_states, states.shape)
        gradients = control.state_gradients(lambda s: logits(params, s), shown)
        return jnp.square(control.principal_direction(gradients)[0])

    lab.check("ra-nld", outcome, method=0.0, baseline=1.0, seeds=16, margin=0.1)


def test_dpo_finds_its_target_where_rejected_answers_come_from_the_right_policy():
    """Twenty answers, in expectation over pairs; chosen ones come from the reference."""
    beta, size = 1.0, 20

    def outcome(optimal, key):
        """Minus the KL of the target to what DPO finds."""
        of_target, of_reference = jax.random.split(key)
        target, reference = (jax.nn.log_softmax(jax.random.normal(k, (size,))) for k in (of_target, of_reference))
        rejected = losses.optimal_rejected(target, reference, beta=beta)
        rejected = jnp.where(optimal > 0, rejected, -jnp.log(size))
        # Which of two answers is the chosen one, if one is of the reference and one of the other policy.
        weight = jnp.exp(reference[:, None] + rejected[None, :])

        def loss(logits):
            implied = beta * (jax.nn.log_softmax(logits) - reference)
            return -jnp.sum(weight * jax.nn.log_sigmoid(implied[:, None] - implied[None, :]))

        optimizer = optax.adam(0.05)

        def step(carry, _):
            logits, state = carry
            updates, state = optimizer.update(jax.grad(loss)(logits), state)
            return (optax.apply_updates(logits, updates), state), None

        (logits, _), _ = jax.lax.scan(step, (reference, optimizer.init(reference)), None, length=400)
        found = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(target) * (target - found))

    lab.check("differential-information", outcome, method=1.0, baseline=0.0, margin=0.2)
