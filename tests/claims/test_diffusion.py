"""Claims about flows: credit of steps, and learning from noised samples."""

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import advantages, diffusion
from tests.claims import flows, lab

LEVEL = 0.7


def _reward(x):
    """Of the right mode."""
    return jax.nn.sigmoid(3.0 * x[..., 0])


def _correlation(a, b):
    """Within groups, the last axis, and their mean."""
    a, b = a - jnp.mean(a, axis=-1, keepdims=True), b - jnp.mean(b, axis=-1, keepdims=True)
    scale = jnp.sqrt(jnp.sum(a**2, axis=-1) * jnp.sum(b**2, axis=-1))
    return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(scale, 1e-9))


def _values(key, latents, firsts, count=64):
    """Mean reward of stochastic completions of latents `[N, G, 1]`, each row at its time `[N]`."""
    noise = jax.random.normal(key, (flows.STEPS, count, *latents.shape[1:]))

    def of_row(x, first):
        return jnp.mean(_reward(flows.completed(jnp.broadcast_to(x, noise.shape[1:]), first, noise, LEVEL)), axis=0)

    return jax.lax.map(lambda both: of_row(*both), (latents, firsts))


def _credit(which, key, group=16):
    """How well a step's advantage tells what the step changed of the reward to be expected of the sampler."""
    of_path, of_value = jax.random.split(key)
    noise = jax.random.normal(of_path, (flows.STEPS + 1, group, 1))

    def step(x, given):
        time, after, noise = given
        mean, std = diffusion.sde_step(x, flows.velocity(x, time), time, after, level=LEVEL)
        return mean + std * noise, mean + std * noise

    _, latents = jax.lax.scan(step, noise[0], (flows.TIMES[:-1], flows.TIMES[1:], noise[1:]))
    path = jnp.concatenate([noise[:1], latents])
    firsts = jnp.arange(flows.STEPS + 1)
    still = jnp.zeros((flows.STEPS, group, 1))
    rewards = jax.vmap(lambda x, first: _reward(flows.completed(x, first, still, 0.0)))(path, firsts).T
    effect = jnp.diff(_values(of_value, path, firsts), axis=0)
    options = jnp.stack(
        [
            jnp.broadcast_to(rewards[:, -1:], (group, flows.STEPS)),
            diffusion.step_gains(rewards),
            diffusion.turning_point_rewards(rewards),
        ]
    )
    chosen = options[jnp.asarray(which, int)]
    compared = jax.vmap(lambda r: advantages.grpo(r[None])[0], in_axes=1)(chosen)
    return _correlation(compared, effect)


def test_gains_of_steps_tell_their_effect_better_than_the_samples_reward():
    lab.check("densegrpo", _credit, method=1.0, baseline=0.0, seeds=16, margin=0.1)


def test_gains_with_turning_points_tell_effects_better_than_the_samples_reward():
    lab.check("tp-grpo", _credit, method=2.0, baseline=0.0, seeds=16, margin=0.1)


def test_a_branch_that_is_completed_without_noise_tells_what_its_step_did():
    """Branches of one step, completed by the deterministic or by the stochastic sampler."""
    branches = 8

    def outcome(level, key):
        of_start, of_branch, of_rest, of_value = jax.random.split(key, 4)
        start = jax.random.normal(of_start, (flows.STEPS, 1))
        firsts = jnp.arange(flows.STEPS)

        def before(x, first):
            mask = (firsts < first)[:, None]

            def step(x, given):
                time, after, on = given
                return jnp.where(on, diffusion.ode_step(x, flows.velocity(x, time), time, after), x), None

            return jax.lax.scan(step, x, (flows.TIMES[:-1], flows.TIMES[1:], mask))[0]

        at = jax.vmap(before)(start, firsts)

        def branch(x, time, after, noise):
            mean, std = diffusion.sde_step(x, flows.velocity(x, time), time, after, level=LEVEL)
            return mean + std * noise

        noise = jax.random.normal(of_branch, (flows.STEPS, branches, 1))
        split = jax.vmap(branch)(at, flows.TIMES[:-1], flows.TIMES[1:], noise)
        rest = jax.random.normal(of_rest, (flows.STEPS, flows.STEPS, branches, 1))
        ends = jax.vmap(flows.completed, in_axes=(0, 0, 0, None))(split, firsts + 1, rest, level)
        return _correlation(advantages.grpo(_reward(ends)), _values(of_value, split, firsts + 1))

    lab.check("tempflow-grpo", outcome, method=0.0, baseline=LEVEL, seeds=16, margin=0.1)


