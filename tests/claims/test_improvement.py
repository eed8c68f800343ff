"""Claims of PIPO, which judges an update by what came of it, and of an averaged reference."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import methods, training
from tests.claims import lab


def test_pipo_gets_further_than_grpo_with_the_same_samples_under_noisy_rewards():
    rewards = np.linspace(0, 1, 8)
    task = lab.Task(4, 8, 1, lab.by_sequence(rewards, noise=1.0))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=150, group_size=4, optimizer=0.3)
        return jnp.mean(lab.probabilities(trained.params, 1) @ rewards)

    # Its gain is that of further updates on the same samples: it does not outdo GRPO at the step size that suits GRPO
    # best.
    lab.check("pipo", outcome, method=methods.pipo(beta=0.0), baseline=methods.grpo(beta=0.0))


def test_salsas_average_of_two_supervised_models_is_the_better_reference():
    prompts, vocab, length, demonstrations = 4, 4, 2, 6
    sequences = vocab**length

    def supervised(shown):
        """Logits of the model that fits demonstrations `[P, N]`, smoothed by half a count."""
        counts = jnp.sum(jax.nn.one_hot(shown, sequences), axis=1) + 0.5
        table = counts.reshape(prompts, vocab, vocab)
        return jnp.log(jnp.concatenate([jnp.sum(table, axis=2)[:, None], table], axis=1))

    def outcome(weights, key):
        right_key, shown_key = jax.random.split(key)
        right = jax.nn.one_hot(jax.random.randint(right_key, (prompts,), 0, sequences), sequences)
        noisy = 0.5 * right + 0.5 / sequences
        shown = jax.random.categorical(shown_key, jnp.log(noisy), shape=(2, demonstrations, prompts)).swapaxes(1, 2)
        one, two = supervised(shown[0]), supervised(shown[1])

        def roles(policy):
            critic = {"logits": jnp.zeros_like(policy), "value": jnp.zeros(policy.shape[:2])}
            return {"reference": training.soup([one, two], weights), "critic": critic}

        task = lab.Task(prompts, vocab, length, lab.by_sequence(right), initial=one)
        method = methods.ppo(beta=0.3, lam=1.0, whiten=False, value_clip=None)
        trained = lab.train(task, method, key, steps=60, group_size=8, optimizer=0.5, roles=roles)
        return jnp.mean(jnp.sum(lab.probabilities(trained.params, length) * right, axis=1))

    lab.check("salsa", outcome, method=[0.5, 0.5], baseline=[1.0, 0.0])
