import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from jaxrl_post.losses import discriminative
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)
discriminative = all_compiled(discriminative)

SCORES = jnp.array([[-0.3, -0.5, -0.2, -1.0]])
CORRECT = jnp.array([[1, 1, 0, 0]])


@pytest.mark.parametrize(("tau", "expected"), [(math.inf, 0.2), (1.0, 0.122047), (10.0, 0.192002)])
def test_disco_gives_the_papers_numbers(tau, expected):
    np.testing.assert_allclose(-discriminative.disco(SCORES, CORRECT, tau=tau), [expected], atol=2e-6)


def test_disco_weighs_wrong_answers_by_their_softmax():
    gradient = jax.jit(jax.grad(lambda s: discriminative.disco(s, CORRECT, tau=1.0).sum()))(SCORES)
    np.testing.assert_allclose(gradient, [[-0.5, -0.5, 0.68997, 0.31003]], atol=1e-5)


def test_disco_tends_to_the_difference_of_means_as_tau_grows():
    rng = np.random.default_rng(0)
    scores, correct, valid = rng.normal(size=(20, 6)), rng.random((20, 6)) < 0.5, rng.random((20, 6)) < 0.8
    with jax.enable_x64(True):
        plain = discriminative.disco(scores, correct, valid, tau=math.inf)
        np.testing.assert_allclose(discriminative.disco(scores, correct, valid, tau=1e6), plain, atol=1e-5)
    for p in range(20):
        right, wrong = scores[p, valid[p] & correct[p]], scores[p, valid[p] & ~correct[p]]
        expected = wrong.mean() - right.mean() if len(right) and len(wrong) else 0
        np.testing.assert_allclose(plain[p], expected, atol=1e-12)


@pytest.mark.parametrize("tau", [1.0, math.inf])
def test_one_sided_prompts_and_invalid_rows_carry_no_gradient(tau):
    scores = jnp.array([[1.0, 2.0, jnp.nan], [1.0, 2.0, jnp.nan], [1.0, 2.0, jnp.nan], [jnp.nan] * 3])
    correct = jnp.array([[1, 1, 0], [0, 0, 1], [1, 0, 1], [1, 0, 1]])
    valid = jnp.array([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]])
    loss = jax.jit(lambda s: discriminative.disco(s, correct, valid, tau=tau))
    np.testing.assert_allclose(loss(scores), [0, 0, 1, 0], atol=1e-6)
    gradient = jax.jit(jax.grad(lambda s: loss(s).sum()))(scores)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [0, 0, 0], [-1, 1, 0], [0, 0, 0]], atol=1e-6)


def test_grpo_is_the_difference_of_means_times_a_factor_that_vanishes_for_hard_and_easy_prompts():
    rng = np.random.default_rng(1)
    correct = np.arange(16) < np.array([[1], [4], [8], [15]])
    scores = rng.normal(size=(4, 16))
    share = correct.mean(1)
    with jax.enable_x64(True):
        weights = advantages.grpo(correct.astype(float), ddof=0, eps=0.0)
        grpo = jnp.mean(weights * scores, 1)
        plain = -discriminative.disco(scores, correct, tau=math.inf)
    np.testing.assert_allclose(grpo, np.sqrt(share * (1 - share)) * np.asarray(plain), rtol=1e-9)


def test_scores_are_means_over_trained_tokens():
    logp = jnp.array([[-9.0, -1.0, -2.0, jnp.nan], [jnp.nan] * 4])
    old = jnp.array([[-9.0, -1.0, -2.5, jnp.nan], [jnp.nan] * 4])
    mask = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(discriminative.log_likelihood_score(logp, mask), [-1.5, 0])
    np.testing.assert_allclose(
        discriminative.likelihood_ratio_score(logp, old, mask), [(1 + np.exp(0.5)) / 2, 0], rtol=1e-6
    )
    for score in (
        lambda x: discriminative.log_likelihood_score(x, mask),
        lambda x: discriminative.likelihood_ratio_score(x, old, mask),
    ):
        gradient = jax.jit(jax.grad(lambda x, score=score: score(x).sum()))(logp)
        assert np.all(np.isfinite(gradient))
        assert not np.asarray(gradient)[mask == 0].any()


def test_the_mean_of_the_hinge_has_the_gradient_of_half_its_square():
    rng = np.random.default_rng(2)
    old = -rng.random((3, 5))
    logp, mask = old - 0.2 * rng.random((3, 5)), rng.random((3, 5)) < 0.6
    with jax.enable_x64(True):

        def mean(x):
            return jnp.sum(jnp.where(mask, old - x, 0.0)) / mask.sum()

        given = jax.jit(
            jax.grad(lambda x: jnp.sum(discriminative.kl_hinge(x, old, mask, beta=7.0, delta=0.01)) / mask.sum())
        )(logp)
        expected = jax.jit(jax.grad(lambda x: 3.5 * jnp.maximum(mean(x) - 0.01, 0.0) ** 2))(logp)
        np.testing.assert_allclose(given, expected, rtol=1e-9)
        # Inside the region, or with the level of a batch that is inside, there is no pull.
        assert not np.asarray(discriminative.kl_hinge(logp, old, mask, delta=1.0)).any()
        assert not np.asarray(discriminative.kl_hinge(logp, old, mask, level=jnp.zeros(()))).any()
        # Cut in parts with the level of the whole, the parts add up to the whole.
        level = mean(logp)
        parts = [discriminative.kl_hinge(logp[i], old[i], mask[i], level=level) for i in (slice(0, 1), slice(1, 3))]
        np.testing.assert_allclose(jnp.concatenate(parts), discriminative.kl_hinge(logp, old, mask), rtol=1e-12)
    assert np.isfinite(discriminative.kl_hinge(logp, old, np.zeros((3, 5)))).all()


def test_wrong_arguments_are_named_and_bfloat16_is_raised():
    assert discriminative.disco(SCORES.astype(jnp.bfloat16), CORRECT).dtype == jnp.float32
    with pytest.raises(ValueError, match="tau must be above 0"):
        discriminative.disco(SCORES, CORRECT, tau=0.0)
    with pytest.raises(ValueError, match=r"scores must be \[P, G\]"):
        discriminative.disco(SCORES[0], CORRECT[0])
    with pytest.raises(ValueError, match="correct must have the shape"):
        discriminative.disco(SCORES, CORRECT[:, :2])
    with pytest.raises(ValueError, match="delta must be at least 0"):
        discriminative.kl_hinge(SCORES, SCORES, SCORES, delta=-1.0)
