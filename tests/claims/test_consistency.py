"""Claims of methods on sequence log-probs: squared consistency with the reward, and pairs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post import methods
from tests.claims import lab

REWARDS = np.array([2.0, 0.5, 0.0])
REFERENCE = np.log([0.1, 0.3, 0.6])


def _uniform(params, key):
    """A sampler that has nothing to do with the policy."""
    del key
    return jnp.zeros_like(params)


def _distance(params, target, length=1):
    """Nats: mean over prompts of KL(target || policy), exactly."""
    p = lab.probabilities(params, length)
    return jnp.mean(jnp.sum(target * (jnp.log(target) - jnp.log(p)), axis=-1))


def test_copg_reaches_the_regularised_optimum_from_off_policy_data_where_policy_gradients_do_not():
    beta = 0.5
    best = jax.nn.softmax(jnp.asarray(REFERENCE + REWARDS / beta))[None]
    task = lab.Task(1, 3, 1, lab.by_sequence(REWARDS), initial=REFERENCE)

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=300, group_size=4, optimizer=0.2, sampler=_uniform)
        return -_distance(trained.params, best)

    baseline = methods.reinforce(baseline="leave_one_out", beta=beta)
    found = lab.check("copg", outcome, method=methods.copg(beta=beta), baseline=baseline)
    assert found.method.min() > -1e-4


def test_gvpo_reaches_the_regularised_optimum_whoever_sampled_where_grpo_does_not():
    beta = 0.5
    best = jax.nn.softmax(jnp.asarray(REFERENCE + REWARDS / beta))[None]
    task = lab.Task(1, 3, 1, lab.by_sequence(REWARDS), initial=REFERENCE)

    def outcome(method, key):
        # One step: the policy of its start is the one that the KL constraint refers to.
        trained = lab.train(task, method, key, steps=1, group_size=64, epochs=300, optimizer=1.0, sampler=_uniform)
        return -_distance(trained.params, best)

    # Without its clip, which would stop it on the way.
    options = {"clip_low": 1.0, "clip_high": 100.0, "old_logp": "recompute", "kl_estimator": "k2"}
    baseline = methods.grpo(normalize_std=False, beta=beta, **options)
    lab.check("gvpo", outcome, method=methods.gvpo(beta=beta, old_logp="recompute"), baseline=baseline)


def test_kimis_quadratic_term_keeps_reused_batches_from_running_away():
    rewards = np.linspace(0, 1, 10)
    task = lab.Task(1, 10, 1, lab.by_sequence(rewards, noise=0.5))

    def outcome(method, key):
        trained = lab.train(task, method, key, steps=160, group_size=8, optimizer=4.0, reuse=8)
        return jnp.sum(lab.probabilities(trained.params, 1)[0] * rewards)

    baseline = methods.reinforce(baseline="leave_one_out")
    lab.check("kimi-k1.5", outcome, method=methods.kimi(tau=0.5), baseline=baseline)


def test_a2po_gets_further_than_grpo_from_as_many_answers_as_it_needs_one_to_a_prompt():
    rng = np.random.default_rng(0)
    rewards, beta = rng.random((8, 16)), 0.2
    value = beta * np.log(np.mean(np.exp(rewards / beta), axis=1))
    task = lab.Task(8, 16, 1, lab.by_sequence(rewards))

    def prepare(rollouts, key):
        del key
        return rollouts.replace(extras={"optimal_value": jnp.asarray(value, jnp.float32)})

    def outcome(spec, key):
        method, group_size = spec
        trained = lab.train(
            task, method, key, steps=512 // group_size, group_size=group_size, optimizer=16.0, prepare=prepare
        )
        p = lab.probabilities(trained.params, 1)
        return jnp.mean(jnp.sum(p * (rewards - beta * jnp.log(16 * p)), axis=1))

    baseline = methods.grpo(normalize_std=False, beta=beta, kl_estimator="k2")
    lab.check(
        "a2po", outcome, method=(methods.a2po(beta=beta, value_beta=beta, values="given"), 1), baseline=(baseline, 4)
    )


def test_flowrl_keeps_every_right_answer_where_grpo_settles_on_some():
    right = np.isin(np.arange(16), [1, 6, 12])
    task = lab.Task(4, 4, 2, lab.by_sequence(right.astype(float)))

    def outcome(method, key):
        def roles(params):
            return {"critic": {"logits": params, "value": jnp.zeros(params.shape[:2])}}

        trained = lab.train(task, method, key, steps=100, group_size=8, optimizer=2.0, roles=roles)
        p = lab.probabilities(trained.params, 2)
        return jnp.mean(jnp.min(p[:, right], axis=1))

    lab.check("flowrl", outcome, method=methods.flowrl(beta=2.0), baseline=methods.grpo(beta=0.0))


def test_p3o_is_not_moved_by_what_a_prompt_adds_to_its_rewards_as_ppo_is():
    rewards, offset = np.linspace(0, 1, 5), 10.0 * np.arange(-4, 4)[:, None]

    def reached(method, key, offset_scale):
        task = lab.Task(8, 5, 1, lab.by_sequence(rewards + offset_scale * offset))

        def roles(params):
            return {"critic": {"logits": params, "value": jnp.zeros(params.shape[:2])}}

        trained = lab.train(task, method, key, steps=60, group_size=4, optimizer=2.0, epochs=2, roles=roles)
        return jnp.mean(lab.probabilities(trained.params, 1) @ rewards)

    def outcome(method, key):
        without, shifted = jax.vmap(lambda scale: reached(method, key, scale))(jnp.array([0.0, 1.0]))
        return shifted - without

    lab.check("p3o", outcome, method=methods.p3o(), baseline=methods.ppo(lam=1.0, whiten=False, value_clip=None))
