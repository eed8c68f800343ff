"""Adapters: what they add, what of a model they train, and a reference that shares the model's own weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import methods, models, training
from jaxrl_post.mesh import make_mesh
from jaxrl_post.types import Metric
from tests import tiny

EVERY = models.Lora(rank=3, alpha=6.0, targets=("query", "key", "value", "out", "gate", "up", "down"))
SIZES = {"vocab_size": tiny.VOCAB, "width": tiny.WIDTH, "layers": 2, "heads": 2, "mlp_width": 32}


@functools.cache
def model(lora=EVERY, **options):
    return models.decoder(**SIZES, lora=lora, **options)


@functools.cache
def jitted(function):
    return jax.jit(function)


def params_of(policy, seed=0, moved=True):
    """Parameters whose adapters, if `moved`, add something."""
    params = jitted(policy.init)(jax.random.key(seed))
    if not moved:
        return params
    own, adapters = models.split_adapters(params)
    noise = np.random.default_rng(9)
    moved_adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * noise.standard_normal(x.shape), x.dtype), adapters)

    def joined(a, b):
        keys = [*a, *(key for key in b if key not in a)]
        return {k: joined(a[k], b[k]) if isinstance(a.get(k), dict) and k in b else b.get(k, a.get(k)) for k in keys}

    return joined(own, moved_adapters)


def hidden(policy, params, **options):
    tokens = np.random.default_rng(3).integers(0, tiny.VOCAB, (2, 6))
    return np.asarray(jitted(policy.hidden)(params, tokens, np.broadcast_to(np.arange(6), (2, 6)), **options)[0])


def test_adapters_add_nothing_at_first_and_the_tree_serves_the_model_without_them():
    params = params_of(model(), moved=False)
    np.testing.assert_array_equal(hidden(model(), params), hidden(model(None), params))


@pytest.mark.parametrize("rank_stabilized", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_merged_weights_give_what_weights_and_adapters_give(rank_stabilized):
    """The second time with one `A` for query, key and value; what adapters add to them is compared with PEFT's."""
    targets = ("qkv", *EVERY.targets[3:]) if rank_stabilized else EVERY.targets
    lora = models.Lora(rank=3, alpha=6.0, targets=targets, rank_stabilized=rank_stabilized)
    params = params_of(model(lora))
    merged = models.merge_adapters(params, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(jax.eval_shape(model(None).init, jax.random.key(0)))
    with_adapters, without = hidden(model(lora), params), hidden(model(None), params)
    np.testing.assert_allclose(hidden(model(None), merged), with_adapters, rtol=2e-4, atol=2e-5)
    assert np.abs(with_adapters - without).max() > 0.1
    scale = 6.0 / (3**0.5 if rank_stabilized else 3)
    layer = jax.tree.map(lambda x: np.asarray(x[1], np.float64), params["layers"]["mlp"])
    np.testing.assert_allclose(
        merged["layers"]["mlp"]["up"][1],
        layer["up"] + scale * layer["up_lora"]["a"] @ layer["up_lora"]["b"],
        rtol=1e-5,
        atol=1e-6,
    )


def test_dropout_needs_a_key_and_leaves_the_mean_where_it_was():
    lora = models.Lora(rank=3, alpha=6.0, targets=("down",), dropout=0.5)
    policy = model(lora)
    params = params_of(policy)
    plain = hidden(policy, params)
    np.testing.assert_array_equal(plain, hidden(model(models.Lora(rank=3, alpha=6.0, targets=("down",))), params))
    keys = jax.random.split(jax.random.key(0), 2)
    one, other = (hidden(policy, params, key=key) for key in keys)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(one, hidden(policy, params, key=keys[0]))
    np.testing.assert_array_equal(one, hidden(policy, params, key=jax.random.key_data(keys[0])))  # a raw key
    adapter_only = jax.jit(jax.vmap(lambda key: _down(params, lora, key)))(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(jnp.mean(adapter_only, 0), _down(params, lora, None), atol=0.1)


def test_dropout_differs_between_rows_and_is_in_what_is_differentiated_alone():
    policy = model(models.Lora(rank=3, alpha=6.0, targets=("down",), dropout=0.5))
    params = params_of(policy)
    batch, fields = tiny.batch(count=8), frozenset({"logp"})
    same = batch.replace(tokens=jnp.broadcast_to(batch.tokens[:1], batch.tokens.shape), length=batch.length * 0 + 9)
    score = models.score(policy)
    by_form = [jax.jit(f, static_argnums=2) for f in (score, score.still)]
    noisy, still = (f(params, same, fields, jax.random.key(2)).logp for f in by_form)
    assert float(jnp.min(jnp.max(jnp.abs(noisy[1:] - noisy[0]), axis=1))) > 1e-4
    np.testing.assert_array_equal(still, jnp.broadcast_to(still[:1], still.shape))

    def seen(stats, rollouts, targets):
        return {
            "old": Metric.mean(targets.old_logp, rollouts.mask),
            "new": Metric.mean(stats["policy"].logp, rollouts.mask),
        }

    method = methods.grpo(beta=0.0, old_logp="recompute")._replace(metrics=seen)
    state = training.init({"policy": params}, method, optax.sgd(0.1), jax.random.key(5))
    expected = by_form[1](params, batch, fields, jax.random.key(0)).logp
    _, metrics = training.make_step(score, method, optax.sgd(0.1))(state, batch)
    mean = float(jnp.sum(expected * batch.mask) / jnp.sum(batch.mask))
    np.testing.assert_allclose(metrics["old"], mean, rtol=1e-5)
    assert abs(float(metrics["new"]) - mean) > 1e-4


def _down(params, lora, key):
    """What the first layer's adapter of `down` adds to a row of ones."""
    a, b = (params["layers"]["mlp"]["down_lora"][name][0] for name in "ab")
    x = jnp.ones(a.shape[0])
    if key is not None:
        x = jnp.where(jax.random.bernoulli(key, 1 - lora.dropout, x.shape), x / (1 - lora.dropout), 0)
    return lora.scale * x @ a @ b


def one_step(policy, params, *, mesh=None, optimizer, **options):
    method, base = methods.grpo(beta=0.1), model(None)
    given = {
        "trainable": {"policy": models.trainable(params)},
        "borrows": {"reference": "policy"},
        "mesh": mesh,
    }
    state = training.init(
        {"policy": params}, method, optimizer, jax.random.key(5), axes={"policy": policy.axes()}, **given
    )
    scores = {"policy": models.score(policy), "reference": models.score(base)}
    step = training.make_step(scores, method, optimizer, **given, **options)
    return state.opt_state, *step(state, tiny.batch(count=8))


@functools.cache
def stepped():
    """Parameters, and the optimizer's state, the state and metrics after a step of the gradient's size."""
    params = params_of(model())
    return params, *one_step(model(), params, optimizer=optax.sgd(1.0, momentum=0.9))


def test_only_adapters_move_and_only_they_have_an_optimizer_state():
    params, opt_state, state, metrics = stepped()
    own, adapters = models.split_adapters(params)
    new_own, new_adapters = models.split_adapters(state.params["policy"])
    jax.tree.map(np.testing.assert_array_equal, own, new_own)
    assert all(
        np.any(np.asarray(a) != np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, (adapters, new_adapters)), strict=True)
    )
    count = sum(x.size for x in jax.tree.leaves(adapters))
    assert sum(x.size for x in jax.tree.leaves(opt_state) if x.ndim) == count
    assert list(state.params) == ["policy"]  # the reference has no copy
    assert float(metrics["kl"]) > 0  # and is the model without adapters


def test_the_gradient_of_adapters_is_that_of_the_merged_weights():
    params, _, state, _ = stepped()
    own = models.merge_adapters(params, EVERY)
    method, base = methods.grpo(beta=0.1), model(None)
    frozen, _ = models.split_adapters(params)
    full = training.init({"policy": own, "reference": frozen}, method, optax.sgd(1.0), jax.random.key(5))
    moved, _ = training.make_step(models.score(base), method, optax.sgd(1.0))(full, tiny.batch(count=8))
    gradient = np.asarray(own["layers"]["mlp"]["up"] - moved.params["policy"]["layers"]["mlp"]["up"])[0]
    before, after = (p["layers"]["mlp"]["up_lora"] for p in (params, state.params["policy"]))
    expected = EVERY.scale * np.asarray(before["a"])[0].T @ gradient
    np.testing.assert_allclose((before["b"] - after["b"])[0], expected, rtol=2e-3, atol=2e-5)


DROPPED = models.Lora(rank=3, alpha=6.0, targets=("qkv", "out", "gate_up", "down"), dropout=0.3)


@functools.cache
def dropped_whole():
    """The model, its parameters, and the state after a step on the whole batch."""
    policy = model(DROPPED)
    params = params_of(policy)
    return policy, params, one_step(policy, params, optimizer=optax.sgd(0.1))[1]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"micro_batches": 4}, marks=pytest.mark.nightly),
        pytest.param({"mesh": {"fsdp": 4, "tensor": 2}}, marks=pytest.mark.nightly),
        {"micro_batches": 2, "mesh": {"fsdp": 4, "tensor": 2}},
    ],
    ids=str,
)
def test_an_update_of_adapters_and_its_dropout_do_not_depend_on_micro_batches_or_devices(options):
    options = {name: make_mesh(**value) if name == "mesh" else value for name, value in options.items()}
    policy, params, plain = dropped_whole()
    _, other, _ = one_step(policy, params, optimizer=optax.sgd(0.1), **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(plain.params),
        jax.device_get(other.params),
    )


