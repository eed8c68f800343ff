"""Policies as players of the game whose payoff is a preference, on answers that can be listed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array


def _check(policy: Array, wins: Array) -> tuple[Array, Array]:
    policy, wins = masked.as_float(policy), masked.as_float(wins)
    masked.check_axes("policy", policy, "[V]")
    if wins.shape != (policy.size, policy.size):
        raise ValueError(f"wins must be [V, V], {(policy.size, policy.size)}, got {wins.shape}")
    return policy, wins


def exploitability(policy: Array, wins: Array) -> Array:
    r"""What the best answer to a policy wins beyond one half, $\max_y P(y \succ \pi) - \frac12$.

    Args:
        policy: `[V]` float, probabilities of the answers.
        wins: `[V, V]` float, `wins[i, j]` the probability that `i` is preferred to `j`, one less that of the reverse.

    Returns:
        A scalar, float32 or wider; 0 of a Nash equilibrium.

    Raises:
        ValueError: if `policy` is not `[V]`, or `wins` not `[V, V]`.

    Example:
        >>> rock_paper_scissors = jnp.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
        >>> float(exploitability(jnp.array([1.0, 0.0, 0.0]), rock_paper_scissors))
        0.5

    Reference: Nash Learning from Human Feedback (arXiv 2312.00886).
    """
    policy, wins = _check(policy, wins)
    return jnp.max(wins @ policy) - 0.5


def nash_md_step(
    policy: Array, reference: Array, wins: Array, *, eta: float = 1.0, tau: float = 0.1
) -> tuple[Array, Array]:
    r"""A step of Nash-MD: mirror descent from, and against, the geometric mixture of policy and reference.

    $$\pi_t^\mu \propto \pi_t^{1 - \eta\tau} \mu^{\eta\tau}, \qquad
    \pi_{t+1} \propto \pi_t^\mu \exp\big(\eta P(y \succ \pi_t^\mu)\big)$$

    Its last iterate converges to the equilibrium of the game with a KL to the reference, of strength $\tau$.

    Args:
        policy: `[V]` float, $\pi_t$, above 0.
        reference: `[V]` float, $\mu$, above 0.
        wins: `[V, V]` float, see `exploitability`.
        eta: $\eta$, step size.
        tau: $\tau$, strength of the KL; `eta * tau` in [0, 1]. 0 is plain self-play, which cycles.

    Returns:
        The next policy and the mixture that it is a best response from, `[V]` each, float32 or wider.

    Raises:
        ValueError: if the arrays do not fit together, or `eta * tau` is outside [0, 1].

    Example:
        >>> wins = jnp.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
        >>> policy, mixture = nash_md_step(jnp.array([0.5, 0.3, 0.2]), jnp.ones(3) / 3, wins)
        >>> [round(float(p), 4) for p in policy]
        [0.5041, 0.2653, 0.2306]

    Reference: Nash Learning from Human Feedback (arXiv 2312.00886), equations 4 and 5.
    """
    share = eta * tau
    if isinstance(share, float | int) and not 0 <= share <= 1:
        raise ValueError(f"eta * tau must be in [0, 1], the reference's share of the mixture, got {share}")
    policy, wins = _check(policy, wins)
    reference = masked.as_float(reference)
    masked.check_like("reference", reference, "policy", policy)
    mixture = jax.nn.softmax((1 - share) * jnp.log(policy) + share * jnp.log(reference))
    return jax.nn.softmax(jnp.log(mixture) + eta * (wins @ mixture)), mixture
