"""What to try next, and which of what was tried to learn from."""

from jaxrl_post.curation.groups import informative, select_groups, spread_first, take_groups, within_accuracy
from jaxrl_post.curation.memory import PromptMemory, init_memory, recall, remember
from jaxrl_post.curation.pareto import (
    ParetoArchive,
    best_for,
    crowding_distance,
    expected_utility,
    hypervolume,
    hypervolume_contribution,
    most_isolated,
    non_dominated,
    pareto_archive,
    pareto_insert,
    sparsity,
)
from jaxrl_post.curation.success_rate import PreferencePairs, long2short_pairs, priority_probs, shortest_correct

__all__ = [
    "ParetoArchive",
    "PreferencePairs",
    "PromptMemory",
    "best_for",
    "crowding_distance",
    "expected_utility",
    "hypervolume",
    "hypervolume_contribution",
    "informative",
    "init_memory",
    "long2short_pairs",
    "most_isolated",
    "non_dominated",
    "pareto_archive",
    "pareto_insert",
    "priority_probs",
    "recall",
    "remember",
    "select_groups",
    "shortest_correct",
    "sparsity",
    "spread_first",
    "take_groups",
    "within_accuracy",
]
