"""Methods for rollouts that are cut into windows: a long response is trained on before it has ended."""

from __future__ import annotations

import jax.numpy as jnp

from jaxrl_post import advantages, masked
from jaxrl_post.methods.actor_critic import ppo
from jaxrl_post.methods.policy_gradient import logp_at_start
from jaxrl_post.types import FINISH_NONE, AggregationMode, Method, Rollouts, Stats, Targets, Term


def t_ppo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    value_clip: float | None = None,
    value_weight: float = 1.0,
    aggregation: AggregationMode = "token_mean",
    horizon: int | None = None,
) -> Method:
    r"""Truncated PPO: responses stop after a window of tokens, and are trained on whether they have ended or not.

    $$\delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad
    R_t = \sum_{k \ge 0} \gamma^k r_{t+k}$$

    with $V_l = 0$ after the last token of a response that has ended, and $V_l = V_{l-1}$ after that of one that is
    still running (`rollouts.finish` is `FINISH_NONE`). A running response has no reward yet: what its group's column of
    `reward` holds is not read.

    The two losses have masks of their own. The policy learns from the tokens of the newest window, those whose
    `version` is the newest one of the batch, so that each token is trained on once; older ones are context. The critic
    learns from all tokens of responses that have ended, and from none of the others. Where every response ends within
    its window this is `ppo` whose critic has $\lambda = 1$. In a run, `rollout.tokens_per_step` is the window.

    Args:
        clip_low: lower clip bound.
        clip_high: upper clip bound.
        gamma: discount per action token.
        lam: $\lambda$ of the policy's advantages; the critic's is 1.
        whiten: give the advantages mean 0 and variance 1 over the newest window.
        value_clip: values may move this far from those of the start of the step; None for no clip.
        value_weight: factor of the value loss.
        aggregation: see `losses.aggregate`; over the mask of each loss.
        horizon: fixed length for `aggregation="seq_mean_token_sum_norm"`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`. The ratio is to `rollouts.logp`, which must be that of
        the policy that sampled the token.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(t_ppo().trains)
        ['critic', 'policy']

    Reference: Truncated Proximal Policy Optimization (arXiv 2506.15050). The bootstrap with the last value and the two
    masks are the paper's; the defaults of `clip_high` and `lam` are this library's reading of it.
    """
    base = ppo(
        clip_low=clip_low,
        clip_high=clip_high,
        gamma=gamma,
        lam=lam,
        value_clip=value_clip,
        value_weight=value_weight,
        aggregation=aggregation,
        horizon=horizon,
    )

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        del key
        mask, values = rollouts.valid_mask, stats["critic"].value
        ended = rollouts.finish != FINISH_NONE
        newest = jnp.max(jnp.where(mask != 0, rollouts.version, -1))
        window = mask * (rollouts.version == newest)
        advantage, returns = advantages.decoupled_gae(
            advantages.on_last_token(jnp.where(ended, rollouts.reward, 0.0), mask),
            values,
            mask,
            gamma=gamma,
            lam_policy=lam,
            lam_value=1.0,
            truncated=~ended.reshape(-1),
            whiten=False,
        )
        advantage = masked.whiten(advantage, window) if whiten else jnp.where(window != 0, advantage, 0.0)
        extras = {"old_values": values, "finished": mask * ended.reshape(-1, 1)}
        return Targets(advantage, window, logp_at_start(rollouts, stats, "rollout"), returns, extras), state

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms = base.loss(stats, rollouts, targets)
        return terms | {"value": terms["value"]._replace(mask=targets.extras["finished"])}

    return base._replace(targets=targets, loss=loss, partial=True)
