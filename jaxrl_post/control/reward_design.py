"""Rewards designed for a learner: as informative as the optimum allows, for the policy it has, or learned by itself."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from jaxrl_post import masked
from jaxrl_post.control.tables import action_gaps, action_values, check_process
from jaxrl_post.types import Array


def informativeness(
    designed: Array,
    transitions: Array,
    reward: Array,
    teacher: Array,
    *,
    gamma: float,
    horizons: Sequence[int] = (0, 1, 2, 3),
) -> Array:
    r"""How soon a designed reward shows what an action costs, $-\sum_{h, s, a} \max(0, d(s, a) - \Delta_h(s, a))$.

    $d$ is what the action costs in the end under the true reward, $\Delta_h$ what it costs within $h$ steps under the
    designed one; see `action_gaps`. Shaping by the optimal values attains 0 for every horizon.

    Args:
        designed: `[S, A]` float, the reward that a learner is to get.
        transitions: `[S, A, S]` float.
        reward: `[S, A]` float, the true one.
        teacher: `[S, A]` float, optimal for `reward`. Its own actions do not count.
        gamma: in [0, 1).
        horizons: $h$.

    Returns:
        Scalar, at most 0, float32 or wider.

    Raises:
        ValueError: as `action_values`.

    Example:
        >>> end, true, best = jnp.zeros((1, 2, 1)), jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]])
        >>> float(informativeness(jnp.zeros((1, 2)), end, true, best, gamma=0.9, horizons=[0, 1]))
        -2.0

    Reference: Reward Design for Reinforcement Learning Agents (arXiv 2503.21949), EXPRD.
    """
    lost = action_gaps(transitions, reward, teacher, gamma=gamma)
    others = masked.as_float(teacher) == 0
    missing = [
        jnp.maximum(lost - action_gaps(transitions, designed, teacher, gamma=gamma, horizon=h), 0.0) for h in horizons
    ]
    return -jnp.sum(jnp.where(others, sum(missing), 0.0))


def design_reward(
    transitions: Array,
    reward: Array,
    teacher: Array,
    states: Sequence[int],
    *,
    gamma: float,
    max_reward: float,
    horizons: Sequence[int] = (0, 1, 2, 3),
) -> tuple[NDArray[np.float64], float]:
    r"""EXPRD: the most informative reward that is zero but in a few states and keeps the optimum and its margin.

    $$\max_R I(R) \quad \text{s.t. } R(s, \cdot) = 0 \text{ for } s \notin Z, \quad |R| \le R_{max}, \quad
    \Delta_\infty(s, a) \ge \min_{b \notin \pi} d(s, b)$$

    It is a linear program, solved on the host.

    Args:
        transitions: `[S, A, S]` float.
        reward: `[S, A]` float, the true one.
        teacher: `[S, A]` float, optimal for `reward`, with every optimal action, see `best_policy`.
        states: $Z$, in which the designed reward may differ from 0: goals and subgoals.
        gamma: in [0, 1).
        max_reward: $R_{max}$.
        horizons: $h$ of `informativeness`, $I$.

    Returns:
        designed: `[S, A]` float64.
        value: its `informativeness`.

    Raises:
        ValueError: if the shapes do not fit, or no such reward exists, as for a bound or a set of states too small.

    Example:
        >>> go = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])  # on or stay; the second state ends it
        >>> true, best = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.5, 0.5]])
        >>> designed, value = design_reward(go, true, best, [0, 1], gamma=0.9, max_reward=1.0)
        >>> round(value, 4) == 0, bool(designed[0, 0] > designed[0, 1])
        (True, True)

    Reference: Explicable Reward Design for Reinforcement Learning Agents (NeurIPS 2021), in Reward Design for
    Reinforcement Learning Agents (arXiv 2503.21949).
    """
    check_process(transitions, reward, gamma)
    P, true, pi = (np.asarray(x, np.float64) for x in (transitions, reward, teacher))
    S, A = true.shape
    size = S * A
    # Values over a horizon are linear in the reward: maps from tables to tables, as matrices.
    follow = np.einsum("sat,tb->satb", P, pi).reshape(size, size)
    centre = np.einsum("st,tb->stb", np.eye(S), pi).reshape(S, size).repeat(A, axis=0) - np.eye(size)

    def gap_map(horizon: int | None) -> NDArray[np.float64]:
        if horizon is None:
            return centre @ np.linalg.inv(np.eye(size) - gamma * follow)
        total = np.eye(size)
        for _ in range(horizon):
            total = np.eye(size) + gamma * follow @ total
        return centre @ total

    others = (pi == 0).reshape(-1)
    whole = gap_map(None)[others]
    lost = whole @ true.reshape(-1)
    at = np.repeat(np.arange(S), A)[others]
    margin = np.array([lost[at == s].min() for s in at])
    near = np.concatenate([gap_map(h)[others] for h in horizons])
    count = len(near)
    allowed = np.isin(np.repeat(np.arange(S), A), list(states))
    solved = linprog(
        np.concatenate([np.zeros(size), np.ones(count)]),
        # What is missing is at least d less the gap within h steps, and the margin is kept.
        A_ub=np.block([[-near, -np.eye(count)], [-whole, np.zeros((len(whole), count))]]),
        b_ub=np.concatenate([-np.tile(lost, len(horizons)), -margin]),
        bounds=[(-max_reward, max_reward) if free else (0.0, 0.0) for free in allowed] + [(0.0, None)] * count,
    )
    if solved.x is None:
        raise ValueError(
            f"no reward within {max_reward} that is zero but in {len(list(states))} states keeps the optimum with its "
            f"margin; allow more states or a larger bound ({solved.message})"
        )
    return solved.x[:size].reshape(S, A), -float(solved.fun)


def choose_subgoals(
    transitions: Array,
    reward: Array,
    teacher: Array,
    goals: Sequence[int],
    *,
    count: int,
    gamma: float,
    max_reward: float,
    horizons: Sequence[int] = (0, 1, 2, 3),
) -> tuple[list[int], NDArray[np.float64]]:
    """States at which a reward helps most, one after the other, and the reward that `design_reward` makes with them.

    Args:
        transitions: `[S, A, S]` float.
        reward: `[S, A]` float, the true one.
        teacher: `[S, A]` float, optimal for `reward`.
        goals: states that may have a reward in any case.
        count: most subgoals.
        gamma: in [0, 1).
        max_reward: bound of the reward.
        horizons: of `informativeness`.

    Returns:
        subgoals: in the order in which they were chosen; fewer where no other state adds anything.
        designed: `[S, A]` float64.

    Raises:
        ValueError: as `design_reward`, if the goals alone allow no reward.

    Example:
        >>> go = np.zeros((3, 2, 3))  # on or stay; the last state ends it
        >>> go[0, 0, 1] = go[1, 0, 2] = go[0, 1, 0] = go[1, 1, 1] = 1.0
        >>> true = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
        >>> best = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
        >>> choose_subgoals(go, true, best, [2], count=1, gamma=0.9, max_reward=1.0)[0]
        [1]

    Reference: Explicable Reward Design for Reinforcement Learning Agents (NeurIPS 2021), in Reward Design for
    Reinforcement Learning Agents (arXiv 2503.21949).
    """
    scale = {"gamma": gamma, "max_reward": max_reward, "horizons": horizons}
    chosen: list[int] = []
    designed, best = design_reward(transitions, reward, teacher, goals, **scale)
    for _ in range(count):
        rest = [s for s in range(designed.shape[0]) if s not in chosen and s not in goals]
        tried = [(s, *design_reward(transitions, reward, teacher, [*goals, *chosen, s], **scale)) for s in rest]
        if not tried:
            break
        state, found, value = max(tried, key=lambda one: one[2])
        if value <= best + 1e-9:
            break
        chosen.append(state)
        designed, best = found, value
    return chosen, designed


def adaptive_informativeness(
    transitions: Array, reward: Array, teacher: Array, learner: Array, visits: Array, *, gamma: float
) -> Array:
    r"""What a reward for the next action alone would teach a learner, by state and action.

    $$\frac{\partial I_0}{\partial R(s, a)} = d(s)\, \pi(a|s) \Big(A^T(s, a) - \sum_b \pi(b|s) A^T(s, b)\Big)$$

    Within a bound of the reward the best one is the bound with the sign of this.

    Args:
        transitions: `[S, A, S]` float.
        reward: `[S, A]` float, the true one.
        teacher: `[S, A]` float: $A^T$ is its advantage.
        learner: `[S, A]` float, $\pi$: the probabilities that it has now.
        visits: `[S]` float, $d$: how often the learner is where.
        gamma: in [0, 1).

    Returns:
        `[S, A]`, float32 or wider.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> end, true, best = jnp.zeros((1, 2, 1)), jnp.array([[1.0, -1.0]]), jnp.array([[1.0, 0.0]])
        >>> adaptive_informativeness(end, true, best, jnp.full((1, 2), 0.5), jnp.ones(1), gamma=0.9).tolist()
        [[0.5, -0.5]]

    Reference: Reward Design for Reinforcement Learning Agents (arXiv 2503.21949).
    """
    learner, visits = masked.as_float(learner), masked.as_float(visits)
    advantage = -action_gaps(transitions, reward, teacher, gamma=gamma)
    masked.check_like("learner", learner, "reward", advantage)
    masked.check_like("visits", visits, "the states of reward", advantage[:, 0])
    lead = advantage - jnp.sum(learner * advantage, axis=1, keepdims=True)
    return visits[:, None] * learner * lead


def explors_gradient(transitions: Array, reward: Array, policy: Array, visits: Array, *, gamma: float) -> Array:
    r"""How a learner changes a reward of its own so that it shows what is worth doing under the true one.

    $$\nabla_{R(s, \cdot)} = \sum_a d(s)\, \pi(a|s)^2 A(s, a)\, (e_a - \pi(\cdot | s))$$

    with $A$ the learner's advantage under the true reward: the expectation of EXPLORS' step over actions that it takes.

    Args:
        transitions: `[S, A, S]` float.
        reward: `[S, A]` float, the true one.
        policy: `[S, A]` float, $\pi$.
        visits: `[S]` float, $d$: how often the learner is where.
        gamma: in [0, 1).

    Returns:
        `[S, A]`, float32 or wider, to be added to the reward with a step size.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> end, true = jnp.zeros((1, 2, 1)), jnp.array([[1.0, -1.0]])
        >>> explors_gradient(end, true, jnp.full((1, 2), 0.5), jnp.ones(1), gamma=0.9).tolist()
        [[0.25, -0.25]]

    Reference: Exploration-Guided Reward Shaping for Reinforcement Learning under Sparse Rewards (NeurIPS 2022), in
    Reward Design for Reinforcement Learning Agents (arXiv 2503.21949).
    """
    policy, visits = masked.as_float(policy), masked.as_float(visits)
    q = action_values(transitions, reward, policy, gamma=gamma)
    masked.check_like("visits", visits, "the states of reward", q[:, 0])
    advantage = q - jnp.sum(policy * q, axis=1, keepdims=True)
    weight = visits[:, None] * jnp.square(policy) * advantage
    return weight - policy * jnp.sum(weight, axis=1, keepdims=True)


def explors_bonus(counts: Array, *, scale: float = 1.0, max_reward: float = 1.0) -> Array:
    r"""A bonus for states that were seldom visited, $\lambda / \sqrt{(\lambda / R_{max})^2 + n}$.

    Args:
        counts: any shape, $n$: visits so far.
        scale: $\lambda$, above 0.
        max_reward: $R_{max}$, above 0: the bonus of a state that was never visited.

    Returns:
        The shape of `counts`, float32 or wider.

    Raises:
        ValueError: if a number is not above 0.

    Example:
        >>> explors_bonus(jnp.array([0, 3])).tolist()
        [1.0, 0.5]

    Reference: Exploration-Guided Reward Shaping for Reinforcement Learning under Sparse Rewards (NeurIPS 2022), in
    Reward Design for Reinforcement Learning Agents (arXiv 2503.21949).
    """
    for name, value in (("scale", scale), ("max_reward", max_reward)):
        if isinstance(value, float | int) and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    return scale * jax.lax.rsqrt((scale / max_reward) ** 2 + masked.as_float(counts))
