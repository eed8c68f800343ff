"""What released versions of TRL and verl give for random inputs.

`make_fixtures`, which needs an environment of its own, says how it was made and what is what.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_post import losses

CASES = (0, 1)
both = pytest.mark.parametrize("number", CASES)
PROMPTS, GROUP, STEPS = 4, 3, 14


def named(table):
    """A test for each name of a table."""
    return pytest.mark.parametrize("name", list(table))


@functools.cache
def stored(file: str) -> dict[str, np.ndarray]:
    """All arrays of `trl`, `verl` or `inputs`, by key."""
    with np.load(Path(__file__).parent / f"{file}.npz") as arrays:
        return dict(arrays)


@functools.cache
def case(number: int) -> dict[str, np.ndarray]:
    """The inputs of one case by name."""
    prefix = f"{number}/"
    arrays = {key.removeprefix(prefix): array for key, array in stored("inputs").items() if key.startswith(prefix)}
    return {**arrays, "rloo_mask": stored("trl")[f"{number}/rloo/mask"]}


def valid_mask(x: dict[str, np.ndarray]) -> np.ndarray:
    """`[B, T]`: trained tokens of valid rows."""
    return x["mask"] * x["valid"].reshape(-1, 1)


def aggregated(per_token, mask, mode="token_mean", horizon=None):
    """A loss `logp -> [B, T]` as a loss `logp -> scalar`."""
    return lambda logp: losses.aggregate(per_token(logp), mask, mode, horizon=horizon)


def once_for_all(compute):
    """A function of a case's inputs as one of its number: one compilation, one run a case, results as numpy."""
    jitted = jax.jit(compute)

    @functools.cache
    def results(number: int):
        return jax.tree.map(np.asarray, jitted(case(number)))

    return results


def assert_close(found, expected, atol=1e-9, rtol=1e-9):
    """Equal to 1e-9."""
    np.testing.assert_allclose(np.asarray(found), expected, rtol=rtol, atol=atol)
