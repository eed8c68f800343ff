import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from tests.advantages.compiled import all_compiled

losses = all_compiled(losses)

MODES = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm")
MEANS = MODES[:3]


def _horizon(mode):
    return 7 if mode == "seq_mean_token_sum_norm" else None


def _random(seed, rows=8, length=5):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(rows, length)).astype(np.float32)
    mask = (rng.random((rows, length)) < 0.6).astype(np.float32)
    mask[2] = 0  # a row without any token
    return value, mask


def _loop(value, mask, mode):
    rows = [(v[m > 0], m) for v, m in zip(value.astype(np.float64), mask, strict=True) if m.any()]
    if mode == "token_mean":
        return np.concatenate([v for v, _ in rows]).mean()
    if mode == "seq_mean_token_mean":
        return np.mean([v.mean() for v, _ in rows])
    return np.mean([v.sum() for v, _ in rows]) / (7 if mode == "seq_mean_token_sum_norm" else 1)


def test_modes_give_hand_worked_numbers():
    value = jnp.array([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    # Token sums 6 and 10 over 4 tokens in 2 sequences; the third row has no token and is not a sequence.
    assert float(losses.aggregate(value, mask, "token_mean")) == 4  # 16 / 4
    assert float(losses.aggregate(value, mask, "seq_mean_token_sum")) == 8  # (6 + 10) / 2
    assert float(losses.aggregate(value, mask, "seq_mean_token_mean")) == 6  # (2 + 10) / 2
    assert float(losses.aggregate(value, mask, "seq_mean_token_sum_norm", horizon=4)) == 2  # (6 + 10) / (2 * 4)


@pytest.mark.parametrize("mode", MODES)
def test_modes_agree_with_a_float64_loop(mode):
    value, mask = _random(0)
    np.testing.assert_allclose(
        losses.aggregate(value, mask, mode, horizon=_horizon(mode)), _loop(value, mask, mode), rtol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
def test_parts_with_the_denominator_of_the_whole_add_up_to_the_whole(mode):
    value, mask = _random(1)
    horizon = _horizon(mode)
    whole = losses.denominator(mask, mode, horizon=horizon)
    splits = ([], [1, 3], [3], [1, 2, 3, 4, 5, 6, 7])

    @jax.jit
    @jax.jacrev
    def gradients(value):
        # Row 2 is empty and is a part of its own in the last split.
        return jnp.stack([in_parts(value, cuts) for cuts in splits])

    @jax.jit
    def totals(value):
        return jnp.stack([in_parts(value, cuts) for cuts in splits])

    def in_parts(value, cuts):
        parts = zip(jnp.split(value, cuts), np.split(mask, cuts), strict=True)
        return sum(losses.aggregate(v, m, mode, horizon=horizon, denominator=whole) for v, m in parts)

    np.testing.assert_allclose(totals(value), np.full(4, _loop(value, mask, mode)), rtol=1e-6)
    expected = jax.jit(jax.grad(lambda v: losses.aggregate(v, mask, mode, horizon=horizon)))(value)
    for gradient in gradients(value):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_padding_of_rows_and_columns_changes_nothing(mode):
    value, mask = _random(2)
    padded = np.pad(value, ((0, 3), (0, 2)), constant_values=np.nan)
    padded_mask = np.pad(mask, ((0, 3), (0, 2)))
    horizon = _horizon(mode)
    np.testing.assert_allclose(
        losses.aggregate(padded, padded_mask, mode, horizon=horizon),
        losses.aggregate(value, mask, mode, horizon=horizon),
        rtol=1e-6,
    )


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_mask_gives_zero_with_zero_gradient(mode):
    value = jnp.array([[jnp.nan, 1.0], [jnp.inf, 2.0]])
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda v: losses.aggregate(v, jnp.zeros((2, 2)), mode, horizon=_horizon(mode)))
    )(value)
    assert float(loss) == 0
    assert np.all(np.asarray(gradient) == 0)
    assert float(losses.denominator(jnp.zeros((2, 2)), mode, horizon=_horizon(mode))) > 0


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_get_no_gradient_and_counted_ones_their_weight(mode):
    value, mask = _random(3)
    horizon = _horizon(mode)
    gradient = np.asarray(jax.jit(jax.grad(lambda v: losses.aggregate(v, mask, mode, horizon=horizon)))(value))
    sequences = mask.any(axis=1).sum()
    expected = {
        "token_mean": mask / mask.sum(),
        "seq_mean_token_sum": mask / sequences,
        "seq_mean_token_mean": mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / sequences,
        "seq_mean_token_sum_norm": mask / sequences / 7,  # by the sequences too, not by the horizon alone
    }[mode]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_one_number_per_sequence_makes_the_mean_modes_coincide():
    value, mask = jnp.array([1.0, 2.0, 6.0, 99.0]), jnp.array([1, 1, 1, 0])
    assert [float(losses.aggregate(value, mask, mode)) for mode in MEANS] == [3, 3, 3]
    assert [float(losses.denominator(mask, mode)) for mode in MEANS] == [3, 3, 3]


def test_aggregate_runs_under_jit_and_vmap():
    value, mask = _random(4)
    stacked = jnp.stack([value, 2 * value])
    for mode in MEANS:
        batched = jax.jit(jax.vmap(lambda v, mode=mode: losses.aggregate(v, mask, mode)))(stacked)
        np.testing.assert_allclose(batched, [_loop(value, mask, mode), 2 * _loop(value, mask, mode)], rtol=1e-5)


def test_narrow_dtypes_are_raised_and_wide_ones_kept():
    # 1 + 2^-8 thirty-three times: a bfloat16 sum would lose the small part.
    value = jnp.full((1, 33), 1.00390625, jnp.float32).astype(jnp.bfloat16)
    loss = losses.aggregate(value, jnp.ones((1, 33), jnp.bfloat16), "seq_mean_token_sum")
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 33 * float(value[0, 0]), rtol=1e-6)
    with jax.enable_x64(True):
        assert losses.aggregate(jnp.ones((1, 2), jnp.float64), jnp.ones((1, 2)), "token_mean").dtype == jnp.float64


