"""What an advantage may read, what it returns, and what a method must know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxrl_post.advantages import on_last_token
from jaxrl_post.types import Array, PyTree, Rollouts, Stats


class Signals(NamedTuple):
    """What an advantage may read.

    Attributes:
        rollouts: what happened; `reward` is less the KL penalty, if that is taken from the reward.
        mask: `[B, T]`, trained tokens of valid sequences.
        old_logp: `[B, T]`, nats, of the start of the step.
        token_rewards: `[B, T]`: the reward on the last trained token, less the KL penalty of every token.
        stats: stats of the start of the step by role.
        key: for what is random.
    """

    rollouts: Rollouts
    mask: Array
    old_logp: Array
    token_rewards: Array
    stats: Stats
    key: Array

    @property
    def reward(self) -> Array:
        """`[P, G]`."""
        return self.rollouts.reward

    @property
    def valid(self) -> Array:
        """`[P, G]` bool."""
        return self.rollouts.valid

    @property
    def lengths(self) -> Array:
        """`[P, G]` float, trained tokens of each sequence."""
        return jnp.sum(self.mask != 0, axis=1).astype(jnp.float32).reshape(self.reward.shape)

    def with_reward(self, reward: Array) -> Signals:
        """The same with another reward `[P, G]` of sequences, whole or on their last trained tokens."""
        rollouts, by_token = self.rollouts.replace(reward=reward), on_last_token(reward, self.mask)
        return self._replace(rollouts=rollouts, token_rewards=by_token)

    def component(self, name: str) -> Array:
        """`[P, G]`: a component of the rewards, 0 where it could not be scored.

        Raises:
            ValueError: if there is none of that name and shape.
        """
        found = self.rollouts.rewards.get(name)
        if found is None or found.shape != self.reward.shape:
            known = sorted(n for n, x in self.rollouts.rewards.items() if x.shape == self.reward.shape)
            have = ", ".join(known) or "none"
            raise ValueError(f"there is no component {name!r} of the reward for whole sequences; there are {have}")
        return jnp.where(jnp.isnan(found), 0.0, found)

    def extra(self, name: str, why: str) -> Array:
        """An array of `rollouts.extras`.

        Raises:
            ValueError: if it is not there; `why` says who puts it there.
        """
        if name not in self.rollouts.extras:
            raise ValueError(f"this method reads rollouts.extras[{name!r}], which these rollouts lack: {why}")
        return self.rollouts.extras[name]


class Credit(NamedTuple):
    """What an advantage returns.

    Attributes:
        advantages: `[P, G]` or `[B, T]`.
        keep: `[P, G]` or `[B, T]`: 0 takes sequences or tokens out of the loss and its denominators; None keeps all.
        extras: for the loss, with a leading axis of `B` or `P`, or scalars.
    """

    advantages: Array
    keep: Array | None = None
    extras: Mapping[str, Array] = {}

    def kept(self, mask: Array) -> Array:
        """`[B, T]`: those of the tokens of a mask that are kept."""
        if self.keep is None:
            return mask
        return mask * (self.keep if self.keep.shape == mask.shape else self.keep.reshape(-1, 1))


class Advantage(NamedTuple):
    """An advantage with what the method must know of it. A plain function `Signals -> Credit | Array` will often do.

    Attributes:
        apply: `(state, signals) -> (Credit | Array, state)`.
        init: `(rollouts, num_prompts) -> state`; `rollouts` holds shapes only.
        needs: fields of the stats of roles that are read, beyond the policy's `logp`.
        min_group: the smallest group that gives any advantage.
        wants: of `Method.wants`: names of `rollouts.extras`, one number per prompt.
        probes: of `Method.probes`; `needs` names them too.
        penalized: whether it can be given a reward less the KL; where it reads components, or takes the reward for a
            judgement, `kl_in="reward"` is an error.
        contrasts: whether it is 0 in groups of equal rewards.
    """

    apply: Callable[[PyTree, Signals], tuple[Credit | Array, PyTree]]
    init: Callable[[Any, int], PyTree] = lambda rollouts, num_prompts: ()
    needs: Mapping[str, frozenset[str]] = {}
    min_group: int = 1
    wants: frozenset[str] = frozenset()
    probes: Callable[[Rollouts], Mapping[str, tuple[Rollouts, str]]] | None = None
    penalized: bool = True
    contrasts: bool = False


def stateless(
    function: Callable[[Signals], Credit | Array], min_group: int = 1, *, penalized: bool = True
) -> Advantage:
    """A plain function of `Signals` as an `Advantage`.

    Example:
        >>> stateless(lambda s: s.reward).min_group
        1
    """
    return Advantage(lambda state, signals: (function(signals), state), min_group=min_group, penalized=penalized)