def test_frozen_weights_cost_no_gradient():
    params = params_of(model())
    batch, field = tiny.batch(count=8), frozenset({"logp"})
    moving, still = training.parted(params, models.trainable(params))

    def flops(policy, loss, argument):
        return jax.jit(jax.grad(loss)).lower(argument).compile().cost_analysis()["flops"]

    def by_adapters(moving):
        return models.score(model())(training.whole(moving, still), batch, field, jax.random.key(0)).logp.sum()

    def by_all(params):
        return models.score(model())(params, batch, field, jax.random.key(0)).logp.sum()

    assert flops(model(), by_adapters, moving) < 0.85 * flops(model(), by_all, params)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (models.Lora(rank=0), "rank"),
        (models.Lora(rank=2, targets=("q_proj", "lm_head")), "targets"),
        (models.Lora(rank=2, targets=()), "targets"),
        (models.Lora(rank=2, targets=("qkv_proj", "key")), "key twice"),
        (models.Lora(rank=2, dropout=1.0), "dropout"),
    ],
)
def test_adapters_that_cannot_be_are_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        models.decoder(**SIZES, lora=lora)


EXPERTS = {"experts": 4, "experts_per_token": 2, "init_std": 0.3}


@functools.cache
def experts_alone():
    return models.decoder(**SIZES, **EXPERTS)


