"""Claims about which prompts, how many answers to each, and which of them to learn from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import advantages, curation, methods
from jaxrl_post.methods import Credit
from tests.claims import lab


def _chosen(rollouts):
    return rollouts.tokens[:, 1].reshape(rollouts.reward.shape)


def test_the_best_and_the_worst_teach_more_than_all_where_a_reward_model_errs_in_between():
    """Five arms, of which the best and the worst have the right reward; those in between are taken for each other."""
    worth, scored = jnp.array([0.0, 1.0, 2.0, 3.0, 4.0]), jnp.array([0.0, 3.0, 2.0, 1.0, 4.0])

    def judge(rollouts, key):
        arm = _chosen(rollouts)
        return rollouts.replace(reward=scored[arm] + 0.3 * jax.random.normal(key, arm.shape))

    task = lab.Task(4, 5, 1, judge)

    def outcome(method, key):
        """True worth."""
        critic = {"logits": task.params(), "value": jnp.zeros(task.params().shape[:2])}
        trained = lab.train(
            task, method, key, steps=20, group_size=8, optimizer=optax.adam(0.05), roles=lambda _: {"critic": critic}
        )
        return jnp.mean(lab.probabilities(trained.params, 1) @ worth)

    lab.check("pf-ppo", outcome, method=methods.pf_ppo(), baseline=methods.ppo())


def _first(count):
    """GRPO without deviation on the first answers of each group alone."""

    def credit(s):
        kept = s.valid & (jnp.arange(s.reward.shape[1]) < count)
        return Credit(advantages.dr_grpo(s.reward, kept), keep=kept.astype(s.reward.dtype))

    return methods.policy_gradient(advantage=credit)


def test_a_pool_cut_in_halves_teaches_more_than_as_many_answers_as_they_come():
    """Prompts that are solved with 2 to 60%; 4 of 16 answers are learned from, or the first 4."""
    prompts = 16
    rate = np.geomspace(0.02, 0.6, prompts)
    task = lab.Task(prompts, 2, 1, lab.by_sequence([0.0, 1.0]), initial=np.log(np.stack([1 - rate, rate], 1))[:, None])

    def outcome(method, key):
        """Mean success."""
        trained = lab.train(task, method, key, steps=40, group_size=16, optimizer=4.0)
        return jnp.mean(lab.probabilities(trained.params, 1)[:, 1])

    lab.check("reinforce-ada", outcome, method=methods.reinforce_ada(keep=4), baseline=_first(4), margin=0.03)


def test_answers_that_are_right_for_the_wrong_reasons_are_dropped():
    """Arms: sound and right, flawed and sometimes right, sound and wrong, flawed with a filler that the judge likes."""
    flawed, filler = jnp.array([0, 1, 0, 1]), jnp.array([0, 0, 0, 1])
    chance = jnp.array([0.8, 0.7, 0.0, 0.7])

    def judge(rollouts, key):
        arm = _chosen(rollouts)
        of_outcome, of_judge = jax.random.split(key)
        right = jax.random.bernoulli(of_outcome, chance[arm]).astype(jnp.float32)
        sound = 1.0 - flawed[arm]
        said = jnp.where(jax.random.bernoulli(of_judge, 0.1, arm.shape), 1 - sound, sound)
        return rollouts.replace(reward=right, rewards={"judge": jnp.minimum(0.7 * said + 0.3 * filler[arm], 1.0)})

    # Two tokens, of which the first says what becomes of the answer: one of a single step goes first.
    task = lab.Task(4, 4, 2, judge, initial=jnp.array([0.0, 1.0, 0.0, 0.0]))

    def outcome(method, key):
        """Share of sound answers."""
        trained = lab.train(task, method, key, steps=150, group_size=8, optimizer=optax.adam(0.05))
        return jnp.mean(jnp.sum(lab.probabilities(trained.params, 2).reshape(4, 4, 4)[:, 0], axis=1))

    method = methods.prof(process="judge", keep=4, steps={"name": "length", "num_steps": 2})
    lab.check("prof", outcome, method=method, baseline=methods.policy_gradient(), margin=0.1)


def test_short_right_answers_are_preferred_down_to_a_length():
    """The first token is the length, which does not change whether the answer is right."""
    lengths = jnp.arange(1, 6)

    def judge(rollouts, key):
        length = lengths[_chosen(rollouts)]
        mask = rollouts.mask * (jnp.arange(rollouts.mask.shape[1]) <= length.reshape(-1, 1))
        won = jax.random.bernoulli(key, 0.7, length.shape).astype(jnp.float32)
        return rollouts.replace(mask=mask, length=length + 1, reward=won)

    task = lab.Task(1, 5, 5, judge, initial=jnp.array([-1.0, -1.0, 0.0, 0.5, 1.0]))

    def outcome(method, key):
        """Probability of the shortest length that earns a bonus, 3."""
        trained = lab.train(task, method, key, steps=200, group_size=16, optimizer=optax.adam(0.02))
        return jax.nn.softmax(trained.params[0, 0])[2]

    method = methods.observe_r1(min_length=2, bonus=0.2)
    lab.check("observe-r1", outcome, method=method, baseline=methods.grpo(beta=0.0))


PROMPTS, EACH = 64, 8


def _spread(key):
    """Logits of success of prompts, most of which are nearly always or nearly never solved."""
    return jax.scipy.special.logit(jnp.clip(jax.random.beta(key, 0.3, 0.3, (PROMPTS,)), 0.005, 0.995))


def _update(logit, counts, key, rate):
    """One step of GRPO on each prompt's own logit, with so many answers to each."""
    p = jax.nn.sigmoid(logit)
    right = jax.random.binomial(key, counts.astype(jnp.float32), p)
    share = right / jnp.maximum(counts, 1)
    # The mean over answers of their advantage times the gradient of their log-prob, (r - p).
    return logit + rate * jnp.sqrt(share * (1 - share)), share


