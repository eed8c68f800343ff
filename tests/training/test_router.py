"""The load-balancing loss of a model with experts, as a term of any method's step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from jaxrl_post import data, methods, models, training
from jaxrl_post.models.experts import load_balancing_loss
from jaxrl_post.training import RouterLoss

EXPERTS, CHOSEN, LAYERS = 4, 2, 2
POLICY = models.decoder(
    vocab_size=8,
    width=16,
    layers=LAYERS,
    heads=2,
    mlp_width=8,
    experts=EXPERTS,
    experts_per_token=CHOSEN,
    init_std=0.3,
)
METHOD, OPTIMIZER = methods.sft(), optax.sgd(1.0)
PROMPTS = [[2, 3], [4], [5, 6, 7], [3]]
COMPLETIONS = [[[4, 5], [3, 2, 6]], [[6, 7, 2], [2]], [[2, 2], [7, 4]], [[5], [6, 5]]]


def batch():
    rollouts = data.to_rollouts(PROMPTS, COMPLETIONS, length=7)
    return rollouts.replace(valid=rollouts.valid.at[2, 1].set(False))


@functools.cache
def compiled(router_loss, shared, micro_batches):
    losses = None if router_loss is None else {"policy": router_loss}
    score = models.score(POLICY, shared_prompt=shared)
    return training.make_step(score, METHOD, OPTIMIZER, router_losses=losses, micro_batches=micro_batches)


def step(rollouts=None, router_loss=None, shared_prompt=None, micro_batches=1):
    """What a step of plain gradient descent takes from the parameters, and its metrics."""
    params = POLICY.init(jax.random.key(3))
    state = training.init({"policy": params}, METHOD, OPTIMIZER, jax.random.key(1))
    run = compiled(router_loss, shared_prompt, micro_batches)
    state, metrics = run(state, batch() if rollouts is None else rollouts)
    return jax.tree.map(lambda a, b: a - b, params, state.params["policy"]), metrics


@pytest.fixture(scope="module")
def without():
    return step()


@pytest.fixture(scope="module", params=["batch", "sequence"])
def whole(request):
    return request.param, step(router_loss=RouterLoss(0.7, request.param))


def close(left, right, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), left, right)


def router_logits(params, tokens):
    """`[L, B, T, E]` of the experts' routers, by a decoder written out: no scan, and every expert for every token."""

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    x = params["embedding"][tokens]
    length, half = tokens.shape[1], 4
    angle = jnp.arange(length)[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angle)[None, :, None] for f in (jnp.cos, jnp.sin))

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    found = []
    for number in range(LAYERS):
        layer = jax.tree.map(lambda w, n=number: w[n], params["layers"])
        y = norm(x, layer["attention_norm"]["scale"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, layer["attention"][name]) for name in ("query", "key", "value"))
        scores = jnp.einsum("bthk,bshk->bhts", rotate(q), rotate(k)) / 8**0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("bthk,hkd->btd", mixed, layer["attention"]["out"])
        y, mlp = norm(x, layer["mlp_norm"]["scale"]), layer["mlp"]
        found.append(y @ mlp["router"])
        p = jax.nn.softmax(found[-1])
        p = jnp.where(p >= jnp.sort(p)[..., -CHOSEN, None], p, 0)
        p = p / p.sum(-1, keepdims=True)
        inner = jax.nn.silu(jnp.einsum("btd,edf->btef", y, mlp["gate"])) * jnp.einsum("btd,edf->btef", y, mlp["up"])
        x = x + jnp.einsum("btef,efd,bte->btd", inner, mlp["down"], p)
    return jnp.stack(found)


@pytest.fixture(scope="module")
def routed():
    """The mask of tokens that count, the routers' logits, and how their gradient goes back to the parameters."""
    rollouts = batch()
    mask = np.arange(7) < np.asarray(rollouts.length * rollouts.valid).reshape(-1, 1)

    params = POLICY.init(jax.random.key(3))

    def logits(params):
        return router_logits(params, jnp.where(mask, rollouts.tokens, 0))

    @jax.jit
    def pull(cotangent):
        return jax.vjp(logits, params)[1](cotangent)[0]

    return mask, np.asarray(jax.jit(logits)(params)), pull


def of_transformers(logits, mask):
    """Their loss of logits `[L, B, T, E]` under a mask `[B, T]`, and its gradient."""
    given = torch.tensor(np.asarray(logits), requires_grad=True)
    flat = tuple(given.reshape(LAYERS, -1, EXPERTS))
    loss = load_balancing_loss_func(flat, EXPERTS, CHOSEN, torch.tensor(np.asarray(mask)))
    loss.backward()
    return loss.item(), given.grad.numpy()


