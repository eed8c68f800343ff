"""KTO on whole batches, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from jaxrl_post.data import to_rollouts
from jaxrl_post.methods.probing import exchange_completions
from jaxrl_post.types import TokenStats


def batch(valid=(True, True, True)):
    some = to_rollouts([[5], [6, 7], [8, 9, 1]], [[[2, 3, 4]], [[3]], [[4, 2]]], length=6)
    extras = {"label": jnp.array([1.0, 0.0, 1.0])}
    return some.replace(valid=jnp.array(valid)[:, None], extras=extras)


def scored(rollouts, slope):
    """Every token's log-prob is a multiple of its id; what is not asked for is no number."""
    return TokenStats(logp=jnp.where(rollouts.mask > 0, slope * rollouts.tokens, jnp.nan))


def made(rollouts, method, policy=-0.2, reference=-0.3):
    probes = method.probes(rollouts)
    of = {"policy": policy, "reference": reference}
    stats = {role: scored(rollouts, slope) for role, slope in of.items()}
    stats |= {f"probe/{name}": scored(probe, of[role]) for name, (probe, role) in probes.items()}
    targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
    return method.loss(stats, rollouts, targets)["kto"], method.metrics(stats, rollouts, targets)


def test_each_prompt_gets_the_next_ones_completion():
    probe = exchange_completions(batch())
    assert probe.tokens.tolist() == [[5, 3, 0, 0, 0, 0], [6, 7, 4, 2, 0, 0], [8, 9, 1, 2, 3, 4]]
    assert probe.mask.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert probe.length.tolist() == [[2], [4], [6]]
    assert probe.valid.tolist() == [[True]] * 3


def test_what_does_not_fit_and_what_is_made_of_an_invalid_row_is_not_valid():
    assert exchange_completions(batch((True, False, True))).valid.tolist() == [[False], [False], [True]]
    tight = to_rollouts([[5], [6, 7, 8]], [[[2, 3, 4]], [[3]]], length=4)
    probe = exchange_completions(tight)
    assert probe.valid.tolist() == [[True], [False]]
    assert probe.mask.sum(axis=1).tolist() == [1.0, 0.0]


def test_single_rows_and_larger_groups_are_refused():
    for rollouts in (to_rollouts([[5]], [[[1]]], length=2), to_rollouts([[5]] * 2, [[[1], [2]]] * 2, length=2)):
        with pytest.raises(ValueError, match="between prompts with one each, of which there must be two at least"):
            exchange_completions(rollouts)


@pytest.mark.parametrize("valid", [(True, True, True), (True, True, False)])
def test_the_loss_is_that_of_the_formula(valid):
    term, metrics = made(batch(valid), methods.kto(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0))
    ratio = 0.1 * np.array([9.0, 3.0, 6.0])  # policy over reference, of the sums of the ids
    anchor = 0.1 * np.mean([3.0, 6.0, 9.0]) if all(valid) else 0.3  # the first prompt with the second's answer
    gain = 1 / (1 + np.exp(-0.5 * (ratio - anchor)))
    expected = np.array([2 * (1 - gain[0]), 3 * gain[1], 2 * (1 - gain[2])])
    there = np.array(valid)
    np.testing.assert_allclose(np.where(there, term.value, 0), np.where(there, expected, 0), rtol=1e-5)
    np.testing.assert_allclose(losses.aggregate(term.value, term.mask, term.mode), expected[there].mean(), rtol=1e-5)
    found = {name: float(metric.result()) for name, metric in metrics.items()}
    good, bad = ratio[[0, 2]][there[[0, 2]]].mean(), ratio[1]
    assert found["kl"] == pytest.approx(anchor, rel=1e-5)
    assert found["rewards/chosen"] == pytest.approx(0.5 * good, rel=1e-5)
    assert found["rewards/rejected"] == pytest.approx(0.5 * bad, rel=1e-5)


def test_answers_as_likely_as_under_the_reference_give_a_half():
    term, _ = made(batch(), methods.kto(), reference=-0.2)
    np.testing.assert_allclose(term.value, 0.5)
