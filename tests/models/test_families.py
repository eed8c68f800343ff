"""Every family against `transformers`: the same weights say the same of the same tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxrl_post import models
from jaxrl_post.models.families import FAMILIES
from jaxrl_post.models.pretrained import flat
from jaxrl_post.models.weight_names import places
from tests.models import hf

LENGTH, PIECE, NEW = 24, 12, 3
LENGTHS = (24, 17, 5)
random = np.random.default_rng(0)
TOKENS = random.integers(0, 37, (3, LENGTH)).astype(np.int32)


@functools.cache
def loaded(name, directory_of, dtype="float32"):
    directory = directory_of / name
    if not directory.exists():
        hf.model(name).save_pretrained(directory)
    return models.from_pretrained(directory, dtype=dtype, param_dtype=dtype)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def rows():
    """Right-padded and left-padded sequences, and one row that holds two: tokens, positions, segments, `[7, T]`."""
    slots = np.arange(LENGTH)
    tokens, positions = [], []
    for padding in ("right", "left"):
        for row, length in zip(TOKENS, LENGTHS, strict=True):
            place = slots if padding == "right" else slots - (LENGTH - length)
            inside = (place >= 0) & (place < length)
            positions.append(np.where(inside, place, -1))
            tokens.append(np.where(inside, row[np.clip(place, 0, length - 1)], 36))
    tokens.append(np.concatenate([TOKENS[0, :PIECE], TOKENS[1, :PIECE]]))
    positions.append(slots % PIECE)
    segments = np.zeros((7, LENGTH), np.int32)
    segments[6] = slots // PIECE
    return tuple(np.stack(x).astype(np.int32) for x in (tokens, positions, segments))


def everything(policy, params, tokens, positions, segments, prompts, prompt_positions, new):
    """Logits and states of whole rows, and states of prompts that are prefilled and then continued by `new` tokens."""
    hidden, _ = policy.hidden(params, tokens, positions, segments)
    unembedding = policy.unembed(params)
    batch, size = prompts.shape
    cache = policy.init_cache(batch, size + new.shape[1], None)
    prefilled, cache = policy.prefill(params, prompts, prompt_positions, cache)

    def step(carry, token):
        cache, position = carry
        out, cache = policy.decode(params, token[:, None], position[:, None], cache)
        return (cache, position + 1), out[:, 0]

    _, decoded = jax.lax.scan(step, (cache, prompt_positions.max(axis=1) + 1), new.T)
    return models.logits(unembedding, hidden), hidden, prefilled, decoded.swapaxes(0, 1)


def close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name", hf.CONFIGS)
def test_logits_and_states_are_those_of_transformers(name, directories):
    found = loaded(name, directories)
    prompt_lengths = (5, 3, 1) if name in hf.BY_LENGTH else (11, 9, 2)
    size = max(prompt_lengths)
    slots = np.arange(size)[None]
    prompt_positions = np.where(slots < np.array(prompt_lengths)[:, None], slots, -1).astype(np.int32)
    new = np.stack([row[n : n + NEW] for row, n in zip(TOKENS, prompt_lengths, strict=True)])
    logits, hidden, prefilled, decoded = jax.jit(functools.partial(everything, found.policy))(
        found.params, *rows(), TOKENS[:, :size], prompt_positions, new
    )

    for i, length in enumerate(LENGTHS):
        expected_logits, expected = hf.run(hf.model(name), TOKENS[i, :length])
        for row, start in ((i, 0), (3 + i, LENGTH - length)):
            close(logits[row, start : start + length], expected_logits)
            close(hidden[row, start : start + length], expected)
    for i in range(2):
        expected_logits, expected = hf.run(hf.model(name), TOKENS[i, :PIECE])
        close(logits[6, i * PIECE : (i + 1) * PIECE], expected_logits)
        close(hidden[6, i * PIECE : (i + 1) * PIECE], expected)
    for i, length in enumerate(prompt_lengths):
        _, expected = hf.run(hf.model(name), TOKENS[i, : length + NEW])
        close(prefilled[i, :length], expected[:length])
        close(decoded[i], expected[length:])


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_gradients_of_a_loss_are_those_of_transformers(name, directories):
    found, theirs = loaded(name, directories), hf.model(name)
    tokens = TOKENS[:2, :17]

    def loss(params):
        positions = jnp.broadcast_to(jnp.arange(17), (2, 17))
        hidden, _ = found.policy.hidden(params, tokens, positions)
        logp = jax.nn.log_softmax(models.logits(found.policy.unembed(params), hidden[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(found.params)
    theirs.zero_grad()
    expected = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)

    gradient = flat(gradient)
    where = places({path: x.shape for path, x in gradient.items()}, joined_experts=True)
    grads = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    seen = set()
    for path, place in where.items():
        for index, key in place.tensors():
            rows = slice(None) if place.rows is None else slice(*place.rows)
            theirs_part = grads[key] if place.rows is None else grads[key][..., rows, :]
            close(place.theirs(np.asarray(gradient[path][index])), theirs_part, 1e-4)
            seen.add(key)
    assert seen == set(grads)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "phi3", "qwen3_moe"])
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(name, directories):
    """Within 1.2 times its error, for the roundings are elsewhere.

    That is the median over 9 sequences of the mean: where two experts are nearly as good, either side may take the
    other one, and the tokens after it differ as well.
    """
    found = loaded(name, directories, "bfloat16")
    theirs = type(hf.model(name))(hf.config(name)).to(torch.bfloat16)
    theirs.config._attn_implementation = theirs.config._experts_implementation = "eager"
    theirs.load_state_dict(hf.model(name).state_dict())
    theirs.eval()
    tokens = random.integers(0, 37, (9, PIECE)).astype(np.int32)
    hidden, _ = jax.jit(found.policy.hidden)(found.params, tokens, np.broadcast_to(np.arange(PIECE), tokens.shape))
    logits = np.asarray(models.logits(found.policy.unembed(found.params), hidden), np.float32)
    exact = np.stack([hf.run(hf.model(name), row)[0] for row in tokens])
    ours = np.abs(logits - exact)
    expected = np.abs(np.stack([hf.run(theirs, row)[0] for row in tokens]) - exact)
    ours, expected = (np.median(x.mean(axis=(1, 2))) for x in (ours, expected))
    print(name, ours, expected)
    assert ours <= 1.2 * expected, (ours, expected)
