"""Attention in one layout on every backend: the public function (`api`), plain XLA (`xla`), JAX's splash (`splash`)."""

from jaxrl_post.kernels.attention.api import attention

__all__ = ["attention"]
