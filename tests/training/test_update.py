"""One method's update: gradients that are combined, batches from elsewhere, what a method wants, and empty updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import mesh as mesh_lib
from jaxrl_post import methods, training
from jaxrl_post.types import Method, Targets, Term
from tests import tiny
from tests.methods import tabular

NAMES = ("first", "second", "third")
WEIGHTS = (1.0, 0.5, -2.0)


def assert_same(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), left, right)


def objectives(combine=None, chosen=False, scale=(1.0, 1.0, 1.0), state=None) -> Method:
    """Log-probs weighted by three functions of the rewards, one term each; `chosen` by the numbers in the state."""

    def targets(state, rollouts, stats, key):
        reward = rollouts.reward.reshape(-1, 1)
        extras = {"first": reward, "second": jnp.sin(3 * reward), "third": jnp.ones_like(reward)}
        if chosen:
            extras = {name: factor * extras[name] for name, factor in zip(NAMES, state, strict=True)}
        return Targets(rollouts.mask, rollouts.valid_mask, rollouts.logp, extras=extras), state

    def loss(stats, rollouts, targets):
        return {
            name: Term(-stats["policy"].logp * targets.extras[name], targets.mask, "token_mean", weight * factor)
            for name, weight, factor in zip(NAMES, WEIGHTS, scale, strict=True)
        }

    return Method(
        targets,
        loss,
        needs={"policy": frozenset({"logp"})},
        combine=combine,
        init=lambda rollouts, num_prompts: jnp.zeros(3 if chosen else (3, 3)) if state is None else state,
    )


def remember(state, gram, names):
    """Keeps the inner products in the state and weighs the terms 1, 2 and 3."""
    assert names == NAMES
    return jnp.array([1.0, 2.0, 3.0]), gram


@pytest.fixture(scope="module")
def weighted():
    """State and metrics after a step whose terms weigh 1, 2 and 3 from the start."""
    return tiny.one_step(objectives(scale=(1.0, 2.0, 3.0)), tiny.batch(count=8))


@pytest.fixture(scope="module")
def inner_products():
    """From the gradient of each term alone, in float64."""
    method, optimizer = objectives(chosen=True), optax.sgd(1.0)
    before, step = tiny.params_for(method)["policy"], training.make_step(tiny.scores_for(method), method, optimizer)
    rows = []
    for chosen in jnp.eye(len(NAMES)):
        state = training.init(tiny.params_for(method), method, optimizer, jax.random.key(5))
        state, _ = step(state.replace(method_state=chosen), tiny.batch(count=8))
        difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, before, state.params["policy"])
        rows.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(difference)]))
    return np.array(rows) @ np.array(rows).T


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": {"fsdp": 4, "tensor": 2}, "micro_batches": 2},
        pytest.param({}, marks=pytest.mark.nightly),
        pytest.param({"micro_batches": 4}, marks=pytest.mark.nightly),
        pytest.param({"mesh": {"fsdp": 4}, "micro_batches": 2}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_inner_products_are_those_of_whole_batch_gradients_however_it_is_cut(options, inner_products, weighted):
    options = dict(options)
    if "mesh" in options:
        options["mesh"] = mesh_lib.make_mesh(**options["mesh"])
    batch = tiny.batch(count=8)
    state, metrics = tiny.one_step(objectives(remember), batch, **options)
    np.testing.assert_allclose(jax.device_get(state.method_state), inner_products, rtol=2e-4, atol=1e-6)
    expected, plain = weighted
    assert_same(jax.device_get(state.params), expected.params, 1e-5)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], plain["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/second"], plain["loss/second"], rtol=1e-4)  # terms are logged unweighted
    assert [float(metrics[f"gradient_weight/{name}"]) for name in NAMES] == [1.0, 2.0, 3.0]


def test_weights_follow_the_gradients_of_each_epoch():
    def count(state, gram, names):
        return jnp.ones(3), state + 1

    state, _ = tabular.one_step(objectives(count, state=jnp.zeros(())), tabular.batch(), epochs=3)
    assert float(state.method_state) == 3


def test_a_skipped_update_keeps_the_state_of_combine_too():
    batch = tabular.batch()
    bad = batch.replace(reward=batch.reward.at[0, 1].set(jnp.nan))
    state, metrics = tabular.one_step(objectives(remember), bad)
    assert float(metrics["nonfinite_updates"]) == 1
    assert_same(state.method_state, np.zeros((3, 3)), 0.0)


def test_combine_must_return_a_weight_per_term():
    with pytest.raises(ValueError, match=r"a weight for each of \('first', 'second', 'third'\), got shape \(2,\)"):
        tabular.one_step(objectives(lambda state, gram, names: (jnp.ones(2), state)), tabular.batch())


def one_behind(method: Method) -> Method:
    """The method on the rollouts of the step before; on none in the first step."""

    def init(rollouts, num_prompts):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rollouts)

    return method._replace(
        init=init,
        batch=lambda state, rollouts: (state, rollouts),
        targets=lambda state, rollouts, stats, key: (method.targets((), rollouts, stats, key)[0], state),
    )


@functools.cache
def after_the_first_batch():
    """GRPO without KL, its optimiser, and the state after a step of both."""
    plain, optimizer = methods.grpo(beta=0.0), optax.adamw(0.01, weight_decay=0.1)
    return plain, optimizer, tiny.one_step(plain, tiny.batch(count=8), optimizer)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"micro_batches": 2}, marks=pytest.mark.nightly),
        pytest.param({"mesh": {"fsdp": 4, "tensor": 2}, "micro_batches": 2}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_a_method_may_train_on_the_batch_before(options):
    options = dict(options)
    if "mesh" in options:
        options["mesh"] = mesh_lib.make_mesh(**options["mesh"])
    plain, optimizer, expected = after_the_first_batch()
    late, batches = one_behind(plain), [tiny.batch(count=8, seed=seed) for seed in (0, 1)]
    shapes, mesh = jax.eval_shape(lambda: batches[0]), options.get("mesh")
    axes = {"policy": tiny.policy().axes()}
    params = tiny.params_for(late)
    state = training.init(params, late, optimizer, jax.random.key(5), rollouts=shapes, mesh=mesh, axes=axes)
    step = training.make_step(tiny.scores_for(late), late, optimizer, **options)
    state, metrics = step(state, batches[0])
    # Nothing was there to train on: neither weight decay nor the optimiser's count has moved.
    assert_same(jax.device_get(state.params), params, 0.0)
    assert int(state.opt_state["policy"][0].count) == 0
    assert (float(metrics["empty_updates"]), float(metrics["updates"])) == (1.0, 0.0)
    state, metrics = step(state, batches[1])
    assert_same(jax.device_get(state.params), expected.params, 2e-5)
    assert (float(metrics["empty_updates"]), float(metrics["updates"])) == (0.0, 1.0)
    assert "sampling/sampling_logp_difference/max" not in metrics  # the sampler's policy is gone
    np.testing.assert_array_equal(state.method_state.tokens, batches[1].tokens)


def test_rollouts_that_lack_what_a_method_wants_are_an_error_that_says_who_gives_it():
    greedy = methods.grpo()._replace(wants=frozenset({"greedy_reward"}))
    with pytest.raises(ValueError, match=r"extras\['greedy_reward'\] \(the reward of a greedy completion"):
        tabular.one_step(greedy, tabular.batch())
    column = methods.grpo()._replace(wants=frozenset({"difficulty"}))
    with pytest.raises(ValueError, match="data's column of that name"):
        tabular.one_step(column, tabular.batch())
    batch = tabular.batch()
    with pytest.raises(ValueError, match=r"must be \[P\] = \[4\], a number per prompt, got shape \(16,\)"):
        tabular.one_step(column, batch.replace(extras={**batch.extras, "difficulty": jnp.zeros(16)}))
    given = batch.replace(extras={**batch.extras, "difficulty": jnp.zeros(4)})
    jax.eval_shape(lambda: tabular.one_step(column, given, micro_batches=2))


def test_logsumexp_is_scored_as_the_normaliser_of_logp():
    from jaxrl_post import models

    policy, batch = tiny.policy(), tiny.batch()
    params = policy.init(jax.random.key(0))
    fields = frozenset({"logp", "logsumexp"})
    score = jax.jit(models.score(policy, temperature=0.7), static_argnums=2)
    stats = score(params, batch, fields, jax.random.key(1))
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    hidden, _ = jax.jit(policy.hidden)(params, batch.tokens, positions)
    logits = models.logits(policy.unembed(params), hidden)[:, :-1] / 0.7
    chosen = jnp.take_along_axis(logits, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    inside = batch.mask[:, 1:] > 0
    found = jnp.where(inside, stats.logp[:, 1:] + stats.logsumexp[:, 1:], 0.0)
    np.testing.assert_allclose(found, jnp.where(inside, chosen, 0.0), atol=1e-5)


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_extras_of_sequences_and_of_prompts_reach_their_rows_in_every_micro_batch(micro_batches):
    def loss(stats, rollouts, targets):
        by_row = rollouts.extras["sequence"].reshape(-1, 1) * rollouts.mask
        by_prompt = jnp.repeat(rollouts.extras["prompt"], rollouts.group_size)[:, None] * rollouts.mask
        made = targets.extras["made"].reshape(-1, 1) * rollouts.mask
        zero = 0.0 * stats["policy"].logp
        mask = rollouts.mask
        return {
            "sequence": Term(by_row + zero, mask, "token_mean"),
            "prompt": Term(by_prompt * by_row + zero, mask, "token_mean"),
            "made": Term(made * by_row + zero, mask, "token_mean"),
        }

    def targets(state, rollouts, stats, key):
        return Targets(rollouts.mask, rollouts.mask, rollouts.logp, extras={"made": 3 * rollouts.reward}), state

    batch = tabular.batch()
    batch = batch.replace(mask=batch.mask.at[::3, -1].set(0).at[1::5, 2:].set(0))  # rows of several lengths
    sequence, prompt = jnp.arange(16.0).reshape(4, 4), jnp.arange(4.0)
    batch = batch.replace(extras={**batch.extras, "sequence": sequence, "prompt": prompt})
    method = Method(targets, loss, needs={"policy": frozenset({"logp"})})
    _, metrics = tabular.one_step(method, batch, micro_batches=micro_batches)
    tokens = np.asarray(batch.mask).sum(1)
    row, count = np.arange(16.0), tokens.sum()
    np.testing.assert_allclose(metrics["loss/sequence"], (row * tokens).sum() / count, rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss/prompt"], (row * np.repeat(np.arange(4), 4) * tokens).sum() / count, rtol=1e-5
    )
    made = 3 * np.asarray(batch.reward).reshape(-1)
    np.testing.assert_allclose(metrics["loss/made"], (row * made * tokens).sum() / count, rtol=1e-4)


def test_each_trained_role_may_have_an_optimizer_of_its_own():
    batch, method = tabular.batch(), methods.ppo()
    both = {"policy": optax.sgd(0.0), "critic": optax.sgd(0.1)}
    before = jax.device_get(tabular.params_for(method))
    state, _ = tabular.one_step(method, batch, both)
    assert_same(before["policy"], jax.device_get(state.params["policy"]))
    alike, _ = tabular.one_step(method, batch, optax.sgd(0.1))
    assert_same(jax.device_get(alike.params["critic"]), jax.device_get(state.params["critic"]))
    with pytest.raises(ValueError, match="critic"):
        tabular.one_step(method, batch, {"policy": optax.sgd(0.1)})
