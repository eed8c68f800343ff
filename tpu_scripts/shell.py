"""Starts every process of these scripts, or, in a dry run, prints what it would start. Nothing else does either."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class PodError(Exception):
    """What went wrong with a pod, and what to do about it."""


class LastingError(PodError):
    """What will be no better if it is tried again."""


STILL_PAID = "What is up of the pod is still paid for; `delete` removes it"


class Shell:
    """Runs commands and waits for what they set in motion.

    Args:
        dry_run: print the commands instead of running any.
        poll: seconds between two looks at something that is being waited for.
        timeout: minutes after which waiting is given up.
    """

    def __init__(self, dry_run: bool = False, poll: float = 20.0, timeout: float = 1440.0):
        self.dry_run, self.poll, self.timeout = dry_run, poll, timeout
        self.pretended: str | None = None  # the state in which a dry run takes the pod to be

    def run(self, argv: Sequence[str], check: bool = True) -> str:
        """Run a command, showing its output as it comes.

        Args:
            argv: the command and its arguments; they reach the program as they are.
            check: raise when the command fails.

        Returns:
            Its output and errors, as printed. Empty in a dry run.

        Raises:
            PodError: the command failed, with the last lines that it said.
        """
        said: list[str] = []

        def show(line: str) -> None:
            said.append(line)
            print(line, file=sys.stderr, flush=True)

        code = self.stream(argv, show, errors_too=True)
        if code and check:
            last = "\n  ".join(said[-5:])
            raise PodError(f"`{shlex.join(argv[:4])} ...` ended with status {code}:\n  {last}")
        return "\n".join(said)

    def stream(self, argv: Sequence[str], line: Callable[[str], None], errors_too: bool = False) -> int:
        """Run a command and hand over every complete line of its output.

        Args:
            argv: the command and its arguments.
            line: called with each line, without its end. A line that was cut off is not handed over.
            errors_too: hand over what it writes to its error output as well; else that goes to ours.

        Returns:
            The command's exit status; 0 in a dry run.
        """
        if self._announce(argv):
            return 0
        errors = subprocess.STDOUT if errors_too else None
        # Without an input of their own, ssh and gcloud neither swallow ours nor wait for an answer.
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        with _start(argv, **options) as process:
            assert process.stdout is not None
            for raw in process.stdout:
                if raw.endswith("\n"):
                    line(raw[:-1])
                elif errors_too:
                    line(raw)
        return process.returncode

    def query(self, argv: Sequence[str], pretend: Any, attempts: int = 3) -> Any:
        """Run a command that prints JSON and changes nothing; try again when it fails.

        Args:
            argv: the command and its arguments.
            pretend: the answer in a dry run.
            attempts: how often to try before giving up.

        Returns:
            What the command printed, decoded; None if it printed nothing.

        Raises:
            PodError: it failed every time, with the errors of the last.
        """
        if self._announce(argv, quiet=True):
            return pretend
        for attempt in range(attempts):
            if attempt:
                self.wait()
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            with _start(argv, stdout=subprocess.PIPE, **options) as process:
                printed, errors = process.communicate()
            if process.returncode == 0:
                return json.loads(printed) if printed.strip() else None
        raise PodError(f"`{shlex.join(argv)}` failed {attempts} times:\n  {errors.strip()}")

    def insist(self, action: Callable[[], T]) -> T:
        """Do something, and do it again whenever it fails, as while the network or the cloud is away.

        Args:
            action: what may be done twice.

        Returns:
            What `action` returns once it succeeds.

        Raises:
            PodError: it still failed at the time-out, or in a way that lasts.
        """
        late = self.deadline()
        while True:
            try:
                return action()
            except LastingError:
                raise
            except PodError as error:
                if late():
                    raise PodError(f"{error}\nGiven up after {self.timeout:g} minutes. {STILL_PAID}") from None
                self.say(f"{error}\nTrying again")
            self.wait()

    def wait(self) -> None:
        """Let `poll` seconds pass; none in a dry run."""
        if not self.dry_run:
            time.sleep(self.poll)

    def deadline(self) -> Callable[[], bool]:
        """A clock started now: a function that says whether `timeout` minutes have passed."""
        end = time.monotonic() + 60 * self.timeout
        return lambda: time.monotonic() >= end

    def say(self, text: str) -> None:
        """Tell the user something; a comment among the commands of a dry run."""
        if self.dry_run:
            print("\n".join(f"# {line}" for line in text.splitlines()))
        else:
            print(text, file=sys.stderr, flush=True)

    def _announce(self, argv: Sequence[str], quiet: bool = False) -> bool:
        if self.dry_run:
            print(shlex.join(argv), flush=True)
        elif not quiet:
            print(f"+ {shlex.join(argv)}", file=sys.stderr, flush=True)
        return self.dry_run


def _start(argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(argv, text=True, errors="replace", **options)
    except FileNotFoundError:
        raise LastingError(f"there is no command {argv[0]!r} on the PATH; README.md says how to install it") from None
