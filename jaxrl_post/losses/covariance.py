"""The covariance of log-prob and advantage: what makes entropy fall, and two losses that hold back the few tokens in
which it is largest.

Which tokens these are is decided over the whole batch, by functions of their own; the losses take the decision as an
argument. The two diagnostics tell how fast entropy falls, and what reward will be left when it has.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_constant, as_logp, check_at_least
from jaxrl_post.losses.policy import importance_ratio, ppo
from jaxrl_post.types import Array

_ROUNDING = 1 + 1e-6  # 0.29 of 100 tokens are 29, although the product of the two floats is a little less


def token_covariance(logp: Array, advantages: Array, mask: Array) -> Array:
    r"""Each token's part in the covariance of log-prob and advantage, $(A_t - \bar A)(\log\pi_t - \overline{\log\pi})$.

    Its mean estimates $\mathrm{Cov}(\log\pi, A)$, and so how fast entropy falls (see `entropy_change`): likely tokens
    of positive advantage and unlikely ones of negative advantage lower it, the others raise it.

    Args:
        logp: `[B, T]` float, nats; log-prob under the present policy.
        advantages: `[B, T]` float.
        mask: `[B, T]`, nonzero where a token counts. Both means are of the whole batch: give all rows at once.

    Returns:
        `[B, T]`, float32 or wider, without gradient; 0 where the mask is, and for a single token.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> logp, advantages = jnp.array([[-0.1, -2.0, -0.1, -2.0]]), jnp.array([[1.0, 1.0, -1.0, -1.0]])
        >>> [round(x, 2) for x in token_covariance(logp, advantages, jnp.ones((1, 4)))[0].tolist()]
        [0.95, -0.95, -0.95, 0.95]

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    logp = as_logp(logp)
    mask = as_constant("mask", mask, logp)
    advantages = as_constant("advantages", advantages, logp)
    return jax.lax.stop_gradient(masked.center(advantages, mask) * masked.center(logp, mask))


def clip_cov_tokens(
    covariance: Array,
    mask: Array,
    key: Array,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    clipped: Array | None = None,
) -> Array:
    r"""Indicator of the tokens that Clip-Cov leaves out: some of those whose covariance is in a band, drawn at random.

    $\min(n, |I|)$ tokens of $I = \{t : c_{low} < \mathrm{cov}_t < c_{high}\}$, with $n = \max(1, \lfloor\rho N\rfloor)$
    and $N$ the tokens that count.

    Args:
        covariance: `[B, T]` float, see `token_covariance`.
        mask: `[B, T]`, nonzero where a token counts.
        key: one key, or `[B]` keys, one for each sequence: then a draw depends on neither the row nor the padding.
        fraction: $\rho$ in (0, 1], a Python number.
        low: $c_{low}$.
        high: $c_{high}$.
        clipped: `[B, T]`, nonzero where a token has no gradient already (see `losses.clipped_region`) and is no
            candidate; None for none.

    Returns:
        `[B, T]`, float32 or wider, 0 or 1, without gradient; all 0 where no token is in the band.

    Raises:
        ValueError: if shapes differ, `fraction` is outside (0, 1] or the band is empty.

    Example:
        >>> covariance = jnp.array([[0.5, 2.0, 3.0, 9.0]])
        >>> int(clip_cov_tokens(covariance, jnp.ones((1, 4)), jax.random.key(0), fraction=0.25)[0, 1:3].sum())
        1

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    if isinstance(low, float | int) and isinstance(high, float | int) and low >= high:
        raise ValueError(f"low must be below high, the ends of the band, got low={low} and high={high}")
    covariance, counts = _prepare(covariance, mask, fraction)
    candidates = counts & (covariance > low) & (covariance < high)
    if clipped is not None:
        masked.check_like("clipped", jnp.asarray(clipped), "covariance", covariance)
        candidates &= jnp.asarray(clipped) == 0
    if key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1):
        order = jax.random.uniform(key, covariance.shape)
    else:
        order = jax.vmap(lambda row: jax.random.uniform(row, covariance.shape[1:]))(key)
    return _largest(order, candidates, counts, fraction).astype(covariance.dtype)


def kl_cov_tokens(covariance: Array, mask: Array, *, fraction: float = 2e-3) -> Array:
    r"""Indicator of the $\max(1, \lfloor\rho N\rfloor)$ tokens of largest covariance, which KL-Cov penalises.

    Args:
        covariance: `[B, T]` float, see `token_covariance`.
        mask: `[B, T]`, nonzero where a token counts; $N$ of them do.
        fraction: $\rho$ in (0, 1], a Python number.

    Returns:
        `[B, T]`, float32 or wider, 0 or 1, without gradient; of equal ones the first in the batch. All 0 for an empty
        mask.

    Raises:
        ValueError: if shapes differ or `fraction` is outside (0, 1].

    Example:
        >>> kl_cov_tokens(jnp.array([[0.5, 2.0, 2.0, 9.0]]), jnp.array([[1, 1, 1, 0]])).tolist()
        [[0.0, 1.0, 0.0, 0.0]]

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    covariance, counts = _prepare(covariance, mask, fraction)
    return _largest(covariance, counts, counts, fraction).astype(covariance.dtype)


