"""Methods that differ from GRPO in the baseline or the scale of one advantage per sequence."""

from __future__ import annotations

from typing import Literal, Unpack

from jaxrl_post.methods import checks
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped, with_defaults
from jaxrl_post.types import Method


def dr_grpo(**options: Unpack[ClippedOptions]) -> Method:
    r"""Dr. GRPO: GRPO without its two divisions, by the group's standard deviation and by the sequence's length.

    $$A_g = r_g - \bar r, \qquad L = \frac{1}{B H} \sum_{b, t} m_{b,t}\, \ell_{b,t}$$

    Args:
        **options: `horizon`, which must be given: $H$, a fixed length in tokens, e.g. the limit of new tokens;
            `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> dr_grpo(horizon=64).min_group
        2

    Reference: Understanding R1-Zero-Like Training: A Critical Perspective (arXiv 2503.20783).
    """
    return clipped("dr_grpo", {"aggregation": "seq_mean_token_sum_norm"}, options)


def rloo(**options: Unpack[Options]) -> Method:
    r"""RLOO: REINFORCE whose baseline is the mean reward of the group's other sequences, the KL inside the reward.

    $$A_g = r_g - \frac{1}{n - 1} \sum_{j \neq g} r_j, \qquad L = -\frac{1}{B} \sum_b A_b \sum_t \log \pi(y_{b,t})$$

    Args:
        **options: `beta` (0.05), `kl_in` (`"reward"`), `kl_estimator` (`"k1"`), `aggregation`
            (`"seq_mean_token_sum"`) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(rloo().needs), sorted(rloo(beta=0.0).needs)
        (['policy', 'reference'], ['policy'])

    Reference: Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
    (arXiv 2402.14740).
    """
    own: Options = {"aggregation": "seq_mean_token_sum", "beta": 0.05, "kl_in": "reward", "kl_estimator": "k1"}
    return with_defaults("rloo", "reinforce", own, options)


def remax(**options: Unpack[Options]) -> Method:
    r"""ReMax: REINFORCE whose baseline is the reward of the greedy answer; one sequence per prompt is enough.

    $$A = r - r_{greedy}$$

    Args:
        **options: `aggregation` (`"seq_mean_token_sum"`) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads `rollouts.extras["greedy_reward"]`, `[P]`.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> remax().min_group
        1

    Reference: ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language
    Models (arXiv 2310.10505).
    """
    return with_defaults("remax", "reinforce", {"aggregation": "seq_mean_token_sum"}, options)


def opo(**options: Unpack[Options]) -> Method:
    r"""OPO: exact on-policy REINFORCE with the baseline of least variance, the mean reward weighted by length.

    $$A_g = r_g - \sum_j L_j r_j / \sum_j L_j$$

    Nothing is clipped and nothing penalised: make one update per batch.

    Args:
        **options: those of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> opo().min_group
        2

    Reference: On-Policy RL with Optimal Reward Baseline (arXiv 2505.23585).
    """
    return with_defaults("opo", "reinforce", {}, options)


def gpg(
    *, f_norm: float = 1.0, count: Literal["rewards", "advantages"] = "rewards", **options: Unpack[Options]
) -> Method:
    r"""GPG: REINFORCE with centred rewards, scaled up for the sequences of the batch that carry no signal.

    $$A_g = \frac{B}{\max(1, M)}\, (r_g - \bar r) / F$$

    Args:
        f_norm: $F$, in units of the reward.
        count: what $M$ counts, see `advantages.gpg`.
        **options: those of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> gpg(count="advantages").min_group
        2

    Reference: GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning (arXiv 2504.02546).
    """
    checks.one_of("count", count, Literal["rewards", "advantages"])
    return with_defaults({"name": "gpg", "f_norm": f_norm, "count": count}, "reinforce", {}, options)


def pass_at_k(*, normalize_std: bool | None = None, **options: Unpack[ClippedOptions]) -> Method:
    r"""Trains the best of `G` answers: only the best of a group is credited, with its lead over the second best.

    $$A_{\arg\max} = r_{(1)} - r_{(2)}$$

    The expected gradient is that of the expected maximum of `G` rewards.

    Args:
        normalize_std: divide by the group's standard deviation; None for False, or what a preset says.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> pass_at_k().min_group
        2

    Reference: Optimizing Language Models for Inference Time Objectives using Reinforcement Learning
    (arXiv 2503.19595).
    """
    own = {} if normalize_std is None else {"normalize_std": normalize_std}
    return clipped({"name": "pass_at_k", **own}, {}, options)


def maxrl(**options: Unpack[ClippedOptions]) -> Method:
    r"""MaxRL: centred rewards over their mean, so that a group climbs the log of its success rate.

    $$A_g = (r_g - \bar r) / \bar r$$

    Args:
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two, and rewards that are not negative.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> maxrl().min_group
        2

    Reference: Maximum Likelihood Reinforcement Learning (arXiv 2602.02710).
    """
    return clipped("maxrl", {}, options)


def reinforce_plus_plus(*, gamma: float = 1.0, whiten: bool = True, **options: Unpack[ClippedOptions]) -> Method:
    r"""REINFORCE++: reward-to-go less a KL penalty per token, normalised over the batch, in PPO's clipped loss.

    $$A_t = \mathrm{whiten}(\sum_{s \ge t} \gamma^{s-t} (r_s - \beta\, KL_s))$$

    Args:
        gamma: discount per token.
        whiten: False leaves the reward-to-go as it is.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `beta` (0.01), `kl_in` (`"reward"`),
            `kl_estimator` (`"k1"`) and the others of `policy_gradient`.

    Returns:
        A `Method`; one sequence per prompt is enough.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> reinforce_plus_plus().min_group, sorted(reinforce_plus_plus(beta=0.0).needs)
        (1, ['policy'])

    Reference: REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models
    (arXiv 2501.03262).
    """
    checks.within("gamma", gamma, 0, 1)
    own: Options = {"beta": 0.01, "kl_in": "reward", "kl_estimator": "k1"}
    return clipped({"name": "reinforce_plus_plus", "gamma": gamma, "whiten": whiten}, own, options)


def reinforce_plus_plus_baseline(**options: Unpack[ClippedOptions]) -> Method:
    r"""REINFORCE++ with a baseline: rewards less their group's mean, normalised over the tokens of the batch.

    $$A_{g,t} = \mathrm{whiten}(r_g - \bar r)$$

    Args:
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None), `beta` (0.01), `kl_estimator` (`"k2"`) and
            the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(reinforce_plus_plus_baseline().needs)
        ['policy', 'reference']

    Reference: REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models
    (arXiv 2501.03262).
    """
    return clipped("reinforce_plus_plus_baseline", {"beta": 0.01, "kl_estimator": "k2"}, options)
