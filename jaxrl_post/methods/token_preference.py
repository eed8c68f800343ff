"""Methods that learn from pairs whose tokens do not all count alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_post import losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.methods.preference import PairLoss, by_pair, from_pairs
from jaxrl_post.types import Array, Method, Rollouts, Stats


def cpl(
    *,
    beta: float = 0.1,
    bias: float = 0.5,
    gamma: float = 1.0,
    reference: bool = False,
    nll_weight: float = 0.0,
) -> Method:
    r"""CPL: contrastive preferences between segments of behaviour, without a reward or a value.

    $$L = -\log\sigma\big(\beta (\ell_c - \lambda \ell_r)\big), \qquad \ell = \sum_t \gamma^t \log\pi(a_t | s_t)$$

    Args:
        beta: temperature of the entropy ($\alpha$ of the paper, 0.1 there).
        bias: $\lambda$ in (0, 1]: below 1 both segments together must not become unlikely.
        gamma: $\gamma$, discount per token of the mask.
        reference: whether $\ell$ is of log-ratios to the role `reference`, the paper's form with a KL (there with
            `beta` 0.2 and `bias` 0.75); with `bias=1` that is DPO.
        nll_weight: weight of the negative log-likelihood of the chosen segments.

    Returns:
        A `Method` on groups of two, whose smallest unit is the group.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(cpl().needs), sorted(cpl(reference=True).needs)
        (['policy'], ['policy', 'reference'])

    Reference: Contrastive Preference Learning: Learning from Human Feedback without RL (arXiv 2310.13639).
    """
    checks.above("beta", beta, 0)
    checks.above("bias", bias, 0)
    checks.within("bias", bias, 0, 1)
    checks.within("gamma", gamma, 0, 1)
    roles = ["policy", "reference"] if reference else ["policy"]

    def segments(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        logp = stats["policy"].logp
        if reference:
            logp = logp - jax.lax.stop_gradient(stats["reference"].logp)
        return by_pair(losses.segment_logp(logp, mask, gamma=gamma), rollouts)

    def rewards(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        chosen, rejected = segments(stats, rollouts, mask)
        return beta * chosen, beta * rejected

    def loss(stats: Stats, rollouts: Rollouts, mask: Array) -> Array:
        return losses.cpl(*segments(stats, rollouts, mask), beta=beta, bias=bias)

    needs = {role: frozenset({"logp"}) for role in roles}
    return from_pairs(PairLoss("cpl", rewards, loss, 0.0, needs), nll_weight=nll_weight)


def tgdpo(*, beta: float = 0.1, alpha: float = 0.5, floor: float | None = None) -> Method:
    r"""TGDPO: DPO whose tokens may leave the reference as far as a guide, trained before, has left it.

    $$L = -\log\sigma\Big(\beta \sum_t f_t \log\frac{\pi}{\pi_{ref}}(y_{c,t})
    - \beta \sum_t f_t \log\frac{\pi}{\pi_{ref}}(y_{r,t})\Big), \qquad
    f_t = 1 \pm \alpha \beta \log\frac{\pi_{guide}}{\pi_{ref}}$$

    Args:
        beta: inverse temperature of the implicit reward.
        alpha: $\alpha$; 0 gives DPO. The paper takes 0.5, and 2 in some settings.
        floor: least weight of a token, see `losses.token_guidance`.

    Returns:
        A `Method` on groups of two that reads the roles `reference` and `guide`: the policy of a run of `dpo` or
        `simpo` on the same pairs.

    Raises:
        ValueError: for a keyword out of its range.

    Example:
        >>> sorted(tgdpo().needs)
        ['guide', 'policy', 'reference']

    Reference: TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization
    (arXiv 2506.14574).
    """
    checks.above("beta", beta, 0)
    checks.within("alpha", alpha, 0)
    options: dict[str, Any] = {"beta": beta, "alpha": alpha, "floor": floor}

    def rewards(stats: Stats, rollouts: Rollouts, mask: Array) -> tuple[Array, Array]:
        chosen = jnp.arange(mask.shape[0]) % 2 == 0
        reference = stats["reference"].logp
        weights = losses.token_guidance(stats["guide"].logp, reference, chosen, mask, **options)
        tokens = losses.implicit_reward(stats["policy"].logp, jax.lax.stop_gradient(reference), beta=beta)
        return by_pair(masked.sum(weights * tokens, mask, 1), rollouts)

    def loss(stats: Stats, rollouts: Rollouts, mask: Array) -> Array:
        won, lost = rewards(stats, rollouts, mask)
        return -jax.nn.log_sigmoid(won - lost)

    logp = frozenset({"logp"})
    needs = {"policy": logp, "reference": logp, "guide": logp}
    return from_pairs(PairLoss("tgdpo", rewards, loss, 0.0, needs))
