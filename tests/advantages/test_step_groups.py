import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages
from tests.advantages.compiled import all_compiled

advantages = all_compiled(advantages)

KEY = jax.random.key(0)


def _random(seed=0, shape=(3, 4, 5)):
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 0.5, 1.0], shape[:2])
    steps = rng.choice([0.0, 1.0], shape)
    exists = np.arange(shape[2]) < rng.integers(1, shape[2] + 1, (*shape[:2], 1))
    return rewards, steps, exists, rng.random(shape[:2]) < 0.8


def _normalized(x, eps=1e-6):
    spread = x.std(ddof=1) if len(x) > 1 else 0.0
    return (x - x.mean()) / (spread + eps) if spread > 1e-9 else 0 * x


def test_a_block_of_two_hits_and_two_misses_gives_the_papers_numbers():
    steps = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    given = advantages.srgpo(KEY, jnp.ones((1, 2)), steps, jnp.ones((1, 2, 2)), block_size=4)
    np.testing.assert_allclose(given.reshape(-1), [0.866024, -0.866024, -0.866024, 0.866024], rtol=1e-6)
    half = advantages.srgpo(
        KEY, jnp.ones((1, 2)), steps, jnp.ones((1, 2, 2)), block_size=4, step_weight=0.5, normalize_std=False
    )
    np.testing.assert_allclose(half.reshape(-1), [0.25, -0.25, -0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("blocks", "by_step"), [("batch", True), ("prompt", True), ("sequence", True), ("sequence", False)]
)
def test_both_levels_agree_with_a_float64_loop(blocks, by_step):
    rewards, steps, exists, valid = _random()
    counts = exists & valid[:, :, None]
    place = np.arange(12).reshape(3, 4, 1) // {"batch": 12, "prompt": 4, "sequence": 1}[blocks] + 0 * steps.astype(int)
    block = np.asarray(advantages.random_blocks(KEY, counts, size=3, within=place))
    expected = np.zeros(steps.shape)
    for name in np.unique(place[counts]):
        for number in np.unique(block[counts & (place == name)]):
            inside = counts & (place == name) & (block == number)
            expected[inside] += 2 * _normalized(steps[inside])
    for p in range(3):
        if by_step:
            per_step = np.broadcast_to(rewards[p][:, None], steps[p].shape)[counts[p]]
            expected[p][counts[p]] += _normalized(per_step)
        else:
            whole = np.zeros(4)
            whole[valid[p]] = _normalized(rewards[p][valid[p]])
            expected[p] += np.where(counts[p], whole[:, None], 0)
    given = advantages.srgpo(
        KEY, np.where(valid, rewards, np.nan), steps, exists, valid, block_size=3, blocks=blocks, step_weight=2.0,
        by_step=by_step,
    )  # fmt: skip
    np.testing.assert_allclose(given, expected, atol=2e-5)


def test_blocks_are_full_but_for_the_last_of_those_that_may_share_one():
    exists = np.random.default_rng(1).random((4, 3, 7)) < 0.6
    block = np.asarray(advantages.random_blocks(KEY, exists, size=8))
    sizes = np.bincount(block[exists])
    assert (block[~exists] == -1).all()
    assert (sizes[:-1] == 8).all()
    assert sizes[-1] == exists.sum() % 8
    prompt = np.broadcast_to(np.arange(4)[:, None, None], exists.shape)
    apart = np.asarray(advantages.random_blocks(KEY, exists, size=4, within=prompt))
    for p in range(4):
        sizes = np.bincount(apart[p][exists[p]])
        assert (sizes[:-1] == 4).all()
        assert sizes.sum() == exists[p].sum()


@pytest.mark.parametrize("size", [None, 1000])
def test_no_size_or_one_beyond_the_number_of_steps_is_one_block(size):
    exists = np.random.default_rng(1).random((2, 2, 3)) < 0.7
    block = advantages.random_blocks(KEY, exists, size=size)
    np.testing.assert_array_equal(block, np.where(exists, 0, -1))


def test_all_partitions_are_about_equally_likely():
    def together(key):
        block = advantages.random_blocks(key, jnp.ones((1, 2, 2)), size=2).reshape(-1)
        return block[0] == block[1:]

    share = jnp.mean(jax.jit(jax.vmap(together))(jax.random.split(KEY, 3000)), axis=0)
    np.testing.assert_allclose(share, 1 / 3, atol=0.04)


def test_a_sequences_blocks_do_not_depend_on_its_place_in_the_batch_or_on_padding():
    rewards, steps, exists, valid = _random(2)
    ids = np.arange(50, 62).reshape(3, 4)
    order = np.array([2, 0, 1])
    given = advantages.srgpo(KEY, rewards, steps, exists, valid, id=ids, block_size=4)
    moved = advantages.srgpo(
        KEY, rewards[order], steps[order], exists[order], valid[order], id=ids[order], block_size=4
    )
    np.testing.assert_allclose(moved, given[order], atol=1e-5)
    pad = ((0, 0), (0, 0), (0, 3))
    padded = advantages.srgpo(KEY, rewards, np.pad(steps, pad), np.pad(exists, pad), valid, id=ids, block_size=4)
    np.testing.assert_allclose(padded[:, :, :5], given, atol=1e-5)
    assert not np.asarray(padded[:, :, 5:]).any()


def test_a_step_without_a_score_is_in_no_group_and_keeps_its_trajectorys_advantage():
    rewards, steps, exists, _ = _random(3)
    key = np.zeros(steps.shape, int)
    hidden = np.where(np.arange(5) == 1, np.nan, steps)
    given = advantages.two_level(rewards, hidden, key, exists)
    without = advantages.two_level(rewards, steps, key, exists & (np.arange(5) != 1))
    other = np.arange(5) != 1
    np.testing.assert_allclose(given[:, :, other], without[:, :, other], atol=1e-5)
    episode = np.asarray(advantages.grpo(rewards))
    np.testing.assert_allclose(given[:, :, 1], np.where(exists[:, :, 1], episode, 0), atol=1e-5)


def test_equal_outcomes_leave_the_steps_and_equal_steps_leave_the_outcomes():
    rewards, steps, exists, valid = _random(4)
    key = np.zeros(steps.shape, int)
    only_steps = advantages.two_level(np.ones((3, 4)), steps, key, exists, valid)
    expected = advantages.grpo_by_key(steps, key, exists & valid[:, :, None])
    np.testing.assert_allclose(only_steps, expected, atol=1e-5)
    only_outcomes = advantages.two_level(rewards, np.full(steps.shape, 0.3), key, exists, valid)
    whole = np.asarray(advantages.grpo(rewards, valid))[:, :, None]
    np.testing.assert_allclose(only_outcomes, np.where(exists, whole, 0), atol=1e-5)


def test_the_leave_one_out_form_takes_the_mean_of_the_others_at_both_levels():
    rewards, steps = np.array([[3.0, 1.0]]), np.array([[[1.0, 2.0], [6.0, 9.0]]])
    exists = np.array([[[1, 1], [1, 0]]])
    given = advantages.two_level(rewards, steps, np.zeros((1, 2, 2), int), exists, estimator="rloo")
    np.testing.assert_allclose(given, [[[2 + 1 - 4, 2 + 2 - 3.5], [-2 + 6 - 1.5, 0]]], rtol=1e-6)


def test_empty_single_and_half_precision_input_has_finite_values_and_gradients():
    @jax.jit
    def slopes(steps, rewards, exists):
        def total(steps, rewards):
            return jnp.sum(advantages.srgpo(KEY, rewards, steps, exists, block_size=2) ** 2)

        return jax.grad(total, argnums=(0, 1))(steps, rewards)

    for shape in ((1, 1, 1), (2, 2, 3)):
        for there in (0, 1):
            found = slopes(jnp.ones(shape, jnp.bfloat16), jnp.ones(shape[:2]), jnp.full(shape, there))
            assert all(bool(jnp.isfinite(g).all()) for g in found)
    steps = jnp.ones((1, 2, 2), jnp.bfloat16)
    assert advantages.srgpo(KEY, steps[:, :, 0], steps, steps, block_size=4).dtype == jnp.float32


def test_impossible_arguments_are_refused():
    ones, steps = jnp.ones((1, 2)), jnp.ones((1, 2, 3))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        advantages.random_blocks(KEY, steps, size=0)
    with pytest.raises(ValueError, match='blocks must be "batch", "prompt" or "sequence", got \'turn\''):
        advantages.srgpo(KEY, ones, steps, steps, blocks="turn")
    with pytest.raises(ValueError, match=r"exists must be \[P, G, S\] with \[P, G\] = \(1, 2\), got shape \(1, 3, 2\)"):
        advantages.srgpo(KEY, ones, steps, jnp.ones((1, 3, 2)))
    with pytest.raises(ValueError, match="step_rewards must have the shape of exists"):
        advantages.two_level(ones, steps[:, :, :2], steps.astype(int), steps)
    with pytest.raises(ValueError, match='estimator must be "grpo" or "rloo"'):
        advantages.two_level(ones, steps, steps.astype(int), steps, estimator="gae")
    with pytest.raises(ValueError, match=r'by_step does not apply to estimator="rloo": .* of its own trajectory'):
        advantages.two_level(ones, steps, steps.astype(int), steps, estimator="rloo", by_step=True)
