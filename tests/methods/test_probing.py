"""Texts that a method has scored beside its rollouts: how they are made, and how the step runs them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import data, methods, models, training
from jaxrl_post.mesh import make_mesh
from jaxrl_post.methods import probing
from jaxrl_post.types import FINISH_STOP, Method, Targets, Term
from tests import tiny
from tests.methods import tabular

LOGP = frozenset({"logp"})


_append = jax.jit(
    probing.append_after_steps, static_argnames=("num_steps", "prefix", "suffix", "max_length")
)  # op by op it is hundreds of programs


def texts(probe):
    return [row[:n] for row, n in zip(probe.tokens.tolist(), probe.length.reshape(-1).tolist(), strict=True)]


@pytest.fixture
def two_prompts():
    rollouts = data.to_rollouts([[5], [6, 6]], [[[1, 2, 3], [4]], [[1, 1], [2, 3]]], length=5)
    step = jnp.array([[-1, 0, 0, 1, -1], [-1, 0, -1, -1, -1], [-1, -1, 0, 1, -1], [-1, -1, 0, 0, -1]])
    return rollouts, step


def test_the_answer_stands_behind_the_prompt_and_behind_each_step(two_prompts):
    rollouts, step = two_prompts
    probe = _append(rollouts, step, jnp.array([[8, -1], [9, 7]]), num_steps=2, prefix=(0,), suffix=(4,))
    found, valid = texts(probe), probe.valid.reshape(-1).tolist()
    assert valid == [True, True, True, True, False, True, True, True, True, False]
    assert [text for text, ok in zip(found, valid, strict=True) if ok] == [
        [5, 0, 8, 4],
        [5, 1, 2, 0, 8, 4],
        [5, 1, 2, 3, 0, 8, 4],
        [5, 4, 0, 8, 4],
        [6, 6, 0, 9, 7, 4],
        [6, 6, 1, 0, 9, 7, 4],
        [6, 6, 1, 1, 0, 9, 7, 4],
        [6, 6, 2, 3, 0, 9, 7, 4],
    ]
    scored = [
        [t for t, m in zip(row, mask, strict=True) if m]
        for row, mask in zip(probe.tokens.tolist(), probe.mask.tolist(), strict=True)
    ]
    assert scored == [[8]] * 4 + [[]] + [[9, 7]] * 4 + [[]]


def test_a_stop_token_at_the_end_is_left_out_and_a_tools_tokens_within_are_kept():
    rollouts = data.to_rollouts([[5]], [[[1, 2, 3, 0]]], length=5)
    rollouts = rollouts.replace(
        mask=jnp.array([[0.0, 1.0, 0.0, 1.0, 1.0]]), finish=jnp.full((1, 1), FINISH_STOP, jnp.int8)
    )
    probe = _append(rollouts, jnp.array([[-1, 0, -1, 1, 1]]), jnp.array([[8]]), num_steps=2)
    assert texts(probe) == [[5, 8], [5, 1, 8], [5, 1, 2, 3, 8]]


def test_what_does_not_fit_an_empty_answer_and_an_invalid_trajectory_are_not_valid(two_prompts):
    rollouts, step = two_prompts
    rollouts = rollouts.replace(valid=rollouts.valid.at[1, 0].set(False))
    probe = _append(rollouts, step, jnp.array([[8, -1], [-1, -1]]), num_steps=2, max_length=4)
    assert probe.tokens.shape[1] == 4
    assert probe.valid.tolist() == [[True, True, False, True, False], [False] * 5]
    belief = probing.belief(jnp.full(probe.mask.shape, -1.0), probe, group_size=2)
    assert belief.known.tolist() == [[True, True, False], [True, True, False], [False] * 3, [False] * 3]
    assert belief.length.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert np.all(np.isfinite(belief.logp))


def test_the_belief_is_the_models_log_prob_of_the_answer(two_prompts):
    rollouts, step = two_prompts
    policy = tiny.policy()
    params = policy.init(jax.random.key(0))
    answer = jnp.array([[7, -1], [3, 7]])
    probe = _append(rollouts, step, answer, num_steps=2)
    logp = jax.jit(models.score(policy), static_argnums=2)(params, probe, LOGP, jax.random.key(1)).logp
    belief = probing.belief(logp, probe, group_size=2)

    @jax.jit
    def log_probs(sequence):
        hidden, _ = policy.hidden(params, sequence[None], jnp.arange(sequence.size)[None])
        return jax.nn.log_softmax(models.logits(policy.unembed(params), hidden))[0]

    def expected(prompt, tokens):
        text = prompt + tokens
        log_p = log_probs(jnp.array(text + [0] * (8 - len(text))))  # what stands behind it is not seen
        return sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(tokens))

    cases = {(0, 0): ([5], [7]), (0, 2): ([5, 1, 2, 3], [7]), (1, 1): ([5, 4], [7]), (3, 1): ([6, 6, 2, 3], [3, 7])}
    for (row, place), (prompt, tokens) in cases.items():
        np.testing.assert_allclose(belief.logp[row, place], expected(prompt, tokens), rtol=1e-5)
    assert belief.known.tolist() == [[True, True, True], [True, True, False], [True] * 3, [True, True, False]]


def test_the_same_text_after_a_longer_prompt_comes_back_to_its_places(two_prompts):
    rollouts, _ = two_prompts
    probe = probing.insert_after_prompt(rollouts, [3, 4])
    assert texts(probe)[:3] == [[5, 3, 4, 1, 2, 3], [5, 3, 4, 4], [6, 6, 3, 4, 1, 1]]
    np.testing.assert_array_equal(
        probing.removed_again(probe.tokens * probe.mask, rollouts), rollouts.tokens * rollouts.mask
    )
    with pytest.raises(ValueError, match="tokens"):
        probing.insert_after_prompt(rollouts, [])


def probed(role="policy", needs=None, name="gold", read="gold") -> Method:
    """REINFORCE whose reward is what the policy thinks of token 2 as the answer."""

    def probes(rollouts):
        answer = jnp.full((rollouts.num_prompts, 1), 2)
        step = jnp.where(rollouts.mask > 0, 0, -1)
        return {name: (probing.append_after_steps(rollouts, step, answer, num_steps=1), role)}

    def targets(state, rollouts, stats, key):
        del key
        probe, _ = probes(rollouts)[name]
        belief = probing.belief(stats[f"probe/{read}"].logp, probe, group_size=rollouts.group_size)
        reward = jnp.where(belief.known[:, 1], belief.logp[:, 1], 0.0)
        return Targets(reward[:, None] * rollouts.valid_mask, rollouts.valid_mask, rollouts.logp), state

    def loss(stats, rollouts, targets):
        return {"policy": Term(-stats["policy"].logp * targets.advantages, targets.mask, "token_mean")}

    fields = {"policy": LOGP, "probe/gold": LOGP} if needs is None else needs
    return Method(targets, loss, needs=fields, probes=probes)


@pytest.fixture(scope="module")
def whole():
    """A batch, and the state and metrics after a step on it as a whole."""
    batch = tiny.batch()
    return batch, *tiny.one_step(probed(), batch)


def test_what_probes_cost_and_how_many_of_them_are_valid_is_measured(whole):
    batch, _, metrics = whole
    group, length = batch.group_size, batch.tokens.shape[1]
    assert metrics["probe/gold/cost"] == pytest.approx((1 + group) * (length + 1) / (group * length))
    asked = batch.num_prompts * (1 + group)
    assert metrics["probe/gold/valid"] == pytest.approx((asked - 1) / asked)


@pytest.mark.nightly  # on every commit probes of tabular policies are cut and spread, in `test_invariance`
@pytest.mark.parametrize(
    "options",
    [{"micro_batches": 4}, {"mesh": {"fsdp": 4}}, {"mesh": {"fsdp": 2}, "micro_batches": 2}],
    ids=str,
)
def test_an_update_from_probes_does_not_depend_on_micro_batches_or_devices(options, whole):
    options = {name: make_mesh(**value) if name == "mesh" else value for name, value in options.items()}
    batch, plain, _ = whole
    other, _ = tiny.one_step(probed(), batch, **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        jax.device_get(plain.params),
        jax.device_get(other.params),
    )


def two_probes() -> Method:
    """The policy's view of two answers to the same texts, whose difference is the reward."""

    def probes(rollouts):
        step = jnp.where(rollouts.mask > 0, 0, -1)
        made = {}
        for name, token in (("two", 2), ("five", 5)):
            answer = jnp.full((rollouts.num_prompts, 1), token)
            made[name] = (probing.append_after_steps(rollouts, step, answer, num_steps=1), "policy")
        return made

    def targets(state, rollouts, stats, key):
        del key
        views = [
            probing.belief(stats[f"probe/{name}"].logp, probe, group_size=rollouts.group_size).logp[:, 1]
            for name, (probe, _) in probes(rollouts).items()
        ]
        return Targets((views[0] - views[1])[:, None] * rollouts.valid_mask, rollouts.valid_mask, rollouts.logp), state

    def loss(stats, rollouts, targets):
        return {"policy": Term(-stats["policy"].logp * targets.advantages, targets.mask, "token_mean")}

    return Method(targets, loss, needs={"policy": LOGP, "probe/two": LOGP, "probe/five": LOGP}, probes=probes)


