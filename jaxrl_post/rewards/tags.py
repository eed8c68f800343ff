"""Where a completion says its answer between tags."""

from __future__ import annotations

import re

_TAG = re.compile("<(/?)answer>", re.IGNORECASE)


def tagged_answer(text: str) -> tuple[int, int] | None:
    """What the last `<answer>...</answer>` that is closed holds, as a slice of the text; None without one.

    Example:
        >>> text = "In <answer> tags: <answer>4</answer>, no, <answer>5</answer> (</answer>)"
        >>> text[slice(*tagged_answer(text))]
        '5'
    """
    begun, found = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            begun = tag.end()
        elif begun is not None:
            begun, found = None, (begun, tag.start())
    return found
