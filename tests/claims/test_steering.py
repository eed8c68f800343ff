"""Claims about flows that are steered, or that learn from preferences between their samples."""

import jax
import jax.numpy as jnp
import optax

from jaxrl_post import advantages, diffusion
from tests.claims import flows, lab

LEVEL = 0.7


def _adam(loss, params, key, *, steps, learning_rate):
    """Parameters after updates by Adam on `loss(params, key)`."""
    optimizer = optax.adam(learning_rate)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


def _path(params, key, count, strength=0.0, gradient=jnp.zeros_like):
    """Latents `[S + 1, count, 1]` of the stochastic sampler, with guidance."""
    noise = jax.random.normal(key, (flows.STEPS + 1, count, 1))

    def step(x, given):
        time, after, noise = given
        mean, std = diffusion.sde_step(x, flows.learned(params, x, time), time, after, level=LEVEL)
        x = diffusion.guided_mean(mean, gradient(x), time - after, strength=strength) + std * noise
        return x, x

    _, latents = jax.lax.scan(step, noise[0], (flows.TIMES[:-1], flows.TIMES[1:], noise[1:]))
    return jnp.concatenate([noise[:1], latents])


def _logp(params, path):
    """`[S, count]` of the unguided sampler."""

    def step(x, after, time, next_time):
        mean, std = diffusion.sde_step(x, flows.learned(params, x, time), time, next_time, level=LEVEL)
        return diffusion.gaussian_logp(after, mean, std)

    return jax.vmap(step)(path[:-1], path[1:], flows.TIMES[:-1], flows.TIMES[1:])


def _reward(x):
    """A narrow peak beyond the right mode, that few samples come near."""
    return jnp.exp(-jnp.square((x[..., 0] - 2.5) / 0.5))


def test_guided_rollouts_teach_a_flow_that_samples_without_guidance():
    """The gradient is that of the distance to the peak; what is measured are deterministic samples without it."""

    def outcome(strength, key):
        of_start, of_training, of_test = jax.random.split(key, 3)

        def loss(params, key):
            path = jax.lax.stop_gradient(_path(params, key, 32, strength, lambda x: 2.5 - x))
            gain = advantages.grpo(_reward(path[-1])[None])[0]
            return -jnp.mean(gain * _logp(params, path))

        params = _adam(loss, flows.network(of_start), of_training, steps=30, learning_rate=0.01)
        return jnp.mean(_reward(flows.samples(params, of_test, 256)))

    lab.check("euphonium", outcome, method=0.05, baseline=0.0, seeds=16, held=False)


def _right(x):
    return jax.nn.sigmoid(3.0 * x[..., 0])


def test_preferences_on_every_step_teach_more_than_regression_on_winners():
    """Pairs of fresh trajectories in each of forty updates."""

    def outcome(which, key):
        of_start, of_training, of_test = jax.random.split(key, 3)
        start = flows.network(of_start)

        def loss(params, key):
            of_path, of_noise, of_time = jax.random.split(key, 3)
            path = jax.lax.stop_gradient(_path(params, of_path, 64))
            rewards = _right(path[-1]).reshape(32, 2)
            h = jnp.sign(rewards - rewards[:, ::-1])
            pairs = lambda logp: jnp.moveaxis(logp.reshape(-1, 32, 2), 0, 2)  # noqa: E731
            preference = jnp.mean(diffusion.d3po(pairs(_logp(params, path)), pairs(_logp(start, path)), h, clip=0.9))
            noise, time = jax.random.normal(of_noise, path[-1].shape), jax.random.uniform(of_time, path[-1].shape)
            x_t = (1 - time) * path[-1] + time * noise
            fit = diffusion.flow_matching(flows.learned(params, x_t, time), path[-1], noise)
            return jnp.where(which > 0, preference, jnp.mean(fit * (h.reshape(-1) > 0)))

        params = _adam(loss, start, of_training, steps=40, learning_rate=0.01)
        return jnp.mean(_right(flows.samples(params, of_test, 256)))

    lab.check("d3po", outcome, method=1.0, baseline=0.0, seeds=16)


