"""What costs most, done once: what a model says of tokens without an array of tokens by vocabulary, and attention."""

from jaxrl_post.kernels.attention import attention
from jaxrl_post.kernels.token_logprob.api import TokenLogprob, token_logprob
from jaxrl_post.kernels.token_logprob.token_divergence import token_divergence
from jaxrl_post.kernels.token_logprob.token_loss import token_loss

__all__ = ["TokenLogprob", "attention", "token_divergence", "token_logprob", "token_loss"]
