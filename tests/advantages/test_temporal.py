import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)

# One compilation per shape, whatever the discounts.
GAE = jax.jit(advantages.gae, static_argnames="whiten")
REINFORCE = jax.jit(advantages.reinforce_plus_plus, static_argnames="whiten")


def _random(seed=0, shape=(5, 17)):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask[1] = False
    return rewards, values, mask


def _gae_loop(rewards, values, mask, gamma, lam):
    adv, ret = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        next_value = next_advantage = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[b, t]:
                delta = float(rewards[b, t]) + gamma * next_value - float(values[b, t])
                next_advantage = adv[b, t] = delta + gamma * lam * next_advantage
                next_value = float(values[b, t])
                ret[b, t] = adv[b, t] + next_value
    return adv, ret


def _whiten(x, mask):
    return np.where(mask, (x - x[mask].mean()) / np.sqrt(x[mask].var(ddof=1) + 1e-8), 0)


def test_gae_gives_hand_worked_numbers_and_carries_through_a_masked_token():
    # gamma = lam = 1/2; token 2 is a tool's, its reward of 7 and value of 50 are never read.
    # t=3: delta = 2 - 3 = -1, A = -1, R = 2
    # t=1: delta = 1 + 3/2 - 2 = 1/2, A = 1/2 - 1/4 = 1/4, R = 9/4
    # t=0: delta = 0 + 2/2 - 1 = 0, A = 1/4 * 1/4 = 1/16, R = 17/16
    given, returns = advantages.gae(
        jnp.array([[0.0, 1.0, 7.0, 2.0]]),
        jnp.array([[1.0, 2.0, 50.0, 3.0]]),
        jnp.array([[1, 1, 0, 1]]),
        gamma=0.5,
        lam=0.5,
        whiten=False,
    )
    assert given.tolist() == [[1 / 16, 1 / 4, 0, -1]]
    assert returns.tolist() == [[17 / 16, 9 / 4, 0, 2]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0), (0.0, 1.0)])
def test_gae_agrees_with_a_float64_loop(gamma, lam):
    rewards, values, mask = _random()
    given, returns = GAE(rewards, values, mask, gamma=gamma, lam=lam, whiten=False)
    expected, expected_returns = _gae_loop(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(given, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected_returns, atol=1e-5)


def test_gae_stays_exact_over_thousands_of_tokens():
    rewards, values, mask = _random(3, (2, 4000))
    with jax.enable_x64(True):
        given, _ = GAE(rewards.astype(np.float64), values.astype(np.float64), mask, gamma=0.999, lam=0.99, whiten=False)
        np.testing.assert_allclose(given, _gae_loop(rewards, values, mask, 0.999, 0.99)[0], atol=1e-11)


def test_removing_masked_tokens_does_not_change_what_the_others_get():
    # Three actions with and without tool output between them.
    rewards, values = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[3.0, 5.0, 9.0]])
    spread = jnp.array([[0, 2, 3]])
    wide = [jnp.full((1, 5), 77.0).at[0, spread[0]].set(x[0]) for x in (rewards, values)]
    mask = jnp.zeros((1, 5)).at[0, spread[0]].set(1)
    options = {"gamma": 0.5, "lam": 0.5}
    for narrow_result, wide_result in zip(
        GAE(rewards, values, jnp.ones((1, 3)), **options),
        GAE(*wide, mask, **options),
        strict=True,
    ):
        np.testing.assert_allclose(wide_result[0, spread[0]], narrow_result[0], rtol=1e-6)
    np.testing.assert_allclose(
        advantages.reinforce_plus_plus(wide[0], mask, gamma=0.5)[0, spread[0]],
        advantages.reinforce_plus_plus(rewards, jnp.ones((1, 3)), gamma=0.5)[0],
        rtol=1e-6,
    )


def test_whitened_gae_has_zero_mean_unit_variance_and_zeros_where_masked_and_unwhitened_returns():
    rewards, values, mask = _random(1)
    given, returns = (np.asarray(x) for x in GAE(rewards, values, mask, gamma=0.9, lam=0.8))
    expected, expected_returns = _gae_loop(rewards, values, mask, 0.9, 0.8)
    np.testing.assert_allclose(given, _whiten(expected, mask), atol=1e-4)
    np.testing.assert_allclose(returns, expected_returns, atol=1e-5)
    assert not given[~mask].any()
    assert not returns[~mask].any()


