"""Methods on pairs give the numbers of the released TRL, value and gradient, in float64 to 1e-9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, masked, methods
from jaxrl_post.data import to_rollouts
from jaxrl_post.types import TokenStats
from tests.methods.peer_fixtures import STEPS, assert_close, both, case, named, stored
from tests.methods.peer_fixtures.constants import BETA, LABEL_SMOOTHING

SMOOTHED = {"label_smoothing": LABEL_SMOOTHING}
# TRL's name: the options of `methods.dpo`
PAIRS = {
    "sigmoid": {},
    "sigmoid_norm": {"length_normalized": True},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "exo_pair": {"loss": "exo", **SMOOTHED},
    "nca_pair": {"loss": "nca"},
    "robust": {"loss": "robust_dpo", **SMOOTHED},
    "bco_pair": {"loss": "bco"},
    "sppo_hard": {"loss": "sppo"},
    "aot": {"loss": "aot", **SMOOTHED},
    "aot_unpaired": {"loss": "aot_unpaired", **SMOOTHED},
    "apo_zero": {"loss": "apo_zero"},
    "apo_down": {"loss": "apo_down"},
    "discopop": {"loss": "discopop"},
    "several": {"loss": {"dpo": 0.8, "bco": 0.2}, "nll_weight": 1.0},
}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def pairs(mask, valid=None):
    """Rollouts with a mask `[B, T]`, whose neighbouring rows are pairs."""
    some = to_rollouts([[1]] * (len(mask) // 2), [[[1], [1]]] * (len(mask) // 2), length=STEPS)
    valid = some.valid if valid is None else jnp.asarray(valid)
    return some.replace(mask=jnp.asarray(mask), valid=valid)


def total(method, rollouts, ref):
    """The loss of a batch as a function of `logp` `[B, T]`."""

    def of(logp):
        stats = {"policy": TokenStats(logp=logp), "reference": TokenStats(logp=jnp.asarray(ref))}
        targets, _ = method.targets((), rollouts, stats, jax.random.key(0))
        terms = method.loss(stats, rollouts, targets)
        return sum(term.weight * losses.aggregate(term.value, term.mask, term.mode) for term in terms.values())

    return jax.jit(jax.value_and_grad(of))


@both
@named(PAIRS)
def test_losses_on_pairs_are_trls(name, number):
    x = case(number)
    found = total(methods.dpo(beta=BETA, **PAIRS[name]), pairs(x["mask"]), x["ref"])(x["logp"])
    for part, ours in zip(("value", "grad"), found, strict=True):
        assert_close(ours, stored("trl_pairs")[f"{number}/{name}/{part}"])


@both
def test_losses_without_a_reference_are_trls(number):
    x, trl = case(number), stored("trl_pairs")
    chosen, rejected = masked.sum(x["logp"], x["mask"], 1).reshape(-1, 2).T
    smoothed = losses.cpo(chosen, rejected, beta=BETA, nll_weight=0.0, **SMOOTHED)
    assert_close(smoothed, trl[f"{number}/cpo"])
    chosen, rejected = masked.mean(x["logp"], x["mask"], 1).reshape(-1, 2).T
    assert_close(losses.simpo(chosen, rejected, beta=BETA, gamma=0.5), trl[f"{number}/simpo"])
    odds, theirs = losses.orpo(chosen, rejected, beta=BETA) + chosen, trl[f"{number}/orpo_odds"]
    told = np.isfinite(theirs)  # a row without tokens has an infinite odds ratio there
    assert told.sum() >= 5
    np.testing.assert_allclose(-odds[told], theirs[told], rtol=1e-5)
    assert np.isfinite(odds).all()


@named(PAIRS)
def test_a_pair_that_is_not_valid_counts_for_nothing(name):
    x = case(0)
    method = methods.dpo(beta=BETA, **PAIRS[name])
    valid = np.ones((6, 2), bool)
    valid[2, 1] = valid[5, 0] = False
    kept = np.repeat(valid.all(1), 2)
    value, slope = total(method, pairs(x["mask"], valid), x["ref"])(x["logp"])
    alone = total(method, pairs(x["mask"][kept]), x["ref"][kept])(x["logp"][kept])
    assert_close(value, alone[0])
    assert_close(slope[kept], alone[1])
    assert not slope[~kept].any()
