"""The kernels as programs for `schedule.measure`: each name gives a function, its arguments and the work it must do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post.kernels import token_logprob
from tests.kernels.schedule import Work


def forward(*, tokens: int = 16384, width: int, vocabulary: int = 151936, outputs: tuple[str, ...] = ("logp",)):
    """Outputs without a gradient: `2 T D V` operations."""

    def run(hidden, unembedding, targets):
        return token_logprob(hidden, unembedding, targets, outputs=tuple(outputs), implementation="pallas_tpu")

    return run, _arguments(tokens, width, vocabulary), Work(flops=2 * tokens * width * vocabulary)


def gradient(*, tokens: int = 16384, width: int, vocabulary: int = 151936, outputs: tuple[str, ...] = ("logp",)):
    """Gradients of states and unembedding: `4 T D V` operations in each of the two kernels."""

    def loss(hidden, unembedding, targets):
        out = token_logprob(hidden, unembedding, targets, outputs=tuple(outputs), implementation="pallas_tpu")
        return sum(jnp.sum(getattr(out, name)) for name in outputs)

    return jax.grad(loss, argnums=(0, 1)), _arguments(tokens, width, vocabulary), None


def _arguments(tokens: int, width: int, vocabulary: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
