"""Named evidence, case by case."""

import numpy as np
import pytest

from jaxrl_post import rewards


def test_the_f_score_is_the_papers_and_repeated_names_lower_it():
    np.testing.assert_allclose(rewards.evidence_score([0, 1, 2], {0, 5}), 5 / 11)
    once, twice = rewards.evidence_score([0, 5], [0, 5]), rewards.evidence_score([0, 5, 5, 5], [0, 5])
    assert once == 1.0
    np.testing.assert_allclose(twice, 5 * 0.5 / (4 * 0.5 + 1))
    assert rewards.evidence_score([], {1}) == rewards.evidence_score([1], set()) == 0.0
    np.testing.assert_allclose(rewards.evidence_score([0, 1, 2], {0, 5}, beta=1.0), 0.4)
    with pytest.raises(ValueError, match="beta"):
        rewards.evidence_score([1], {1}, beta=0.0)


def test_exactly_one_block_is_read():
    texts = {
        "<useful_chunks>[0, 5]</useful_chunks> so 42": 1.0,
        "<useful_chunks>0</useful_chunks><useful_chunks>5</useful_chunks>": 0.0,
        "<useful_chunks>0, 5": 0.0,
        "<useful_chunks>none</useful_chunks>": 0.0,
        "42": 0.0,
        "<Useful_Chunks>\n5\n0\n</Useful_Chunks>": 1.0,
    }
    found = rewards.evidence([""] * len(texts), list(texts), [[0, 5]] * len(texts))
    assert found == list(texts.values())


def test_without_right_numbers_there_is_no_reward():
    assert rewards.evidence([""] * 5, ["<useful_chunks>1</useful_chunks>"] * 5, [[], None, "1", ["x"], (1,)]) == [
        None,
        None,
        None,
        None,
        1.0,
    ]