@pytest.mark.nightly  # on every commit those of all projections are merged and compared with PEFT's, test_peft_itself
@pytest.mark.parametrize("targets", [("gate", "up", "down"), ("gate_up", "out"), ("up",)])
def test_each_expert_has_adapters_of_its_own_which_merge_into_its_weights(targets):
    lora = models.Lora(rank=2, alpha=3.0, targets=targets)
    options = SIZES | EXPERTS
    policy, base = models.decoder(**options, lora=lora), experts_alone()
    params = params_of(policy)
    with_adapters, without = hidden(policy, params), hidden(base, params)
    merged = models.merge_adapters(params, lora)
    np.testing.assert_allclose(hidden(base, merged), with_adapters, rtol=2e-4, atol=2e-5)
    assert np.abs(with_adapters - without).max() > 0.1
    layer = jax.tree.map(
        lambda x: np.asarray(x[1, 3], np.float64), params["layers"]["mlp"] | {"router": jnp.ones((9, 9))}
    )
    a = layer["gate_lora" if "gate_up" in targets else "up_lora"]["a"]
    np.testing.assert_allclose(
        merged["layers"]["mlp"]["up"][1, 3], layer["up"] + 1.5 * a @ layer["up_lora"]["b"], rtol=1e-5, atol=1e-6
    )


def test_adapters_of_experts_have_no_dropout():
    options = SIZES | {"experts": 4, "experts_per_token": 2}
    with pytest.raises(ValueError, match=r"lora dropout 0\.1 does not apply to the maps of experts"):
        models.decoder(**options, lora=models.Lora(rank=2, targets=("query", "up"), dropout=0.1))
    assert models.decoder(**options, lora=models.Lora(rank=2, dropout=0.1)) is not None


def test_a_trained_role_cannot_borrow():
    with pytest.raises(ValueError, match="borrow"):
        training.make_step(
            models.score(model()), methods.grpo(beta=0.0), optax.sgd(0.1), borrows={"policy": "reference"}
        )
