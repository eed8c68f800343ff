import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.losses.mismatch import (
    effective_sample_size,
    importance_weights,
    mismatch_metrics,
    off_policy_sequence_mask,
    rejection_mask,
)
from tests.advantages.compiled import compiled

effective_sample_size, importance_weights, mismatch_metrics, off_policy_sequence_mask, rejection_mask = map(
    compiled, (effective_sample_size, importance_weights, mismatch_metrics, off_policy_sequence_mask, rejection_mask)
)

# Ratios 3, 1/2 | 1.2, 1.2: products 1.5 and 1.44, geometric means 1.2247 and 1.2.
RATIO = np.array([[3.0, 0.5, 9.0], [1.2, 1.2, 9.0]])
MASK = jnp.array([[1, 1, 0], [1, 1, 0]])


def _pair(ratio):
    sampler = jnp.full(np.shape(ratio), -2.0)
    return sampler + jnp.log(jnp.asarray(ratio)), sampler


def _weights(ratio=RATIO, mask=MASK, **options):
    return importance_weights(*_pair(ratio), mask, **options)


def _kept(ratio=RATIO, mask=MASK, **options):
    return rejection_mask(*_pair(ratio), mask, **options).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"high": None}, [[3.0, 0.5], [1.2, 1.2]]),
        ({"high": 2.0}, [[2.0, 0.5], [1.2, 1.2]]),  # TIS
        ({"low": 0.8, "high": 2.0}, [[2.0, 0.8], [1.2, 1.2]]),
        ({"high": 2.0, "outside": "zero"}, [[0.0, 0.5], [1.2, 1.2]]),
        ({"low": 0.8, "high": 5.0, "outside": "zero"}, [[3.0, 0.0], [1.2, 1.2]]),  # IcePop
        ({"level": "sequence", "high": None}, [[1.5, 1.5], [1.44, 1.44]]),
        ({"level": "sequence", "high": 1.47}, [[1.47, 1.47], [1.44, 1.44]]),
        ({"level": "sequence", "high": 1.47, "outside": "zero"}, [[0.0, 0.0], [1.44, 1.44]]),  # MIS
        ({"level": "geometric", "high": None}, [[1.5**0.5, 1.5**0.5], [1.2, 1.2]]),
        # Sequence-masked TIS: the geometric mean decides, the token's own ratio weighs.
        ({"bounds_on": "geometric", "high": 1.21, "outside": "zero"}, [[0.0, 0.0], [1.2, 1.2]]),
        ({"bounds_on": "geometric", "high": 1.30, "outside": "zero"}, [[3.0, 0.5], [1.2, 1.2]]),
        ({"high": 2.0, "batch_normalize": True}, [[2 / 1.225, 0.5 / 1.225], [1.2 / 1.225, 1.2 / 1.225]]),
        ({"level": "sequence", "high": 9.0, "batch_normalize": True}, [[1.5 / 1.47] * 2, [1.44 / 1.47] * 2]),
    ],
)
def test_weights_give_hand_worked_numbers(options, expected):
    np.testing.assert_allclose(_weights(**options)[:, :2], expected, rtol=1e-6)
    assert _weights(**options)[:, 2].tolist() == [0.0, 0.0]


def _policies(seed=0, vocabulary=3):
    """Log-probs of all sequences of two tokens under two policies whose second step depends on the first, `[9, 2]`."""
    rng = np.random.default_rng(seed)

    def logp():
        first, second = rng.normal(size=vocabulary), rng.normal(size=(vocabulary, vocabulary))
        first = first - np.log(np.exp(first).sum())
        second = second - np.log(np.exp(second).sum(1, keepdims=True))
        pairs = itertools.product(range(vocabulary), repeat=2)
        return np.array([[first[a], second[a, b]] for a, b in pairs])

    return logp(), logp(), rng.normal(size=vocabulary**2)


