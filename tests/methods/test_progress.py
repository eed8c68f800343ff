"""Methods that ask for the known answer after every step: what is asked, of whom, and where the gain goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import advantages, data, methods
from jaxrl_post.methods.progress import bounded_steps, with_observations
from jaxrl_post.types import FINISH_STOP, TokenStats
from tests.advantages.compiled import all_compiled, compiled

advantages = all_compiled(advantages)

GROUP, LENGTH, STEPS = 3, 9, 2
ANSWERS = [[8, 6], [7]]
PREFIX = (4,)


@pytest.fixture(scope="module")
def batch():
    """Two prompts, three rollouts: turns of one or two tokens, tool output between them, one row not valid."""
    texts = [[5, 9, 9, 6, 7, 1], [6, 6, 1], [7, 9, 5, 9, 8, 1]], [[5, 6, 9, 1], [8, 9, 6, 5, 1], [6, 1]]
    made = data.to_rollouts([[2], [2, 3]], texts, length=LENGTH)
    mask = np.array(made.mask) * (np.asarray(made.tokens) != 9)
    step = np.full(mask.shape, -1)
    for row in range(mask.shape[0]):
        turn, before = -1, 0
        for t in range(LENGTH):
            if mask[row, t]:
                turn += not before
                step[row, t] = turn
            before = mask[row, t]
    answer = jnp.array([[8, 6], [7, -1]])
    return made.replace(
        mask=jnp.asarray(mask),
        step=jnp.asarray(step, jnp.int32),
        reward=jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]),
        valid=jnp.ones((2, GROUP), bool).at[1, 2].set(False),
        finish=jnp.full((2, GROUP), FINISH_STOP, jnp.int8),
        extras={"answer_tokens": answer},
    )


def nats(context, token):
    """A model of a kind: what it thinks of a token depends on all tokens before it and on their order."""
    weight = sum((i + 1) * t for i, t in enumerate(context))
    return -0.05 * ((weight + 3 * token) % 11 + 1)


def score(rollouts):
    tokens, length = np.asarray(rollouts.tokens), np.asarray(rollouts.length).reshape(-1)
    logp = np.zeros(tokens.shape)
    for row, n in enumerate(length):
        for t in range(1, n):
            logp[row, t] = nats(tokens[row, :t].tolist(), int(tokens[row, t]))
    return TokenStats(logp=jnp.asarray(logp, jnp.float32) * rollouts.mask)


def texts_of(method):
    return jax.jit(lambda rollouts: {name: texts for name, (texts, _) in method.probes(rollouts).items()})


def targets(method, rollouts, **stats):
    asked = {} if method.probes is None else texts_of(method)(rollouts)
    assert {f"probe/{name}" for name in asked} == {name for name in method.needs if "/" in name}
    found = {f"probe/{name}": score(texts) for name, texts in asked.items()}
    found |= {"policy": score(rollouts), "reference": score(rollouts)} | stats
    state = method.init(jax.eval_shape(lambda: rollouts), 4)
    return compiled(method.targets)(state, rollouts, found, jax.random.key(0))[0]


def beliefs(batch, last_step=STEPS - 1):
    """`[B, 1 + S]`: sum of log-probs of the answer; `[B]` its length; the turns of a row end before the next begins."""
    tokens, step = np.asarray(batch.tokens), np.minimum(np.asarray(batch.step), last_step)
    rows, length = tokens.shape[0], np.asarray(batch.length).reshape(-1)
    result = np.full((rows, STEPS + 1), np.nan)
    for row in range(rows):
        answer = ANSWERS[row // GROUP]
        begins = [np.flatnonzero(step[row] == k) for k in range(STEPS)]
        cuts = [begins[0][0]]
        for k in range(STEPS):
            if len(begins[k]):
                later = np.flatnonzero(step[row] > k)
                cuts.append(later[0] if len(later) else length[row] - 1)  # the stop token is left out
        for k, cut in enumerate(cuts):
            context = [*tokens[row, :cut].tolist(), *PREFIX]
            result[row, k] = sum(nats(context + answer[:j], a) for j, a in enumerate(answer))
    return result, np.repeat([len(a) for a in ANSWERS], GROUP)


def loop_gains(belief):
    gain = np.zeros((belief.shape[0], STEPS))
    for row, b in enumerate(belief):
        for k in range(STEPS):
            gain[row, k] = 0 if np.isnan(b[k + 1]) else b[k + 1] - b[k]
    return gain


def test_vps_adds_what_each_turn_changed_in_the_probability_of_the_answer(batch):
    found = targets(methods.grpo_vps(alpha=2.0, steps="turns", num_steps=STEPS, prefix=PREFIX), batch).advantages
    belief, _ = beliefs(batch)
    gain, step = loop_gains(np.exp(belief)), np.minimum(np.asarray(batch.step), STEPS - 1)
    mask = np.asarray(batch.valid_mask)
    whole = np.asarray(advantages.grpo(batch.reward, batch.valid)).reshape(-1, 1)
    expected = np.where(mask > 0, whole + 2.0 * np.take_along_axis(gain, np.maximum(step, 0), 1), 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(gain).min(where=gain != 0, initial=1) > 1e-3


def test_the_last_segment_can_be_left_out_and_long_answers_normalised(batch):
    options = {"steps": "turns", "num_steps": STEPS, "prefix": PREFIX}
    found = targets(methods.grpo_vps(normalize=True, skip_last=True, **options), batch).advantages
    belief, length = beliefs(batch)
    gain = loop_gains(np.exp(belief / length[:, None]))
    step, mask = np.minimum(np.asarray(batch.step), STEPS - 1), np.asarray(batch.valid_mask)
    ends = np.asarray(batch.step).max(axis=1, keepdims=True)
    whole = np.asarray(advantages.grpo(batch.reward, batch.valid)).reshape(-1, 1)
    own = np.where(step == np.minimum(ends, STEPS - 1), 0, np.take_along_axis(gain, np.maximum(step, 0), 1))
    np.testing.assert_allclose(found, np.where(mask > 0, whole + own, 0), atol=1e-5)


@pytest.mark.parametrize("form", ["log_prob", "probability"])
def test_igpo_takes_gains_of_the_mean_log_prob_or_of_its_exponential(batch, form):
    found = targets(methods.igpo(form=form, num_steps=STEPS, prefix=PREFIX, gamma=0.5), batch).advantages
    belief, length = beliefs(batch)
    mean = belief / length[:, None]
    gain = loop_gains(mean if form == "log_prob" else np.exp(mean))
    step = jnp.minimum(batch.step, STEPS - 1)
    expected = advantages.igpo(gain, batch.reward, step, batch.valid_mask, batch.valid, gamma=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_igpo_moves_where_all_outcomes_are_equal_and_grpo_does_not(batch):
    same = batch.replace(reward=jnp.zeros_like(batch.reward))
    assert not jnp.any(targets(methods.grpo(), same).advantages)
    assert float(jnp.max(jnp.abs(targets(methods.igpo(num_steps=STEPS, prefix=PREFIX), same).advantages))) > 0.5


def test_what_a_tool_answered_belongs_to_the_turn_that_asked(batch):
    seen, step = with_observations(batch, batch.step)
    # Row 0: prompt, 5, two tokens of a tool, 6, 7, stop, padding.
    np.testing.assert_array_equal(step[0], [-1, 0, 0, 0, 1, 1, 1, -1, -1])
    np.testing.assert_array_equal(seen.mask[0], [0, 1, 1, 1, 1, 1, 1, 0, 0])


def test_later_steps_are_part_of_the_last(batch):
    assert int(batch.step.max()) == 2
    found = bounded_steps("turns", 2)(batch)
    np.testing.assert_array_equal(found, np.minimum(batch.step, 1))
    np.testing.assert_array_equal(
        bounded_steps("length", 2)(batch), bounded_steps({"name": "length", "num_steps": 2}, 9)(batch)
    )
    given = bounded_steps(lambda rollouts: rollouts.step + 1, 2)(batch)
    np.testing.assert_array_equal(given, np.minimum(batch.step + 1, 1))


def test_a_row_of_one_step_gains_what_the_whole_of_it_changed(batch):
    found = targets(methods.grpo_vps(steps="length", num_steps=1, prefix=PREFIX), batch).advantages
    belief, _ = beliefs(batch, last_step=0)
    gain = np.exp(belief[:, 1]) - np.exp(belief[:, 0])
    whole = advantages.per_token(advantages.grpo(batch.reward, batch.valid), batch.valid_mask)
    np.testing.assert_allclose(found - whole, gain[:, None] * np.asarray(batch.valid_mask), atol=1e-5)


def test_an_answer_that_nobody_knows_changes_nothing(batch):
    unknown = batch.replace(extras={"answer_tokens": jnp.full((2, 2), -1)})
    found = targets(methods.grpo_vps(steps="turns", num_steps=STEPS, prefix=PREFIX), unknown).advantages
    whole = advantages.per_token(advantages.grpo(batch.reward, batch.valid), batch.valid_mask)
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_pav_pays_each_step_for_the_progress_of_the_best_of_k_provers(batch):
    method = methods.pav(alpha=3.0, k=4, steps="turns", num_steps=STEPS, prefix=PREFIX, normalize=False)
    assert method.probes(batch)["answer"][1] == "prover"
    found = targets(method, batch).advantages
    belief, _ = beliefs(batch)
    gain = loop_gains(1 - (1 - np.exp(belief)) ** 4)
    step, mask = np.minimum(np.asarray(batch.step), STEPS - 1), np.asarray(batch.valid_mask)
    outcome = np.array([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]).reshape(-1, 1)
    expected = np.where(mask > 0, outcome + 3.0 * np.take_along_axis(gain, np.maximum(step, 0), 1), 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pav_by_value_reads_the_prover_before_each_step_and_the_outcome_at_the_end(batch):
    value = np.random.default_rng(0).uniform(0, 1, batch.mask.shape)
    method = methods.pav(alpha=1.0, k=2, prover="value", steps="turns", num_steps=3, baseline="none")
    assert method.probes is None
    assert method.needs["prover"] == {"value"}
    found = targets(method, batch, prover=TokenStats(value=jnp.asarray(value, jnp.float32))).advantages
    expected, reward = np.zeros(value.shape), np.asarray(batch.reward).reshape(-1)
    for row in range(value.shape[0]):
        if not batch.valid.reshape(-1)[row]:
            continue
        turns = np.asarray(batch.step[row])
        q = [value[row, np.flatnonzero(turns == k)[0]] for k in range(turns.max() + 1)] + [reward[row]]
        for k in range(len(q) - 1):
            expected[row, turns == k] = reward[row] + (1 - q[k]) ** 2 - (1 - q[k + 1]) ** 2
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_everything_is_finite_in_an_empty_batch_and_for_impossible_answers(batch):
    empty = batch.replace(valid=jnp.zeros_like(batch.valid))
    options = {"steps": "turns", "num_steps": STEPS, "prefix": PREFIX}
    for method in (methods.igpo(**options), methods.grpo_vps(**options), methods.pav(**options)):
        assert not jnp.any(targets(method, empty).advantages)
        texts = texts_of(method)(batch)["answer"]
        stats = {
            "probe/answer": TokenStats(logp=jnp.where(texts.mask > 0, -jnp.inf, 0.0)),
            "policy": score(batch),
            "reference": score(batch),
        }
        found, _ = compiled(method.targets)(method.init(batch, 4), batch, stats, jax.random.key(0))
        assert bool(jnp.all(jnp.isfinite(found.advantages)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.igpo(form="odds"), "form must be one of log_prob, probability"),
        (lambda: methods.igpo(pooling="both"), "pooling must be one of"),
        (lambda: methods.igpo(gamma=1.5), "gamma must be between 0 and 1"),
        (lambda: methods.igpo(num_steps=0), "num_steps must be at least 1"),
        (lambda: methods.igpo(steps="sentences"), "steps: there is no 'sentences'"),
        (lambda: methods.grpo_vps(alpha=-1.0), "alpha must be at least 0"),
        (lambda: methods.grpo_vps(steps={"name": "delimiter", "delimiter": 3}), "did you mean 'delimiters'"),
        (lambda: methods.pav(k=0), "k must be at least 1"),
        (lambda: methods.pav(prover="teacher"), "prover must be one of answer, value"),
        (lambda: methods.pav(prover="value", prefix=[3]), "prover='value' asks for no answer"),
        (lambda: methods.pav(baseline="mean"), "baseline must be one of"),
    ],
)
def test_keywords_without_meaning_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
