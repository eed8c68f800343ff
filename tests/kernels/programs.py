"""The kernels as programs for `schedule.measure`: each name gives a function, its arguments and the work it must do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post.kernels import token_logprob
from tests.kernels.schedule import Work

TOKENS, VOCABULARY = 16384, 151936


def forward(*, width: int, outputs: tuple[str, ...] = ("logp",)):
    """Outputs without a gradient: `2 T D V` operations."""

    def run(hidden, unembedding, targets):
        return token_logprob(hidden, unembedding, targets, outputs=tuple(outputs), implementation="pallas_tpu")

    return run, _arguments(width), Work(flops=2 * TOKENS * width * VOCABULARY)


def gradient(*, width: int, outputs: tuple[str, ...] = ("logp",)):
    """Gradients of states and unembedding: two kernels, with `outputs` of logp alone, of `4 T D V` operations each."""

    def loss(hidden, unembedding, targets):
        out = token_logprob(hidden, unembedding, targets, outputs=tuple(outputs), implementation="pallas_tpu")
        return sum(jnp.sum(getattr(out, name)) for name in outputs)

    return jax.grad(loss, argnums=(0, 1)), _arguments(width), None


def _arguments(width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((VOCABULARY, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
    )
