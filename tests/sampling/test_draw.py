"""`sampling.sample` draws from the softmax, and `row_keys` gives each row a stream of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_post.sampling import row_keys, sample, transform

draw = jax.jit(lambda key, ids, positions, logits: sample(row_keys(key, ids, positions), logits))

LOGITS = jnp.array([1.0, 0.3, -0.5, -jnp.inf, 2.0, -2.0])
DRAWS = 20_000


def chi_square(tokens, probs):
    """Pearson's statistic over the tokens of nonzero probability; others must not occur."""
    counts = np.bincount(np.asarray(tokens), minlength=len(probs))
    allowed = probs > 0
    assert counts[~allowed].sum() == 0
    expected = counts.sum() * probs[allowed]
    return ((counts[allowed] - expected) ** 2 / expected).sum()


def keys_of_rows(rows):
    return jax.jit(row_keys)(jax.random.key(3), jnp.arange(rows, dtype=jnp.uint32), jnp.full(rows, 5))


@pytest.mark.parametrize("keys", ["one key", "a key for each row"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 1.3, "top_k": 3}])
def test_frequencies_are_those_of_the_softmax(keys, options):
    logits = transform(LOGITS, **options)
    key = jax.random.key(0) if keys == "one key" else keys_of_rows(DRAWS)
    tokens = jax.jit(sample)(key, jnp.broadcast_to(logits, (DRAWS, len(LOGITS))))
    z = np.asarray(logits, np.float64)
    probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    # 23.5 is the 0.9999 quantile of chi-square with 4 degrees of freedom, the most that occur here.
    assert chi_square(tokens, probs) < 23.5
    # A distribution that is off by a fifth in one token is caught.
    wrong = probs.copy()
    wrong[0] *= 0.8
    assert chi_square(tokens, wrong / wrong.sum()) > 23.5


def test_a_large_vocabulary_that_is_drawn_from_in_two_steps_has_the_frequencies_of_the_softmax():
    # Three blocks, the last one not full; a token of each sixth with a third of its mass.
    size = 600
    z = np.zeros(size)
    z[50::100] = np.log(49.5)
    z[100:200] += 1.0
    z[590:] = -np.inf
    probs = np.exp(z) / np.exp(z).sum()
    tokens = jax.jit(sample)(keys_of_rows(DRAWS), jnp.broadcast_to(jnp.asarray(z, jnp.float32), (DRAWS, size)))
    bins = np.repeat(np.arange(6), 100) + 6 * (z > 2)
    by_bin = np.bincount(bins, weights=probs, minlength=12)
    # 37.4 is the 0.9999 quantile of chi-square with 11 degrees of freedom.
    assert np.max(np.asarray(tokens)) < 590
    assert chi_square(bins[np.asarray(tokens)], by_bin) < 37.4
    assert chi_square(bins[np.asarray(tokens)], np.bincount(bins, weights=np.full(size, 1 / size), minlength=12)) > 37.4
    one_key = jax.jit(sample)(jax.random.key(0), jnp.broadcast_to(jnp.asarray(z, jnp.float32), (DRAWS, size)))
    assert chi_square(bins[np.asarray(one_key)], by_bin) < 37.4


def test_consecutive_positions_of_one_sequence_are_independent():
    rows = 10_000
    even = jnp.zeros((rows, 2))
    ids = jnp.arange(rows, dtype=jnp.uint32)
    first, second = (draw(jax.random.key(1), ids, jnp.full(rows, t), even) for t in (8, 9))
    pairs = np.bincount(np.asarray(2 * first + second), minlength=4)
    assert ((pairs - rows / 4) ** 2 / (rows / 4)).sum() < 21.1  # 0.9999 quantile, 3 degrees of freedom


def test_a_row_draws_the_same_token_alone_in_a_batch_and_in_another_order():
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.standard_normal((6, 50)), jnp.float32)
    ids = jnp.array([5, 0, 4_000_000_000, 17, 2, 9], jnp.uint32)
    positions = jnp.array([1, 2, 3, 4, 5, 6])
    key = jax.random.key(2)
    whole = draw(key, ids, positions, logits)
    order = jnp.array([3, 1, 5, 0, 4, 2])
    assert draw(key, ids[order], positions[order], logits[order]).tolist() == whole[order].tolist()
    for row in range(6):
        one = slice(row, row + 1)
        assert draw(key, ids[one], positions[one], logits[one]).tolist() == [int(whole[row])]


def test_keys_differ_between_ids_positions_and_keys():
    ids, positions = jnp.meshgrid(jnp.arange(20, dtype=jnp.uint32), jnp.arange(20), indexing="ij")
    data = [
        jax.random.key_data(row_keys(jax.random.key(seed), ids.reshape(-1), positions.reshape(-1))) for seed in (0, 1)
    ]
    assert len({tuple(row) for row in np.concatenate(data).tolist()}) == 2 * 400


def test_raw_keys_do_what_typed_ones_do():
    raw, typed = jax.random.PRNGKey(4), jax.random.key(4)
    logits = jnp.zeros((5, 30))
    ids, positions = jnp.arange(5, dtype=jnp.uint32), jnp.arange(5)
    assert sample(raw, logits).tolist() == sample(typed, logits).tolist()
    assert jnp.array_equal(
        jax.random.key_data(row_keys(raw, ids, positions)), jax.random.key_data(row_keys(typed, ids, positions))
    )


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_any_kind_give_a_row_the_same_noise_in_every_batch(impl):
    key = jax.random.key(4, impl=impl)
    ids, positions, logits = jnp.arange(5, dtype=jnp.uint32), jnp.arange(5), jnp.zeros((5, 300))
    together = sample(row_keys(key, ids, positions), logits)
    alone = [sample(row_keys(key, ids[i : i + 1], positions[i : i + 1]), logits[:1]) for i in range(5)]
    assert together.tolist() == jnp.concatenate(alone).tolist()
    assert together.tolist() == sample(row_keys(jax.random.key(4), ids, positions), logits).tolist()
    with jax.default_prng_impl(impl):
        raw = jax.random.PRNGKey(4)
        assert together.tolist() == sample(row_keys(raw, ids, positions), logits).tolist()


def test_sixteen_bit_logits_do_not_make_the_noise_coarse():
    # With 16-bit noise nearly every draw over 20000 equal tokens would be a tie, which the smallest id wins.
    tokens = jax.jit(sample)(keys_of_rows(64), jnp.zeros((64, 20_000), jnp.bfloat16))
    assert tokens.dtype == jnp.int32
    assert 6_000 < np.mean(np.asarray(tokens)) < 14_000
