"""Methods that judge an update by the batch that follows it, and train on the batch before once more."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.advantages.improvement import attribution, improvement_signal
from jaxrl_post.methods import checks
from jaxrl_post.methods.chaining import chain
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.credit import Advantage, Credit, Signals, as_advantage
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped
from jaxrl_post.types import Array, Method, Rollouts, Stats, Targets

_SIGNAL = "improvement"  # in the extras of the batch before, one number per prompt
_SECOND_UPDATE = ("clip_low", "clip_high", "dual_clip", "aggregation", "horizon", "preset")


class Memory(NamedTuple):
    """State of `policy_improvement`.

    Attributes:
        means: `[K]` float32, mean rewards of the last batches, the newest one last.
        count: int32 scalar, batches seen.
        previous: the batch before.
        advantage: state of the advantage.
    """

    means: Array
    count: Array
    previous: Rollouts
    advantage: Any


def policy_improvement(
    *,
    advantage: Choice | Advantage = "grpo",
    window: int = 8,
    penalty: float = 0.1,
    clamp: float | None = None,
    min_std: float = 1e-6,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Policy improvement: reinforce the batch before as far as the mean reward has improved since.

    $$\hat r_i = a_i\, \phi(\xi_t), \quad a_i = \frac{G A_i}{\sum_j |A_j|}, \quad
    \xi_t = \frac{\mu_t - \bar\mu_{t-K:t-1}}{\sigma_\mu}$$

    The clipped surrogate of these advantages is minimised on the rollouts of the step before, with the ratio to the
    policy that sampled them. Nothing is updated until `window` batches have been seen, or where $\phi = 0$. `chain` it
    before the method that trains on the step's own rollouts, as `pipo` does.

    Args:
        advantage: gives $A$ `[P, G]`; see `policy_gradient`.
        window: $K$, number of past mean rewards that the new one is compared with.
        penalty: $\lambda$, factor of negative signals; 0 reinforces only.
        clamp: bound on $|\xi|$; None for no bound.
        min_std: smallest standard deviation of the means.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `aggregation` and `horizon`.

    Returns:
        A `Method` that keeps a batch in its state: `init` needs the shapes of the rollouts.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> policy_improvement(window=4).batch is not None
        True

    Reference: Policy Improvement Reinforcement Learning (PIPO), arXiv 2604.00860.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2, or the means have no deviation, got {window}")
    checks.within("penalty", penalty, 0)
    checks.within("clamp", clamp, 0)
    checks.within("min_std", min_std, 0)
    if unknown := sorted(set(options) - set(_SECOND_UPDATE)):
        raise ValueError(f"{unknown[0]} does not apply to the second update; it takes {', '.join(_SECOND_UPDATE)}")
    base = as_advantage(advantage)

    def credit(state: Any, s: Signals) -> tuple[Credit, Any]:
        found, state = base.apply(state, s)
        found = found if isinstance(found, Credit) else Credit(found)
        if found.advantages.shape != s.reward.shape:
            raise ValueError(
                f"advantage must give [P, G] = {s.reward.shape} to be attributed within groups, got shape "
                f"{found.advantages.shape}"
            )
        valid = s.valid if found.keep is None else s.valid & (found.keep.reshape(s.valid.shape) != 0)
        signal = s.rollouts.extras[_SIGNAL][:, None]
        return found._replace(advantages=attribution(found.advantages, valid) * signal), state

    # A preset would take the policy as it is now for the one that sampled the batch before.
    inner = clipped(base._replace(apply=credit), {}, {**options, "old_logp": "rollout"})

    def init(rollouts: Any, num_prompts: int) -> Memory:
        if rollouts is None:
            raise ValueError("this method keeps a batch: give training.init the shapes of the rollouts (rollouts=...)")
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rollouts)
        means = jnp.zeros(window)
        return Memory(means, jnp.zeros((), jnp.int32), empty, inner.init(rollouts, num_prompts))

    def batch(state: Memory, rollouts: Rollouts) -> tuple[Rollouts, Memory]:
        known = jnp.any(rollouts.valid)
        mean = masked.mean(rollouts.reward, rollouts.valid).astype(state.means.dtype)
        signal = improvement_signal(mean, state.means, penalty=penalty, clamp=clamp, min_std=min_std)
        signal = jnp.where(known & (state.count >= window), signal, 0.0)
        before = state.previous
        chosen = before.replace(
            valid=before.valid & (signal != 0),
            extras={**before.extras, _SIGNAL: jnp.broadcast_to(signal, (before.num_prompts,))},
        )
        means = jnp.where(known, jnp.append(state.means[1:], mean), state.means)
        return chosen, Memory(means, state.count + known, rollouts, state.advantage)

    def targets(state: Memory, rollouts: Rollouts, stats: Stats, key: Array) -> tuple[Targets, Memory]:
        found, own = inner.targets(state.advantage, rollouts, stats, key)
        return found, state._replace(advantage=own)

    return inner._replace(init=init, batch=batch, targets=targets)


def pipo(
    *,
    advantage: Choice | Advantage = "grpo",
    window: int = 8,
    penalty: float = 0.1,
    clamp: float | None = None,
    min_std: float = 1e-6,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""PIPO: each step first reinforces, or takes back, the update before, and then makes its own.

    Sample batch `t`; update on batch `t - 1` by `policy_improvement`; update on batch `t` as GRPO does (or with another
    advantage of groups). While nothing has improved or worsened it is that method.

    Args:
        advantage: of both updates; see `policy_gradient`.
        window: see `policy_improvement`.
        penalty: see `policy_improvement`.
        clamp: see `policy_improvement`.
        min_std: see `policy_improvement`.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `aggregation` (`"seq_mean_token_mean"`) and
            `horizon`, of both updates; `beta` (0.04) and the others of `policy_gradient`, of the step's own.

    Returns:
        A chain of the stages `improvement` and `base`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> list(pipo(beta=0.0).stages)
        ['improvement', 'base']

    Reference: Policy Improvement Reinforcement Learning (PIPO), arXiv 2604.00860; formulas from its open configuration.
    """
    own: Options = {"aggregation": "seq_mean_token_mean"}
    second: Any = {name: value for name, value in {**own, **options}.items() if name in _SECOND_UPDATE}
    return chain(
        improvement=policy_improvement(
            advantage=advantage, window=window, penalty=penalty, clamp=clamp, min_std=min_std, **second
        ),
        base=clipped(advantage, {"beta": 0.04, **own}, options),
    )
