import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, masked
from jaxrl_post.losses import consistency
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)
consistency = all_compiled(consistency)

ONES = np.ones((5, 4))

# Each loss as a function of logp, other log-probs, rewards [P, G] and valid.
LOSSES = {
    "copg": functools.partial(consistency.copg, beta=0.3),
    "copg leave_one_out": functools.partial(consistency.copg, beta=0.3, form="leave_one_out"),
    "gvpo": functools.partial(consistency.gvpo, beta=0.3),
    "opmd": functools.partial(consistency.opmd, tau=0.2),
    "opmd log_mean_exp": functools.partial(consistency.opmd, tau=0.2, baseline="log_mean_exp"),
    "a2po": lambda logp, other, rewards, valid=None: consistency.a2po(
        logp, other, rewards, consistency.optimal_value(rewards, valid, beta=0.5), valid, beta=0.1
    ),
    "flowrl": lambda logp, other, rewards, valid=None: consistency.flowrl(
        logp, other, masked.as_float(other) - 0.1, rewards, jnp.full((5, 4), 3), jnp.full(5, 0.3), valid
    ),
}
GRADIENTS = {
    name: jax.jit(jax.value_and_grad(lambda logp, *rest, f=f: jnp.sum(f(logp, *rest)), has_aux=False))
    for name, f in LOSSES.items()
}
PER_PROMPT = {"copg", "copg leave_one_out", "gvpo"}


def _random(seed=0):
    rng = np.random.default_rng(seed)
    logp = -rng.random((5, 4)) * 5
    other = logp + rng.normal(size=(5, 4)) * 0.5
    rewards = rng.normal(size=(5, 4))
    rewards[4] = 0.7
    valid = rng.random((5, 4)) < 0.7
    valid[0], valid[1], valid[2] = True, [False, True, False, False], False  # full, single, empty
    valid[4] = [True, True, False, False]
    return logp, other, rewards, valid


def _loop(name, logp, other, rewards, valid):
    """Each loss in float64, one pair or one answer after the other."""
    result = np.zeros(5) if name in PER_PROMPT else np.zeros((5, 4))
    for p in range(5):
        rows = np.flatnonzero(valid[p])
        n = len(rows)
        d, r = (logp - other)[p], rewards[p]
        if name.startswith("copg") and n > 1:
            squares = [(r[i] - r[j] - 0.3 * (d[i] - d[j])) ** 2 for i in rows for j in rows if i < j]
            result[p] = np.mean(squares) / 0.6 if name == "copg" else np.sum(squares) / (n - 1)
        elif name == "gvpo" and n > 1:
            d_mean, r_mean = d[rows].mean(), r[rows].mean()
            result[p] = sum((0.3 * (d[i] - d_mean) - (r[i] - r_mean)) ** 2 for i in rows) / (2 * (n - 1))
        elif name not in PER_PROMPT:
            for i in rows:
                if name.startswith("opmd"):
                    baseline = r[rows].mean() if name == "opmd" else 0.2 * np.log(np.mean(np.exp(r[rows] / 0.2)))
                    result[p, i] = -((r[i] - baseline) * d[i] - 0.1 * d[i] ** 2)
                elif name == "a2po":
                    result[p, i] = (0.1 * d[i] - r[i] + 0.5 * np.log(np.mean(np.exp(2 * r[rows])))) ** 2
                else:
                    residual = 0.3 + (d[i] + 0.1) / 3 - 15 * r[i]
                    result[p, i] = min(np.exp(d[i]), 10) * residual**2
    return result


@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_with_a_float64_loop_and_never_read_invalid_rows(name):
    logp, other, rewards, valid = _random()
    expected = _loop(name, logp, other, rewards, valid)
    given = [np.where(valid, x, np.nan) for x in (logp, other, rewards)]
    with jax.enable_x64(True):
        np.testing.assert_allclose(LOSSES[name](*given, valid), expected, rtol=1e-11, atol=1e-12)
    value, gradient = GRADIENTS[name](*(x.astype(np.float32) for x in given), valid)
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-4)
    assert np.all(np.isfinite(gradient))
    assert not np.asarray(gradient)[~valid].any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences_and_flow_into_the_trained_policy_alone(name):
    logp, other, rewards, valid = _random(1)
    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(lambda *x: jnp.sum(LOSSES[name](*x, valid)), argnums=(0, 1, 2)))(
            logp, other, rewards
        )
        direction = np.random.default_rng(2).normal(size=logp.shape)
        # The importance weight of flowrl is a constant of the gradient: it is 1 for every answer here.
        at = other if name == "flowrl" else logp
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(LOSSES[name](x, other, rewards, valid))))(at)
        numeric = np.zeros(())
        if name != "flowrl":
            up, down = (jnp.sum(LOSSES[name](at + s * 1e-5 * direction, other, rewards, valid)) for s in (1, -1))
            numeric = (up - down) / 2e-5
            np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-6)
        else:
            residual = 0.3 + 0.1 / 3 - 15 * rewards
            np.testing.assert_allclose(gradient, np.where(valid, 2 * residual / 3, 0.0), rtol=1e-10)
    for constant in gradients[1:]:
        assert not np.asarray(constant).any()


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_rows_give_float32_losses(name):
    logp, other, rewards, valid = _random(2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (logp, other, rewards)]
    given = LOSSES[name](*low, valid)
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(
        given, _loop(name, *(np.asarray(x, np.float64) for x in low), valid), rtol=1e-3, atol=1e-4
    )


