"""`sampling.transform` against examples worked out by hand and a float64 oracle that goes token by token."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.sampling import SamplingParams, SamplingState, is_truncating, transform

# One program for all values of the same options, and one for each value, which is a constant of it.
traced = jax.jit(transform)
static = jax.jit(transform, static_argnames=("temperature", "top_k", "top_p", "min_p"))
LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0625, 0.0625]))  # exact in binary, so that boundaries are too


def kept(logits, **options):
    return np.flatnonzero(np.isfinite(np.asarray(traced(jnp.asarray(logits), **options)))).tolist()


def oracle(logits, temperature, top_k, top_p, min_p):
    """Which tokens stay, by going down the sorted list in float64; None where a decision hangs on rounding."""
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    keep = np.ones(len(z), bool)
    close = []
    if top_k:
        keep &= p >= np.sort(p)[::-1][min(top_k, len(p)) - 1]
        p = np.where(keep, p, 0.0) / p[keep].sum()  # top-p judges what top-k has left
    if top_p < 1:
        total, least = 0.0, 1.0
        for mass in np.sort(p)[::-1]:
            close.append(abs(total - top_p))
            if total >= top_p:
                break
            total, least = total + mass, mass
        keep &= p >= least
    if min_p > 0:
        close.append(np.abs(p - min_p * p.max()).min())
        keep &= p >= min_p * p.max()
    return keep if min(close, default=1.0) > 1e-6 else None


def test_without_options_the_logits_stay_as_they_are():
    assert transform(LOGITS).tolist() == LOGITS.tolist()


def test_temperature_divides_the_logits_before_anything_is_cut():
    np.testing.assert_allclose(transform(jnp.array([1.0, -3.0]), temperature=0.5), [2.0, -6.0])
    # At temperature 1/2 the first token alone has 0.25 / 0.3359 = 0.744 of the mass, at 1 it has 0.5.
    assert kept(LOGITS, temperature=0.5, top_p=0.7) == [0]
    assert kept(LOGITS, temperature=1.0, top_p=0.7) == [0, 1]


@pytest.mark.parametrize(("top_k", "expected"), [(0, 5), (1, 1), (2, 2), (3, 3), (4, 5), (5, 5), (99, 5)])
def test_top_k_keeps_k_tokens_and_what_ties_with_the_last_of_them(top_k, expected):
    assert kept(LOGITS, top_k=top_k) == list(range(expected))


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-6, 1), (0.5, 1), (0.50001, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 5), (0.9375, 5), (1.0, 5)],
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass_and_what_ties_with_its_last_token(top_p, expected):
    assert kept(LOGITS, top_p=top_p) == list(range(expected))


@pytest.mark.parametrize(("min_p", "expected"), [(0.0, 5), (0.125, 5), (0.126, 3), (0.25, 3), (0.49, 2), (0.51, 1)])
def test_min_p_keeps_tokens_of_at_least_that_fraction_of_the_best(min_p, expected):
    assert kept(LOGITS, min_p=min_p) == list(range(expected))


def test_top_p_judges_what_top_k_has_left_renormalised():
    # 0.5, 0.25, 0.125, ...: after top-k 2 the first token has 2/3 of the mass, after top-k 3 it has 4/7.
    assert kept(LOGITS, top_k=2, top_p=0.66) == [0]
    assert kept(LOGITS, top_k=2, top_p=0.67) == [0, 1]
    assert kept(LOGITS, top_k=3, top_p=0.55) == [0]


def test_each_row_and_any_order_of_tokens_agrees_with_a_float64_oracle():
    random = np.random.default_rng(0)
    logits = (2.5 * random.standard_normal((6, 23))).astype(np.float32)
    logits[1, [3, 7, 9]] = logits[1].max()  # ties at the top
    logits[2] = 0.0  # all tied
    logits[3, ::2] = -np.inf  # forbidden from the start
    decided = 0
    for temperature, top_k, top_p, min_p in itertools.product([0.6, 1.7], [0, 1, 4], [0.3, 0.9, 1.0], [0.0, 0.05, 0.6]):
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        out = np.asarray(traced(logits, **options))
        if temperature > 1 and top_k != 1 and top_p < 1 and min_p != 0.6:
            np.testing.assert_allclose(static(logits, **options), out, rtol=1e-6)
        for row, cut in zip(logits, out, strict=True):
            keep = oracle(row, **options)
            if keep is None:
                continue
            decided += 1
            keep &= np.isfinite(row)
            np.testing.assert_array_equal(np.isfinite(cut), keep, err_msg=str(options))
            np.testing.assert_allclose(cut[keep], row[keep] / temperature, rtol=1e-6)
            assert keep[np.argmax(row)]
    assert decided > 300  # of 324


@pytest.mark.parametrize("value", [1e-9, 0.0])
def test_the_best_token_survives_even_a_traced_value_out_of_range(value):
    out = jax.jit(lambda p: transform(LOGITS, top_p=p))(value)
    assert np.isfinite(out).tolist() == [True, False, False, False, False]
    out = jax.jit(lambda p: transform(LOGITS, min_p=p))(2.0)
    assert np.isfinite(out).tolist() == [True, False, False, False, False]


def test_traced_values_do_what_static_ones_do():
    for t, p, m in [(1.0, 1.0, 0.0), (0.5, 0.8, 0.0), (2.0, 1.0, 0.3), (1.0, 0.75, 0.2)]:
        options = {"temperature": t, "top_p": p, "min_p": m}
        np.testing.assert_allclose(traced(LOGITS, **options), static(LOGITS, **options), rtol=1e-6)


def test_numbers_of_each_row_do_what_they_do_alone():
    random = np.random.default_rng(2)
    logits = jnp.asarray(2 * random.standard_normal((6, 40)), jnp.float32).at[3, 5:9].set(1.0)
    columns = {
        "temperature": [0.5, 1.0, 2.0, 1.0, 1.0, 0.7],
        "top_k": [0, 1, 5, 3, 40, 0],
        "top_p": [0.9, 1.0, 0.5, 0.8, 1.0, 0.3],
        "min_p": [0.0, 0.0, 0.1, 0.0, 0.4, 0.0],
    }
    together = traced(logits, **{name: jnp.asarray(values) for name, values in columns.items()})
    for row in range(6):
        alone = traced(logits[row], **{name: values[row] for name, values in columns.items()})
        np.testing.assert_allclose(together[row], alone, rtol=1e-6)


def test_a_nucleus_of_many_tokens_is_the_one_that_sorting_finds():
    random = np.random.default_rng(3)
    for spread in (1e-6, 0.1, 5.0):
        logits = (spread * random.standard_normal((3, 5000))).astype(np.float32)
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        for mass in (0.1, 0.95):
            found = np.isfinite(np.asarray(traced(logits, top_p=mass)))
            for row in range(3):
                inside = np.cumsum(np.sort(p[row])[::-1])
                assert abs(found[row].sum() - (np.searchsorted(inside, mass) + 1)) <= 1 + 1e-5 * 5000
                assert p[row][found[row]].min() >= p[row][~found[row]].max()


def awkward():
    """Rows that are hard to search: of any magnitude, with ties, around zero, and with banned tokens."""
    random = np.random.default_rng(5)
    normal = random.standard_normal((8, 3000)).astype(np.float32)
    normal[1] = np.round(4 * normal[1]) / 4
    normal[2] = np.where(normal[2] > 1, 1.0, np.where(normal[2] > 0, 0.0, -0.0))
    normal[3] *= 10.0 ** random.uniform(-30, 1, 3000)
    normal[4] = np.where(normal[4] > 0, -np.inf, normal[4])
    normal[5] = np.where(normal[5] > 2, 50.0, 1e-38)
    normal[6] = 0.0
    normal[7] *= 1e4
    return normal


@pytest.mark.parametrize("transformed", [static, traced], ids=["static", "traced"])
def test_top_k_keeps_what_sorting_keeps_at_any_magnitude_and_with_ties(transformed):
    logits = awkward()
    for k in (1, 40, 2000):
        found = np.asarray(transformed(logits, top_k=k))
        least = np.sort(logits, axis=-1)[:, -k, None]
        np.testing.assert_array_equal(np.isfinite(found), (logits >= least) & np.isfinite(logits))


def test_top_p_keeps_whole_ties_and_the_fewest_tokens_at_any_magnitude():
    logits = awkward()
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    for mass in (0.2, 0.9, 0.999):
        found = np.isfinite(np.asarray(traced(logits, top_p=mass)))
        for row in range(len(logits)):
            inside = found[row]
            least = logits[row][inside].min()
            assert inside.tolist() == (logits[row] >= least).tolist()
            # The mass is there, to the rounding of its sum, and is not without the least of what is kept.
            assert p[row][inside].sum() > mass - 2e-6
            assert p[row][logits[row] > least].sum() < mass + 2e-6


def test_truncations_are_those_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = (3 * np.random.default_rng(6).standard_normal((16, 1000))).astype(np.float32)
    for ours, theirs in (
        ({"top_p": 0.9}, transformers.TopPLogitsWarper(0.9)),
        ({"top_p": 0.3}, transformers.TopPLogitsWarper(0.3)),
        ({"top_k": 50}, transformers.TopKLogitsWarper(50)),
        ({"min_p": 0.02}, transformers.MinPLogitsWarper(0.02)),
    ):
        np.testing.assert_array_equal(static(logits, **ours), theirs(None, torch.tensor(logits)).numpy())


def test_a_bias_is_added_and_a_ban_is_kept():
    bias = jnp.zeros(5).at[4].set(3.0)
    out = transform(LOGITS, logit_bias=bias, allowed=jnp.array([True, False, True, True, True]), temperature=0.5)
    np.testing.assert_allclose(out, np.where([1, 0, 1, 1, 1], (np.asarray(LOGITS) + np.asarray(bias)) / 0.5, -np.inf))


def test_penalties_are_those_of_the_formula():
    logits = jnp.array([[2.0, -1.0, 0.5, -0.5]])
    state = SamplingState(jnp.array([[2, 0, 0, 1]]), jnp.array([[False, True, False, False]]), jnp.array([3]))
    # Token 1 is in the prompt, 0 and 3 in the completion; presence and frequency count the completion alone.
    found = transform(logits, state, repetition_penalty=2.0)
    np.testing.assert_allclose(found, [[1.0, -2.0, 0.5, -1.0]])
    found = transform(logits, state, presence_penalty=0.25, frequency_penalty=0.5)
    np.testing.assert_allclose(found, [[2.0 - 1.25, -1.0, 0.5, -0.5 - 0.75]])


def test_the_repetition_penalty_is_that_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    random = np.random.default_rng(4)
    logits = random.standard_normal((2, 12)).astype(np.float32)
    said = random.integers(0, 12, (2, 7))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(said), torch.tensor(logits)).numpy()
    prompt = np.zeros((2, 12), bool)
    counts = np.zeros((2, 12), np.int32)
    for row in range(2):
        prompt[row, said[row, :3]] = True
        np.add.at(counts[row], said[row, 3:], 1)
    state = SamplingState(jnp.asarray(counts), jnp.asarray(prompt), jnp.full(2, 4))
    np.testing.assert_allclose(transform(jnp.asarray(logits), state, repetition_penalty=1.3), theirs, rtol=1e-6)


def test_stop_tokens_are_banned_until_there_are_enough_tokens():
    state = SamplingState(jnp.zeros((2, 5), int), jnp.zeros((2, 5), bool), jnp.array([1, 2]))
    out = transform(jnp.stack([LOGITS, LOGITS]), state, min_tokens=2, stop_tokens=jnp.array([0, 3, -1]))
    assert np.isfinite(np.asarray(out)).tolist() == [[False, True, True, False, True], [True] * 5]
    own = transform(jnp.stack([LOGITS, LOGITS]), state, min_tokens=3, stop_tokens=jnp.array([[0, -1], [1, 2]]))
    assert np.isfinite(np.asarray(own)).tolist() == [[False] + [True] * 4, [True, False, False, True, True]]


def test_sixteen_bit_logits_are_raised_and_float64_stays():
    assert transform(LOGITS.astype(jnp.bfloat16), temperature=0.7).dtype == jnp.float32
    with jax.enable_x64(True):
        found = jax.eval_shape(lambda z: transform(z, top_p=0.5), jax.ShapeDtypeStruct((3,), jnp.float64))
        assert found.dtype == jnp.float64


def test_numbers_of_double_precision_widen_no_logits():
    wide = {"temperature": 0.7, "top_p": 0.6, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 0.5}
    logits = np.asarray(LOGITS)
    with jax.enable_x64(True):
        state = SamplingState(jnp.array([2, 0, 0, 1, 0]), jnp.zeros(5, bool), jnp.array(3))
        expected = transform(jnp.asarray(logits), state, **wide)
        assert expected.dtype == jnp.float32
        for kind in (np.float64, jnp.float64):
            found = transform(jnp.asarray(logits), state, **{name: kind(value) for name, value in wide.items()})
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_more_tokens_than_there_are_may_be_kept():
    assert kept(LOGITS, top_k=4) == [0, 1, 2, 3, 4]  # of which two tie
    assert jnp.isfinite(transform(LOGITS, top_k=10**12)).all()


def test_only_cuts_truncate():
    assert not is_truncating(SamplingParams(temperature=0.3, greedy=True, stop_tokens=(1,)))
    cuts = ({"top_k": 9}, {"top_p": 0.99}, {"min_p": 0.01}, {"min_tokens": 1}, {"allowed": jnp.ones(5, bool)})
    assert all(is_truncating(SamplingParams(**cut)) for cut in cuts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0; use greedy=True"),
        ({"temperature": float("nan")}, "temperature must be finite, got nan"),
        ({"temperature": 1e-39}, "temperature must be at least 1e-06, got 1e-39, which"),
        ({"top_k": 2.5}, "top_k must be an integer, or integers, got 2.5"),
        ({"top_k": jnp.ones(())}, "top_k must be an integer, or integers, got Array"),
        ({"min_tokens": 0.5}, "min_tokens must be an integer"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be finite, got inf"),
        ({"stop_tokens": (1.5,)}, r"stop tokens are integers, got \(1.5,\)"),
        ({"stop_tokens": jnp.ones(2)}, "stop tokens are integers"),
        ({"allowed": [True] * 5}, r"allowed must be an array, got \[True"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0; 1.0 turns it off"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or positive, got -1"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\), got 1.0; 0.0 turns it off"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\), got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0; 1.0 turns it off"),
        ({"min_tokens": -1}, r"min_tokens must be 0 \(off\) or positive, got -1"),
        ({"presence_penalty": 0.5}, "depend on what was sampled before: give state"),
        ({"temperature": jnp.ones((2, 1))}, r"temperature must be a number, or \[\] for each row, got shape \(2, 1\)"),
        ({"min_p": jnp.zeros(5)}, r"min_p must be a number, or \[\] for each row, got shape \(5,\)"),
        ({"stop_tokens": jnp.zeros((2, 5), int)}, r"stop_tokens must be \[K\] or \['K'\], got shape \(2, 5\)"),
        ({"logit_bias": jnp.zeros((5, 5))}, r"logit_bias must be \[5\] or \[5\], got shape \(5, 5\)"),
        ({"allowed": jnp.ones(1, bool)}, r"allowed must be \[5\] or \[5\], got shape \(1,\)"),
    ],
)
def test_a_value_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        transform(LOGITS, **options)


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 3, "top_p": 0.8}, {"top_p": jnp.array(0.8)}])
def test_what_is_kept_has_the_gradient_of_a_choice(options):
    """The log-prob of the likeliest token under the truncated distribution: `1 - p` of it, `-p` of the others kept."""
    left = kept(LOGITS, **options)
    p = np.exp(np.asarray(LOGITS, np.float64)) * np.isin(np.arange(5), left)
    p /= p.sum()
    slope = jax.jit(jax.grad(lambda z: jax.nn.log_softmax(transform(z, **options))[0]))(LOGITS)
    np.testing.assert_allclose(slope, np.eye(5)[0] - p, atol=1e-6)
