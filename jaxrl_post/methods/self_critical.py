"""Self-critical sequence training, and policy gradients of rewards with diminishing returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack

import jax.numpy as jnp

from jaxrl_post import advantages, losses, rewards
from jaxrl_post.methods import checks
from jaxrl_post.methods.choices import Choice, choose
from jaxrl_post.methods.credit import Credit, Signals
from jaxrl_post.methods.policy_gradient import Options, with_defaults
from jaxrl_post.types import Array, Method, Rollouts, Stats, Targets, Term

GroupBaseline = Literal["none", "leave_one_out"]

SET_FUNCTIONS: dict[str, Callable[..., Array]] = {"distinct_ngrams": rewards.distinct_ngrams}
"""Set functions of tokens `[B, T]` and mask `[B, T]` by name, which give the value of each prefix."""


def scst(*, rl_weight: float = 1.0, **options: Unpack[Options]) -> Method:
    r"""Self-critical sequence training: REINFORCE against the reward of the policy's own greedy answer.

    $$L = \gamma\, \Big[-\mathrm{mean}_b\, (r_b - r_{greedy}) \sum_t \log\pi_t\Big] + (1 - \gamma)\, L_{MLE}$$

    With a reward for meaning (`rewards.greedy_matching`) it is semantic self-critical training. The likelihood is that
    of rows which are a prompt's given answer rather than a sample, marked by 1 in `rollouts.extras["given_answer"]`
    (`[P, G]`); they take no part in the first term.

    Args:
        rl_weight: $\gamma$ in [0, 1]; 1 needs no given answers.
        **options: `aggregation` (`"seq_mean_token_sum"`) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.extras["greedy_reward"]`; one sample per prompt is enough.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> scst().min_group
        1

    References: Self-critical Sequence Training for Image Captioning, arXiv 1612.00563; Semantic-Based Self-Critical
    Training For Question Generation, arXiv 2108.12026.
    """
    checks.within("rl_weight", rl_weight, 0, 1)

    def advantage(s: Signals) -> Credit:
        greedy = s.extra("greedy_reward", "sample a greedy answer to each prompt and score it")
        if rl_weight == 1:
            return Credit(advantages.remax(s.reward, greedy, s.valid))
        given = s.extra("given_answer", "mark the rows that hold a prompt's given answer") > 0
        return Credit(advantages.remax(s.reward, greedy, s.valid & ~given), keep=~given)

    method = with_defaults(advantage, "reinforce", {"aggregation": "seq_mean_token_sum"}, options)
    if rl_weight < 1:
        method = _with_given_answers(method, rl_weight)
    return method._replace(wants=method.wants | {"greedy_reward"})


def _with_given_answers(method: Method, rl_weight: float) -> Method:
    def loss(stats: Stats, rollouts: Rollouts, targets: Targets) -> dict[str, Term]:
        terms = method.loss(stats, rollouts, targets)
        policy = terms["policy"]
        given = (rollouts.extras["given_answer"].reshape(-1, 1) > 0) * rollouts.valid_mask
        likelihood = losses.nll(stats["policy"].logp)
        return terms | {
            "policy": policy._replace(weight=rl_weight * policy.weight),
            "nll": Term(likelihood, given, policy.mode, weight=1 - rl_weight, horizon=policy.horizon),
        }

    return method._replace(loss=loss)


def subpo(
    *,
    set_function: Choice = "distinct_ngrams",
    greedy: bool = False,
    baseline: GroupBaseline = "leave_one_out",
    gain_weight: float = 1.0,
    **options: Unpack[Options],
) -> Method:
    r"""Submodular policy optimisation: every action is rewarded with what it adds to a set function of the trajectory.

    $$\nabla J = E\Big[\sum_i \nabla\log\pi_i \Big(\sum_{j \ge i} [F(\tau_{0:j+1}) - F(\tau_{0:j})] - b_i\Big)\Big]$$

    The reward of the sequence counts too, on its last token. $b_i$ is the mean of the group's other sequences at the
    same position, so it may not depend on the action.

    Args:
        set_function: `"distinct_ngrams"`, a mapping of it with `n`, or a function of tokens and mask `[B, T]` that
            gives the value of each prefix (see `rewards.coverage`).
        greedy: weigh each action by its immediate gain alone.
        baseline: `"leave_one_out"` or `"none"`. With one, a token at whose place no other sequence of the group goes on
            has nothing to be compared with and gets 0.
        gain_weight: weight of the gains beside the reward of the sequence.
        **options: `aggregation` (`"seq_mean_token_sum"`) and the others of `policy_gradient`.

    Returns:
        A `Method`; with a baseline it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> subpo(set_function={"name": "distinct_ngrams", "n": 2}).min_group
        2

    Reference: Submodular Reinforcement Learning, arXiv 2307.13372.
    """
    checks.one_of("baseline", baseline, GroupBaseline)
    checks.within("gain_weight", gain_weight, 0)
    function = choose("set_function", set_function, SET_FUNCTIONS, {})

    def advantage(s: Signals) -> Array:
        gains = rewards.marginal_gains(function(s.rollouts.tokens, s.mask), s.mask)
        per_token = gain_weight * gains + s.token_rewards
        if not greedy:
            per_token = advantages.reinforce_plus_plus(per_token, s.mask, whiten=False)
        if baseline == "none":
            return per_token
        groups = per_token.reshape(*s.reward.shape, -1)
        counts = s.mask.reshape(groups.shape) != 0
        others = jnp.sum(counts, axis=1, keepdims=True) - counts
        mean = (jnp.sum(groups, axis=1, keepdims=True) - groups) / jnp.maximum(others, 1)
        # Without another sequence at this position there is nothing to compare with.
        return jnp.where(counts & (others > 0), groups - mean, 0.0).reshape(per_token.shape)

    method = with_defaults(advantage, "reinforce", {"aggregation": "seq_mean_token_sum"}, options)
    return method._replace(min_group=2 if baseline == "leave_one_out" else 1)
