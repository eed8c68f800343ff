"""Rewards from an estimate of progress: relative steps, potentials that keep the optimum, a judge asked seldom."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.types import Array

Hold: TypeAlias = Literal["last", "zero"]


def hop(before: Array, after: Array) -> Array:
    r"""The share of what is left that was gained, or of what was achieved that was lost.

    $$H = \frac{\Phi' - \Phi}{1 - \Phi} \text{ if } \Phi' \ge \Phi \text{ else } \frac{\Phi' - \Phi}{\Phi}$$

    Args:
        before: any shape, float in [0, 1], $\Phi$: progress.
        after: the same shape, $\Phi'$.

    Returns:
        The shape of `before`, in [-1, 1], float32 or wider; 0 where nothing changed.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> [round(float(h), 4) for h in hop(jnp.array([0.6, 0.6, 1.0]), jnp.array([0.8, 0.3, 1.0]))]
        [0.5, -0.5, 0.0]

    Reference: Robo-Dopamine: General Process Reward Modeling for High-Precision Robotic Manipulation
    (arXiv 2512.23703).
    """
    before, after = masked.as_float(before), masked.as_float(after)
    masked.check_like("after", after, "before", before)
    room = jnp.where(after >= before, 1 - before, before)
    return jnp.where(room > 0, (after - before) / jnp.where(room > 0, room, 1.0), 0.0)


def progress_from_hops(hops: Array, from_start: Array | None = None, from_goal: Array | None = None) -> Array:
    r"""Progress from predicted hops: from step to step, from the start and from the goal, and their mean.

    $$\Phi^I_t = \Phi^I_{t-1} + (1 - \Phi^I_{t-1}) H_t \text{ or } \Phi^I_{t-1} + \Phi^I_{t-1} H_t, \qquad
    \Phi = \tfrac13 (\Phi^I + H_{start} + 1 + H_{goal})$$

    Args:
        hops: `[B, T]` float in [-1, 1], `hop` of each step to the one before; progress is 0 before the first.
        from_start: `[B, T]`, hops from the first state to each.
        from_goal: `[B, T]`, hops from the goal to each state, at most 0. None for both leaves $\Phi^I$ alone.

    Returns:
        `[B, T]`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or only one of the other two is given.

    Example:
        >>> [round(float(p), 4) for p in progress_from_hops(jnp.array([[0.6, 0.5, -0.5]]))[0]]
        [0.6, 0.8, 0.4]

    Reference: Robo-Dopamine: General Process Reward Modeling for High-Precision Robotic Manipulation
    (arXiv 2512.23703).
    """
    hops = masked.as_float(hops)
    masked.check_axes("hops", hops, "[B, T]")

    def step(progress: Array, change: Array) -> tuple[Array, Array]:
        progress = progress + jnp.where(change >= 0, 1 - progress, progress) * change
        return progress, progress

    _, found = jax.lax.scan(step, jnp.zeros_like(hops[:, 0]) if hops.shape[1] else jnp.zeros(len(hops)), hops.T)
    if from_start is None and from_goal is None:
        return found.T
    if from_start is None or from_goal is None:
        raise ValueError("from_start and from_goal are read together; give both or neither")
    from_start, from_goal = masked.as_float(from_start), masked.as_float(from_goal)
    masked.check_like("from_start", from_start, "hops", hops)
    masked.check_like("from_goal", from_goal, "hops", hops)
    return (found.T + from_start + 1 + from_goal) / 3


def potential_shaping(reward: Array, potential: Array, exists: Array | None = None, *, gamma: float = 1.0) -> Array:
    r"""A reward with the change of a potential, which leaves the optimal policy as it is.

    $$r_t + \gamma \Phi(s_{t+1}) - \Phi(s_t), \qquad \Phi(s_{end}) = 0$$

    Args:
        reward: `[B, T]` float, what each step earns.
        potential: `[B, T]` float, $\Phi(s_t)$ of the state that each step starts from.
        exists: `[B, T]`, nonzero where there is a step; None for all. The last one ends the episode.
        gamma: $\gamma$ in [0, 1].

    Returns:
        `[B, T]`, float32 or wider; 0 where there is no step.

    Raises:
        ValueError: if the shapes differ, or `gamma` is outside [0, 1].

    Example:
        >>> potential_shaping(jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.0, 0.5, 0.75]])).tolist()
        [[0.5, 0.25, 0.25]]

    References:
        Policy invariance under reward transformations (Ng, Harada & Russell, 1999); Robo-Dopamine: General Process
        Reward Modeling for High-Precision Robotic Manipulation (arXiv 2512.23703), with progress as the potential.
    """
    if isinstance(gamma, float | int) and not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    reward, potential = masked.as_float(reward), masked.as_float(potential)
    masked.check_axes("reward", reward, "[B, T]")
    masked.check_like("potential", potential, "reward", reward)
    exists = jnp.ones(reward.shape, bool) if exists is None else jnp.asarray(exists) != 0
    masked.check_like("exists", exists, "reward", reward)
    here = jnp.where(exists, potential, 0.0)
    after = jnp.pad(here[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(exists, reward + gamma * after - here, 0.0)


def progress_mix(
    closer: Array, progress: Array, done: Array, *, weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
) -> Array:
    r"""A judge's three answers as a reward: is it closer than before, how far is it, is it done.

    $$r = w_c \frac{c + 1}{2} + w_p p + w_d d$$

    Args:
        closer: any shape, $c$: 1 for closer, -1 for further, 0 for neither or no frame before.
        progress: the same shape, float in [0, 1], $p$.
        done: the same shape, in [0, 1], $d$.
        weights: $w_c$, $w_p$, $w_d$.

    Returns:
        The shape of `closer`, float32 or wider.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> round(progress_mix(jnp.array([1]), jnp.array([0.6]), jnp.array([0])).item(), 4)
        0.5333

    Reference: Large Reward Models: Generalizable Online Robot Reward Generation with Vision-Language Models
    (arXiv 2603.16065).
    """
    closer, progress, done = masked.as_float(closer), masked.as_float(progress), masked.as_float(done)
    masked.check_like("progress", progress, "closer", closer)
    masked.check_like("done", done, "closer", closer)
    return weights[0] * (closer + 1) / 2 + weights[1] * progress + weights[2] * done


def held_between_calls(values: Array, called: Array, *, hold: Hold = "last") -> Array:
    """What a judge said when it was asked, for the steps in between.

    Args:
        values: `[B, T]` float; read only where it was called.
        called: `[B, T]`, nonzero where the judge was asked.
        hold: `"last"`: what it said last, 0 before the first call; or `"zero"`.

    Returns:
        `[B, T]`, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or for an unknown way to hold.

    Example:
        >>> called = jnp.array([[0, 1, 0, 1, 0]])
        >>> [round(float(v), 4) for v in held_between_calls(jnp.array([[9, 0.25, 9, 0.5, 9]]), called)[0]]
        [0.0, 0.25, 0.25, 0.5, 0.5]

    Reference: Large Reward Models: Generalizable Online Robot Reward Generation with Vision-Language Models
    (arXiv 2603.16065).
    """
    if hold not in get_args(Hold):
        raise ValueError(f"hold must be one of {', '.join(get_args(Hold))}, got {hold!r}")
    values, called = masked.as_float(values), jnp.asarray(called) != 0
    masked.check_axes("values", values, "[B, T]")
    masked.check_like("called", called, "values", values)
    if hold == "zero":
        return jnp.where(called, values, 0.0)
    last = jax.lax.cummax(jnp.where(called, jnp.arange(values.shape[1]), -1), axis=1)
    return jnp.where(last >= 0, jnp.take_along_axis(values, jnp.maximum(last, 0), axis=1), 0.0)
