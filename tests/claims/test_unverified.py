"""Claims about rewards of reasoning that need no verifier, and about judges of steps that must not be farmed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import methods
from jaxrl_post.types import FINISH_LENGTH, TokenStats
from tests.claims import lab


def test_the_log_prob_of_a_long_answer_teaches_where_its_probability_vanishes():
    """Ten reasonings; after each the 60 tokens of the answer have one probability, at best 0.5."""
    each = jnp.linspace(0.05, 0.5, 10)
    tokens = 60

    def judge(rollouts, key):
        del key
        answer = jnp.zeros((rollouts.num_prompts, tokens), jnp.int32)
        return rollouts.replace(extras={"answer_tokens": answer}, finish=jnp.full_like(rollouts.finish, FINISH_LENGTH))

    def score(params, rollouts, fields, key):
        if rollouts.tokens.shape[1] == 2:
            return lab.score(params, rollouts, fields, key)
        return TokenStats(logp=rollouts.mask * jnp.log(each)[rollouts.tokens[:, 1]][:, None])

    task = lab.Task(1, 10, 1, judge)

    def outcome(method, key):
        """Mean log-prob of the answer's tokens."""
        trained = lab.train(task, method, key, steps=40, group_size=8, optimizer=optax.adam(0.1), score=score)
        return lab.probabilities(trained.params, 1)[0] @ jnp.log(each)

    log_prob, prob = (methods.likelihood_reward(form=form) for form in ("log_prob", "prob"))
    lab.check("logprob-reward", outcome, method=log_prob, baseline=prob, margin=0.3)


def test_clipped_differences_do_not_pay_for_filler():
    """Token 0 answers, 1 is a good step, 2 is filler, which the judge likes and which costs a fifth of the chance."""
    length = 5
    digits = np.arange(3**length)[:, None] // 3 ** np.arange(length - 1, -1, -1) % 3
    before = np.cumprod(np.pad(digits != 0, ((0, 0), (1, 0)), constant_values=1)[:, :-1], axis=1)
    good, filler = (np.sum((digits == kind) * before, axis=1) for kind in (1, 2))
    answered = np.any(digits == 0, axis=1)
    chance = np.where(answered, 0.9 * (good >= 1) * 0.8**filler, 0.0)

    def judge(rollouts, key):
        chosen = rollouts.tokens[:, 1:]
        before = jnp.cumprod(jnp.pad(chosen != 0, ((0, 0), (1, 0)), constant_values=1)[:, :-1], axis=1)
        mask = rollouts.mask.at[:, 1:].multiply(before)
        index = lab.sequence_index(rollouts, 3)
        solved = jax.random.bernoulli(key, jnp.asarray(chance)[index]).astype(jnp.float32)
        score = jnp.pad(jnp.array([1.0, 0.95, 0.9])[chosen], ((0, 0), (1, 0)))
        step = jnp.where(mask > 0, jnp.cumsum(mask, axis=1).astype(jnp.int32) - 1, -1)
        return rollouts.replace(mask=mask, step=step, reward=solved, rewards={"judge": score})

    task = lab.Task(1, 3, length, judge)

    def outcome(method, key):
        """Chance of success."""
        critic = {"logits": task.params(), "value": jnp.zeros(task.params().shape[:2])}
        trained = lab.train(
            task, method, key, steps=80, group_size=16, optimizer=optax.adam(0.05), roles=lambda _: {"critic": critic}
        )
        return lab.probabilities(trained.params, length)[0] @ jnp.asarray(chance, jnp.float32)

    both = methods.pr_clip_delta(process="judge", threshold=0.95, alpha=0.5, max_steps=length)
    raw = methods.pr_clip_delta(process="judge", threshold=None, delta=False, alpha=0.5, max_steps=length)
    lab.check("pr-clip-delta", outcome, method=both, baseline=raw, seeds=16, margin=0.05)
