"""Credit for agents that work one after the other: each by its own reward and a share of the one that all have."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.group import grpo
from jaxrl_post.advantages.layout import check_rewards
from jaxrl_post.types import Array


def ndcg(scores: Array, relevance: Array, valid: Array | None = None) -> Array:
    r"""How well scores rank a group by its relevance: normalised discounted cumulative gain.

    $$v = \frac{\mathrm{DCG}(\text{by score})}{\mathrm{DCG}(\text{by relevance})}, \qquad
    \mathrm{DCG} = \sum_{k=1}^G \frac{rel_{(k)}}{\log_2(k + 1)}$$

    Args:
        scores: `[..., G]` float; the largest is ranked first, of equal ones the one that comes first.
        relevance: `[..., G]` float, not negative.
        valid: `[..., G]` bool, False where the member does not count; None for all.

    Returns:
        `[...]`, float32 or wider, in [0, 1], without gradient; 0 where no member has any relevance.

    Raises:
        ValueError: if the arrays differ in shape.

    Example:
        >>> round(float(ndcg(jnp.array([0.9, 0.5, 0.1]), jnp.array([0.0, 1.0, 1.0]))), 5)
        0.69343

    Reference: Cumulated gain-based evaluation of IR techniques (Järvelin and Kekäläinen, 2002).
    """
    scores, relevance = (jax.lax.stop_gradient(masked.as_float(x)) for x in (scores, relevance))
    masked.check_like("relevance", relevance, "scores", scores)
    counts = jnp.ones(scores.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", counts, "scores", scores)
    relevance = jnp.where(counts, relevance, 0.0)
    discount = 1 / jnp.log2(jnp.arange(2, scores.shape[-1] + 2, dtype=relevance.dtype))

    def gain(by: Array) -> Array:
        order = jnp.argsort(jnp.where(counts, -by, jnp.inf), axis=-1, stable=True)
        return jnp.sum(jnp.take_along_axis(relevance, order, axis=-1) * discount, axis=-1)

    best = gain(relevance)
    return jnp.where(best > 0, gain(scores) / jnp.where(best > 0, best, 1.0), 0.0)


def agent_weights(local: Array, rewards: Array, valid: Array | None = None) -> Array:
    r"""Shares of agents in the common reward, by how well their own rewards rank the group as it does.

    $$w_n = \mathrm{softmax}_n(v_n), \qquad
    v_n = \mathrm{NDCG}(\text{by } r_n, \text{relevance } r - \min(0, \min_g r))$$

    The paper's rewards are not negative; in a group where one is, the least has no relevance.

    Args:
        local: `[N, P, G]` float, the own reward of each agent.
        rewards: `[P, G]` float, the reward that all agents have.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.

    Returns:
        `[N, P]`, float32 or wider, adding up to 1 over agents; equal where no rollout of the group has a reward, or
        all have the same negative one.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> local = jnp.array([[[0.9, 0.5, 0.1]], [[0.0, 1.0, 2.0]], [[0.0, 2.0, 1.0]]])
        >>> [round(float(w), 4) for w in agent_weights(local, jnp.array([[0.0, 1.0, 1.0]]))[:, 0]]
        [0.269, 0.3655, 0.3655]

    Reference: Collaborative Multi-Agent Optimization for Personalized Memory System (arXiv 2603.12631).
    """
    local, rewards, valid = _prepare(local, rewards, valid)
    relevance = rewards - jnp.minimum(jnp.min(rewards, axis=1, keepdims=True), 0.0)  # of what is not valid 0
    values = jax.vmap(lambda scores: ndcg(scores, relevance, valid))(local)
    return jax.nn.softmax(values, axis=0)


def comam(
    local: Array,
    rewards: Array,
    valid: Array | None = None,
    *,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Array:
    r"""CoMAM: each agent is judged within the group by its own reward and its share of the one that all have.

    $$A_{n,g} = \mathrm{GRPO}_g(r_n + w_n r)$$

    with the weights of `agent_weights`.

    Args:
        local: `[N, P, G]` float, the own reward of each agent.
        rewards: `[P, G]` float, the reward that all agents have, e.g. whether the answer was right.
        valid: `[P, G]` bool, False where the rollout does not count; None for all.
        normalize_std: False leaves the difference from the group's mean undivided.
        ddof: 1 for the unbiased standard deviation, 0 for the population's; the paper does not say which.
        eps: added to the standard deviation, in units of the reward.

    Returns:
        `[N, P, G]`, float32 or wider; 0 where not valid and in a group with one valid rollout.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> local = jnp.array([[[1.0, 0.0]], [[0.0, 0.0]]])
        >>> comam(local, jnp.array([[0.0, 0.0]]), normalize_std=False).tolist()
        [[[0.5, -0.5]], [[0.0, 0.0]]]

    Reference: Collaborative Multi-Agent Optimization for Personalized Memory System (arXiv 2603.12631).
    """
    local, rewards, valid = _prepare(local, rewards, valid)
    final = local + agent_weights(local, rewards, valid)[:, :, None] * rewards
    return jax.vmap(lambda r: grpo(r, valid, normalize_std=normalize_std, ddof=ddof, eps=eps))(final)


def _prepare(local: Array, rewards: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    rewards, valid = check_rewards(rewards, valid)
    local = masked.as_float(local)
    if local.ndim != 3 or local.shape[1:] != rewards.shape or not local.shape[0]:
        raise ValueError(
            f"local must be [N, P, G], one [P, G] = {list(rewards.shape)} for each of at least one agent, got shape "
            f"{local.shape}"
        )
    return local, jnp.where(valid, rewards, 0.0), valid
