"""Losses of policies that are compared with themselves, as they were an iteration before."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.consistency import check_positive, prepare_group
from jaxrl_post.losses.preference import log_ratios, smoothed
from jaxrl_post.types import Array

_PAIR = (1, 2)  # the two axes of G


def dno(logp: Array, ref_logp: Array, rewards: Array, valid: Array | None = None, *, beta: float = 0.1) -> Array:
    r"""Direct Nash optimisation: regression of all pairs of a group onto the preference that their rewards imply.

    $$\ell = \mathrm{mean}_{i < j} -\sigma(r_i - r_j) \log\sigma(z_{ij}) - \sigma(r_j - r_i) \log\sigma(-z_{ij}), \qquad
    z_{ij} = \beta \log\frac{\pi(y_i)}{\pi_t(y_i)} - \beta \log\frac{\pi(y_j)}{\pi_t(y_j)}$$

    Its minimum over all policies is $\pi_t \exp(r / \beta) / Z$, a step of soft policy iteration. With the win rate
    against $\pi_t$ as reward, the average of the iterates approaches the Nash equilibrium of the preference.

    Args:
        logp: `[P, G]` float, nats; log-probs of the answers under the trained policy, summed over tokens.
        ref_logp: `[P, G]` float, nats; under the policy of the iteration's start. A constant.
        rewards: `[P, G]` float, win rates in [0, 1], say (`advantages.win_rate`). A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        beta: $\eta$ of the paper, above 0.

    Returns:
        `[P]`, float32 or wider: the loss of each prompt; 0 with zero gradient where it has no pair.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `beta` is not above 0.

    Example:
        >>> loss = dno(jnp.array([[0.2, 0.0]]), jnp.zeros((1, 2)), jnp.array([[0.7, 0.3]]), beta=1.0)
        >>> round(float(loss[0]), 6)
        0.678401

    Reference: Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences
    (arXiv 2404.03715), algorithm 1.
    """
    check_positive("beta", beta)
    logp, known, (ref_logp, rewards) = prepare_group(logp, valid, ref_logp=ref_logp, rewards=rewards)
    ratio = beta * (logp - ref_logp)
    margin = ratio[:, :, None] - ratio[:, None, :]
    loss = smoothed(margin, jax.nn.sigmoid(rewards[:, None, :] - rewards[:, :, None]))
    once = known[:, :, None] & known[:, None, :] & jnp.triu(jnp.ones(margin.shape[1:], bool), 1)
    return masked.mean(loss, once, _PAIR)


def listwise(
    logp: Array,
    ref_logp: Array,
    rewards: Array,
    valid: Array | None = None,
    *,
    beta: float = 0.1,
    temperature: float = 1.0,
) -> Array:
    r"""The distribution over a group's answers that their scores imply, learned by that of their implicit rewards.

    $$\ell = -\sum_i q_i \log p_i, \qquad q = \mathrm{softmax}(r / \tau), \quad
    p = \mathrm{softmax}\Big(\beta \log\frac{\pi}{\pi_{ref}}\Big)$$

    Args:
        logp: `[P, G]` float, nats; log-probs of the answers under the trained policy, summed over tokens.
        ref_logp: `[P, G]` float, nats; under the reference. A constant.
        rewards: `[P, G]` float, scores. A constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.
        beta: scale of the implicit reward, above 0.
        temperature: $\tau$, in units of the score, above 0: near 0 only the best answer counts.

    Returns:
        `[P]`, float32 or wider; 0 with zero gradient where fewer than two answers count.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape, or `beta` or `temperature` is not above 0.

    Example:
        >>> loss = listwise(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.array([[2.0, 1.0, 0.0]]))
        >>> round(float(loss[0]), 4)
        1.0986

    Reference: Positive-Unlabeled Reinforcement Learning Distillation for On-Premise Small Models (arXiv 2601.20687),
    in the form that its abstract describes; the scores there are the student's own, beside an answer of a teacher.
    """
    check_positive("beta", beta)
    check_positive("temperature", temperature)
    logp, known, (ref_logp, rewards) = prepare_group(logp, valid, ref_logp=ref_logp, rewards=rewards)
    low = jnp.finfo(logp.dtype).min
    target = jax.nn.softmax(jnp.where(known, rewards / temperature, low), axis=1)
    log_share = jax.nn.log_softmax(jnp.where(known, beta * (logp - ref_logp), low), axis=1)
    loss = -jnp.sum(jnp.where(known, target * log_share, 0.0), axis=1)
    return jnp.where(jnp.sum(known, axis=1) > 1, loss, 0.0)


def inpo(
    chosen_logp: Array,
    rejected_logp: Array,
    ref_chosen_logp: Array,
    ref_rejected_logp: Array,
    previous_chosen_logp: Array,
    previous_rejected_logp: Array,
    *,
    eta: float = 7.5e-3,
    tau: float = 2.5e-3,
) -> Array:
    r"""Iterative Nash policy optimisation: a step of mirror descent in the preference game, as a regression on pairs.

    $$\ell = \Big(h - \frac{\tau}{\eta} h_{ref} - \frac{\eta - \tau}{\eta} h_t - \frac{1}{2 \eta}\Big)^2, \qquad
    h = \log\pi(y_w) - \log\pi(y_l)$$

    and likewise of the reference and of the policy of the iteration's start. Its minimum over pairs that $\pi_t$
    sampled and a preference labelled is the exact step. With $\tau = \eta$ it is `ipo` with `beta` $\eta$.

    Args:
        chosen_logp: `[B]` float, nats; log-prob of the chosen answer under the trained policy, summed over tokens.
        rejected_logp: `[B]`, of the rejected one.
        ref_chosen_logp: `[B]`, under the reference, to which the game's KL holds. A constant.
        ref_rejected_logp: `[B]`, a constant.
        previous_chosen_logp: `[B]`, under the policy of the iteration's start. A constant.
        previous_rejected_logp: `[B]`, a constant.
        eta: $\eta$, inverse step size of the mirror descent, above 0.
        tau: $\tau$ in [0, eta], strength of the KL to the reference.

    Returns:
        `[B]`, float32 or wider, nats squared.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `eta` is not above 0, or `tau` outside [0, eta].

    Example:
        >>> two, one, zero = jnp.array([2.0]), jnp.array([1.0]), jnp.zeros(1)
        >>> round(float(inpo(two, zero, one, zero, 1.5 * one, zero)[0]), 2)
        4356.0

    Reference: Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning
    (arXiv 2407.00617).
    """
    check_positive("eta", eta)
    if isinstance(tau, float | int) and isinstance(eta, float | int) and not 0 <= tau <= eta:
        raise ValueError(f"tau must be in [0, eta={eta}], got {tau}; with tau = eta the step starts at the reference")
    chosen, rejected = log_ratios(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    since_chosen, since_rejected = log_ratios(chosen_logp, rejected_logp, previous_chosen_logp, previous_rejected_logp)
    share = tau / eta
    h = share * (chosen - rejected) + (1 - share) * (since_chosen - since_rejected)
    return jnp.square(h - 1 / (2 * eta))
