"""The term of a loss that keeps a router's experts evenly used, whatever method trains the model."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp

from jaxrl_post.models.experts import load_balancing_loss
from jaxrl_post.types import Array, Metric, Rollouts, Term, TokenStats

FIELDS = frozenset({"router_chosen", "router_probability"})
"""What is read of the stats of each role that is trained."""


class RouterLoss(NamedTuple):
    """How much the load-balancing loss of a model with experts counts, and over what the load is balanced.

    Attributes:
        coefficient: factor of the loss, as Hugging Face's `router_aux_loss_coef`.
        over: `"batch"`: the whole batch of a step, whose shares are those at its start, found in a forward pass of its
            own. It lets a sequence keep to few experts. `"sequence"`: each sequence and layer alone, as the
            complementary loss of DeepSeek-V3 (whose factor counts for `k` of ours); it costs no pass.

    Reference: Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert
    Models, arXiv 2501.11873, for the batch; DeepSeek-V3 Technical Report, arXiv 2412.19437, for the sequence.
    """

    coefficient: float
    over: Literal["batch", "sequence"] = "batch"

    def checked(self) -> RouterLoss:
        """Itself, or ValueError if the coefficient is not positive or `over` unknown."""
        if not self.coefficient > 0:
            raise ValueError(
                f"router_losses: the coefficient must be positive, got {self.coefficient}; leave it out for none"
            )
        if self.over not in ("batch", "sequence"):
            raise ValueError(f"router_losses: over must be 'batch' or 'sequence', got {self.over!r}")
        return self


def _valid(rollouts: Rollouts) -> Array:
    return (rollouts.valid & (rollouts.length > 0)).reshape(-1)


def batch_shares(stats: TokenStats, rollouts: Rollouts) -> Array:
    """`[L, E]`: the share of the batch's tokens that go to each expert of each layer, those of valid sequences."""
    valid = _valid(rollouts)
    tokens = jnp.sum(jnp.where(valid, rollouts.length.reshape(-1), 0))
    chosen = jnp.sum(jnp.where(valid[:, None, None], stats.router_chosen, 0), axis=0)
    return chosen / jnp.maximum(tokens, 1)


def router_term(loss: RouterLoss, stats: TokenStats, rollouts: Rollouts, shares: Array) -> tuple[Term, Metric]:
    """The term of some of a batch's sequences, and how far the most used expert is above an even share.

    Args:
        loss: what is wanted.
        stats: of the sequences, with `FIELDS`.
        rollouts: the sequences.
        shares: `[L, E]`, `batch_shares` of the whole batch; of no meaning where `over` is `"sequence"`.
    """
    valid, length = _valid(rollouts), rollouts.length.reshape(-1)
    chosen, probability = stats.router_chosen, stats.router_probability
    if loss.over == "batch":
        value = load_balancing_loss(chosen, probability, length, shares=jnp.mean(shares, axis=0))
        load = jnp.max(_above_even(shares))[None]
        return Term(value, valid * length, "token_mean", loss.coefficient), Metric.max(load, jnp.ones_like(load))
    load = jnp.max(_above_even(chosen), axis=(1, 2))
    term = Term(load_balancing_loss(chosen, probability, length), valid, "token_mean", loss.coefficient)
    return term, Metric.mean(load, valid)


def _above_even(shares: Array) -> Array:
    mean = jnp.mean(shares, axis=-1, keepdims=True)
    return shares / jnp.where(mean > 0, mean, 1)
