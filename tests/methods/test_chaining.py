"""Several methods in one step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import methods
from jaxrl_post.methods.chaining import chain
from jaxrl_post.types import Method, Targets, Term
from tests.methods import tabular


def assert_same(left, right, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), left, right)


def value_regression() -> Method:
    """Trains the critic towards the rewards, and nothing else."""

    def targets(state, rollouts, stats, key):
        reward = jnp.repeat(rollouts.reward.reshape(-1, 1), rollouts.mask.shape[1], axis=1)
        return Targets(rollouts.mask, rollouts.valid_mask, rollouts.logp, reward), state + 1

    def loss(stats, rollouts, targets):
        return {"value": Term(jnp.square(stats["critic"].value - targets.returns), targets.mask, "token_mean")}

    return Method(
        targets,
        loss,
        needs={"critic": frozenset({"value"})},
        init=lambda rollouts, num_prompts: jnp.zeros((), jnp.int32),
        trains=frozenset({"critic"}),
    )


def test_a_chain_is_its_stages_one_after_the_other_with_one_optimiser_per_role():
    first, second = methods.reinforce(beta=0.0), methods.grpo(beta=0.0, clip_low=0.01, clip_high=0.01)
    batch, optimizer = tabular.batch(), optax.adam(0.05)
    state = tabular.start(first, optimizer)
    for method in (first, second):
        state, alone = tabular.make_step(method, optimizer)(state, batch)
    chained, metrics = tabular.one_step(chain(first, second), batch, optimizer)
    assert_same(chained.params, state.params)
    assert int(chained.opt_state["policy"][0].count) == 2
    assert int(chained.step) == 1
    np.testing.assert_allclose(metrics["stage_1/loss"], alone["loss"], rtol=1e-4, atol=1e-6)
    # What the second stage sees is no longer the policy that sampled: parts of it are clipped.
    assert float(metrics["clip_ratio/region_mean"]) > 0
    assert float(metrics["updates"]) == 2


def test_stages_that_train_different_roles_leave_each_other_alone():
    both = chain(values=value_regression(), policy=methods.grpo(beta=0.0))
    assert both.trains == {"critic", "policy"}
    state, metrics = tabular.one_step(both, tabular.batch())
    alone, _ = tabular.one_step(methods.grpo(beta=0.0), tabular.batch())
    assert_same(state.params["policy"], alone.params["policy"])
    critic, _ = tabular.one_step(value_regression(), tabular.batch())
    assert_same(state.params["critic"], critic.params["critic"])
    assert int(state.method_state["values"]) == 1
    assert float(metrics["updates"]) == 1
    np.testing.assert_allclose(metrics["loss"], metrics["values/loss"] + metrics["policy/loss"], rtol=1e-6)
    norms = [float(metrics[f"{name}/grad_norm"]) for name in ("values", "policy")]
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(*norms), rtol=1e-6)
    assert "loss/value" in metrics  # no other stage has a term of that name
    assert "loss/policy" in metrics
    # The policy has not been touched before its stage, so that the sampler's log-probs are comparable.
    assert float(metrics["sampling/sampling_logp_difference/max"]) < 1e-5


@pytest.mark.parametrize("options", [{"micro_batches": 8}, {"epochs": 2}], ids=str)
def test_a_chain_takes_micro_batches_and_epochs_as_a_method_does(options):
    both = chain(methods.reinforce(), methods.grpo(beta=0.0))
    state, metrics = tabular.one_step(both, tabular.batch(), **options)
    if "epochs" in options:
        assert float(metrics["updates"]) == 4
    else:
        plain, _ = tabular.one_step(both, tabular.batch())
        assert_same(state.params, plain.params)


def test_a_chain_wants_what_its_stages_want():
    coarse = methods.grpo()._replace(unit="group", wants=frozenset({"a"}))
    both = chain(methods.ppo()._replace(wants=frozenset({"b"})), coarse)
    assert both.needs["policy"] == frozenset({"logp"})
    assert set(both.needs) == {"policy", "reference", "critic"}
    assert both.unit == "group"
    assert both.min_group == 2
    assert both.wants == {"a", "b"}


def test_chains_within_chains_are_laid_out_in_their_place():
    inner = chain(a=methods.grpo(), b=methods.reinforce())
    assert list(chain(inner, c=methods.ppo()).stages) == ["a", "b", "c"]
    nested = chain(chain(methods.grpo(), methods.grpo()), methods.grpo())
    assert list(nested.stages) == ["stage_0/stage_0", "stage_0/stage_1", "stage_1"]


def test_what_cannot_be_chained_is_an_error():
    with pytest.raises(ValueError, match="two or more methods"):
        chain(methods.grpo())
    with pytest.raises(ValueError, match="still running, some do not"):
        methods.chain(methods.ppo(), methods.t_ppo())
    assert methods.chain(methods.t_ppo(), methods.t_ppo(lam=0.9)).partial
    with pytest.raises(ValueError, match="same kind of batch"):
        chain(methods.grpo(), methods.dpo())
    with pytest.raises(ValueError, match="two stages are called 'stage_0'"):
        chain(methods.grpo(), stage_0=methods.grpo())
    with pytest.raises(ValueError, match="a chain has no targets of its own"):
        chain(methods.grpo(), methods.grpo()).targets((), None, None, None)
