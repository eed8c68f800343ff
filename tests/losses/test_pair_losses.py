"""Losses on pairs beside DPO against closed forms, at the ends of what floats can say, and where they are refused.

That they are those of TRL, value and gradient, is in `tests/methods/test_trl_pairs.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses

OF_RATIOS = (
    "dpo",
    "robust_dpo",
    "ipo",
    "hinge",
    "exo",
    "discopop",
    "nca",
    "bco",
    "sppo",
    "apo_zero",
    "apo_down",
    "aot",
)
FREE = ("cpo", "orpo", "simpo")


def of(name, chosen, rejected, **options):
    """The loss of log-ratios `chosen` and `rejected`, with references of 0 where it reads them."""
    chosen, rejected = (jnp.atleast_1d(jnp.asarray(x, jnp.float32)) for x in (chosen, rejected))
    references = () if name in FREE else (jnp.zeros_like(chosen),) * 2
    return getattr(losses, name)(chosen, rejected, *references, **options)


def sigma(x):
    return 1 / (1 + np.exp(-np.float64(x)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [  # log-ratios 3 and -2, beta 0.1: rewards 0.3 and -0.2, margin 0.5
        ("robust_dpo", {"label_smoothing": 0.2}, (-0.8 * np.log(sigma(0.5)) + 0.2 * np.log(sigma(-0.5))) / 0.6),
        ("ipo", {}, 0.0),  # 5 is 1 / (2 beta)
        ("ipo", {"beta": 0.25}, 9.0),
        ("hinge", {}, 0.5),
        ("hinge", {"beta": 0.3}, 0.0),
        ("exo", {"label_smoothing": 1 - sigma(0.5)}, 0.0),  # the policy says what the labels do
        ("discopop", {"tau": 0.5}, -(1 - sigma(1)) * np.log(sigma(0.5)) + sigma(1) * np.exp(-0.5)),
        ("nca", {}, -np.log(sigma(0.3)) - 0.5 * np.log(sigma(-0.3)) - 0.5 * np.log(sigma(0.2))),
        ("bco", {}, -np.log(sigma(0.3)) - np.log(sigma(0.2))),
        ("bco", {"shift": 0.1}, -np.log(sigma(0.2)) - np.log(sigma(0.3))),
        ("sppo", {}, 4.0 + 9.0),  # targets of 5 and -5
        ("sppo", {"probability": 0.8}, 0.0 + 1.0),  # of 3 and -3
        ("apo_zero", {}, 1 - sigma(0.3) + sigma(-0.2)),
        ("apo_down", {}, sigma(0.3) + 1 - sigma(0.5)),
        ("aot", {}, -np.log(sigma(0.5))),
        ("cpo", {"nll_weight": 2.0}, -np.log(sigma(0.5)) - 6.0),
    ],
)
def test_losses_are_those_of_the_formulas(name, options, expected):
    np.testing.assert_allclose(of(name, 3.0, -2.0, **options), [expected], rtol=2e-6, atol=2e-6)


def test_the_odds_ratio_is_that_of_probabilities():
    chosen, rejected = np.array([0.5, 0.999999, 0.1]), np.array([0.25, 1e-8, 0.9])
    ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    expected = -np.log(chosen) + 0.7 * np.log1p(1 / ratio)
    found = of("orpo", np.log(chosen), np.log(rejected), beta=0.7)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("name", OF_RATIOS + FREE)
def test_values_and_gradients_are_finite_where_margins_are_huge_and_where_tokens_are_certain(name):
    for chosen, rejected in ((-1e6, -1.0), (-1.0, -1e6), (0.0, 0.0), (-1e6, -1e6), (-1e-9, 0.0)):
        pair = jnp.array([chosen]), jnp.array([rejected])
        value, slope = jax.value_and_grad(lambda pair: of(name, *pair).sum())(pair)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("name", OF_RATIOS)
def test_a_descent_widens_the_margin_and_the_reference_gets_no_gradient(name):
    zero, two = jnp.zeros(1), 2 * jnp.ones(1)  # DiscoPOP's slope is the other way around at an equal pair
    slopes = jax.grad(lambda *x: getattr(losses, name)(*x).sum(), argnums=(0, 1, 2, 3))(two, zero, zero, zero)
    chosen, rejected, *references = (float(slope[0]) for slope in slopes)
    assert rejected > chosen
    assert references == [0.0, 0.0]


def test_reference_free_losses_widen_the_margin_too():
    pair = jnp.array([-1.0])
    for name in FREE:
        chosen, rejected = jax.grad(lambda *x, name=name: of(name, *x).sum(), argnums=(0, 1))(pair, pair)
        assert chosen[0] < 0 < rejected[0]


def test_robust_dpo_is_unbiased_where_labels_are_flipped_as_often_as_it_assumes():
    clean = of("dpo", 3.0, -2.0)
    kept, flipped = (of("robust_dpo", *pair, label_smoothing=0.3) for pair in ((3.0, -2.0), (-2.0, 3.0)))
    np.testing.assert_allclose(0.7 * kept + 0.3 * flipped, clean, rtol=1e-6)


def test_optimal_transport_compares_ranks_and_not_pairs():
    chosen, rejected = jnp.array([3.0, 1.0, 9.0]), jnp.array([1.0, 2.0, -9.0])
    margin = np.array([0.0, 1.0])  # of 1 and 3 over 1 and 2
    found = of("aot", chosen, rejected, beta=1.0, paired=False, valid=jnp.array([True, True, False]))
    np.testing.assert_allclose(found, [*-np.log(sigma(margin)), 0.0], rtol=1e-6)


def test_kto_weighs_good_and_bad_answers_against_the_anchor():
    logp, ref, good = jnp.array([-1.0, -1.0, -4.0]), jnp.array([-3.0, -3.0, -3.0]), jnp.array([1.0, -1.0, -1.0])
    found = losses.kto(logp, ref, good, anchor=0.5, beta=0.4, desirable_weight=2.0, undesirable_weight=3.0)
    gain = 0.4 * np.array([1.5, 1.5, -1.5])
    expected = [2 * (1 - sigma(gain[0])), *3 * (1 - sigma(-gain[1:]))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(losses.kto(logp, ref, good > 0, beta=0.4), losses.kto(logp, ref, good, beta=0.4))
    slope = jax.grad(lambda logp: losses.kto(logp, ref, good, anchor=losses.kto_anchor(logp, ref)).sum())(logp)
    assert (np.sign(slope) == [-1, 1, 1]).all()


def test_the_anchor_of_kto_is_a_mean_of_those_that_count_never_negative_and_without_gradient():
    logp, ref = jnp.array([-1.0, -5.0, jnp.nan]), jnp.array([-3.0, -4.0, 0.0])
    assert float(losses.kto_anchor(logp, ref, jnp.array([True, True, False]))) == 0.5
    assert float(losses.kto_anchor(logp[1:2], ref[1:2])) == 0.0
    assert float(losses.kto_anchor(logp, ref, jnp.zeros(3, bool))) == 0.0
    assert not np.any(jax.grad(lambda x: losses.kto_anchor(x, ref[:2]))(logp[:2]))


@pytest.mark.parametrize("name", OF_RATIOS + FREE)
def test_bfloat16_is_raised_and_float64_stays(name):
    count = 2 if name in FREE else 4
    assert getattr(losses, name)(*[-jnp.ones(2, jnp.bfloat16)] * count).dtype == jnp.float32
    with jax.enable_x64(True):
        assert getattr(losses, name)(*[-jnp.ones(2, jnp.float64)] * count).dtype == jnp.float64


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((name, {"beta": 0.0}, "beta must be above 0, got 0.0") for name in (*OF_RATIOS, "cpo", "simpo")),
        ("orpo", {"beta": -1.0}, "beta must be >= 0, got -1.0"),
        *((name, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)") for name in ("robust_dpo", "cpo")),
        ("exo", {"label_smoothing": 0.0}, r"label_smoothing must be in \(0, 0.5\), got 0.0"),
        ("discopop", {"tau": 0.0}, "tau must be above 0, got 0.0"),
        ("cpo", {"nll_weight": -1.0}, "nll_weight must be >= 0, got -1.0"),
    ],
)
def test_what_is_out_of_range_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        of(name, -1.0, -2.0, **options)


@pytest.mark.parametrize("name", OF_RATIOS + FREE)
def test_tokens_in_place_of_sequences_and_other_lengths_are_refused(name):
    rest = () if name in FREE else (jnp.zeros(3),) * 2
    with pytest.raises(ValueError, match=r"chosen_logp must be \[B\]"):
        getattr(losses, name)(jnp.zeros((3, 2)), jnp.zeros(3), *rest)
    with pytest.raises(ValueError, match="rejected_logp must have the shape of chosen_logp"):
        getattr(losses, name)(jnp.zeros(3), jnp.zeros(2), *rest)
