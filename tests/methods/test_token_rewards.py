import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import data, methods, training
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import compiled
from tests.claims import lab
from tests.methods import tabular

KEY = jax.random.key(0)


def targets_of(method, rollouts, stats):
    state = method.init(jax.eval_shape(lambda: rollouts), rollouts.num_prompts)
    return jax.jit(lambda rollouts, stats: method.targets(state, rollouts, stats, KEY)[0])(rollouts, stats)


@functools.cache
def two_tokens():
    """One rollout of two tokens with the log-probs of the closed-form example."""
    rollouts = data.to_rollouts([[5]], [[[6, 7]]], length=3, rewards=[[2.0]])
    rollouts = rollouts.replace(logp=jnp.array([[0.0, -1.2, -1.4]]))
    stats = {
        "policy": TokenStats(logp=rollouts.logp),
        "dpo": TokenStats(logp=jnp.array([[0.0, -1.0, -2.0]])),
        "reference": TokenStats(logp=jnp.array([[0.0, -1.5, -1.0]])),
        "critic": TokenStats(value=jnp.zeros((1, 3))),
    }
    return rollouts, stats


def test_rtos_advantages_are_those_of_its_token_rewards():
    rollouts, stats = two_tokens()
    found = targets_of(methods.rto(lam=1.0, whiten=False), rollouts, stats)
    np.testing.assert_allclose(found.advantages, [[0.0, 0.022 + 1.954, 1.954]], rtol=1e-5)
    np.testing.assert_allclose(found.returns, found.advantages, rtol=1e-6)


def test_rto_without_the_dpo_policy_is_ppo_with_the_kl_in_its_reward():
    rng = np.random.default_rng(0)
    batch = tabular.batch()
    fields = {role: jnp.asarray(rng.normal(-1, 0.3, batch.mask.shape), jnp.float32) for role in ("dpo", "reference")}
    stats = {role: TokenStats(logp=x * batch.mask) for role, x in fields.items()}
    stats |= {"policy": TokenStats(logp=batch.logp), "critic": TokenStats(value=fields["dpo"])}
    rto = targets_of(methods.rto(beta1=0.0, beta2=0.3, max_reward=None), batch, stats)
    ppo = targets_of(methods.ppo(beta=0.3), batch, stats)
    np.testing.assert_allclose(rto.advantages, ppo.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rto.returns, ppo.returns, rtol=1e-5, atol=1e-5)


@functools.cache
def pair_stats():
    """A pair of 2 and 1 tokens, with log-probs under every prompt that is asked about."""
    rollouts = data.to_rollouts([[5]], [[[6, 7], [8]]], length=4)
    ask = jnp.array([[0, 0, 0, -1.0, -2.0, 0], [0, 0, 0, -1.0, 9.0, 0]])
    answer = jnp.array([[0, 0, 0, -2.0, -2.0, 0], [0, 0, 0, -0.5, 7.0, 0]])
    stats = {
        "policy": TokenStats(logp=jnp.array([[0, -1.0, -3.0, 0], [0, -2.0, 0, 0]])),
        "reference": TokenStats(logp=jnp.array([[0, -2.0, -4.0, 0], [0, -2.0, 0, 0]])),
        "probe/better": TokenStats(logp=ask),
        "probe/worse": TokenStats(logp=answer),
    }
    return rollouts, stats


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_t_reg_adds_to_dpo_the_pairs_regulariser_weighed_by_what_is_not_yet_learned():
    rollouts, stats = pair_stats()
    method = methods.t_reg(better=[3, 4], worse=[4, 3], beta=0.5, alpha=0.25)
    targets = targets_of(method, rollouts, stats)
    first, second = sigmoid(1.0) - 0.5, sigmoid(-0.5) - 0.5
    np.testing.assert_allclose(targets.extras["token_rewards"], [[0, first, 0, 0], [0, second, 0, 0]], atol=1e-6)
    terms = method.loss(stats, rollouts, targets)
    margin = 0.5 * ((-4.0 + 6.0) - 0.0)
    np.testing.assert_allclose(terms["dpo"].value, [-np.log(sigmoid(margin))], rtol=1e-5)
    expected = sigmoid(-margin) * (-0.5 * first * -1.0 - 0.5 * second * -2.0)
    np.testing.assert_allclose(terms["token_regularization"].value, [expected], rtol=1e-5)
    assert terms["token_regularization"].weight == 0.25


