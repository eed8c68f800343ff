"""Methods whose tokens, places or agents have rewards of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses, rewards
from jaxrl_post.methods import checks
from jaxrl_post.methods.actor_critic import CriticOptions, with_critic
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.methods.preference import by_pair, from_pairs, log_ratio_pairs, pair_mask, simpo_pairs
from jaxrl_post.methods.probing import insert_after_prompt, removed_again
from jaxrl_post.methods.signals import Advantage, Signals, stateless
from jaxrl_post.models.group_divergence import GROUP_FIELDS, DivergenceForm
from jaxrl_post.types import Array, Method, Rollouts, Stats, Targets, Term


def rto(
    *,
    beta1: float = 0.05,
    beta2: float = 0.01,
    clip: float | None = 0.05,
    max_reward: float | None = 10.0,
    **options: Unpack[CriticOptions],
) -> Method:
    r"""RTO: PPO with a critic whose every token is rewarded by what a policy trained by DPO thinks of it.

    $$R_t = \mathrm{clip}\Big(\beta_1 \log \frac{\pi_{dpo}}{\pi_{ref}}, -c, c\Big)_t
    - \beta_2 \Big(\log \frac{\pi_{old}}{\pi_{ref}}\Big)_t + [t = \mathrm{last}]\, r$$

    Args:
        beta1: $\beta_1$; 0 gives PPO with the KL in its reward.
        beta2: $\beta_2$, weight of the KL.
        clip: $c$, in units of the reward; None for no clip.
        max_reward: bound of $|r|$; None for none.
        **options: `clip_low` (0.2), `clip_high` (0.2), `gamma` (1.0), `lam` (0.95) and the others of `ppo`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`, and reads `reference` and `dpo`: the policy of a run of
        `dpo` that began from the reference.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(rto().needs)
        ['critic', 'dpo', 'policy', 'reference']

    Reference: DPO Meets PPO: Reinforced Token Optimization for RLHF (arXiv 2404.18922).
    """
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        checks.within(name, value, 0)
    for name, bound in (("clip", clip), ("max_reward", max_reward)):
        checks.above(name, bound, 0)
    scale = {"beta1": beta1, "beta2": beta2, "clip": clip, "max_reward": max_reward}

    def token_rewards(rollouts: Rollouts, stats: Stats, mask: Array, old_logp: Array) -> Array:
        return rewards.rto(rollouts.reward, stats["dpo"].logp, stats["reference"].logp, old_logp, mask, **scale)

    return with_critic(token_rewards, ("dpo", "reference"), **options)


def t_reg(
    *,
    better: Sequence[int],
    worse: Sequence[int],
    alpha: float = 0.25,
    loss: Literal["dpo", "simpo"] = "dpo",
    beta: float | None = None,
    gamma: float | None = None,
) -> Method:
    r"""T-REG: DPO or SimPO, told which tokens matter by the reference model under two opposite prompts.

    $$L = L_{pair} + \alpha\, \mathrm{sg}(\sigma(-h)) \sum_{y \in \{y_c, y_r\}}
    -\beta \sum_t \hat r_t \log\pi(y_t), \qquad
    \hat r_t = \sigma\Big(\log \frac{\pi_{ref}(y_t | x_{better})}{\pi_{ref}(y_t | x_{worse})}\Big) - \tfrac12$$

    with $h$ the margin of the pair's implicit rewards; with `loss="simpo"` the sums over tokens are means.

    Args:
        better: token ids that are put between prompt and answer to ask for a better answer; in YAML `{text: "..."}`.
        worse: those that ask for a worse one.
        alpha: $\alpha$, weight of the regulariser; 0 gives DPO or SimPO.
        loss: `"dpo"` or `"simpo"`.
        beta: scale of the implicit reward; None for 0.1 (DPO) or 2.0 (SimPO).
        gamma: SimPO's target of the margin; None for 1.0.

    Returns:
        A `Method` on groups of two that scores each pair twice more, under the role `reference`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(t_reg(better=[7], worse=[8]).needs)
        ['policy', 'probe/better', 'probe/worse', 'reference']

    Reference: T-REG: Preference Optimization with Token-Level Reward Regularization (arXiv 2412.02685).
    """
    checks.one_of("loss", loss, Literal["dpo", "simpo"])
    checks.within("alpha", alpha, 0)
    prompts = {"better": tuple(better), "worse": tuple(worse)}
    for name, tokens in prompts.items():
        if not tokens:
            raise ValueError(f"{name} must hold at least one token id; in YAML give it as {{text: ...}}")
    checks.applies(loss == "simpo", f"loss={loss!r}", gamma=gamma)
    if loss == "dpo":
        kind = log_ratio_pairs("dpo", beta=0.1 if beta is None else beta)
    else:
        kind = simpo_pairs(beta=2.0 if beta is None else beta, gamma=1.0 if gamma is None else gamma)
    scale = {"beta": (0.1 if loss == "dpo" else 2.0) if beta is None else beta, "normalize_length": loss == "simpo"}
    base = from_pairs(kind)

    def probes(rollouts: Rollouts) -> dict[str, tuple[Rollouts, str]]:
        return {name: (insert_after_prompt(rollouts, tokens), "reference") for name, tokens in prompts.items()}

    def targets(state, rollouts: Rollouts, stats: Stats, key) -> tuple[Targets, tuple[()]]:
        found, state = base.targets(state, rollouts, stats, key)
        asked = {name: removed_again(stats[f"probe/{name}"].logp, rollouts) for name in prompts}
        token_rewards = losses.token_reward(asked["better"], asked["worse"], found.mask)
        return found._replace(extras={"token_rewards": token_rewards}), state

    def with_regularizer(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        mask = targets.mask
        won, lost = kind.rewards(stats, rollouts, mask)
        each = losses.token_regularization(stats["policy"].logp, targets.extras["token_rewards"], mask, **scale)
        value = losses.t_reg(won - lost - kind.margin, *by_pair(each, rollouts))
        extra = {"token_regularization": Term(value, pair_mask(rollouts), "token_mean", weight=alpha)}
        return base.loss(stats, rollouts, targets) | extra

    logp = frozenset({"logp"})
    needs = {"reference": frozenset[str](), **base.needs, "probe/better": logp, "probe/worse": logp}
    return base._replace(targets=targets, loss=with_regularizer, needs=needs, probes=probes, contrasts=False)


def tw_grpo(
    *,
    alpha: float = 1.7,
    divergence: DivergenceForm = "log_mean",
    eps: float = 1e-4,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""TW-GRPO: GRPO whose tokens weigh more where the group's next-token distributions differ.

    $$A_{g,t} = w_t\, \mathrm{GRPO}(r)_g, \qquad
    w_t = 1 + (\alpha - 1) \frac{D_t - \min_t D}{\max_t D - \min_t D}$$

    The weight is positive, so that it is the same inside the advantage as before the clipped loss. A KL to the
    reference, which the paper leaves out, is not weighted.

    Args:
        alpha: $\alpha$, the largest weight; 1 gives GRPO.
        divergence: `"log_mean"`, what the authors run, or `"jensen_shannon"`, see `models.group_divergence`.
        eps: added to the group's standard deviation.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` whose smallest unit is the group; groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(tw_grpo().needs["policy"])
        ['group_log_divergence', 'logp']

    Reference: Reinforcing Video Reasoning with Focused Thinking (arXiv 2505.24718).
    """
    checks.within("alpha", alpha, 1)
    checks.within("eps", eps, 0)
    checks.one_of("divergence", divergence, DivergenceForm)
    field = next(name for name, form in GROUP_FIELDS.items() if form == divergence)

    def apply(state, s: Signals):
        by_group = (x.reshape(s.rollouts.num_prompts, -1) for x in (getattr(s.stats["policy"], field), s.mask))
        weights = losses.position_weights(*by_group, alpha=alpha).reshape(s.mask.shape)
        return weights * advantages.per_token(advantages.grpo(s.reward, s.valid, eps=eps), s.mask), state

    credit = Advantage(apply, needs={"policy": frozenset({"logp", field})}, min_group=2)
    return clipped(credit, {}, options)._replace(unit="group")


def comam(
    *,
    local: Sequence[str],
    shared: str | None = None,
    normalize_std: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""CoMAM: agents in a row, each with its own reward and as much of the common one as its own ranks alike.

    $$A_{n,g} = \mathrm{GRPO}_g(r_n + w_n r), \qquad w_n = \mathrm{softmax}_n(\mathrm{NDCG}(r_n; r))$$

    Args:
        local: names in `rollouts.rewards` of the agents' own rewards, `[P, G]` each, in the order of the agents'
            numbers.
        shared: name of the reward that all have; None for the total `rollouts.reward`.
        normalize_std: divide by the group's standard deviation.
        ddof: of that standard deviation.
        eps: added to it.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but
            for `kl_in`.

    Returns:
        A `Method` that reads `rollouts.extras["agent"]`, `[B, T]` int from 0; groups of at least two. Tokens of other
        agents have advantage 0.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply; when traced, for a reward that is not
            there.

    Example:
        >>> comam(local=["extract", "profile", "answer"]).min_group
        2

    Reference: Collaborative Multi-Agent Optimization for Personalized Memory System (arXiv 2603.12631).
    """
    if isinstance(local, str):
        raise ValueError(f"local must be a list of components of the reward, one for each agent; give [{local!r}]")
    names = tuple(local)
    if not names:
        raise ValueError("local must name at least one component of the reward, one for each agent")
    checks.kl_in_loss(options, "agents are ranked by rewards as they were given")

    def apply(s: Signals) -> Array:
        agent = s.extra("agent", "it names [B, T] the agent of every token")
        common = s.reward if shared is None else s.component(shared)
        own = jnp.stack([s.component(name) for name in names])
        found = advantages.comam(own, common, s.valid, normalize_std=normalize_std, ddof=ddof, eps=eps)
        by_agent = found.reshape(len(names), -1).T
        known = (agent >= 0) & (agent < len(names))
        return jnp.where(known, jnp.take_along_axis(by_agent, jnp.clip(agent, 0, len(names) - 1), axis=1), 0.0)

    return clipped(stateless(apply, min_group=2), {}, options)
