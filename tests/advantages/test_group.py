import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)

LENGTHS = np.random.default_rng(7).integers(1, 50, (6, 5)).astype(np.float32)
GREEDY = np.random.default_rng(8).normal(size=6).astype(np.float32)

# Every estimator as a function of rewards [6, 5] and valid alone.
ESTIMATORS = {
    "reinforce": advantages.reinforce,
    "grpo": advantages.grpo,
    "grpo population": functools.partial(advantages.grpo, ddof=0),
    "grpo batch": functools.partial(advantages.grpo, std_level="batch"),
    "grpo leave_one_out": functools.partial(advantages.grpo, leave_one_out=True),
    "maxrl": advantages.maxrl,
    "dr_grpo": advantages.dr_grpo,
    "rloo": advantages.rloo,
    "gpg": advantages.gpg,
    "gpg advantages": functools.partial(advantages.gpg, count="advantages"),
    "pass_at_k": advantages.pass_at_k,
    "pass_at_k normalized": functools.partial(advantages.pass_at_k, normalize_std=True),
    "opo": lambda rewards, valid=None: advantages.opo(rewards, LENGTHS, valid),
    "remax": lambda rewards, valid=None: advantages.remax(rewards, GREEDY, valid),
    "mc_grpo": lambda rewards, valid=None: advantages.mc_grpo(rewards, valid)[0],
}
ESTIMATORS = {name: jax.jit(function) for name, function in ESTIMATORS.items()}
OWN_BASELINE = [name for name in ESTIMATORS if name not in ("reinforce", "remax")]
PER_GROUP = [name for name in OWN_BASELINE if not name.startswith(("gpg", "grpo batch", "maxrl"))]


def _loop(name, rewards, valid):
    """Each estimator in float64, one rollout after the other."""
    rewards = rewards.astype(np.float64)
    result = np.zeros_like(rewards)
    centered = np.zeros_like(rewards)
    for p in range(rewards.shape[0]):
        group = rewards[p, valid[p]]
        n = len(group)
        for g in np.flatnonzero(valid[p]):
            r = rewards[p, g]
            centered[p, g] = r - group.mean()
            if name == "reinforce":
                result[p, g] = r
            elif name == "remax":
                result[p, g] = r - GREEDY[p]
            elif n < 2:
                continue
            elif name in ("grpo", "grpo population"):
                result[p, g] = (r - group.mean()) / (group.std(ddof=int(name == "grpo")) + 1e-6)
            elif name == "grpo leave_one_out":
                others = rewards[p, valid[p] & (np.arange(5) != g)]
                std = others.std(ddof=1) if n > 2 else 0.0
                result[p, g] = (r - others.mean()) / ((std or group.std(ddof=1)) + 1e-6)
            elif name == "maxrl":
                result[p, g] = (r - group.mean()) / group.mean() if group.mean() > 0 else 0
            elif name == "dr_grpo":
                result[p, g] = r - group.mean()
            elif name == "rloo":
                result[p, g] = r - (group.sum() - r) / (n - 1)
            elif name == "opo":
                lengths = LENGTHS[p, valid[p]].astype(np.float64)
                result[p, g] = r - (lengths * group).sum() / lengths.sum()
            elif name.startswith("pass_at_k") and r == group.max():
                second = np.sort(group)[-2]
                scale = group.std(ddof=1) + 1e-6 if "normalized" in name else 1
                result[p, g] = (r - second) / scale
            elif name == "mc_grpo":
                median = np.quantile(group, 0.5, method="lower")
                result[p, g] = (r - median) / (np.quantile(abs(group - median), 0.5, method="lower") + 1e-3)
    if name == "grpo batch":
        result = centered / (rewards[valid].std(ddof=1) + 1e-6)
    if name.startswith("gpg"):
        live = centered.any(axis=1, keepdims=True) if "advantages" in name else rewards != 0
        result = centered * valid.sum() / max(1, (live & valid).sum())
    return result


def _random(seed=0):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(6, 5)).astype(np.float32)
    rewards[4] = 0.7  # equal rewards
    rewards[3, 1] = 0
    valid = rng.random((6, 5)) < 0.7
    valid[0], valid[1], valid[2] = True, [False, False, True, False, False], False  # full, single, empty
    return rewards, valid


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_agree_with_a_float64_loop_and_never_read_invalid_rewards(name):
    rewards, valid = _random()
    expected = _loop(name, rewards, valid)
    given = ESTIMATORS[name](np.where(valid, rewards, np.nan), valid)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(given)[~valid], 0)


