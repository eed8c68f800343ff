"""Methods for short answers that point at something, where prompts differ in how hard they are to hit."""

from __future__ import annotations

from typing import Unpack

from jaxrl_post import advantages
from jaxrl_post.methods.credit import Advantage, Credit, Signals
from jaxrl_post.methods.policy_gradient import ClippedOptions, Options, clipped
from jaxrl_post.types import Method


def gui_g1(*, prompt_weight: str | None = "prompt_weight", **options: Unpack[ClippedOptions]) -> Method:
    r"""GUI-G1: GRPO without normalisation by length or standard deviation, with a weight for every prompt.

    $$L = \mathrm{mean}_i\, w_q \frac{1}{C} \sum_t m_t\, \ell_{PPO}(A_i), \qquad A_i = r_i - \mathrm{mean}_G\, r$$

    The reward is `rewards.box_grounding`; `rewards.difficulty_weights` makes the weights, which are larger the smaller
    the target is. Its third part, a prompt that asks for the answer without reasoning first, is a matter of the data.

    Args:
        prompt_weight: column of the data (or key of `rollouts.extras`, `[P]`) that holds the weights; None for 1.
        **options: `aggregation` (`"seq_mean_token_sum_norm"`), `horizon` (64), `clip_low` (0.2), `clip_high` (0.2),
            `dual_clip` (None) and the others of `policy_gradient`.

    Returns:
        A `Method`; without weights it is Dr. GRPO.

    Raises:
        ValueError: for a keyword out of its range, or one that does not apply.

    Example:
        >>> sorted(gui_g1().wants)
        ['prompt_weight']

    Reference: GUI-G1: Understanding R1-Zero-Like Training for Visual Grounding in GUI Agents, arXiv 2505.15810.
    """

    def credit(state: tuple[()], s: Signals) -> tuple[Credit, tuple[()]]:
        found = advantages.dr_grpo(s.reward, s.valid)
        if prompt_weight is not None:
            # The surrogate is linear in the size of the advantage, so that the weight may stand here.
            found = (
                found * s.extra(prompt_weight, "give the data a column of that name, one number per prompt")[:, None]
            )
        return Credit(found), state

    own: Options = {"aggregation": "seq_mean_token_sum_norm"}
    if options.get("aggregation", own["aggregation"]) == own["aggregation"]:
        own["horizon"] = 64
    wants = frozenset() if prompt_weight is None else frozenset({prompt_weight})
    return clipped(Advantage(credit, min_group=2, wants=wants), own, options)
