"""Belief in the answer, its gain per step, and what a method makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages

PROMPTS, GROUP, STEPS, LENGTH = 3, 4, 3, 9
ROWS = PROMPTS * GROUP
IGPO = jax.jit(advantages.igpo, static_argnames=("discount", "pooling"))
GRPO = jax.jit(lambda rewards, valid, mask: advantages.per_token(advantages.grpo(rewards, valid), mask))
GAIN = jax.jit(advantages.belief_gain)
TURN_REWARDS = jax.jit(advantages.turn_rewards, static_argnames="pooling")


def test_the_belief_is_the_geometric_mean_of_the_answers_probabilities_or_their_product():
    p = np.array([[[0.5, 0.2], [0.9, 0.4]]])
    logp = jnp.asarray(np.log(p).sum(-1))
    length = jnp.array([2])
    np.testing.assert_allclose(advantages.answer_belief(logp, length), np.sqrt(p.prod(-1)), rtol=1e-6)
    np.testing.assert_allclose(advantages.answer_belief(logp, length, normalize=False), p.prod(-1), rtol=1e-6)
    np.testing.assert_allclose(advantages.answer_belief(logp, length, log=True), np.log(p).mean(-1), rtol=1e-6)
    np.testing.assert_allclose(advantages.answer_belief(logp, jnp.array([0])), p.prod(-1), rtol=1e-6)


def test_gains_are_differences_that_add_up_to_the_whole_change():
    np.testing.assert_allclose(GAIN(jnp.array([[0.1, 0.3, 0.6]])), [[0.2, 0.3]], atol=1e-6)
    found = GAIN(jnp.array([[0.2, 0.5, 0.4, 0.9]]))
    np.testing.assert_allclose(found, [[0.3, -0.1, 0.5]], atol=1e-6)
    np.testing.assert_allclose(jnp.sum(found), 0.7, atol=1e-6)
    one = GAIN(jnp.array([[0.2, 0.9]]))
    np.testing.assert_allclose(one, [[0.7]], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_a_step_whose_belief_is_not_a_number_gains_nothing_and_the_next_one_what_came_of_both(bad):
    belief = jnp.array([[0.1, bad, 0.4], [bad, 0.2, 0.5], [bad, bad, bad], [0.1, 0.2, bad]])
    expected = [[0, 0.3], [0, 0.3], [0, 0], [0.1, 0]]
    np.testing.assert_allclose(GAIN(belief), expected, atol=1e-6)
    known = jnp.isfinite(belief)
    np.testing.assert_allclose(GAIN(jnp.where(known, belief, 7.0), known), expected, atol=1e-6)


def test_the_gains_of_a_group_are_normalised_among_themselves_and_the_outcomes_among_themselves():
    # Two rollouts of three turns: four gains, two outcomes.
    gain = jnp.array([[0.1, 0.3, jnp.nan], [-0.1, 0.1, jnp.nan]])
    found = TURN_REWARDS(gain, jnp.array([[1.0, 0.0]]), jnp.ones((2, 3)), eps=0.0)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found, [[0, 1.224745, half], [-1.224745, 0, -half]], atol=1e-5)


def test_in_one_pool_gains_and_outcomes_share_mean_and_deviation():
    gain = jnp.array([[0.1, 9.0], [0.3, 9.0]])
    found = TURN_REWARDS(gain, jnp.array([[1.0, 0.0]]), jnp.ones((2, 2)), pooling="joint", eps=0.0)
    pool = np.array([[0.1, 1.0], [0.3, 0.0]])
    np.testing.assert_allclose(found, (pool - pool.mean()) / pool.std(ddof=1), rtol=1e-5)


def case(seed=0):
    """Ragged turns with tool output between them, one row of a single turn, one without a token, one not valid."""
    rng = np.random.default_rng(seed)
    step = np.full((ROWS, LENGTH), -1)
    for row in range(ROWS):
        place = 1
        for turn in range(rng.integers(1, STEPS + 1)):
            width = rng.integers(1, 3)
            step[row, place : place + width] = turn
            place += width + rng.integers(0, 2)
    step[5], step[6] = -1, np.where(np.arange(LENGTH) == 4, 0, -1)
    mask = (step >= 0).astype(np.float32)
    valid = np.ones((PROMPTS, GROUP), bool)
    valid[0, 2] = False
    outcome = rng.choice([0.0, 0.5, 1.0], (PROMPTS, GROUP)).astype(np.float32)
    outcome[2] = 0.5  # all equal
    gain = rng.normal(size=(ROWS, STEPS)).astype(np.float32)
    return gain, outcome, step, mask, valid


def loop(gain, outcome, step, mask, valid, gamma, discount, pooling, eps=1e-6):
    """In float64, one group, one rollout, one token after the other."""
    result = np.zeros(step.shape)
    for p in range(PROMPTS):
        rows = [p * GROUP + g for g in range(GROUP) if valid[p, g]]
        turns = {b: sorted(set(step[b][mask[b] > 0])) for b in rows}
        middle = [float(gain[b, k]) for b in rows for k in turns[b][:-1]]
        final = [float(outcome[p, b % GROUP]) for b in rows]
        if pooling == "joint":
            middle = final = middle + [float(outcome[p, b % GROUP]) for b in rows if turns[b]]

        def scaled(x, pool):
            pool = np.array(pool)
            if len(pool) < 2 or pool.std() < 1e-9:
                return 0.0
            return (x - pool.mean()) / (pool.std(ddof=1) + eps)

        for b in rows:
            reward = {k: scaled(gain[b, k], middle) for k in turns[b]}
            if turns[b]:
                reward[turns[b][-1]] = scaled(outcome[p, b % GROUP], final)
            acting = np.flatnonzero(mask[b])
            for i, t in enumerate(acting):
                if discount == "turn":
                    ahead = turns[b][turns[b].index(step[b, t]) :]
                    result[b, t] = sum(gamma**j * reward[k] for j, k in enumerate(ahead))
                else:
                    ends = {max(u for u in acting if step[b, u] == k): reward[k] for k in turns[b]}
                    result[b, t] = sum(gamma**j * ends.get(u, 0.0) for j, u in enumerate(acting[i:]))
    return result


@pytest.mark.parametrize("pooling", ["separate", "joint"])
@pytest.mark.parametrize(("discount", "gamma"), [("turn", 0.9), ("token", 0.9), ("turn", 1.0), ("token", 1.0)])
def test_igpo_agrees_with_a_float64_loop_over_ragged_turns(pooling, discount, gamma):
    gain, outcome, step, mask, valid = case()
    found = IGPO(
        gain,
        np.where(valid, outcome, np.nan),
        step,
        mask * valid.reshape(-1, 1),
        valid,
        gamma=gamma,
        discount=discount,
        pooling=pooling,
    )
    expected = loop(gain, outcome, step, mask, valid, gamma, discount, pooling)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.5


def test_a_group_of_rollouts_of_one_turn_gets_what_grpo_gives():
    gain, outcome, step, mask, valid = case()
    step = np.where(step >= 0, 0, -1)
    found = IGPO(gain, outcome, step, mask, valid)
    whole = GRPO(outcome, valid, mask)
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_where_all_outcomes_are_equal_the_gains_alone_give_credit():
    gain, _, step, mask, _ = case()
    found = np.asarray(IGPO(gain, jnp.zeros((PROMPTS, GROUP)), step, mask))
    assert np.abs(found[: 2 * GROUP]).max() > 0.5
    last = step == np.where(mask > 0, step, -1).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(found[last], 0)  # the last turn has the outcome's advantage, which is 0


def test_no_spread_and_groups_of_one_give_zero_with_finite_gradients():
    _, outcome, step, mask, valid = case()

    @jax.jit
    def total(gain, outcome):
        return jnp.sum(jnp.square(IGPO(gain, outcome, step, mask, valid)))

    flat = (jnp.full((ROWS, STEPS), 0.3), jnp.full((PROMPTS, GROUP), 0.5))
    assert float(total(*flat)) == 0
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(*flat):
        assert bool(jnp.all(jnp.isfinite(gradient)))
    alone = IGPO(jnp.array([[0.2, 0.1]]), jnp.array([[1.0]]), step[:1], mask[:1])
    np.testing.assert_array_equal(alone, np.zeros((1, LENGTH)))
    nobody = IGPO(jnp.ones((ROWS, STEPS)), outcome, step, mask * 0, np.zeros_like(valid))
    np.testing.assert_array_equal(nobody, np.zeros((ROWS, LENGTH)))


def test_the_order_of_a_groups_rollouts_does_not_matter_and_turns_that_are_not_there_change_nothing():
    gain, outcome, step, mask, valid = case(1)
    base = np.asarray(IGPO(gain, outcome, step, mask, valid))
    order = np.array([2, 0, 3, 1])
    rows = (np.arange(PROMPTS)[:, None] * GROUP + order).reshape(-1)
    found = IGPO(gain[rows], outcome[:, order], step[rows], mask[rows], valid[:, order])
    np.testing.assert_allclose(found, base[rows], rtol=1e-5, atol=1e-6)
    more = np.pad(gain, ((0, 0), (0, 2)), constant_values=99.0)
    padded = [np.pad(x, ((0, 0), (0, 3)), constant_values=fill) for x, fill in ((step, -1), (mask, 0))]
    found = IGPO(more, outcome, *padded, valid)
    np.testing.assert_allclose(found, np.pad(base, ((0, 0), (0, 3))), rtol=1e-5, atol=1e-6)


def test_progress_is_added_to_the_advantage_of_the_steps_tokens():
    gain = GAIN(jnp.array([[0.2, 0.5, 0.4, 0.9], [0.2, 0.5, 0.4, 0.9]]))
    step = jnp.array([[-1, 0, 1, -1, 2], [-1, 0, 0, 5, -1]])
    mask = jnp.array([[0, 1, 1, 0, 1], [0, 1, 1, 1, 0]])
    found = advantages.with_progress(jnp.array([[1.0, -1.0]]), gain, step, mask, alpha=1.0)
    np.testing.assert_allclose(found, [[0, 1.3, 0.9, 0, 1.5], [0, -0.7, -0.7, -1, 0]], atol=1e-6)
    doubled = advantages.with_progress(jnp.zeros((1, 2)), gain, step, mask, alpha=2.0)
    np.testing.assert_allclose(doubled[0], [0, 0.6, -0.2, 0, 1.0], atol=1e-6)


def test_16_bit_numbers_are_raised_and_float64_stays():
    gain, outcome, step, mask, valid = case()
    belief = np.concatenate([np.zeros((ROWS, 1)), gain.cumsum(1)], axis=1)
    assert GAIN(jnp.asarray(belief, jnp.bfloat16)).dtype == jnp.float32
    assert IGPO(jnp.asarray(gain, jnp.bfloat16), outcome, step, mask).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jnp.asarray(belief, jnp.float64)
        assert advantages.answer_belief(wide, jnp.ones(ROWS)).dtype == jnp.float64
        found = IGPO(GAIN(wide), outcome.astype(np.float64), step, mask, valid)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, loop(gain, outcome, step, mask, valid, 1.0, "turn", "separate"), rtol=1e-6)


def test_gains_are_constants_and_the_same_jitted_and_vmapped():
    belief = jax.random.uniform(jax.random.key(0), (2, 3, 4))
    both = jax.jit(jax.vmap(advantages.belief_gain))(belief)
    np.testing.assert_allclose(both, jnp.diff(belief, axis=-1), atol=1e-6)
    assert not jnp.any(jax.grad(lambda b: jnp.sum(GAIN(b)))(belief))


def test_wrong_arguments_are_named():
    gain, outcome, step, mask, _ = case()
    with pytest.raises(ValueError, match='pooling must be "separate" or "joint"'):
        advantages.igpo(gain, outcome, step, mask, pooling="both")
    with pytest.raises(ValueError, match='discount must be "turn" or "token"'):
        advantages.igpo(gain, outcome, step, mask, discount="step")
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 2"):
        advantages.igpo(gain, outcome, step, mask, gamma=2)
    with pytest.raises(ValueError, match=r"gain must have P \* G = 12 rows"):
        advantages.turn_rewards(gain[:5], outcome, mask[:5, :STEPS])
    with pytest.raises(ValueError, match="exists must have the shape of gain"):
        advantages.turn_rewards(gain, outcome, mask)
    with pytest.raises(ValueError, match=r"belief must be \[..., S\+1\] with at least one step"):
        advantages.belief_gain(jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="known must have the shape of belief"):
        advantages.belief_gain(jnp.zeros((2, 3)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="answer_length must have the shape of a column of answer_logp"):
        advantages.answer_belief(jnp.zeros((2, 3)), jnp.ones(3))