def clip_cov(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    selected: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Array:
    r"""Clip-Cov: the clipped surrogate of PPO, and nothing for the selected tokens.

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy that sampled. A constant.
        advantages: `logp`'s shape. A constant.
        selected: `logp`'s shape, nonzero where the token is left out, see `clip_cov_tokens`.
        clip_low: $\epsilon_{low}$ of `losses.ppo`.
        clip_high: $\epsilon_{high}$.

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token.

    Raises:
        ValueError: if shapes differ or a clip distance is negative.

    Example:
        >>> logp = jnp.zeros((1, 2))
        >>> clip_cov(logp, logp, jnp.ones((1, 2)), jnp.array([[0, 1]])).tolist()
        [[-1.0, 0.0]]

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    loss = ppo(logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high)
    return jnp.where(as_constant("selected", selected, loss) != 0, 0.0, loss)


def kl_cov(logp: Array, old_logp: Array, advantages: Array, selected: Array, *, kl_coef: float = 1.0) -> Array:
    r"""KL-Cov: the surrogate without clipping, and a penalty on how far the selected tokens have moved.

    $$\ell_t = -r_t A_t + c\, |\log\pi_t - \log\pi_{old,t}|\,[t \in K]$$

    The penalty is the size of the log-ratio, not a KL divergence. Where the policy has not moved, on the first update
    from fresh rollouts, it has no gradient: it acts from the second one on (`training.epochs`, or stale rollouts).

    Args:
        logp: `[B, T]` or `[B]` float, nats; log-prob under the trained policy.
        old_logp: `logp`'s shape, nats; log-prob under the policy that sampled. A constant.
        advantages: `logp`'s shape. A constant.
        selected: `logp`'s shape, nonzero for the tokens in $K$, see `kl_cov_tokens`.
        kl_coef: $c$.

    Returns:
        `logp`'s shape, float32 or wider: the loss of each token.

    Raises:
        ValueError: if shapes differ or `kl_coef` is negative.

    Example:
        >>> logp, old_logp = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.25]]))
        >>> [round(x, 4) for x in kl_cov(logp, old_logp, jnp.ones((1, 2)), jnp.array([[0, 1]]))[0].tolist()]
        [-2.0, -1.3069]

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    check_at_least("kl_coef", kl_coef, 0)
    logp = as_logp(logp)
    ratio, advantages = importance_ratio(logp, old_logp), as_constant("advantages", advantages, logp)
    moved = logp - as_constant("old_logp", old_logp, logp)
    size = jax.lax.stop_gradient(jnp.sign(moved)) * moved  # of jnp.abs the derivative at 0 is 1
    return -ratio * advantages + jnp.where(as_constant("selected", selected, logp) != 0, kl_coef * size, 0.0)


