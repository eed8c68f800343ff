r"""Reward models with a latent variable for each user: what an encoder infers of a user from a few comparisons.

Encoder (comparisons to mean and log-variance of the latent) and reward (answer and latent to a score) are the caller's.
Which comparison to ask a user for next is a question for `information_gain`, of the probabilities
$\sigma(r(a, z) - r(b, z))$ under several draws of $z$.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.losses.reward_model import bradley_terry
from jaxrl_post.types import Array


def gaussian_kl(mean: Array, log_variance: Array) -> Array:
    r"""Divergence of a diagonal Gaussian from the standard one.

    $$KL = -\frac12 \sum_d (1 + \log\sigma_d^2 - \mu_d^2 - \sigma_d^2)$$

    Args:
        mean: `[..., D]` float, $\mu$.
        log_variance: of the same shape, $\log\sigma^2$.

    Returns:
        `[...]`, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> float(gaussian_kl(jnp.array([0.5, -0.5]), jnp.zeros(2)))
        0.25

    Reference: Auto-Encoding Variational Bayes (arXiv 1312.6114).
    """
    mean, log_variance = masked.as_float(mean), masked.as_float(log_variance)
    masked.check_like("log_variance", log_variance, "mean", mean)
    return jnp.sum(jnp.expm1(log_variance) - log_variance + jnp.square(mean), axis=-1) / 2


def draw_latent(key: Array, mean: Array, log_variance: Array, *, on_sphere: bool = False) -> Array:
    r"""A latent $z = \mu + \sigma \epsilon$, whose gradient reaches mean and log-variance.

    Args:
        key: for $\epsilon$.
        mean: `[..., D]` float, $\mu$; what is used at test time in the place of a draw.
        log_variance: of the same shape, $\log\sigma^2$.
        on_sphere: scale the draw to the norm $\sqrt{D}$, as the released code does.

    Returns:
        `[..., D]`, float32 or wider.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> z = draw_latent(jax.random.key(0), jnp.array([3.0, 4.0]), jnp.full(2, -jnp.inf), on_sphere=True)
        >>> [round(float(x), 4) for x in z]  # without variance the mean, with the norm of sqrt(2)
        [0.8485, 1.1314]

    Reference: Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning
    (arXiv 2408.10075).
    """
    mean, log_variance = masked.as_float(mean), masked.as_float(log_variance)
    masked.check_like("log_variance", log_variance, "mean", mean)
    z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)
    if not on_sphere:
        return z
    square = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    return z * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0) * math.sqrt(z.shape[-1])


def vpl(
    better: Array,
    worse: Array,
    mean: Array,
    log_variance: Array,
    valid: Array | None = None,
    *,
    kl_weight: float | Array = 1e-3,
) -> Array:
    r"""Variational preference learning: Bradley-Terry under a user's latent, and the divergence of that from its prior.

    $$\ell_u = -\mathrm{mean}_b \log\sigma\big(r(y^+_b, z_u) - r(y^-_b, z_u)\big)
    + \beta\, KL\big(N(\mu_u, \sigma_u^2) \,\|\, N(0, I)\big)$$

    Args:
        better: `[U, B]` float, scores of the preferred answers under a draw of each user's latent.
        worse: `[U, B]` float, of the others.
        mean: `[U, D]` float: $\mu$ from the user's own comparisons. A user without any has 0: the average user.
        log_variance: `[U, D]` float, $\log\sigma^2$; a user without comparisons has 0. The released code clips both to
            [-1, 1].
        valid: `[U, B]` bool, False where the comparison does not count; None for all.
        kl_weight: $\beta$; see `cyclical_annealing`.

    Returns:
        `[U]`, float32 or wider, nats: the loss of each user.

    Raises:
        ValueError: if the shapes do not fit or `kl_weight` is negative.

    Example:
        >>> mean, log_variance = jnp.array([[0.5, -0.5]]), jnp.zeros((1, 2))
        >>> loss = vpl(jnp.array([[1.0]]), jnp.array([[0.0]]), mean, log_variance, kl_weight=0.1)
        >>> round(float(loss[0]), 5)
        0.33826

    Reference: Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning
    (arXiv 2408.10075).
    """
    check_at_least("kl_weight", kl_weight, 0)
    better, mean = masked.as_float(better), masked.as_float(mean)
    masked.check_axes("better", better, "[U, B]")
    masked.check_axes("mean", mean, "[U, D]")
    if mean.shape[0] != better.shape[0]:
        raise ValueError(f"mean must have a row for each of the {better.shape[0]} users of better, got {mean.shape}")
    counts = jnp.ones(better.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "better", better)
    worse = masked.as_float(worse)
    masked.check_like("worse", worse, "better", better)
    loss = bradley_terry(jnp.where(counts, better, 0.0), jnp.where(counts, worse, 0.0))
    return masked.mean(loss, counts, 1) + kl_weight * gaussian_kl(mean, log_variance)


def cyclical_annealing(step: Array | int, *, period: int, floor: float = 0.1) -> Array:
    r"""Factor of the divergence that rises along half a cosine, again and again, $f + \frac{1 - f}{2}(1 - \cos\pi x)$.

    $x$ is the share of the period that has passed. A weight that is small at times lets the latent carry something.

    Args:
        step: scalar int, from 0.
        period: steps of a cycle.
        floor: $f$, what a cycle begins with.

    Returns:
        Scalar, float32 or wider, in [floor, 1).

    Raises:
        ValueError: if `period` is below 1 or `floor` is not in [0, 1].

    Example:
        >>> [round(float(cyclical_annealing(step, period=4)), 4) for step in (0, 2, 4, 7)]
        [0.1, 0.55, 0.1, 0.8682]

    Reference: Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning
    (arXiv 2408.10075).
    """
    check_at_least("period", period, 1)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor}")
    share = masked.as_float(jnp.mod(step, period)) / period
    return floor + (1 - floor) * (1 - jnp.cos(jnp.pi * share)) / 2


def expected_win(scores: Array, others: Array) -> Array:
    r"""Scores of different users made comparable, $\tilde r(x, z) = \mathrm{mean}_{x'}\, \sigma(r(x, z) - r(x', z))$.

    Args:
        scores: `[U, B]` float, of answers under each user's latent.
        others: `[U, N]` float, of answers from the data under the same latent.

    Returns:
        `[U, B]`, float32 or wider, in (0, 1).

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> expected_win(jnp.array([[0.0, 100.0], [0.0, 1000.0]]), jnp.zeros((2, 4))).tolist()
        [[0.5, 1.0], [0.5, 1.0]]

    Reference: Personalizing Reinforcement Learning from Human Feedback with Variational Preference Learning
    (arXiv 2408.10075).
    """
    scores, others = masked.as_float(scores), masked.as_float(others)
    masked.check_axes("scores", scores, "[U, B]")
    masked.check_axes("others", others, "[U, N]")
    if scores.shape[0] != others.shape[0]:
        raise ValueError(f"others must have a row for each of the {scores.shape[0]} users, got {others.shape}")
    return jnp.mean(jax.nn.sigmoid(scores[:, :, None] - others[:, None, :]), axis=2)
