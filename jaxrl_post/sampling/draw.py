"""The draw: one token per row, each row with a random stream of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post.sampling.vocabulary import devices_of_vocabulary, where_it_lies
from jaxrl_post.types import Array, typed_key


def row_keys(key: Array, ids: Array, positions: Array) -> Array:
    """A key for each sequence and position, whatever the batch they are in.

    Args:
        key: one key, typed or raw.
        ids: `[B]` uint32, the sequences' ids.
        positions: `[B]` int32, the position of the token to be drawn.

    Returns:
        `[B]` keys.

    Example:
        >>> key = jax.random.key(0)
        >>> both = row_keys(key, jnp.array([7, 8], jnp.uint32), jnp.array([3, 3]))
        >>> alone = row_keys(key, jnp.array([8], jnp.uint32), jnp.array([3]))
        >>> bool(both[1] == alone[0])
        True
    """

    key = typed_key(key)

    def one(sequence: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, sequence), position)

    return jax.vmap(one)(ids, positions)


BLOCK = 256
"""Tokens of a block: a vocabulary that is larger is drawn from in two steps."""


def sample(key: Array, logits: Array) -> Array:
    r"""One token per row by the Gumbel-max trick: $\arg\max_v z_v + g_v$.

    Of a large vocabulary first a block of tokens is drawn, by the block's $\log \sum \exp z$, then a token in it: the
    same distribution from some hundred random numbers a row instead of one for each token, which would cost more than
    the logits do.

    Args:
        key: one key for all rows, or `[B]` keys, one for each (see `row_keys`).
        logits: `[B, V]`, any real dtype, -inf for a forbidden token.

    Returns:
        `[B]` int32.

    Example:
        >>> sample(jax.random.key(0), jnp.array([[0.0, -jnp.inf]])).tolist()
        [0]

    Reference: Gumbel-max: A* Sampling, arXiv 1411.0030.
    """
    key = typed_key(key)
    # Noise of 16 bits would tie, and ties always fall to the smaller id.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    size = logits.shape[-1]
    if size <= 2 * BLOCK:
        return jnp.argmax(logits + _noise(key, logits.shape, logits.dtype), axis=-1).astype(jnp.int32)
    # All of a row's noise at once: every call of the generator costs a program of its own.
    count = -(-size // BLOCK)
    noise = _noise(key, (len(logits), count + BLOCK), logits.dtype)
    # The weights are those of `token_statistics`, and in one program with it are made once.
    weight = jnp.exp(logits - jnp.max(logits, axis=-1)[:, None])
    block = jnp.argmax(jnp.log(_block_sums(weight)) + noise[:, :count], axis=-1)
    return (block * BLOCK + jnp.argmax(_of_block(logits, block) + noise[:, count:], axis=-1)).astype(jnp.int32)


def _block_sums(weight: Array) -> Array:
    """`[B, V / BLOCK]`, from `[B, V]`."""
    if not _is_cut(weight):
        return jnp.sum(_in_blocks(weight, 0.0), axis=-1)
    count = -(-weight.shape[1] // BLOCK)

    def of_part(weight: Array, first: Array, vocab: tuple[str, ...]) -> Array:
        # As a product of matrices, since a sum of what does not begin where a register does is slow on a TPU.
        block = (first + jnp.arange(weight.shape[1])) // BLOCK
        inside = (block[:, None] == jnp.arange(count)).astype(weight.dtype)
        return jax.lax.psum(jnp.matmul(weight, inside, precision=jax.lax.Precision.HIGHEST), vocab)

    return where_it_lies(of_part, weight)


def _of_block(logits: Array, block: Array) -> Array:
    """`[B, BLOCK]`, from `[B, V]`: of each row one block, by its number `[B]`."""
    if not _is_cut(logits):
        return jnp.take_along_axis(_in_blocks(logits, -jnp.inf), block[:, None, None], axis=1)[:, 0]

    def of_part(logits: Array, first: Array, vocab: tuple[str, ...], block: Array) -> Array:
        # In the part's own blocks it is the end of one and the beginning of the next.
        lines, after = _in_blocks(logits, -jnp.inf), block - first // BLOCK

        def line(number: Array) -> Array:
            here = (number >= 0) & (number < lines.shape[1])
            found = jnp.take_along_axis(lines, jnp.where(here, number, 0)[:, None, None], axis=1)[:, 0]
            return jnp.where(here[:, None], found, -jnp.inf)

        both = jnp.concatenate([line(after - 1), line(after)], axis=1)
        return jax.lax.pmax(jax.lax.dynamic_slice_in_dim(both, BLOCK - first % BLOCK, BLOCK, axis=1), vocab)

    return where_it_lies(of_part, logits, block)


def _is_cut(values: Array) -> bool:
    """Whether the vocabulary of `[B, V]` lies on several devices whose parts do not end where blocks do."""
    parts = devices_of_vocabulary(values)
    return parts > 1 and values.shape[1] // parts % BLOCK != 0


def _in_blocks(values: Array, padding: float) -> Array:
    """`[B, V / BLOCK, BLOCK]`, from `[B, V]`."""
    filled = jnp.pad(values, ((0, 0), (0, -values.shape[-1] % BLOCK)), constant_values=padding)
    return filled.reshape(len(values), -1, BLOCK)


def _noise(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Gumbel noise, of one key or of a key for each row."""
    if key.ndim == 0:
        return jax.random.gumbel(key, shape, dtype)
    return jax.vmap(lambda k: jax.random.gumbel(k, shape[1:], dtype))(key)