def entropy_change(
    log_probs: Array, advantages: Array, *, learning_rate: float | Array = 1.0, natural: bool = False
) -> Array:
    r"""Change of entropy that one step of policy gradient on the logits of a softmax makes, to first order.

    $$\Delta H \approx -\eta\, \mathrm{Cov}_{a \sim \pi}(\log\pi(a), \pi(a) A(a)), \qquad
    \text{natural: } -\eta\, \mathrm{Cov}_{a \sim \pi}(\log\pi(a), A(a))$$

    Args:
        log_probs: `[..., V]` float, nats; log-probs of all actions, -inf where impossible.
        advantages: `[..., V]` float; of every action. A number added to all of them changes what is returned only for
            the plain gradient: give advantages of mean zero under the policy.
        learning_rate: $\eta$.
        natural: of the natural gradient.

    Returns:
        `[...]`, float32 or wider, nats.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> log_probs, advantages = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.array([0.3, -0.7, -0.7])
        >>> round(float(entropy_change(log_probs, advantages)), 4)
        -0.0986

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    log_probs, advantages = masked.as_float(log_probs), masked.as_float(advantages)
    masked.check_like("advantages", advantages, "log_probs", log_probs)
    p = jnp.exp(log_probs)
    log_probs = jnp.where(p > 0, log_probs, 0.0)
    gain = advantages if natural else p * advantages

    def mean(x: Array) -> Array:
        return jnp.sum(jnp.where(p > 0, p * x, 0.0), axis=-1, keepdims=True)

    covariance = mean((log_probs - mean(log_probs)) * (gain - mean(gain)))[..., 0]
    return -learning_rate * covariance


class EntropyLaw(NamedTuple):
    """Reward as a function of entropy, `R = -a exp(H) + b`; two scalars, float32 or wider, in units of the reward."""

    a: Array
    b: Array

    @property
    def ceiling(self) -> Array:
        """The reward at an entropy of 0."""
        return self.b - self.a

    def __call__(self, entropy: Array) -> Array:
        """The reward at entropies in nats."""
        return self.b - self.a * jnp.exp(entropy)


def fit_entropy_law(entropy: Array, reward: Array, mask: Array | None = None) -> EntropyLaw:
    r"""Least-squares fit of $R = -a e^H + b$ to the course of a training: what reward is left when entropy is spent.

    Args:
        entropy: `[N]` float, nats; mean entropy of a token at `N` times.
        reward: `[N]` float; mean reward, or accuracy, at those times.
        mask: `[N]`, nonzero where a time counts; None for all.

    Returns:
        `EntropyLaw(a, b)`, whose `ceiling` is $b - a$. Equal entropies give $a = 0$ and $b$ the mean reward.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> entropy = jnp.array([1.0, 0.5, 0.1])
        >>> law = fit_entropy_law(entropy, 0.9 - 0.2 * jnp.exp(entropy))
        >>> [round(float(x), 4) for x in (law.a, law.b, law.ceiling)]
        [0.2, 0.9, 0.7]

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    entropy, reward = masked.as_float(entropy), masked.as_float(reward)
    masked.check_axes("entropy", entropy, "[N]")
    masked.check_like("reward", reward, "entropy", entropy)
    mask = jnp.ones(entropy.shape) if mask is None else jnp.asarray(mask)
    masked.check_like("mask", mask, "entropy", entropy)
    x = jnp.exp(jnp.where(mask != 0, entropy, 0.0))
    centered = masked.center(x, mask)
    squares = masked.sum(jnp.square(centered), mask)
    known = squares > 0
    slope = jnp.where(known, masked.sum(centered * reward, mask) / jnp.where(known, squares, 1.0), 0.0)
    return EntropyLaw(-slope, masked.mean(reward, mask) - slope * masked.mean(x, mask))


def _prepare(covariance: Array, mask: Array, fraction: float) -> tuple[Array, Array]:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}; give e.g. fraction=2e-4")
    covariance, mask = masked.as_float(covariance), jnp.asarray(mask)
    masked.check_axes("covariance", covariance, "[B, T]")
    masked.check_like("mask", mask, "covariance", covariance)
    return jax.lax.stop_gradient(covariance), mask != 0


def _largest(score: Array, candidates: Array, counts: Array, fraction: float) -> Array:
    """Bool: the candidates of largest score, as many as a fraction of those that count; at least one, if there are."""
    # How many count is known only when traced, but never more than there are: sorting a few is enough.
    limit = max(1, math.floor(score.size * fraction * _ROUNDING))
    number = jnp.floor(jnp.sum(counts).astype(score.dtype) * (fraction * _ROUNDING))
    _, places = jax.lax.top_k(jnp.where(candidates, score, -jnp.inf).reshape(-1), limit)
    taken = (jnp.arange(limit) < jnp.maximum(number, 1)) & candidates.reshape(-1)[places]
    return jnp.zeros(score.size, bool).at[places].set(taken).reshape(score.shape)
