"""Targets and losses of methods on whole sequences, from rollouts and log-probs given by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import losses, methods
from jaxrl_post.types import TokenStats
from tests.advantages.compiled import compiled
from tests.claims import lab

TASK = lab.Task(2, 3, 2, lab.by_sequence(np.linspace(0, 1, 9), noise=0.3))
KEY = jax.random.key(0)


def _rollouts(seed=0, group_size=4, invalid=()):
    made = compiled(lab.sample)(TASK, TASK.params(), jax.random.key(seed), group_size)
    for place in invalid:
        made = made.replace(valid=made.valid.at[place].set(False))
    return made


def _stats(rollouts, seed, spread=0.3):
    rng = np.random.default_rng(seed)
    noise = jnp.asarray(rng.normal(0, spread, rollouts.mask.shape), jnp.float32) * rollouts.mask
    return TokenStats(
        logp=rollouts.logp + noise,
        entropy=jnp.ones(rollouts.mask.shape),
        value=0.5 + noise,
        mean_logp=rollouts.logp - 1 + noise,
        logsumexp=1 + noise,
    )


def _loss(method, rollouts, stats, state=(), start=None):
    def run(state, rollouts, stats, start):
        targets, state = method.targets(state, rollouts, start, KEY)
        terms = method.loss(stats, rollouts, targets)
        reduced = {k: t.weight * losses.aggregate(t.value, t.mask, t.mode, horizon=t.horizon) for k, t in terms.items()}
        return reduced, targets, state

    return jax.jit(run)(state, rollouts, stats, stats if start is None else start)


def _sums(x, rollouts):
    return np.asarray(jnp.sum(x * rollouts.mask, axis=1).reshape(rollouts.reward.shape), np.float64)


def test_copg_and_gvpo_average_over_the_prompts_that_have_a_pair():
    rollouts = _rollouts(invalid=[(1, 0), (1, 1), (1, 2)])
    stats = {"policy": _stats(rollouts, 1), "reference": _stats(rollouts, 2)}
    policy, reference = (_sums(stats[role].logp, rollouts)[0] for role in stats)
    regularised = np.asarray(rollouts.reward[0]) - 0.2 * (policy - reference)
    loss, _, _ = _loss(methods.copg(beta=0.2), rollouts, stats)
    np.testing.assert_allclose(loss["copg"], np.var(regularised, ddof=1) / 0.2, rtol=1e-5)
    regularised = np.asarray(rollouts.reward[0]) - 0.2 * (policy - _sums(rollouts.logp, rollouts)[0])
    loss, _, _ = _loss(methods.gvpo(beta=0.2), rollouts, stats)
    np.testing.assert_allclose(loss["gvpo"], np.var(regularised, ddof=1) / 2, rtol=1e-5)
    nothing, _, _ = _loss(methods.gvpo(), rollouts.replace(valid=jnp.zeros((2, 4), bool)), stats)
    assert float(nothing["gvpo"]) == 0


def test_kimis_length_reward_is_warmed_up_and_reaches_right_and_wrong_answers():
    rollouts = _rollouts()
    mask = rollouts.mask.at[0, 2].set(0.0)  # the first answer is one token shorter
    reward = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    rollouts = rollouts.replace(mask=mask, reward=reward)
    method = methods.kimi(length_weight=0.4, length_warmup=2)
    state = method.init(rollouts, 2)
    added = []
    for _ in range(4):
        _, targets, state = _loss(method, rollouts, {"policy": _stats(rollouts, 1)}, state)
        added.append(np.asarray(targets.extras["reward"] - reward))
    expected = np.array([[0.5, -0.5, -0.5, -0.5], [0, 0, 0, 0]])
    for share, given in zip((0, 0.5, 1, 1), added, strict=True):
        np.testing.assert_allclose(given, 0.4 * share * expected, atol=1e-6)
    assert int(state) == 4


def test_a2po_keeps_the_value_of_a_prompts_first_group():
    first, second = _rollouts(0), _rollouts(1)
    method = methods.a2po(beta=0.1)
    state = method.init(first, 5)
    stats = {"policy": _stats(first, 1), "reference": _stats(first, 2)}
    _, targets, state = _loss(method, first, stats, state)
    expected = losses.optimal_value(first.reward, beta=0.5)
    np.testing.assert_allclose(targets.extras["optimal_value"], expected, rtol=1e-6)
    _, targets, state = _loss(method, second, stats, state)
    np.testing.assert_allclose(targets.extras["optimal_value"], expected, rtol=1e-6)
    assert state["known"].tolist() == [True, True, False, False, False]
    given = methods.a2po(values="given")
    assert given.wants == {"optimal_value"}
    value = jnp.array([3.0, 4.0])
    _, targets, _ = _loss(given, first.replace(extras={"optimal_value": value}), stats)
    np.testing.assert_array_equal(targets.extras["optimal_value"], value)


def test_flowrl_reads_the_partition_function_where_the_first_token_is_chosen():
    rollouts = _rollouts()
    stats = {"policy": _stats(rollouts, 1), "reference": _stats(rollouts, 2), "critic": _stats(rollouts, 3)}
    method = methods.flowrl()

    def loss(value):
        return _loss(method, rollouts, stats | {"critic": stats["critic"].replace(value=value)})[0]["flow"]

    gradient = np.asarray(jax.jit(jax.grad(loss))(stats["critic"].value))
    assert gradient[:, 1].all()
    assert not gradient[:, [0, 2]].any()


@pytest.mark.parametrize("clip", ["separate", "joint"])
def test_p3o_takes_the_kl_of_the_sampler_from_the_reward(clip):
    rollouts = _rollouts(invalid=[(0, 1)])
    stats = {"policy": _stats(rollouts, 1), "reference": _stats(rollouts, 2)}
    given, _, _ = _loss(methods.p3o(clip=clip, beta=0.3), rollouts, stats)
    drift = _sums(rollouts.logp, rollouts) - _sums(stats["reference"].logp, rollouts)
    folded = rollouts.replace(reward=rollouts.reward - 0.3 * jnp.asarray(drift, jnp.float32))
    plain, _, _ = _loss(methods.p3o(clip=clip), folded, stats)
    np.testing.assert_allclose(given["policy"], plain["policy"], rtol=1e-5)


def test_disco_counts_prompts_without_contrast_and_holds_the_batch_in_a_trust_region():
    rollouts = _rollouts().replace(reward=jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    stats = {"policy": _stats(rollouts, 1)}
    start = {"policy": _stats(rollouts, 2)}
    method = methods.disco(tau=float("inf"), beta=2.0, delta=0.0)
    given, _, _ = _loss(method, rollouts, stats, start=start)
    scores = _sums(stats["policy"].logp, rollouts)[0] / 2
    expected = -(scores[[0, 3]].mean() - scores[[1, 2]].mean()) / 2  # of two prompts
    np.testing.assert_allclose(given["disco"], expected, rtol=1e-5)
    gap = (start["policy"].logp - stats["policy"].logp)[:, 1:]
    level = float(gap.mean())
    np.testing.assert_allclose(given["kl_hinge"], 2 * max(level, 0) * level, rtol=1e-4, atol=1e-7)


def test_f_dpg_averages_its_partition_function_over_steps_and_its_baseline_over_a_window():
    method = methods.f_dpg(divergence="reverse_kl", beta=0.5, window=6)
    batches = [_rollouts(seed, invalid=[(0, 0)]) for seed in range(3)]
    state = method.init(batches[0], 2)
    totals, seen = [], []
    for step, rollouts in enumerate(batches):
        stats = {"policy": _stats(rollouts, 1), "reference": _stats(rollouts, 2)}
        score = _sums(stats["reference"].logp, rollouts) + np.asarray(rollouts.reward) / 0.5
        sampler = _sums(rollouts.logp, rollouts)
        valid = np.asarray(rollouts.valid)
        totals.append([np.mean(np.exp(score - sampler)[p][valid[p]]) for p in range(2)])
        log_z = np.log(np.mean(totals, axis=0))
        rewards = -(sampler - score + log_z[:, None]) - 1
        expected = np.mean(seen[-6:]) if seen else rewards[valid].mean()
        _, targets, state = _loss(method, rollouts, stats, state)
        np.testing.assert_allclose(targets.extras["log_z"], log_z, rtol=1e-4, err_msg=str(step))
        np.testing.assert_allclose(targets.extras["baseline"], [expected] * 2, rtol=1e-4, err_msg=str(step))
        seen.extend(rewards[valid])


def test_f_dpg_is_finite_where_no_answer_meets_the_constraint():
    rollouts = _rollouts().replace(reward=jnp.zeros((2, 4)))
    method = methods.f_dpg(target="constrained", divergence="js")
    stats = {"policy": _stats(rollouts, 1), "reference": _stats(rollouts, 2)}
    given, targets, state = _loss(method, rollouts, stats, method.init(rollouts, 2))
    assert np.isfinite(given["f_dpg"])
    np.testing.assert_allclose(targets.extras["baseline"], -np.log(2), rtol=1e-6)
    recovered = rollouts.replace(reward=jnp.ones((2, 4)))
    _, targets, _ = _loss(method, recovered, stats, state)
    assert np.all(np.isfinite(targets.extras["log_z"]))


def test_rovers_first_update_is_the_centred_reward_and_the_next_one_reads_the_next_state():
    rollouts = _rollouts()
    start = {"policy": _stats(rollouts, 1)}
    method = methods.rover()
    first, _, _ = _loss(method, rollouts, start)
    centered = np.asarray(rollouts.reward) - np.asarray(rollouts.reward).mean(1, keepdims=True)
    np.testing.assert_allclose(first["rover"], np.mean(centered**2), rtol=1e-5)
    later = {"policy": _stats(rollouts, 2)}
    given, _, _ = _loss(method, rollouts, later, start=start)
    q = np.asarray(later["policy"].logp - start["policy"].logp)[:, 1:]
    following = np.asarray(later["policy"].mean_logp - start["policy"].mean_logp)[:, 2]
    target = np.stack([centered.reshape(-1) + following, centered.reshape(-1)], axis=1)
    np.testing.assert_allclose(given["rover"], np.mean((q - target) ** 2), rtol=1e-4)


def test_rlprompt_scores_rewards_per_prompt_and_reads_the_target_network():
    rollouts = _rollouts()
    stats = {"policy": _stats(rollouts, 1), "target": _stats(rollouts, 2)}
    single, multi, both = (
        _loss(methods.rlprompt(steps=s), rollouts, stats)[0]["soft_q"] for s in ("single", "multi", "both")
    )
    np.testing.assert_allclose(both, (single + multi) / 2, rtol=1e-6)
    louder = rollouts.replace(reward=rollouts.reward * jnp.array([[1.0], [100.0]]))
    given, _, _ = _loss(methods.rlprompt(steps="single"), louder, stats)
    np.testing.assert_allclose(given["soft_q"], single, rtol=1e-2)  # but for the 1e-4 in the score's denominator
    raw, targets, _ = _loss(methods.rlprompt(zscore=False, reward_scale=2.0), rollouts, stats)
    np.testing.assert_allclose(targets.advantages[:, 2], 2 * rollouts.reward.reshape(-1), rtol=1e-6)
    assert methods.rlprompt(zscore=False).min_group == 1
    assert np.isfinite(raw["soft_q"])


def test_scst_imitates_given_answers_and_compares_only_samples_with_the_greedy_one():
    rollouts = _rollouts()
    given = jnp.array([[0, 0, 0, 1], [0, 0, 0, 1]], jnp.float32)
    rollouts = rollouts.replace(extras={"greedy_reward": jnp.array([0.5, 0.25]), "given_answer": given})
    stats = {"policy": _stats(rollouts, 1)}
    loss, _, _ = _loss(methods.scst(rl_weight=0.75), rollouts, stats)
    logp = _sums(stats["policy"].logp, rollouts)
    advantages = np.asarray(rollouts.reward) - np.array([[0.5], [0.25]])
    np.testing.assert_allclose(loss["policy"], -0.75 * np.mean((advantages * logp)[:, :3]), rtol=1e-5)
    np.testing.assert_allclose(loss["nll"], -0.25 * np.mean(logp[:, 3]), rtol=1e-5)
    alone, _, _ = _loss(methods.scst(), rollouts, stats)
    np.testing.assert_allclose(alone["policy"], -np.mean(advantages * logp), rtol=1e-5)
    assert methods.scst().wants >= {"greedy_reward"}


def test_subpo_rewards_new_tokens_against_the_other_sequences_at_the_same_place():
    rollouts = _rollouts(group_size=2).replace(reward=jnp.zeros((2, 2)))
    rollouts = rollouts.replace(tokens=jnp.array([[9, 1, 2], [9, 1, 1], [9, 2, 2], [9, 0, 0]]))
    stats = {"policy": _stats(rollouts, 1)}
    _, targets, _ = _loss(methods.subpo(), rollouts, stats)
    # Reward-to-go [2, 1] against [1, 0]; then equal.
    expected = [[0, 1, 1], [0, -1, -1], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(targets.advantages, expected, atol=1e-6)
    _, targets, _ = _loss(methods.subpo(greedy=True, baseline="none", gain_weight=0.5), rollouts, stats)
    np.testing.assert_allclose(targets.advantages[0], [0, 0.5, 0.5])
    np.testing.assert_allclose(targets.advantages[1], [0, 0.5, 0])


@pytest.mark.parametrize(
    ("make", "keywords", "message"),
    [
        (methods.copg, {"beta": 0.0}, "beta must be"),
        (methods.copg, {"form": "pairs"}, "form must be one of"),
        (methods.gvpo, {"old_logp": "sampler"}, "old_logp must be one of"),
        (methods.kimi, {"length_warmup": 5}, "length_warmup=5 does not apply"),
        (methods.a2po, {"values": "learned"}, "values must be one of"),
        (methods.flowrl, {"weight_high": -1.0}, "weight_high must be"),
        (methods.p3o, {"clip": "both"}, "clip must be one of"),
        (methods.disco, {"tau": 0.0}, "tau must be"),
        (methods.f_dpg, {"divergence": "kl"}, "divergence must be one of"),
        (methods.f_dpg, {"max_log_t": 100.0}, "max_log_t must be"),
        (methods.rover, {"clip_eps": 2.0}, "clip_eps must be"),
        (methods.rlprompt, {"steps": "two"}, "steps must be one of"),
        (methods.scst, {"rl_weight": 1.5}, "rl_weight must be"),
        (methods.subpo, {"set_function": "coverage"}, "set_function: there is no 'coverage'"),
    ],
)
def test_keywords_without_meaning_are_refused_when_the_method_is_made(make, keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)
