"""Claims about preferences between a policy's own answers, on games that can be solved."""

import jax
import jax.numpy as jnp

from jaxrl_post import advantages, methods
from tests.claims import lab
from tests.claims.offline import answers, learned

CYCLE = jnp.array([[0.5, 0.95, 0.2, 0.9], [0.05, 0.5, 0.9, 0.9], [0.8, 0.1, 0.5, 0.9], [0.1, 0.1, 0.1, 0.5]])
"""Of four answers three beat one another in a circle, the first by a little more, and all beat the fourth."""


def _exploitability(p):
    """What the best answer to a policy wins beyond one half."""
    return jnp.max(CYCLE @ p) - 0.5


SCORES = jax.scipy.special.logit((jnp.sum(CYCLE, axis=1) - 0.5) / 3)
"""A reward model: one score for each answer, the log-odds of winning against the others."""


def _by_win_rate(drawn, key):
    """Win rates within the group."""
    del key
    return advantages.win_rate(CYCLE[drawn[:, :, None], drawn[:, None, :]])


def _by_score(drawn, key):
    del key
    return SCORES[drawn]


def _labelled(probability):
    """Of groups of two, 1 for the one that is preferred."""

    def reward(drawn, key):
        first = jax.random.bernoulli(key, probability(drawn[:, 0], drawn[:, 1]))
        return jnp.stack([first, ~first], axis=1).astype(jnp.float32)

    return reward


def _iterate(method, start, reward, key, *, iterations, prompts, group, steps, rate, frozen=()):
    """Policies `[iterations, V]`, each learned from answers of the one before, to which all roles go but the frozen."""

    def iteration(logits, number):
        drawn = jax.random.categorical(jax.random.fold_in(key, number), logits, shape=(prompts, group))
        judged = lab.pick(reward, lambda one: one(drawn, jax.random.fold_in(key, number + iterations)))
        rollouts = answers(drawn[..., None]).replace(reward=judged)

        def logp(params):
            return jnp.pad(jax.nn.log_softmax(params)[rollouts.tokens[:, 1:]], ((0, 0), (1, 0)))

        def learn(method):
            options = {"steps": steps, "learning_rate": rate, "roles": dict.fromkeys(frozen, start)}
            return learned(method, logp, logits, rollouts.replace(logp=logp(logits)), **options)

        logits = lab.pick(method, learn)
        return logits, jax.nn.softmax(logits)

    return jax.lax.scan(iteration, start, jnp.arange(iterations))[1]


def _unexploited(**options):
    """Minus the exploitability of the average policy."""

    def outcome(choice, key):
        policies = _iterate(choice[0], jnp.zeros(4), choice[1], key, iterations=100, **options)
        return -_exploitability(jnp.mean(policies, axis=0))

    return outcome


def test_win_rates_against_itself_lead_to_the_nash_equilibrium_where_a_reward_model_picks_one_answer():
    method = methods.online_dpo(beta=2.0, labels="soft")
    outcome = _unexploited(prompts=32, group=4, steps=5, rate=0.03)
    lab.check("dno", outcome, method=(method, _by_win_rate), baseline=(method, _by_score), seeds=8, margin=0.1)


def test_policy_gradients_of_win_rates_lead_there_too():
    outcome = _unexploited(prompts=32, group=4, steps=1, rate=0.05)
    self_play, reinforced = methods.spo(reward="win_rate"), methods.policy_gradient(advantage="dr_grpo")
    lab.check(
        "spo-minimax-winner",
        outcome,
        method=(self_play, _by_win_rate),
        baseline=(reinforced, _by_score),
        seeds=8,
        margin=0.1,
    )


def test_mirror_descent_on_labelled_pairs_nears_the_equilibrium():
    """The baseline takes the labels of a reward model."""
    method = methods.inpo(eta=0.6, tau=0.1)
    labels = _labelled(lambda i, j: CYCLE[i, j])
    by_score = _labelled(lambda i, j: jax.nn.sigmoid(SCORES[i] - SCORES[j]))
    outcome = _unexploited(prompts=128, group=2, steps=5, rate=0.03, frozen=("reference",))
    lab.check("inpo", outcome, method=(method, labels), baseline=(method, by_score), seeds=8, margin=0.02)


