"""Methods against the collapse of entropy: which tokens are held back, which are learned from, and what is added."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp

from jaxrl_post import advantages, losses, masked
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped, take, with_defaults
from jaxrl_post.types import Array, Method, Metric, Rollouts, Stats, Targets, Term, typed_key

Power = Literal["reward", "sigmoid"]
_SELECTED = "selected_tokens"


def clip_cov(
    *,
    advantage: Choice | Advantage = "grpo",
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **options: Unpack[Options],
) -> Method:
    r"""Clip-Cov: PPO that leaves out a few tokens, drawn from those whose log-prob and advantage covary strongly.

    $$\mathrm{cov}_t = (A_t - \bar A)(\log\pi_t - \overline{\log\pi}), \qquad
    L_t = 0\ \text{for}\ \max(1, \lfloor\rho N\rfloor)\ \text{tokens drawn from}\ c_{low} < \mathrm{cov}_t < c_{high}$$

    Those tokens are what makes entropy fall. They are drawn once in a step, out of the whole batch, under the policy of
    the start of the step: the same ones whatever the micro-batches, and in every epoch of the step.

    Args:
        advantage: see `policy_gradient`.
        fraction: $\rho$, share of the tokens that is left out; of few tokens at least one.
        low: $c_{low}$, in units of the advantage times nats.
        high: $c_{high}$.
        clip_low: see `losses.ppo`.
        clip_high: see `losses.ppo`.
        **options: those of `policy_gradient`.

    Returns:
        A `Method` with the metric `selected_tokens`, the share left out.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> clip_cov(fraction=0.002).unit
        'sequence'

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    checks.within("fraction", fraction, 1e-12, 1)
    if low >= high:
        raise ValueError(f"low must be below high, the ends of the band, got low={low} and high={high}")
    checks.clipping(clip_low, clip_high, None)

    def choose(s: Signals, per_token: Array, covariance: Array) -> Array:
        clipped = losses.clipped_region(
            s.stats["policy"].logp, s.old_logp, per_token, clip_low=clip_low, clip_high=clip_high
        )
        keys = jax.vmap(functools.partial(jax.random.fold_in, typed_key(s.key)))(s.rollouts.id.reshape(-1))
        band = {"low": low, "high": high, "clipped": clipped}
        return losses.clip_cov_tokens(covariance, s.mask, keys, fraction=fraction, **band)

    def loss(logp, old_logp, advantages, extras, *, clip_low, clip_high):
        return losses.clip_cov(logp, old_logp, advantages, extras[_SELECTED], clip_low=clip_low, clip_high=clip_high)

    bound = functools.partial(loss, clip_low=clip_low, clip_high=clip_high)
    return _with_selected(advantage, choose, bound, options)


def kl_cov(
    *,
    advantage: Choice | Advantage = "grpo",
    fraction: float = 2e-3,
    kl_coef: float = 1.0,
    **options: Unpack[Options],
) -> Method:
    r"""KL-Cov: the tokens whose log-prob and advantage covary most are held near the policy that sampled them.

    $$L_t = -r_t A_t + c\, |\log\pi_t - \log\pi_{old,t}|\,[t \in K], \qquad
    K = \text{the}\ \max(1, \lfloor\rho N\rfloor)\ \text{tokens of largest}\ \mathrm{cov}_t$$

    Nothing is clipped. The tokens are chosen as by `clip_cov`. The penalty has no gradient before the policy has moved
    away from the sampler: with `training.epochs` of 1 and fresh rollouts this is the plain policy gradient.

    Args:
        advantage: see `policy_gradient`.
        fraction: $\rho$, share of the tokens that is penalised; the paper has 2e-3 for 7B, 2e-4 for 32B parameters.
        kl_coef: $c$.
        **options: those of `policy_gradient`.

    Returns:
        A `Method` with the metric `selected_tokens`, the share penalised.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> kl_cov(kl_coef=0.1).min_group
        2

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (arXiv 2505.22617).
    """
    checks.within("fraction", fraction, 1e-12, 1)
    checks.within("kl_coef", kl_coef, 0)

    def choose(s: Signals, per_token: Array, covariance: Array) -> Array:
        return losses.kl_cov_tokens(covariance, s.mask, fraction=fraction)

    def loss(logp, old_logp, advantages, extras):
        return losses.kl_cov(logp, old_logp, advantages, extras[_SELECTED], kl_coef=kl_coef)

    return _with_selected(advantage, choose, loss, options)


