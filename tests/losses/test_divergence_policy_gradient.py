import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.losses import divergence_policy_gradient as dpg
from tests.advantages.compiled import all_compiled

dpg = all_compiled(dpg)

# D_f(pi || p) in float64 from its definition, and the numbers of the table at t = 2.
DIVERGENCES = {
    "forward_kl": (lambda pi, p: jnp.sum(p * jnp.log(p / pi)), 0.5),
    "reverse_kl": (lambda pi, p: jnp.sum(pi * jnp.log(pi / p)), -1.693147),
    "js": (
        lambda pi, p: jnp.sum(p * jnp.log(2 * p / (p + pi)) + pi * jnp.log(2 * pi / (p + pi))),
        -0.287682,
    ),
    "tv": (lambda pi, p: jnp.sum(jnp.abs(pi - p)) / 2, -0.5),
    "forward_chi2": (lambda pi, p: jnp.sum(p**2 / pi) - 1, -0.75),
    "reverse_chi2": (lambda pi, p: jnp.sum(pi**2 / p) - 1, -2.0),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rewards_are_the_papers_numbers_at_twice_the_target(divergence):
    given = dpg.divergence_reward(jnp.log(2.0), divergence=divergence)
    np.testing.assert_allclose(given, DIVERGENCES[divergence][1], rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_enumerated_gradient_is_that_of_the_divergence(divergence):
    rng = np.random.default_rng(0)
    logits, target, proposal = rng.normal(size=5), rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    with jax.enable_x64(True):
        exact = jax.jit(jax.grad(lambda x: DIVERGENCES[divergence][0](jax.nn.softmax(x), target)))(jnp.asarray(logits))

        def enumerated(x):
            # The target is handed over unnormalised, 7 times too large, with its normaliser.
            logp = jax.nn.log_softmax(x)[None]
            score, log_z = jnp.log(7 * target)[None], jnp.log(jnp.array([7.0]))
            loss = dpg.f_dpg(logp, jnp.log(proposal)[None], score, log_z, divergence=divergence, baseline=0.3)
            return jnp.sum(proposal * loss[0])

        np.testing.assert_allclose(jax.jit(jax.grad(enumerated))(jnp.asarray(logits)), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [("forward_kl", 0.0), ("js", -np.log(2)), ("tv", -0.5), ("forward_chi2", -1.0), ("reverse_kl", -21.0)],
)
def test_an_answer_outside_the_targets_support_has_the_rewards_limit(divergence, expected):
    given = dpg.divergence_reward(jnp.array(jnp.inf), divergence=divergence)
    np.testing.assert_allclose(given, expected, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_are_finite_outside_the_support_far_away_and_in_rows_that_do_not_count(divergence):
    logp = jnp.array([[-1.0, -500.0, -2.0, jnp.nan], [-1.0, -1.0, jnp.nan, jnp.nan]], jnp.bfloat16)
    score = jnp.array([[-jnp.inf, -1.0, -800.0, jnp.nan], [-jnp.inf, -jnp.inf, jnp.nan, jnp.nan]])
    valid = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    log_z = dpg.log_partition(score, logp, valid)
    assert log_z[1] == -jnp.inf
    loss = jax.jit(lambda x: dpg.f_dpg(x, logp, score, log_z, valid, divergence=divergence))
    value, gradient = loss(logp), jax.jit(jax.grad(lambda x: loss(x).sum()))(logp)
    assert value.dtype == jnp.float32
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))
    assert not np.asarray(gradient, np.float32)[valid == 0].any()


def test_the_partition_function_is_estimated_by_importance_sampling_and_averaged_over_steps():
    rng = np.random.default_rng(1)
    score, q = rng.normal(size=(3, 6)), np.log(rng.dirichlet(np.ones(6), 3))
    valid = rng.random((3, 6)) < 0.7
    valid[2] = False
    expected = [np.log(np.mean(np.exp(score[p] - q[p])[valid[p]])) if valid[p].any() else 0 for p in range(3)]
    np.testing.assert_allclose(dpg.log_partition(score, q, valid), expected, rtol=1e-5)
    # All members of the space once, each weighing what the proposal does, give Z itself.
    uniform = np.full((3, 6), -np.log(6))
    np.testing.assert_allclose(dpg.log_partition(score, uniform), np.log(np.exp(score).sum(1)), rtol=1e-5)
    estimates, running = np.array([3.0, 5.0, 10.0]), jnp.zeros(1)
    for n, z in enumerate(estimates):
        running = dpg.running_log_partition(running, n, jnp.log(jnp.array([z])))
        np.testing.assert_allclose(np.exp(running), estimates[: n + 1].mean(keepdims=True), rtol=1e-5)


def test_reverse_kl_of_a_tilted_reference_is_the_regularised_policy_gradient():
    # log P = log ref + r / beta: the advantage is (r - beta log pi / ref) / beta, up to a constant.
    rng = np.random.default_rng(2)
    logp, ref, rewards = (rng.normal(size=(2, 3)) for _ in range(3))
    with jax.enable_x64(True):
        gradient = jax.jit(
            jax.grad(
                lambda x: dpg.f_dpg(
                    x, logp, ref + rewards / 0.5, jnp.zeros(2), divergence="reverse_kl", baseline=-1.0
                ).sum()
            )
        )(logp)
        np.testing.assert_allclose(gradient, -(rewards - 0.5 * (logp - ref)) / 0.5, rtol=1e-9)


def test_wrong_arguments_are_named():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="divergence must be one of forward_kl"):
        dpg.divergence_reward(x, divergence="kl")
    with pytest.raises(ValueError, match="max_log_t must be in"):
        dpg.divergence_reward(x, divergence="js", max_log_t=100.0)
    with pytest.raises(ValueError, match="log_z must have the shape"):
        dpg.f_dpg(x, x, x, jnp.zeros(()))
    with pytest.raises(ValueError, match=r"target_logscore must be \[P, G\]"):
        dpg.log_partition(x[0], x[0])
    with pytest.raises(ValueError, match="new_log_z must have the shape"):
        dpg.running_log_partition(jnp.zeros(2), 1, jnp.zeros(3))
