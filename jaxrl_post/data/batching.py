"""From token lists to padded arrays and to `Rollouts`.

Prompts are padded on the right to a fixed length, and given completions (worked examples, preference pairs) become the
same `Rollouts` that sampling makes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxrl_post.types import FINISH_NONE, Rollouts


def pad_prompts(
    token_lists: Sequence[Sequence[int]], length: int, *, pad_id: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pad prompts on the right to one length.

    Args:
        token_lists: `P` prompts of 1 to `length` token ids.
        length: width of the result, tokens.
        pad_id: fills the rest; any id will do, since lengths alone say what is padding.

    Returns:
        `tokens` int32 `[P, length]` and `lengths` int32 `[P]`.

    Raises:
        ValueError: names the first prompt that is empty or too long.

    Example:
        >>> tokens, lengths = pad_prompts([[5, 6], [7]], 3)
        >>> tokens.tolist(), lengths.tolist()
        ([[5, 6, 0], [7, 0, 0]], [2, 1])
    """
    lengths = np.array([len(tokens) for tokens in token_lists], np.int32).reshape(-1)
    _check_prompts(lengths)
    padded = np.full((len(token_lists), length), pad_id, np.int32)
    for row, tokens in enumerate(token_lists):
        if len(tokens) > length:
            raise ValueError(
                f"prompt {row} has {len(tokens)} tokens, more than length={length}; raise the limit or filter such "
                f"prompts before batching"
            )
        padded[row, : len(tokens)] = tokens
    return padded, lengths


def to_rollouts(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    length: int,
    prompt_id: ArrayLike | None = None,
    rewards: ArrayLike | None = None,
    first_id: int = 0,
    rows: ArrayLike | None = None,
    pad_id: int = 0,
) -> Rollouts:
    """`Rollouts` of given completions, for supervised and preference training.

    The mask is 1 on every completion token, so a stop token that the model should learn to write belongs in the
    completion. No policy sampled these tokens: `logp` is 0, `version` -1, `finish` `FINISH_NONE`.

    Args:
        prompts: `P` prompts of at least one token id.
        completions: `P` groups of `G` completions; a preference pair is a group of two, the chosen one first.
        length: `T`, width of the arrays, tokens of prompt and completion.
        prompt_id: int `[P]`, index of each prompt in its data set; `arange(P)` if None.
        rewards: float `[P, G]`; zeros if None.
        first_id: the sequences of prompt `p` have the ids `first_id + rows[p] * G + g`, modulo 2**32.
        rows: int `[P]`, where each prompt stands in a batch of which these are a part; `arange(P)` if None.
        pad_id: fills the rest; any id will do.

    Returns:
        `Rollouts` with `B = P * G` rows.

    Raises:
        ValueError: names the row that is too long or empty, or the group whose size differs from the first one's.

    Example:
        >>> pair = to_rollouts([[5, 6]], [[[7, 1], [8]]], length=4)
        >>> pair.tokens.tolist(), pair.mask.tolist()
        ([[5, 6, 7, 1], [5, 6, 8, 0]], [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
        >>> pair.length.tolist()
        [[4, 3]]
    """
    num_prompts = len(prompts)
    if num_prompts == 0 or len(completions) != num_prompts:
        raise ValueError(
            f"need one group of completions for each prompt and at least one prompt, got {num_prompts} prompts and "
            f"{len(completions)} groups"
        )
    group_size = len(completions[0])
    for group, members in enumerate(completions):
        if len(members) != group_size or group_size == 0:
            raise ValueError(
                f"every group must hold the same number of completions, at least one: group 0 has {group_size}, group "
                f"{group} has {len(members)}"
            )
    _check_prompts(np.array([len(prompt) for prompt in prompts]))
    shape = (num_prompts, group_size)
    batch = num_prompts * group_size
    tokens = np.full((batch, length), pad_id, np.int32)
    mask = np.zeros((batch, length), np.float32)
    total = np.zeros(batch, np.int32)
    for row in range(batch):
        prompt, completion = prompts[row // group_size], completions[row // group_size][row % group_size]
        total[row] = len(prompt) + len(completion)
        if total[row] > length:
            raise ValueError(
                f"row {row} (prompt {row // group_size}, completion {row % group_size}) has {len(prompt)} prompt and "
                f"{len(completion)} completion tokens, more than length={length}; raise length or filter long rows"
            )
        tokens[row, : total[row]] = [*prompt, *completion]
        mask[row, len(prompt) : total[row]] = 1.0
    place = _shaped(rows, shape[:1], "rows", np.arange(num_prompts)).astype(np.uint64)[:, None]
    ids = place * np.uint64(group_size) + np.arange(group_size, dtype=np.uint64) + np.uint64(first_id % 2**32)
    ids %= np.uint64(2**32)
    return Rollouts(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        logp=jnp.zeros((batch, length), jnp.float32),
        step=jnp.asarray(np.where(mask > 0, 0, -1).astype(np.int32)),
        version=jnp.full((batch, length), -1, jnp.int32),
        reward=jnp.asarray(_shaped(rewards, shape, "rewards", np.zeros(shape)), jnp.float32),
        rewards={},
        valid=jnp.ones(shape, bool),
        length=jnp.asarray(total.reshape(shape)),
        finish=jnp.full(shape, FINISH_NONE, jnp.int8),
        id=jnp.asarray(ids.astype(np.uint32)),
        prompt_id=jnp.asarray(_shaped(prompt_id, shape[:1], "prompt_id", np.arange(num_prompts)), jnp.int32),
    )


def _check_prompts(lengths: NDArray[np.integer]) -> None:
    if np.any(lengths == 0):
        # Position 0 is never trained: without a prompt token the first completion token would have no context.
        row = int(np.argmin(lengths))
        raise ValueError(f"prompt {row} is empty; it needs at least one token, e.g. a start token")


def _shaped(values: ArrayLike | None, shape: tuple[int, ...], name: str, default: NDArray) -> NDArray:
    array = default if values is None else np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
    return array
