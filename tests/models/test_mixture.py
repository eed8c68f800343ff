"""Two models as one: log-probs, sampling and gradients of their geometric mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post import models, rollout
from tests import tiny

WEIGHT = 0.3


@pytest.fixture(scope="module")
def both():
    """A mixture of the tiny model and a wider one, with parameters of each."""
    wide = models.decoder(vocab_size=tiny.VOCAB, width=48, layers=2, heads=4)
    mixture = models.geometric_mixture(tiny.policy(), wide, WEIGHT)
    return mixture, wide, (tiny.policy().init(jax.random.key(0)), wide.init(jax.random.key(1)))


def test_what_is_sampled_is_drawn_from_the_normalised_product_and_scored_alike(both):
    mixture, wide, params = both
    requests = tiny.prompts(3)
    options = {"max_new_tokens": 6, "group_size": 4}
    made = jax.jit(lambda p: rollout.generate(mixture, p, requests, jax.random.key(3), **options))(params)
    scored = models.score(mixture)(params, made, frozenset({"logp"}), jax.random.key(0))
    np.testing.assert_allclose(made.logp * made.mask, scored.logp * made.mask, atol=1e-5)
    every = jnp.broadcast_to(jnp.arange(made.tokens.shape[1]), made.tokens.shape)
    logits = [
        policy.hidden(own, made.tokens, every)[0] @ policy.unembed(own).weight.T
        for policy, own in zip((tiny.policy(), wide), params, strict=True)
    ]
    mixed = jax.nn.log_softmax((1 - WEIGHT) * jax.nn.log_softmax(logits[0]) + WEIGHT * jax.nn.log_softmax(logits[1]))
    picked = jnp.take_along_axis(mixed[:, :-1], made.tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(made.logp[:, 1:] * made.mask[:, 1:], picked * made.mask[:, 1:], atol=1e-5)
    queue = jax.jit(lambda p: rollout.generate(mixture, p, requests, jax.random.key(3), **options, slots=5))(params)
    np.testing.assert_array_equal(queue.tokens, made.tokens)


def test_the_ends_of_the_scale_are_the_models_themselves(both):
    _, wide, params = both
    made = tiny.batch(2)
    fields, key = frozenset({"logp", "entropy"}), jax.random.key(0)
    for weight, policy, own in ((0.0, tiny.policy(), params[0]), (1.0, wide, params[1])):
        mixture = models.geometric_mixture(tiny.policy(), wide, jnp.float32(weight))
        found = models.score(mixture)(params, made, fields, key)
        alone = models.score(policy)(own, made, fields, key)
        np.testing.assert_allclose(found.logp, alone.logp, atol=1e-5)
        np.testing.assert_allclose(found.entropy, alone.entropy, atol=1e-5)


def test_models_that_do_not_go_together_are_refused(both):
    mixture, _, params = both
    assert [leaf.shape for leaf in jax.tree.leaves(mixture.init(jax.random.key(0)))] == [
        leaf.shape for leaf in jax.tree.leaves(params)
    ]
    other = models.decoder(vocab_size=tiny.VOCAB + 1, width=16, layers=1, heads=2)
    capped = models.decoder(vocab_size=tiny.VOCAB, width=16, layers=1, heads=2, softcap=30.0)
    for policy, message in ((other, "vocabularies differ"), (capped, "softcap")):
        mixed = models.geometric_mixture(tiny.policy(), policy)
        with pytest.raises(ValueError, match=message):
            mixed.unembed((params[0], policy.init(jax.random.key(0))))


@pytest.mark.filterwarnings("ignore:a policy made by from_apply")
def test_models_that_give_logits_alone_are_mixed_too():
    policy = models.from_apply(lambda params, tokens: jnp.cumsum(params["table"][tokens], axis=1))
    params = tuple({"table": jax.random.normal(jax.random.key(i), (tiny.VOCAB, tiny.VOCAB))} for i in range(2))
    mixture = models.geometric_mixture(policy, policy, WEIGHT)
    made = rollout.generate(mixture, params, tiny.prompts(2), jax.random.key(3), max_new_tokens=4, group_size=2)
    summed = {"table": (1 - WEIGHT) * params[0]["table"] + WEIGHT * params[1]["table"]}  # the model is linear
    alone = rollout.generate(policy, summed, tiny.prompts(2), jax.random.key(3), max_new_tokens=4, group_size=2)
    np.testing.assert_array_equal(made.tokens, alone.tokens)
    np.testing.assert_allclose(made.logp, alone.logp, atol=1e-5)
    mixed = models.geometric_mixture(policy, tiny.policy())
    with pytest.raises(ValueError, match="two of a kind"):
        mixed.unembed((params[0], tiny.policy().init(jax.random.key(0))))
