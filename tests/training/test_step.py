"""The train step: what may not change a loss or a gradient, and what happens when something is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import mesh as mesh_lib
from jaxrl_post import methods, models, training
from tests import tiny
from tests.methods import tabular

METHODS = {
    "sft": (methods.sft(), tiny.batch),
    "grpo": (methods.grpo(), tiny.batch),
    "grpo_token_mean": (methods.grpo(aggregation="token_mean", old_logp="recompute"), tiny.batch),
    "mc_grpo": (methods.mc_grpo(aggregation="seq_mean_token_sum"), tiny.batch),
    "reinforce": (methods.reinforce(baseline="leave_one_out"), tiny.batch),
    "ppo": (methods.ppo(beta=0.1), tiny.batch),
    "dpo": (methods.dpo(), tiny.pairs),
}


def assert_same(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), left, right)


@functools.cache
def stepped(name):
    """`batch -> (state, metrics)` after one step on the whole batch, compiled once for each shape."""
    method, optimizer = METHODS[name][0], optax.sgd(0.1)
    step = training.make_step(tiny.scores_for(method), method, optimizer)
    return lambda batch: step(training.init(tiny.params_for(method), method, optimizer, jax.random.key(5)), batch)


def some(name):
    """A batch that eight devices can split."""
    return METHODS[name][1](count=4 if name == "dpo" else 8)


@functools.cache
def whole(name):
    """State and metrics after one step on the whole of it."""
    return stepped(name)(some(name))


def at_night(*names):
    """The names of methods as parameters, those given at night."""
    return [pytest.param(name, marks=pytest.mark.nightly if name in names else ()) for name in METHODS]


@pytest.mark.nightly  # on every commit eight devices take several, below
@pytest.mark.parametrize("name", METHODS)
def test_the_result_does_not_depend_on_the_number_of_micro_batches(name):
    method = METHODS[name][0]
    state, metrics = tiny.one_step(method, some(name), micro_batches=2 if name == "dpo" else 8)
    assert_same(state.params, whole(name)[0].params)
    for key, value in whole(name)[1].items():
        np.testing.assert_allclose(metrics[key], value, atol=2e-6, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", at_night("sft", "grpo", "grpo_token_mean", "mc_grpo", "reinforce", "dpo"))
def test_the_result_does_not_depend_on_padding(name):
    batch = some(name)
    width = batch.tokens.shape[1]

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, 3)), constant_values=3) if x.ndim == 2 and x.shape[1] == width else x

    padded = jax.tree.map(pad, batch).replace(mask=jnp.pad(jnp.asarray(batch.mask), ((0, 0), (0, 3))))
    state, _ = stepped(name)(padded)
    assert_same(state.params, whole(name)[0].params)


@pytest.mark.parametrize(
    "sizes", [pytest.param({"fsdp": 8}, marks=pytest.mark.nightly), {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ("grpo", "dpo")), "ppo"])
def test_eight_devices_agree_with_one_however_many_micro_batches_they_take(name, sizes):
    expected = whole(name)
    state, metrics = tiny.one_step(METHODS[name][0], some(name), mesh=mesh_lib.make_mesh(**sizes), micro_batches=2)
    assert_same(jax.device_get(state.params), expected[0].params, 1e-5)
    for key, value in expected[1].items():
        np.testing.assert_allclose(metrics[key], value, atol=1e-5, rtol=1e-4, err_msg=key)
    split = [x for x in jax.tree.leaves(state.params["policy"]) if not x.sharding.is_fully_replicated]
    assert split, "no parameter is split over the mesh"


@pytest.mark.nightly  # on every commit those of adapters do, tests/models/test_lora.py
def test_micro_batches_on_a_mesh_agree_with_one_device():
    method, mesh = METHODS["grpo"][0], mesh_lib.make_mesh(fsdp=4, tensor=2)
    state, _ = tiny.one_step(method, some("grpo"), mesh=mesh, micro_batches=2)
    assert_same(jax.device_get(state.params), whole("grpo")[0].params, 1e-5)


def test_the_first_update_of_a_batch_has_ratio_one_and_the_second_not():
    method = methods.grpo(beta=0.0)
    batch = tabular.batch()
    _, once = tabular.one_step(method, batch)
    assert abs(float(once["ppo_kl"])) < 1e-6
    assert float(once["clip_ratio/region_mean"]) == 0.0
    state, twice = tabular.one_step(method, batch, optax.sgd(5.0), epochs=2)
    assert abs(float(twice["ppo_kl"])) > 1e-4  # the mean over both epochs
    assert float(twice["sampling/sampling_logp_difference/max"]) < 1e-5  # of the first epoch only
    assert int(state.step) == 1


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    batch = tabular.batch()
    bad = batch.replace(logp=batch.logp.at[0].set(jnp.nan))
    method, optimizer = methods.grpo(), optax.adam(0.1)
    step = tabular.make_step(method, optimizer)
    state, metrics = step(tabular.start(method, optimizer), bad)
    assert float(metrics["nonfinite_updates"]) == 1.0
    assert_same(state.params, tabular.params_for(method), 0.0)
    assert int(state.opt_state["policy"][0].count) == 0
    assert int(state.step) == 1
    _, metrics = step(tabular.start(method, optimizer), batch)
    assert float(metrics["nonfinite_updates"]) == 0.0


def test_a_batch_without_valid_sequences_changes_nothing_and_stays_finite():
    batch = some("grpo")
    state, metrics = stepped("grpo")(batch.replace(valid=jnp.zeros_like(batch.valid)))
    assert_same(state.params, tiny.params_for(methods.grpo()), 0.0)
    assert float(metrics["loss"]) == 0.0


def test_master_weights_move_by_updates_that_bfloat16_could_not_hold():
    policy = tiny.policy(dtype="bfloat16")
    method, optimizer = methods.sft(), optax.sign_sgd(1e-6)
    params = {"policy": policy.init(jax.random.key(0))}
    state = training.init(params, method, optimizer, jax.random.key(1))
    step = training.make_step(models.score(policy), method, optimizer)
    state, _ = step(state, tiny.batch())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    scale, before = state.params["policy"]["final_norm"], params["policy"]["final_norm"]
    scale, before = (jax.tree.leaves(x)[0] for x in (scale, before))
    np.testing.assert_array_equal(before, 1.0)
    np.testing.assert_allclose(np.abs(scale - before), 1e-6, rtol=0.1)


def test_gradients_in_the_precision_of_the_products_are_those_of_the_master_weights():
    policy = tiny.policy(dtype="bfloat16")
    params, score, method = policy.init(jax.random.key(0)), models.score(policy), methods.sft()
    optimizer = optax.sgd(1.0)  # what a parameter moves by is its gradient

    def gradient(score, micro_batches):
        given = {"policy": jax.tree.map(jnp.copy, params)}
        step = training.make_step(score, method, optimizer, micro_batches=micro_batches)
        state, _ = step(training.init(given, method, optimizer, jax.random.key(1)), tiny.batch())
        return jax.tree.map(lambda new, old: new - old, state.params["policy"], params)

    wide = gradient(lambda *given: score(*given), 8)  # a score that says nothing of a precision
    assert_same(gradient(score, 8), wide)  # the same pieces give the same numbers, added up as widely
    at_once = gradient(score, 1)
    error, size = (optax.tree.norm(x) for x in (optax.tree.sub(at_once, wide), wide))
    assert error < 2**-8 * size


def test_stats_that_nothing_reads_are_not_computed():
    def flops(method):
        optimizer = optax.sgd(0.1)
        state = training.init(tiny.params_for(method), method, optimizer, jax.random.key(0))
        step = training.make_step(tiny.scores_for(method), method, optimizer)
        return step.lower(state, tiny.batch()).compile().cost_analysis()["flops"]  # type: ignore[attr-defined]

    sampled = flops(methods.grpo(beta=0.0, old_logp="rollout"))
    recomputed = flops(methods.grpo(beta=0.0, old_logp="recompute"))
    with_reference = flops(methods.grpo(beta=0.1, old_logp="rollout"))
    assert sampled < 0.9 * recomputed
    assert with_reference == pytest.approx(recomputed, rel=0.1)


def test_the_reference_stays_frozen_or_follows_as_its_role_says():
    from jaxrl_post.training.roles import Role, make_refresh

    method = methods.grpo()
    before = tabular.params_for(method)
    assert_same(tabular.one_step(method, tabular.batch())[0].params["reference"], before["reference"], 0.0)
    refresh = make_refresh({"reference": Role(every=1, mix=0.25)})
    state, _ = tabular.one_step(method, tabular.batch(), refresh=refresh)
    mixed = jax.tree.map(lambda p, r: 0.25 * p + 0.75 * r, state.params["policy"], before["reference"])
    assert_same(state.params["reference"], mixed)


def test_wrong_use_is_an_error_that_says_what_to_do():
    batch = tiny.batch()
    with pytest.raises(ValueError, match=r"no score was given for \['reference'\]"):
        training.make_step({"policy": models.score(tiny.policy())}, methods.grpo(), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"\['critic'\] are missing from params"):
        training.init({"policy": {}}, methods.ppo(), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="3 micro-batches do not divide 16 sequences"):
        tiny.one_step(methods.grpo(), batch, micro_batches=3)
    with pytest.raises(ValueError, match="8 micro-batches do not divide 4 groups"):
        tiny.one_step(methods.dpo(), tiny.pairs(), micro_batches=8)
    by_prompt = methods.dpo()._replace(unit="token")
    with pytest.raises(ValueError, match=r"4 rows for 8 sequences.* give the method unit='group'"):
        tiny.one_step(by_prompt, tiny.pairs(), micro_batches=2)
    reduced = methods.sft()._replace(loss=lambda stats, rollouts, targets: {"nll": stats["policy"].logp.mean()})
    with pytest.raises(ValueError, match=r"return Term\(value"):
        tiny.one_step(reduced, batch)
    forgotten = methods.grpo(beta=0.0)._replace(needs={"policy": frozenset({"value"})})
    with pytest.raises(ValueError, match="value"):
        tiny.one_step(forgotten, batch)
    whole_batch = methods.grpo()._replace(unit="batch")
    with pytest.raises(ValueError, match="needs the whole batch at once"):
        tiny.one_step(whole_batch, batch, micro_batches=2)
