"""Claims about reward models: how they are trained, and what becomes of a policy that is trained on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_post import losses, masked, methods, rewards
from tests.claims import lab


def fit(loss, params, *, steps, learning_rate):
    """Parameters after some steps of Adam."""
    optimizer = optax.adam(learning_rate)

    def step(carry, number):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, number), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]


def test_ties_among_what_passed_take_the_shortcut_out_of_a_reward_model():
    # A shortcut that a tenth of what passed has, and nothing that failed. A policy can have three times as much of it,
    # without the quality.
    arms = jnp.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])

    def reward_model(tie_weight, key):
        keys = jax.random.split(key, 3)
        passed = jax.random.bernoulli(keys[0], 0.5, (40,))
        quality = passed + 0.5 * jax.random.normal(keys[1], (40,))
        shortcut = passed & jax.random.bernoulli(keys[2], 0.1, (40,))
        features = jnp.stack([quality, shortcut.astype(jnp.float32)], axis=1)
        label, pairs = losses.pass_pairs(passed)
        weight = pairs * jnp.where(label == 0.5, tie_weight, 1.0)

        def loss(w, _):
            r = features @ w
            return masked.mean(losses.bradley_terry(*jnp.broadcast_arrays(r[:, None], r[None, :]), label), weight)

        w = fit(loss, jnp.zeros(2), steps=150, learning_rate=0.1)
        scores = features @ w
        accuracy = masked.mean(scores[:, None] > scores[None, :], pairs & (label == 1))
        return w, accuracy, masked.std(scores, passed) / masked.std(scores, jnp.ones(40))

    def quality_after_training(tie_weight, key):
        w, *_ = reward_model(tie_weight, key)
        task = lab.Task(1, 4, 1, lab.by_sequence(arms @ w))
        trained = lab.train(task, methods.grpo(beta=0.0), key, steps=40, group_size=8, optimizer=optax.adam(0.05))
        return lab.probabilities(trained.params, 1)[0] @ arms[:, 0]

    lab.check("solireward", quality_after_training, method=1.0, baseline=0.0, seeds=16, margin=0.1)

    of_seeds = jax.jit(jax.vmap(reward_model, (None, 0)))
    keys = jax.random.split(jax.random.key(0), 16)
    (_, accuracy, spread), (_, plain_accuracy, plain_spread) = (of_seeds(weight, keys) for weight in (1.0, 0.0))
    assert np.mean(accuracy - plain_accuracy) > -0.02
    assert np.mean(spread) < 0.97 * np.mean(plain_spread)


def test_win_probabilities_against_an_anchor_make_progress_on_every_prompt():
    # Scores of answers to a prompt are known up to a constant of the prompt, which Bradley-Terry never sees; and
    # prompts differ in how much their answers do. The judge of pairs likes the first place.
    prompts, arms, bias = 8, 6, 1.0
    scale = jnp.exp(jnp.linspace(-1.0, 1.0, prompts))[:, None]

    def worst_progress(anchored, key):
        of_scores, of_prompts, of_training = jax.random.split(key, 3)
        scores = scale * jax.random.normal(of_scores, (prompts, arms))
        pointwise = scores + 3 * jax.random.normal(of_prompts, (prompts, 1))
        lead = scores - jnp.median(scores, axis=1, keepdims=True)
        shown = (jnp.stack([x + bias, jnp.zeros_like(x)], axis=-1) for x in (lead, -lead))
        table = jnp.where(anchored > 0, rewards.symmetric_win_probability(*shown), pointwise)
        task, method = lab.Task(prompts, arms, 1, lab.by_sequence(table)), methods.reinforce_plus_plus(beta=0.0)
        trained = lab.train(task, method, of_training, steps=60, group_size=4, optimizer=8.0)
        reached = jnp.sum(lab.probabilities(trained.params, 1) * scores, axis=1)
        start = jnp.mean(scores, axis=1)
        return jnp.min((reached - start) / (jnp.max(scores, axis=1) - start))

    lab.check("pairwise-rl", worst_progress, method=1.0, baseline=0.0, seeds=16, margin=0.2)