def test_unbounded_sequence_weights_make_a_mean_over_the_samplers_sequences_exact():
    with jax.enable_x64(True):
        old, sampler, f = _policies()
        weights = importance_weights(old, sampler, jnp.ones((9, 2)), level="sequence", high=None)[:, 0]
        exact = np.sum(np.exp(old.sum(1)) * f)
        np.testing.assert_allclose(np.sum(np.exp(sampler.sum(1)) * weights * f), exact, rtol=1e-12)
        # Normalised weights of the enumeration have a mean of 1 already.
        np.testing.assert_allclose(np.sum(np.exp(sampler.sum(1)) * weights), 1.0, rtol=1e-12)


def test_unbounded_token_weights_are_exact_for_the_first_token_and_neglect_the_prefix_of_the_second():
    with jax.enable_x64(True):
        old, sampler, f = _policies(1)
        weights = importance_weights(old, sampler, jnp.ones((9, 2)), high=None)
        of_first = np.repeat(f[:3], 3)  # a function of the first token alone
        exact = np.sum(np.exp(old.sum(1)) * of_first)
        np.testing.assert_allclose(np.sum(np.exp(sampler.sum(1)) * weights[:, 0] * of_first), exact, rtol=1e-12)
        # The second token's weight corrects its own choice and leaves the sampler's prefixes.
        neglected = np.sum(np.exp(sampler[:, 0] + old[:, 1]) * f)
        np.testing.assert_allclose(np.sum(np.exp(sampler.sum(1)) * weights[:, 1] * f), neglected, rtol=1e-12)
        assert abs(neglected - np.sum(np.exp(old.sum(1)) * f)) > 0.01


def test_truncated_weights_count_each_sequence_with_the_smaller_of_its_two_probabilities():
    # q min(p / q, c) = min(p, c q), and q (p / q) [p / q <= c] = p [p <= c q].
    with jax.enable_x64(True):
        old, sampler, f = _policies(2)
        p, q = np.exp(old.sum(1)), np.exp(sampler.sum(1))
        assert 0 < np.sum(p > 1.5 * q) < 9
        for outside, counted in (("clamp", np.minimum(p, 1.5 * q)), ("zero", p * (p <= 1.5 * q))):
            weights = importance_weights(old, sampler, jnp.ones((9, 2)), level="sequence", high=1.5, outside=outside)
            np.testing.assert_allclose(np.sum(q * weights[:, 0] * f), np.sum(counted * f), rtol=1e-12)


def test_weights_of_a_cut_sampler_are_exact_on_what_it_could_choose_only_with_its_own_log_probs():
    # Top-2 of four tokens: the sampler renormalises 0.5 and 0.3 to 0.625 and 0.375. With the model's own log-probs
    # every ratio is 1 and the mean is that of the sampler.
    p, f = np.array([0.5, 0.3, 0.15, 0.05]), np.array([1.0, -2.0, 7.0, 7.0])
    q = np.array([0.625, 0.375])
    with jax.enable_x64(True):
        old, cut = jnp.log(p[:2])[:, None], jnp.log(q)[:, None]
        right = importance_weights(old, cut, jnp.ones((2, 1)), high=None)[:, 0]
        wrong = importance_weights(old, old, jnp.ones((2, 1)), high=None)[:, 0]
    right, wrong = np.asarray(right), np.asarray(wrong)
    np.testing.assert_allclose(right, [0.8, 0.8], rtol=1e-12)  # the probability of the kept tokens
    np.testing.assert_allclose(np.sum(q * right * f[:2]), np.sum(p[:2] * f[:2]), rtol=1e-12)
    np.testing.assert_allclose(np.sum(q * wrong * f[:2]), np.sum(q * f[:2]), rtol=1e-12)


