"""A reward from a generative judge that answers Yes or No."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def yes_probability(yes_logp: Array, no_logp: Array) -> Array:
    r"""How sure a judge is of its Yes, $p_{yes} / (p_{yes} + p_{no}) = \sigma(\log p_{yes} - \log p_{no})$.

    Args:
        yes_logp: any shape, nats: log-prob of "Yes" as the first token of the judge's answer; -inf where it is not
            among the tokens that the judge reported.
        no_logp: of the same shape, likewise of "No".

    Returns:
        The shape of `yes_logp`, float32 or wider, in [0, 1]; 0 where neither was reported.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> yes, no = jnp.log(jnp.array([0.6, 0.2, 0.0])), jnp.log(jnp.array([0.2, 0.0, 0.0]))
        >>> [round(p, 4) for p in yes_probability(yes, no).tolist()]
        [0.75, 1.0, 0.0]

    Reference: PaCo-RL: Advancing Reinforcement Learning for Consistent Image Generation with Pairwise Reward Modeling
    (arXiv 2512.04784).
    """
    yes_logp, no_logp = masked.as_float(yes_logp), masked.as_float(no_logp)
    masked.check_like("no_logp", no_logp, "yes_logp", yes_logp)
    reported = jnp.isfinite(yes_logp) | jnp.isfinite(no_logp)
    difference = jnp.where(reported, yes_logp, 0.0) - jnp.where(reported, no_logp, 0.0)
    return jnp.where(reported, jax.nn.sigmoid(difference), 0.0)
