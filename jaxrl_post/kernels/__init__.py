"""What costs most, done once: log-probs of tokens without an array of tokens by vocabulary, and attention."""

from jaxrl_post.kernels.attention import attention
from jaxrl_post.kernels.token_logprob.api import TokenLogprob, token_logprob

__all__ = ["TokenLogprob", "attention", "token_logprob"]