@pytest.mark.parametrize("name", PER_GROUP)
def test_a_reward_that_is_not_a_number_is_seen_in_its_group_and_in_no_other(name):
    rewards, valid = _random()
    rewards[0, 1] = np.nan
    given = np.asarray(ESTIMATORS[name](rewards, valid))
    assert np.isnan(given[0]).any()
    assert np.isfinite(given[1:]).all()


@pytest.mark.parametrize("name", OWN_BASELINE)
def test_a_single_valid_rollout_and_equal_rewards_give_exactly_zero(name):
    rewards, valid = _random()
    given = np.asarray(ESTIMATORS[name](rewards, valid))
    assert not given[[1, 2, 4]].any()
    assert given[0].any()


@pytest.mark.parametrize("name", PER_GROUP)
def test_advantages_do_not_move_when_all_rewards_are_shifted(name):
    rewards, valid = _random(1)
    np.testing.assert_allclose(
        ESTIMATORS[name](rewards + 2, valid), ESTIMATORS[name](rewards, valid), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("function", "power"),
    [
        (lambda r, v: advantages.grpo(r, v, eps=0.0), 0),
        (lambda r, v: advantages.pass_at_k(r, v, normalize_std=True, eps=0.0), 0),
        (advantages.dr_grpo, 1),
        (advantages.rloo, 1),
        (advantages.gpg, 1),
        (advantages.pass_at_k, 1),
        (lambda r, v: advantages.opo(r, LENGTHS, v), 1),
    ],
)
def test_advantages_scale_with_the_rewards_or_not_at_all(function, power):
    rewards, valid = _random(2)
    np.testing.assert_allclose(
        function(4 * rewards, valid), 4.0**power * np.asarray(function(rewards, valid)), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gpg", "pass_at_k", "mc_grpo", "reinforce"])
def test_permuted_rollouts_have_permuted_advantages_and_invalid_slots_change_nothing(name):
    rewards, valid = _random(3)
    function = ESTIMATORS[name]
    base = np.asarray(function(rewards, valid))
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(function(rewards[:, order], valid[:, order]), base[:, order], rtol=1e-5, atol=1e-6)
    padded = function(np.pad(rewards, ((0, 1), (0, 3)), constant_values=9.0), np.pad(valid, ((0, 1), (0, 3))))
    np.testing.assert_allclose(padded, np.pad(base, ((0, 1), (0, 3))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_advantages_of_a_group_sum_to_zero(name):
    rewards, valid = _random(4)
    np.testing.assert_allclose(np.asarray(ESTIMATORS[name](rewards, valid)).sum(axis=1), np.zeros(6), atol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_are_finite_at_singletons_empty_and_equal_groups(name):
    rewards, valid = _random()
    weights = np.arange(30.0, dtype=np.float32).reshape(6, 5)
    gradient = jax.jit(jax.grad(lambda r: jnp.sum(weights * ESTIMATORS[name](r, valid))))(rewards)
    assert np.all(np.isfinite(gradient))


def test_vmap_over_seeds_equals_single_calls():
    pairs = [_random(seed) for seed in range(2)]
    rewards, valid = (np.stack(x) for x in zip(*pairs, strict=True))
    names = ["grpo", "rloo", "gpg", "pass_at_k", "opo", "mc_grpo"]
    batched = jax.jit(jax.vmap(lambda r, v: {name: ESTIMATORS[name](r, v) for name in names}))(rewards, valid)
    for name in names:
        expected = [_loop(name, *pair) for pair in pairs]
        np.testing.assert_allclose(batched[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_grpo_gives_hand_worked_numbers():
    # Mean 2, squared deviations 1 + 0 + 1: std 1 with n - 1, sqrt(2 / 3) with n.
    rewards = jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(advantages.grpo(rewards, eps=0.0), [[-1, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(advantages.grpo(rewards, eps=0.25), [[-0.8, 0, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(advantages.grpo(rewards, ddof=0, eps=0.0), [[-(1.5**0.5), 0, 1.5**0.5]], rtol=1e-6)
    np.testing.assert_array_equal(advantages.grpo(rewards, normalize_std=False), advantages.dr_grpo(rewards))
    # Two rewards, whatever they are: -+ 1 / sqrt(2).
    np.testing.assert_allclose(advantages.grpo(jnp.array([[0.0, 1.0]]), eps=0.0), [[-(0.5**0.5), 0.5**0.5]], rtol=1e-6)


def test_a_groups_grpo_advantages_do_not_depend_on_other_prompts():
    # A standard deviation of the raw rewards over the batch would mix in how hard the prompts are.
    easy = jnp.array([[1.0, 0.0, 1.0, 1.0]])
    alone = advantages.grpo(easy)
    beside = advantages.grpo(jnp.concatenate([easy, 100 * easy - 50]))
    np.testing.assert_array_equal(beside[:1], alone)
    np.testing.assert_allclose(np.var(np.asarray(beside), axis=1, ddof=1), [1, 1], rtol=1e-5)


def test_rewards_equal_but_for_rounding_are_no_signal():
    # Sums of weighted components: 0.1 + 0.2 and 0.3 differ by one bit of float32.
    rewards = np.array([[np.float32(0.1) + np.float32(0.2), 0.3, 0.3, 0.3]], np.float32)
    rewards[0, 0] = np.nextafter(rewards[0, 1], np.float32(1))
    assert rewards[0, 0] != rewards[0, 1]
    assert not np.asarray(advantages.grpo(rewards, eps=0.0)).any()
    # A real difference, however small against 1, is one.
    np.testing.assert_allclose(
        advantages.grpo(np.float32([[1e-6, 2e-6]]), eps=0.0), [[-(0.5**0.5), 0.5**0.5]], rtol=1e-5
    )


@pytest.mark.parametrize("n", [4, 8, 16])
def test_one_odd_reward_against_equal_others_never_explodes_in_float32(n):
    # With E[x^2] - E[x]^2 this grid gives advantages in the thousands.
    levels = np.linspace(0, 1, 21)
    odd, rest = (x.reshape(-1) for x in np.meshgrid(levels, levels))
    rewards = np.concatenate([odd[:, None], np.repeat(rest[:, None], n - 1, axis=1)], axis=1).astype(np.float32)
    differs = odd != rest
    # Closed form: the odd one has (n - 1) d / n against std d / sqrt(n), so (n - 1) / sqrt(n); the others -1 / sqrt(n).
    sign = np.sign(odd - rest)[:, None]
    expected = sign * np.concatenate([np.full((441, 1), n - 1.0), -np.ones((441, n - 1))], axis=1) / n**0.5
    np.testing.assert_allclose(advantages.grpo(rewards, eps=0.0), expected, rtol=1e-4)
    difference = (odd - rest)[:, None]
    expected = np.concatenate([difference, np.repeat(-difference / (n - 1), n - 1, axis=1)], axis=1)
    given = np.asarray(advantages.rloo(rewards))
    np.testing.assert_allclose(given, expected, atol=1e-6)
    assert not given[~differs].any()


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_leave_one_out_std_never_explodes_when_all_others_are_equal(n):
    # As E[x^2] - E[x]^2 in float32 the variance of equal numbers is 1e-7, and [.35, .95, .95, ...] gave -1310.
    levels = np.linspace(0, 1, 21)
    odd, rest = (x.reshape(-1) for x in np.meshgrid(levels, levels))
    rewards = np.concatenate([odd[:, None], np.repeat(rest[:, None], n - 1, axis=1)], axis=1).astype(np.float32)
    given = np.asarray(jax.jit(lambda r: advantages.grpo(r, leave_one_out=True, eps=0.0))(rewards))
    # The odd one is d from the others, whose spread is 0: the group's, d / sqrt(n), takes its place. One of the others
    # is d / (n - 1) from the mean of its others, whose spread is d / sqrt(n - 1) (again the group's for n = 2).
    sign = np.sign(np.round(odd - rest, 6))[:, None]
    other = n**0.5 if n == 2 else (n - 1) ** -0.5
    expected = sign * np.concatenate([np.full((441, 1), n**0.5), np.full((441, n - 1), -other)], axis=1)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)


def test_leave_one_out_advantages_have_no_unit():
    rewards = np.array([[0.35, 0.95, 0.95, 0.95], [1.0, 2.0, 4.0, 4.0]], np.float32)
    small = advantages.grpo(1e-3 * rewards, leave_one_out=True, eps=0.0)
    np.testing.assert_allclose(small, advantages.grpo(rewards, leave_one_out=True, eps=0.0), rtol=1e-4)


def test_batch_std_is_that_of_the_raw_rewards_and_the_mean_stays_the_groups():
    # Rewards 0, 1, 4, 5 have squared deviations 6.25, 2.25, 2.25, 6.25: variance 17 / 3, std 2.3805.
    rewards = jnp.array([[0.0, 1.0], [4.0, 5.0]])
    given = advantages.grpo(rewards, std_level="batch", eps=0.0)
    np.testing.assert_allclose(given, np.array([[-0.5, 0.5], [-0.5, 0.5]]) / (17 / 3) ** 0.5, rtol=1e-6)
    # The differences between prompts are in the scale, so the variance of the advantages is below 1.
    assert np.var(np.asarray(given), ddof=1) < 0.1
    both = advantages.grpo(rewards, std_level="batch", leave_one_out=True, eps=0.0)
    np.testing.assert_allclose(both, 2 * given, rtol=1e-6)


def test_maxrl_weighs_a_prompt_by_the_inverse_of_its_success_rate():
    rewards = jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    expected = [[3, -1, -1, -1], [1, 1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(advantages.maxrl(rewards), expected, rtol=1e-6)


def test_maxrl_is_unbiased_for_the_truncated_log_likelihood():
    # E[sum_g A_g dlogp_g / G] for a Bernoulli policy is d/dp of -sum_{k<=G-1} (1 - p)^k / k, by enumeration.
    p, n = 0.3, 4
    total = 0.0
    for bits in np.ndindex(*(2,) * n):
        r = np.array(bits, np.float64)
        probability = np.prod(np.where(r == 1, p, 1 - p))
        score = np.where(r == 1, 1 / p, -1 / (1 - p))  # d log prob / dp
        a = np.asarray(advantages.maxrl(r[None].astype(np.float32)))[0]
        total += probability * (a * score).sum() / n
    np.testing.assert_allclose(total, sum((1 - p) ** k for k in range(n - 1)), rtol=1e-5)


def test_rloo_gives_hand_worked_numbers():
    # 1 - (0 + 2) / 2 = 0, 0 - 3 / 2 = -1.5, 2 - 1 / 2 = 1.5; with two rollouts, plain differences.
    assert advantages.rloo(jnp.array([[1.0, 0.0, 2.0]])).tolist() == [[0, -1.5, 1.5]]
    # Length-two group of summed log-probs: -2.07944 and -0.69315 give -+1.38629.
    np.testing.assert_allclose(advantages.rloo(jnp.log(jnp.array([[0.125, 0.5]]))), [[-1.38629, 1.38629]], rtol=1e-5)
    np.testing.assert_allclose(advantages.rloo(jnp.array([[1, 0, 0, 1]])), [[2 / 3, -2 / 3, -2 / 3, 2 / 3]], rtol=1e-6)


def test_rloo_of_a_singleton_is_zero_however_it_came_about():
    assert advantages.rloo(jnp.array([[5.0]])).tolist() == [[0]]
    assert advantages.rloo(jnp.array([[5.0, 3.0]]), jnp.array([[True, False]])).tolist() == [[0, 0]]


def test_opo_weighs_the_baseline_by_length():
    # (1 * 10 + 0 * 30) / 40 = 0.25.
    assert advantages.opo(jnp.array([[1.0, 0.0]]), jnp.array([[10, 30]])).tolist() == [[0.75, -0.25]]
    equal = advantages.opo(jnp.array([[1.0, 0.0, 0.5]]), jnp.full((1, 3), 7))
    np.testing.assert_allclose(equal, [[0.5, -0.5, 0.0]], atol=1e-7)
    no_length = advantages.opo(jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2)))
    np.testing.assert_allclose(no_length, [[0.5, -0.5]])


def test_remax_and_reinforce_keep_a_single_rollouts_advantage():
    assert advantages.remax(jnp.array([[1.0], [0.0]]), jnp.array([0.25, 0.5])).tolist() == [[0.75], [-0.5]]
    assert advantages.reinforce(jnp.array([[1.0], [0.0]])).tolist() == [[1], [0]]


def test_gpg_scales_up_for_rollouts_without_signal():
    rewards = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    # 6 rollouts, 3 rewards are not 0: alpha 2. 2 rollouts are in a group whose rewards differ: alpha 3.
    assert advantages.gpg(rewards)[0].tolist() == [1, -1]
    assert advantages.gpg(rewards, count="advantages")[0].tolist() == [1.5, -1.5]
    assert advantages.gpg(rewards, f_norm=2.0)[0].tolist() == [0.5, -0.5]
    assert not np.asarray(advantages.gpg(jnp.zeros((2, 2)))).any()


def test_pass_at_k_credits_the_best_with_its_lead():
    rewards = jnp.array([[0.25, 1.0, 0.5, 0.25], [1.0, 0.0, 1.0, 0.0], [-3.0, -1.0, -2.0, -1.5]])
    assert advantages.pass_at_k(rewards).tolist() == [[0, 0.5, 0, 0], [0, 0, 0, 0], [0, 0.5, 0, 0]]
    # Mean 0.5, squares 0.0625 + 0.25 + 0 + 0.0625 = 0.375, std sqrt(0.125).
    normalized = advantages.pass_at_k(rewards[:1], normalize_std=True, eps=0.0)
    np.testing.assert_allclose(normalized, [[0, 0.5 / 0.125**0.5, 0, 0]], rtol=1e-6)


def test_mc_grpo_gives_the_papers_numbers():
    given, keep = advantages.mc_grpo(jnp.array([[0.2, 0.9, 0.5], [1.0, 1.0, 1.0]]))
    np.testing.assert_allclose(given, [[-0.996678, 1.328904, 0], [0, 0, 0]], rtol=1e-5)
    assert keep.tolist() == [[True, True, False], [False, True, True]]


def test_mc_grpo_drops_exactly_one_rollout_at_the_median_of_every_group_that_has_one():
    rng = np.random.default_rng(5)
    rewards = rng.integers(0, 3, (200, 6)).astype(np.float32)
    valid = rng.random((200, 6)) < 0.6
    given, keep = (np.asarray(x) for x in jax.jit(advantages.mc_grpo)(np.where(valid, rewards, np.nan), valid))
    dropped = valid & ~keep
    assert not (keep & ~valid).any()
    np.testing.assert_array_equal(dropped.sum(axis=1), valid.any(axis=1))
    assert not given[dropped].any()
    for p, g in zip(*np.nonzero(dropped), strict=True):
        group = np.flatnonzero(valid[p])
        median = np.quantile(rewards[p, group], 0.5, method="lower")
        assert g == next(i for i in group if rewards[p, i] == median)


def test_mc_grpo_has_a_bound_and_a_fallback_where_the_deviation_is_zero():
    rewards = jnp.array([[0.0, 0.0, 1.0]])  # median 0, deviations 0, 0, 1: their median is 0
    np.testing.assert_allclose(advantages.mc_grpo(rewards)[0], [[0, 0, 1000]], rtol=1e-5)
    assert advantages.mc_grpo(rewards, max_abs=5.0)[0].tolist() == [[0, 0, 5]]
    assert advantages.mc_grpo(rewards, zero_mad_scale=1.0)[0].tolist() == [[0, 0, 1]]
    spread = jnp.array([[0.2, 0.9, 0.5]])
    np.testing.assert_array_equal(advantages.mc_grpo(spread, zero_mad_scale=1.0)[0], advantages.mc_grpo(spread)[0])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_narrow_dtypes_are_raised_and_wide_ones_kept(name):
    for given, got in (("bfloat16", "float32"), ("int32", "float32")):
        assert jax.eval_shape(ESTIMATORS[name], jnp.ones((6, 5), given)).dtype == got
    with jax.enable_x64(True):
        assert jax.eval_shape(ESTIMATORS[name], jnp.ones((6, 5), jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize("name", ESTIMATORS)
def test_flat_rewards_are_refused_with_the_way_out(name):
    message = r"rewards must be \[P, G\], got shape \(64,\); reshape with as_groups\(rewards, group_size=8\)"
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name](jnp.zeros(64))
    with pytest.raises(ValueError, match="valid must have the shape of rewards"):
        ESTIMATORS[name](jnp.zeros((6, 5)), jnp.ones(6))


def test_impossible_arguments_are_refused():
    rewards = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="ddof must be 1"):
        advantages.grpo(rewards, ddof=2)
    with pytest.raises(ValueError, match='std_level must be "group" or "batch"'):
        advantages.grpo(rewards, std_level="global")
    with pytest.raises(ValueError, match='std_level="batch" does not apply'):
        advantages.grpo(rewards, normalize_std=False, std_level="batch")
    with pytest.raises(ValueError, match="lengths must have the shape of rewards"):
        advantages.opo(rewards, jnp.ones(2))
    with pytest.raises(ValueError, match=r"greedy_rewards must be \[P\], got shape \(2, 3\)"):
        advantages.remax(rewards, rewards)
    with pytest.raises(ValueError, match=r"one number per prompt, P = 2, got shape \(3,\)"):
        advantages.remax(rewards, jnp.zeros(3))
    with pytest.raises(ValueError, match="count must be"):
        advantages.gpg(rewards, count="tokens")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_abs must be above 0, got 0"):
        advantages.mc_grpo(rewards, max_abs=0)
