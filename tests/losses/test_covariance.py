import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses
from jaxrl_post.losses.covariance import (
    clip_cov,
    clip_cov_tokens,
    entropy_change,
    fit_entropy_law,
    kl_cov,
    kl_cov_tokens,
    token_covariance,
)
from tests.advantages.compiled import all_compiled, compiled
from tests.methods.peer_fixtures import aggregated, assert_close, both, case, stored, valid_mask

losses = all_compiled(losses)
clip_cov, clip_cov_tokens, entropy_change, fit_entropy_law, kl_cov, kl_cov_tokens, token_covariance = map(
    compiled, (clip_cov, clip_cov_tokens, entropy_change, fit_entropy_law, kl_cov, kl_cov_tokens, token_covariance)
)


def test_the_covariance_of_four_tokens_is_worked_out_by_hand():
    # Means are 0 and -1.05; a masked token with nonsense in it changes nothing.
    logp = jnp.array([[-0.1, -2.0, -0.1, -2.0, jnp.nan]])
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0, jnp.inf]])
    found = token_covariance(logp, advantages, jnp.array([[1, 1, 1, 1, 0]]))
    np.testing.assert_allclose(found, [[0.95, -0.95, -0.95, 0.95, 0]], rtol=1e-6)


def test_the_covariances_mean_is_numpys_population_covariance():
    rng = np.random.default_rng(0)
    logp, advantages, mask = -rng.gamma(1, size=(6, 9)), rng.normal(size=(6, 9)), rng.random((6, 9)) < 0.7
    with jax.enable_x64(True):
        found = np.asarray(token_covariance(logp, advantages, mask))
    expected = np.cov(logp[mask], advantages[mask], bias=True)[0, 1]
    np.testing.assert_allclose(found.sum() / mask.sum(), expected, rtol=1e-12)


def test_a_single_token_and_an_empty_mask_have_no_covariance_and_no_gradient():
    logp, advantages = jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, 4.0]])
    for mask in ([[1, 0]], [[0, 0]]):
        value, gradient = jax.jit(
            jax.value_and_grad(lambda x, m=mask: token_covariance(x, advantages, jnp.array(m)).sum())
        )(logp)
        assert float(value) == 0
        assert gradient.tolist() == [[0.0, 0.0]]


def _slow_choice(covariance, mask, fraction):
    """The top tokens by repeated search for the largest, the first of equal ones."""
    left = [(-c, place) for place, (c, m) in enumerate(zip(covariance.ravel(), mask.ravel(), strict=True)) if m]
    number = max(1, round(len(left) * fraction * 1e6) // 10**6)
    chosen = np.zeros(covariance.size)
    for _, place in sorted(left)[:number]:
        chosen[place] = 1
    return chosen.reshape(covariance.shape)


@pytest.mark.parametrize("fraction", [1e-4, 0.02, 0.1, 0.29, 1.0])
def test_the_tokens_of_largest_covariance_are_those_of_a_sort_and_ties_fall_to_the_first(fraction):
    rng = np.random.default_rng(1)
    covariance = rng.integers(-4, 5, (10, 20)).astype(np.float32)
    for share in (0.5, 1.0):
        mask = rng.random((10, 20)) < share
        found = jax.jit(kl_cov_tokens, static_argnames="fraction")(covariance, mask, fraction=fraction)
        np.testing.assert_array_equal(found, _slow_choice(covariance, mask, fraction))


def test_of_one_token_the_largest_is_that_one_and_of_none_there_is_none():
    assert kl_cov_tokens(jnp.array([[0.0, 9.0]]), jnp.array([[1, 0]])).tolist() == [[1.0, 0.0]]
    assert kl_cov_tokens(jnp.ones((2, 2)), jnp.zeros((2, 2))).tolist() == [[0.0, 0.0]] * 2
    assert clip_cov_tokens(jnp.full((2, 2), 2.0), jnp.zeros((2, 2)), jax.random.key(0)).tolist() == [[0.0, 0.0]] * 2


def test_tokens_to_clip_are_in_the_band_not_clipped_already_and_as_many_as_asked_for():
    rng = np.random.default_rng(2)
    covariance, mask = rng.normal(0, 3, (20, 50)), rng.random((20, 50)) < 0.8
    clipped = rng.random((20, 50)) < 0.3
    band = mask & ~clipped & (covariance > 1) & (covariance < 5)
    choose = jax.jit(clip_cov_tokens, static_argnames="fraction")
    for fraction in (1e-4, 0.05, 1.0):
        found = np.asarray(choose(covariance, mask, jax.random.key(3), fraction=fraction, clipped=clipped))
        assert not np.any(found[~band])
        assert found.sum() == min(max(1, int(fraction * mask.sum())), band.sum())
    nothing = choose(covariance, mask, jax.random.key(3), fraction=0.5, low=90.0, high=91.0)
    assert not np.any(np.asarray(nothing))


def test_each_token_in_the_band_is_drawn_equally_often():
    covariance = jnp.array([[2.0, 2.0, 0.0, 4.9, 3.0]])
    draw = jax.vmap(lambda key: clip_cov_tokens(covariance, jnp.ones((1, 5)), key, fraction=0.4))
    often = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)).mean(0)[0])
    np.testing.assert_allclose(often, [0.5, 0.5, 0.0, 0.5, 0.5], atol=0.04)  # five standard deviations


