"""Decoding in float64 against the forward pass of the whole sequence: nothing on the way is float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models
from jaxrl_post.rollout import Prompts, SamplingParams, generate
from jaxrl_post.rollout.beams import BEAM_SCORE, beam_search

V, NEW = 13, 9
SIZES = {"vocab_size": V, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "init_std": 0.4}
LENGTH = np.array([3, 1, 4])
TOKENS = np.random.default_rng(0).integers(0, V, (3, 4))


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def model():
    return models.decoder(**SIZES, window=3, local_layers=(True, False), dtype=jnp.float64, param_dtype=jnp.float64)


def log_probs(policy, params, rollouts):
    """`[B, T]`, of each token given those before it, by the whole sequences at once."""
    tokens = np.asarray(rollouts.tokens)
    hidden = jax.jit(policy.hidden)(params, tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))[0]
    z = np.asarray(hidden) @ np.asarray(policy.unembed(params).weight).T
    assert z.dtype == np.float64
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return np.pad(np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1)[..., 0], ((0, 0), (1, 0)))


def test_log_probs_of_decoding_and_of_beams_are_those_of_the_forward_pass():
    policy = model()
    stops = SamplingParams(stop_tokens=(3, 5))

    @jax.jit
    def run(key):
        params, prompts = policy.init(key), Prompts(jnp.asarray(TOKENS), jnp.asarray(LENGTH))
        sample = {"max_new_tokens": NEW, "group_size": 2, "sampling": stops}
        return params, [
            generate(policy, params, prompts, key, **sample),
            generate(policy, params, prompts, key, slots=4, refill=2, alternatives=2, **sample),
            beam_search(policy, params, prompts, beams=2, max_new_tokens=NEW, stop_tokens=(3, 5)),
        ]

    params, (at_once, queued, beams) = run(jax.random.key(0))
    assert np.array_equal(at_once.tokens, queued.tokens)
    for rollouts in (at_once, queued, beams):
        mask = np.asarray(rollouts.mask) > 0
        assert rollouts.logp.dtype == np.float64
        assert mask.sum() > 12
        np.testing.assert_allclose(
            np.asarray(rollouts.logp)[mask], log_probs(policy, params, rollouts)[mask], rtol=0, atol=1e-12
        )
    assert queued.extras["alternative_logp"].dtype == np.float64
    total = np.where(beams.mask > 0, beams.logp, 0).sum(-1) / np.asarray(beams.mask).sum(-1)
    np.testing.assert_allclose(beams.extras[BEAM_SCORE].reshape(-1), total, rtol=0, atol=1e-12)
    assert {x.dtype.name for x in (at_once.tokens, at_once.length, at_once.step, beams.tokens)} == {"int32"}
