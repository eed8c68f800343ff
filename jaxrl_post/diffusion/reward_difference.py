"""Trajectories of a prompt in pairs: the difference of their log-ratios is to be that of their rewards."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_post.types import Array


def prdp(
    logp: Array, ref_logp: Array, old_logp: Array, rewards: Array, *, beta: float = 10.0, clip: float = 1e-4
) -> Array:
    r"""Squared error of predicted reward differences, the larger of it with and without steps clipped.

    $$\ell = \mathrm{mean}_{a<b} \max(e_{ab}^2, \bar e_{ab}^2), \quad
      e_{ab} = \hat r_a - \hat r_b - (r_a - r_b) / \beta, \quad
      \hat r = \sum_t \log \pi(a_t) - \log \pi_\mathrm{ref}(a_t)$$

    In $\bar e$ each step's log-ratio is held within `clip` of that of the policy that sampled. It is 0 for all pairs
    only where $\pi = \pi_\mathrm{ref} e^{r / \beta} / Z$.

    Args:
        logp: `[P, G, S]`, of the policy.
        ref_logp: `[P, G, S]`, of the reference.
        old_logp: `[P, G, S]`, of the policy that sampled.
        rewards: `[P, G]`.
        beta: $\beta$, above 0, rewards per nat.
        clip: in the unit of the log-probs.

    Returns:
        `[P]`; 0 for one trajectory.

    Example:
        >>> logp, zero = jnp.array([[[0.4], [0.0]]]), jnp.zeros((1, 2, 1))
        >>> round(float(prdp(logp, zero, logp, jnp.array([[1.0, 0.0]]), beta=2.0)[0]), 4)
        0.01

    Reference: PRDP (2402.08714).
    """
    chex.assert_rank(logp, 3, custom_message="logp")
    chex.assert_equal_shape([logp, ref_logp, old_logp])
    first, second = np.triu_indices(rewards.shape[1], 1)
    if not first.size:
        return jnp.zeros(rewards.shape[0], logp.dtype)
    ratio = logp - jax.lax.stop_gradient(ref_logp)
    old = jax.lax.stop_gradient(old_logp - ref_logp)
    wanted = (rewards[:, first] - rewards[:, second]) / beta

    def error(ratios: Array) -> Array:
        total = jnp.sum(ratios, axis=-1)
        return jnp.square(total[:, first] - total[:, second] - wanted)

    return jnp.mean(jnp.maximum(error(ratio), error(jnp.clip(ratio, old - clip, old + clip))), axis=-1)
