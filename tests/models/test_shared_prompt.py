"""Scoring a group with its prompt once: the same numbers as row by row, for less."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import data, losses, methods, models, training
from jaxrl_post.kernels.attention.xla import attention_mask
from jaxrl_post.mesh import make_mesh, rollout_shardings
from jaxrl_post.models.shared_prompt import share_prompts
from jaxrl_post.training import config as configs
from jaxrl_post.training import setup
from tests import tiny
from tests.tpu import one_chip

V, PROMPT, NEW = 11, 6, 5
FIELDS = frozenset({"logp", "entropy", "mean_logp", "sum_p_squared", "max_prob", "value"})


@functools.cache
def policy(**options):
    sizes = {"vocab_size": V, "width": 16, "heads": 4, "kv_heads": 2, "init_std": 0.4, "value_head": True}
    return models.decoder(**{**sizes, **options})


@functools.cache
def parameters(model, seed=0):
    params = jax.jit(model.init)(jax.random.key(seed))
    # A value head starts at zero, where all values agree.
    params["value_head"]["kernel"] = jnp.cos(jnp.arange(16.0))
    return params


def batch(prompts=4, group=3, seed=0):
    """Prompts and completions of all lengths, tool tokens within completions, rows that are not valid."""
    random = np.random.default_rng(seed)
    texts = [random.integers(0, V, 1 + (PROMPT - 1 + 2 * p) % PROMPT).tolist() for p in range(prompts)]
    completions = [
        [random.integers(0, V, 1 + (p + 2 * g) % NEW).tolist() for g in range(group)] for p in range(prompts)
    ]
    rollouts = data.to_rollouts(texts, completions, length=PROMPT + NEW)
    mask = np.array(rollouts.mask)
    for row in range(len(mask)):
        places = np.flatnonzero(mask[row])
        mask[row, places[2:4]] = 0
    tokens = np.array(rollouts.tokens)
    beyond = np.arange(PROMPT + NEW) >= np.asarray(rollouts.length).reshape(-1, 1)
    valid = np.ones((prompts, group), bool)
    if group > 1:
        valid[0, 0] = False
    return rollouts.replace(
        tokens=jnp.asarray(np.where(beyond, 10**6, tokens)),
        mask=jnp.asarray(mask),
        logp=jnp.asarray(-random.exponential(size=mask.shape), jnp.float32),
        reward=jnp.asarray(random.standard_normal((prompts, group)), jnp.float32),
        valid=jnp.asarray(valid),
    )


@functools.cache
def grpo_loss(model, **options):
    """`(params, rollouts) -> ((loss, stats), gradients)` of a loss that reads every field.

    Most tests call it with one batch's shapes and the same few options: a program is compiled once for all of them.
    """

    def total(params, rollouts):
        stats = models.score(model, temperature=0.7, **options)(params, rollouts, FIELDS, jax.random.key(0))
        advantages = (rollouts.reward - rollouts.reward.mean(1, keepdims=True)).reshape(-1, 1)
        value = losses.ppo(stats.logp, rollouts.logp, jnp.broadcast_to(advantages, rollouts.mask.shape))
        value += 0.3 * jnp.square(stats.value - 1) - 0.2 * stats.entropy + 0.1 * stats.mean_logp
        value += 0.1 * (stats.sum_p_squared + stats.max_prob)
        return losses.aggregate(value, rollouts.valid_mask, "seq_mean_token_mean"), stats

    return jax.jit(jax.value_and_grad(total, has_aux=True))


share = jax.jit(share_prompts, static_argnums=1)


def assert_same(left, right, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


@pytest.mark.parametrize(("group", "max_chosen"), [(3, None), (3, 3), pytest.param(1, NEW, marks=pytest.mark.nightly)])
def test_values_and_gradients_equal_those_of_the_plain_batch(group, max_chosen):
    model, rollouts = policy(), batch(group=group)
    params = parameters(model)
    options = {} if max_chosen is None else {"max_chosen": max_chosen}
    plain = grpo_loss(model, **options)(params, rollouts)
    assert_same(grpo_loss(model, **options, shared_prompt=PROMPT)(params, rollouts), plain)
    assert float(jnp.abs(plain[1]["layers"]["attention"]["key"]).max()) > 1e-3


def test_more_room_than_is_needed_changes_nothing():
    model, rollouts = policy(), batch()
    params = parameters(model)
    plain = grpo_loss(model)(params, rollouts)
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 4))) if x.shape == rollouts.mask.shape else x, rollouts)
    (loss, stats), gradients = grpo_loss(model, shared_prompt=PROMPT + 2)(params, wider)
    assert_same(((loss, jax.tree.map(lambda x: x[:, :-4], stats)), gradients), plain)


def test_what_completions_begin_with_in_common_is_shared_too_and_stays_right():
    model = policy()
    said = [[[4, 5, 6, 7], [4, 5, 8], [4, 5, 6]], [[9, 1, 2]] * 3, [[1, 2], [1, 2, 3], [1, 2, 4]], [[5], [6], [7]]]
    rollouts = data.to_rollouts([[1, 2], [3], [4, 5, 6], [7]], said, length=PROMPT + NEW)
    assert np.sum(share(rollouts, PROMPT).positions[:, :PROMPT] >= 0, axis=1).tolist() == [4, 4, 5, 1]
    # The fourth token of the first group was chosen in two rows alone, and is 0 in the other.
    reward = jnp.array([[1.0, 0.0, 3.0], [2.0, 5.0, 4.0], [0.0, 0.5, 1.0], [1.0, 0.0, 2.0]])
    rollouts = rollouts.replace(reward=reward, mask=rollouts.mask.at[0, 3].set(0))
    params = parameters(model)
    plain = grpo_loss(model, max_chosen=3)(params, rollouts)
    assert float(plain[0][1].logp[1, 3]) < 0 == float(plain[0][1].logp[0, 3])
    assert_same(grpo_loss(model, max_chosen=3, shared_prompt=PROMPT)(params, rollouts), plain)


def test_a_row_that_does_not_fit_is_nan_where_it_is_valid_and_0_where_it_is_not():
    model = policy()
    rollouts = data.to_rollouts([[1, 2]], [[[3, 4, 5, 6, 7], [8, 9]]], length=9)
    score, right_score, lost_score = (
        jax.jit(models.score(model, **options), static_argnums=2)
        for options in ({}, {"shared_prompt": 3}, {"shared_prompt": 6})
    )
    params, fields = parameters(model), frozenset({"logp", "value"})
    plain, right, lost = (run(params, rollouts, fields, jax.random.key(0)) for run in (score, right_score, lost_score))
    assert_same(right, plain)
    surplus = np.zeros((2, 9), bool)
    surplus[0, 5:7] = True  # three fit
    for name in fields:
        np.testing.assert_array_equal(np.isnan(getattr(lost, name)), surplus)
        np.testing.assert_allclose(getattr(lost, name)[~surplus], getattr(plain, name)[~surplus], atol=1e-5)
    dropped = rollouts.replace(valid=jnp.array([[False, True]]))
    lost = lost_score(params, dropped, fields, jax.random.key(0))
    np.testing.assert_allclose(lost.logp, np.where(surplus, 0, plain.logp), atol=1e-5)


def test_a_row_that_is_not_valid_may_hold_anything():
    model, whole = policy(), batch()
    params = parameters(model)
    for kept in [(False, True, True), (True, False, True), (False, False, False)]:
        valid = jnp.array([kept, (True, True, True), (False, False, True), (True, True, True)])
        broken = ~np.asarray(valid).reshape(-1, 1) & np.ones((1, PROMPT + NEW), bool)
        rollouts = whole.replace(
            valid=valid,
            tokens=jnp.where(broken, 3 - whole.tokens % 3, whole.tokens),
            length=jnp.where(valid, whole.length, 1),
        )
        (plain, stats), gradients = grpo_loss(model)(params, rollouts)
        (shared, found), same = grpo_loss(model, shared_prompt=PROMPT)(params, rollouts)
        assert_same((shared, same), (plain, gradients))
        for name in FIELDS:
            field = np.asarray(getattr(found, name))
            np.testing.assert_allclose(field[~broken], np.asarray(getattr(stats, name))[~broken], atol=1e-5)
            assert np.isfinite(field).all()


def test_a_token_of_the_second_completion_sees_the_prompt_and_itself():
    slots = jnp.arange(5)[None]
    sees = attention_mask(slots, slots, completion_starts=(2, 3))[0]
    assert [np.flatnonzero(row).tolist() for row in sees] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]
    rows = share(data.to_rollouts([[5, 6]], [[[1], [2, 3]]], length=4), 2)
    real = rows.positions >= 0
    assert rows.positions[real].tolist() == [0, 1, 2, 2, 3]
    assert rows.tokens[real].tolist() == [5, 6, 1, 2, 3]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param({"data": 4, "fsdp": 2}, marks=pytest.mark.nightly), {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_eight_devices_agree_with_one(sizes):
    model, rollouts = policy(), batch(prompts=sizes["data"] * sizes["fsdp"])
    params = parameters(model)
    plain = grpo_loss(model, max_chosen=3)(params, rollouts)
    mesh = make_mesh(**sizes)
    placed = jax.device_put(rollouts, rollout_shardings(rollouts, mesh))
    with jax.set_mesh(mesh):
        shared = grpo_loss(model, max_chosen=3, shared_prompt=PROMPT)(params, placed)
    assert_same(jax.device_get(shared), jax.device_get(plain))


@pytest.mark.nightly  # on every commit one with experts is, tests/training/test_router.py
@pytest.mark.parametrize(("name", "count"), [("grpo", 1), ("ppo", 2), ("dpo", 2)])
def test_a_train_step_is_the_same_and_keeps_groups_whole_in_micro_batches(name, count):
    method = getattr(methods, name)()
    rollouts = tiny.pairs() if name == "dpo" else tiny.batch()
    expected, metrics = tiny.one_step(method, rollouts)
    seen = set()

    def score(role):
        made = models.score(tiny.policy(value_head=role == "critic"), shared_prompt=tiny.PROMPT)

        def run(params, piece, fields, key):
            seen.add(piece.reward.shape)
            return made(params, piece, fields, key)

        return dataclasses.replace(made, run=run)

    state = training.init(tiny.params_for(method), method, optax.sgd(0.1), jax.random.key(5))
    scores = {role: score(role) for role in method.needs}
    state, found = training.make_step(scores, method, optax.sgd(0.1), micro_batches=count)(state, rollouts)
    assert_same(state.params, expected.params)
    for key, value in metrics.items():
        np.testing.assert_allclose(found[key], value, atol=1e-5, rtol=1e-4, err_msg=key)
    assert seen == ({(4, rollouts.group_size)} if count == 1 else {(2, rollouts.group_size)})


def test_a_configuration_shares_prompts_where_a_prompt_has_several_completions():
    values = {
        "run_dir": "unused",
        "data": {"task": "spell_backward", "max_prompt_length": 12},
        "rewards": [{"name": "task_score"}],
        "rollout": {"max_new_tokens": 6, "group_size": 2, "prompts": 2},
        "warm_start": {"steps": 2, "examples": 4, "optimizer": {"learning_rate": 1e-3}},
        "training": {"steps": 10, "share_prompts": True, "optimizer": {"learning_rate": 1e-3}},
    }
    made = setup.build(configs.from_dict(values))
    warm, main = made.stages
    assert made.scores(warm)["policy"].unit == "token"
    assert {score.unit for score in made.scores(main).values()} == {"group"}


def test_a_long_prompt_costs_flops_and_memory_once():
    prompt, new, group = 512, 32, 8
    model = policy(width=128, layers=2, vocab_size=64, value_head=False)
    rollouts = data.to_rollouts([[1] * prompt], [[[2] * new] * group], length=prompt + new)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def compiled(**options):
        def loss(params, rollouts):
            score = models.score(model, max_chosen=new, **options)
            return jnp.sum(score(params, rollouts, frozenset({"logp"}), jax.random.key(0)).logp)

        done = jax.jit(jax.grad(loss)).lower(params, rollouts).compile()
        return done.cost_analysis()["flops"], done.memory_analysis().temp_size_in_bytes

    (flops, memory), (flops_once, memory_once) = compiled(), compiled(shared_prompt=prompt)
    tokens = (prompt + group * new) / (group * (prompt + new))
    assert round(tokens, 3) == 0.176
    assert flops_once / flops == pytest.approx(tokens, rel=0.02)
    assert memory_once < 0.2 * memory


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_on_a_tpu_a_group_is_one_row_of_the_attention_kernel(compiled):
    model = policy(width=256, heads=2, layers=1, kv_heads=1, vocab_size=256, value_head=False, dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0))
    rollouts = data.to_rollouts([[1] * 256] * 2, [[[2] * 128] * 4] * 2, length=384)

    def loss(params, rollouts):
        score = models.score(model, max_chosen=128, shared_prompt=256)
        return jnp.sum(score(params, rollouts, frozenset({"logp"}), jax.random.key(0)).logp)

    with one_chip("v5e"):
        lowered = jax.jit(jax.grad(loss)).lower(params, rollouts)
        text = lowered.as_text()
        if compiled:
            lowered.compile()
    assert text.count("tpu_custom_call") >= 3
    assert "2x768x256" in text  # 256 + 4 * 128 places of two prompts
    assert "768x768" not in text


def test_a_model_that_cannot_share_says_so():
    with pytest.warns(UserWarning, match="holds all"):
        bare = models.from_apply(lambda params, tokens: params[tokens])
    with pytest.raises(ValueError, match="takes no completion_starts"):
        jax.eval_shape(
            lambda rollouts: models.score(bare, shared_prompt=2)(
                jnp.eye(V), rollouts, frozenset({"logp"}), jax.random.key(0)
            ),
            batch(),
        )
    for size in (0, PROMPT + NEW):
        with pytest.raises(ValueError, match=rf"between 1 and T - 1 = 10, got {size}"):
            models.score(policy(), shared_prompt=size)({}, batch(), FIELDS, jax.random.key(0))
