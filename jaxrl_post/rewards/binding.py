"""Keywords of a reward function that are the same for a whole run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from jaxrl_post.rewards.scoring import Reward


def with_options(function: Reward, options: Mapping[str, Any]) -> Reward:
    """A reward function some of whose keywords are given once, and are no columns of the data any more.

    Args:
        function: a reward function, plain or coroutine.
        options: keywords and their values.

    Returns:
        A reward function of the other parameters.

    Raises:
        ValueError: for a keyword that the function does not take.

    Example:
        >>> def starts(completions, *, word):
        ...     return [float(text.startswith(word)) for text in completions]
        >>> with_options(starts, {"word": "So"})(["So it is", "It is so"])
        [1.0, 0.0]
    """
    if not options:
        return function
    signature = inspect.signature(function)
    taken = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        unknown = sorted(name for name in options if name not in taken)
        if unknown:
            raise ValueError(f"the function takes no {', '.join(unknown)}; it takes {', '.join(taken)}")
    bound = functools.partial(function, **options)
    rest = [parameter for name, parameter in taken.items() if name not in options]
    bound.__signature__ = signature.replace(parameters=rest)  # pyright: ignore[reportAttributeAccessIssue]
    return bound
