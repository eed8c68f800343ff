"""Losses of reward models that give an answer one score, and which pairs of answers they compare.

Scores are what the model gives, not log-probs. Losses of policies that are reward models by themselves are in
`preference` and `trajectory_dpo`; those of models that judge steps in `process`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.types import Array


def bradley_terry(first: Array, second: Array, label: Array | None = None, *, margin: float = 0.0) -> Array:
    r"""Cross-entropy of Bradley and Terry's model of a comparison, which may be a tie.

    $$\ell = -\mu \log\sigma(d - m) - (1 - \mu) \log\sigma(-d - m), \qquad d = r_1 - r_2$$

    $\mu$ is 1 where the first answer won, 1/2 where the two are equally good, and in between the share of judges who
    prefer the first. A tie has its minimum at $d = 0$: it pulls scores of equally good answers together, so that no
    peak is left among them for a policy to climb.

    Args:
        first: any shape, float: $r_1$, scores of the first answers.
        second: of the same shape: $r_2$, of the second ones.
        label: of the same shape, $\mu$ in [0, 1]. A constant. None for 1 everywhere.
        margin: $m$, at least 0, in units of the score: what a winner must lead by. With 0 the paper's loss; the code
            released with it has 3, and counts ties twice.

    Returns:
        The shape of `first`, float32 or wider, nats: the loss of each pair. Mean over the pairs that count with
        `masked.mean`, which is 0 if there are none.

    Raises:
        ValueError: if the shapes differ or `margin` is negative.

    Example:
        >>> first, second, label = jnp.array([1.0, 1.0, 0.0]), jnp.zeros(3), jnp.array([1.0, 0.5, 0.5])
        >>> [round(loss, 4) for loss in bradley_terry(first, second, label).tolist()]
        [0.3133, 0.8133, 0.6931]

    Reference: SoliReward: Mitigating Susceptibility to Reward Hacking and Annotation Noise in Video Generation Reward
    Models (arXiv 2512.22170).
    """
    check_at_least("margin", margin, 0, "a lead that winners must have")
    first, second = masked.as_float(first), masked.as_float(second)
    masked.check_like("second", second, "first", first)
    lead = first - second
    won = jax.nn.softplus(margin - lead)
    if label is None:
        return won
    label = masked.as_float(label)
    masked.check_like("label", label, "first", first)
    label = jax.lax.stop_gradient(label)
    return label * won + (1 - label) * jax.nn.softplus(margin + lead)


def pass_pairs(passed: Array, valid: Array | None = None) -> tuple[Array, Array]:
    r"""Comparisons that pass or fail labels imply, across prompts: passed with failed ones, and ties among the passed.

    Failed answers are not tied: they fail in ways that differ.

    Args:
        passed: `[N]`, nonzero where the answer passed.
        valid: `[N]` bool, False where the answer does not count; None for all.

    Returns:
        label: `[N, N]` float32, 1 where answer $i$ passed and $j$ failed, 1/2 elsewhere; see `bradley_terry`.
        pairs: `[N, N]` bool, which of them are compared. Each tie is there once.

    Raises:
        ValueError: if `passed` is not `[N]` or `valid` has another shape.

    Example:
        >>> label, pairs = pass_pairs(jnp.array([1, 0, 1]))
        >>> label.tolist()[0], pairs.astype(int).tolist()
        ([0.5, 1.0, 0.5], [[0, 1, 1], [0, 0, 0], [0, 1, 0]])

    Reference: SoliReward: Mitigating Susceptibility to Reward Hacking and Annotation Noise in Video Generation Reward
    Models (arXiv 2512.22170).
    """
    good = jnp.asarray(passed) != 0
    masked.check_axes("passed", good, "[N]")
    known = jnp.ones(good.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", known, "passed", good)
    wins = good[:, None] & ~good[None, :]
    ties = jnp.triu(good[:, None] & good[None, :], k=1)
    return jnp.where(wins, 1.0, 0.5), (wins | ties) & known[:, None] & known[None, :]
