"""GSPO, GMPO and VESPO against their sequence forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.losses.sequence_ratio import gmpo, gspo, sequence_log_ratio, vespo, vespo_weight
from tests.advantages.compiled import all_compiled, compiled

losses = all_compiled(losses)
gmpo, gspo, sequence_log_ratio, vespo, vespo_weight = map(
    compiled, (gmpo, gspo, sequence_log_ratio, vespo, vespo_weight)
)


def _random(seed, rows=8, length=7, spread=0.3):
    """Ragged masks with masked spans inside, one advantage per sequence."""
    rng = np.random.default_rng(seed)
    old_logp = -rng.random((rows, length)) * 3
    logp = old_logp + rng.normal(size=(rows, length)) * spread
    mask = (rng.random((rows, length)) < 0.7).astype(float)
    mask[:, 1] = 1
    advantages = np.repeat(rng.normal(size=(rows, 1)), length, axis=1)
    return logp, old_logp, advantages, mask


def _numerical_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


def _value_and_gradient(loss, logp, *constants, mode="seq_mean_token_mean", **options):
    def total(logp):
        return losses.aggregate(loss(logp, *constants, **options), constants[-1], mode)

    return jax.jit(jax.value_and_grad(total))(jnp.asarray(logp))


def _gspo_sequences(logp, old_logp, advantages, mask, low, high, normalize=True):
    terms = []
    for row in range(len(logp)):
        inside = mask[row] > 0
        d = (logp - old_logp)[row, inside]
        s = np.exp(d.mean() if normalize else d.sum())
        a = advantages[row, 0]
        terms.append(-min(s * a, np.clip(s, 1 - low, 1 + high) * a))
    return np.array(terms)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_token_form_of_gspo_has_value_and_gradient_of_the_sequence_form(normalize):
    logp, old_logp, advantages, mask = _random(0)

    def objective(logp):
        return _gspo_sequences(logp, old_logp, advantages, mask, 0.02, 0.03, normalize).mean()

    with jax.enable_x64(True):
        options = {"clip_low": 0.02, "clip_high": 0.03, "normalize_length": normalize}
        value, gradient = _value_and_gradient(gspo, logp, old_logp, advantages, mask, **options)
        np.testing.assert_allclose(value, objective(logp), rtol=1e-12)
        np.testing.assert_allclose(gradient, _numerical_gradient(objective, logp), atol=1e-8)
    rows = np.any(np.asarray(gradient) != 0, axis=1)
    assert 0 < rows.sum() < len(rows)  # some sequences are clipped, as a whole


def test_luspo_is_gspo_summed_over_tokens():
    logp, old_logp, advantages, mask = _random(1)

    def objective(logp):
        return np.mean(_gspo_sequences(logp, old_logp, advantages, mask, 0.1, 0.15) * mask.sum(axis=1))

    with jax.enable_x64(True):
        value, gradient = _value_and_gradient(
            gspo, logp, old_logp, advantages, mask, mode="seq_mean_token_sum", clip_low=0.1, clip_high=0.15
        )
        np.testing.assert_allclose(value, objective(logp), rtol=1e-12)
        np.testing.assert_allclose(gradient, _numerical_gradient(objective, logp), atol=1e-8)


def test_luspo_with_a_kl_term_does_not_count_padding():
    # A known defect elsewhere: the mean over all positions divides by pads too.
    logp, old_logp, advantages, mask = _random(2)

    def loss(*arrays):
        logp, old_logp, advantages, mask = map(jnp.asarray, arrays)
        term = losses.aggregate(gspo(logp, old_logp, advantages, mask), mask, "seq_mean_token_sum")
        return term + 0.1 * losses.aggregate(losses.kl(logp, old_logp, "k3"), mask, "seq_mean_token_sum")

    padded = [np.pad(x, ((0, 0), (0, 5)), constant_values=9.0) for x in (logp, old_logp, advantages)]
    np.testing.assert_allclose(
        loss(*padded, np.pad(mask, ((0, 0), (0, 5)))), loss(logp, old_logp, advantages, mask), rtol=1e-6
    )


def test_gspo_with_advantages_of_tokens_weighs_each_by_its_own():
    logp, old_logp, _, mask = _random(3)
    advantages = np.random.default_rng(3).normal(size=logp.shape)
    with jax.enable_x64(True):
        gradient = jax.jit(
            jax.grad(lambda x: jnp.sum(gspo(x, old_logp, advantages, mask, clip_low=9.0, clip_high=9.0) * mask))
        )(jnp.asarray(logp))
        s = np.exp(np.sum((logp - old_logp) * mask, axis=1) / mask.sum(axis=1))
        np.testing.assert_allclose(gradient, -s[:, None] * advantages * mask, rtol=1e-10)


def test_sequences_that_gspo_clips_are_those_whose_ratio_is_outside():
    logp, old_logp, advantages, mask = map(jnp.asarray, _random(4, rows=40))
    ratio = sequence_log_ratio(logp, old_logp, mask)
    clipped = losses.clipped_region(ratio, jnp.zeros(40), advantages[:, 0], clip_low=0.05, clip_high=0.05)
    gradient = jax.jit(jax.grad(lambda x: gspo(x, old_logp, advantages, mask, clip_low=0.05, clip_high=0.05).sum()))(
        logp
    )
    np.testing.assert_array_equal(np.asarray(clipped) == 1, np.all(np.asarray(gradient) == 0, axis=1))
    assert 0 < clipped.sum() < 40


def _gmpo_sequences(logp, old_logp, advantages, mask, low, high):
    terms = []
    for row in range(len(logp)):
        a = advantages[row, 0]
        d = (logp - old_logp)[row, mask[row] > 0]
        clipped = np.sign(a) * np.minimum(np.sign(a) * d, np.sign(a) * np.clip(d, -low, high))
        terms.append(-a * np.exp(clipped.mean()))
    return np.mean(terms)


def test_gmpo_has_value_and_gradient_of_the_geometric_mean_of_clipped_ratios():
    logp, old_logp, advantages, mask = _random(5)

    def objective(logp):
        return _gmpo_sequences(logp, old_logp, advantages, mask, 0.2, 0.3)

    with jax.enable_x64(True):
        value, gradient = _value_and_gradient(gmpo, logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.3)
        np.testing.assert_allclose(value, objective(logp), rtol=1e-12)
        np.testing.assert_allclose(gradient, _numerical_gradient(objective, logp), atol=1e-8)


def test_a_token_that_gmpo_clips_loses_its_own_gradient_and_no_others():
    logp = jnp.array([[0.1, 3.0]])
    ones = jnp.ones((1, 2))
    gradient = jax.jit(jax.grad(lambda x: gmpo(x, jnp.zeros((1, 2)), ones, ones).sum()))(logp)
    np.testing.assert_allclose(gradient, [[-np.exp((0.1 + 0.4) / 2), 0.0]], rtol=1e-6)


def test_gmpo_does_not_change_when_a_batch_is_split():
    # A known defect elsewhere: its mean is over the micro-batch, whatever the global batch is.
    logp, old_logp, advantages, mask = map(jnp.asarray, _random(6))
    whole = losses.aggregate(gmpo(logp, old_logp, advantages, mask), mask, "seq_mean_token_mean")
    denominator = losses.denominator(mask, "seq_mean_token_mean")
    parts = [
        losses.aggregate(
            gmpo(*(x[rows] for x in (logp, old_logp, advantages, mask))),
            mask[rows],
            "seq_mean_token_mean",
            denominator=denominator,
        )
        for rows in (slice(0, 3), slice(3, 8))
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("w", "advantage", "expected"),
    [(1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (2.0, 1.0, 4 * np.exp(-3)), (2.0, -1.0, 8 * np.exp(-2)), (0.5, -1.0, np.e / 8)],
)
def test_the_weight_of_vespo_is_the_gamma_shape_of_the_product_of_ratios(w, advantage, expected):
    logp = jnp.log(jnp.array([[w, 1.0, 0.5]]))  # the last token is masked
    mask = jnp.array([[1.0, 1.0, 0.0]])
    weight = vespo_weight(logp, jnp.zeros((1, 3)), jnp.full((1, 3), advantage), mask)
    np.testing.assert_allclose(weight, np.full((1, 3), expected), rtol=1e-5)


def test_the_weight_of_vespo_is_largest_where_the_ratio_is_k_over_lambda():
    w = np.linspace(0.05, 4, 400)
    logp, ones = jnp.log(jnp.asarray(w))[:, None], jnp.ones((400, 1))
    for sign, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        weight = np.asarray(vespo_weight(logp, 0 * logp, sign * ones, ones))[:, 0]
        assert abs(w[weight.argmax()] - peak) < 0.02


def test_a_token_without_trust_does_not_take_the_sequence_of_vespo_with_it():
    # A known defect elsewhere: one token whose correction is 0 enters the product as e^-18.4.
    logp, mask = jnp.full((1, 4), -0.5), jnp.array([[1.0, 0.0, 1.0, 1.0]])
    sampler = jnp.array([[-0.5, -19.0, -0.5, -0.5]])
    np.testing.assert_allclose(vespo_weight(logp, sampler, jnp.ones((1, 4)), mask), np.ones((1, 4)))


def test_vespo_is_the_policy_gradient_times_its_weight():
    logp, old_logp, advantages, mask = map(jnp.asarray, _random(7))
    gradient = jax.jit(jax.grad(lambda x: (vespo(x, old_logp, advantages, mask) * mask).sum()))(logp)
    weight = vespo_weight(logp, old_logp, advantages, mask)
    np.testing.assert_allclose(gradient, -weight * advantages * mask, rtol=1e-6)


@pytest.mark.parametrize("loss", [gspo, gmpo, vespo])
def test_what_stands_under_the_mask_reaches_neither_values_nor_gradients(loss):
    logp, old_logp, advantages, mask = map(jnp.asarray, _random(8))
    spoiled = jnp.where(mask > 0, logp, jnp.nan)
    one, other = (_value_and_gradient(loss, x, old_logp, advantages, mask) for x in (logp, spoiled))
    np.testing.assert_allclose(other[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(other[1], one[1], rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_that_cannot_be_leaves_a_sequence_s_loss_finite(advantage):
    logp, one = jnp.array([[-1.0, -jnp.inf], [-1.0, -2.0]]), jnp.ones((2, 2))
    value, gradient = _value_and_gradient(gspo, logp, 0 * one - 1, advantage * one, one)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (gspo, {"clip_low": -1e-4}, "clip_low must be >= 0"),
        (gspo, {"clip_high": -1e-4}, "clip_high must be >= 0"),
        (gmpo, {"clip_high": -0.4}, "clip_high must be >= 0"),
        (vespo, {"k_pos": -1.0}, "k_pos must be >= 0"),
        (vespo, {"lambda_neg": -1.0}, "lambda_neg must be >= 0"),
    ],
)
def test_options_without_meaning_are_refused(loss, options, message):
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        loss(one, one, one, one, **options)


@pytest.mark.parametrize("loss", [gspo, gmpo, vespo])
def test_losses_of_sequences_ask_for_tokens(loss):
    with pytest.raises(
        ValueError, match=r"logp must be \[B, T\], got shape \(4,\); sums over a sequence need its tokens"
    ):
        loss(*[jnp.zeros(4)] * 4)
