"""Losses on pairs of answers, from the log-probs of whole sequences."""

from __future__ import annotations

import jax

from jaxrl_post import masked
from jaxrl_post.types import Array


def implicit_reward(logp: Array, ref_logp: Array, *, beta: float = 0.1) -> Array:
    r"""Reward that a policy implies relative to its reference, $\beta (\log\pi - \log\pi_{ref})$.

    Args:
        logp: `[B]` float, nats; sum of the log-probs of the sequence's tokens.
        ref_logp: `[B]` float, nats; the same under the reference.
        beta: strength of the KL constraint.

    Returns:
        `[B]`, float32 or wider; up to a constant per prompt.

    Raises:
        ValueError: if the inputs are not `[B]` of one length.

    Example:
        >>> import jax.numpy as jnp
        >>> implicit_reward(jnp.array([-3.0]), jnp.array([-5.0]), beta=0.5).tolist()
        [1.0]

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290).
    """
    logp, ref_logp = masked.as_float(logp), masked.as_float(ref_logp)
    masked.check_axes("logp", logp, "[B]", "sum log-probs over the tokens with masked.sum(logp, mask, axis=1)")
    masked.check_like("ref_logp", ref_logp, "logp", logp)
    return beta * (logp - ref_logp)


def dpo(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Array:
    r"""Direct preference optimisation: logistic loss on the margin of implicit rewards.

    $$\ell = -(1 - \epsilon) \log\sigma(\beta h) - \epsilon \log\sigma(-\beta h), \qquad
    h = (\log\pi(y_w) - \log\pi_{ref}(y_w)) - (\log\pi(y_l) - \log\pi_{ref}(y_l))$$

    Args:
        chosen_logp: `[B]` float, nats; log-prob of the chosen sequence under the trained policy, summed over tokens.
        rejected_logp: `[B]` float, nats; of the rejected one.
        ref_chosen_logp: `[B]` float, nats; of the chosen one under the frozen reference. A constant.
        ref_rejected_logp: `[B]` float, nats; of the rejected one under the frozen reference. A constant.
        beta: strength of the KL constraint, above 0.
        label_smoothing: $\epsilon$ in [0, 0.5), the assumed share of flipped labels (conservative DPO).

    Returns:
        `[B]`, float32 or wider: the loss of each pair. An identical pair gives log 2.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `beta` is not above 0, or `label_smoothing` is outside
            [0, 0.5).

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones(1)
        >>> round(float(dpo(-10 * one, -12 * one, -11 * one, -11 * one, beta=0.1)[0]), 6)
        0.598139

    Reference: Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290); label
    smoothing as in A note on DPO with noisy preferences (Mitchell, 2023).
    """
    if isinstance(beta, float | int) and beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}; the paper uses 0.1 to 0.5")
    if isinstance(label_smoothing, float | int) and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}; swap the pairs for more than half"
        )
    chosen_logp = masked.as_float(chosen_logp)
    hint = "sum log-probs over the tokens with masked.sum(logp, mask, axis=1)"
    masked.check_axes("chosen_logp", chosen_logp, "[B]", hint)
    others = {
        "rejected_logp": rejected_logp,
        "ref_chosen_logp": ref_chosen_logp,
        "ref_rejected_logp": ref_rejected_logp,
    }
    others = {name: masked.as_float(logp) for name, logp in others.items()}
    for name, logp in others.items():
        masked.check_like(name, logp, "chosen_logp", chosen_logp)
    ref_chosen, ref_rejected = jax.lax.stop_gradient((others["ref_chosen_logp"], others["ref_rejected_logp"]))
    margin = beta * ((chosen_logp - ref_chosen) - (others["rejected_logp"] - ref_rejected))
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
    if isinstance(label_smoothing, float | int) and label_smoothing == 0:
        return loss  # also of a margin that is infinite
    return loss - label_smoothing * jax.nn.log_sigmoid(-margin)


def simpo(chosen_logp: Array, rejected_logp: Array, *, beta: float = 2.0, gamma: float = 1.0) -> Array:
    r"""SimPO: logistic loss on the margin of mean log-probs, without a reference, and with a target for the margin.

    $$\ell = -\log\sigma\Big(\frac{\beta}{|y_w|} \log\pi(y_w) - \frac{\beta}{|y_l|} \log\pi(y_l) - \gamma\Big)$$

    Args:
        chosen_logp: `[B]` float, nats; log-prob of the chosen sequence under the trained policy, mean over tokens.
        rejected_logp: `[B]` float, nats; of the rejected one.
        beta: scale of the implicit reward, above 0.
        gamma: $\gamma$, the margin that the chosen one is to have, in units of the implicit reward.

    Returns:
        `[B]`, float32 or wider: the loss of each pair.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is not above 0.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(simpo(jnp.array([-1.0]), jnp.array([-1.5]), beta=2.0, gamma=1.0)[0]), 6)
        0.693147

    Reference: SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv 2405.14734).
    """
    if isinstance(beta, float | int) and beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}; the paper uses 2.0 to 2.5")
    chosen_logp, rejected_logp = masked.as_float(chosen_logp), masked.as_float(rejected_logp)
    hint = "average log-probs over the tokens with masked.mean(logp, mask, axis=1)"
    masked.check_axes("chosen_logp", chosen_logp, "[B]", hint)
    masked.check_like("rejected_logp", rejected_logp, "chosen_logp", chosen_logp)
    return -jax.nn.log_sigmoid(beta * (chosen_logp - rejected_logp) - gamma)