def test_vmap_over_seeds_equals_single_calls():
    seeds = [_random(s) for s in range(2)]
    stacked = [jnp.asarray(np.stack(x)) for x in zip(*seeds, strict=True)]
    batched = jax.jit(jax.vmap(lambda *x: {name: f(*x) for name, f in LOSSES.items()}))(*stacked)
    for name in LOSSES:
        np.testing.assert_allclose(batched[name], [_loop(name, *s) for s in seeds], rtol=1e-4, atol=1e-5, err_msg=name)


def test_copg_gives_the_papers_pair():
    # Delta = 1 - 0.5 * 0.6 = 0.7; loss 0.7^2 / (2 * 0.5); gradient -+ Delta.
    logp, rewards = jnp.array([[0.4, -0.2]]), jnp.array([[1.0, 0.0]])
    value, gradient = jax.jit(
        jax.value_and_grad(lambda x: consistency.copg(x, jnp.zeros((1, 2)), rewards, beta=0.5).sum())
    )(logp)
    np.testing.assert_allclose(value, 0.49, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.7, 0.7]], rtol=1e-6)


@pytest.mark.parametrize("group_size", [2, 5])
def test_copg_on_policy_has_twice_the_gradient_of_rloo_on_the_regularised_reward(group_size):
    rng = np.random.default_rng(3)
    logp, ref, rewards = (rng.normal(size=(3, group_size)) for _ in range(3))
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda x: consistency.copg(x, ref, rewards, beta=0.2).sum()))(logp)
        expected = -2 / group_size * advantages.rloo(rewards - 0.2 * (logp - ref))
        np.testing.assert_allclose(gradient, expected, rtol=1e-9)


def test_copg_of_a_preference_of_one_half_is_ipo():
    rng = np.random.default_rng(4)
    logp, ref = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    beta = 0.1
    margin = (logp - ref)[:, 0] - (logp - ref)[:, 1]
    given = consistency.copg(logp, ref, jnp.tile(jnp.array([0.25, -0.25]), (6, 1)), beta=beta)
    np.testing.assert_allclose(given, beta / 2 * (margin - 1 / (2 * beta)) ** 2, rtol=1e-5)


def test_the_two_forms_of_copg_and_gvpo_differ_by_constants():
    logp, other, rewards, _ = _random(5)
    copg, command, gvpo = (LOSSES[k](logp, other, rewards) for k in ("copg", "copg leave_one_out", "gvpo"))
    np.testing.assert_allclose(command, 0.3 * 4 * np.asarray(copg), rtol=1e-5)
    np.testing.assert_allclose(gvpo, 0.15 * np.asarray(copg), rtol=1e-5)


def test_gvpo_has_the_papers_weights_on_the_log_probs():
    logp, old, rewards, _ = _random(6)
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda x: consistency.gvpo(x, old, rewards, beta=0.3).sum()))(logp)
    d = logp - old
    weights = (rewards - rewards.mean(1, keepdims=True)) - 0.3 * (d - d.mean(1, keepdims=True))
    np.testing.assert_allclose(gradient, -0.3 * weights / 3, rtol=1e-9)
    np.testing.assert_allclose(np.asarray(gradient).sum(1), np.zeros(5), atol=1e-12)


@pytest.mark.parametrize("name", ["copg", "gvpo", "opmd"])
def test_a_shift_of_a_prompts_rewards_changes_nothing(name):
    logp, other, rewards, valid = _random(7)
    with jax.enable_x64(True):
        shifted = LOSSES[name](logp, other, rewards + np.arange(5.0)[:, None] * 100, valid)
        np.testing.assert_allclose(shifted, LOSSES[name](logp, other, rewards, valid), atol=1e-9)


def test_opmd_gives_the_papers_coefficients():
    gradient = jax.jit(
        jax.grad(lambda x: consistency.opmd(x, jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), tau=0.1).sum())
    )(jnp.array([[0.1, -0.1]]))
    np.testing.assert_allclose(gradient, [[-0.49, 0.49]], rtol=1e-5)


def test_opmd_of_a_single_answer_is_its_quadratic_term():
    loss = consistency.opmd(jnp.array([[-1.0]]), jnp.array([[-3.0]]), jnp.array([[7.0]]), tau=0.1)
    np.testing.assert_allclose(loss, [[0.05 * 4]], rtol=1e-6)


def test_opmd_is_the_squared_consistency_up_to_scale_and_a_constant():
    logp, old, rewards, _ = _random(8)
    with jax.enable_x64(True):
        given = jax.jit(jax.grad(lambda x: consistency.opmd(x, old, rewards, tau=0.2, baseline="log_mean_exp").sum()))(
            logp
        )
        log_z = 0.2 * np.log(np.mean(np.exp(rewards / 0.2), 1, keepdims=True))
        square = jax.jit(jax.grad(lambda x: jnp.sum((rewards - log_z - 0.2 * (x - old)) ** 2) / 0.4))(logp)
        np.testing.assert_allclose(given, square, rtol=1e-9)


