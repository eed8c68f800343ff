"""Claims about rewards that layer, shape or ground what a plain sum would give away."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import advantages, methods, rewards
from tests.claims import lab


def _grpo_on(name):
    return methods.policy_gradient(advantage=lambda s: advantages.grpo(s.component(name), s.valid))


def _chosen(rollouts):
    return rollouts.tokens[:, 1].reshape(rollouts.reward.shape)


def _digits(vocab, length):
    return np.arange(vocab**length)[:, None] // vocab ** np.arange(length - 1, -1, -1) % vocab


def _components(vocab, **tables):
    """A judge that gives components of the reward from tables `[V**L]`, and their sum."""

    def judge(rollouts, key):
        del key
        index = lab.sequence_index(rollouts, vocab)
        parts = {name: jnp.asarray(table, jnp.float32)[index] for name, table in tables.items()}
        return rollouts.replace(rewards=parts, reward=sum(parts.values()))

    return judge


def test_a_guess_that_is_mostly_right_is_left_for_a_sound_way():
    """Arms: a sound way, a guess that is right four times of five, a wrong one."""

    def judge(rollouts, key):
        arm = _chosen(rollouts)
        lucky = jax.random.bernoulli(key, 0.8, arm.shape)
        won = jnp.where(arm == 0, 1.0, jnp.where(arm == 1, lucky, 0.0))
        return rollouts.replace(rewards={"won": won, "flawed": (arm == 1).astype(jnp.float32)}, reward=won)

    task = lab.Task(1, 3, 1, judge, initial=[[[-2.0, 1.0, 1.0]]])

    def outcome(method, key):
        """Probability of the sound way."""
        trained = lab.train(task, method, key, steps=150, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 1)[0, 0]

    fapo = methods.fapo(correct="won", flawed="flawed")
    lab.check("fapo", outcome, method=fapo, baseline=methods.dapo(dual_clip=10.0), margin=0.3)


def test_a_product_does_not_pay_an_editor_for_doing_nothing():
    """Edits by how well they are carried out and how much else stays as it was; the last leaves all as it was."""
    execution, kept = jnp.array([0.9, 0.7, 0.5, 0.1]), jnp.array([0.5, 0.6, 0.7, 1.0])

    def judge(rollouts, key):
        arm = _chosen(rollouts)
        one, two = (0.4 * jax.random.normal(k, arm.shape) for k in jax.random.split(key))
        parts = {"done": execution[arm] + one, "kept": kept[arm] + two}
        return rollouts.replace(rewards=parts, reward=0.5 * sum(parts.values()))

    task = lab.Task(1, 4, 1, judge, initial=[[[0.0, 0.0, 0.0, 1.0]]])

    def outcome(method, key):
        """Mean execution."""
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.03))
        return lab.probabilities(trained.params, 1)[0] @ execution

    product = methods.base_and_bonus(base="done", bonus="kept")
    lab.check("firm-cme-qma", outcome, method=product, baseline=methods.policy_gradient(), margin=0.05)


def test_evidence_teaches_what_an_answer_that_needs_all_of_it_cannot():
    """Each token takes a passage or leaves it; the answer is right where the four that it rests on were taken."""
    taken = _digits(2, 7)
    gold = np.array([1, 0, 1, 1, 0, 1, 0])
    answer = np.all(taken >= gold, axis=1)
    found = taken @ gold
    precision, recall = found / np.maximum(taken.sum(1), 1), found / gold.sum()
    grounding = np.where(found > 0, 5 * precision * recall / np.maximum(4 * precision + recall, 1e-9), 0.0)
    task = lab.Task(
        1, 2, 7, _components(2, answer=answer, grounding=grounding), initial=jnp.log(jnp.array([0.85, 0.15]))
    )

    def outcome(method, key):
        """Probability of a right answer."""
        trained = lab.train(task, method, key, steps=120, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 7)[0] @ answer

    method = methods.longrlvr(answer="answer", grounding="grounding")
    lab.check("longrlvr", outcome, method=method, baseline=_grpo_on("answer"), margin=0.1)


def test_a_judge_who_likes_wrong_answers_is_trusted_less():
    """Of four prompts the judge of reasoning likes the wrong answers better in two."""
    right = jnp.arange(4) == 0

    def judge(rollouts, key):
        arm = _chosen(rollouts)
        won = right[arm].astype(jnp.float32)
        honest = (rollouts.prompt_id % 2 == 0)[:, None]
        score = jnp.where(honest, won, 1 - won) + 0.1 * jax.random.normal(key, won.shape)
        return rollouts.replace(rewards={"won": won, "score": score}, reward=won + score)

    task = lab.Task(4, 4, 1, judge)

    def outcome(method, key):
        """Accuracy."""
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        return jnp.mean(lab.probabilities(trained.params, 1)[:, 0])

    method = methods.trust_grpo(outcome="won", score="score", alpha=1.0)
    lab.check("trust-grpo", outcome, method=method, baseline=methods.policy_gradient(), margin=0.1)


def test_a_bounded_reward_keeps_what_a_reward_model_is_right_about():
    """The reward model likes every 1 of five tokens; from the third on they make the answer worse."""
    count = np.sum(_digits(3, 5) == 1, axis=1)
    gold = np.where(count <= 2, count, 4 - count).astype(np.float32)

    def judge(rollouts, key):
        del key
        reward = jnp.asarray(count, jnp.float32)[lab.sequence_index(rollouts, 3)]
        return rollouts.replace(reward=reward, extras={"reference_reward": jnp.ones(1)})

    task = lab.Task(1, 3, 5, judge, initial=jnp.array([0.0, -0.7, 0.0]))

    def outcome(method, key):
        """True worth."""
        trained = lab.train(task, method, key, steps=100, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 5)[0] @ gold

    def shaped(shape):
        return methods.par(shape=shape, beta=0.1)

    lab.check("par", outcome, method=shaped("sigmoid"), baseline=shaped("centered"), seeds=16, margin=0.5)


def test_a_test_that_few_pass_is_learned_sooner_than_by_the_share_of_tests():
    """Each token passes a test or fails it; the first is hard."""
    passes = _digits(2, 6)
    names = [f"test{i}" for i in range(6)]
    judge = _components(2, **dict(zip(names, passes.T, strict=True)))
    initial = np.tile(np.log([0.4, 0.6]), (63, 1))
    initial[0] = np.log([0.95, 0.05])
    task = lab.Task(1, 2, 6, judge, initial=initial[None])

    def outcome(method, key):
        """Probability that all tests pass."""
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 6)[0, -1]

    lab.check("verpo", outcome, method=methods.verpo(tests=names), baseline=methods.dr_grpo(horizon=6), margin=0.0)


def test_reasoning_that_supports_the_answer_wins_where_another_would_do_as_well():
    """A trace and an answer: after the first trace the reference finds the right answer likely, after others not."""
    start = np.zeros((1, 1 + 3, 3))
    start[0, 0] = np.log([0.2, 0.4, 0.4])
    start[0, 1] = np.log([0.9, 0.05, 0.05])
    start[0, 2:] = np.log([0.5, 0.25, 0.25])
    task = lab.Task(1, 3, 2, lab.by_sequence(_digits(3, 2)[:, 1] == 0), initial=start)

    def outcome(method, key):
        """Probability of the supporting trace among right answers."""
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
        p = lab.probabilities(trained.params, 2)[0].reshape(3, 3)[:, 0]
        return p[0] / jnp.sum(p)

    care = methods.grpo_care(answer={"name": "length", "num_steps": 2})
    lab.check("grpo-care", outcome, method=care, baseline=methods.grpo(beta=0.0), margin=0.05)


def test_answers_do_not_shrink_to_please_a_reward_model():
    """The first token is the length; longer answers are more often right, and a reward model likes short ones more."""
    lengths = jnp.arange(1, 6)
    accuracy = 0.4 + 0.1 * lengths

    def judge(rollouts, key):
        length = lengths[_chosen(rollouts)]
        won = jax.random.bernoulli(key, accuracy[_chosen(rollouts)])
        mask = rollouts.mask * (jnp.arange(rollouts.mask.shape[1]) <= length.reshape(-1, 1))
        reward = won + 0.49 * (5 - length) / 4
        return rollouts.replace(mask=mask, length=length + 1, reward=reward)

    task = lab.Task(1, 5, 5, judge)

    def outcome(method, key):
        """Accuracy."""
        trained = lab.train(task, method, key, steps=80, group_size=16, optimizer=optax.adam(0.05))
        return jax.nn.softmax(trained.params[0, 0]) @ accuracy

    lab.check("harmo", outcome, method=methods.harmo(), baseline=methods.policy_gradient(advantage="dr_grpo"), seeds=16)


def _shuffled(reward):
    """Reasoning that names the option or not; without, the first place is chosen, where nine of ten answers stand."""

    def judge(rollouts, key):
        named = _chosen(rollouts) == 0
        first_key, again_key, place_key, shuffle_key = jax.random.split(key, 4)
        understood = jax.random.bernoulli(first_key, 0.85, named.shape)
        again_understood = jnp.where(jax.random.bernoulli(again_key, 0.95, named.shape), understood, ~understood)
        in_place = jax.random.bernoulli(place_key, 0.9, named.shape)
        place_again = jax.random.bernoulli(shuffle_key, 1 / 3, named.shape)
        first = jnp.where(named, understood, in_place).astype(jnp.int32)
        again = jnp.where(named, again_understood, place_again).astype(jnp.int32)
        parts = {"answer": first.astype(jnp.float32), "shuffled": reward(first, again)}
        return rollouts.replace(rewards=parts, reward=sum(parts.values()))

    def outcome(method, key):
        """Probability of reasoning that survives a shuffle."""
        task = lab.Task(1, 2, 1, judge)
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 1)[0, 0]

    return outcome


def test_agreement_under_a_shuffle_outweighs_a_shortcut_by_place():
    def reward(first, again):
        return rewards.shuffled_agreement(first, again, jnp.ones_like(first))

    plain = _grpo_on("answer")
    lab.check("acre", _shuffled(reward), method=methods.policy_gradient(), baseline=plain, margin=0.3)


def test_following_the_letter_is_not_worth_it():
    def reward(first, again):
        gold = jnp.ones(first.size, jnp.int32)
        drifts = (again != first).reshape(-1, 1)
        found = rewards.shuffle_consistency(first.reshape(-1), again.reshape(-1, 1), gold, drifts)
        return found.reshape(first.shape) - first  # less the answer's own reward, which the sum adds

    plain = _grpo_on("answer")
    lab.check("georeason", _shuffled(reward), method=methods.policy_gradient(), baseline=plain, margin=0.2)


def test_a_smooth_box_reward_leads_to_a_target_that_is_never_hit_at_first():
    """The policy puts a box of the right size around a normal point, three sizes from where it belongs."""
    gold = jnp.array([-1.0, -1.0, 1.0, 1.0])

    def hit(box, right):
        return rewards.box_hit(box, right)

    def smooth(box, right):
        return rewards.gaussian_point(box, right) + rewards.gaussian_coverage(box, right)

    def outcome(reward, key):
        """Share of hits at the end."""

        def boxes(mean, key):
            center = mean + 1.5 * jax.random.normal(key, (16, 2))
            return center, jnp.concatenate([center - 1, center + 1], axis=1)

        def score(box):
            return lab.pick(reward, lambda chosen: chosen(box, jnp.broadcast_to(gold, box.shape)))

        def step(mean, key):
            center, box = boxes(mean, key)
            credit = advantages.grpo(score(box)[None])[0]
            return mean + 0.1 * jnp.mean(credit[:, None] * (center - mean), axis=0), None

        keys = jax.random.split(key, 151)
        mean, _ = jax.lax.scan(step, jnp.array([4.5, 4.0]), keys[1:])
        _, box = jax.vmap(boxes, (None, 0))(mean, jax.random.split(keys[0], 8))
        return jnp.mean(rewards.box_hit(box, jnp.broadcast_to(gold, box.shape)))

    lab.check("gui-g2", outcome, method=smooth, baseline=hit, margin=0.1)


def test_a_near_miss_of_an_action_teaches_where_tokens_alone_must_agree():
    digits = jnp.asarray(_digits(5, 3))
    reference = jnp.array([4, 3, 4])
    tokens = rewards.token_agreement(digits, jnp.broadcast_to(reference, digits.shape))
    pose, gripper = digits[..., None] / 4.0, jnp.zeros(digits.shape)
    goal = jnp.broadcast_to(reference[:, None] / 4.0, pose.shape)
    path = rewards.trajectory_agreement(pose, goal, gripper, gripper, alpha=2.0, beta=1.0)
    success = (jnp.max(jnp.abs(pose - goal), axis=(1, 2)) < 0.3).astype(jnp.float32)
    ones = jnp.ones(len(digits))
    both, alone = (rewards.chunk_reward(tokens, path, ones, token_weight=w) for w in (0.7, 1.0))

    def outcome(table, key):
        """Probability of a path that stays near the reference."""
        task = lab.Task(1, 5, 3, lab.by_sequence(table), initial=jnp.array([1.0, 0.5, 0.0, -0.5, -1.0]))
        trained = lab.train(task, methods.grpo(beta=0.0), key, steps=80, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 3)[0] @ success

    lab.check("lifelong-rft", outcome, method=both, baseline=alone)


def test_win_rates_do_not_blow_noise_up_into_a_hack():
    """Arms are worth the same to a hundredth; the last has what a scorer likes, which a judge of pairs calls a tie."""
    worth, liked = jnp.array([0.0, 0.01, 0.005, 0.0]), jnp.array([0.0, 0.0, 0.0, 0.03])

    def judge(rollouts, key):
        arm = _chosen(rollouts)
        scored = worth[arm] + liked[arm] + 0.02 * jax.random.normal(key, arm.shape)
        return rollouts.replace(rewards={"worth": worth[arm]}, reward=scored)

    def by_wins(s):
        gap = s.component("worth")[:, :, None] - s.component("worth")[:, None, :]
        wins = jnp.where(jnp.abs(gap) < 0.05, 0.5, gap > 0)
        return advantages.grpo(advantages.win_rate(wins, s.valid), s.valid)

    task = lab.Task(1, 4, 1, judge)

    def outcome(method, key):
        """Less of what the scorer likes."""
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
        return -lab.probabilities(trained.params, 1)[0, 3]

    method = methods.policy_gradient(advantage=by_wins)
    lab.check("pref-grpo", outcome, method=method, baseline=methods.grpo(beta=0.0), margin=0.3)


def test_a_critic_that_also_suggests_helps_the_agent_more():
    """Two states whose proposed action is right, two where it is wrong; a verdict, and the action to take instead."""
    gold = jnp.array([1, 2, 3, 0])
    proposed_right = jnp.array([1, 1, 0, 0])

    def judge(rollouts, key):
        del key
        verdict, action = (rollouts.tokens[:, i].reshape(rollouts.reward.shape) for i in (1, 2))
        verdict, truth = (verdict < 2).astype(jnp.int32), jnp.broadcast_to(proposed_right[:, None], verdict.shape)
        right, ones = (action == gold[:, None]).astype(jnp.float32), jnp.ones(verdict.shape)
        both, alone = (rewards.critique(verdict, truth, right, ones, suggestion_weight=w) for w in (1.0, 0.0))
        return rollouts.replace(rewards={"alone": alone}, reward=both)

    task = lab.Task(4, 4, 2, judge)

    def outcome(method, key):
        """Success of an agent that does as it is told."""
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        p = lab.probabilities(trained.params, 2).reshape(4, 4, 4)
        accepted = jnp.sum(p[:, :2], axis=(1, 2)) * proposed_right
        replaced = jnp.sum(jnp.take_along_axis(p[:, 2:], gold[:, None, None], axis=2), axis=(1, 2))
        return jnp.mean(accepted + replaced)

    critic = methods.policy_gradient()
    lab.check("s-grpo-gui-critic", outcome, method=critic, baseline=_grpo_on("alone"), margin=0.1)


@pytest.mark.nightly
def test_rare_tests_are_learned_where_all_or_nothing_teaches_little():
    """The other baseline of the paper: the reward is 1 where all tests pass."""
    passes = _digits(2, 6)
    names = [f"test{i}" for i in range(6)]
    parts = dict(zip(names, passes.T, strict=True)) | {"all": np.all(passes, axis=1)}
    initial = np.tile(np.log([0.4, 0.6]), (63, 1))
    initial[0] = np.log([0.95, 0.05])
    task = lab.Task(1, 2, 6, _components(2, **parts), initial=initial[None])

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 6)[0, -1]

    found, _ = lab.compare(outcome, methods.verpo(tests=names), _grpo_on("all"), 16)
    assert found.interval[0] > 0.1, found
