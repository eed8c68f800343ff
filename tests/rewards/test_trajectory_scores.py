"""Targets and uses of scores of traces of thought."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import rewards
from tests.advantages.compiled import all_compiled

rewards = all_compiled(rewards)


def test_the_tables_numbers():
    np.testing.assert_allclose(rewards.mixed_step_score(*jnp.array([0.2, 0.8, 0.5])), 0.559117, rtol=1e-5)
    np.testing.assert_allclose(rewards.blended(jnp.array([0.0]), jnp.array([0.8]), share=0.75), [0.6], rtol=1e-6)


def test_alignment_and_coherence_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    steps, responses, negatives = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4, 5)), rng.normal(size=(6, 5))

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    alignment = [[cosine(s, r) for s, r in zip(*pair, strict=True)] for pair in zip(steps, responses, strict=True)]
    np.testing.assert_allclose(rewards.step_alignment(steps, responses), alignment, rtol=1e-5, atol=1e-7)
    coherence = np.zeros((3, 4))
    for b in range(3):
        for t in range(1, 4):
            own, others = (
                np.exp([cosine(steps[b, t - 1], x) / 0.5 for x in xs]) for xs in (steps[b, t : t + 1], negatives)
            )
            coherence[b, t] = np.log(own[0] / (own[0] + others.sum()))
    np.testing.assert_allclose(rewards.step_coherence(steps, negatives, tau=0.5), coherence, rtol=1e-4, atol=1e-6)


def test_embeddings_of_zero_align_with_nothing_and_have_finite_gradients():
    steps, responses = jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))
    value, slope = jax.jit(jax.value_and_grad(lambda x: rewards.step_alignment(x, responses).sum()))(steps)
    assert float(value) == 0
    assert np.isfinite(slope).all()
    assert not rewards.step_coherence(steps, jnp.zeros((0, 3))).any()


def test_the_mixture_is_between_the_mean_and_the_largest():
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.normal(size=(3, 50)))
    mixed = rewards.mixed_step_score(*scores)
    assert np.all(mixed >= scores.mean(0) - 1e-6)
    assert np.all(mixed <= scores.max(0) + 1e-6)
    np.testing.assert_allclose(rewards.mixed_step_score(scores[0]), scores[0], rtol=1e-6)


def test_a_traces_score_is_the_mean_of_its_steps_and_its_own():
    steps, mask = jnp.array([[0.2, 0.6, 9.0], [9.0] * 3]), jnp.array([[1, 1, 0], [0] * 3])
    found = rewards.trace_score(steps, mask, jnp.ones(2), alpha=0.5)
    np.testing.assert_allclose(found, [0.9, 0.5], rtol=1e-6)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no scores to mix"):
        rewards.mixed_step_score()
    with pytest.raises(ValueError, match="responses must have the shape of steps"):
        rewards.step_alignment(jnp.ones((1, 2, 3)), jnp.ones((1, 3, 3)))
    with pytest.raises(ValueError, match=r"negatives must be \[N, D\]"):
        rewards.step_coherence(jnp.ones((1, 2, 3)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="share must be in"):
        rewards.blended(jnp.ones(1), jnp.ones(1), share=1.5)