@pytest.mark.parametrize("name", ["copg", "gvpo", "opmd log_mean_exp"])
def test_the_regularised_optimum_is_stationary_wherever_the_answers_come_from(name):
    # Every answer of a prompt of four once: the group is the whole space, each answer weighing the same.
    rng = np.random.default_rng(9)
    ref, rewards = np.log(rng.dirichlet(np.ones(4), 5)), rng.normal(size=(5, 4))
    strength = 0.2 if "opmd" in name else 0.3
    with jax.enable_x64(True):
        best = jax.nn.log_softmax(jnp.asarray(ref + rewards / strength))
        if "opmd" in name:  # its baseline is the mean over samples of the reference, here uniform
            ref, best = np.full((5, 4), -np.log(4)), jax.nn.log_softmax(jnp.asarray(rewards / strength))
        logits = jnp.asarray(best)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(LOSSES[name](jax.nn.log_softmax(x), ref, rewards))))(logits)
        np.testing.assert_allclose(gradient, np.zeros((5, 4)), atol=1e-12)


def test_optimal_value_lies_between_mean_and_maximum_and_tends_to_both():
    rewards = np.random.default_rng(10).random((6, 8)).astype(np.float32)
    soft, cold, hot = (np.asarray(consistency.optimal_value(rewards, beta=b)) for b in (0.5, 1e-3, 1e3))
    assert np.all((rewards.mean(1) < soft) & (soft < rewards.max(1)))
    np.testing.assert_allclose(cold, rewards.max(1), atol=5e-3)
    np.testing.assert_allclose(hot, rewards.mean(1), atol=5e-3)


def test_log_mean_exp_survives_large_numbers_minus_infinity_and_empty_groups():
    x = jnp.array([[1000.0, 1000.0], [-jnp.inf, 0.0], [-jnp.inf, -jnp.inf], [5.0, 6.0]])
    valid = jnp.array([[1, 1], [1, 1], [1, 1], [0, 0]])
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(consistency.log_mean_exp(x, valid)[:2])))(x)
    np.testing.assert_allclose(value, 1000 - np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.5, 0.5], [0, 1], [0, 0], [0, 0]], atol=1e-6)
    np.testing.assert_array_equal(consistency.log_mean_exp(x, valid)[2:], [-np.inf, 0])


def test_flowrl_is_zero_where_the_policy_is_the_tilted_reference_and_clips_its_weight():
    rng = np.random.default_rng(11)
    ref, rewards = np.log(rng.dirichlet(np.ones(4), 2)), rng.normal(size=(2, 4))
    tilted = ref + 5 * rewards
    log_z = np.log(np.exp(tilted).sum(1))
    flow = functools.partial(consistency.flowrl, lengths=np.ones((2, 4)), beta=5.0)
    with jax.enable_x64(True):
        loss = flow(tilted - log_z[:, None], ref, ref, rewards, log_z=log_z)
        np.testing.assert_allclose(loss, np.zeros((2, 4)), atol=1e-12)
        far = flow(ref + 9, ref, ref, rewards, log_z=log_z)
        inside = flow(ref + 9, ref + 9, ref, rewards, log_z=log_z)
    np.testing.assert_allclose(far, 10 * np.asarray(inside), rtol=1e-9)
    gradient = jax.jit(jax.grad(lambda z: flow(ref, ref, ref, rewards, log_z=z).sum()))(jnp.asarray(log_z, jnp.float32))
    np.testing.assert_allclose(gradient, 2 * (log_z[:, None] - 5 * rewards).sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: consistency.copg(x[0], x[0], x[0]), r"logp must be \[P, G\], got shape \(4,\)"),
        (lambda x: consistency.copg(x, x[:, :2], x), "ref_logp must have the shape of logp"),
        (lambda x: consistency.copg(x, x, x, beta=0.0), "beta must be above 0"),
        (lambda x: consistency.copg(x, x, x, form="pairs"), "form must be"),
        (lambda x: consistency.opmd(x, x, x, tau=-1.0), "tau must be above 0"),
        (lambda x: consistency.opmd(x, x, x, baseline="median"), "baseline must be"),
        (lambda x: consistency.a2po(x, x, x, x[:2, 0]), "optimal_value must have the shape"),
        (lambda x: consistency.flowrl(x, x, x, x, x, x[:, 0], weight_low=2.0, weight_high=1.0), "weight_high"),
        (lambda x: consistency.gvpo(x, x, x, x[:, :1]), "valid must have the shape of logp"),
        (lambda x: consistency.gvpo(x, x[:1], x), "old_logp must have the shape of logp"),
        (lambda x: consistency.flowrl(x, x, x, x, x, x[:1, 0]), r"log_z must be \[P\] or \[P, G\] .* got \(1,\)"),
        (lambda x: consistency.flowrl(x, x, x, x, x, x[:, :1]), r"log_z must be \[P\] or \[P, G\] .* got \(5, 1\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((5, 4)))
