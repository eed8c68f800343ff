"""Losses on pairs of answers that read the trained policy alone: no reference is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.losses.preference import check_beta, check_label_smoothing, smoothed
from jaxrl_post.types import Array

_MEAN = "average log-probs over the tokens with masked.mean(logp, mask, axis=1)"


def _pair(chosen_logp: Array, rejected_logp: Array, hint: str) -> tuple[Array, Array]:
    chosen_logp, rejected_logp = masked.as_float(chosen_logp), masked.as_float(rejected_logp)
    masked.check_axes("chosen_logp", chosen_logp, "[B]", hint)
    masked.check_like("rejected_logp", rejected_logp, "chosen_logp", chosen_logp)
    return chosen_logp, rejected_logp


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
        >>> round(float(simpo(jnp.array([-1.0]), jnp.array([-1.5]), beta=2.0, gamma=1.0)[0]), 6)
        0.693147

    Reference: SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv 2405.14734).
    """
    check_beta(beta, "the paper uses 2.0 to 2.5")
    chosen, rejected = _pair(chosen_logp, rejected_logp, _MEAN)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def cpo(
    chosen_logp: Array,
    rejected_logp: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> Array:
    r"""Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen answer.

    $$\ell = -(1 - \epsilon) \log\sigma(z) - \epsilon \log\sigma(-z) - w \log\pi(y_w), \qquad
    z = \beta (\log\pi(y_w) - \log\pi(y_l))$$

    Args:
        chosen_logp: `[B]` float, nats; log-prob of the chosen sequence under the trained policy, summed over tokens.
        rejected_logp: `[B]` float, nats; of the rejected one.
        beta: scale of the margin, above 0.
        label_smoothing: $\epsilon$ in [0, 0.5).
        nll_weight: `w`, at least 0. The authors' code takes the mean over tokens in the last term: for that, 0 here
            and `nll` of the chosen tokens beside it, as `methods.cpo` does.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, `beta` is not above 0, `label_smoothing` is outside
            [0, 0.5), or `nll_weight` is negative.

    Example:
        >>> pair = jnp.array([-10.0]), jnp.array([-12.0])
        >>> [round(float(cpo(*pair, nll_weight=w)[0]), 6) for w in (0.0, 1.0)]
        [0.598139, 10.598139]

    Reference: Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation
    (arXiv 2401.08417).
    """
    check_beta(beta)
    check_label_smoothing(label_smoothing)
    check_at_least("nll_weight", nll_weight, 0)
    chosen, rejected = _pair(chosen_logp, rejected_logp, "sum log-probs over the tokens with masked.sum")
    return smoothed(beta * (chosen - rejected), label_smoothing) - nll_weight * chosen


def log_odds(logp: Array) -> Array:
    r"""$\log \frac{p}{1 - p}$ of a probability that is given by its logarithm.

    Args:
        logp: float of any shape, nats, at most 0.

    Returns:
        The shape of `logp`, nats, float32 or wider; a probability that rounds to 1 counts as the largest below it.

    Example:
        >>> round(float(log_odds(jnp.log(0.75))), 5)  # log 3
        1.09861

    Reference: ORPO: Monolithic Preference Optimization without Reference Model (arXiv 2403.07691), equation 4.
    """
    logp = masked.as_float(logp)
    logp = jnp.minimum(logp, -jnp.finfo(logp.dtype).eps)
    near = logp > -0.6931471805599453  # which of the two is exact
    rest = jnp.where(
        near, jnp.log(-jnp.expm1(jnp.where(near, logp, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logp)))
    )
    return logp - rest


def orpo(chosen_logp: Array, rejected_logp: Array, *, beta: float = 0.1) -> Array:
    r"""Odds ratio preference optimisation: the likelihood of the chosen answer, and the odds over the rejected one.

    $$\ell = -\log P_w - \beta \log\sigma\Big(\log\frac{P_w}{1 - P_w} - \log\frac{P_l}{1 - P_l}\Big), \qquad
    \log P = \frac{1}{|y|} \log\pi(y)$$

    Args:
        chosen_logp: `[B]` float, nats; log-prob of the chosen sequence under the trained policy, mean over tokens.
        rejected_logp: `[B]` float, nats; of the rejected one.
        beta: $\lambda$ of the paper, weight of the odds ratio, at least 0.

    Returns:
        `[B]`, float32 or wider. The first term is of the answer alone, as in the paper; TRL's is of the prompt too.

    Raises:
        ValueError: if the inputs are not `[B]` of one length, or `beta` is negative.

    Example:
        >>> round(float(orpo(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), beta=0.1)[0]), 6)
        0.721915

    Reference: ORPO: Monolithic Preference Optimization without Reference Model (arXiv 2403.07691), equation 6.
    """
    check_at_least("beta", beta, 0)
    chosen, rejected = _pair(chosen_logp, rejected_logp, _MEAN)
    return -chosen - beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))
