"""The graph that a group's trajectories make together: steps that are the same step are one edge of it.

A step is known by keys: where it was taken and what was done, over the last few steps. Everything is a sum over equal
keys (`keyed`), so that no graph is ever built and shapes do not depend on what was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.keyed import mean_by_key
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.advantages.step_groups import prompt_of
from jaxrl_post.types import Array


def history_keys(what: Sequence[Array], exists: Array, *, history: int = 1) -> tuple[Array, ...]:
    r"""Keys that agree where the last `history` steps do, $\kappa_k = (x_{k-h+1}, \dots, x_k)$.

    The keys are the numbers themselves, moved along the steps, not a hash of them: two steps agree in all keys exactly
    if their histories are the same, and equally short where they are shorter than $h$.

    Args:
        what: arrays `[..., S]` of integers that tell steps apart, e.g. `(state, action)`.
        exists: `[..., S]`, nonzero where the step exists.
        history: $h$, steps that must agree; 1 for the step itself.

    Returns:
        `h * (len(what) + 1)` arrays `[..., S]` of integers, for `grpo_by_key` and `mean_by_key`.

    Raises:
        ValueError: if `history` is below 1, nothing is given, or the shapes differ.

    Example:
        >>> state = jnp.array([[4, 5, 6], [3, 5, 6]])
        >>> same = lambda h: all((key[0] == key[1])[1] for key in history_keys([state], state > 0, history=h))
        >>> same(1), same(2)
        (True, False)
    """
    if history < 1:
        raise ValueError(f"history must be at least 1 (the step itself), got {history}")
    if not what:
        raise ValueError("what must hold at least one array of integers, e.g. (state, action)")
    exists = jnp.asarray(exists) != 0
    keys = []
    for number, x in enumerate(what):
        x = jnp.asarray(x)
        masked.check_like(f"array {number} of what", x, "exists", exists, "give every step its number")
        keys.append(jnp.where(exists, x, jnp.zeros((), x.dtype)))
    keys.append(exists.astype(jnp.int32))
    length = exists.shape[-1]
    before = [(*[(0, 0)] * (exists.ndim - 1), (back, 0)) for back in range(history)]
    return tuple(jnp.pad(key, pad)[..., :length] for pad in before for key in keys)


def salt(
    advantages: Array,
    state: Array,
    action: Array,
    exists: Array,
    valid: Array | None = None,
    *,
    history: int = 1,
) -> Array:
    r"""Each step gets the mean advantage of the trajectories of its group that took the same step.

    $$A_{g,k} = \frac{1}{|E|} \sum_{g' \in E} A_{g'}, \qquad
    E = \{g' : \kappa_{g',k'} = \kappa_{g,k}\ \text{for some}\ k'\}$$

    with the `history_keys` $\kappa$ of (state, action). Steps that good and bad trajectories share become neutral,
    steps that only some took keep their credit. Without shared steps this is the advantage of the trajectory; a step
    that all trajectories took has the mean, which is 0 for a centred advantage.

    The merge key is not given in closed form where the paper is described; it is derived from "the same step in the
    same context" with the history length as its hyper-parameter. A trajectory that takes a step repeatedly counts once.

    Args:
        advantages: `[P, G]` float, of whole trajectories: `grpo`, `rloo`, ...
        state: `[P, G, S]` int, a number (or hash) of what the step answers to.
        action: `[P, G, S]` int, a number (or hash) of what was done.
        exists: `[P, G, S]`, nonzero where the step exists.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        history: steps that must agree, the step itself among them.

    Returns:
        `[P, G, S]`, float32 or wider; 0 where there is no step or the rollout is not valid.

    Raises:
        ValueError: if the shapes do not fit or `history` is below 1.

    Example:
        >>> action = jnp.array([[[7, 1], [7, 1], [7, 2], [7, 3]]])  # the first step is shared by all
        >>> found = salt(jnp.array([[1.0, -1.0, -1.0, 1.0]]), 0 * action, action, action > 0)
        >>> found[0].tolist()
        [[0.0, 0.0], [0.0, 0.0], [0.0, -1.0], [0.0, 1.0]]

    Reference: SALT: Step-level Advantage Assignment for Long-horizon Agents via Trajectory Graph (arXiv 2510.20022).
    """
    advantages, known = check_rewards(advantages, valid)
    exists = jnp.asarray(exists) != 0
    masked.check_axes("exists", exists, "[P, G, S]")
    if exists.shape[:2] != advantages.shape:
        raise ValueError(f"exists must be [P, G, S] with [P, G] = {advantages.shape}, got shape {exists.shape}")
    counts = exists & known[:, :, None]
    keys = (prompt_of(counts), *history_keys((state, action), counts, history=history))
    rows = jnp.arange(advantages.size, dtype=jnp.int32).reshape(*advantages.shape, 1)
    trajectory = jnp.broadcast_to(rows, counts.shape)
    return mean_by_key(jnp.broadcast_to(advantages[:, :, None], counts.shape), keys, counts, once_per=trajectory)


def step_fingerprints(tokens: Array, step: Array, mask: Array, *, num_steps: int) -> tuple[Array, Array]:
    r"""Numbers for what each step did and for what came before it: equal where the tokens are.

    Polynomial hashes modulo $2^{32}$, $\sum_i (y_i + 1)\, c^i$: of the step's trained tokens, and of all tokens of the
    row before the step's first trained one (the prompt, earlier steps, and what tools wrote).

    Args:
        tokens: `[B, T]` int.
        step: `[B, T]` int, the step of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.
        num_steps: `S`; tokens of later steps are ignored.

    Returns:
        actions: `[B, S]` uint32, of the tokens of the step; 0 where there is no such step.
        prefixes: `[B, S]` uint32, of the tokens before it; 0 where there is no such step. Rows compare only where their
            padding on the left is equal, as that of one prompt is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape, or `tokens` are not integers.

    Example:
        >>> tokens, step = jnp.array([[5, 1, 2, 3], [5, 1, 2, 4]]), jnp.array([[-1, 0, 0, 1]] * 2)
        >>> actions, prefixes = step_fingerprints(tokens, step, step >= 0, num_steps=2)
        >>> (actions[0] == actions[1]).tolist(), (prefixes[0] == prefixes[1]).tolist()
        ([True, False], [True, True])
    """
    tokens, step, acts = jnp.asarray(tokens), jnp.asarray(step), jnp.asarray(mask) != 0
    masked.check_axes("tokens", tokens, "[B, T]")
    masked.check_like("step", step, "tokens", tokens)
    masked.check_like("mask", acts, "tokens", tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers to be compared, got {tokens.dtype}; number the actions yourself")
    batch, length = tokens.shape
    rows = jnp.arange(batch)[:, None]
    slot = jnp.where(acts & (step >= 0), step, num_steps)
    place = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    first = jnp.full((batch, num_steps), length).at[rows, slot].min(place, mode="drop")
    there = first < length
    powers = jnp.cumprod(jnp.full(length + 1, 0x9E3779B1, jnp.uint32))  # modulo 2^32, as are the sums below
    values = tokens.astype(jnp.uint32) + 1
    # Trained tokens are counted from the first of their step, so that the same step has the same hash wherever it is.
    taken = jnp.cumsum(acts, axis=1)
    start = jnp.take_along_axis(taken, jnp.minimum(first, length - 1), axis=1)
    inside = taken - jnp.take_along_axis(start, jnp.clip(slot, 0, num_steps - 1), axis=1)
    terms = values * powers[jnp.clip(inside, 0, length)]
    actions = jnp.zeros((batch, num_steps), jnp.uint32).at[rows, slot].add(terms, mode="drop")
    earlier = jnp.cumsum(values * powers[1:], axis=1, dtype=jnp.uint32) - values * powers[1:]
    prefixes = jnp.take_along_axis(earlier, jnp.minimum(first, length - 1), axis=1)
    return jnp.where(there, actions, 0), jnp.where(there, prefixes, 0)
