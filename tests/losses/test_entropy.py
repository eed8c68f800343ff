import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.losses.entropy import (
    adaptive_entropy_coefficient,
    entropy_change_by_percentile,
    entropy_overlap,
    top_entropy_mask,
)
from tests.advantages.compiled import compiled

adaptive_entropy_coefficient, entropy_change_by_percentile, entropy_overlap, top_entropy_mask = map(
    compiled, (adaptive_entropy_coefficient, entropy_change_by_percentile, entropy_overlap, top_entropy_mask)
)


def test_the_tokens_of_highest_entropy_are_kept_over_the_whole_batch():
    # Ten tokens count, the two largest are 0.9 and 0.8, both in the second row; the masked 5.0 is no competitor.
    entropy = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5, 5.0], [0.6, 0.9, 0.8, 0.7, 0.0, 5.0]])
    mask = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]])
    kept = top_entropy_mask(entropy, mask, fraction=0.2)
    assert kept.tolist() == [[0.0] * 6, [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
def test_the_kept_share_and_threshold_agree_with_numpy_quantiles(fraction):
    rng = np.random.default_rng(0)
    entropy, mask = rng.gamma(0.5, size=(7, 31)), rng.random((7, 31)) < 0.6
    with jax.enable_x64(True):
        kept = np.asarray(jax.jit(top_entropy_mask, static_argnames="fraction")(entropy, mask, fraction=fraction))
    threshold = np.quantile(entropy[mask], 1 - fraction)
    np.testing.assert_array_equal(kept, (entropy >= threshold) & mask)
    assert abs(kept.sum() - fraction * mask.sum()) <= 1


def test_of_ten_entropies_the_two_highest_pass_the_interpolated_quantile_of_072():
    entropy = jnp.arange(10)[None] / 10
    assert top_entropy_mask(entropy, jnp.ones((1, 10)), fraction=0.2).tolist() == [[0.0] * 8 + [1.0] * 2]


def test_with_a_quantile_of_its_own_every_sequence_keeps_its_share():
    entropy = jnp.array([[0.0, 0.1, 0.2, 0.3], [5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 9.0, 9.0]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    kept = top_entropy_mask(entropy, mask, fraction=0.5, level="sequence")
    assert kept.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert top_entropy_mask(entropy, mask, fraction=0.5).tolist() == [[0] * 4, [1] * 4, [0, 1, 0, 0]]


def test_the_overlap_is_the_share_of_chosen_tokens_that_the_other_model_chooses_too():
    rng = np.random.default_rng(1)
    entropy, other, mask = rng.random((6, 30)), rng.random((6, 30)), rng.random((6, 30)) < 0.7
    other = np.where(rng.random((6, 30)) < 0.5, entropy, other)
    found = jax.jit(entropy_overlap)(entropy, other, mask)
    one, two = ((x >= np.quantile(x[mask], 0.8)) & mask for x in (entropy, other))
    np.testing.assert_allclose(found, (one & two).sum() / one.sum(), rtol=1e-6)
    assert 0.3 < float(found) < 0.9
    assert float(entropy_overlap(entropy, entropy, mask)) == 1
    assert float(entropy_overlap(entropy, other, mask & False)) == 0


def test_the_change_by_percentile_is_that_of_a_loop_over_sorted_tokens():
    rng = np.random.default_rng(2)
    before, mask = rng.random((5, 40)), rng.random((5, 40)) < 0.6
    now = before + rng.normal(size=(5, 40))
    change, count = jax.jit(entropy_change_by_percentile, static_argnames="bins")(now, before, mask, bins=7)
    order = np.argsort(before[mask])
    parts = np.arange(order.size) * 7 // order.size
    for part in range(7):
        members = order[parts == part]
        np.testing.assert_allclose(change[part], np.mean((now - before)[mask][members]), rtol=1e-4, atol=1e-6)
        assert int(count[part]) == members.size
    change, count = entropy_change_by_percentile(now, before, mask & False, bins=3)
    assert change.tolist() == count.tolist() == [0.0, 0.0, 0.0]


def test_equal_entropies_keep_every_token_and_an_empty_mask_none():
    assert top_entropy_mask(jnp.full((2, 3), 0.7), jnp.ones((2, 3))).tolist() == [[1.0] * 3] * 2
    assert top_entropy_mask(jnp.full((2, 3), 0.7), jnp.zeros((2, 3))).tolist() == [[0.0] * 3] * 2
    entropy = jnp.array([[1.0, jnp.nan]])
    assert top_entropy_mask(entropy, jnp.array([[1, 0]])).tolist() == [[1.0, 0.0]]


def test_the_indicator_has_no_gradient_and_is_float32_or_wider():
    entropy, mask = jnp.array([[0.1, 0.9]], jnp.bfloat16), jnp.ones((1, 2))
    assert top_entropy_mask(entropy, mask).dtype == jnp.float32
    gradient = jax.jit(jax.grad(lambda h: top_entropy_mask(h, mask).sum()))(entropy.astype(jnp.float32))
    assert gradient.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_share_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        top_entropy_mask(jnp.ones((1, 2)), jnp.ones((1, 2)), fraction=fraction)
    with pytest.raises(ValueError, match="mask must have the shape of entropy"):
        top_entropy_mask(jnp.ones((1, 2)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match='level must be "batch" or "sequence"'):
        top_entropy_mask(jnp.ones((1, 2)), jnp.ones((1, 2)), level="group")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bins must be at least 1"):
        entropy_change_by_percentile(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)), bins=0)


@pytest.mark.parametrize(
    ("coefficient", "entropy", "following", "applied"),
    [
        (0.10, 0.1, 0.105, 0.10),  # below the target: applied, and stronger next time
        (0.10, 0.2, 0.105, 0.10),  # at the target it acts
        (0.10, 0.3, 0.095, 0.00),  # above: not applied, and weaker next time
        (0.00, 0.3, 0.000, 0.00),  # never below low
        (1.00, 0.1, 1.000, 1.00),  # never above high
    ],
)
def test_the_entropy_coefficient_moves_by_a_step_and_acts_at_or_below_its_target(
    coefficient, entropy, following, applied
):
    found = jax.jit(lambda c, h: adaptive_entropy_coefficient(c, h, target=0.2))(coefficient, entropy)
    np.testing.assert_allclose(found, [following, applied], atol=1e-7)


def test_the_coefficient_is_a_constant_and_its_arguments_are_checked():
    gradient = jax.jit(jax.grad(lambda h: sum(adaptive_entropy_coefficient(0.1, h, target=0.2))))(0.1)
    assert float(gradient) == 0
    with jax.enable_x64(True):
        assert adaptive_entropy_coefficient(jnp.float64(0.1), jnp.float64(0.1), target=0.2)[0].dtype == jnp.float64
    for option in ("target", "delta"):
        with pytest.raises(ValueError, match=f"{option} must be >= 0"):
            adaptive_entropy_coefficient(0.1, 0.1, **{"target": 0.2, option: -1.0})
    with pytest.raises(ValueError, match="low must not be above high"):
        adaptive_entropy_coefficient(0.1, 0.1, target=0.2, low=0.5, high=0.1)
