"""Process rewards from a prover: how much a step helps another policy, which would finish from there, to succeed.

A prover is known by its success rate after each step, `[B, H + 1]` with the rate before any step in front. A good one
tells the steps of the trained policy apart, and does not disagree with it. Best-of-K of the policy itself needs no
other model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.progress import belief_gain
from jaxrl_post.types import Array


def bok_value(q: Array, *, k: int = 4) -> Array:
    r"""Success rate of the best of $K$ tries of a policy that succeeds with probability $q$: $1 - (1 - q)^K$.

    Args:
        q: any shape, float; clipped to [0, 1].
        k: $K$, number of tries; 1 is the policy itself.

    Returns:
        `q`'s shape, float32 or wider, in [0, 1].

    Raises:
        ValueError: if `k` is below 1.

    Example:
        >>> [round(v, 4) for v in bok_value(jnp.array([0.1, 0.2])).tolist()]
        [0.3439, 0.5904]

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, a number of tries, got {k}")
    return 1 - (1 - jnp.clip(masked.as_float(q), 0, 1)) ** k


def prover_advantage(q: Array, known: Array | None = None, *, k: int = 4) -> Array:
    r"""How much each step helped the best of $K$ tries, $A^\mu_h = (1 - q_{h-1})^K - (1 - q_h)^K$.

    Args:
        q: `[..., H + 1]` float: success rate before any step and after each, of the policy whose best of $K$ tries is
            the prover.
        known: `[..., H + 1]`, nonzero where the rate was measured; None for all. See `advantages.belief_gain`.
        k: $K$; 1 where `q` is the prover's own rate.

    Returns:
        `[..., H]`, float32 or wider, in [-1, 1]; without gradient.

    Raises:
        ValueError: if there is no step, `known` has another shape, or `k` is below 1.

    Example:
        >>> round(float(prover_advantage(jnp.array([0.1, 0.2]))[0]), 4)
        0.2465

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146).
    """
    # Not finite stays so, for `belief_gain` to leave out: a clip would turn infinity into certainty.
    q = masked.as_float(q)
    return belief_gain(jnp.where(jnp.isfinite(q), bok_value(q, k=k), jnp.nan), known)


def effective_reward(q_pi: Array, a_mu: Array, *, alpha: float = 5.0) -> Array:
    r"""What a step is worth: the success rate after it plus progress under the prover, $Q^\pi + \alpha A^\mu$.

    In training $Q^\pi$ is sampled by the outcome, see `advantages.with_progress`.

    Args:
        q_pi: any shape, float: $Q^\pi(s_h, a_h)$.
        a_mu: of the same shape: $A^\mu(s_h, a_h)$.
        alpha: $\alpha$; 3 to 5 in training, about 0.5 in search (values recalled, not looked up).

    Returns:
        The same shape, float32 or wider, without gradient.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(float(effective_reward(jnp.array([0.2]), jnp.array([0.2465]))[0]), 4)
        1.4325

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146).
    """
    q_pi, a_mu = masked.as_float(q_pi), masked.as_float(a_mu)
    masked.check_like("a_mu", a_mu, "q_pi", q_pi)
    return jax.lax.stop_gradient(q_pi + alpha * a_mu)


def beam_score(q: Array, known: Array | None = None, *, alpha: float = 0.5, k: int = 4) -> Array:
    r"""By what beams of a search are ranked: `effective_reward` of the last step of each prefix.

    Args:
        q: `[N, H + 1]` float: success rate of the policy before any step and after each.
        known: `[N, H + 1]`, nonzero for the steps that the prefix has; None for all.
        alpha: weight of the progress.
        k: tries of the prover, best of `k` of the policy.

    Returns:
        `[N]`, float32 or wider; a prefix of no step has its success rate alone, one of which nothing is known 0.

    Raises:
        ValueError: as `prover_advantage`, or if `q` is not `[N, H + 1]`.

    Example:
        >>> round(float(beam_score(jnp.array([[0.1, 0.2]]))[0]), 4)
        0.3232

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146).
    """
    q = masked.as_float(q)
    masked.check_axes("q", q, "[N, H+1]", "one column before the first step")
    gain = prover_advantage(q, known, k=k)
    there = jnp.isfinite(q) if known is None else jnp.isfinite(q) & (jnp.asarray(known) != 0)
    last = jnp.max(jnp.where(there, jnp.arange(q.shape[1]), 0), axis=1, keepdims=True)
    rate = jnp.take_along_axis(jnp.where(there, q, 0.0), last, axis=1)
    progress = jnp.take_along_axis(jnp.pad(gain, ((0, 0), (1, 0))), last, axis=1)
    return effective_reward(rate, progress, alpha=alpha)[:, 0]


def prover_quality(a_mu: Array, a_pi: Array, probs: Array, weights: Array | None = None) -> Array:
    r"""How good a prover is for a policy: does it tell its steps apart, and agree with it?

    $$E_s\big[\mathrm{Var}_{a \sim \pi} A^\mu(s, a) + E_{a \sim \pi} A^\mu(s, a)\, A^\pi(s, a)\big]$$

    The paper bounds the improvement of a policy update from below by terms of this form: a prover that is too strong
    or too weak finds all steps alike (the first term is 0), one that would go on quite differently pulls against the
    policy (the second is negative).

    Args:
        a_mu: `[S, A]` float, advantage of each step in each state under the prover.
        a_pi: `[S, A]` float, the same under the policy.
        probs: `[S, A]` float, probabilities of the steps under the policy; rows add up to 1.
        weights: `[S]` float, how often the policy is in each state; None for equally often.

    Returns:
        A scalar, float32 or wider; larger is better.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> a = jnp.array([[0.5, -0.5]])
        >>> float(prover_quality(a, a, jnp.array([[0.5, 0.5]])))
        0.5

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146), without
    the constants of its theorem.
    """
    a_mu, a_pi, probs = masked.as_float(a_mu), masked.as_float(a_pi), masked.as_float(probs)
    masked.check_axes("a_mu", a_mu, "[S, A]")
    masked.check_like("a_pi", a_pi, "a_mu", a_mu)
    masked.check_like("probs", probs, "a_mu", a_mu)
    weights = jnp.ones(a_mu.shape[0], a_mu.dtype) if weights is None else masked.as_float(weights)
    masked.check_like("weights", weights, "a column of a_mu", a_mu[:, 0])
    mean = jnp.sum(probs * a_mu, axis=1, keepdims=True)
    variance = jnp.sum(probs * jnp.square(a_mu - mean), axis=1)
    return masked.mean(variance + jnp.sum(probs * a_mu * a_pi, axis=1), weights)
