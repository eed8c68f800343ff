"""Losses of reward models that give an answer one score, and which pairs of answers they compare.

Scores are what the model gives, not log-probs. Losses of policies that are reward models by themselves are in
`preference` and `trajectory_dpo`; those of models that judge steps in `process`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_post import masked
from jaxrl_post.losses.arguments import check_at_least
from jaxrl_post.losses.consistency import prepare_group
from jaxrl_post.losses.trajectory_dpo import preference_pairs
from jaxrl_post.types import Array


def bradley_terry(first: Array, second: Array, label: Array | None = None, *, margin: float = 0.0) -> Array:
    r"""Cross-entropy of Bradley and Terry's model of a comparison, which may be a tie.

    $$\ell = -\mu \log\sigma(d - m) - (1 - \mu) \log\sigma(-d - m), \qquad d = r_1 - r_2$$

    $\mu$ is 1 where the first answer won, 1/2 where the two are equally good, and in between the share of judges who
    prefer the first. A tie has its minimum at $d = 0$: it pulls scores of equally good answers together, so that no
    peak is left among them for a policy to climb.

    Args:
        first: any shape, float: $r_1$, scores of the first answers.
        second: of the same shape: $r_2$, of the second ones.
        label: of the same shape, $\mu$ in [0, 1]. A constant. None for 1 everywhere.
        margin: $m$, at least 0, in units of the score: what a winner must lead by. With 0 the paper's loss; the code
            released with it has 3, and counts ties twice.

    Returns:
        The shape of `first`, float32 or wider, nats: the loss of each pair. Mean over the pairs that count with
        `masked.mean`, which is 0 if there are none.

    Raises:
        ValueError: if the shapes differ or `margin` is negative.

    Example:
        >>> first, second, label = jnp.array([1.0, 1.0, 0.0]), jnp.zeros(3), jnp.array([1.0, 0.5, 0.5])
        >>> [round(loss, 4) for loss in bradley_terry(first, second, label).tolist()]
        [0.3133, 0.8133, 0.6931]

    Reference: SoliReward: Mitigating Susceptibility to Reward Hacking and Annotation Noise in Video Generation Reward
    Models (arXiv 2512.22170).
    """
    check_at_least("margin", margin, 0, "a lead that winners must have")
    first, second = masked.as_float(first), masked.as_float(second)
    masked.check_like("second", second, "first", first)
    lead = first - second
    won = jax.nn.softplus(margin - lead)
    if label is None:
        return won
    label = masked.as_float(label)
    masked.check_like("label", label, "first", first)
    label = jax.lax.stop_gradient(label)
    return label * won + (1 - label) * jax.nn.softplus(margin + lead)


def pass_pairs(passed: Array, valid: Array | None = None) -> tuple[Array, Array]:
    r"""Comparisons that pass or fail labels imply, across prompts: passed with failed ones, and ties among the passed.

    Failed answers are not tied: they fail in ways that differ.

    Args:
        passed: `[N]`, nonzero where the answer passed.
        valid: `[N]` bool, False where the answer does not count; None for all.

    Returns:
        label: `[N, N]` float32, 1 where answer $i$ passed and $j$ failed, 1/2 elsewhere; see `bradley_terry`.
        pairs: `[N, N]` bool, which of them are compared. Each tie is there once.

    Raises:
        ValueError: if `passed` is not `[N]` or `valid` has another shape.

    Example:
        >>> label, pairs = pass_pairs(jnp.array([1, 0, 1]))
        >>> label.tolist()[0], pairs.astype(int).tolist()
        ([0.5, 1.0, 0.5], [[0, 1, 1], [0, 0, 0], [0, 1, 0]])

    Reference: SoliReward: Mitigating Susceptibility to Reward Hacking and Annotation Noise in Video Generation Reward
    Models (arXiv 2512.22170).
    """
    good = jnp.asarray(passed) != 0
    masked.check_axes("passed", good, "[N]")
    known = jnp.ones(good.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", known, "passed", good)
    wins = good[:, None] & ~good[None, :]
    ties = jnp.triu(good[:, None] & good[None, :], k=1)
    return jnp.where(wins, 1.0, 0.5), (wins | ties) & known[:, None] & known[None, :]


def ranked_bradley_terry(scores: Array, quality: Array, valid: Array | None = None) -> Array:
    r"""Bradley-Terry over all pairs of a ranked list, $-\mathrm{mean}_{(i, j):\, q_i > q_j} \log\sigma(r_i - r_j)$.

    Args:
        scores: `[P, G]` float: $r$, of the answers to each prompt.
        quality: `[P, G]` float: $q$, more for a better answer, e.g. minus its rank. Equal ones are not compared. A
            constant.
        valid: `[P, G]` bool, False where the answer does not count; None for all.

    Returns:
        `[P]`, float32 or wider, nats: the loss of each prompt; 0 with zero gradient where it has no pair.

    Raises:
        ValueError: if the arrays are not `[P, G]` of one shape.

    Example:
        >>> loss = ranked_bradley_terry(jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[-1, -2, -3]]))
        >>> round(float(loss[0]), 4)  # pairs with leads of 1, 1 and 2
        0.2512

    Reference: Training language models to follow instructions with human feedback (arXiv 2203.02155).
    """
    scores, known, (quality,) = prepare_group(scores, valid, quality=quality)
    better = preference_pairs(quality, known, min_gap=0.0)
    return masked.mean(bradley_terry(*jnp.broadcast_arrays(scores[:, :, None], scores[:, None, :])), better, (1, 2))


def policy_discrimination(scores: Array, source: Array, valid: Array | None = None) -> Array:
    r"""POLAR's pre-training: an answer of the policy that made the reference scores above one of another policy.

    $$\ell = -\mathrm{mean}_{(i, j, k):\, s_i = s_j \neq s_k,\, i \neq j} \log\sigma(R_{ij} - R_{ik})$$

    over all triples of a prompt's answers: a reference $i$, and candidates $j$ of the same and $k$ of another policy.
    No label is needed but which policy made an answer. The score estimates how much likelier the reference's policy
    makes the candidate than the others do. Fine-tuning on ranked answers is `ranked_bradley_terry` of scores whose
    reference is the best answer.

    Args:
        scores: `[P, N, N]` float: $R_{ij}$, score of candidate $j$ with answer $i$ as the reference.
        source: `[P, N]` int: $s$, which policy made the answer.
        valid: `[P, N]` bool, False where the answer does not count; None for all.

    Returns:
        `[P]`, float32 or wider, nats: the loss of each prompt; 0 with zero gradient where it has no triple.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> scores = jnp.array([[[0.0, 1.0, -1.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]])
        >>> round(float(policy_discrimination(scores, jnp.array([[0, 0, 1]]))[0]), 4)
        0.1269

    Reference: Pre-Trained Policy Discriminators are General Reward Models (arXiv 2507.05197).
    """
    scores, source = masked.as_float(scores), jnp.asarray(source)
    masked.check_axes("scores", scores, "[P, N, N]")
    masked.check_axes("source", source, "[P, N]")
    if scores.shape != (*source.shape, source.shape[1]):
        raise ValueError(f"scores must be [P, N, N] for source [P, N] of {source.shape}, got {scores.shape}")
    known = jnp.ones(source.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", known, "source", source)
    both = known[:, :, None] & known[:, None, :]
    same = source[:, :, None] == source[:, None, :]
    positive = both & same & ~jnp.eye(source.shape[1], dtype=bool)
    triples = positive[:, :, :, None] & (both & ~same)[:, :, None, :]
    scores = jnp.where(both, scores, 0.0)
    loss = bradley_terry(*jnp.broadcast_arrays(scores[:, :, :, None], scores[:, :, None, :]))
    return masked.mean(loss, triples, (1, 2, 3))


def cooper_pairs(key: Array, correct: Array, accepted: Array, valid: Array | None = None) -> tuple[Array, Array]:
    r"""Cooper's comparison of each prompt: one of its right answers, with a corrupted version of that.

    A rule that hardly ever passes a wrong answer says which are right; another model corrupts the chosen one, and the
    same rule must then reject it. The reward model, which the policy is trained on, learns from the pair by
    `bradley_terry`, mean over the prompts that have one, so that it moves on while the policy looks for its faults.

    Args:
        key: for the choice, uniform among the right answers.
        correct: `[P, G]`, nonzero where the rule finds the answer right.
        accepted: `[P]`, nonzero where the rule finds the corrupted version wrong. All ones where it is yet to be made
            of the chosen answer; then multiply the mask.
        valid: `[P, G]` bool, False where the answer does not count; None for all.

    Returns:
        chosen: `[P]` int32, which answer is the better one; 0 where there is none.
        mask: `[P]` bool, whether the prompt has a pair.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> correct, accepted = jnp.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]]), jnp.array([1, 1, 0])
        >>> chosen, mask = cooper_pairs(jax.random.key(0), correct, accepted)
        >>> chosen.tolist(), mask.tolist()
        ([2, 0, 0], [True, False, False])

    Reference: Cooper: Co-Optimizing Policy and Reward Models in Reinforcement Learning for Large Language Models
    (arXiv 2508.05613).
    """
    right, accepted = jnp.asarray(correct) != 0, jnp.asarray(accepted) != 0
    masked.check_axes("correct", right, "[P, G]")
    masked.check_like("accepted", accepted, "one number per row of correct", right[:, 0])
    known = jnp.ones(right.shape, bool) if valid is None else jnp.asarray(valid) != 0
    masked.check_like("valid", known, "correct", right)
    right = right & known
    chosen = jnp.argmax(jnp.where(right, jax.random.uniform(key, right.shape), -1.0), axis=1)
    any_right = jnp.any(right, axis=1)
    return jnp.where(any_right, chosen, 0).astype(jnp.int32), any_right & accepted
