"""What methods that shorten answers remember, what they make of the reward, and what they leave alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from jaxrl_post.training import checkpoint
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import all_compiled, compiled
from tests.methods import tabular

losses = all_compiled(losses)

LENGTHS = np.array([[4, 2, 3, 1], [1, 2, 3, 4], [2, 2, 2, 2]])
RIGHT = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]])
VALID = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool)  # the short right answer to prompt 0 does not count


def rollouts(lengths=LENGTHS, right=RIGHT, prompt_id=(7, 3, 1), extras=None, rewards=None):
    made = tabular.batch(prompts=3)
    place = np.cumsum(np.ones((12, made.mask.shape[1])), axis=1)
    return made.replace(
        mask=jnp.asarray((place > 1) & (place <= 1 + lengths.reshape(-1, 1)), jnp.float32),
        reward=jnp.asarray(right, jnp.float32),
        rewards=rewards or {},
        valid=jnp.asarray(VALID),
        prompt_id=jnp.asarray(prompt_id, jnp.int32),
        extras=extras or {},
    )


def stats_of(batch, seed=0):
    noise = jax.random.normal(jax.random.key(seed), batch.mask.shape)
    return {"policy": TokenStats(logp=batch.logp), "reference": TokenStats(logp=batch.logp + 0.3 * noise)}


@jax.jit
def grpo_of(reward, batch):
    method = methods.grpo()
    return method.targets((), batch.replace(reward=reward), stats_of(batch), jax.random.key(0))[0].advantages


def after(method, batches, num_prompts=9):
    """Targets of the last batch, and the state."""
    state = method.init(jax.eval_shape(lambda: batches[0]), num_prompts)
    targets = jax.jit(lambda state, batch: method.targets(state, batch, stats_of(batch), jax.random.key(0)))
    for batch in batches:
        found, state = targets(state, batch)
    return found, state


def test_drpo_without_a_preference_is_disco_and_with_one_the_weights_are_those_of_its_valid_right_answers():
    batch = rollouts(right=np.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]]))
    stats = stats_of(batch)

    def terms(method):
        targets, _ = compiled(method.targets)((), batch, stats, jax.random.key(0))
        moved = {"policy": TokenStats(logp=batch.logp + 0.1 * jnp.cos(jnp.arange(60.0)).reshape(12, 5))}
        return {name: term.value for name, term in method.loss(moved, batch, targets).items()}, targets.extras

    plain, _ = terms(methods.disco())
    same, _ = terms(methods.drpo(max_length=4, lam=math.inf))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), same, plain)
    other, extras = terms(methods.drpo(max_length=4, lam=0.5))
    odds = math.exp((4 - 3) / (4 * 0.5))  # lengths 4 and 3 are valid and right for prompt 0
    np.testing.assert_allclose(extras["weights"][0], [1 / (1 + odds), 0, odds / (1 + odds), 0], rtol=1e-5)
    assert abs(float(other["disco"][0] - plain["disco"][0])) > 1e-4
    np.testing.assert_allclose(other["disco"][1:], plain["disco"][1:], rtol=1e-5)


def test_hapo_pays_nothing_for_a_problem_seen_for_the_first_time_and_remembers_its_shortest_valid_right_answer():
    found, state = after(methods.hapo(), [rollouts()])
    np.testing.assert_allclose(found.advantages, grpo_of(jnp.asarray(RIGHT, jnp.float32), rollouts()), atol=1e-6)
    memory = state["reward"]
    assert memory.prompt_id.tolist() == [-1, 1, -1, -1, -1, -1, -1, 7, -1]  # 3 was not solved
    assert float(memory.values[7]) == 4  # not the 2 of the invalid row
    assert float(memory.values[1]) == 2


def test_hapo_reads_the_record_before_it_writes_it_and_keeps_the_smaller():
    shorter = np.array([[3, 4, 4, 1], [1, 2, 3, 4], [4, 4, 4, 1]])
    second = rollouts(shorter)
    found, state = after(methods.hapo(weight=0.5), [rollouts(), second])
    cosine = np.cos(np.pi / 2 * np.minimum(shorter / np.array([[4], [np.inf], [2]]), 2))
    earned = np.where(RIGHT, np.maximum(cosine, -0.7), np.minimum(cosine, 0))
    earned[1] = 0
    np.testing.assert_allclose(found.extras["length/reward"], earned.reshape(-1), atol=1e-6)
    np.testing.assert_allclose(found.advantages, grpo_of(jnp.asarray(RIGHT + 0.5 * earned), second), atol=1e-5)
    assert state["reward"].values[jnp.array([7, 1])].tolist() == [3, 2]


def test_hapo_can_compare_with_the_mean_of_all_right_answers_so_far():
    shorter = np.array([[1, 4, 4, 1], [1, 2, 3, 4], [4, 4, 1, 1]])
    found, state = after(methods.hapo(history="mean", form="linear"), [rollouts(), rollouts(shorter)])
    np.testing.assert_allclose(found.extras["length/reward"][jnp.array([0, 8, 10])], [0.75, -0.7, 0.5], atol=1e-6)
    total, count = (state["reward"].values[name] for name in ("total", "count"))
    np.testing.assert_allclose((total / jnp.maximum(count, 1))[jnp.array([7, 1])], [2.5, 9 / 4])


def test_a_memory_that_is_full_forgets_a_problem_for_another_and_the_forgotten_one_is_new_again():
    one = methods.hapo(capacity=1)
    found, state = after(one, [rollouts()])
    assert state["reward"].prompt_id.tolist() == [7]  # of 7 and 1, which share the slot, the larger
    found, state = after(one, [rollouts(), rollouts(prompt_id=(2, 3, 1)), rollouts()])
    assert not np.asarray(found.extras["length/reward"]).any()


def test_records_survive_a_checkpoint(tmp_path):
    method = methods.hapo(history="mean")
    _, state = after(method, [rollouts()])
    checkpoint.save(tmp_path, 1, state)
    _, back, *_ = checkpoint.restore(tmp_path, method.init(None, 9))
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_curriculum_grpo_pays_for_lengths_near_a_budget_that_shrinks_with_its_own_steps():
    method = methods.curriculum_grpo(budget=4, decay=0.5, every=2, correct_weight=0.6, length_weight=0.3)
    for steps, budget in ((1, 4), (2, 4), (3, 2), (5, 1), (9, 1)):
        found, state = after(method, [rollouts()] * steps)
        assert int(state["reward"]) == steps
        near = np.where(budget >= LENGTHS, LENGTHS / budget, np.maximum(2 - LENGTHS / budget, 0))
        np.testing.assert_allclose(found.extras["length/reward"], near.reshape(-1), atol=1e-6)
        reward = 0.6 * RIGHT + 0.3 * near
        for p in range(3):
            group = reward[p][VALID[p]]
            expected = (reward[p] - group.mean()) / (group.std() + 1e-6) if np.ptp(group) > 1e-6 else np.zeros(4)
            got = jnp.max(jnp.abs(found.advantages), axis=1).reshape(3, 4)[p]
            np.testing.assert_allclose(got, np.abs(expected) * VALID[p], atol=1e-4)


def test_a_budget_that_the_rollouts_carry_goes_over_that_of_the_step_and_none_pays_nothing():
    budget = jnp.asarray([[4, 4, 2, 2], [0, 0, 0, 0], [1, 2, 4, 8]], jnp.float32)
    method = methods.curriculum_grpo(shape="band", format_reward="format", format_weight=0.2)
    batch = rollouts(extras={"budget": budget}, rewards={"format": jnp.asarray(LENGTHS > 2, jnp.float32)})
    found, _ = after(method, [batch])
    expected = [[1, 1, 0.5, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    np.testing.assert_allclose(found.extras["length/reward"], np.reshape(expected, -1), atol=1e-6)
    # Prompt 1, all wrong and without a budget, differs by its format alone.
    sign = jnp.sign(jnp.sum(found.advantages, axis=1).reshape(3, 4)[1])
    assert sign.tolist() == [-1, -1, 1, 1]


def test_asymmetric_po_weighs_the_kl_of_right_answers_to_hard_prompts_and_the_advantage_of_long_wrong_ones():
    lengths = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [2, 2, 2, 2]])
    batch = rollouts(lengths, np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])).replace(
        valid=jnp.ones((3, 4), bool)
    )
    stats = stats_of(batch)
    both = methods.asymmetric_po(base=1.1, beta=0.01)
    neither = methods.asymmetric_po(dads=False, stcr=False, beta=0.01)
    targets, plain = (compiled(m.targets)((), batch, stats, jax.random.key(0))[0] for m in (both, neither))
    hit = np.ones((3, 4))
    hit[0, 1:] = 2 - 1.1 ** -np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(targets.advantages, plain.advantages * hit.reshape(-1, 1), rtol=1e-5, atol=1e-7)
    weight = np.ones((3, 4))
    weight[0, 0], weight[2, :3] = 0.4932, 0.8698
    found, without = both.loss(stats, batch, targets)["kl"], neither.loss(stats, batch, plain)["kl"]
    np.testing.assert_allclose(found.value, without.value * weight.reshape(-1, 1), rtol=2e-4, atol=1e-7)
    assert found.weight == 0.01
    k3 = losses.kl(stats["policy"].logp, stats["reference"].logp, "k3")
    np.testing.assert_allclose(without.value, k3, rtol=1e-6)


def test_keywords_that_do_not_apply_are_refused():
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        methods.drpo(max_length=0)
    with pytest.raises(ValueError, match="kl_estimator must be one of k1, k3"):
        methods.drpo(max_length=9, kl_estimator="k2")
    with pytest.raises(ValueError, match="history must be one of min, mean"):
        methods.hapo(history="max")
    with pytest.raises(ValueError, match="floor must be between -1 and 0"):
        methods.hapo(floor=0.5)
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        methods.hapo(capacity=0)
    with pytest.raises(ValueError, match="does not apply without format_reward"):
        methods.curriculum_grpo(format_weight=0.1)
    with pytest.raises(ValueError, match="format_reward names 'tags'"):
        after(methods.curriculum_grpo(format_reward="tags"), [rollouts()])
    with pytest.raises(ValueError, match="dads weighs the KL"):
        methods.asymmetric_po(beta=0.0)
    with pytest.raises(ValueError, match="kl_in='reward' does not apply"):
        methods.asymmetric_po(kl_in="reward")