def _regret(method, key):
    """Mean over 20 rounds of what the best of 30 answers is worth more; the reference prefers bad ones, labels err."""
    value = jnp.linspace(-2, 2, 30)
    labels = _labelled(lambda i, j: jax.nn.sigmoid(2 * (value[i] - value[j])))
    start = -0.75 * value + 0.3 * jax.random.normal(key, value.shape)
    policies = _iterate(method, start, labels, key, iterations=20, prompts=8, group=2, steps=40, rate=0.05)
    return jnp.mean(policies @ value) - value[-1]


def test_answers_that_were_tried_lose_likelihood_so_that_better_ones_are_found_sooner():
    optimistic, plain = (methods.online_dpo(beta=0.1, optimism=alpha) for alpha in (0.1, 0.0))
    lab.check("selm", _regret, method=optimistic, baseline=plain, margin=0.1)


def test_the_last_iterate_of_mirror_descent_towards_the_reference_is_the_equilibrium_where_self_play_cycles():
    """A circle of three answers, and a fourth that loses; the policy begins at a random place."""

    def outcome(tau, key):
        """Minus the exploitability of the last of 500 policies."""
        start = jax.nn.softmax(jax.random.normal(key, (4,)))

        def step(policy, _):
            return advantages.nash_md_step(policy, jnp.ones(4) / 4, wins, eta=1.0, tau=tau)[0], None

        return -advantages.exploitability(jax.lax.scan(step, start, None, length=500)[0], wins)

    wins = jnp.full((4, 4), 0.5).at[:3, :3].set(jnp.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]))
    wins = wins.at[:3, 3].set(1.0).at[3, :3].set(0.0)
    found = lab.check("nash-md", outcome, method=0.1, baseline=0.0, seeds=32, margin=0.2)
    assert found.method.mean() > -0.05


def test_a_student_that_judges_its_answers_beside_a_teachers_gets_closer_than_one_that_copies():
    """Answers are numbers, a teacher's is off by a little, and another number for each of 64 prompts of one kind."""
    right, numbers = 10, jnp.arange(21)

    def outcome(judge, key):
        """Minus the expected distance to the right number: after copying, or after copying and judging."""
        anchors = right + jnp.round(2.0 * jax.random.normal(key, (64,))).astype(jnp.int32)
        anchors = jnp.clip(anchors, 0, 20)
        shown = answers(anchors[:, None, None])

        def logp(logits):
            return jnp.pad(jax.nn.log_softmax(logits)[shown.tokens[:, 1:]], ((0, 0), (1, 0)))

        copied = learned(methods.sft(), logp, jnp.zeros(21), shown, steps=100, learning_rate=0.1)

        def beside_the_anchor(drawn, key):
            return -jnp.abs(drawn - anchors[:, None]) + 0.5 * jax.random.normal(key, drawn.shape)

        def alone(drawn, key):
            return jax.nn.log_softmax(copied)[drawn] + 0.5 * jax.random.normal(key, drawn.shape)

        def judged(score):
            method = methods.online_dpo(beta=1.0, labels="listwise")
            options = {"iterations": 15, "prompts": 64, "group": 8, "steps": 2, "rate": 0.05}
            return _iterate(method, copied, score, key, **options)[-1]

        choices = [lambda: jax.nn.softmax(copied), lambda: judged(beside_the_anchor), lambda: judged(alone)]
        return -jnp.sum(jax.lax.switch(judge, choices) * jnp.abs(numbers - right))

    copies, anchored, own = jnp.int32(0), jnp.int32(1), jnp.int32(2)
    lab.check("pu-rl-distill", outcome, method=anchored, baseline=copies, seeds=16, margin=0.2)
    without_anchor, _ = lab.compare(outcome, own, copies, 16)
    assert without_anchor.effect > 0.5  # the mode of what was copied is right here, and its own likelihood finds it too
