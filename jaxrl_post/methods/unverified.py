"""Methods that need an answer and no verifier, or a judge of steps that must not be farmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, Unpack

from jaxrl_post import advantages, rewards
from jaxrl_post.methods import checks
from jaxrl_post.methods.actor_critic import CriticOptions, less_kl, with_critic
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.policy_gradient import ClippedOptions, clipped
from jaxrl_post.methods.progress import answer_probe, asked
from jaxrl_post.methods.signals import Credit, Signals
from jaxrl_post.methods.step_credit import check_steps, find_steps, outcome_of, step_component
from jaxrl_post.types import PROBE, Array, Method, Rollouts, Stats

Likelihood: TypeAlias = Literal["log_prob", "mean_log_prob", "prob", "mean_prob", "group"]


def likelihood_reward(
    *,
    form: Likelihood = "log_prob",
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""Reasoning without a verifier: it is rewarded by how likely it makes the known answer, which is not sampled.

    $$A_i = R_i - \frac{1}{n - 1} \sum_{j \ne i} R_j, \qquad R_i = \sum_t \log\pi(a_t | x, z_i, a_{<t})$$

    Completions are to end where the answer would begin (`rollout.stop`). Their rewards are not read. The answer itself
    is not trained on, only the reasoning that leads to it: of the objective's gradient this is the first of two terms.

    Args:
        form: of the reward, see `rewards.answer_likelihood`; or `"group"`: `advantages.jepo`.
        prefix: token ids put before the answer, e.g. of the tags that an answer is given in.
        suffix: token ids put after it.
        **options: `clip_low` (0.2), `clip_high` (0.2), `dual_clip` (None) and the others of `policy_gradient`, but for
            `kl_in`.

    Returns:
        A `Method`; it needs groups of at least two, and answers as tokens (`rollouts.extras["answer_tokens"]`).

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(likelihood_reward(form="group").needs)
        ['policy', 'probe/answer']

    Reference: Likelihood-Based Reward Designs for General LLM Reasoning (arXiv 2602.03979).
    """
    checks.one_of("form", form, Likelihood)
    probe = answer_probe({"name": "length", "num_steps": 1}, 1, prefix, suffix)

    def apply(s: Signals) -> Credit:
        texts, _ = probe.texts(s.rollouts)["answer"]
        # Column 0 of a group is the prompt alone.
        shape = (s.rollouts.num_prompts, -1)
        known = texts.valid.reshape(shape)[:, 1:] & s.valid
        kind = "log_prob" if form == "group" else form
        found = rewards.answer_likelihood(s.stats[PROBE + "answer"].logp, texts.mask, form=kind).reshape(shape)[:, 1:]
        credit = advantages.jepo(found, known) if form == "group" else advantages.rloo(found, known)
        return Credit(credit, keep=known.astype(found.dtype))

    return clipped(asked(probe, apply, min_group=2)._replace(penalized=False), {}, options)


def pr_clip_delta(
    *,
    process: str,
    threshold: float | None,
    delta: bool = True,
    outcome: str | None = None,
    alpha: float = 0.02,
    steps: Choice = "turns",
    max_steps: int | None = None,
    beta: float = 0.0,
    **options: Unpack[CriticOptions],
) -> Method:
    r"""PPO with a process reward model that cannot be farmed: bad steps cost, and repetition pays nothing.

    $$r_k = \alpha\, d_k \text{ on the last token of step } k, \qquad r_{last} \mathrel{+}= o$$

    Args:
        process: name in `rollouts.rewards` of the scores of steps: `[B, T]` on the token where they were earned, or
            `[P, G]`, the same for all steps of the sequence; NaN where a step could not be scored, which earns 0.
        threshold: $\eta$ of `rewards.clip_delta`; None for no clip.
        delta: the differences to the next step; False leaves them out.
        outcome: name in `rollouts.rewards` of the outcome, `[P, G]`; None for the whole reward.
        alpha: $\alpha$.
        steps: how trajectories are cut, see `segments.as_segmenter`.
        max_steps: steps of a sequence that earn something; None for all.
        beta: weight of the k1 KL that is taken from the reward.
        **options: `lam` (1.0), `gamma` (1.0), `clip_low` (0.2), `clip_high` (0.2) and the others of `ppo`.

    Returns:
        A `Method` that trains the roles `policy` and `critic`.

    Raises:
        ValueError: for a keyword out of its range, or a horizon that does not apply.

    Example:
        >>> sorted(pr_clip_delta(process="judge", threshold=0.9).trains)
        ['critic', 'policy']

    Reference: On Designing Effective RL Reward at Training Time for LLM Reasoning (arXiv 2410.15115).
    """
    checks.within("alpha", alpha, 0)
    checks.within("beta", beta, 0)
    check_steps(steps, max_steps)

    def token_rewards(rollouts: Rollouts, stats: Stats, mask: Array, old_logp: Array) -> Array:
        found = find_steps(rollouts, mask, steps, max_steps)
        scores = step_component(rollouts, process, found, mask).reshape(-1, found.count)
        exists = found.exists.reshape(-1, found.count)
        earned = alpha * rewards.clip_delta(scores, exists, threshold=threshold, delta=delta)
        at_end = advantages.on_last_token(outcome_of(rollouts, outcome), mask)
        return less_kl(rewards.on_step_ends(earned, found.step, mask) + at_end, stats, mask, old_logp, beta=beta)

    base = with_critic(token_rewards, ("reference",) if beta else (), **{"lam": 1.0, **options})
    return base._replace(contrasts=False)
