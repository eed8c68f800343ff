"""Right and wrong answers treated unlike: how firmly the KL holds the right ones, and how hard long wrong ones are hit.

Both are factors: of a sequence's KL term, and of its advantage.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array

_GROUP = 1  # the axis of G

DadsForm = Literal["saturating", "exponential"]


def dads_kl_weight(
    correct: Array,
    advantages: Array,
    valid: Array | None = None,
    *,
    rate: float = math.e,
    form: DadsForm = "saturating",
) -> Array:
    r"""Weight of a sequence's KL to the reference by how hard its prompt is (DADS): loose on hard ones.

    $$w_i = 1 - e^{-k (1 - d)} \text{ where } A_i > 0 \text{ and } 0 < d < 1, \qquad w_i = 1 \text{ elsewhere}, \qquad
    d = 1 - \mathrm{mean}_g c$$

    A rare right answer is thus held back little from what the reference would not have said.

    Args:
        correct: `[P, G]`, nonzero where the answer is right.
        advantages: `[P, G]` float; only their sign is read.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        rate: $k$; the paper's is e.
        form: `"saturating"`, as above, or `"exponential"`, $e^{-k d}$, an alternative in the released code.

    Returns:
        `[P, G]`, float32 or wider, in (0, 1]; a constant.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, `rate` is not above 0 or `form` is unknown.

    Example:
        >>> correct = jnp.array([[1, 0, 0, 0], [1, 1, 1, 0]])
        >>> weights = dads_kl_weight(correct, correct - 0.5)
        >>> [[round(w, 4) for w in row] for row in weights.tolist()]
        [[0.4932, 1.0, 1.0, 1.0], [0.8698, 0.8698, 0.8698, 1.0]]

    Reference: APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization (arXiv 2506.21655).
    """
    if form not in get_args(DadsForm):
        raise ValueError(f"form must be one of {', '.join(get_args(DadsForm))}, got {form!r}")
    if not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate}")
    advantages, valid = check_rewards(advantages, valid)
    right = _right(correct, advantages, "advantages")
    easy = masked.mean(right.astype(advantages.dtype), valid, _GROUP, keepdims=True)
    weight = 1 - jnp.exp(-rate * easy) if form == "saturating" else jnp.exp(-rate * (1 - easy))
    return jnp.where((easy > 0) & (easy < 1) & valid & (advantages > 0), weight, 1.0)


def stcr_factor(correct: Array, lengths: Array, valid: Array | None = None, *, base: float = 1.00001) -> Array:
    r"""Factor of the advantage of wrong answers that are longer than the group's right ones (STCR).

    $$1 + u_i, \qquad u_i = 1 - b^{-x_i} \text{ for wrong answers with } x_i = L_i - \bar L_+ > 0, \text{ else } 0$$

    $\bar L_+$ is the mean length of the right answers; without any, no answer is hit. At the paper's base a thousand
    tokens too many make 1% of a difference.

    Args:
        correct: `[P, G]`, nonzero where the answer is right.
        lengths: `[P, G]` int or float, tokens of each answer.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        base: $b$, per token, at least 1; 1 for no effect.

    Returns:
        `[P, G]`, float32 or wider, in [1, 2]; a constant.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `base` is below 1.

    Example:
        >>> factor = stcr_factor(jnp.array([[1, 1, 0, 0]]), jnp.array([[400, 600, 1500, 100]]))
        >>> [round(x, 5) for x in factor[0].tolist()]
        [1.0, 1.0, 1.00995, 1.0]

    Reference: APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization (arXiv 2506.21655).
    """
    if base < 1:
        raise ValueError(f"base must be at least 1, got {base}; below it long wrong answers would be spared")
    lengths = masked.as_float(lengths)
    masked.check_axes("lengths", lengths, "[P, G]", "reshape with as_groups(lengths, group_size=8)")
    right = _right(correct, lengths, "lengths")
    lengths, valid = check_rewards(lengths, valid)
    reached = valid & right
    excess = jnp.where(valid, lengths, 0.0) - masked.mean(lengths, reached, _GROUP, keepdims=True)
    hit = valid & ~right & jnp.any(reached, axis=_GROUP, keepdims=True) & (excess > 0)
    # b^-x through the logarithm of the base, as 1.00001 itself loses a tenth of a per cent of its excess in float32.
    return 1.0 - jnp.expm1(-math.log(base) * jnp.where(hit, excess, 0.0))


def _right(correct: Array, like: Array, name: str) -> Array:
    correct = jnp.asarray(correct)
    masked.check_like("correct", correct, name, like)
    return correct != 0