def test_the_loss_over_the_batch_and_its_gradient_are_those_of_transformers(without, whole, routed):
    over, (gradient, metrics) = whole
    mask, logits, pull = routed
    if over == "batch":
        value, d_logits = of_transformers(logits, mask)
    else:
        # DeepSeek-V3's is that of a sequence and a layer, which is theirs if they are given no more.
        rows = np.flatnonzero(mask.any(1))
        d_logits, values = np.zeros(logits.shape, np.float32), []
        for row in rows:
            for layer in range(LAYERS):
                one = np.broadcast_to(logits[layer, row], (LAYERS, 1, *logits.shape[2:]))
                found, d = of_transformers(one, mask[row : row + 1])
                values.append(found)
                d_logits[layer, row] = d.sum(0)[0] / (len(rows) * LAYERS)
        value = np.mean(values)
    np.testing.assert_allclose(metrics["loss/router"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], without[1]["loss"] + 0.7 * value, rtol=1e-6)
    expected = jax.tree.map(lambda a, b: a + 0.7 * b, without[0], pull(jnp.asarray(d_logits)))
    close(gradient, expected)


@pytest.mark.parametrize("whole", ["batch", pytest.param("sequence", marks=pytest.mark.nightly)], indirect=True)
def test_micro_batches_and_shared_prompts_change_nothing(whole):
    over, (gradient, metrics) = whole
    again, found = step(router_loss=RouterLoss(0.7, over), shared_prompt=3, micro_batches=2)
    close(again, gradient)
    for name in ("loss/router", "router/load_max"):
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-6)


def test_the_largest_load_is_by_the_even_share(whole, routed):
    over, (_, metrics) = whole
    mask, logits, _ = routed
    best = np.argsort(-logits, axis=-1)[..., :CHOSEN]
    counts = (best[..., None] == np.arange(EXPERTS)).sum(-2) * mask[..., None]  # [L, B, T, E]
    pieces = [slice(None)] if over == "batch" else np.flatnonzero(mask.any(1))[:, None]
    expected = np.mean([counts[:, i].sum((1, 2)).max() / (CHOSEN * mask[i].sum() / EXPERTS) for i in pieces])
    np.testing.assert_allclose(metrics["router/load_max"], expected, rtol=1e-6)


def test_a_batch_without_a_valid_sequence_is_skipped_all_the_same():
    rollouts = batch()
    moved, metrics = step(rollouts.replace(valid=jnp.zeros_like(rollouts.valid)), router_loss=RouterLoss(0.7, "batch"))
    assert float(metrics["empty_updates"]) == 1
    assert all(not np.any(x) for x in jax.tree.leaves(moved))


def test_an_even_load_costs_the_number_of_chosen_experts_and_one_expert_all_of_them():
    even = jnp.full((1, 1, EXPERTS), 2.0)  # four tokens, two experts each
    one = jnp.zeros((1, 1, EXPERTS)).at[..., 0].set(4.0)
    assert load_balancing_loss(even, jnp.ones((1, 1, EXPERTS)), jnp.array([4])).tolist() == [CHOSEN]
    assert load_balancing_loss(one, one, jnp.array([4])).tolist() == [EXPERTS]
    assert load_balancing_loss(one * 0, one * 0, jnp.array([0])).tolist() == [0.0]


def test_a_router_loss_that_does_not_apply_is_refused():
    with pytest.raises(ValueError, match="coefficient must be positive, got 0"):
        step(router_loss=RouterLoss(0))
    with pytest.raises(ValueError, match=r"roles that are trained, \['policy'\], got \['critic'\]"):
        training.make_step(models.score(POLICY), METHOD, OPTIMIZER, router_losses={"critic": RouterLoss(0.1)})
    with pytest.raises(ValueError, match="over must be 'batch' or 'sequence', got 'token'"):
        step(router_loss=RouterLoss(0.1, "token"))
    dense = models.decoder(vocab_size=8, width=8, layers=1, heads=2)
    state = training.init({"policy": dense.init(jax.random.key(0))}, METHOD, OPTIMIZER, jax.random.key(1))
    run = training.make_step(models.score(dense), METHOD, OPTIMIZER, router_losses={"policy": RouterLoss(0.1)})
    with pytest.raises(ValueError, match="need a model with experts"):
        run(state, batch())
