"""What was good: reward functions, their sum, and adapters for those written for other systems."""

from jaxrl_post.rewards.adapters import from_verifiers, from_verl
from jaxrl_post.rewards.boxes import box_edges, box_grounding, box_hit, box_iou, box_reward, difficulty_weights
from jaxrl_post.rewards.budget import budget_cosine, budget_level
from jaxrl_post.rewards.choices import partial_choice, partial_choice_reward, set_overlap
from jaxrl_post.rewards.combining import Ladder, gated_sum, sweet_spot, verified_score
from jaxrl_post.rewards.consistency import consistency_reward
from jaxrl_post.rewards.dense import rto
from jaxrl_post.rewards.density_ratio import density_ratio_reward, pair_accuracy
from jaxrl_post.rewards.early_exit import exit_decay
from jaxrl_post.rewards.ensembles import best_of_n_kl, ensemble_reward, expected_best_of_n
from jaxrl_post.rewards.function_calls import Call, ast_equal, function_call_reward, function_calls, parse_calls
from jaxrl_post.rewards.goal_embedding import goal_similarity, pearson_distance
from jaxrl_post.rewards.judge_attacks import (
    MASTER_KEYS,
    JudgeAttack,
    attack_judge,
    cohen_kappa,
    opener,
    opener_negatives,
)
from jaxrl_post.rewards.judging import from_judge
from jaxrl_post.rewards.length import cosine_length, soft_overlong, stop_properly
from jaxrl_post.rewards.length_history import budget_schedule, history_length, target_length
from jaxrl_post.rewards.listwise_judge import (
    ListwiseReply,
    consensus_scores,
    from_listwise_judge,
    kendall_tau,
    listwise_reply_reward,
    listwise_request,
    order_accuracy,
    parse_listwise,
    score_accuracy,
)
from jaxrl_post.rewards.loading import load
from jaxrl_post.rewards.math import gsm8k_answer, math_verify, math_verify_reward
from jaxrl_post.rewards.novelty import (
    RunningMoments,
    combine_bonuses,
    count_bonus,
    elliptical_bonus,
    elliptical_bonus_of_group,
    fingerprint,
    noveld_bonus,
    rnd_bonus,
    token_embedding,
)
from jaxrl_post.rewards.pairwise_judge import calibration_error, fit_temperature, symmetric_win_probability
from jaxrl_post.rewards.provers import beam_score, bok_value, effective_reward, prover_advantage, prover_quality
from jaxrl_post.rewards.relative_length import group_length
from jaxrl_post.rewards.renorm import on_step_ends, renorm
from jaxrl_post.rewards.rubrics import from_rubric, rubric_functions
from jaxrl_post.rewards.scaling import gap_reward, rescale, zscore_by_input
from jaxrl_post.rewards.scoring import Reward, RewardError, RewardFunction, RowErrors, Scored, check_columns, score
from jaxrl_post.rewards.similarity import Matching, greedy_matching, matching_reward
from jaxrl_post.rewards.submodular import coverage, distinct_ngrams, facility_location, information_gain, marginal_gains
from jaxrl_post.rewards.trajectory_scores import (
    blended,
    mixed_step_score,
    step_alignment,
    step_coherence,
    trace_score,
)
from jaxrl_post.rewards.verifiable import exact_match, task_score, task_solved, thresholded
from jaxrl_post.rewards.word_overlap import word_f1
from jaxrl_post.rewards.yes_no import yes_probability

__all__ = [
    "MASTER_KEYS",
    "Call",
    "JudgeAttack",
    "Ladder",
    "ListwiseReply",
    "Matching",
    "Reward",
    "RewardError",
    "RewardFunction",
    "RowErrors",
    "RunningMoments",
    "Scored",
    "ast_equal",
    "attack_judge",
    "beam_score",
    "best_of_n_kl",
    "blended",
    "bok_value",
    "box_edges",
    "box_grounding",
    "box_hit",
    "box_iou",
    "box_reward",
    "budget_cosine",
    "budget_level",
    "budget_schedule",
    "calibration_error",
    "check_columns",
    "cohen_kappa",
    "combine_bonuses",
    "consensus_scores",
    "consistency_reward",
    "cosine_length",
    "count_bonus",
    "coverage",
    "density_ratio_reward",
    "difficulty_weights",
    "distinct_ngrams",
    "effective_reward",
    "elliptical_bonus",
    "elliptical_bonus_of_group",
    "ensemble_reward",
    "exact_match",
    "exit_decay",
    "expected_best_of_n",
    "facility_location",
    "fingerprint",
    "fit_temperature",
    "from_judge",
    "from_listwise_judge",
    "from_rubric",
    "from_verifiers",
    "from_verl",
    "function_call_reward",
    "function_calls",
    "gap_reward",
    "gated_sum",
    "goal_similarity",
    "greedy_matching",
    "group_length",
    "gsm8k_answer",
    "history_length",
    "information_gain",
    "kendall_tau",
    "listwise_reply_reward",
    "listwise_request",
    "load",
    "marginal_gains",
    "matching_reward",
    "math_verify",
    "math_verify_reward",
    "mixed_step_score",
    "noveld_bonus",
    "on_step_ends",
    "opener",
    "opener_negatives",
    "order_accuracy",
    "pair_accuracy",
    "parse_calls",
    "parse_listwise",
    "partial_choice",
    "partial_choice_reward",
    "pearson_distance",
    "prover_advantage",
    "prover_quality",
    "renorm",
    "rescale",
    "rnd_bonus",
    "rto",
    "rubric_functions",
    "score",
    "score_accuracy",
    "set_overlap",
    "soft_overlong",
    "step_alignment",
    "step_coherence",
    "stop_properly",
    "sweet_spot",
    "symmetric_win_probability",
    "target_length",
    "task_score",
    "task_solved",
    "thresholded",
    "token_embedding",
    "trace_score",
    "verified_score",
    "word_f1",
    "yes_probability",
    "zscore_by_input",
]
