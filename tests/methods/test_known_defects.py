"""Mistakes of released systems that are not ours: for each, where the right number is tested, or the test itself.

The list is of what was seen in their sources; where TRL or verl have it, their stored numbers show it.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, losses, masked, methods
from tests.methods.peer_fixtures import GROUP, PROMPTS, aggregated, assert_close, both, case, stored, valid_mask

ROOT = Path(__file__).parents[2]
HERE = "tests/methods/test_known_defects.py"

# What went wrong, and the tests that it does not here. Weighted preference optimisation, whose weights of sequences
# were once multiplied with masks of tokens, is no method of this family.
WHERE_TESTED = {
    "a leave-one-out deviation of equal rewards is rounding, and is divided by": [
        "tests/advantages/test_group.py::test_leave_one_out_std_never_explodes_when_all_others_are_equal",
        "tests/advantages/test_group.py::test_one_odd_reward_against_equal_others_never_explodes_in_float32",
    ],
    "an unset bound of CISPO scales on-policy tokens down to a fifth": [
        f"{HERE}::test_trls_cispo_with_its_defaults_weighs_on_policy_tokens_by_a_fifth_and_ours_refuses_to",
    ],
    "a mean over tokens relies on advantages of 0 where the mask is": [
        "tests/losses/test_aggregation.py::test_masked_tokens_get_no_gradient_and_counted_ones_their_weight",
        "tests/losses/test_sequence_ratio.py::test_what_stands_under_the_mask_reaches_neither_values_nor_gradients",
    ],
    "whitened advantages are not zero where the mask is": [
        "tests/methods/test_verl_numbers.py::test_gae_is_verls_inside_the_mask_and_zero_outside_where_verls_is_not",
    ],
    "a tool call cuts the credit of the turns before it": [
        "tests/advantages/test_temporal.py::test_reinforce_plus_plus_credits_the_turns_before_a_tool_call",
    ],
    "a straight-through KL estimator raises, or has the wrong gradient": [
        "tests/losses/test_kl.py::test_a_plus_keeps_the_value_and_takes_the_gradient_of_k2",
        "tests/methods/test_verl_numbers.py::test_losses_are_verls",
    ],
    "a denominator is that of the micro-batch, or is missing": [
        "tests/losses/test_aggregation.py::test_parts_with_the_denominator_of_the_whole_add_up_to_the_whole",
        "tests/losses/test_sequence_ratio.py::test_gmpo_does_not_change_when_a_batch_is_split",
    ],
    "rewards to come are discounted from the start of the sequence": [
        f"{HERE}::test_a_token_discounts_what_comes_after_it_from_itself_and_padding_does_not_count",
    ],
    "masking sequences truncates weights that it should leave alone": [
        f"{HERE}::test_sequence_masked_weights_of_kept_tokens_are_as_they_were",
    ],
    "the mean of an empty row is NaN": [
        "tests/test_masked.py::test_an_empty_mask_gives_zero_with_zero_gradient",
        "tests/losses/test_mismatch.py::test_empty_rows_and_masked_nonsense_give_finite_constants_in_float32_or_wider",
    ],
    "a KL term makes LUSPO count padding": [
        "tests/losses/test_sequence_ratio.py::test_luspo_with_a_kl_term_does_not_count_padding",
        "tests/methods/test_trl_numbers.py::test_losses_are_trls",
    ],
    "the cap of DPPO is another than the documented one": [
        "tests/losses/test_surrogates.py::test_the_cap_of_dppo_is_the_documented_twenty",
    ],
    "a clamp of the ratio is documented and not there": [
        f"{HERE}::test_the_ratio_is_clamped_where_it_says_so",
    ],
    "one token without trust annihilates its sequence": [
        f"{HERE}::test_one_masked_token_silences_its_sequence_in_trls_vespo_and_not_in_ours",
    ],
    "two forms of one estimator disagree on a group of one": [
        f"{HERE}::test_verls_two_forms_of_rloo_disagree_on_a_group_of_one_and_ours_gives_it_no_advantage",
    ],
    "log-probs of the whole distribution correct for a sampler that cut it": [
        "tests/losses/test_mismatch.py::"
        "test_weights_of_a_cut_sampler_are_exact_on_what_it_could_choose_only_with_its_own_log_probs",
    ],
    "a deviation over the batch makes advantages smaller than one": [
        f"{HERE}::test_a_deviation_over_the_batch_falls_short_of_one_by_the_share_between_groups",
    ],
}


@pytest.mark.parametrize("defect", WHERE_TESTED)
def test_every_defect_has_its_test(defect):
    for where in WHERE_TESTED[defect]:
        file, name = where.split("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], where


@both
def test_trls_cispo_with_its_defaults_weighs_on_policy_tokens_by_a_fifth_and_ours_refuses_to(number):
    with jax.enable_x64(True):
        x, numbers = case(number), stored("trl")
        a = numbers[f"{number}/advantage/scale_group"].reshape(-1, 1)
        fifth = -np.minimum(np.exp(x["logp"] - x["old"]), 0.2) * a * x["mask"] / x["mask"].sum()
        assert_close(numbers[f"{number}/loss/cispo/grad"], fifth)
    with pytest.raises(ValueError, match="clip_high"):
        losses.cispo(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1)), clip_high=0.2, cap="ratio")
    with pytest.raises(ValueError, match="clip_high"):
        methods.cispo(clip_high=0.2, cap="ratio")
    on_policy = jax.grad(lambda logp: losses.cispo(logp, jnp.zeros((1, 1)), jnp.ones((1, 1))).sum())(jnp.zeros((1, 1)))
    assert on_policy == -1


def test_a_token_discounts_what_comes_after_it_from_itself_and_padding_does_not_count():
    rewards, mask = jnp.ones((1, 6)), jnp.array([[1, 1, 1, 1, 0, 0]])
    found = advantages.reinforce_plus_plus(rewards, mask, gamma=0.5, whiten=False)
    assert found.tolist() == [[1.875, 1.75, 1.5, 1.0, 0.0, 0.0]]


def test_sequence_masked_weights_of_kept_tokens_are_as_they_were():
    rho = jnp.array([[4.0, 0.25, 1.0], [1.5, 1.5, 1.5], [9.0, 9.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    found = losses.importance_weights(
        jnp.log(rho), jnp.zeros((3, 3)), mask, bounds_on="geometric", low=0.9, high=1.1, outside="zero"
    )
    np.testing.assert_allclose(found, [[4.0, 0.25, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], rtol=1e-6)


def test_the_ratio_is_clamped_where_it_says_so():
    far = jnp.array([[100.0, -100.0, 20.0]])
    np.testing.assert_allclose(
        losses.importance_ratio(far, jnp.zeros((1, 3))), np.exp([[20.0, -20.0, 20.0]]), rtol=1e-6
    )


@both
def test_one_masked_token_silences_its_sequence_in_trls_vespo_and_not_in_ours(number):
    with jax.enable_x64(True):
        x, numbers = case(number), stored("trl")
        mask = valid_mask(x)
        a = advantages.per_token(numbers[f"{number}/advantage/scale_group"].reshape(PROMPTS, GROUP), jnp.asarray(mask))
        theirs = numbers[f"{number}/loss/vllm_vespo_token_mask/grad"]
        masked_out = (numbers[f"{number}/correction/vllm_vespo_token_mask"] == 0) & (mask != 0)
        rows = masked_out.any(axis=1) & np.any(np.abs(a) > 0.1, axis=1)
        assert rows.any()
        assert np.max(np.abs(theirs[rows])) < 1e-9
        loss = aggregated(lambda logp: losses.vespo(logp, x["sampler"], a, mask), mask)
        ours, a = np.asarray(jax.grad(loss)(jnp.asarray(x["logp"]))), np.asarray(a)
    # What a row weighs is phi of its whole ratio, however far a single token of it is off.
    w = np.exp(np.sum((x["logp"] - x["sampler"]) * mask, axis=1))
    sign = np.max(a, 1) + np.min(a, 1) >= 0
    k, lam = np.where(sign, 2.0, 3.0), np.where(sign, 3.0, 2.0)
    phi = w**k * np.exp(lam * (1 - w))
    expected = -phi[:, None] * a / mask.sum()
    assert_close(ours, expected)


@both
def test_verls_two_forms_of_rloo_disagree_on_a_group_of_one_and_ours_gives_it_no_advantage(number):
    x, numbers = case(number), stored("verl")
    alone = GROUP * (PROMPTS - 1)
    loop, vectorized = (numbers[f"{number}/advantage/{name}"][alone] for name in ("rloo", "rloo_vectorized"))
    assert np.any(loop != 0)
    assert not np.any(vectorized)
    assert not np.any(advantages.rloo(x["rewards"].astype(np.float32), x["valid"])[-1])


def test_a_deviation_over_the_batch_falls_short_of_one_by_the_share_between_groups():
    rewards = np.random.default_rng(0).normal(size=(64, 8)) + 3 * np.random.default_rng(1).normal(size=(64, 1))
    share = np.sum((rewards - rewards.mean(1, keepdims=True)) ** 2) / np.sum((rewards - rewards.mean()) ** 2)
    assert share < 0.3
    rewards = jnp.asarray(rewards, jnp.float32)
    by_batch = advantages.grpo(rewards, std_level="batch", eps=0.0)
    np.testing.assert_allclose(jnp.mean(jnp.square(by_batch)), share * (512 - 1) / 512, rtol=1e-4)
    # Whitening what is centered has the scale that was wanted.
    ones = jnp.ones((512, 1))
    whitened = advantages.reinforce_plus_plus_baseline(rewards, ones)
    np.testing.assert_allclose(masked.var(whitened, ones), 1.0, rtol=1e-4)
