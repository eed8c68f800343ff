"""Process scores and outcomes in one reward that never contradicts the outcome."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import advantages, masked
from jaxrl_post.types import Array


def renorm(process: Array, outcome: Array, exists: Array | None = None, *, unscored: float = 0.5) -> Array:
    r"""ReNorm: the process score and the outcome, both centred, $\hat r_k = (p_k - \tfrac12) + (o - \tfrac12)$.

    With scores in [0, 1] it is in [0, 1] where the outcome is 1 and in [-1, 0] where it is 0: no score outweighs the
    outcome's sign, while $p_k + o$ pays for well-judged steps of a failure. Since every step of a failure costs up to 1
    and every step of a success pays up to 1, it also shortens failures and lengthens successes.

    The expression is inferred from two independent descriptions of the paper (one half is taken from both; the sign is
    that of the outcome), not read in it.

    Args:
        process: `[B, S]` float in [0, 1], the judge's score of each step over its highest; NaN where it could not be
            scored.
        outcome: `[B]` float in [0, 1], most often 0 or 1.
        exists: `[B, S]`, nonzero where the step exists; None for all.
        unscored: score of a step that has none; one half leaves the outcome alone.

    Returns:
        `[B, S]`, float32 or wider; 0 where the step does not exist.

    Raises:
        ValueError: if the shapes do not fit, or `unscored` is outside [0, 1].

    Example:
        >>> found = renorm(jnp.array([[0.7, jnp.nan], [0.7, 1.0]]), jnp.array([1.0, 0.0]))
        >>> [[round(r, 4) for r in row] for row in found.tolist()]
        [[0.7, 0.5], [-0.3, 0.0]]

    Reference: Hybrid Reward Normalization for Process-supervised Non-verifiable Agentic Tasks (arXiv 2509.25598).
    """
    if isinstance(unscored, float | int) and not 0 <= unscored <= 1:
        raise ValueError(f"unscored must be in [0, 1], got {unscored}; one half is neutral")
    process, outcome = masked.as_float(process), masked.as_float(outcome)
    masked.check_axes("process", process, "[B, S]")
    if outcome.shape != process.shape[:1]:
        raise ValueError(f"outcome must be [B] = {process.shape[:1]}, as process has rows, got shape {outcome.shape}")
    exists = jnp.ones(process.shape, bool) if exists is None else jnp.asarray(exists) != 0
    masked.check_like("exists", exists, "process", process)
    scored = jnp.where(jnp.isnan(process), unscored, process)
    return jnp.where(exists, scored + outcome[:, None] - 1, 0.0)


def on_step_ends(x: Array, step: Array, mask: Array) -> Array:
    """Put what each step earned on its last trained token, `[B, S] -> [B, T]`; zero elsewhere.

    Args:
        x: `[B, S]` float, one number per step.
        step: `[B, T]` int, the step of the token, from 0; -1 elsewhere.
        mask: `[B, T]`, nonzero where the policy chose the token.

    Returns:
        `[B, T]`, float32 or wider. A step without trained tokens has nowhere to put its reward.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> step = jnp.array([[-1, 0, 0, -1, 1]])
        >>> on_step_ends(jnp.array([[0.5, -1.0]]), step, step >= 0).tolist()
        [[0.0, 0.0, 0.5, 0.0, -1.0]]

    Reference: Hybrid Reward Normalization for Process-supervised Non-verifiable Agentic Tasks (arXiv 2509.25598).
    """
    x, step, mask = masked.as_float(x), jnp.asarray(step), jnp.asarray(mask)
    per_token = advantages.from_turns(x, step, mask)
    ends = advantages.step_end(step, mask, num_steps=x.shape[1])
    place = jnp.where(ends < 0, step.shape[1], ends)
    is_end = jnp.zeros(step.shape, bool).at[jnp.arange(step.shape[0])[:, None], place].set(True, mode="drop")
    return jnp.where(is_end, per_token, 0.0)