def test_a_token_outside_the_bounds_leaves_the_weights_of_its_sequence_alone():
    tame = _weights(np.array([[1.1, 0.9, 1.0]]), jnp.ones((1, 3)), low=0.5, high=2.0, outside="zero")
    wild = _weights(np.array([[1.1, 0.9, 9.0]]), jnp.ones((1, 3)), low=0.5, high=2.0, outside="zero")
    np.testing.assert_array_equal(tame[:, :2], wild[:, :2])
    assert float(wild[0, 2]) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"high": 2.5}, [[0, 1], [1, 1]]),  # low is 1 / 2.5
        ({"high": 3.5, "low": 0.6}, [[1, 0], [1, 1]]),
        ({"high": None, "low": 0.6}, [[1, 0], [1, 1]]),
        ({"reduce": "seq_sum", "high": 1.47}, [[0, 0], [1, 1]]),
        ({"reduce": "seq_mean", "high": 1.21}, [[0, 0], [1, 1]]),
        ({"reduce": "seq_mean", "high": 1.23}, [[1, 1], [1, 1]]),
        ({"reduce": "seq_max", "low": 0.6, "high": None}, [[0, 0], [1, 1]]),  # one vetoed token takes its sequence
        # log 3 = 1.0986, log 2 = 0.6931, log 1.2 = 0.1823; halves of their squares 0.6035, 0.2402, 0.0166.
        ({"statistic": "k2", "high": 0.5}, [[0, 1], [1, 1]]),
        ({"statistic": "k2", "reduce": "seq_sum", "high": 0.8}, [[0, 0], [1, 1]]),
        ({"statistic": "k2", "reduce": "seq_mean", "high": 0.43}, [[1, 1], [1, 1]]),
        ({"statistic": "k2", "reduce": "seq_max", "high": 0.6}, [[0, 0], [1, 1]]),
        # rho - 1 - log rho: 3 gives 0.9014, 1/2 gives 0.1931, 1.2 gives 0.0177.
        ({"statistic": "k3", "high": 0.9}, [[0, 1], [1, 1]]),
        ({"statistic": "k3", "high": 0.91}, [[1, 1], [1, 1]]),
        ({"statistic": "k3", "reduce": "seq_sum", "high": 1.0}, [[0, 0], [1, 1]]),
        ({"statistic": "k3", "reduce": "seq_mean", "high": 0.55}, [[1, 1], [1, 1]]),
        ({"statistic": "k3", "low": 0.1, "high": None}, [[1, 1], [0, 0]]),
    ],
)
def test_rejection_keeps_hand_worked_tokens(options, expected):
    assert _kept(**options) == [[*row, 0] for row in expected]


def test_rejections_combine_by_taking_the_mask_of_one_as_the_next_ones():
    pair = _pair(RATIO)
    once = rejection_mask(*pair, MASK, high=2.5)
    twice = rejection_mask(*pair, once, reduce="seq_mean", high=1.9)
    assert twice.tolist() == [
        [0, 0, 0],
        [1, 1, 0],
    ]  # of the first row the token with 1/2 was left, which is below 1/1.9


