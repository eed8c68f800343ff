"""Bonuses for what is new: within an episode (or a prompt's group), over all of training, and both together.

Counts, ellipsoids and prediction errors are measures of how often the like has been seen; `combine` joins two of them
and `RunningMoments` brings the result to a scale. Embeddings and networks are the caller's; nothing is trained here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

_MULTIPLIER = 0x9E3779B1  # odd, near 2^32 over the golden ratio: it spreads small numbers over all bits


def count_bonus(counts: Array, *, first_only: bool = False) -> Array:
    r"""Bonus from counts, $1 / \sqrt N$, or $1[N = 1]$.

    Args:
        counts: any shape, int or float; how often the like has been seen, this time included.
        first_only: the second form, which pays for first visits alone.

    Returns:
        The shape of `counts`, float32 or wider; 0 where nothing has been seen.

    Example:
        >>> count_bonus(jnp.array([0, 1, 4])).tolist(), count_bonus(jnp.array([0, 1, 4]), first_only=True).tolist()
        ([0.0, 1.0, 0.5], [0.0, 1.0, 0.0])

    Reference: A Study of Global and Episodic Bonuses for Exploration in Contextual MDPs (arXiv 2306.03236).
    """
    counts = masked.as_float(counts)
    if first_only:
        return (counts == 1).astype(counts.dtype)
    seen = counts > 0
    return jnp.where(seen, jax.lax.rsqrt(jnp.where(seen, counts, 1.0)), 0.0)


def elliptical_bonus(phi: Array, done: Array | None = None, *, ridge: float = 0.1) -> Array:
    r"""E3B's bonus, $b_t = \phi_t^\top C_{t-1}^{-1} \phi_t$ with $C_t = \lambda I + \sum_{s \le t} \phi_s \phi_s^\top$.

    It is large in directions in which the episode has not been yet. The inverse is updated by Sherman and Morrison's
    formula, so that a step costs $D^2$.

    Args:
        phi: `[T, D]` float; embeddings of the states of one or several episodes, in order. A constant.
        done: `[T]`, nonzero at the last step of an episode, after which the ellipsoid is that of the beginning; None
            for one episode.
        ridge: $\lambda$, above 0.

    Returns:
        `[T]`, float32 or wider, without gradient.

    Raises:
        ValueError: for wrong shapes, or a ridge that is not above 0.

    Example:
        >>> [round(x, 5) for x in elliptical_bonus(jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).tolist()]
        [10.0, 0.90909, 10.0]

    References: Exploration via Elliptical Episodic Bonuses (arXiv 2210.05805); A Study of Global and Episodic Bonuses
    for Exploration in Contextual MDPs (arXiv 2306.03236).
    """
    phi = _embeddings(phi, "[T, D]", ridge)
    done = jnp.zeros(phi.shape[0], bool) if done is None else jnp.asarray(done) != 0
    masked.check_like("done", done, "a column of phi", phi[:, 0])
    start = jnp.eye(phi.shape[1], dtype=phi.dtype) / ridge

    def step(inverse: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        x, last = given
        u = jnp.matmul(inverse, x, precision=jax.lax.Precision.HIGHEST)
        bonus = jnp.matmul(x, u, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(last, start, inverse - jnp.outer(u, u) / (1 + bonus)), bonus

    return jnp.maximum(jax.lax.scan(step, start, (phi, done))[1], 0.0)


def elliptical_bonus_of_group(phi: Array, mask: Array | None = None, *, ridge: float = 0.1) -> Array:
    r"""The elliptical bonus of each member of a group against all others, $\phi_g^\top C_{-g}^{-1} \phi_g$.

    Rollouts of a prompt have no order, and with `elliptical_bonus` the first of equal ones would get what the others do
    not. Here equal ones get the same, to the digits that float32 leaves: about `7 - log10(|phi|^2 / ridge)` of them, so
    scale embeddings to a norm near 1.

    Args:
        phi: `[P, G, D]` float; embeddings of the members. A constant.
        mask: `[P, G]`, nonzero where a member counts; None for all.
        ridge: $\lambda$, above 0, in $C_{-g} = \lambda I + \sum_{j \neq g} \phi_j \phi_j^\top$.

    Returns:
        `[P, G]`, float32 or wider, without gradient; 0 where the mask is.

    Raises:
        ValueError: for wrong shapes, or a ridge that is not above 0.

    Example:
        >>> group = jnp.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> [round(x, 5) for x in elliptical_bonus_of_group(group)[0].tolist()]
        [0.90909, 0.90909, 10.0]

    Reference: A Study of Global and Episodic Bonuses for Exploration in Contextual MDPs (arXiv 2306.03236), whose
    episodes have an order; for groups the form is ours.
    """
    phi = _embeddings(phi, "[P, G, D]", ridge)
    mask = jnp.ones(phi.shape[:2], bool) if mask is None else jnp.asarray(mask) != 0
    masked.check_like("mask", mask, "a column of phi", phi[:, :, 0])
    phi = jnp.where(mask[..., None], phi, 0.0)
    # In the members' own space, which is smaller than that of embeddings: with K = phi phi^T and x outside of a set S,
    # x^T (lam + sum_S)^-1 x = (1 / M_xx - lam) / lam, where M = (lam + K)^-1 over S and x.
    group = phi.shape[1]
    gram = jnp.einsum("pgd,phd->pgh", phi, phi, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.diagonal(jnp.linalg.inv(gram + ridge * jnp.eye(group, dtype=phi.dtype)), axis1=1, axis2=2)
    return jnp.where(mask, jnp.maximum((1 / diagonal - ridge) / ridge, 0.0), 0.0)


def rnd_bonus(target: Array, prediction: Array, *, squared: bool = False) -> Array:
    r"""Random network distillation: how badly a fixed random network's output is predicted, $\|f - \hat f\|_2$.

    Train the predictor on `squared=True` of what is visited; where it has been often, its error is small.

    Args:
        target: `[..., K]` float; the fixed network's output. A constant.
        prediction: of the same shape; the trained network's.
        squared: the square, which the text of the study has; its code takes the norm.

    Returns:
        `[...]`, float32 or wider. The norm's gradient is 0 where the two agree.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> rnd_bonus(jnp.array([3.0, 4.0]), jnp.zeros(2)).item()
        5.0

    References: Exploration by Random Network Distillation (arXiv 1810.12894); A Study of Global and Episodic Bonuses
    for Exploration in Contextual MDPs (arXiv 2306.03236).
    """
    target, prediction = jax.lax.stop_gradient(masked.as_float(target)), masked.as_float(prediction)
    masked.check_like("prediction", prediction, "target", target)
    error = jnp.sum(jnp.square(target - prediction), axis=-1)
    if squared:
        return error
    wrong = error > 0
    return jnp.where(wrong, jnp.sqrt(jnp.where(wrong, error, 1.0)), 0.0)


def noveld_bonus(novelty: Array, before: Array, *, c: float = 0.1) -> Array:
    r"""NovelD: how much newer a state is than the one it was reached from, $\max(0, g(s_{t+1}) - c\, g(s_t))$.

    Args:
        novelty: any shape, float; $g$ of the state reached, e.g. `rnd_bonus`.
        before: of the same shape; $g$ of the state before.
        c: 0 leaves the novelty itself.

    Returns:
        The shape of `novelty`, float32 or wider.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> noveld_bonus(jnp.array([1.0, 0.1]), jnp.array([0.5, 5.0])).round(2).tolist()
        [0.949999988079071, 0.0]

    References: NovelD: A Simple yet Effective Exploration Criterion (NeurIPS 2021); A Study of Global and Episodic
    Bonuses for Exploration in Contextual MDPs (arXiv 2306.03236).
    """
    novelty, before = masked.as_float(novelty), masked.as_float(before)
    masked.check_like("before", before, "novelty", novelty)
    return jnp.maximum(novelty - c * before, 0.0)


def combine_bonuses(
    episodic: Array, overall: Array, *, mode: Literal["product", "sum"] = "product", weight: float = 1.0
) -> Array:
    r"""An episodic and a global bonus together: $b_{epi}\, b_{glob}$, or $b_{epi} + k\, b_{glob}$.

    The product is large only for what is new in both ways, so that either may fail without harm: counts over all of
    training where no two contexts are alike, counts of the episode where all are.

    Args:
        episodic: any shape, float.
        overall: of the same shape.
        mode: `"product"` or `"sum"`.
        weight: $k$, for the sum alone.

    Returns:
        That shape, float32 or wider.

    Raises:
        ValueError: if shapes differ, the mode is unknown or a weight does not apply.

    Example:
        >>> combine_bonuses(jnp.array([2.0]), jnp.array([3.0])).tolist()
        [6.0]

    Reference: A Study of Global and Episodic Bonuses for Exploration in Contextual MDPs (arXiv 2306.03236).
    """
    if mode not in ("product", "sum"):
        raise ValueError(f'mode must be "product" or "sum", got {mode!r}')
    if mode == "product" and weight != 1.0:
        raise ValueError(f"weight={weight} does not apply to a product; leave it out")
    episodic, overall = masked.as_float(episodic), masked.as_float(overall)
    masked.check_like("overall", overall, "episodic", episodic)
    return episodic * overall if mode == "product" else episodic + weight * overall


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers so far; scalars, float32 or wider. It starts at zero."""

    count: Array
    mean: Array
    deviations: Array

    @staticmethod
    def zero() -> RunningMoments:
        """Of no number."""
        return RunningMoments(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    @property
    def std(self) -> Array:
        """Population standard deviation; 0 of no number."""
        return jnp.sqrt(self.deviations / jnp.maximum(self.count, 1))

    def include(self, x: Array, mask: Array | None = None) -> RunningMoments:
        """The moments with more numbers, by the pairwise formula: neither order nor size of the batches matters.

        Args:
            x: any shape, float.
            mask: of that shape, nonzero where a number counts; None for all.

        Example:
            >>> float(RunningMoments.zero().include(jnp.array([1.0, 2.0])).include(jnp.array([6.0])).mean)
            3.0
        """
        x = masked.as_float(x)
        mask = jnp.ones(x.shape, bool) if mask is None else jnp.asarray(mask) != 0
        more = jnp.sum(mask).astype(x.dtype)
        mean, squares = masked.mean(x, mask), masked.sum(jnp.square(masked.center(x, mask)), mask)
        total = jnp.maximum(self.count + more, 1)
        gap = mean - self.mean
        return RunningMoments(
            self.count + more,
            self.mean + gap * more / total,
            self.deviations + squares + jnp.square(gap) * self.count * more / total,
        )


def fingerprint(tokens: Array, mask: Array) -> Array:
    """A number for the masked tokens of each row: the same for the same tokens, and hardly ever for others.

    Args:
        tokens: `[B, T]` int.
        mask: `[B, T]`, nonzero where a token counts; where they stand does not matter, their order does.

    Returns:
        `[B]` uint32.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> found = fingerprint(jnp.array([[9, 5, 7], [5, 7, 9]]), jnp.array([[0, 1, 1], [1, 1, 0]]))
        >>> bool(found[0] == found[1])
        True
    """
    tokens, counts = jnp.asarray(tokens), jnp.asarray(mask) != 0
    masked.check_axes("tokens", tokens, "[B, T]")
    masked.check_like("mask", counts, "tokens", tokens)
    place = jnp.cumsum(counts, axis=1)
    powers = jnp.cumprod(jnp.full(tokens.shape[1] + 1, _MULTIPLIER, jnp.uint32))  # modulo 2^32, as is the sum
    return jnp.sum(jnp.where(counts, (tokens.astype(jnp.uint32) + 1) * powers[place], 0), axis=1, dtype=jnp.uint32)


def token_embedding(tokens: Array, mask: Array, *, size: int = 64) -> Array:
    """An embedding of a text that needs no model: its tokens' counts, hashed into a few signed sums, of unit length.

    Args:
        tokens: `[B, T]` int.
        mask: `[B, T]`, nonzero where a token counts.
        size: `D`, numbers of the embedding.

    Returns:
        `[B, D]` float32: of length 1, or 0 for a row without tokens. Inner products approximate those of the tokens'
        counts.

    Raises:
        ValueError: if shapes differ or `size` is below 1.

    Example:
        >>> found = token_embedding(jnp.array([[5, 7], [7, 5], [1, 1]]), jnp.ones((3, 2)))
        >>> round(float(found[0] @ found[1]), 4), round(float(found[0] @ found[2]), 4)
        (1.0, 0.0)

    Reference: Feature Hashing for Large Scale Multitask Learning (arXiv 0902.2206).
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    tokens, counts = jnp.asarray(tokens), jnp.asarray(mask) != 0
    masked.check_axes("tokens", tokens, "[B, T]")
    masked.check_like("mask", counts, "tokens", tokens)
    mixed = (tokens.astype(jnp.uint32) + 1) * jnp.uint32(_MULTIPLIER)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    mixed ^= mixed >> 13
    sign = jnp.where(counts, 1.0 - 2.0 * (mixed & 1), 0.0)
    place = ((mixed >> 1) % jnp.uint32(size)).astype(jnp.int32)
    rows = jnp.arange(tokens.shape[0])[:, None]
    sums = jnp.zeros((tokens.shape[0], size)).at[rows, place].add(sign)
    squares = jnp.sum(jnp.square(sums), axis=1, keepdims=True)
    return jnp.where(squares > 0, sums * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _embeddings(phi: Array, axes: str, ridge: float) -> Array:
    if isinstance(ridge, float | int) and ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}; give e.g. ridge=0.1")
    phi = masked.as_float(phi)
    masked.check_axes("phi", phi, axes)
    return jax.lax.stop_gradient(phi)
