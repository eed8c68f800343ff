"""Rewards without a verifier: how likely the right answer is after the reasoning."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

LikelihoodForm: TypeAlias = Literal["log_prob", "mean_log_prob", "prob", "mean_prob"]


def answer_likelihood(logp: Array, mask: Array, *, form: LikelihoodForm = "log_prob") -> Array:
    r"""How likely a reference answer is, with $\ell_t = \log\pi(a_t | x, z, a_{<t})$ of its $n$ tokens.

    | form | reward |
    | --- | --- |
    | `log_prob` | $\sum_t \ell_t$ |
    | `mean_log_prob` | $\frac1n \sum_t \ell_t$ |
    | `prob` | $\exp \sum_t \ell_t$; vanishes for long answers, and with it what is learned |
    | `mean_prob` | $\frac1n \sum_t e^{\ell_t}$ |

    Args:
        logp: `[B, N]` float, nats, of the answer's tokens after each sampled reasoning.
        mask: `[B, N]`, nonzero on the answer's tokens.
        form: see the table.

    Returns:
        `[B]`, float32 or wider; 0 without an answer.

    Raises:
        ValueError: if the shapes differ, or for an unknown form.

    Example:
        >>> logp, mask = jnp.log(jnp.array([[0.5, 0.25]])), jnp.ones((1, 2))
        >>> [round(answer_likelihood(logp, mask, form=form).item(), 4) for form in ("log_prob", "prob", "mean_prob")]
        [-2.0794, 0.125, 0.375]

    Reference: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979).
    """
    if form not in get_args(LikelihoodForm):
        raise ValueError(f"form must be one of {', '.join(get_args(LikelihoodForm))}, got {form!r}")
    logp, mask = masked.as_float(logp), jnp.asarray(mask) != 0
    masked.check_axes("logp", logp, "[B, N]")
    masked.check_like("mask", mask, "logp", logp)
    if form == "mean_prob":
        return masked.mean(jnp.exp(jnp.where(mask, logp, 0.0)), mask, 1)
    if form == "mean_log_prob":
        return masked.mean(logp, mask, 1)
    total = masked.sum(logp, mask, 1)
    return total if form == "log_prob" else jnp.where(jnp.any(mask, axis=1), jnp.exp(total), 0.0)
