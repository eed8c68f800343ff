"""What a run shows on the terminal: a live line of numbers, or plain lines where the output is not a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

_SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("held-out loss", "eval/loss", "{:.4f}"),
    ("margin", "rewards/margins", "{:.4f}"),
    ("accuracy", "eval/accuracy", "{:.3f}"),
    ("KL", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "completions/mean_length", "{:.1f}"),
)
_RECENT = 50  # steps that speed and time left are measured over


class Progress:
    """Shows how a run is getting on; a context manager, which gives the terminal back whatever happens.

    Args:
        total_steps: steps of the whole run, for the time left.
        enabled: False shows no numbers and no completions, only messages.
        stream: where to write; standard output if None. A stream that is not a terminal gets one plain line every
            `interval` seconds, and nothing that moves the cursor.
        interval: seconds between plain lines.
        clock: seconds that pass.
        messages: False shows no messages either: for the processes of a run beside the first.

    Example:
        >>> with Progress(10, True, stream=sys.stdout, interval=0.0) as progress:
        ...     progress.update(1, {"reward": 0.25, "entropy": 1.5}, stage="grpo")
        grpo  step 1/10  reward 0.250  entropy 1.500
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool,
        *,
        stream: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        messages: bool = True,
    ) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._messages = messages
        self._values: dict[str, Any] = {}
        self._step = 0
        self._stage, self._later = "", 0
        self._history: deque[tuple[float, int, float | None]] = deque(maxlen=_RECENT)
        self._last_line = -math.inf
        self._live: Any = None
        self._console: Any = None

    def __enter__(self) -> Progress:
        if self._enabled:
            from rich.console import Console
            from rich.live import Live

            self._stream = self._stream or sys.stdout
            self._console = Console(file=self._stream)
            if self._console.is_terminal:
                self._live = Live(self._table(), console=self._console, refresh_per_second=4)
                self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.update(self._table())
            live.__exit__(*error)
        elif self._enabled and self._values and self._history and self._last_line < self._history[-1][0]:
            self._print_plain()  # the last step is always told

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        stage: str = "",
        total_steps: int | None = None,
        later: int = 0,
    ) -> None:
        """Show the metrics of a step; what a step does not measure stays as it was.

        Args:
            step: the step, counted from 1.
            metrics: by the names of metrics.jsonl.
            stage: what the run is doing, e.g. `warm start`.
            total_steps: of the whole run, where a stage has ended before its last step; None: as before.
            later: steps of the stages after this one, whose speed does not tell how long they take.
        """
        if not self._enabled:
            return
        now = self._clock()
        if stage != self._stage or step < self._step:
            self._history.clear()  # another stage has another speed
        self._step, self._stage, self._later = step, stage, later
        self._total = self._total if total_steps is None else total_steps
        self._values.update({name: value for name, value in metrics.items() if value is not None})
        self._history.append((now, step, self._values.get("num_tokens")))
        if self._live is not None:
            self._live.update(self._table())
        elif now - self._last_line >= self._interval:
            self._print_plain()

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Show sampled completions, each row with `prompt`, `completion` and `reward`."""
        if not self._enabled:
            return
        lines = [f"completions at step {step}"]
        for row in rows:
            reward = row.get("reward")
            shown = "   none" if reward is None else f"{float(reward):7.3f}"
            # repr keeps newlines and control characters of a model's text from moving the cursor.
            lines.append(f"  {shown}  {row.get('prompt', '')!r} -> {row.get('completion', '')!r}")
        self.message("\n".join(lines))

    def message(self, text: str) -> None:
        """Show text above the live display, exactly as it is; on standard error if the display is disabled."""
        if not self._messages:
            return
        if not self._enabled:
            # A notice (what was resumed, which checkpoint was damaged) matters more than the display it stands above.
            print(text, file=sys.stderr, flush=True)
        elif self._live is not None:
            # As Text, so that nothing in a model's output is taken for markup.
            from rich.text import Text

            self._console.print(Text(text))
        else:
            print(text, file=self._stream or sys.stdout, flush=True)

    def speed(self) -> tuple[float | None, float | None]:
        """Tokens per second and seconds left, each None while it cannot be told."""
        if len(self._history) < 2:
            return None, None
        (first, first_step, first_tokens), (last, last_step, last_tokens) = self._history[0], self._history[-1]
        seconds, steps = last - first, last_step - first_step
        if seconds <= 0 or steps <= 0:
            return None, None
        tokens = None
        if first_tokens is not None and last_tokens is not None:
            tokens = (last_tokens - first_tokens) / seconds
        left = max(self._total - last_step, 0) * seconds / steps
        return tokens, None if self._later else left

    def _cells(self) -> list[tuple[str, str]]:
        cells = [("step", f"{self._step}/{self._total}")]
        for title, name, form in _SHOWN:
            value = self._values.get(name)
            # The loss of a policy gradient says nothing.
            if value is not None and not (name == "loss" and "reward" in self._values):
                cells.append((title, form.format(float(value))))
        tokens, left = self.speed()
        if tokens is not None:
            cells.append(("tokens/s", f"{tokens:,.0f}"))
        if left is not None:
            cells.append(("left", duration(left)))
        return cells

    def _print_plain(self) -> None:
        self._last_line = self._history[-1][0]
        parts = [self._stage] if self._stage else []
        parts += [f"{title} {value}" for title, value in self._cells()]
        print("  ".join(parts), file=self._stream or sys.stdout, flush=True)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        cells = [("stage", self._stage or "starting"), *self._cells()]
        table = Table.grid(padding=(0, 2))
        for _ in cells:
            table.add_column(justify="right")
        table.add_row(*[Text(title, style="dim") for title, _ in cells])
        table.add_row(*[Text(value) for _, value in cells])
        return Group(table, ProgressBar(total=max(self._total, 1), completed=self._step))


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(3725), duration(65), duration(4.2)
        ('1h 02m', '1m 05s', '4s')
    """
    total = round(seconds)
    if total >= 3600:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 60}m {total % 60:02d}s" if total >= 60 else f"{total}s"