def _trained(loss, params, key, *, steps, learning_rate):
    """Parameters after updates by Adam on `loss(params, number, key)`."""
    optimizer = optax.adam(learning_rate)

    def step(carry, given):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *given), state)
        return (optax.apply_updates(params, updates), state), None

    given = jnp.arange(steps), jax.random.split(key, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), given)[0][0]


def test_bad_samples_teach_a_flow_as_good_ones_do():
    """Without the term of bad samples what is left is a regression on samples weighted by their reward."""

    def outcome(of_bad, key):
        of_start, of_rounds, of_test = jax.random.split(key, 3)

        def round_(old, key):
            of_samples, of_training = jax.random.split(key)
            x0 = flows.samples(old, of_samples, 64)
            r = diffusion.optimality(advantages.grpo(_reward(x0)[None])[0], clip=1.0)

            def loss(params, number, key):
                of_noise, of_time = jax.random.split(key)
                noise, time = jax.random.normal(of_noise, x0.shape), jax.random.uniform(of_time, (64,))
                x_t = diffusion.noised(x0, noise, time)
                given = flows.learned(params, x_t, time[:, None]), flows.learned(old, x_t, time[:, None])
                both = diffusion.nft(*given, x0, x_t, time, r)
                good = diffusion.nft(*given, x0, x_t, time, jnp.ones_like(r))
                return 5.0 * jnp.mean(jnp.where(of_bad > 0, both, r * good))

            return _trained(loss, old, of_training, steps=5, learning_rate=0.005), None

        keys = jax.random.split(of_rounds, 4)
        params, _ = jax.lax.scan(round_, flows.network(of_start), keys)
        return jnp.mean(_reward(flows.samples(params, of_test, 256)))

    lab.check("uniworld-v2", outcome, method=1.0, baseline=0.0, seeds=16)


def _closeness(x):
    return -jnp.square(x[..., 0] - 1.0)


def test_groups_teach_more_than_their_pairs():
    """Samples of the start are all there is; of six of a group the pairs are three."""

    def outcome(of_groups, key):
        of_start, of_data, of_training, of_test = jax.random.split(key, 4)
        start = flows.network(of_start)
        x0 = flows.samples(start, of_data, 16 * 6)
        rewards = _closeness(x0).reshape(16, 6)

        def loss(params, number, key):
            of_noise, of_time = jax.random.split(key)
            noise, time = jax.random.normal(of_noise, x0.shape), jax.random.uniform(of_time, x0.shape)
            x_t = (1 - time) * x0 + time * noise
            error = diffusion.flow_matching(flows.learned(params, x_t, time), x0, noise)
            base = diffusion.flow_matching(flows.learned(start, x_t, time), x0, noise)
            scores = (-6.0 * (error - base)).reshape(16, 6)
            groups = jnp.mean(diffusion.gdro(scores, rewards))
            pairs = jnp.mean(diffusion.gdro(scores.reshape(48, 2), rewards.reshape(48, 2), temperature=0))
            return jnp.where(of_groups > 0, groups, pairs)

        params = _trained(loss, start, of_training, steps=60, learning_rate=0.02)
        return jnp.mean(_closeness(flows.samples(params, of_test, 256)))

    lab.check("gdro", outcome, method=1.0, baseline=0.0, seeds=16, held=False)