def test_t_reg_of_simpo_divides_by_the_length_and_weighs_by_simpos_own_margin():
    rollouts, stats = pair_stats()
    method = methods.t_reg(better=[3, 4], worse=[4, 3], loss="simpo", beta=2.0, gamma=0.5)
    terms = method.loss(stats, rollouts, targets_of(method, rollouts, stats))
    margin = 2.0 * (-2.0 + 2.0) - 0.5
    np.testing.assert_allclose(terms["simpo"].value, [-np.log(sigmoid(margin))], rtol=1e-5)
    first, second = sigmoid(1.0) - 0.5, sigmoid(-0.5) - 0.5
    expected = sigmoid(-margin) * (-2.0 * first * -1.0 / 2 - 2.0 * second * -2.0)
    np.testing.assert_allclose(terms["token_regularization"].value, [expected], rtol=1e-5)
    assert set(method.roles) == {"policy", "reference"}


def test_a_pair_with_an_invalid_half_counts_for_nothing():
    rollouts, stats = pair_stats()
    rollouts = rollouts.replace(valid=jnp.array([[True, False]]))
    method = methods.t_reg(better=[3], worse=[4])
    terms = method.loss(stats, rollouts, targets_of(method, rollouts, stats))
    assert all(float(term.mask[0]) == 0 and np.isfinite(term.value[0]) for term in terms.values())


def test_the_probes_ask_the_reference_for_the_same_answers_after_two_other_prompts():
    rollouts, _ = pair_stats()
    probes = methods.t_reg(better=[3, 4], worse=[9]).probes(rollouts)
    assert {name: role for name, (_, role) in probes.items()} == {"better": "reference", "worse": "reference"}
    assert probes["better"][0].tokens[0].tolist() == [5, 3, 4, 6, 7, 0]
    assert probes["worse"][0].tokens[1, :3].tolist() == [5, 9, 8]


def test_t_reg_without_weight_is_dpo():
    rollouts, stats = pair_stats()
    method = methods.t_reg(better=[3, 4], worse=[4, 3], beta=0.5, alpha=0.0)
    terms = method.loss(stats, rollouts, targets_of(method, rollouts, stats))
    plain = methods.dpo(beta=0.5)
    (only,) = plain.loss(stats, rollouts, targets_of(plain, rollouts, stats)).values()
    np.testing.assert_array_equal(terms["dpo"].value, only.value)
    assert terms["token_regularization"].weight == 0


def test_t_reg_moves_the_policy_alike_however_the_batch_is_cut():
    def moved(**options):
        state, metrics = tabular.one_step(method, tabular.batch(group_size=2), **options)
        assert int(metrics["nonfinite_updates"]) == 0
        return jax.flatten_util.ravel_pytree(jax.device_get(state.params["policy"]))[0]

    method = methods.t_reg(better=[1, 2], worse=[0], alpha=0.5)
    whole = moved()
    np.testing.assert_allclose(moved(micro_batches=2), whole, rtol=1e-5, atol=1e-6)
    start = jax.flatten_util.ravel_pytree(tabular.params_for(method)["policy"])[0]
    assert np.max(np.abs(whole - start)) > 1e-5


def test_simpo_reads_no_reference():
    rollouts, stats = pair_stats()
    method = methods.simpo(beta=2.0, gamma=0.5)
    assert set(method.needs) == {"policy"}
    terms = method.loss({"policy": stats["policy"]}, rollouts, targets_of(method, rollouts, stats))
    np.testing.assert_allclose(terms["simpo"].value, [-np.log(sigmoid(-0.5))], rtol=1e-5)


@pytest.mark.parametrize("form", ["log_mean", "jensen_shannon"])
def test_tw_grpos_advantage_is_grpos_times_the_weight_of_the_place(form):
    rollouts = data.to_rollouts([[5]], [[[6, 7, 8], [6, 9, 4]]], length=4, rewards=[[1.0, 0.0]])
    divergence = jnp.array([[0.0, 0.0, 1.0, 2.0]] * 2)
    field = {"log_mean": "group_log_divergence", "jensen_shannon": "group_divergence"}[form]
    stats = {"policy": TokenStats(logp=rollouts.logp, **{field: divergence})}
    method = methods.tw_grpo(divergence=form, alpha=1.7)
    advantage = 0.5 / (np.sqrt(0.5) + 1e-4)
    expected = advantage * np.array([[0, 1.0, 1.35, 1.7], [0, -1.0, -1.35, -1.7]])
    np.testing.assert_allclose(targets_of(method, rollouts, stats).advantages, expected, rtol=1e-5)
    assert method.unit == "group"


