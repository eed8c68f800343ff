"""Methods that reward progress: by how much each step raised the chance of the known answer.

Who is asked, and after which steps, is said here; what the gains become is in `advantages.progress`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

import jax
import jax.numpy as jnp

from jaxrl_post import advantages, rewards
from jaxrl_post.advantages.progress import Discount, Pooling
from jaxrl_post.methods import checks, probing
from jaxrl_post.methods.choices import Choice
from jaxrl_post.methods.credit import Advantage, Credit, Signals
from jaxrl_post.methods.policy_gradient import Baseline, ClippedOptions, Options, clipped, with_defaults
from jaxrl_post.methods.segments import Segmenter, as_segmenter
from jaxrl_post.types import ANSWER_TOKENS, PROBE, Array, Method, Rollouts

Form: TypeAlias = Literal["log_prob", "probability"]
Prover: TypeAlias = Literal["answer", "value"]

_ANSWER = "answer"  # the probe's name


class AnswerProbe(NamedTuple):
    """The known answer, put behind every step.

    Attributes:
        steps: `rollouts -> [B, T]`: the step of each trained token, below `num_steps`.
        texts: `rollouts -> {name: (Rollouts, role)}`: for `Method.probes`.
        belief: `Signals -> Belief`: what the role said.
    """

    steps: Segmenter
    texts: Callable[[Rollouts], Mapping[str, tuple[Rollouts, str]]]
    belief: Callable[[Signals], probing.Belief]


def bounded_steps(steps: Choice, num_steps: int) -> Segmenter:
    """The function that a choice of steps means, with later steps than `num_steps` made part of the last.

    Args:
        steps: see `segments.as_segmenter`; `"length"` and `"entropy"` make `num_steps` steps if they do not say else.
        num_steps: most steps of a trajectory.

    Raises:
        ValueError: if `num_steps` is below 1, or the choice is unknown.

    Example:
        >>> from jaxrl_post import data
        >>> rollouts = data.to_rollouts([[7]], [[[1, 1, 2, 2]]], length=5)
        >>> bounded_steps({"name": "length", "num_steps": 4}, 3)(rollouts).tolist()
        [[-1, 0, 1, 2, 2]]
    """
    checks.within("num_steps", num_steps, 1)
    if not callable(steps):
        given: dict[str, Any] = {"name": steps} if isinstance(steps, str) else dict(steps)
        if given.get("name") in ("length", "entropy"):
            given = {"num_steps": num_steps, **given}
        steps = given
    segmenter = as_segmenter(steps)
    return lambda rollouts: jnp.minimum(segmenter(rollouts), num_steps - 1)


def with_observations(rollouts: Rollouts, step: Array) -> tuple[Rollouts, Array]:
    """Rollouts in which what the environment wrote after a step is part of it, as a question asked after it should see.

    Args:
        rollouts: any.
        step: `[B, T]` int, the step of each trained token; -1 elsewhere.

    Returns:
        The rollouts, with a mask of 1 from the first trained token to the end of the row, and the steps `[B, T]`.

    Example:
        >>> from jaxrl_post import data
        >>> rollouts = data.to_rollouts([[7]], [[[1, 9, 2]]], length=5)
        >>> rollouts = rollouts.replace(mask=rollouts.mask.at[0, 2].set(0))  # 9 is what a tool answered
        >>> with_observations(rollouts, jnp.array([[-1, 0, -1, 1, -1]]))[1].tolist()
        [[-1, 0, 0, 1, -1]]
    """
    acts = (rollouts.mask != 0) & (step >= 0)
    places = jnp.arange(acts.shape[1])
    last = jax.lax.cummax(jnp.where(acts, places, -1), axis=1)
    there = (last >= 0) & (places < rollouts.length.reshape(-1, 1))
    carried = jnp.take_along_axis(step, jnp.maximum(last, 0), axis=1)
    return rollouts.replace(mask=there.astype(rollouts.mask.dtype)), jnp.where(there, carried, -1)


def answer_probe(
    steps: Choice, num_steps: int, prefix: Sequence[int], suffix: Sequence[int], role: str = "policy"
) -> AnswerProbe:
    """A probe that asks a role, before the first step and after each, how likely the known answer is."""
    segmenter = bounded_steps(steps, num_steps)

    def texts(rollouts: Rollouts) -> dict[str, tuple[Rollouts, str]]:
        seen, step = with_observations(rollouts, segmenter(rollouts))
        answer = rollouts.extras[ANSWER_TOKENS]
        made = probing.append_after_steps(seen, step, answer, num_steps=num_steps, prefix=prefix, suffix=suffix)
        return {_ANSWER: (made, role)}

    def belief(s: Signals) -> probing.Belief:
        probe, _ = texts(s.rollouts)[_ANSWER]
        return probing.belief(s.stats[PROBE + _ANSWER].logp, probe, group_size=s.rollouts.group_size)

    return AnswerProbe(segmenter, texts, belief)


def asked(
    probe: AnswerProbe,
    apply: Callable[[Signals], Credit | Array],
    needs: Mapping[str, frozenset[str]] | None = None,
    min_group: int = 1,
) -> Advantage:
    """An advantage that reads the belief in the answer."""
    return Advantage(
        lambda state, signals: (apply(signals), state),
        needs={**(needs or {}), PROBE + _ANSWER: frozenset({"logp"})},
        min_group=min_group,
        wants=frozenset({ANSWER_TOKENS}),
        probes=probe.texts,
    )


def igpo(
    *,
    steps: Choice = "turns",
    num_steps: int = 10,
    form: Form = "log_prob",
    pooling: Pooling = "separate",
    gamma: float = 1.0,
    discount: Discount = "turn",
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    ddof: int = 1,
    eps: float = 1e-6,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""IGPO: a turn earns what it added to the policy's belief in the known answer, the last one the outcome.

    $$\delta_k = s_k - s_{k-1}, \quad s_k = \frac{1}{L} \sum_j \log \pi(a_j | x, z_{\le k}, a_{<j}), \qquad
    A_{g,k} = \sum_{j \ge k} \gamma^{j-k} \tilde r_{g,j}$$

    with gains and outcomes normalised over the group each (`advantages.turn_rewards`). It learns from groups whose
    outcomes are all equal, which GRPO cannot; a trajectory of one turn has its outcome alone.

    Args:
        steps: what a turn is, see `segments.as_segmenter`: `"turns"`, `"length"`, `"entropy"`, or a mapping.
        num_steps: most turns; later ones are part of the last. Every group costs `1 + G * num_steps` texts to score.
        form: a gain is a difference of mean log-probs, or of their exponentials (`"probability"`: the paper's first
            version and its code).
        pooling: see `advantages.turn_rewards`.
        gamma: discount.
        discount: per `"turn"` or `"token"`, see `advantages.igpo`.
        prefix: token ids put before the answer, e.g. of the tags that an answer is given in.
        suffix: token ids put after it.
        ddof: of the standard deviations, 1 for unbiased.
        eps: added to them.
        **options: `clip_low` (0.2), `clip_high` (0.2) and `dual_clip` (None) of `losses.ppo`; `beta` (0.001),
            `aggregation` (`"seq_mean_token_mean"`) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two, and answers as tokens (`rollouts.extras["answer_tokens"]`).

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(igpo(beta=0.0).needs), sorted(igpo().wants)
        (['policy', 'probe/answer'], ['answer_tokens'])

    Reference: Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents
    (arXiv 2510.14967).
    """
    checks.one_of("form", form, Form)
    checks.one_of("pooling", pooling, Pooling)
    checks.one_of("discount", discount, Discount)
    checks.within("gamma", gamma, 0, 1)
    checks.within("eps", eps, 0)
    probe = answer_probe(steps, num_steps, prefix, suffix)

    def apply(s: Signals) -> Array:
        found = probe.belief(s)
        belief = advantages.answer_belief(found.logp, found.length, log=form == "log_prob")
        return advantages.igpo(
            advantages.belief_gain(belief, found.known),
            s.reward,
            probe.steps(s.rollouts),
            s.mask,
            s.valid,
            gamma=gamma,
            discount=discount,
            pooling=pooling,
            ddof=ddof,
            eps=eps,
        )

    defaults: Options = {} if options.get("preset") else {"beta": 0.001, "aggregation": "seq_mean_token_mean"}
    return clipped(asked(probe, apply, min_group=2), defaults, options)


