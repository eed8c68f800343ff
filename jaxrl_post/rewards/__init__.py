"""What was good: reward functions, their sum, and adapters for those written for other systems."""

from jaxrl_post.rewards.adapters import from_verifiers, from_verl
from jaxrl_post.rewards.boxes import box_edges, box_grounding, box_hit, box_iou, box_reward, difficulty_weights
from jaxrl_post.rewards.consistency import consistency_reward
from jaxrl_post.rewards.length import cosine_length, soft_overlong, stop_properly
from jaxrl_post.rewards.loading import load
from jaxrl_post.rewards.relative_length import group_length
from jaxrl_post.rewards.scaling import gap_reward, rescale, zscore_by_input
from jaxrl_post.rewards.scoring import Reward, RewardError, RewardFunction, RowErrors, Scored, score
from jaxrl_post.rewards.similarity import Matching, greedy_matching, matching_reward
from jaxrl_post.rewards.submodular import coverage, distinct_ngrams, facility_location, information_gain, marginal_gains
from jaxrl_post.rewards.verifiable import exact_match, task_score, task_solved, thresholded
from jaxrl_post.rewards.yes_no import yes_probability

__all__ = [
    "Matching",
    "Reward",
    "RewardError",
    "RewardFunction",
    "RowErrors",
    "Scored",
    "box_edges",
    "box_grounding",
    "box_hit",
    "box_iou",
    "box_reward",
    "consistency_reward",
    "cosine_length",
    "coverage",
    "difficulty_weights",
    "distinct_ngrams",
    "exact_match",
    "facility_location",
    "from_verifiers",
    "from_verl",
    "gap_reward",
    "greedy_matching",
    "group_length",
    "information_gain",
    "load",
    "marginal_gains",
    "matching_reward",
    "rescale",
    "score",
    "soft_overlong",
    "stop_properly",
    "task_score",
    "task_solved",
    "thresholded",
    "yes_probability",
    "zscore_by_input",
]