def test_with_a_key_for_each_sequence_neither_padding_nor_order_changes_what_is_drawn():
    rng = np.random.default_rng(4)
    covariance, mask = rng.uniform(1, 5, (6, 8)), np.ones((6, 8))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(6))
    found = np.asarray(clip_cov_tokens(covariance, mask, keys, fraction=0.25))
    padded = clip_cov_tokens(np.pad(covariance, ((0, 0), (0, 5))), np.pad(mask, ((0, 0), (0, 5))), keys, fraction=0.25)
    np.testing.assert_array_equal(padded[:, :8], found)
    order = rng.permutation(6)
    np.testing.assert_array_equal(clip_cov_tokens(covariance[order], mask, keys[order], fraction=0.25), found[order])


def test_clip_cov_is_ppo_but_for_the_selected_tokens_which_have_no_gradient():
    rng = np.random.default_rng(5)
    old, advantages = -rng.gamma(1, size=(3, 7)), rng.normal(size=(3, 7))
    logp, selected = jnp.asarray(old + rng.normal(0, 0.3, (3, 7))), jnp.asarray(rng.random((3, 7)) < 0.3)

    def slope(function):
        return np.asarray(jax.jit(jax.grad(lambda x: function(x).sum()))(logp))

    plain = slope(lambda x: losses.ppo(x, old, advantages, clip_high=0.28))
    found = slope(lambda x: clip_cov(x, old, advantages, selected, clip_high=0.28))
    np.testing.assert_array_equal(found, np.where(selected, 0.0, plain))
    assert np.any(plain[np.asarray(selected)] != 0)


def test_the_penalty_of_kl_cov_pulls_the_selected_tokens_back_and_is_silent_where_nothing_has_moved():
    logp, advantages = jnp.log(jnp.array([[0.6, 0.4, 0.5, 0.6]])), jnp.zeros((1, 4))
    old, selected = jnp.log(jnp.full((1, 4), 0.5)), jnp.array([[1, 1, 1, 0]])
    gradient = jax.jit(jax.grad(lambda x: kl_cov(x, old, advantages, selected, kl_coef=0.5).sum()))(logp)
    assert gradient.tolist() == [[0.5, -0.5, 0.0, 0.0]]
    # Without clipping the surrogate pulls at any ratio.
    far = jax.jit(jax.grad(lambda x: kl_cov(x, old - 2, jnp.ones((1, 4)), jnp.zeros((1, 4))).sum()))(logp)
    np.testing.assert_allclose(far, -jnp.exp(logp - old + 2), rtol=1e-6)


def test_no_gradient_flows_into_what_is_constant_and_16_bits_are_raised():
    a = jnp.full((1, 2), -0.5)
    for function in (clip_cov, kl_cov):
        gradient = jax.jit(jax.grad(lambda *x: function(a + 0.1, *x).sum(), argnums=(0, 1, 2)))(a, a, jnp.ones((1, 2)))  # noqa: B023
        assert all(not np.any(np.asarray(g)) for g in gradient)
        assert function(*[a.astype(jnp.bfloat16)] * 4).dtype == jnp.float32


@both
def test_clip_cov_with_every_token_of_the_band_is_verls(number):
    x = case(number)
    with jax.enable_x64(True):
        mask = valid_mask(x)
        old, advantages = x["old"], x["token_advantages"]
        covariance = token_covariance(x["logp"], advantages, mask)
        clipped = losses.clipped_region(x["logp"], old, advantages)
        selected = clip_cov_tokens(
            covariance, mask, jax.random.key(0), fraction=1.0, low=0.2, high=1.5, clipped=clipped
        )
        loss = aggregated(lambda logp: clip_cov(logp, old, advantages, selected), mask)
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x["logp"]))
    assert 0 < np.asarray(selected).sum() < mask.sum()
    assert_close(value, stored("verl")[f"{number}/loss/clip_cov/value"])
    assert_close(grad, stored("verl")[f"{number}/loss/clip_cov/grad"])


