"""Labels of captions that come late, case by case."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards


def test_the_newest_captions_are_asked_about_first_and_each_once():
    asked = []

    def annotate(captions):
        asked.append(captions)
        return [int("key" in caption) for caption in captions]

    table = rewards.CaptionLabels().seen(["a wall", "a key", "a wall", "", "a door"])
    assert table.waiting == ("a key", "a wall", "a door")
    assert table.reward(["a key"]) == [0.0]
    table = table.annotated(annotate, limit=2)
    assert asked == [["a door", "a wall"]]
    table = table.seen(["a key", "a wall"]).annotated(annotate, limit=5)
    assert asked == [["a door", "a wall"], ["a key"]]
    assert table.reward(["a key", "a wall", "", "a bat"]) == [1.0, 0.0, 0.0, 0.0]
    assert table.annotated(annotate, limit=5) is table
    with pytest.raises(ValueError, match="2 captions and returned 1"):
        table.seen(["x", "y"]).annotated(lambda captions: [1], limit=5)


def test_what_is_seen_again_in_an_episode_pays_less():
    captions = jnp.array([[3, 3, 5, 3], [3, 4, 4, 4]])
    exists = jnp.array([[1, 1, 1, 1], [1, 0, 1, 1]])
    counts = rewards.episode_counts(captions, exists)
    assert counts.tolist() == [[1, 2, 1, 3], [1, 0, 1, 2]]
    label = (captions == 3).astype(jnp.float32)
    found = rewards.with_intrinsic(jnp.zeros((2, 4)), label, counts)
    np.testing.assert_allclose(found, [[0.4, 0.05, 0, 0.4 / 27], [0.4, 0, 0, 0]], rtol=1e-6)
    both = rewards.with_intrinsic(jnp.ones(1), jnp.ones(1), jnp.array([2]))
    np.testing.assert_allclose(both, [0.15], rtol=1e-6)
    with pytest.raises(ValueError, match="exponent"):
        rewards.with_intrinsic(jnp.ones(1), jnp.ones(1), jnp.ones(1), exponent=-1.0)


def test_a_ranking_pays_what_is_above_the_usual():
    scores = jnp.array([0.0, 1.0, 2.0, 5.0])
    moments = rewards.RunningMoments.zero().include(scores)
    z = (np.asarray(scores) - 2) / np.std(scores)
    np.testing.assert_allclose(rewards.above_usual(scores, moments), np.where(z > -0.5, z, 0), rtol=1e-5, atol=1e-6)
    equal = rewards.RunningMoments.zero().include(jnp.ones(3))
    assert rewards.above_usual(jnp.ones(2), equal).tolist() == [0.0, 0.0]
