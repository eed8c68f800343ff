"""What an environment in Python is, and what it answers. How it is called is in `host_calls`, when in `host`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol


class Step(NamedTuple):
    """What an environment answers to an action.

    Attributes:
        state: handed to the next `step`; better a new one than the old one changed, see `HostEnvironment`.
        observation: text or token ids that the policy reads before its next action; not kept where `done`.
        reward: of the action, finite.
        done: whether the sequence is over.
        failed: whether something went wrong that is not the policy's fault: counts as an exception does.
    """

    state: Any
    observation: str | Sequence[int] = ""
    reward: float = 0.0
    done: bool = False
    failed: bool = False


class HostEnvironment(Protocol):
    """What `host_turns` asks of an environment: any object with these two, async or plain functions.

    Both are called for many sequences at once, plain ones in threads. A plain function that has run out of time cannot
    be ended: it goes on in its thread while the sequence does with the state before it.
    """

    def reset(self, task: Any) -> Any:
        """`(state, prompt)` of one sequence, or what gives that when awaited; the prompt is text or token ids."""
        ...

    def step(self, state: Any, action: str) -> Any:
        """The `Step` that answers an action, or its first four as a tuple, or what gives that when awaited."""
        ...


class TextTokenizer(Protocol):
    """What is needed of a tokenizer; those of `data` have it."""

    @property
    def vocab_size(self) -> int:
        """Ids are `0 .. vocab_size - 1`."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """At least one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, stop tokens left out."""
        ...