@both
def test_kl_cov_is_verls(number):
    x = case(number)
    with jax.enable_x64(True):
        mask = valid_mask(x)
        old, advantages = x["old"], x["token_advantages"]
        selected = kl_cov_tokens(token_covariance(x["logp"], advantages, mask), mask, fraction=0.1)
        loss = aggregated(lambda logp: kl_cov(logp, old, advantages, selected, kl_coef=0.1), mask)
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x["logp"]))
    assert_close(value, stored("verl")[f"{number}/loss/kl_cov/value"])
    assert_close(grad, stored("verl")[f"{number}/loss/kl_cov/grad"])


def test_the_predicted_change_of_entropy_has_the_table_s_numbers():
    log_probs, advantages = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.array([0.3, -0.7, -0.7])
    plain = entropy_change(log_probs, advantages, learning_rate=1e-3)
    np.testing.assert_allclose(plain, -9.8555e-5, rtol=1e-4)
    np.testing.assert_allclose(entropy_change(log_probs, advantages, natural=True), -0.311601, rtol=1e-5)


def _entropy(logits):
    p = np.exp(logits - np.logaddexp.reduce(logits))
    return -np.sum(p * np.log(p))


@pytest.mark.parametrize("natural", [False, True])
def test_one_step_of_policy_gradient_changes_entropy_by_what_is_predicted_to_one_per_cent(natural):
    rng = np.random.default_rng(6)
    rate = 1e-4
    for _ in range(20):
        logits, reward = rng.normal(0, 1.5, 8), rng.normal(size=8)
        p = np.exp(logits - np.logaddexp.reduce(logits))
        advantages = reward - np.sum(p * reward)
        gradient = advantages if natural else p * advantages  # of the expected reward, in the logits
        with jax.enable_x64(True):
            predicted = float(entropy_change(np.log(p), advantages, learning_rate=rate, natural=natural))
        measured = _entropy(logits + rate * gradient) - _entropy(logits)
        np.testing.assert_allclose(measured, predicted, rtol=0.01)


def test_an_impossible_action_leaves_the_prediction_finite():
    log_probs = jnp.array([[0.0, -jnp.inf], [jnp.log(0.5), jnp.log(0.5)]])
    found = entropy_change(log_probs, jnp.array([[1.0, 5.0], [1.0, -1.0]]))
    assert found.shape == (2,)
    assert float(found[0]) == 0
    gradient = jax.jit(jax.grad(lambda a: entropy_change(log_probs, a).sum()))(jnp.ones((2, 2)))
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_the_law_of_entropy_and_reward_is_found_again_and_is_numpys_fit_under_noise():
    rng = np.random.default_rng(7)
    entropy = rng.uniform(0, 1.5, 30)
    reward = -0.2 * np.exp(entropy) + 0.9 + rng.normal(0, 0.02, 30)
    slope, intercept = np.polyfit(np.exp(entropy), reward, 1)
    padded, mask = np.append(entropy, np.nan), np.append(np.ones(30), 0)
    with jax.enable_x64(True):
        law = fit_entropy_law(padded, np.append(reward, np.nan), mask)
        found = np.array([law.a, law.b, law.ceiling, law(0.0)])
    np.testing.assert_allclose(found, [-slope, intercept, intercept + slope, intercept + slope], rtol=1e-9)


def test_without_any_spread_of_entropy_the_law_is_the_mean_reward():
    law = fit_entropy_law(jnp.full(3, 0.7), jnp.array([0.1, 0.2, 0.6]))
    np.testing.assert_allclose((law.a, law.b), (0.0, 0.3), atol=1e-6)
    law = fit_entropy_law(jnp.full(3, 0.7), jnp.array([0.1, 0.2, 0.6]), jnp.zeros(3))
    assert (float(law.a), float(law.b)) == (0.0, 0.0)


def test_arguments_that_do_not_fit_are_refused_with_what_to_change():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        kl_cov_tokens(x, x, fraction=0)
    with pytest.raises(ValueError, match="mask must have the shape of covariance"):
        kl_cov_tokens(x, x[:1])
    with pytest.raises(ValueError, match="low must be below high"):
        clip_cov_tokens(x, x, jax.random.key(0), low=5.0, high=1.0)
    with pytest.raises(ValueError, match="clipped must have the shape of covariance"):
        clip_cov_tokens(x, x, jax.random.key(0), clipped=x[:1])
    with pytest.raises(ValueError, match="kl_coef must be >= 0"):
        kl_cov(x, x, x, x, kl_coef=-1.0)
    with pytest.raises(ValueError, match="selected must have the shape of logp"):
        clip_cov(x, x, x, x[:1])
    with pytest.raises(ValueError, match="reward must have the shape of entropy"):
        fit_entropy_law(jnp.ones(2), jnp.ones(3))
