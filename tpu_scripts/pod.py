#!/usr/bin/env python3
"""A TPU pod from one file: make it, run on it, resume after preemption, tear it down. README.md walks through it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import gke
import pod_file
import vm
from shell import PodError, Shell

# What a dry run takes the pod to be when the command starts.
PRETENDED = {"create": None, "resume": "SUSPENDED"}
COMMANDS = {
    "create": "have the machines: ask for them and wait until they are up",
    "setup": "bring the run's files to every worker and install what it needs",
    "launch": "start the run on every worker",
    "logs": "show what the run says on one worker, until it ends",
    "status": "show what there is, and how the run is",
    "resume": "bring back what is missing after a preemption: machines, set-up, run",
    "watch": "resume whenever the machines are taken away, until the run has finished",
    "stop": "have the run save and end; the machines stay, and are paid for",
    "delete": "remove everything, and say what is left",
    "cost": "say what a step and the whole run cost",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        0 after success, 1 if the pod or the run failed, 2 after a mistake in the pod file or the arguments, 130 after
        Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    options = {name: value for name, value in vars(arguments).items() if name in ("dry_run", "poll", "timeout")}
    shell = Shell(**options)
    shell.pretended = PRETENDED.get(arguments.command, "ACTIVE")
    try:
        pod = pod_file.load(arguments.pod_file)
        if arguments.command == "cost":
            print(cost(pod, arguments.price, _step_seconds(arguments, pod), arguments.steps))
        else:
            _run(arguments, pod, shell)
    except (pod_file.PodFileError, OSError) as error:
        print(f"pod.py {arguments.command}: {error}", file=sys.stderr)
        return 2
    except PodError as error:
        print(f"pod.py {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the pod is as it was, and every command may be run again", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace, pod: pod_file.Pod, shell: Shell) -> None:
    backend = {"vm": vm, "gke": gke}[pod.backend]
    action: Callable[..., None] = getattr(backend, arguments.command)
    if arguments.command == "logs":
        if not 0 <= arguments.slice < pod.slices:
            raise pod_file.PodFileError(f"--slice must be below slices = {pod.slices}, got {arguments.slice}")
        action(pod, shell, arguments.slice, arguments.worker)
    elif arguments.command == "watch":
        action(pod, shell, arguments.restarts)
        if arguments.then_delete:
            shell.insist(lambda: backend.delete(pod, shell))
    else:
        action(pod, shell)


def cost(pod: pod_file.Pod, price: float, step_seconds: float, steps: int | None) -> str:
    """What a step costs: chips * price * seconds / 3600.

    Args:
        pod: whose chips are paid for.
        price: of a chip for an hour, in any currency.
        step_seconds: duration of a step.
        steps: of the whole run, or None.

    Returns:
        The figures, for people. Start-up, evaluation, checkpoints and preemptions come on top.
    """
    per_hour = pod.chips * price
    per_step = per_hour * step_seconds / 3600
    lines = [f"{pod.chips} chips ({pod.slices} x {pod.topology}): {per_hour:.2f} an hour"]
    lines += [f"a step of {step_seconds:g} s: {per_step:.4f}"]
    if steps is not None:
        lines += [f"{steps} steps: {steps * per_step:.2f}, {steps * step_seconds / 3600:.1f} hours"]
    return "\n".join(lines)


def _step_seconds(arguments: argparse.Namespace, pod: pod_file.Pod) -> float:
    if arguments.step_seconds is not None:
        return arguments.step_seconds
    text = sys.stdin.read() if arguments.compiled == "-" else Path(arguments.compiled).read_text()
    try:
        found = json.loads(text)
        topology, slices, fits, step = found["topology"], found["slices"], found["fits"], found["step"]
        seconds = 0.0 if step is None else float(step["seconds"])
    except (ValueError, KeyError, TypeError):
        raise pod_file.PodFileError(f"{arguments.compiled} is not what `jaxrl-post compile --json` prints") from None
    if (topology, slices) != (pod.topology, pod.slices):
        raise pod_file.PodFileError(
            f"{arguments.compiled} speaks of {slices} x {topology}, the pod file of {pod.slices} x {pod.topology}"
        )
    if not fits:
        raise pod_file.PodFileError(f"by {arguments.compiled}, the run does not fit on {pod.topology}")
    if not seconds:
        raise pod_file.PodFileError(
            f"{arguments.compiled} has no duration of a step, for want of a program of it; compile without --only"
        )
    return seconds


def _parser() -> argparse.ArgumentParser:
    file, acts = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    file.add_argument("pod_file", metavar="POD_FILE", help="TOML file that describes the pod; pod.toml is an example")
    acts.add_argument("--dry-run", action="store_true", help="print every command, run none")
    acts.add_argument("--poll", type=_positive, default=20.0, metavar="S", help="seconds between two looks (20)")
    parser = argparse.ArgumentParser(prog="pod.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        parents = [file] if name == "cost" else [file, acts]
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", parents=parents)
        if name in ("create", "resume", "watch", "delete"):
            text = "minutes to wait for machines to come or go (1440)"
            made.add_argument("--timeout", type=_positive, default=1440.0, metavar="MIN", help=text)
        if name == "logs":
            made.add_argument("--worker", type=int, default=0, metavar="N", help="which worker of the slice (0)")
            made.add_argument("--slice", type=int, default=0, metavar="N", help="which slice (0)")
        if name == "watch":
            text = "how often to start a run again that failed by itself (3)"
            made.add_argument("--restarts", type=int, default=3, metavar="N", help=text)
            made.add_argument("--then-delete", action="store_true", help="remove everything once the run has finished")
        if name == "cost":
            made.add_argument("--price", type=_positive, required=True, metavar="P", help="of one chip for an hour")
            step = made.add_mutually_exclusive_group(required=True)
            step.add_argument("--compiled", metavar="FILE", help="what `jaxrl-post compile --json` printed, or -")
            step.add_argument("--step-seconds", type=_positive, metavar="S", help="a step's duration, e.g. as measured")
            made.add_argument("--steps", type=int, metavar="N", help="steps of the whole run")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
