"""The error of a wrong configuration, and the list that problems are gathered in so that a file's are told at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

_NOTHING = object()


class ConfigError(ValueError):
    """A configuration that cannot be run; the message holds every problem found, each with key, value and fix.

    Attributes:
        problems: one sentence or two for each problem.
        source: the file, or what else the configuration was read from.

    Example:
        >>> print(ConfigError(["seed = -1: must be at least 0"], "run.yaml"))
        run.yaml: seed = -1: must be at least 0
    """

    def __init__(self, problems: Sequence[str], source: str = "configuration"):
        self.problems = tuple(problems)
        self.source = source
        if len(self.problems) == 1:
            text = f"{source}: {self.problems[0]}"
        else:
            text = "\n  - ".join([f"{source}: {len(self.problems)} problems", *self.problems])
        super().__init__(text)


class ConfigWarning(UserWarning):
    """A configuration that can be run, but probably is not what was meant."""


class Problems:
    """Problems and warnings found so far, and the keys they belong to."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self._keys: set[str] = set()

    def add(self, key: str, what: str, value: Any = _NOTHING) -> None:
        """Record a problem of `key`; `value` is shown if it is given."""
        shown = "" if value is _NOTHING else f" = {show(value)}"
        self.messages.append(f"{key}{shown}: {what}")
        self._keys.add(key)

    def ok(self, *keys: str) -> bool:
        """Whether no problem is known of these keys, of what they contain and of what contains them."""
        return not any(
            bad == key or bad.startswith(key + ".") or key.startswith(bad + ".") for key in keys for bad in self._keys
        )


def show(value: Any) -> str:
    """`value` as it would stand in YAML, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    longest = 240 if isinstance(value, str) else 80  # the end of a path is its file's name
    return text if len(text) <= longest else text[: longest - 3] + "..."


def near(name: str, known: Iterable[str]) -> list[str]:
    """The known names that may have been meant, the likeliest first.

    Example:
        >>> near("lr", ["learning_rate", "b1"]), near("temp", ["temperature", "top_p"]), near("gpro", ["igpo", "grpo"])
        (['learning_rate'], ['temperature'], ['grpo', 'igpo'])
    """
    known = list(known)
    short = [one for one in known if len(name) > 1 and (one.startswith(name) or _initials(one) == name)]
    close = [one for one in difflib.get_close_matches(name, known, n=5, cutoff=0.6) if one not in short]
    close.sort(key=lambda one: sorted(one) != sorted(name))  # letters that changed places are the likelier mistake
    return short + close


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint for a name that is not known: the nearest known one, or all of them.

    Example:
        >>> nearest("stepz", ["steps", "epochs"])
        "did you mean 'steps'?"
        >>> nearest("gpro", ["igpo", "grpo"])
        "did you mean 'grpo'?"
    """
    known = sorted(known)
    if close := near(name, known):
        full = f"{prefix}.{close[0]}" if prefix else close[0]
        return f"did you mean {full!r}?"
    return "known here: " + (", ".join(known) if known else "nothing")