def test_answers_are_spent_where_they_differ():
    def outcome(adaptive, key):
        """Share of the answers that stand in groups of both outcomes; rates are known from eight earlier answers."""
        of_prompts, of_first, of_answers = jax.random.split(key, 3)
        p = jax.nn.sigmoid(_spread(of_prompts))
        seen = jax.random.binomial(of_first, jnp.full(PROMPTS, float(EACH)), p) / EACH
        counts = jnp.where(adaptive > 0, curation.knapsack(seen, PROMPTS * EACH, high=64), EACH)
        right = jax.random.binomial(of_answers, counts.astype(jnp.float32), p)
        return jnp.sum(counts * ((right > 0) & (right < counts))) / jnp.sum(counts)

    lab.check("knapsack-rl", outcome, method=1.0, baseline=0.0, margin=0.1)


def test_more_answers_find_the_hard_prompts_right_ones_where_as_many_spread_evenly_do_not():
    def outcome(adaptive, key):
        """Share of prompts below one in ten of which some answer is right."""
        of_prompts, of_first, of_more = jax.random.split(key, 3)
        p = jax.nn.sigmoid(_spread(of_prompts))
        first = jax.random.binomial(of_first, jnp.full(PROMPTS, float(EACH)), p)
        extra = curation.extra_rollouts(first / EACH, EACH, max_count=64, schedule="hard")
        even = jnp.full(PROMPTS, jnp.sum(extra) / PROMPTS)
        more = jax.random.binomial(of_more, jnp.floor(jnp.where(adaptive > 0, extra, even)), p)
        hard = (p < 0.1).astype(jnp.float32)
        return jnp.sum(hard * (first + more > 0)) / jnp.maximum(jnp.sum(hard), 1)

    lab.check("dars", outcome, method=1.0, baseline=0.0, margin=0.02)


def test_prompts_that_differ_are_sampled_more_and_none_is_forgotten():
    def outcome(share, key):
        """Gain of mean success by training on an eighth of the prompts a step."""
        of_prompts, of_first, key = jax.random.split(key, 3)
        start = _spread(of_prompts)
        _, seen = _update(start, jnp.full(PROMPTS, EACH), of_first, 0.0)

        def step(carry, given):
            logit, seen = carry
            number, key = given
            of_choice, of_answers = jax.random.split(key)
            turn = (number * 8 + jnp.arange(8)) % PROMPTS
            drawn = curation.promoted_prompts(of_choice, curation.variance_promotion(seen), turn, share=0.5)
            chosen = jnp.zeros(PROMPTS, bool).at[jnp.where(share > 0, drawn, turn)].set(True)
            after, found = _update(logit, jnp.full(PROMPTS, EACH), of_answers, 0.5)
            return (jnp.where(chosen, after, logit), jnp.where(chosen, found, seen)), None

        (logit, _), _ = jax.lax.scan(step, (start, seen), (jnp.arange(80), jax.random.split(key, 80)))
        return jnp.mean(jax.nn.sigmoid(logit)) - jnp.mean(jax.nn.sigmoid(start))

    lab.check("variance-aware-sampling", outcome, method=1.0, baseline=0.0)
