"""What holds of every named advantage and every named loss, whatever it computes.

The tables of `methods` are gone through, so that a new name is tested by being there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from jaxrl_post.methods import credit, surrogate
from jaxrl_post.methods.choices import call_by_name, inputs

P, G, T = 3, 4, 5
INVARIANT = settings(max_examples=25, deadline=None, derandomize=True)

ABSOLUTE = {
    "reinforce": "it has no baseline",
    "remax": "its baseline is another answer's reward",
    "reinforce_plus_plus": "its baseline is the batch's mean reward-to-go, which is not that of a row",
    "gpg": "its scale counts the rewards that are not 0",
    "maxrl": "it divides by the mean reward",
}
"""Advantages that a number added to all rewards of a prompt does change, with the reason."""


def advantage(name, rewards, valid=None, mask=None, lengths=None):
    """`[P, G]` rewards to `[P, G]` advantages (of the first trained token, where they are per token)."""
    function = credit.ON_GROUPS.get(name) or credit.ON_TOKENS[name]
    rewards = jnp.asarray(rewards)
    mask = jnp.ones((rewards.size, T), rewards.dtype) if mask is None else mask
    valid = jnp.ones(rewards.shape, bool) if valid is None else valid
    per_token = jnp.zeros((rewards.size, T), rewards.dtype).at[:, -1].set(rewards.reshape(-1))
    lengths = jnp.arange(1.0, rewards.shape[1] + 1) * jnp.ones_like(rewards) if lengths is None else lengths
    found = call_by_name(
        function,
        {
            "rewards": rewards if name in credit.ON_GROUPS else per_token,
            "valid": valid,
            "mask": mask * valid.reshape(-1, 1),
            "lengths": lengths,
            "greedy_rewards": jnp.full(rewards.shape[:1], 0.25, rewards.dtype),
        },
    )
    found = found[0] if isinstance(found, tuple) else found
    return found if found.shape == rewards.shape else found[:, -1].reshape(rewards.shape)


@functools.cache
def compiled(name):
    """One program for all rewards of a shape: what is left out is filled in before the call."""
    run = jax.jit(functools.partial(advantage, name))

    def call(rewards, valid=None, lengths=None):
        valid = np.ones(rewards.shape, bool) if valid is None else valid
        lengths = np.arange(1.0, rewards.shape[1] + 1) * np.ones_like(rewards) if lengths is None else lengths
        return run(rewards, valid=valid, lengths=lengths.astype(rewards.dtype))

    return call


ADVANTAGES = sorted(credit.ON_GROUPS | credit.ON_TOKENS)
rewards_strategy = npst.arrays(np.float32, (P, G), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 2.0]))


@functools.cache
def compiled_at_once(name):
    """One program for several rewards."""
    return jax.jit(lambda *several: [advantage(name, rewards) for rewards in several])


SMALL_EQUAL_OR_EXTREME = {
    "single": np.zeros((2, 1)),
    "equal": np.ones((2, 2)),
    "two": [[1.0, 0.0]],
    "one differs": [[0.35] + [0.95] * 7],
    "huge": [[1e30, -1e30, 1e30, 0.0]],
}


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.nightly)])
def test_an_advantage_is_finite_and_float32_where_groups_are_small_equal_or_extreme(name, dtype):
    rows = compiled_at_once(name)(*(jnp.asarray(rewards, dtype) for rewards in SMALL_EQUAL_OR_EXTREME.values()))
    for kind, found in zip(SMALL_EQUAL_OR_EXTREME, rows, strict=True):
        assert found.dtype == jnp.float32, kind
        if kind != "huge":  # squares of 1e30 are beyond float32, but a plain difference is not
            assert bool(jnp.all(jnp.isfinite(found))), kind
            assert float(jnp.max(jnp.abs(found))) < 1001, kind


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_advantage_of_an_empty_batch_is_zero_with_a_finite_gradient(name):
    rewards, nothing = jnp.array([[1.0, 0.0], [0.5, 2.0]]), jnp.zeros((2, 2), bool)

    def total(rewards):
        return jnp.sum(advantage(name, rewards, nothing))

    value, gradient = jax.jit(jax.value_and_grad(total))(rewards)
    assert float(value) == 0
    assert bool(jnp.all(gradient == 0))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_advantage_is_the_same_jitted_and_vmapped_and_float64_stays_float64(name):
    rng = np.random.default_rng(1)
    rewards = rng.choice([0.0, 0.25, 1.0], (2, P, G))
    one_by_one = [advantage(name, jnp.asarray(r, jnp.float32)) for r in rewards]
    both = jax.jit(jax.vmap(functools.partial(advantage, name)))(jnp.asarray(rewards, jnp.float32))
    np.testing.assert_allclose(both, jnp.stack(one_by_one), rtol=2e-6, atol=2e-6)
    with jax.enable_x64(True):
        wide = compiled(name)(jnp.asarray(rewards[0], jnp.float64))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, one_by_one[0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
@INVARIANT
@given(rewards=rewards_strategy, data=st.data())
def test_the_order_of_a_groups_rollouts_does_not_matter(name, rewards, data):
    if name in ("mc_grpo", "pass_at_k"):  # of equal rewards they pick the first; the values are those of any order
        rewards = rewards + np.arange(G, dtype=np.float32) / 64
    order = np.array(data.draw(st.permutations(range(G))))
    lengths = np.arange(1.0, G + 1) * np.ones((P, 1))
    plain = compiled(name)(rewards, lengths=lengths)
    permuted = compiled(name)(rewards[:, order], lengths=lengths[:, order])
    np.testing.assert_allclose(permuted, plain[:, order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - set(ABSOLUTE)))
@INVARIANT
@given(rewards=rewards_strategy, offset=npst.arrays(np.float32, (P, 1), elements=st.sampled_from([-4.0, 0.5, 16.0])))
def test_a_number_added_to_all_rewards_of_a_prompt_changes_nothing(name, rewards, offset):
    np.testing.assert_allclose(compiled(name)(rewards + offset), compiled(name)(rewards), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ADVANTAGES)
@INVARIANT
@given(rewards=rewards_strategy, junk=st.sampled_from([0.0, 7.0, np.inf, np.nan]))
def test_an_invalid_rollout_is_as_if_it_were_not_there(name, rewards, junk):
    without = compiled(name)(rewards)
    padded = np.concatenate([rewards, np.full((P, 1), junk, np.float32)], axis=1)
    valid = np.arange(G + 1)[None] < G
    got = compiled(name)(padded, np.broadcast_to(valid, padded.shape))
    np.testing.assert_allclose(got[:, :G], without, rtol=1e-4, atol=1e-4)
    assert bool(jnp.all(got[:, G] == 0))


def loss_inputs(dtype=jnp.float32, seed=0, rows=4):
    rng = np.random.default_rng(seed)
    mask = (np.arange(T) < rng.integers(1, T + 1, (rows, 1))).astype(np.float32)
    mask[0, 1 : T - 1] = [0] * (T - 2)  # a span inside that the policy did not choose
    old = rng.uniform(-3, -0.1, (rows, T))
    fields = {
        "logp": old + rng.normal(0, 0.3, (rows, T)),
        "old_logp": old,
        "ref_logp": old + rng.normal(0, 0.2, (rows, T)),
        "sampler_logp": old + rng.normal(0, 0.1, (rows, T)),
        "entropy": rng.uniform(0.1, 2, (rows, T)),
        "advantages": rng.normal(0, 1, (rows, 1)) * mask,
    }
    step = jnp.asarray(np.broadcast_to(np.arange(T) // 2, (rows, T)))
    whole = {"mask": jnp.asarray(mask), "step": step, "extras": {}}
    return {name: jnp.asarray(x, dtype) for name, x in fields.items()} | whole


LOSSES = sorted(surrogate.LOSSES)


def total(name, given):
    value = call_by_name(surrogate.LOSSES[name], given)
    mask = given["mask"] if value.ndim == 2 else jnp.max(given["mask"], axis=1)
    return jnp.sum(jnp.where(mask > 0, value, 0.0))


@functools.cache
def sloped(name):
    """`given -> (value, (total, slope))` of a loss, compiled once for all tests of the same shapes."""

    def of(logp, given):
        return total(name, given | {"logp": logp})

    def run(given):
        return call_by_name(surrogate.LOSSES[name], given), jax.value_and_grad(of)(given["logp"], given)

    return jax.jit(run)


def slope(name, given):
    return sloped(name)(given)[1][1]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_at_the_sampling_policy_has_the_policy_gradient(name):
    # At ratio 1 every surrogate is -A log pi to first order, up to the weight that a sequence's tokens share.
    inputs_ = loss_inputs()
    inputs_ |= {"old_logp": inputs_["logp"], "sampler_logp": inputs_["logp"]}
    gradient, mask = np.asarray(slope(name, inputs_)), np.asarray(inputs_["mask"])
    expected = -np.asarray(inputs_["advantages"]) * mask
    for row in range(mask.shape[0]):
        on, total_ = mask[row] > 0, expected[row].sum()
        if name in SHARED_WEIGHT:  # proportional, with one factor for the sequence
            factor = gradient[row].sum() / total_
            assert factor > 0
            np.testing.assert_allclose(gradient[row][on], factor * expected[row][on], rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_allclose(gradient[row][on], expected[row][on], rtol=1e-4, atol=1e-6)
    assert np.all(gradient[mask == 0] == 0) or "mask" not in inputs(surrogate.LOSSES[name])


SHARED_WEIGHT: dict[str, str] = {}
"""Losses of whole sequences, whose gradient at ratio 1 is the policy gradient times a number per sequence."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_gradient_stays_float64_and_agrees_with_float32(name):
    narrow = slope(name, loss_inputs(seed=2))
    with jax.enable_x64(True):
        gradient = slope(name, loss_inputs(jnp.float64, seed=2))
        assert gradient.dtype == jnp.float64
        np.testing.assert_allclose(narrow, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_loss_is_finite_and_float32_far_from_the_sampling_policy(name, dtype):
    given_ = loss_inputs(dtype)
    for gap in (-200.0, 200.0):
        far = given_ | {"logp": (given_["old_logp"] + gap).astype(dtype)}
        value, (_, gradient) = sloped(name)(far)
        assert value.dtype == jnp.float32
        assert bool(jnp.all(jnp.isfinite(value)))
        assert bool(jnp.all(jnp.isfinite(gradient.astype(jnp.float32))))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_an_empty_mask_is_zero_with_a_zero_gradient(name):
    given_ = loss_inputs()
    nothing = given_ | {"mask": jnp.zeros_like(given_["mask"]), "advantages": jnp.zeros_like(given_["advantages"])}
    _, (value, gradient) = sloped(name)(nothing)
    assert float(value) == 0
    assert bool(jnp.all(jnp.nan_to_num(gradient, nan=1.0) == 0))


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_what_stands_in_it_change_no_loss(name):
    given_ = loss_inputs()
    pad = {
        key: jnp.pad(x, ((0, 0), (0, 2)), constant_values=0 if key in ("mask", "advantages") else -7.0)
        for key, x in given_.items()
        if key != "extras"
    }
    (value, gradient), (padded, padded_gradient) = (sloped(name)(x)[1] for x in (given_, pad | {"extras": {}}))
    np.testing.assert_allclose(padded, value, rtol=1e-5)
    np.testing.assert_allclose(padded_gradient[:, :T], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_flows_into_advantages_or_other_policies(name):
    given_ = loss_inputs()
    others = set(inputs(surrogate.LOSSES[name])) & {"advantages", "old_logp", "sampler_logp", "ref_logp"}
    gradients = jax.jit(jax.grad(lambda x: total(name, given_ | x)))({other: given_[other] for other in others})
    for other, gradient in gradients.items():
        assert bool(jnp.all(gradient == 0)), other