def grpo_vps(
    *,
    alpha: float = 1.0,
    steps: Choice = "entropy",
    num_steps: int = 4,
    normalize: bool = False,
    skip_last: bool = False,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    normalize_std: bool = True,
    **options: Unpack[ClippedOptions],
) -> Method:
    r"""GRPO-VPS: the group-relative advantage plus what the token's segment added to the belief in the known answer.

    $$A_{g,t} = \frac{r_g - \bar r}{\mathrm{std}(r) + \epsilon} + \alpha\, (p_{g,k(t)} - p_{g,k(t)-1})$$

    with $p_k$ the probability that the policy gives the answer after segment $k$.

    Args:
        alpha: $\alpha$; the paper's value is not known.
        steps: how a trajectory is cut, see `segments.as_segmenter`: `"entropy"`, `"length"`, `"turns"`, or a mapping.
        num_steps: most segments; later ones are part of the last. Every group costs `1 + G * num_steps` texts.
        normalize: $p$ is the geometric mean over the answer's tokens, for long answers.
        skip_last: the last segment gains nothing: for trajectories that end by giving the answer, after which asking
            for it says little.
        prefix: token ids put before the answer, e.g. of "The answer is".
        suffix: token ids put after it.
        normalize_std: of `advantages.grpo`.
        **options: `clip_low` (0.2), `clip_high` (0.2) and `dual_clip` (None) of `losses.ppo`; `beta` (0.04),
            `aggregation` (`"seq_mean_token_mean"`) and the others of `policy_gradient`.

    Returns:
        A `Method`; it needs groups of at least two, and answers as tokens (`rollouts.extras["answer_tokens"]`).

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(grpo_vps(beta=0.0).needs)
        ['policy', 'probe/answer']

    Reference: GRPO-VPS: Enhancing Group Relative Policy Optimization with Verifiable Process Supervision for Effective
    Reasoning (arXiv 2604.20659); weight and normalisation of $p$ are not given in what we could read of it.
    """
    checks.within("alpha", alpha, 0)
    probe = answer_probe(steps, num_steps, prefix, suffix)

    def apply(s: Signals) -> Array:
        step, found = probe.steps(s.rollouts), probe.belief(s)
        gain = advantages.belief_gain(
            advantages.answer_belief(found.logp, found.length, normalize=normalize), found.known
        )
        if skip_last:
            gain = jnp.where(advantages.is_last(advantages.step_exists(step, s.mask, num_steps=num_steps)), 0.0, gain)
        whole = advantages.grpo(s.reward, s.valid, normalize_std=normalize_std)
        return advantages.with_progress(whole, gain, step, s.mask, alpha=alpha)

    defaults: Options = {} if options.get("preset") else {"beta": 0.04, "aggregation": "seq_mean_token_mean"}
    return clipped(asked(probe, apply, min_group=2), defaults, options)


