"""The token log-prob core: log-probs of given tokens without an array of tokens by vocabulary."""

from jaxrl_post.kernels.token_logprob.api import TokenLogprob, token_logprob

__all__ = ["TokenLogprob", "token_logprob"]
