"""What to try next, and which of what was tried to learn from."""

from jaxrl_post.curation.groups import informative, select_groups, spread_first, take_groups

__all__ = ["informative", "select_groups", "spread_first", "take_groups"]
