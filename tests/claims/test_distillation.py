"""Claims about learning from a teacher's log-probs."""

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import methods
from tests.claims import lab


def test_a_student_that_extrapolates_earns_more_than_one_that_becomes_its_teacher():
    """The teacher is the base after some training: its optimum for a reward under a strong KL."""

    def outcome(method, key):
        """Expected reward less that of the teacher."""
        first, second, run = jax.random.split(key, 3)
        reward, base = jax.random.normal(first, (2, 6)), 0.5 * jax.random.normal(second, (2, 1, 6))
        teacher = base + reward[:, None]
        task = lab.Task(2, 6, 1, lab.by_sequence(jnp.zeros((2, 6))), base)
        trained = lab.train(
            task,
            method,
            run,
            steps=150,
            group_size=16,
            optimizer=optax.adam(0.05),
            roles=lambda start: {"teacher": teacher, "reference": start},
        )
        earned = lambda params: jnp.mean(jnp.sum(lab.probabilities(params, 1) * reward, axis=1))  # noqa: E731
        return earned(trained.params) - earned(teacher)

    further = methods.opd(extrapolation=1.5)
    found = lab.check("g-opd", outcome, method=further, baseline=methods.opd(), margin=0.05)
    assert abs(found.baseline.mean()) < 0.02


def _with_a_teacher(steps: int):
    """One right sequence of 1024 for each of two prompts, which the teacher gives about one time in ten."""
    prompts, vocab, length = 2, 4, 5
    right = jnp.array([107, 801])

    def outcome(method, key):
        reward = jnp.zeros((prompts, vocab**length)).at[jnp.arange(prompts), right].set(1.0)
        task = lab.Task(prompts, vocab, length, lab.by_sequence(reward))
        digits = (right[:, None] // vocab ** jnp.arange(length - 1, -1, -1)) % vocab
        level = jnp.concatenate([jnp.full(vocab**i, i) for i in range(length)])
        teacher = 1.6 * jax.nn.one_hot(digits[:, level], vocab)
        trained = lab.train(
            task,
            method,
            key,
            steps=steps,
            group_size=8,
            optimizer=optax.adam(0.1),
            roles=lambda _: {"teacher": teacher},
        )
        return jnp.mean(jnp.sum(lab.probabilities(trained.params, length) * reward, axis=1))

    return outcome


def test_a_teacher_on_the_students_own_samples_helps_where_reward_alone_is_never_seen():
    outcome = _with_a_teacher(80)
    grpo = methods.grpo(beta=0.0, aggregation="token_mean")
    annealed = methods.kdrl(teacher_weight=0.5, final_weight=0.02, anneal_steps=60)
    found = lab.check("kdrl", outcome, method=annealed, baseline=grpo, seeds=16, margin=0.3)
    pure, _ = lab.compare(outcome, methods.opd(), grpo, seeds=16)
    assert (found.method - pure.method).mean() > 0.3  # which stays at the teacher's own success
