"""Differential information, against the paper's numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses

TARGET, REFERENCE = (jnp.log(jnp.array(p)) for p in ([0.5, 0.3, 0.2], [0.25, 0.25, 0.5]))


def test_the_ratio_and_the_best_rejected_are_the_papers():
    found = jnp.exp(losses.differential_information(TARGET, REFERENCE))
    np.testing.assert_allclose(found, [0.5556, 0.3333, 0.1111], atol=1e-4)
    rejected = jnp.exp(losses.optimal_rejected(TARGET, REFERENCE, beta=1.0))
    np.testing.assert_allclose(rejected, [0.0789, 0.1316, 0.7895], atol=1e-4)
    with pytest.raises(ValueError, match="beta"):
        losses.optimal_rejected(TARGET, REFERENCE, beta=0.0)


def test_the_power_law_holds_between_rejected_reference_and_target():
    for beta in (0.3, 2.0):
        rejected = losses.optimal_rejected(TARGET, REFERENCE, beta=beta)
        one = losses.differential_information(REFERENCE, rejected)
        two = beta * losses.differential_information(TARGET, REFERENCE)
        np.testing.assert_allclose(one - one[0], two - two[0], atol=1e-5)


def test_the_entropy_tells_smoothing_from_reinforcing():
    uniform = jnp.log(jnp.full(4, 0.25))
    sharp = jnp.log(jnp.array([0.97, 0.01, 0.01, 0.01]))
    assert losses.differential_entropy(uniform, uniform).item() == pytest.approx(np.log(4))
    assert losses.differential_entropy(sharp, uniform).item() < 0.2
    impossible = jnp.array([0.0, -jnp.inf])
    assert losses.differential_entropy(impossible, jnp.log(jnp.full(2, 0.5))).item() == 0.0
    assert bool(jnp.isfinite(losses.differential_entropy(impossible, impossible)))