def high_entropy_tokens(
    *,
    fraction: float = 0.2,
    tokens: Literal["high", "low"] = "high",
    level: Literal["batch", "sequence"] = "batch",
    normalize: Literal["all", "kept"] = "all",
    advantage: Choice | Advantage = "grpo",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""80/20: the policy gradient of the fifth of the tokens at which the policy is least certain, and of no others.

    $$L = -\frac{1}{\sum_b |o_b|} \sum_{b,t} 1[H_{b,t} \ge \tau_\rho]\,
    \min(r_{b,t} A_b,\ \mathrm{clip}(r_{b,t}, 1 - \epsilon_{low}, 1 + \epsilon_{high})\, A_b)$$

    Any method of the family does the same with `top_entropy=0.2`; this one has the variants.

    Args:
        fraction: $\rho$ in (0, 1], share of the tokens that counts as being of high entropy.
        tokens: `"high"`, or `"low"` for all the others: the control that learns little.
        level: the quantile is that of the `"batch"` or of each `"sequence"`, see `losses.top_entropy_mask`.
        normalize: `"all"` divides by all tokens; `"kept"` takes the tokens left out from every term and denominator,
            that of a KL included.
        advantage: see `policy_gradient`.
        **options: `clip_low` (0.2), `clip_high` (0.28), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads the policy's entropy at the start of the step.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(high_entropy_tokens().needs["policy"])
        ['entropy', 'logp']

    Reference: Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
    Reasoning (arXiv 2506.01939).
    """
    checks.within("fraction", fraction, 1e-6, 1)
    checks.one_of("tokens", tokens, Literal["high", "low"])
    checks.one_of("level", level, Literal["batch", "sequence"])
    checks.one_of("normalize", normalize, Literal["all", "kept"])
    if options.get("top_entropy", 1.0) != 1.0:
        raise ValueError("top_entropy would choose tokens a second time; give fraction alone")

    def choose(s: Signals, found: Credit) -> Credit:
        mask = found.kept(s.mask)
        kept = losses.top_entropy_mask(s.stats["policy"].entropy, mask, fraction=fraction, level=level)
        kept = (mask != 0) - kept if tokens == "low" else kept
        if normalize == "all":
            return found._replace(extras={**found.extras, "top_entropy": kept})
        return found._replace(keep=kept)

    return clipped(_after(advantage, choose, {"entropy"}), {}, {"clip_high": 0.28, **options})


def egpo(
    *,
    alpha: float = 0.4,
    kappa: float = 2.0,
    level: Literal["sequence", "token"] = "sequence",
    think_end: Sequence[int] | None = None,
    advantage: Choice | Advantage = "grpo",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""EGPO (first called FunRL): GRPO whose advantage grows with the entropy of the reasoning, but never turns round.

    $$A'_g = A_g + \min(\alpha H_g,\ |A_g| / \kappa), \qquad
    H_g = \frac{1}{|\mathrm{think}_g|} \sum_{t \in \mathrm{think}_g} H_{g,t}$$

    For calls of functions its reward is `rewards.function_calls`.

    Args:
        alpha: advantage per nat.
        kappa: at least 1; the bonus is at most a $\kappa$-th of the advantage.
        level: `"sequence"`, or `"token"`: tokens of the reasoning get the bonus of their own entropy, others none.
        think_end: token ids that close the reasoning (in YAML `{text: "</think>"}`); the reasoning is what the policy
            wrote up to them, or all of it where they are missing. None: all of it everywhere.
        advantage: see `policy_gradient`.
        **options: `clip_low` (0.2), `clip_high` (0.2) and `dual_clip` (None) of `losses.ppo`; `beta` (0.04),
            `aggregation` (`"seq_mean_token_mean"`) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads the policy's entropy at the start of the step.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(egpo(think_end=[7]).needs["policy"])
        ['entropy', 'logp']

    Reference: Exploring Superior Function Calls via Reinforcement Learning (arXiv 2508.05118); for where the formula
    comes from see `advantages.egpo`.
    """
    checks.within("alpha", alpha, 0)
    checks.within("kappa", kappa, 1)
    checks.one_of("level", level, Literal["sequence", "token"])
    if think_end is not None and not len(think_end):
        raise ValueError("think_end must hold at least one token id; give None for no end")

    def add(s: Signals, found: Credit) -> Credit:
        thinks, entropy = s.mask != 0, s.stats["policy"].entropy
        if think_end is not None:
            thinks &= advantages.segment_by_delimiter(s.rollouts.tokens, s.mask, [tuple(think_end)]) == 0
        if level == "sequence":
            entropy = jnp.broadcast_to(masked.mean(entropy, thinks, 1, keepdims=True), s.mask.shape)
        else:
            entropy = jnp.where(thinks, entropy, 0.0)
        shaped = advantages.egpo(_per_token(s, found), entropy, alpha=alpha, kappa=kappa)
        return found._replace(advantages=shaped)

    own: Options = {} if options.get("preset") else {"beta": 0.04, "aggregation": "seq_mean_token_mean"}
    return clipped(_after(advantage, add, {"entropy"}), own, options)


def rapo(
    *,
    alpha: float = 1e-3,
    phi: Power | float = "reward",
    vocab_size: int | None = None,
    limit: float = 10.0,
    advantage: Choice | Advantage = "grpo",
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""RAPO: GRPO with a forward KL to the reference, trusted as far as the reward is good, and an entropy bonus.

    $$L = L_{GRPO} + \alpha\, (w \log w - w + 1) - c\, H(\pi), \qquad w = \pi_{ref}^{\phi(r)} / \pi$$

    A forward KL wants the policy to cover the reference, and lets it leave, where the reverse KL keeps it inside. Where
    the reward is bad, the power is small and the reference flat.

    Args:
        alpha: weight of the forward KL.
        phi: the power: `"reward"`, for rewards in [0, 1] (others are clipped to it), the `"sigmoid"` of the reward, or
            a number in [0, 1] for all; 1 is the forward KL to the reference itself.
        vocab_size: divides by a bound of the power's normaliser, see `losses.reweighted_logp` (None).
        limit: nats, clamp of $\log w$.
        advantage: see `policy_gradient`.
        **options: `entropy_weight` (1e-3), `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of
            `policy_gradient`; the reverse KL's `beta` is 0.

    Returns:
        A `Method` that reads the role `reference`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(rapo().needs)
        ['policy', 'reference']

    Reference: Unlocking Reasoning Capabilities in LLMs via Reinforcement Learning Exploration (arXiv 2510.03865); from
    transcriptions of its equations. The weights' size is ours.
    """
    checks.within("alpha", alpha, 0)
    checks.within("limit", limit, 0)
    checks.within("vocab_size", vocab_size, 1)
    if isinstance(phi, str):
        checks.one_of("phi", phi, Power)
    else:
        checks.within("phi", phi, 0, 1)
    inner = clipped(advantage, {"entropy_weight": 1e-3}, options)

    def power(rollouts: Rollouts) -> Array:
        reward = masked.as_float(jnp.where(rollouts.valid, rollouts.reward, 0.0)).reshape(-1)
        if phi == "reward":
            return jnp.clip(reward, 0.0, 1.0)
        return jax.nn.sigmoid(reward) if isinstance(phi, str) else jnp.full_like(reward, phi)

    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms = inner.loss(stats, rollouts, targets)
        target = losses.reweighted_logp(stats["reference"].logp, power(rollouts), vocab_size=vocab_size)
        value = losses.forward_kl(stats["policy"].logp, target, limit=limit)
        like = terms["policy"]
        return {**terms, "forward_kl": Term(value, targets.mask, like.mode, weight=alpha, horizon=like.horizon)}

    needs = {**inner.needs, "reference": inner.needs.get("reference", frozenset()) | {"logp"}}
    return inner._replace(loss=loss, needs=needs, contrasts=False)


def _after(advantage: Choice | Advantage, change: Callable[[Signals, Credit], Credit], fields: set[str]) -> Advantage:
    """An advantage whose credit is changed; `fields` are read of the policy at the start of the step."""
    base = as_advantage(advantage)

    def apply(state: Any, s: Signals) -> tuple[Credit, Any]:
        found, state = base.apply(state, s)
        return change(s, found if isinstance(found, Credit) else Credit(found)), state

    needs = {**base.needs, "policy": base.needs.get("policy", frozenset()) | fields}
    return base._replace(apply=apply, needs=needs, contrasts=False)


def _with_selected(
    advantage: Choice | Advantage,
    choose: Callable[[Signals, Array, Array], Array],
    loss: Callable[..., Array],
    options: Mapping[str, Any],
) -> Method:
    """A method whose loss reads, of `extras`, the tokens chosen by their covariance."""

    def select(s: Signals, found: Credit) -> Credit:
        s = s._replace(mask=found.kept(s.mask))
        per_token = _per_token(s, found)
        covariance = losses.token_covariance(s.stats["policy"].logp, per_token, s.mask)
        return found._replace(extras={**found.extras, _SELECTED: choose(s, per_token, covariance)})

    known, unknown = take(options, *Options.__annotations__)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} does not apply to this method; its losses have their own bounds")
    inner = with_defaults(_after(advantage, select, {"logp"}), loss, {}, known)
    assert inner.metrics is not None
    plain = inner.metrics

    def metrics(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Metric]:
        share = Metric.mean(targets.extras[_SELECTED], targets.mask)
        return plain(stats, rollouts, targets) | {_SELECTED: share}

    return inner._replace(metrics=metrics)


def _per_token(s: Signals, found: Credit) -> Array:
    """`[B, T]`: the advantages that the loss will see, but for what is kept out of it."""
    if found.advantages.shape == s.mask.shape:
        return jnp.where(s.mask != 0, found.advantages, 0.0)
    return advantages.per_token(found.advantages, s.mask)
