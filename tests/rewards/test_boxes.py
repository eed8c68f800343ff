"""Rewards of boxes, by hand and by counting pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.rewards import boxes
from tests.rewards.compiled import compiled

box_iou = compiled(boxes.box_iou)
box_reward = compiled(boxes.box_reward)
box_edges = compiled(boxes.box_edges)
box_hit = compiled(boxes.box_hit)

PRED, GOLD, SIZE = jnp.array([10.0, 10, 30, 30]), jnp.array([10.0, 10, 30, 40]), jnp.array([100.0, 100])


def test_the_table_s_box_has_its_rewards():
    assert float(box_hit(PRED, GOLD)) == 1.0
    np.testing.assert_allclose(box_iou(PRED, GOLD), 0.666667, atol=1e-6)
    np.testing.assert_allclose(box_edges(PRED, GOLD, SIZE), 0.972973, atol=1e-6)
    np.testing.assert_allclose(box_reward(PRED, GOLD, SIZE), 1.288288, atol=1e-6)


def test_overlap_is_that_of_counted_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 12, (50, 2, 2, 2)), axis=2).reshape(50, 2, 4)  # [., box, (x1, y1, x2, y2)]
    expected = []
    for pair in corners:
        covers = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in pair]
        union = covers[0] | covers[1]
        both = covers[0] & covers[1]
        expected.append(len(both) / len(union) if union else 0.0)
    found = box_iou(corners[:, 0], corners[:, 1])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_edges_give_the_harmonic_mean_with_width_for_x_and_height_for_y():
    pred, size = jnp.array([20.0, 10, 40, 40]), jnp.array([100.0, 50])
    near = np.array([0.9, 1.0, 0.9, 1.0])  # x1 and x2 are off by 10 of 100
    np.testing.assert_allclose(box_edges(pred, GOLD, size), 4 / np.sum(1 / near), rtol=1e-6)
    assert float(box_edges(jnp.array([10.0, 10, 130, 40]), GOLD, SIZE)) == 0.0  # off by the whole width


def test_boxes_without_area_or_inside_out_overlap_nothing_and_stay_finite():
    for bad in ([30.0, 30, 10, 10], [10.0, 10, 10, 10], [0.0, 0, 0, 0]):
        bad = jnp.array(bad)
        assert float(box_iou(bad, GOLD)) == 0.0
        assert float(box_iou(bad, bad)) == 0.0
        slope = jax.jit(jax.grad(lambda box: box_reward(box, GOLD, SIZE)))(bad)
        assert bool(jnp.all(jnp.isfinite(slope)))
    assert box_reward(PRED.astype(jnp.bfloat16), GOLD, SIZE).dtype == jnp.float32


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('```json\n[{"bbox_2d": [1, 2, 3, 4]}]\n```', (1, 2, 3, 4)),
        ("first [9, 9, 9, 9], then (1.5,-2, 3e1 ,.5)", (1.5, -2, 30, 0.5)),
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[1e999, 2, 3, 4]", None),
        ("", None),
    ],
)
def test_the_last_four_numbers_in_brackets_are_the_box(text, box):
    assert boxes.parse_box(text) == box


def test_the_reward_reads_columns_and_tells_wrong_answers_from_unusable_problems():
    rewards = boxes.box_grounding(
        [""] * 5,
        ["[10, 10, 30, 30]", "no box", "[10, 10, 30, 30]", "[10, 10, 30, 30]", "[10, 10, 30, 30]"],
        box=["[10, 10, 30, 40]", GOLD.tolist(), None, GOLD.tolist(), GOLD.tolist()],
        width=[100, 100, 100, None, 0],
        height=[100, 100, 100, 100, 100],
    )
    np.testing.assert_allclose(rewards[:2], [1.288288, 0.0], atol=1e-6)
    assert rewards[2:] == [None, None, None]


@pytest.mark.parametrize(
    ("box", "width"),
    [
        ([10, 10, 30], 100),
        ({"a": 1}, 100),
        ([GOLD.tolist()], 100),
        ([10, 10, 30, np.nan], 100),
        (7, 100),
        (GOLD.tolist(), "abc"),
        (GOLD.tolist(), np.inf),
        (GOLD.tolist(), [100]),
    ],
)
def test_a_box_or_size_that_makes_no_sense_makes_its_own_row_unusable(box, width):
    answers = ["[10, 10, 30, 30]"] * 2
    rewards = boxes.box_grounding([""] * 2, answers, [box, GOLD.tolist()], [width, 100], [100, 100])
    assert rewards[0] is None
    assert rewards[1] > 1


def test_smaller_targets_weigh_more_with_mean_one():
    share = np.array([0.5, 0.01, 0.2, 0.05])
    weights = boxes.difficulty_weights(share)
    np.testing.assert_allclose(weights, (1 / share) / np.mean(1 / share), rtol=1e-6)
    np.testing.assert_allclose(np.mean(weights), 1.0, rtol=1e-6)
    assert boxes.difficulty_weights(jnp.array([0.0, 0.5])).tolist() == [0.0, 1.0]
    assert boxes.difficulty_weights(jnp.zeros(2)).tolist() == [0.0, 0.0]


def test_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"pred must be \[\.\.\., 4\]"):
        box_hit(jnp.zeros(3), jnp.zeros(3))
    with pytest.raises(ValueError, match="gold must have the shape of pred"):
        box_iou(jnp.zeros(4), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="size must have the shape of the corners of pred"):
        box_edges(jnp.zeros(4), jnp.zeros(4), jnp.zeros(3))