def test_a_perfect_critic_leaves_no_advantage():
    rewards, _, mask = _random(2)
    _, returns = GAE(rewards, np.zeros_like(rewards), mask, gamma=0.9, lam=1.0, whiten=False)
    given, again = GAE(rewards, returns, mask, gamma=0.9, lam=0.3, whiten=False)
    np.testing.assert_allclose(given, np.zeros_like(rewards), atol=1e-5)
    np.testing.assert_allclose(again, returns, atol=1e-5)


def test_reinforce_plus_plus_is_the_whitened_discounted_reward_to_go():
    rewards, values, mask = _random(4)
    # With a critic of zero and lam 1 GAE's advantage is the reward-to-go.
    expected = _gae_loop(rewards, np.zeros_like(values), mask, 0.9, 1.0)[0]
    plain = REINFORCE(rewards, mask, gamma=0.9, whiten=False)
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    np.testing.assert_allclose(REINFORCE(rewards, mask, gamma=0.9), _whiten(expected, mask), atol=1e-4)


def test_reinforce_plus_plus_credits_the_turns_before_a_tool_call():
    # Resetting the return at the tool's token (index 2) would leave the first turn without any credit.
    rewards = jnp.array([[0.0, 0.0, 0.0, 0.0, 1.0]])
    given = advantages.reinforce_plus_plus(rewards, jnp.array([[1, 1, 0, 1, 1]]), whiten=False)
    assert given.tolist() == [[1, 1, 0, 1, 1]]


