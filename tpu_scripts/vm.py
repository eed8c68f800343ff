"""Runs on Cloud TPU VMs: worker.sh, called through ssh, sets up, launches and stops the run on every worker.

How the run is, is always asked of the workers, never remembered here.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import job
from machines import create, delete, look
from pod_file import Pod
from shell import STILL_PAID, LastingError, PodError, Shell

__all__ = ["create", "delete", "launch", "logs", "resume", "setup", "status", "stop", "watch"]

REPORT = re.compile(r"^@pod (\S+) (.+?)\r?$", re.MULTILINE)
STOP_SECONDS = 120  # for a run to save before it is killed
# States of workers that are nobody's mistake: 130 after SIGTERM; 75, or 134 where JAX was faster, after another worker
# was lost.
INNOCENT = {"running", "ended 0", "ended 75", "ended 130", "ended 134", "lost", "set up", "new"}


def setup(pod: Pod, shell: Shell) -> None:
    """Bring the job to every worker and install what it needs; workers that have it already do nothing.

    Raises:
        PodError: the pod is not up, or a worker failed; what it said was shown.
    """
    secrets = job.secrets(pod, quote=True)
    packed, digest = job.archive(pod)
    workers = _up(pod, shell)
    directory = f"jaxrl-post/{pod.name}"
    shell.say(f"job {digest[:12]}, {len(packed) / 2**20:.1f} MiB; its command:\n{job.command(pod).rstrip()}")
    _ask_workers(pod, shell, workers, f"umask 077 && mkdir -p {directory} && echo @pod $HOSTNAME reached")
    with tempfile.TemporaryDirectory() as made:
        local = Path("JOB_DIRECTORY" if shell.dry_run else made)
        if not shell.dry_run:
            (local / "job.tar.gz").write_bytes(packed)
            job.write_private(local / "secrets.env", secrets.encode())
        argv = ["gcloud", "compute", "tpus", "queued-resources", "scp", *_everywhere(pod), *pod.ssh_flags]
        argv += [str(local / "job.tar.gz"), str(local / "secrets.env"), str(Path(__file__).with_name("worker.sh"))]
        # A worker that got no complete job says so in the next step: gcloud's own status does not count all workers.
        shell.run([*argv, f"{pod.name}:{directory}/"], check=False)
    _ask_workers(pod, shell, workers, f"bash {directory}/worker.sh setup {digest}")


def _everywhere(pod: Pod, node: str = "all", worker: str = "all") -> list[str]:
    return [f"--project={pod.project}", f"--zone={pod.zone}", f"--node={node}", f"--worker={worker}", "--quiet"]


def _ssh(pod: Pod, remote: str, node: str = "all", worker: str = "all") -> list[str]:
    argv = ["gcloud", "compute", "tpus", "queued-resources", "ssh", pod.name, *_everywhere(pod, node, worker)]
    return [*argv, *pod.ssh_flags, f"--command={remote}"]


def _up(pod: Pod, shell: Shell) -> int:
    found = look(pod, shell)
    if found.state != "ready":
        raise PodError(f"the pod is not up ({found}); `create` or `resume` brings it up")
    return found.workers


def _ask_workers(pod: Pod, shell: Shell, workers: int, remote: str) -> dict[str, str]:
    """Run a command on all workers and gather the state that each reports at its end.

    gcloud has ended with status 0 although the command had failed on a worker, so reports are counted instead.
    """
    reports: dict[str, str] = {}
    for attempt in range(3):
        if attempt:
            shell.wait()
        reports |= dict(REPORT.findall(shell.run(_ssh(pod, remote), check=False)))
        if len(reports) >= workers or shell.dry_run:
            break
    failed = {host: state for host, state in reports.items() if state.startswith("failed")}
    if failed:
        said = "; ".join(f"{host} {state}" for host, state in sorted(failed.items()))
        raise PodError(f"{said}: see above. The pod is still up and paid for")
    if len(reports) < workers and not shell.dry_run:
        answered = f": {', '.join(sorted(reports))}" if reports else ""
        raise PodError(f"{len(reports)} of {workers} workers answered{answered}; {look(pod, shell)}")
    return reports


def _progress(pod: Pod, shell: Shell, workers: int) -> tuple[str, set[str]]:
    """How the run is on all workers together, and the states of the single ones.

    Returns:
        new (not set up), ready (to be launched), running, split (it runs on some workers and has failed on others),
        finished or ended; and the workers' states.
    """
    script = f"jaxrl-post/{pod.name}/worker.sh"
    remote = f"if [ -f {script} ]; then bash {script} status; else echo @pod $HOSTNAME new; fi"
    states = set(_ask_workers(pod, shell, workers, remote).values())
    if "new" in states:
        return "new", states
    if states <= {"set up"}:
        return "ready", states
    if states <= {"running", "ended 0"}:  # the first of them may have more to write than the others
        return "running" if "running" in states else "finished", states
    return "split" if "running" in states else "ended", states


def launch(pod: Pod, shell: Shell) -> None:
    """Start the run on every worker, also where it has ended; nothing where it is running.

    Raises:
        PodError: the pod is not up or not set up, or a worker could not start the run.
    """
    workers = _up(pod, shell)
    progress, _ = _progress(pod, shell, workers)
    if progress == "running":
        return shell.say("the run is running already")
    if progress == "new":
        raise PodError("not every worker is set up; `setup` does that")
    if progress == "split":
        # The others cannot join a run that has lost them.
        shell.say("the run is running on some workers only; it is started anew from its last checkpoint")
        stop(pod, shell)
    reports = _ask_workers(pod, shell, workers, f"bash jaxrl-post/{pod.name}/worker.sh launch")
    idle = [host for host, state in sorted(reports.items()) if not state.startswith(("running", "ended"))]
    if idle:
        raise PodError(f"the run was not started on {', '.join(idle)}; `launch` again")
    return shell.say("launched; `logs` shows what the run says")


def resume(pod: Pod, shell: Shell) -> None:
    """Bring back whatever is missing: machines, set-up, run. A run that is running or finished is left alone."""
    create(pod, shell)
    progress, _ = _progress(pod, shell, _up(pod, shell))
    if progress in ("running", "finished"):
        return shell.say(f"the run is {progress}; there is nothing to resume")
    if progress == "split":
        stop(pod, shell)
    setup(pod, shell)
    return launch(pod, shell)


def watch(pod: Pod, shell: Shell, restarts: int) -> None:
    """Resume the run whenever its machines are taken away, until it has finished.

    Args:
        pod: the pod.
        shell: runs the commands.
        restarts: how often a run that failed by itself, its machines being there, is started again.

    Raises:
        PodError: the run has failed more often than that; workers that are up could not be reached or set up many times
            in a row; or Google Cloud could not be asked, or gave no machines, until the time-out.
    """
    job.secrets(pod, quote=True)  # one that is not set is missed now, not at the first preemption
    failures, errors, split = 0, 0, 0
    while True:
        found = shell.insist(lambda: look(pod, shell))
        if found.state != "ready":
            shell.say(f"resuming: {found}")
            shell.insist(lambda: create(pod, shell))
            errors = 0  # what failed while machines were being taken away says nothing about new ones
            continue
        try:
            progress, states = _progress(pod, shell, found.workers)
            if progress == "finished":
                return shell.say("the run has finished")
            # Where one worker has died, the others notice within a minute and stop.
            split = split + 1 if progress == "split" else 0
            if progress != "running" and not 0 < split < 4:
                failed = sorted(states - INNOCENT)
                if failed and failures >= restarts:
                    said = f"the run has {failed[0]} {failures + 1} times; `logs` shows why"
                    raise LastingError(f"{said}. {STILL_PAID}")
                shell.say(f"resuming: {', '.join(sorted(states)) or found}")
                resume(pod, shell)
                failures += 1 if failed else 0
            errors = 0
        except LastingError:
            raise
        except PodError as error:
            # Connections are cut, and machines that are being taken away stop answering before it is reported so.
            errors += 1
            if errors > 5:
                raise PodError(f"{error}\nGiven up after {errors} errors in a row. {STILL_PAID}") from None
            shell.say(f"{error}\nTrying again")
        if shell.dry_run:
            return shell.say("and so on, with `resume` whenever the machines are gone, until the run has finished")
        shell.wait()


def logs(pod: Pod, shell: Shell, node: int, worker: int) -> None:
    """Show what the run says on one worker, from its beginning until it ends; a connection that is cut is made again.

    Raises:
        PodError: the pod has gone, or the worker could not be reached several times in a row.
    """
    shown, failures = 0, 0
    while True:
        before, ended = shown, ""

        def show(line: str) -> None:
            nonlocal shown, ended
            report = REPORT.match(line)
            if report:
                ended = report[2]
            else:
                shown += 1
                print(line, flush=True)

        remote = f"bash jaxrl-post/{pod.name}/worker.sh log {shown + 1}"
        shell.stream(_ssh(pod, remote, str(node), str(worker)), show)
        if shell.dry_run:
            return
        if ended and ended != "running":
            return shell.say(f"worker {worker} of slice {node}: {ended}")
        failures = 0 if shown > before else failures + 1
        found = look(pod, shell)
        if found.state != "ready":
            raise PodError(f"the log was cut: the pod is no longer up ({found}); `resume` brings it back")
        if failures >= 5:
            raise PodError("the worker could not be reached five times in a row; has `setup` been run?")
        shell.say(f"the connection was cut after line {shown}; connecting again")
        shell.wait()


def status(pod: Pod, shell: Shell) -> None:
    """Print what there is of the pod, and how the run is on each worker."""
    found = look(pod, shell)
    print(f"{'# ' if shell.dry_run else ''}{pod.name} {found}")
    if found.state == "ready":
        progress, states = _progress(pod, shell, found.workers)
        if not shell.dry_run:
            print(f"run {progress}: {', '.join(sorted(states))}")


def stop(pod: Pod, shell: Shell) -> None:
    """Have the run save and end, on every worker. The pod stays up and paid for."""
    remote = f"bash jaxrl-post/{pod.name}/worker.sh stop {STOP_SECONDS}"
    _ask_workers(pod, shell, _up(pod, shell), remote)