def test_bad_sequences_from_far_away_are_dropped_and_no_others():
    # Mean distances of log pi_old - log pi: 0.6, 0.6, 0.4, 0.6 with mixed signs; masked tokens hold nonsense.
    distance = np.array([[1.0, 0.2, 99.0], [1.0, 0.2, 99.0], [0.8, 0.0, 99.0], [1.0, 0.2, 99.0]])
    advantages = jnp.array([[-1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    mask = jnp.array([[1, 1, 0]] * 4)
    old_logp = jnp.full((4, 3), -1.0)
    kept = off_policy_sequence_mask(old_logp - distance, old_logp, advantages, mask, threshold=0.5)
    assert kept.tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0], [0, 1, 0]]
    # A sequence that has become likelier is never dropped.
    assert off_policy_sequence_mask(old_logp + distance, old_logp, advantages, mask)[:, :2].tolist() == [[1, 1]] * 4


def test_effective_sample_size_is_one_over_one_plus_chi_squared():
    assert float(effective_sample_size(jnp.full(5, 0.3), jnp.ones(5))) == pytest.approx(1.0)
    assert float(effective_sample_size(jnp.array([7.0, 0, 0, 0]), jnp.ones(4))) == pytest.approx(0.25)
    # (1 + 3)^2 / (2 * 10) = 0.8; the masked weight plays no part.
    assert float(effective_sample_size(jnp.array([1.0, 3.0, 1e9]), jnp.array([1, 1, 0]))) == pytest.approx(0.8)
    assert float(effective_sample_size(jnp.array([1e30, 3e30]), jnp.ones(2))) == pytest.approx(0.8)
    assert float(effective_sample_size(jnp.zeros(3), jnp.zeros(3))) == 0


def test_metrics_give_hand_worked_numbers():
    metrics = {name: float(metric.result()) for name, metric in mismatch_metrics(*_pair(RATIO), MASK).items()}
    log3, log2, log12 = np.log(3), np.log(2), np.log(1.2)
    expected = {
        "sampling/kl_k1": -(log3 - log2 + 2 * log12) / 4,
        "sampling/kl_k3": (2 - log3 + (-0.5 + log2) + 2 * (0.2 - log12)) / 4,
        "sampling/logp_difference/mean": (log3 + log2 + 2 * log12) / 4,
        "sampling/logp_difference/max": log3,
        "sampling/ratio/mean": (3 + 0.5 + 2.4) / 4,
        "sampling/ratio/min": 0.5,
        "sampling/ratio/max": 3.0,
        "sampling/ratio/outside": 0.25,
        "sampling/chi2_token": (9 + 0.25 + 2 * 1.44) / 4 - 1,
        "sampling/chi2_sequence": (1.5**2 + 1.44**2) / 2 - 1,
        "sampling/perplexity_ratio": (1.5**-0.5 + 1 / 1.2) / 2,
    }
    assert metrics.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5, err_msg=name)