def test_a_sample_of_an_old_checkpoint_is_not_always_a_loser():
    """Winners are from the right mode only; rounds of ten updates, each against one of the checkpoints so far."""

    def outcome(flips, key):
        of_start, of_rounds, of_test = jax.random.split(key, 3)
        start, rounds = flows.network(of_start), 6
        pool = jax.tree.map(lambda x: jnp.broadcast_to(x, (rounds, *x.shape)), start)

        def round_(carry, given):
            (params, pool), (number, key) = carry, given
            of_choice, of_samples, of_winners, of_training = jax.random.split(key, 4)
            drawn = jax.random.randint(of_choice, (), 0, number + 1)
            ref = jax.tree.map(lambda x: x[jnp.where(flips > 0, drawn, number)], pool)
            sampled = flows.samples(ref, of_samples, 64)
            winners = flows.MODES[1] + flows.WIDTH * jax.random.normal(of_winners, (64, 1))

            def loss(params, key):
                of_noise, of_time = jax.random.split(key)
                noise, time = jax.random.normal(of_noise, (64, 1)), jax.random.uniform(of_time, (64, 1))

                def error(params, x0):
                    x_t = (1 - time) * x0 + time * noise
                    return diffusion.flow_matching(flows.learned(params, x_t, time), x0, noise)

                errors = error(params, winners), error(ref, winners), error(params, sampled), error(ref, sampled)
                always = -jax.nn.log_sigmoid(-10.0 * (errors[0] - errors[1] - errors[2] + errors[3]))
                return jnp.mean(jnp.where(flips > 0, diffusion.seppo(*errors, beta=10.0), always))

            params = _adam(loss, params, of_training, steps=10, learning_rate=0.01)
            pool = jax.tree.map(lambda p, x: p.at[jnp.minimum(number + 1, rounds - 1)].set(x), pool, params)
            return (params, pool), None

        given = jnp.arange(rounds), jax.random.split(of_rounds, rounds)
        (params, _), _ = jax.lax.scan(round_, (start, pool), given)
        found = flows.samples(params, of_test, 256)[:, 0]
        return jnp.mean(jnp.abs(found - flows.MODES[1]) < 2 * flows.WIDTH)

    lab.check("seppo", outcome, method=1.0, baseline=0.0, seeds=16, held=False)


def test_edits_reach_what_no_action_of_the_data_is():
    """The best action is 0.1 beyond the right of two modes of a flow's actions; the best of eight, edited or not."""

    def outcome(scale, key):
        of_actions, of_training, of_test, of_noise = jax.random.split(key, 4)

        def actions(key):
            of_mode, of_place = jax.random.split(key)
            mode = jnp.where(jax.random.bernoulli(of_mode, 0.5, (64, 8, 1)), 0.5, -0.5)
            return mode + 0.02 * jax.random.normal(of_place, (64, 8, 1))

        value = lambda a: -jnp.square(a[..., 0] - 0.6)  # noqa: E731
        replay = actions(of_actions)

        def edits(params, a, key):
            return params[0] * a + params[1] + 0.1 * jax.random.normal(key, a.shape)

        def loss(params, key):
            return -jnp.mean(value(diffusion.edited(replay, edits(params, replay, key), scale=scale)))

        params = _adam(loss, jnp.zeros(2), of_training, steps=100, learning_rate=0.1)
        base = actions(of_test)
        both = jnp.concatenate([base, diffusion.edited(base, edits(params, base, of_noise), scale=scale)], axis=1)
        return jnp.mean(diffusion.best_candidate(both, value(both))[1])

    lab.check("expo-expressive", outcome, method=0.2, baseline=0.0, seeds=16)