def test_impossible_arguments_are_refused():
    value, mask = jnp.zeros((2, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"mode must be one of token_mean, .* got 'mean'"):
        losses.aggregate(value, mask, "mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs horizon"):
        losses.aggregate(value, mask, "seq_mean_token_sum_norm")
    with pytest.raises(ValueError, match="needs horizon"):
        losses.denominator(mask, "seq_mean_token_sum_norm", horizon=0)
    with pytest.raises(ValueError, match="horizon does not apply to mode 'token_mean', got 4"):
        losses.aggregate(value, mask, "token_mean", horizon=4)
    with pytest.raises(ValueError, match=r"mask must have the shape of value, \(3, 3\), got \(3,\)"):
        losses.aggregate(jnp.zeros((3, 3)), jnp.ones(3), "token_mean")
    with pytest.raises(ValueError, match=r"mask must be \[B, T\] or \[B\], got shape \(1, 2, 3\)"):
        losses.denominator(mask[None], "token_mean")


def test_a_denominator_makes_the_reductions_that_have_no_mode_of_their_own():
    value = jnp.array([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(losses.aggregate(value, mask, "token_mean", denominator=1.0)) == 10.0  # the sum over tokens
    assert float(losses.aggregate(value, mask, "token_mean", denominator=20.0)) == 0.5  # a fixed constant
    assert float(losses.aggregate(value, mask, "seq_mean_token_mean", denominator=3.0)) == 2.0  # (2 + 4 + 0) / 3
    per_sequence = jnp.array([5.0, 7.0, 1.0])
    weighted = losses.aggregate(jnp.broadcast_to(per_sequence[:, None], (3, 3)), mask, "seq_mean_token_sum")
    assert float(weighted) == (5.0 * 3 + 7.0 * 1) / 2  # sequences weighted by their length
