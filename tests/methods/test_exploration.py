"""Methods against the collapse of entropy: what each does to the update, against hand-made losses and advantages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_post import advantages, losses, methods, rewards, training
from tests.advantages.compiled import all_compiled, compiled
from tests.claims import lab
from tests.methods.test_method_configs import with_extras

advantages, losses, rewards = all_compiled(advantages), all_compiled(losses), all_compiled(rewards)

TASK = lab.Task(prompts=3, vocab=3, length=4, judge=lambda rollouts, key: rollouts)


def table(seed):
    return jax.random.normal(jax.random.key(seed), (3, TASK.prefixes, 3))


@pytest.fixture(scope="module")
def batch():
    made = compiled(with_extras)(compiled(lab.sample)(TASK, table(0), jax.random.key(1), 4))
    mask = made.mask.at[::3, -1].set(0).at[1::4, 2].set(0)
    return made.replace(mask=mask, valid=made.valid.at[2, 1].set(False))


def started(method, batch):
    """Targets, and the stats they were made from, of a policy that has moved on since it sampled."""
    stats = {
        role: compiled(lab.score)(table(7 if role == "policy" else 8), batch, fields, jax.random.key(0))
        for role, fields in method.needs.items()
    }
    shapes = jax.eval_shape(lambda: batch)
    targets, _ = compiled(method.targets)(method.init(shapes, 3), batch, stats, jax.random.key(2))
    return targets, stats


def grpo_tokens(batch, **options):
    found = advantages.grpo(batch.reward, batch.valid, **options)
    return np.asarray(advantages.per_token(found, batch.valid_mask))


def covariance(batch, stats):
    a, logp, on = grpo_tokens(batch), np.asarray(stats["policy"].logp), np.asarray(batch.valid_mask) > 0
    return np.where(on, (a - a[on].mean()) * (logp - logp[on].mean()), -np.inf), on


def test_kl_cov_penalises_the_tokens_of_largest_covariance_in_the_whole_batch(batch):
    targets, stats = started(methods.kl_cov(fraction=0.1), batch)
    found, on = covariance(batch, stats)
    expected = np.zeros(found.size)
    expected[np.argsort(-found.ravel(), kind="stable")[: int(0.1 * on.sum())]] = 1
    np.testing.assert_array_equal(np.asarray(targets.extras["selected_tokens"]).ravel(), expected)
    assert expected.sum() >= 2


def test_clip_cov_leaves_out_tokens_of_the_band_that_ppo_has_not_clipped_already(batch):
    method = methods.clip_cov(fraction=0.5, low=0.2, high=1.5, clip_high=0.1)
    targets, stats = started(method, batch)
    found, on = covariance(batch, stats)
    region = losses.clipped_region(stats["policy"].logp, batch.logp, grpo_tokens(batch), clip_high=0.1)
    band = on & (found > 0.2) & (found < 1.5) & (np.asarray(region) == 0)
    assert np.any(on & (found > 0.2) & (found < 1.5) & (np.asarray(region) != 0))
    np.testing.assert_array_equal(targets.extras["selected_tokens"], band)  # fewer than half of all are in it
    value = method.loss(stats, batch, targets)["policy"].value
    plain = losses.ppo(stats["policy"].logp, batch.logp, targets.advantages, clip_high=0.1)
    np.testing.assert_array_equal(value, np.where(band, 0, plain))


def updated(method, batch, **options):
    state = training.init(
        {role: table(7 if role == "policy" else 8) for role in method.roles},
        method,
        optax.sgd(1.0),
        jax.random.key(5),
        rollouts=jax.eval_shape(lambda: batch),
        num_prompts=3,
    )
    state, metrics = training.make_step(lab.score, method, optax.sgd(1.0), **options)(state, batch)
    return state, metrics


def test_with_one_token_left_out_the_same_one_is_left_out_of_every_cut_of_the_batch(batch):
    method = methods.clip_cov(low=0.0, high=9.0)
    (whole, metrics), (parts, _) = updated(method, batch), updated(method, batch, micro_batches=3)
    np.testing.assert_allclose(whole.params["policy"], parts.params["policy"], atol=1e-6)
    np.testing.assert_allclose(metrics["selected_tokens"], 1 / np.asarray(batch.valid_mask).sum(), rtol=1e-5)
    plain, _ = updated(methods.policy_gradient(), batch)
    assert not np.allclose(whole.params["policy"], plain.params["policy"], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"tokens": "low"}, {"level": "sequence"}, {"normalize": "kept"}])
def test_of_high_entropy_tokens_each_variant_has_its_own_mask_and_denominator(batch, options):
    method = methods.high_entropy_tokens(fraction=0.3, **options)
    targets, stats = started(method, batch)
    on, entropy = np.asarray(batch.valid_mask) > 0, np.asarray(stats["policy"].entropy)
    if options.get("level") == "sequence":
        threshold = np.array([np.quantile(h[m], 0.7) if m.any() else 0 for h, m in zip(entropy, on, strict=True)])
        kept = on & (entropy >= threshold[:, None] - 1e-6)
    else:
        kept = on & (entropy >= np.quantile(entropy[on], 0.7))
    kept = on & ~kept if options.get("tokens") == "low" else kept
    a, logp = grpo_tokens(batch), np.asarray(stats["policy"].logp)
    ratio = np.exp(logp - np.asarray(batch.logp))
    loss = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.28))
    expected = loss[kept].sum() / (kept.sum() if options.get("normalize") == "kept" else on.sum())
    term = method.loss(stats, batch, targets)["policy"]
    np.testing.assert_allclose(losses.aggregate(term.value, term.mask, term.mode), expected, rtol=2e-5)


def test_the_default_of_high_entropy_tokens_is_the_option_of_every_method(batch):
    one, _ = updated(methods.high_entropy_tokens(), batch)
    other, _ = updated(methods.dapo(top_entropy=0.2), batch)
    np.testing.assert_allclose(one.params["policy"], other.params["policy"], atol=1e-6)


def test_tokens_are_chosen_among_those_that_the_advantage_keeps(batch):
    high = methods.high_entropy_tokens(advantage="mc_grpo", fraction=0.3, clip_high=0.2)
    (one, _), (other, _) = (
        started(high, batch),
        started(methods.policy_gradient(advantage="mc_grpo", top_entropy=0.3), batch),
    )
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_array_equal(one.extras["top_entropy"], other.extras["top_entropy"])
    (one, _), (other, _) = (
        updated(high, batch),
        updated(methods.policy_gradient(advantage="mc_grpo", top_entropy=0.3), batch),
    )
    np.testing.assert_allclose(one.params["policy"], other.params["policy"], atol=1e-6)


@pytest.mark.parametrize("make", [methods.kl_cov, methods.clip_cov])
def test_tokens_of_rows_that_the_advantage_drops_are_not_selected(batch, make):
    # Without a cut of the band or of the share: every token with a covariance.
    wide = {"low": -1e9, "high": 1e9, "clip_low": 1.0, "clip_high": 1e9} if make is methods.clip_cov else {}
    targets, stats = started(make(advantage="mc_grpo", fraction=1.0, **wide), batch)
    a, keep = advantages.mc_grpo(batch.reward, batch.valid, max_abs=5.0)
    on = np.asarray(batch.valid_mask * keep.reshape(-1, 1)) > 0
    assert on.sum() < np.asarray(batch.valid_mask).sum()
    np.testing.assert_array_equal(targets.extras["selected_tokens"], on)
    few, _ = started(make(advantage="mc_grpo", fraction=0.2, **wide), batch)
    assert float(few.extras["selected_tokens"].sum()) == int(0.2 * on.sum())
    if make is methods.kl_cov:
        x = np.asarray(advantages.per_token(a, batch.valid_mask))
        logp = np.asarray(stats["policy"].logp)
        covariance = np.where(on, (x - x[on].mean()) * (logp - logp[on].mean()), -np.inf)
        largest = np.argsort(-covariance.ravel(), kind="stable")[: int(0.2 * on.sum())]
        assert np.asarray(few.extras["selected_tokens"]).ravel()[largest].all()


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_egpo_adds_the_entropy_of_the_reasoning_alone(batch, level):
    end = 2
    targets, stats = started(methods.egpo(level=level, think_end=[end], alpha=0.5, kappa=2.0), batch)
    tokens, mask, entropy = (np.asarray(x) for x in (batch.tokens, batch.valid_mask, stats["policy"].entropy))
    a, expected = grpo_tokens(batch), np.zeros(mask.shape)
    for row in range(len(tokens)):
        on = np.flatnonzero(mask[row])
        ends = [place for place in on if tokens[row, place] == end]
        # Ends that follow each other directly are one.
        last = ends[0] if ends else (on[-1] if len(on) else 0)
        while last + 1 in ends:
            last += 1
        thinks = [place for place in on if place <= last]
        for place in on:
            h = entropy[row, thinks].mean() if level == "sequence" else entropy[row, place] * (place in thinks)
            expected[row, place] = a[row, place] + min(0.5 * h, abs(a[row, place]) / 2)
    middle = (tokens[:, 1:-1] == end).any(1) & (mask.sum(1) == mask.shape[1] - 1)
    np.testing.assert_allclose(np.asarray(targets.advantages)[middle], expected[middle], rtol=1e-5, atol=1e-6)
    assert middle.sum() >= 2
    assert np.any(expected != a)


@pytest.mark.parametrize(("phi", "power"), [("reward", None), (1.0, 1.0), (0.0, 0.0), ("sigmoid", "sigmoid")])
def test_rapo_adds_the_forward_kl_to_the_reference_as_far_as_the_reward_is_good(batch, phi, power):
    method = methods.rapo(alpha=0.1, phi=phi, entropy_weight=0.0)
    targets, stats = started(method, batch)
    reward = np.asarray(batch.reward).reshape(-1, 1)
    power = {None: reward, "sigmoid": 1 / (1 + np.exp(-reward))}.get(power, power)
    log_w = power * np.asarray(stats["reference"].logp) - np.asarray(stats["policy"].logp)
    term = method.loss(stats, batch, targets)["forward_kl"]
    on = np.asarray(batch.valid_mask) > 0
    expected = (np.exp(log_w) * log_w - np.exp(log_w) + 1)[on]
    np.testing.assert_allclose(np.asarray(term.value)[on], expected, rtol=1e-4, atol=1e-5)
    assert (term.weight, term.mode) == (0.1, "token_mean")
    assert not np.any(np.asarray(term.mask)[~on])


def test_rapo_without_its_two_terms_is_the_clipped_surrogate(batch):
    one, _ = updated(methods.rapo(alpha=0.0, entropy_weight=0.0), batch)
    other, _ = updated(methods.policy_gradient(), batch)
    np.testing.assert_allclose(one.params["policy"], other.params["policy"], atol=1e-6)


def test_the_novelty_bonus_is_the_product_over_its_running_deviation_and_its_state_remembers(batch):
    method = methods.novelty_bonus(coef=0.5, capacity=10_007)
    state = method.init(jax.eval_shape(lambda: batch), 3)
    seen, bonuses = {}, []
    for shift in (0, 1):
        tokens = (batch.tokens + shift * (jnp.arange(batch.batch_size)[:, None] % 2)) % 3
        now = batch.replace(tokens=tokens)
        targets, state = compiled(method.targets)(state, now, {}, jax.random.key(0))
        rows = [tuple(t[m > 0].tolist()) for t, m in zip(np.asarray(tokens), np.asarray(now.mask), strict=True)]
        valid = np.asarray(now.valid).reshape(-1)
        for row in (row for row, good in zip(rows, valid, strict=True) if good):
            seen[row] = seen.get(row, 0) + 1
        overall = np.array([seen.get(row, 1) ** -0.5 for row in rows])
        phi = rewards.token_embedding(tokens, now.valid_mask).reshape(3, 4, -1)
        episodic = np.asarray(rewards.elliptical_bonus_of_group(phi, now.valid)).reshape(-1)
        bonuses += (overall * episodic)[valid].tolist()
        extra = 0.5 * (overall * episodic * valid).reshape(3, 4) / np.std(bonuses)
        expected = grpo_tokens(now.replace(reward=now.reward + extra))
        np.testing.assert_allclose(targets.advantages, expected, rtol=1e-3, atol=1e-3)
    assert int(state["advantage"].counts.sum()) == sum(seen.values())


def test_the_novelty_bonus_takes_an_embedding_that_the_rollouts_bring(batch):
    ours = methods.novelty_bonus(bonus="episodic", coef=1.0)
    brought = batch.replace(extras={**batch.extras, "embedding": jax.random.normal(jax.random.key(0), (12, 5))})
    one, _ = compiled(ours.targets)(ours.init(None, 3), batch, {}, jax.random.key(0))
    other, _ = compiled(ours.targets)(ours.init(None, 3), brought, {}, jax.random.key(0))
    assert not np.allclose(one.advantages, other.advantages, atol=1e-2)


def test_completions_that_are_all_alike_get_no_bonus(batch):
    alike = batch.replace(tokens=jnp.ones_like(batch.tokens), mask=batch.mask.at[:, 1:].set(1.0))
    method = methods.novelty_bonus()
    alike = alike.replace(valid=jnp.ones_like(alike.valid))
    targets, _ = compiled(method.targets)(method.init(None, 3), alike, {}, jax.random.key(0))
    np.testing.assert_allclose(targets.advantages, grpo_tokens(alike), atol=1e-5)


def test_completions_whose_tokens_agree_in_their_low_bits_are_counted_apart(batch):
    method = methods.novelty_bonus(bonus="global")
    tokens = jnp.full(batch.tokens.shape, 5).at[:, -2].add(65_536 * jnp.arange(batch.batch_size))
    whole = batch.replace(tokens=tokens, mask=batch.mask.at[:, 1:].set(1.0), valid=jnp.ones_like(batch.valid))
    _, state = compiled(method.targets)(method.init(None, 3), whole, {}, jax.random.key(0))
    assert int((state["advantage"].counts == 1).sum()) == batch.batch_size


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("clip_cov", {"fraction": 0.0}, "fraction must be"),
        ("clip_cov", {"low": 5.0, "high": 1.0}, "low must be below high"),
        ("clip_cov", {"clip_low": 2.0}, "clip_low must be"),
        ("clip_cov", {"dual_clip": 3.0}, "dual_clip does not apply"),
        ("kl_cov", {"kl_coef": -1.0}, "kl_coef must be"),
        ("kl_cov", {"clip_high": 0.3}, "clip_high does not apply"),
        ("high_entropy_tokens", {"fraction": 1.5}, "fraction must be"),
        ("high_entropy_tokens", {"tokens": "top"}, "tokens must be one of"),
        ("high_entropy_tokens", {"level": "group"}, "level must be one of"),
        ("high_entropy_tokens", {"normalize": "none"}, "normalize must be one of"),
        ("high_entropy_tokens", {"top_entropy": 0.5}, "top_entropy would choose"),
        ("egpo", {"alpha": -1.0}, "alpha must be"),
        ("egpo", {"kappa": 0.5}, "kappa must be"),
        ("egpo", {"level": "batch"}, "level must be one of"),
        ("egpo", {"think_end": []}, "think_end must hold"),
        ("rapo", {"alpha": -1.0}, "alpha must be"),
        ("rapo", {"phi": 2.0}, "phi must be"),
        ("rapo", {"phi": "rank"}, "phi must be one of"),
        ("rapo", {"vocab_size": -5}, "vocab_size must be"),
        ("novelty_bonus", {"bonus": "both"}, "bonus must be one of"),
        ("novelty_bonus", {"ridge": 0.0}, "ridge must be"),
        ("novelty_bonus", {"coef": -1.0}, "coef must be"),
        ("novelty_bonus", {"capacity": 0}, "capacity must be"),
    ],
)
def test_keywords_without_meaning_are_refused_where_the_method_is_made(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        getattr(methods, name)(**keywords)
