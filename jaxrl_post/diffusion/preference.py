"""Preferences between generated samples: of every step of two trajectories, or of samples noised again."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from jaxrl_post.types import Array


def d3po(logp: Array, ref_logp: Array, preferred: Array, *, beta: float = 0.1, clip: float = 0.1) -> Array:
    r"""DPO at each denoising step, with the ratios clipped.

    $$\ell_t = -\log \sigma\left(\beta (h_0 \log \rho_{0,t} + h_1 \log \rho_{1,t})\right), \quad
      \rho = \mathrm{clip}(\pi / \pi_\mathrm{ref}, 1 - c, 1 + c)$$

    Args:
        logp: `[P, 2, S]`, of the steps of two trajectories (in the source's unit: means over the dimensions).
        ref_logp: `[P, 2, S]`, of the reference.
        preferred: `[P, 2]`, $h$: 1 for the preferred one, -1 for the other, zeros for a tie.
        beta: $\beta$.
        clip: $c$, in 0 to 1; no gradient comes from a ratio beyond it.

    Returns:
        `[P, S]`; log 2 for a tie.

    Example:
        >>> logp, ref = jnp.log(jnp.array([[[1.5], [0.8]]])), jnp.zeros((1, 2, 1))
        >>> round(float(d3po(logp, ref, jnp.array([[1.0, -1.0]]))[0, 0]), 4)
        0.6832

    Reference: Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model (2311.13231), released code.
    """
    chex.assert_equal_shape([logp, ref_logp])
    ratio = jnp.clip(logp - jax.lax.stop_gradient(ref_logp), jnp.log1p(-clip), jnp.log1p(clip))
    return -jax.nn.log_sigmoid(beta * jnp.sum(preferred[..., None] * ratio, axis=1))


def seppo(
    chosen_error: Array,
    ref_chosen_error: Array,
    sampled_error: Array,
    ref_sampled_error: Array,
    *,
    beta: float = 2000.0,
) -> Array:
    r"""Diffusion-DPO against a sample of an earlier checkpoint: a loser only while the winner is learned.

    $$\ell = -\log \sigma(-\beta (\Delta_w - s \Delta_r)), \quad \Delta = e - e_\mathrm{ref}, \quad
      s = \mathrm{sign}(-\Delta_w)$$

    Args:
        chosen_error: `[B]`, squared error of the model on the noised winner.
        ref_chosen_error: `[B]`, of the checkpoint, which is also the reference.
        sampled_error: `[B]`, of the model on the checkpoint's own sample.
        ref_sampled_error: `[B]`, of the checkpoint on it.
        beta: $\beta$ times steps and the weight of the time.

    Returns:
        `[B]`. Where the model explains the winner no better than the checkpoint did, both samples are made likelier.

    Example:
        >>> numbers = [jnp.array([x]) for x in (0.5, 0.7, 0.45, 0.4)]
        >>> round(float(seppo(*numbers, beta=1.0)[0]), 4)
        0.5759

    Reference: SePPO (2410.05255), equations 7 and 8.
    """
    chex.assert_equal_shape([chosen_error, ref_chosen_error, sampled_error, ref_sampled_error])
    of_chosen = chosen_error - jax.lax.stop_gradient(ref_chosen_error)
    of_sampled = sampled_error - jax.lax.stop_gradient(ref_sampled_error)
    sign = jax.lax.stop_gradient(jnp.where(of_chosen < 0, 1.0, -1.0))
    return -jax.nn.log_sigmoid(-beta * (of_chosen - sign * of_sampled))