def test_a_frozen_teacher_keeps_reward_weighted_rounds_from_collapse():
    """Spread of samples after rounds on the model's own weighted samples."""

    def outcome(of_teacher, key):
        of_start, of_rounds, of_test = jax.random.split(key, 3)

        def round_(teacher, key):
            of_samples, of_training = jax.random.split(key)
            x0 = flows.samples(teacher, of_samples, 64)
            weights = diffusion.reward_weights(_reward(x0))

            def loss(params, number, key):
                of_noise, of_time = jax.random.split(key)
                noise, time = jax.random.normal(of_noise, x0.shape), jax.random.uniform(of_time, x0.shape)
                x_t = (1 - time) * x0 + time * noise
                found, kept = flows.learned(params, x_t, time), flows.learned(teacher, x_t, time)
                fit = jnp.mean(weights * diffusion.flow_matching(found, x0, noise))
                return fit + of_teacher * jnp.mean(jnp.square(found - kept))

            return _trained(loss, teacher, of_training, steps=5, learning_rate=0.02), None

        params, _ = jax.lax.scan(round_, flows.network(of_start), jax.random.split(of_rounds, 12))
        return jnp.std(flows.samples(params, of_test, 256))

    lab.check("flowboost", outcome, method=4.0, baseline=0.0, seeds=8, margin=0.05)


def test_regression_on_reward_differences_finds_the_closed_form():
    """Ten arms; a policy gradient on the reward, with as many samples and steps."""
    beta = 1.0

    def outcome(which, key):
        of_ref, of_reward, of_training = jax.random.split(key, 3)
        ref = jax.nn.log_softmax(jax.random.normal(of_ref, (10,)))
        rewards = jax.random.normal(of_reward, (10,))
        best = jax.nn.log_softmax(ref + rewards / beta)

        def loss(logits, number, key):
            logp = jax.nn.log_softmax(logits)
            arms = jax.random.categorical(key, jax.lax.stop_gradient(logp), shape=(1, 8))
            old = jax.lax.stop_gradient(logp[arms])
            regression = diffusion.prdp(
                logp[arms][..., None], ref[arms][..., None], old[..., None], rewards[arms], beta=beta
            )
            gain = advantages.rloo(rewards[arms])
            return jnp.where(which > 0, jnp.mean(regression), -jnp.mean(gain * logp[arms]))

        logits = _trained(loss, ref, of_training, steps=300, learning_rate=0.03)
        logp = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(best) * (best - logp))

    lab.check("prdp", outcome, method=1.0, baseline=0.0, margin=0.1)


def test_a_learned_direction_keeps_outputs_of_prompts_apart():
    """The text encoder adds the same to all prompts; what is measured is the cosine with the prompt's own embedding,
    plus how far apart the outputs of prompts are."""

    def outcome(corrected, key):
        of_prompts, of_bias, of_noise = jax.random.split(key, 3)
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        meant = unit(jax.random.normal(of_prompts, (12, 8)))
        read = unit(meant + 2.0 * unit(jax.random.normal(of_bias, (8,))))
        start = meant + 0.3 * jax.random.normal(of_noise, meant.shape)

        def of_direction(b, number, key):
            drawn = start + 0.3 * jax.random.normal(key, start.shape)
            return -jnp.mean(diffusion.guided_reward(drawn, read, b))

        b = corrected * _trained(of_direction, jnp.full(8, 1e-3), of_noise, steps=200, learning_rate=0.02)
        generator = lambda x, number, key: -jnp.mean(diffusion.guided_reward(x, read, b))  # noqa: E731
        outputs = unit(_trained(generator, start, of_bias, steps=200, learning_rate=0.02))
        apart = 1.0 - (jnp.sum(outputs @ outputs.T) - 12) / (12 * 11)
        return jnp.mean(jnp.sum(outputs * meant, axis=-1)) + apart

    lab.check("d2-align", outcome, method=1.0, baseline=0.0, margin=0.1)
