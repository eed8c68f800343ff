"""Claims of methods with several objectives: fronts that they find, and boxes whose size a reward holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import curation, methods, rewards
from tests.claims import lab

ORIGIN = jnp.zeros(2)

# Arms whose front is not convex, and one that is dominated: between the two ends no fixed weights prefer any.
ARMS = jnp.array([[1.0, 0.1], [0.62, 0.42], [0.5, 0.55], [0.42, 0.62], [0.1, 1.0], [0.2, 0.2]])


def _reached(params):
    """`[2]`: the expected value of both objectives, exactly."""
    return (lab.probabilities(params, 1) @ ARMS)[0]


def _weights(count):
    first = jnp.linspace(0, 1, count)
    return jnp.stack([first, 1 - first], axis=1)


@pytest.mark.nightly
def test_c_morl_covers_more_of_a_front_than_a_grid_of_fixed_preferences_with_as_many_steps():
    rounds, each = 3, 4
    total = rounds * each
    # A constant that is held has no advantage: the same method then maximises fixed weights.
    method = methods.c_morl(objective="raised", constraints=("held",))

    def run(start, raised, held, constant, key):
        def judge(rollouts, noise_key):
            noise = 0.1 * jax.random.normal(noise_key, (*rollouts.reward.shape, 2))
            value = ARMS[lab.sequence_index(rollouts, len(ARMS))] + noise
            return rollouts.replace(rewards={"raised": value @ raised, "held": value @ held + constant})

        task = lab.Task(1, len(ARMS), 1, judge, initial=start)
        return lab.train(task, method, key, steps=80, group_size=16, optimizer=2.0).params

    def outcome(extends, key):
        def one_round(carry, number):
            policies, points = carry
            at = each * number + jnp.arange(each)
            fixed = _weights(total)[at] if not extends else _weights(each)
            starts, raised, held, constant = jnp.zeros_like(policies[at]), fixed, jnp.zeros((each, 2)), jnp.ones(each)
            if extends:  # from the two most isolated points of the front, each objective once
                front = curation.non_dominated(points, jnp.arange(total) < each * number)
                from_points = policies[jnp.repeat(curation.most_isolated(points, 2, front), 2)]
                axes = jnp.tile(jnp.eye(2), (2, 1))
                later = number > 0
                starts = jnp.where(later, from_points, starts)
                raised, held = jnp.where(later, axes, raised), jnp.where(later, axes[:, ::-1], held)
                constant = jnp.where(later, 0.0, constant)
            keys = jax.random.split(jax.random.fold_in(key, number), each)
            new = jax.vmap(run)(starts, raised, held, constant, keys)
            return (policies.at[at].set(new), points.at[at].set(jax.vmap(_reached)(new))), None

        empty = (jnp.zeros((total, 1, 1, len(ARMS))), jnp.zeros((total, 2)))
        (_, points), _ = jax.lax.scan(one_round, empty, jnp.arange(rounds))
        return curation.hypervolume(points, ORIGIN)

    lab.check("c-morl", outcome, method=True, baseline=False)


def test_gradient_weighting_reaches_a_front_in_fewer_steps_than_fixed_weights():
    steps, grid = 40, jnp.linspace(0.1, 0.9, 5)

    def judge(rollouts, key):
        value = ARMS[lab.sequence_index(rollouts, len(ARMS))]
        value = value + 0.1 * jax.random.normal(key, value.shape)
        return rollouts.replace(rewards={"first": value[..., 0], "second": value[..., 1]})

    task = lab.Task(1, len(ARMS), 1, judge)

    def outcome(step_size, key):
        def visited(first, key):
            method = methods.gradient_weighting(
                objectives=("first", "second"), weights=jnp.stack([first, 1 - first]), step_size=step_size
            )
            return lab.train(task, method, key, steps=steps, group_size=8, optimizer=0.5, observe=_reached).trace

        points = jax.vmap(visited)(grid, jax.random.split(key, grid.size))
        return curation.hypervolume(points[:, 7::8].reshape(-1, 2), ORIGIN)

    # Inner products of gradients are about 0.03 here, so that the weights move by about a third a step. Much later,
    # when fixed weights have converged to different ends of the front, the union of theirs is the larger one.
    lab.check("dynamic-reward-weighting", outcome, method=10, baseline=0)


def test_gui_g1s_reward_keeps_boxes_in_shape_where_hits_alone_do_not():
    side = 4
    index = np.arange(side**4)
    boxes = jnp.asarray(np.stack([index // side ** (3 - place) % side for place in range(4)], axis=1), float)
    gold = jnp.array([[0.0, 0, 2, 2], [1, 1, 3, 3], [0, 1, 1, 3], [2, 0, 3, 1]])
    pred, right = (jnp.broadcast_to(x, (4, side**4, 4)) for x in (boxes[None], gold[:, None]))
    size = jnp.full((4, side**4, 2), float(side))
    overlap = rewards.box_iou(pred, right)
    weights = rewards.difficulty_weights(jnp.prod(gold[:, 2:] - gold[:, :2], axis=1) / side**2)

    def outcome(reward, key):
        scored = lab.by_sequence(reward)

        def judge(rollouts, key):
            return scored(rollouts, key).replace(extras={"prompt_weight": weights})

        task = lab.Task(4, side, 4, judge)
        trained = lab.train(task, methods.gui_g1(horizon=4), key, steps=120, group_size=8, optimizer=8.0)
        return jnp.mean(jnp.sum(lab.probabilities(trained.params, 4) * overlap, axis=1))

    lab.check("gui-g1", outcome, method=rewards.box_reward(pred, right, size), baseline=rewards.box_hit(pred, right))