def pav(
    *,
    alpha: float = 5.0,
    k: int = 4,
    prover: Prover = "answer",
    steps: Choice = "length",
    num_steps: int = 4,
    normalize: bool = True,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    baseline: Baseline = "leave_one_out",
    **options: Unpack[Options],
) -> Method:
    r"""PAV: REINFORCE on the outcome plus the progress that each step makes for a prover, the best of $K$ tries.

    $$A_t = r - b + \alpha\, \big((1 - q_{k(t)-1})^K - (1 - q_{k(t)})^K\big)$$

    $q_k$ is the success rate of the role `prover` from the end of step $k$; the outcome stands for $Q^\pi$. The
    weight is of the step alone, not a return: progress is an advantage already.

    Args:
        alpha: $\alpha$; the paper's range is 3 to 5 in training (recalled, not looked up).
        k: $K$, tries of the prover; 1 for the role's own success rate.
        prover: where $q$ comes from: `"answer"`, the probability that the role gives to the known answer after each
            step, or `"value"`, its value head before the next step's first token, clipped to [0, 1]; after the last
            step it is then the reward, clipped likewise.
        steps: how a trajectory is cut, see `segments.as_segmenter`.
        num_steps: most steps; later ones are part of the last.
        normalize: the answer's probability is the geometric mean over its tokens.
        prefix: token ids put before the answer.
        suffix: token ids put after it.
        baseline: $b$, `"none"` or `"leave_one_out"`, the mean outcome of the others of the group.
        **options: `aggregation` (`"seq_mean_token_sum"`), `kl_estimator` (`"k2"`) and the others of `policy_gradient`.

    Returns:
        A `Method` that reads the role `prover`, e.g. the policy that training starts from.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(pav().needs), sorted(pav(prover="value").needs["prover"])
        (['policy', 'probe/answer', 'prover'], ['value'])

    Reference: Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning (arXiv 2410.08146).
    """
    checks.within("alpha", alpha, 0)
    checks.within("k", k, 1)
    checks.one_of("prover", prover, Prover)
    checks.one_of("baseline", baseline, Baseline)
    if prover == "value" and (prefix or suffix or not normalize):
        raise ValueError("prover='value' asks for no answer: prefix, suffix and normalize=False do not apply to it")
    probe = answer_probe(steps, num_steps, prefix, suffix, role="prover")

    def combined(s: Signals, rate: Array, known: Array | None) -> Array:
        gain = rewards.prover_advantage(rate, known, k=k)
        outcome = (advantages.rloo if baseline == "leave_one_out" else advantages.reinforce)(s.reward, s.valid)
        return advantages.with_progress(outcome, gain, probe.steps(s.rollouts), s.mask, alpha=alpha)

    def by_answer(s: Signals) -> Array:
        found = probe.belief(s)
        return combined(s, advantages.answer_belief(found.logp, found.length, normalize=normalize), found.known)

    def by_value(s: Signals) -> Array:
        step = probe.steps(s.rollouts)
        return combined(s, _rate_by_value(s.stats["prover"].value, s.reward, step, s.mask, num_steps), None)

    least = 2 if baseline == "leave_one_out" else 1
    if prover == "answer":
        advantage = asked(probe, by_answer, {"prover": frozenset()}, min_group=least)
    else:
        needs = {"prover": frozenset({"value"})}
        advantage = Advantage(lambda state, s: (by_value(s), state), needs=needs, min_group=least)
    return with_defaults(advantage, "reinforce", {"aggregation": "seq_mean_token_sum", "kl_estimator": "k2"}, options)


def _rate_by_value(value: Array, reward: Array, step: Array, mask: Array, num_steps: int) -> Array:
    """`[B, 1 + S]`: the value before the first step, before each next one, and the reward after the last."""
    before, exists = advantages.to_turns(value, step, mask, num_turns=num_steps)
    known = jnp.pad(exists, ((0, 0), (0, 1)), constant_values=True)
    rate = jnp.concatenate([before, reward.reshape(-1, 1).astype(before.dtype)], axis=1)
    places = jnp.where(known, jnp.arange(num_steps + 1), num_steps)
    following = jax.lax.cummin(places, axis=1, reverse=True)
    return jnp.clip(jnp.take_along_axis(rate, following, axis=1), 0, 1)