def test_reinforce_plus_plus_baseline_gives_hand_worked_numbers():
    # Centred: +-1/2 on 1 and 3 tokens, +-1 on 2 and 2 tokens. Sum 1/2 - 3/2 + 2 - 2 = -1 over 8 tokens, mean -1/8.
    # Squares 4/4 + 4 = 5, less 8 / 64: unbiased variance (5 - 1/8) / 7 = 39/56.
    rewards = jnp.array([[1.0, 0.0], [2.0, 0.0]])
    mask = np.array([[0, 1, 0, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    expected = (np.array([[0.5], [-0.5], [1], [-1]]) + 1 / 8) / (39 / 56) ** 0.5 * mask
    np.testing.assert_allclose(advantages.reinforce_plus_plus_baseline(rewards, mask), expected, rtol=1e-5)


def test_reinforce_plus_plus_baseline_leaves_out_invalid_and_single_rollouts():
    rewards = jnp.array([[1.0, 0.0], [2.0, 0.0], [9.0, jnp.nan]])
    mask = np.ones((6, 3))
    valid = jnp.array([[1, 1], [1, 1], [1, 0]])
    given = np.asarray(advantages.reinforce_plus_plus_baseline(rewards, mask, valid))
    np.testing.assert_array_equal(given[:4], advantages.reinforce_plus_plus_baseline(rewards[:2], mask[:4]))
    assert not given[4:].any()


def test_an_empty_batch_and_a_single_token_give_finite_zeros_with_finite_gradients():
    ones = jnp.ones((1, 3))
    gradients = jax.jit(jax.grad(lambda r, mask: GAE(r, 2 * ones, mask)[0].sum()))
    for mask in (jnp.zeros((1, 3)), jnp.array([[0.0, 1.0, 0.0]])):
        given, _ = GAE(ones, 2 * ones, mask)
        assert not np.asarray(given).any()
        assert not np.asarray(REINFORCE(ones, mask)).any()
        assert np.all(np.isfinite(gradients(ones, mask)))


def test_gradients_agree_with_finite_differences_through_the_scan():
    with jax.enable_x64(True):
        rewards, values, mask = _random(5, (2, 6))
        mask[1] = True
        check_grads(
            jax.jit(lambda r, v: advantages.gae(r, v, mask, gamma=0.9, lam=0.8)),
            (rewards.astype(np.float64), values.astype(np.float64)),
            order=1,
            modes=["rev"],
        )


def test_vmap_and_traced_discounts_equal_single_calls():
    rewards, values, mask = _random(6)
    gammas = jnp.array([0.5, 1.0])
    batched, _ = jax.jit(jax.vmap(lambda g: advantages.gae(rewards, values, mask, gamma=g, lam=0.7, whiten=False)))(
        gammas
    )
    for row, gamma in zip(batched, (0.5, 1.0), strict=True):
        np.testing.assert_allclose(row, _gae_loop(rewards, values, mask, gamma, 0.7)[0], atol=1e-5)


def test_padding_changes_nothing():
    rewards, values, mask = _random(7)
    pad = ((0, 2), (0, 4))
    padded = [np.pad(x, pad, constant_values=np.nan) for x in (rewards, values)]
    for function, arrays, padded_arrays in (
        (GAE, (rewards, values), padded),
        (REINFORCE, (rewards,), padded[:1]),
    ):
        base = jax.tree.leaves(function(*arrays, mask))
        given = jax.tree.leaves(function(*padded_arrays, np.pad(mask, pad)))
        for expected, x in zip(base, given, strict=True):
            np.testing.assert_allclose(x, np.pad(expected, pad), atol=1e-5)


def test_narrow_dtypes_are_raised_and_wide_ones_kept():
    narrow = jnp.ones((2, 3), jnp.bfloat16)
    assert {x.dtype for x in jax.eval_shape(advantages.gae, narrow, narrow, narrow)} == {jnp.dtype("float32")}
    assert jax.eval_shape(advantages.reinforce_plus_plus, narrow, narrow).dtype == jnp.float32
    assert jax.eval_shape(advantages.reinforce_plus_plus_baseline, narrow[:, :1], narrow).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jnp.ones((2, 3), jnp.float64)
        assert {x.dtype for x in jax.eval_shape(advantages.gae, wide, wide, narrow)} == {jnp.dtype("float64")}


def test_impossible_arguments_are_refused():
    one = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"rewards must be \[B, T\], got shape \(2,\); put a sequence's reward"):
        advantages.gae(jnp.zeros(2), one, one)
    with pytest.raises(ValueError, match="mask must have the shape of values"):
        advantages.gae(one, jnp.zeros((2, 4)), one)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.5"):
        advantages.gae(one, one, one, gamma=1.5)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got -0.5"):
        advantages.gae(one, one, one, lam=-0.5)
    with pytest.raises(ValueError, match=r"mask must have P \* G = 6 rows"):
        advantages.reinforce_plus_plus_baseline(one, one)


def test_every_sequence_may_have_its_own_lambda():
    rewards, values, mask = _random(4)
    lam = np.float32([0.0, 0.2, 0.5, 0.9, 1.0])
    given, returns = GAE(rewards, values, mask, gamma=0.9, lam=lam, whiten=False)
    for b in range(5):
        row, row_returns = _gae_loop(rewards[b : b + 1], values[b : b + 1], mask[b : b + 1], 0.9, float(lam[b]))
        np.testing.assert_allclose(given[b], row[0], atol=1e-5)
        np.testing.assert_allclose(returns[b], row_returns[0], atol=1e-5)
    np.testing.assert_array_equal(GAE(rewards, values, mask, gamma=0.9, lam=lam[:, None], whiten=False)[0], given)


def test_extended_gae_gives_the_papers_numbers():
    values = jnp.array([[0.5, 0.6, 0.4]])
    mask, cut = jnp.ones((1, 3)), jnp.array([True])
    for lam, expected in ((1.0, [-0.1, -0.2, 0.0]), (0.95, [-0.09, -0.2, 0.0])):
        given, _ = advantages.gae(jnp.zeros((1, 3)), values, mask, lam=lam, truncated=cut, whiten=False)
        np.testing.assert_allclose(given, [expected], atol=1e-6)
    finished, _ = advantages.gae(jnp.array([[0.0, 0.0, 1.0]]), values, mask, truncated=~cut, whiten=False)
    np.testing.assert_allclose(finished, [[0.5, 0.4, 0.6]], rtol=1e-6)


def test_a_truncated_sequence_bootstraps_from_its_last_trained_token():
    # gamma 1/2: at the last action, t=1, delta = 2 + 3/2 - 3 = 1/2; at t=0, delta = 0 + 3/2 - 1 and A = 1/2 + 1/4.
    given, returns = advantages.gae(
        jnp.array([[0.0, 2.0, 7.0]] * 2),
        jnp.array([[1.0, 3.0, 50.0]] * 2),
        jnp.array([[1, 1, 0]] * 2),
        gamma=0.5,
        truncated=jnp.array([True, False]),
        whiten=False,
    )
    assert given.tolist() == [[0.75, 0.5, 0], [0.0, -1.0, 0]]
    assert returns.tolist() == [[1.75, 3.5, 0], [1.0, 2.0, 0]]


def test_decoupled_gae_takes_advantages_from_one_lambda_and_returns_from_the_other():
    rewards, values, mask = _random(5)
    given, returns = advantages.decoupled_gae(rewards, values, mask, gamma=0.9, lam_policy=0.5, whiten=False)
    np.testing.assert_allclose(given, _gae_loop(rewards, values, mask, 0.9, 0.5)[0], atol=1e-5)
    np.testing.assert_allclose(returns, _gae_loop(rewards, values, mask, 0.9, 1.0)[1], atol=1e-5)


def test_the_adaptive_lambda_spreads_credit_over_a_share_of_the_length():
    np.testing.assert_allclose(
        advantages.length_adaptive_lam(jnp.array([0, 1, 20, 40, 2000]), alpha=0.05), [0, 0, 0, 0.5, 0.99], rtol=1e-6
    )
    # The sum of lam^k is 1 / (1 - lam) = alpha * length.
    lam = float(advantages.length_adaptive_lam(jnp.array([4000]), alpha=0.05)[0])
    np.testing.assert_allclose(sum(lam**k for k in range(20_000)), 200, rtol=1e-3)


def test_distillation_advantage_is_the_clipped_log_ratio_without_gradient():
    teacher, logp = jnp.array([[-1.0, -9.0, jnp.nan]]), jnp.array([[-3.0, -1.0, 0.0]])
    mask = jnp.array([[1, 1, 0]])
    assert advantages.opd(teacher, logp, mask).tolist() == [[2, -8, 0]]
    assert advantages.opd(teacher, logp, mask, clip=5.0).tolist() == [[2, -5, 0]]
    assert not np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(advantages.opd(teacher, x, mask))))(logp)).any()


