"""What was good: reward functions, their sum, and adapters for those written for other systems."""

from jaxrl_post.rewards.adapters import from_verifiers, from_verl
from jaxrl_post.rewards.loading import load
from jaxrl_post.rewards.scoring import Reward, RewardError, RewardFunction, RowErrors, Scored, score
from jaxrl_post.rewards.verifiable import exact_match, task_score, task_solved, thresholded

__all__ = [
    "Reward",
    "RewardError",
    "RewardFunction",
    "RowErrors",
    "Scored",
    "exact_match",
    "from_verifiers",
    "from_verl",
    "load",
    "score",
    "task_score",
    "task_solved",
    "thresholded",
]