TASK = lab.Task(2, 3, 3, lab.by_sequence(np.random.default_rng(0).random((2, 27))))


def trained(method):
    table = jax.random.normal(jax.random.key(3), TASK.params().shape)
    rollouts = compiled(lab.sample)(TASK, table, jax.random.key(1), 4)
    optimizer = optax.sgd(0.3)
    shapes = jax.eval_shape(lambda: rollouts)
    state = training.init({"policy": table}, method, optimizer, KEY, rollouts=shapes, num_prompts=2)
    state, _ = training.make_step(lab.score, method, optimizer)(state, rollouts)
    return np.asarray(state.params["policy"])


def test_tw_grpo_with_the_largest_weight_one_is_grpo():
    plain = trained(methods.policy_gradient(advantage={"name": "grpo", "eps": 1e-4}))
    np.testing.assert_allclose(trained(methods.tw_grpo(alpha=1.0)), plain, rtol=1e-6, atol=1e-7)
    assert np.max(np.abs(trained(methods.tw_grpo()) - plain)) > 1e-4


def agents():
    """Two rollouts of two tokens by agents 0 and 1, and one by an agent that has no reward."""
    rollouts = data.to_rollouts([[5]], [[[6, 7, 8], [6, 9, 4]]], length=4, rewards=[[1.0, 0.0]])
    return rollouts.replace(
        extras={"agent": jnp.array([[-1, 0, 1, 2], [-1, 0, 1, 2]])},
        rewards={"find": jnp.array([[0.0, 1.0]]), "answer": jnp.array([[1.0, 0.0]]), "text": jnp.zeros((2, 4))},
    )


def test_comam_gives_each_token_the_advantage_of_its_agent():
    # Agent 0 ranks the success second (v = 1 / log2(3)), agent 1 first (v = 1).
    rollouts = agents()
    method = methods.comam(local=["find", "answer"], normalize_std=False)
    found = targets_of(method, rollouts, {"policy": TokenStats(logp=rollouts.logp)}).advantages
    weight = np.exp([1 / np.log2(3), 1.0]) / np.exp([1 / np.log2(3), 1.0]).sum()
    expected = np.array([[0, (weight[0] - 1) / 2, (1 + weight[1]) / 2, 0]])
    np.testing.assert_allclose(found, np.concatenate([expected, -expected]), rtol=1e-5)


def test_comams_common_reward_may_be_one_of_the_components():
    rollouts = agents()
    stats = {"policy": TokenStats(logp=rollouts.logp)}
    named = targets_of(methods.comam(local=["find"], shared="answer"), rollouts, stats)
    total = targets_of(methods.comam(local=["find"]), rollouts, stats)
    np.testing.assert_allclose(named.advantages, total.advantages, rtol=1e-6)
    with pytest.raises(
        ValueError, match="there is no component 'text' of the reward for whole sequences; there are answer, find"
    ):
        targets_of(methods.comam(local=["find", "text"]), rollouts, stats)
    with pytest.raises(ValueError, match=r"reads rollouts.extras\['agent'\]"):
        targets_of(methods.comam(local=["find"]), rollouts.replace(extras={}), stats)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.rto(beta1=-1), "beta1 must be at least 0"),
        (lambda: methods.rto(clip=0), "clip must be above 0"),
        (lambda: methods.rto(gamma=2), "gamma must be between 0 and 1"),
        (lambda: methods.t_reg(better=[], worse=[1]), "better must hold at least one token id"),
        (lambda: methods.t_reg(better=[1], worse=[1], gamma=1.0), "gamma=1.0 does not apply to loss='dpo'"),
        (lambda: methods.t_reg(better=[1], worse=[1], loss="ipo"), "loss must be one of dpo, simpo"),
        (lambda: methods.t_reg(better=[1], worse=[1], alpha=-1), "alpha must be at least 0"),
        (lambda: methods.simpo(gamma=-1), "gamma must be at least 0"),
        (lambda: methods.simpo(beta=0), "beta must be above 0"),
        (lambda: methods.tw_grpo(alpha=0.5), "alpha must be at least 1"),
        (lambda: methods.tw_grpo(divergence="kl"), "divergence must be one of"),
        (lambda: methods.comam(local=[]), "local must name at least one component"),
        (lambda: methods.comam(local="ab"), r"local must be a list .*give \['ab'\]"),
    ],
)
def test_keywords_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()
