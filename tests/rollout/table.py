"""A policy that is a table: for what does not depend on the model, whose program would take most of the compilation."""

import jax

from jaxrl_post.types import Policy, Unembedding


def markov(vocab: int) -> Policy:
    """`params[v]` are the logits of what follows token v; the cache holds nothing."""

    def look_up(params, tokens, positions, cache):
        return params[tokens], cache

    return Policy(
        init=lambda key: jax.random.normal(key, (vocab, vocab)),
        hidden=lambda params, tokens, positions, segment_ids=None, *, key=None: (params[tokens], {}),
        unembed=lambda params: Unembedding(None),
        heads=lambda params, hidden: {},
        init_cache=lambda batch, capacity, dtype: (),
        prefill=look_up,
        decode=look_up,
        insert=lambda cache, *rows: cache,
    )
