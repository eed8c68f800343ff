"""Which tokens of a preferred answer matter: those that a model finds likelier when it is asked to do better."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import as_constant
from jaxrl_post.losses.policy import log_ratio
from jaxrl_post.types import Array


def token_reward(better_logp: Array, worse_logp: Array, mask: Array) -> Array:
    r"""How much likelier a token is to one who was asked to do better than to one who was asked to do worse.

    $$\hat r_t = \sigma\big(\log\pi_{ref}(y_t \mid x_{better}, y_{<t})
    - \log\pi_{ref}(y_t \mid x_{worse}, y_{<t})\big) - \tfrac12$$

    Args:
        better_logp: `[B, T]` float, nats; log-prob of the token after a prompt that asks for a better answer.
        worse_logp: `[B, T]` float, nats; after one that asks for a worse answer.
        mask: `[B, T]`, nonzero on the tokens of the answer.

    Returns:
        `[B, T]`, float32 or wider, in [-0.5, 0.5], without gradient; 0 where the mask is.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> rewards = token_reward(jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.0]]), jnp.ones((1, 2)))
        >>> [round(r, 5) for r in rewards[0].tolist()]
        [0.23106, 0.0]

    Reference: T-REG: Preference Optimization with Token-Level Reward Regularization (arXiv 2412.02685).
    """
    better_logp, mask = masked.as_float(better_logp), jnp.asarray(mask)
    masked.check_axes("better_logp", better_logp, "[B, T]")
    for name, x in (("mask", mask), ("worse_logp", worse_logp)):
        masked.check_like(name, x, "better_logp", better_logp)
    ratio = log_ratio(better_logp, worse_logp)
    return jax.lax.stop_gradient(jnp.where(mask != 0, jax.nn.sigmoid(ratio) - 0.5, 0.0))


def token_regularization(
    logp: Array, token_rewards: Array, mask: Array, *, beta: float = 0.1, normalize_length: bool = False
) -> Array:
    r"""Raises the tokens of an answer whose reward is positive and lowers the others.

    $$L_{REG}(y) = -\beta \sum_t m_t\, \hat r_t \log\pi(y_t \mid x, y_{<t})$$

    It is the inner product of the rewards with what DPO implies of tokens, $\beta \log(\pi / \pi_{ref})$, less a
    constant.

    Args:
        logp: `[B, T]` float, nats; log-probs under the trained policy.
        token_rewards: `[B, T]` float, of `token_reward`. A constant.
        mask: `[B, T]`, nonzero on the tokens of the answer. A constant.
        beta: scale of the implicit reward.
        normalize_length: divide by the number of tokens, as SimPO's implicit reward does.

    Returns:
        `[B]`, float32 or wider; 0 for an answer without tokens.

    Raises:
        ValueError: if the arrays are not `[B, T]` of one shape.

    Example:
        >>> one = jnp.ones((1, 2))
        >>> round(float(token_regularization(jnp.array([[-1.0, -4.0]]), jnp.array([[0.2, -0.1]]), one)[0]), 6)
        -0.02

    Reference: T-REG: Preference Optimization with Token-Level Reward Regularization (arXiv 2412.02685).
    """
    logp = masked.as_float(logp)
    masked.check_axes("logp", logp, "[B, T]")
    token_rewards, mask = as_constant("token_rewards", token_rewards, logp), as_constant("mask", mask, logp)
    weighted = jnp.where(mask != 0, token_rewards, 0.0) * jnp.where(mask != 0, logp, 0.0)
    reduce = masked.mean if normalize_length else masked.sum
    return -beta * reduce(weighted, mask, 1)


def t_reg(margin: Array, chosen: Array, rejected: Array) -> Array:
    r"""T-REG's regulariser of a pair: that of both answers, weighted by how far the pair is from being learned.

    $$\ell = \mathrm{sg}(\sigma(-h))\, (L_{REG}(y_w) + L_{REG}(y_l))$$

    The weight is the one that the gradient of the pair's logistic loss $-\log\sigma(h)$ has. The loss of T-REG is that
    loss plus $\alpha\,\ell$, with $\alpha$ of 0.1 to 0.5.

    Args:
        margin: `[B]` float; $h$, the argument of the pair's logistic loss: for DPO the difference of implicit rewards,
            for SimPO that less $\gamma$. A constant.
        chosen: `[B]` float; `token_regularization` of the chosen answer.
        rejected: `[B]` float; of the rejected one.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: if the inputs are not `[B]` of one length.

    Example:
        >>> t_reg(jnp.zeros(1), jnp.array([0.1]), jnp.array([0.3])).tolist()
        [0.20000000298023224]

    Reference: T-REG: Preference Optimization with Token-Level Reward Regularization (arXiv 2412.02685); the formula is
    that of a published note on the paper, whose weight follows from the gradient of its DPO loss.
    """
    chosen, rejected = masked.as_float(chosen), masked.as_float(rejected)
    masked.check_axes("chosen", chosen, "[B]", "one number per pair")
    masked.check_like("rejected", rejected, "chosen", chosen)
    return jax.nn.sigmoid(-as_constant("margin", margin, chosen)) * (chosen + rejected)
