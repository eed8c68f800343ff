"""Measures of data sets, against the paper's numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import curation


def test_quality_and_coverage_are_the_papers():
    assert curation.trajectory_quality(jnp.array([5.0, 7.0]), random=2.0, best=10.0).item() == 0.5
    assert bool(jnp.isnan(curation.trajectory_quality(jnp.ones(2), random=1.0, best=1.0)))
    assert curation.coverage_ratio(30, 40) == 0.75
    assert curation.coverage_ratio(10, 100, log=True) == pytest.approx(0.5)
    for pair in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="counts"):
            curation.coverage_ratio(*pair)


def test_pairs_are_counted_once_and_by_bins():
    states, actions = np.array([[0.0, 1.0], [0.0, 1.0], [0.004, 1.0], [1.0, 0.0]]), np.array([0, 0, 0, 1])
    assert curation.count_pairs(states, actions) == 3
    assert curation.count_pairs(states, actions, bins=100) == 2
    assert curation.count_pairs([7, 7, 8], [1, 2, 1]) == 3
    assert curation.count_pairs(np.zeros((0, 2)), np.zeros(0), bins=5) == 0
    with pytest.raises(ValueError, match="an action for each"):
        curation.count_pairs(states, actions[:2])
    with pytest.raises(ValueError, match="bins"):
        curation.count_pairs(states, actions, bins=0)
