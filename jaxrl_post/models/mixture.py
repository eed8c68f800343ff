"""Two language models as one, whose next-token distribution is the geometric mean of theirs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_post.types import Array, Params, Policy, PyTree, Unembedding


def geometric_mixture(first: Policy, second: Policy, weight: float | Array = 0.5) -> Policy:
    r"""The policy that draws each token from $\pi \propto \pi_1^{1 - w}\, \pi_2^{w}$.

    Its logits are $(1 - w) z_1 + w z_2$, so that nothing but a weighted sum of the two is ever normalised: it is
    sampled from, scored and trained as any other policy.

    Args:
        first: a policy; its log-probs count $1 - w$.
        second: another one of the same vocabulary, which may be of another size or the same one with other parameters.
        weight: $w$, a number or a traced scalar. In [0, 1] it is between the two; above 1 it goes beyond the second,
            away from the first.

    Returns:
        A `Policy` without heads whose parameters are a pair, of the first and of the second. Both keep their caches.

    Raises:
        ValueError: when traced, for models with a cap on their logits, of which one gives states and the other logits,
            or whose vocabularies differ.

    Example:
        >>> from jaxrl_post import models
        >>> one = models.decoder(vocab_size=8, width=16, layers=1, heads=2)
        >>> both = geometric_mixture(one, one, 0.25)
        >>> params = one.init(jax.random.key(0)), one.init(jax.random.key(1))
        >>> tokens, positions = jnp.array([[1, 2]]), jnp.array([[0, 1]])
        >>> hidden, _ = both.hidden(params, tokens, positions)
        >>> hidden.shape, both.unembed(params).weight.shape
        ((1, 2, 32), (8, 32))

    Reference: Nash Learning from Human Feedback (arXiv 2312.00886), whose opponents are drawn from such a mixture of
    the policy and its reference.
    """

    pair, shares = (first, second), (1 - weight, weight)

    def unembed(params: Params) -> Unembedding:
        found = [policy.unembed(own) for policy, own in zip(pair, params, strict=True)]
        if any(one.softcap is not None for one in found):
            raise ValueError("a cap on the logits comes before they could be mixed: take models without softcap")
        bias = [share * one.bias for share, one in zip(shares, found, strict=True) if one.bias is not None]
        weights = [one.weight for one in found if one.weight is not None]
        if len(weights) == 1:
            raise ValueError("one of the models gives states and the other logits: take two of a kind")
        if weights and weights[0].shape[0] != weights[1].shape[0]:
            raise ValueError(f"the vocabularies differ: {weights[0].shape[0]} and {weights[1].shape[0]} tokens")
        return Unembedding(
            jnp.concatenate(weights, axis=1) if weights else None, bias=sum(bias[1:], start=bias[0]) if bias else None
        )

    def joined(params: Params, states: list[Array]) -> Array:
        dtype = jnp.result_type(*states)
        parts = [(share * state).astype(dtype) for share, state in zip(shares, states, strict=True)]
        by_logits = unembed(params).weight is None
        return parts[0] + parts[1] if by_logits else jnp.concatenate(parts, axis=-1)

    def hidden(params: Params, *args: Any, **kwargs: Any) -> tuple[Array, dict[str, Array]]:
        states = [policy.hidden(own, *args, **kwargs)[0] for policy, own in zip(pair, params, strict=True)]
        return joined(params, states), {}

    def cached(name: str) -> Any:
        def run(params: Params, tokens: Array, positions: Array, cache: PyTree) -> tuple[Array, PyTree]:
            found = [
                getattr(policy, name)(own, tokens, positions, part)
                for policy, own, part in zip(pair, params, cache, strict=True)
            ]
            return joined(params, [state for state, _ in found]), tuple(part for _, part in found)

        return run

    def init(key: Array) -> Params:
        return tuple(policy.init(own) for policy, own in zip(pair, jax.random.split(key), strict=True))

    def init_cache(batch: int, capacity: int, dtype: Any = None) -> PyTree:
        return tuple(policy.init_cache(batch, capacity, dtype) for policy in pair)

    def axes() -> PyTree:
        return tuple(None if policy.axes is None else policy.axes() for policy in pair)

    def each(name: str) -> Any:
        """A function of caches, of both; None if one of the policies has none."""
        functions = [getattr(policy, name) for policy in pair]
        if None in functions:
            return None
        return lambda cache, rows, *args: tuple(
            function(*parts, *args) for function, *parts in zip(functions, cache, rows, strict=True)
        )

    return Policy(
        init,
        hidden,
        unembed,
        lambda params, states: {},
        init_cache,
        cached("prefill"),
        cached("decode"),
        axes=axes if first.axes and second.axes else None,
        insert=each("insert"),
        share=each("share"),
    )