def test_reinforce_on_the_distillation_advantage_follows_the_reverse_kl():
    # Three tokens, by enumeration: sum_y p(y) A(y) dlogp(y) = -d KL(p || teacher) / d logits.
    logits, teacher = jnp.array([0.3, -0.2, 0.5]), jax.nn.log_softmax(jnp.array([1.0, 0.0, -1.0]))
    logp = jax.nn.log_softmax(logits)
    a = advantages.opd(teacher[:, None], logp[:, None], jnp.ones((3, 1)))[:, 0]
    surrogate = jax.jit(jax.grad(lambda z: jnp.sum(jnp.exp(logp) * a * jax.nn.log_softmax(z))))(logits)
    kl = jax.jit(jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - teacher))))(logits)
    np.testing.assert_allclose(surrogate, -kl, atol=1e-6)


def test_wrong_lambdas_and_flags_are_refused():
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"lam must be a scalar, \[B\] or \[B, 1\] with B = 2, got shape \(3,\)"):
        advantages.gae(x, x, mask, lam=jnp.ones(3))
    with pytest.raises(ValueError, match="truncated must be a scalar"):
        advantages.gae(x, x, mask, truncated=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"lam_policy must be in \[0, 1\], got 2"):
        advantages.decoupled_gae(x, x, mask, lam_policy=2.0)
    with pytest.raises(ValueError, match="alpha must be above 0"):
        advantages.length_adaptive_lam(jnp.ones(2), alpha=0.0)
    with pytest.raises(ValueError, match="clip must be above 0"):
        advantages.opd(x, x, mask, clip=-1.0)
    with pytest.raises(ValueError, match="mask must have the shape of logp"):
        advantages.opd(x, x[:, :2], mask)
