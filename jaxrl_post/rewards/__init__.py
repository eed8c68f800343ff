"""What was good: reward functions, their sum, and adapters for those written for other systems."""

from jaxrl_post.rewards.adapters import from_verifiers, from_verl
from jaxrl_post.rewards.agreement import (
    Vote,
    agreement,
    answer_share,
    co_reward,
    cross_agreement,
    empo_reward,
    majority,
    paraphrase_consistency,
    semantic_entropy,
    similarity_across,
)
from jaxrl_post.rewards.benchmarks import (
    OneToMany,
    hacking_gap,
    hacking_onset,
    one_to_many,
    overoptimization,
)
from jaxrl_post.rewards.binding import with_options
from jaxrl_post.rewards.boxes import box_edges, box_grounding, box_hit, box_iou, box_reward, difficulty_weights
from jaxrl_post.rewards.budget import budget_cosine, budget_level
from jaxrl_post.rewards.captions import CaptionLabels, above_usual, episode_counts, with_intrinsic
from jaxrl_post.rewards.choices import partial_choice, partial_choice_reward, set_overlap
from jaxrl_post.rewards.chunks import chunk_reward, token_agreement, trajectory_agreement
from jaxrl_post.rewards.clip_delta import clip_delta
from jaxrl_post.rewards.combining import (
    Ladder,
    base_and_bonus,
    flawed_success,
    gated_sum,
    grounded_answer,
    sweet_spot,
    trust,
    verified_score,
)
from jaxrl_post.rewards.confidence import answer_confidence, confidence_bonus
from jaxrl_post.rewards.consistency import consistency_reward
from jaxrl_post.rewards.critics import critique, first_error
from jaxrl_post.rewards.dense import rto
from jaxrl_post.rewards.density_ratio import density_ratio_reward, pair_accuracy
from jaxrl_post.rewards.early_exit import exit_decay
from jaxrl_post.rewards.ensembles import best_of_n_kl, ensemble_reward, expected_best_of_n
from jaxrl_post.rewards.evidence import evidence, evidence_score
from jaxrl_post.rewards.function_calls import Call, ast_equal, function_call_reward, function_calls, parse_calls
from jaxrl_post.rewards.gaussian_boxes import gaussian_box, gaussian_coverage, gaussian_point
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
from jaxrl_post.rewards.likelihood import LikelihoodForm, answer_likelihood
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
from jaxrl_post.rewards.potential import (
    Hold,
    held_between_calls,
    hop,
    potential_shaping,
    progress_from_hops,
    progress_mix,
)
from jaxrl_post.rewards.provers import beam_score, bok_value, effective_reward, prover_advantage, prover_quality
from jaxrl_post.rewards.reference_shaping import ReferenceShape, RunningShape, preference_as_reward, running_scale
from jaxrl_post.rewards.relative_length import group_length, shortest_bonus, too_short
from jaxrl_post.rewards.renorm import on_step_ends, renorm
from jaxrl_post.rewards.rubrics import from_rubric, rubric_functions
from jaxrl_post.rewards.scaling import gap_reward, rescale, zscore_by_input
from jaxrl_post.rewards.scoring import Reward, RewardError, RewardFunction, RowErrors, Scored, check_columns, score
from jaxrl_post.rewards.shuffling import shuffle_consistency, shuffled_agreement
from jaxrl_post.rewards.similarity import Matching, greedy_matching, matching_reward
from jaxrl_post.rewards.spans import span_decay, span_scores, word_of_token
from jaxrl_post.rewards.spurious import advantage_loss, clip_share, expected_advantage_loss, random_reward
from jaxrl_post.rewards.submodular import coverage, distinct_ngrams, facility_location, information_gain, marginal_gains
from jaxrl_post.rewards.text_diversity import diversity, text_diversity, token_diversity
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
    "CaptionLabels",
    "Hold",
    "JudgeAttack",
    "Ladder",
    "LikelihoodForm",
    "ListwiseReply",
    "Matching",
    "OneToMany",
    "ReferenceShape",
    "Reward",
    "RewardError",
    "RewardFunction",
    "RowErrors",
    "RunningMoments",
    "RunningShape",
    "Scored",
    "Vote",
    "above_usual",
    "advantage_loss",
    "agreement",
    "answer_confidence",
    "answer_likelihood",
    "answer_share",
    "ast_equal",
    "attack_judge",
    "base_and_bonus",
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
    "chunk_reward",
    "clip_delta",
    "clip_share",
    "co_reward",
    "cohen_kappa",
    "combine_bonuses",
    "confidence_bonus",
    "consensus_scores",
    "consistency_reward",
    "cosine_length",
    "count_bonus",
    "coverage",
    "critique",
    "cross_agreement",
    "density_ratio_reward",
    "difficulty_weights",
    "distinct_ngrams",
    "diversity",
    "effective_reward",
    "elliptical_bonus",
    "elliptical_bonus_of_group",
    "empo_reward",
    "ensemble_reward",
    "episode_counts",
    "evidence",
    "evidence_score",
    "exact_match",
    "exit_decay",
    "expected_advantage_loss",
    "expected_best_of_n",
    "facility_location",
    "fingerprint",
    "first_error",
    "fit_temperature",
    "flawed_success",
    "from_judge",
    "from_listwise_judge",
    "from_rubric",
    "from_verifiers",
    "from_verl",
    "function_call_reward",
    "function_calls",
    "gap_reward",
    "gated_sum",
    "gaussian_box",
    "gaussian_coverage",
    "gaussian_point",
    "goal_similarity",
    "greedy_matching",
    "grounded_answer",
    "group_length",
    "gsm8k_answer",
    "hacking_gap",
    "hacking_onset",
    "held_between_calls",
    "history_length",
    "hop",
    "information_gain",
    "kendall_tau",
    "listwise_reply_reward",
    "listwise_request",
    "load",
    "majority",
    "marginal_gains",
    "matching_reward",
    "math_verify",
    "math_verify_reward",
    "mixed_step_score",
    "noveld_bonus",
    "on_step_ends",
    "one_to_many",
    "opener",
    "opener_negatives",
    "order_accuracy",
    "overoptimization",
    "pair_accuracy",
    "paraphrase_consistency",
    "parse_calls",
    "parse_listwise",
    "partial_choice",
    "partial_choice_reward",
    "pearson_distance",
    "potential_shaping",
    "preference_as_reward",
    "progress_from_hops",
    "progress_mix",
    "prover_advantage",
    "prover_quality",
    "random_reward",
    "renorm",
    "rescale",
    "rnd_bonus",
    "rto",
    "rubric_functions",
    "running_scale",
    "score",
    "score_accuracy",
    "semantic_entropy",
    "set_overlap",
    "shortest_bonus",
    "shuffle_consistency",
    "shuffled_agreement",
    "similarity_across",
    "soft_overlong",
    "span_decay",
    "span_scores",
    "step_alignment",
    "step_coherence",
    "stop_properly",
    "sweet_spot",
    "symmetric_win_probability",
    "target_length",
    "task_score",
    "task_solved",
    "text_diversity",
    "thresholded",
    "token_agreement",
    "token_diversity",
    "token_embedding",
    "too_short",
    "trace_score",
    "trajectory_agreement",
    "trust",
    "verified_score",
    "with_intrinsic",
    "with_options",
    "word_f1",
    "word_of_token",
    "yes_probability",
    "zscore_by_input",
]
