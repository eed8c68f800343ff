"""Claims about learning from a teacher's log-probs."""

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import losses, methods
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


def test_a_teacher_whose_largest_answers_were_kept_teaches_more_than_labels():
    """Five classes of points that overlap; of each augmented point the two largest probabilities are kept, once."""
    number, copies, width = 40, 20, 0.5

    def data(key, centres, count):
        label_key, noise_key = jax.random.split(key)
        label = jax.random.randint(label_key, (count,), 0, 5)
        return centres[label] + jax.random.normal(noise_key, (count, 2)), label

    def outcome(kept, key):
        """Accuracy on other points of a student that has learned with one loss or the other."""
        keys = jax.random.split(key, 5)
        centres = 1.5 * jax.random.normal(keys[0], (5, 2))
        points, label = data(keys[1], centres, number)
        # The teacher is the posterior; it is asked here, before the student learns, and not again.
        replayed = points[:, None] + width * jax.random.normal(keys[2], (number, copies, 2))
        posterior = jax.nn.softmax(-0.5 * jnp.sum((replayed[:, :, None] - centres) ** 2, axis=-1))
        values, ids = losses.sparsify(posterior, 2)
        start = {
            "in": jax.random.normal(keys[3], (2, 32)),
            "bias": jnp.zeros(32),
            "out": 0.1 * jax.random.normal(keys[4], (32, 5)),
        }

        def logits(params, x):
            return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]

        def loss(params, step):
            copy = step % copies
            found = logits(params, replayed[:, copy])
            from_teacher = losses.sparse_kl(found, values[:, copy], ids[:, copy])
            from_labels = optax.softmax_cross_entropy_with_integer_labels(found, label)
            return jnp.mean(jnp.where(kept, from_teacher, from_labels))

        optimizer = optax.adam(0.03)

        def update(carry, step):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, step), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(update, (start, optimizer.init(start)), jnp.arange(400))
        others, truth = data(jax.random.fold_in(key, 1), centres, 2000)
        return jnp.mean(jnp.argmax(logits(params, others), axis=1) == truth)

    lab.check("dataset-reinforcement", outcome, method=1.0, baseline=0.0, seeds=16, margin=0.01)