def test_probes_of_one_role_and_shape_share_a_forward_pass_and_keep_their_own_numbers():
    batch, calls = tiny.batch(), []
    policy, method = tiny.policy(), two_probes()
    plain = models.score(policy)

    def counting(params, rollouts, fields, key):
        calls.append(rollouts.tokens.shape[1])
        return plain(params, rollouts, fields, key)

    def kept(state, rollouts, stats, key):
        found, _ = method.targets((), rollouts, stats, key)
        return found, {name: stats[f"probe/{name}"].logp for name in state}

    texts = {name: made for name, (made, _) in method.probes(batch).items()}
    empty = {name: jnp.zeros(made.tokens.shape) for name, made in texts.items()}
    params = policy.init(jax.random.key(0))
    method_kept = method._replace(targets=kept, init=lambda rollouts, num_prompts: empty)
    state = training.init({"policy": params}, method_kept, optax.sgd(0.1), jax.random.key(1))
    state, _ = training.make_step(counting, method_kept, optax.sgd(0.1))(state, batch)
    assert calls.count(batch.tokens.shape[1] + 1) == 1  # one pass is in the program
    for name, made in texts.items():
        expected = jax.jit(plain, static_argnums=2)(params, made, LOGP, jax.random.key(0)).logp
        np.testing.assert_allclose(state.method_state[name], expected, atol=1e-5)


def test_the_stages_of_a_chain_have_probes_of_their_own():
    _, metrics = tabular.one_step(methods.chain(probed(), plain=methods.reinforce()), tabular.batch())
    assert "probe/gold/tokens" in metrics
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (probed(name="silver"), "probes are"),
        (probed(needs={"policy": LOGP}), "needs name"),
        (probed(role="teacher"), "teacher"),
    ],
)
def test_probes_that_do_not_fit_the_needs_are_refused_with_what_to_change(method, message):
    state = training.init({"policy": tabular.table(0)}, method, optax.sgd(0.1), jax.random.key(1))
    step = tabular.make_step(method)
    with pytest.raises(ValueError, match=message):
        step(state, tabular.batch())