def test_metrics_of_parts_merge_into_those_of_the_whole():
    rng = np.random.default_rng(0)
    old, sampler, mask = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), (rng.random((6, 5)) < 0.7).astype(np.float32)
    mask[2] = 0
    whole = mismatch_metrics(old, sampler, mask)
    parts = [mismatch_metrics(old[i : i + 2], sampler[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    merged = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    for name, metric in merged.items():
        np.testing.assert_allclose(metric.merge().result(), whole[name].result(), rtol=1e-5, err_msg=name)


def test_the_mean_of_k3_over_the_samplers_tokens_is_the_divergence_from_sampler_to_trained():
    with jax.enable_x64(True):
        p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
        # The mask weighs each token by how often the sampler draws it.
        metrics = mismatch_metrics(*np.log([p, q])[:, :, None], q[:, None])
        names = ("sampling/kl_k3", "sampling/chi2_token", "sampling/ratio/mean")
        kl, chi2, mean = (float(metrics[name].result()) for name in names)
    np.testing.assert_allclose(kl, np.sum(q * np.log(q / p)), rtol=1e-12)
    np.testing.assert_allclose(chi2, np.sum(p**2 / q) - 1, rtol=1e-12)
    np.testing.assert_allclose(mean, 1.0, rtol=1e-12)


EVERYTHING = {
    "token": lambda *x: importance_weights(*x, batch_normalize=True),
    "sequence": lambda *x: importance_weights(*x, level="sequence", outside="zero", batch_normalize=True),
    "geometric": lambda *x: importance_weights(*x, level="geometric", low=0.5),
    "seq-mask-tis": lambda *x: importance_weights(*x, bounds_on="geometric", outside="zero"),
    **{
        f"{statistic}-{reduce}": lambda *x, s=statistic, r=reduce: rejection_mask(*x, statistic=s, reduce=r)
        for statistic in ("k1", "k2", "k3")
        for reduce in ("token", "seq_sum", "seq_mean", "seq_max")
    },
    "opsm": lambda old, sampler, mask: off_policy_sequence_mask(old, sampler, -jnp.ones(old.shape), mask),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_empty_rows_and_masked_nonsense_give_finite_constants_in_float32_or_wider(name):
    function = jax.jit(EVERYTHING[name])
    old = jnp.array([[-1.0, jnp.nan, -1e30], [jnp.nan] * 3, [-500.0, 0.0, -1.0]], jnp.bfloat16)
    sampler = jnp.array([[-1.0, 0.0, -2.0], [jnp.nan] * 3, [0.0, -500.0, -1.0]], jnp.bfloat16)
    mask = jnp.array([[1, 0, 0], [0, 0, 0], [1, 1, 1]])
    result = function(old, sampler, mask)
    assert result.dtype == jnp.float32
    assert np.all(np.isfinite(result))
    assert np.all(np.asarray(result)[np.asarray(mask) == 0] == 0)
    assert function(old, sampler, 0 * mask).tolist() == [[0.0] * 3] * 3
    ones = jnp.full((2, 2), -1.0)

    def total(old, sampler):
        weights = EVERYTHING[name](old, sampler, jnp.ones((2, 2)))
        return weights.sum(), weights

    slope = jax.jit(jax.value_and_grad(total, has_aux=True))
    assert slope(ones, ones)[0][1].tolist() == [[1.0, 1.0], [1.0, 1.0]]  # no mismatch, no correction
    assert slope(ones, ones - 0.3)[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    with jax.enable_x64(True):
        assert jax.eval_shape(function, *[jnp.ones((2, 2), jnp.float64)] * 3).dtype == jnp.float64


@pytest.mark.parametrize("name", ["token", "geometric", "k3-seq_mean", "opsm"])
def test_padding_and_the_order_of_rows_change_nothing(name):
    rng = np.random.default_rng(3)
    old, sampler = rng.normal(size=(4, 5)) * 0.3, rng.normal(size=(4, 5)) * 0.3
    mask = (rng.random((4, 5)) < 0.8).astype(np.float32)
    result = EVERYTHING[name](old, sampler, mask)
    padded = EVERYTHING[name](*(np.pad(x, ((0, 1), (2, 3))) for x in (old, sampler, mask)))
    np.testing.assert_allclose(padded[:4, 2:7], result, rtol=1e-6)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(EVERYTHING[name](old[order], sampler[order], mask[order]), result[order], rtol=1e-6)
    stacked = jax.vmap(EVERYTHING[name])(*(jnp.stack([x, x]) for x in (old, sampler, mask)))
    np.testing.assert_allclose(stacked[1], result, rtol=1e-6)


def test_metrics_of_an_empty_mask_are_nan_and_weigh_nothing():
    metrics = mismatch_metrics(*_pair(RATIO), jnp.zeros((2, 3)))
    assert all(float(metric.weight) == 0 for metric in metrics.values())
    assert all(np.isnan(metric.result()) for metric in metrics.values())


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (importance_weights, {"level": "word"}, "level must be one of token, sequence, geometric, got 'word'"),
        (importance_weights, {"outside": "drop"}, "outside must be one of clamp, zero"),
        (importance_weights, {"low": 3.0}, "low must not be above high"),
        (importance_weights, {"high": -1.0}, "high must be >= 0"),
        (importance_weights, {"bounds_on": "geometric"}, "bounds_on applies to outside='zero' only"),
        (rejection_mask, {"statistic": "k4"}, "statistic must be one of k1, k2, k3"),
        (rejection_mask, {"reduce": "mean"}, "reduce must be one of token, seq_sum, seq_mean, seq_max"),
        (rejection_mask, {"high": 0.5}, "low must not be above high"),
        (rejection_mask, {"high": 0.0}, "high must be above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(*_pair(RATIO), MASK, **options)


def test_other_shapes_are_refused():
    x = jnp.zeros((2, 3))
    for function in (importance_weights, rejection_mask, mismatch_metrics):
        with pytest.raises(ValueError, match="sampler_logp must have the shape of old_logp"):
            function(x, x[:, :2], x)
        with pytest.raises(ValueError, match="mask must have the shape of old_logp"):
            function(x, x, x[:, :1])
        with pytest.raises(ValueError, match=r"old_logp must be \[B, T\]"):
            function(x[0], x[0], x[0])
    with pytest.raises(ValueError, match="advantages must have the shape of logp"):
        off_policy_sequence_mask(x, x, x[:1], x)
