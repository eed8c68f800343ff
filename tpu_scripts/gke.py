"""Pods as node pools of a GKE cluster that xpk makes: the run is a JobSet, which Kubernetes itself starts again.

xpk creates and deletes; what there is, is asked of gcloud and kubectl, whose answers are JSON.
"""

from __future__ import annotations

import tempfile
from collections import deque
from pathlib import Path
from typing import NamedTuple

import job
from pod_file import Pod
from shell import STILL_PAID, LastingError, PodError, Shell

CONTAINER = "jax-tpu"  # xpk's name for the container of the run
GRACE_SECONDS = 300  # for a run to save before its container is killed
# xpk starts a run again after statuses 42 and 127 to 255, which signals give; with 75, processes end that have lost
# another one. After others, which a mistake would give again and again, it does not.
RESTART_STATUSES = "75"


class Cluster(NamedTuple):
    """A cluster as Google Cloud lists it."""

    status: str  # e.g. RUNNING
    location: str  # its region, or zone


def _look(pod: Pod, shell: Shell) -> Cluster | None:
    argv = ["gcloud", "container", "clusters", "list", f"--project={pod.project}", f"--filter=name={pod.cluster_name}"]
    region = pod.zone.rpartition("-")[0]
    pretended = [{"name": pod.cluster_name, "status": "RUNNING", "location": region}] if shell.pretended else []
    listed = [
        item for item in shell.query([*argv, "--format=json"], pretended) or [] if item["name"] == pod.cluster_name
    ]
    return Cluster(listed[0]["status"], listed[0]["location"]) if listed else None


def _xpk(pod: Pod, *words: str) -> list[str]:
    return ["xpk", *words, f"--cluster={pod.cluster_name}", f"--project={pod.project}", f"--zone={pod.zone}"]


def _tpu_type(pod: Pod) -> str:
    # Three-dimensional slices of one size come in several shapes, so xpk is told the shape.
    two = pod.generation.dimensions == 2
    return f"{pod.generation.prefix}-{pod.chips // pod.slices if two else pod.shape}"


def create(pod: Pod, shell: Shell) -> None:
    """Have the cluster with its TPU node pools; xpk adds what is missing from one that is there.

    Raises:
        PodError: xpk failed (quota, permissions), with what there is now; or the cluster that the pod file names as
            made by somebody else is not there.
    """
    if not pod.own_cluster:
        _kubectl(pod, shell)
        return shell.say(f"{pod.cluster_name} is there, and left as it is")
    capacity = f"--reservation={pod.reservation}" if pod.capacity == "reserved" else f"--{pod.capacity}"
    argv = [*_xpk(pod, "cluster", "create"), f"--tpu-type={_tpu_type(pod)}", f"--num-slices={pod.slices}", capacity]
    try:
        shell.run([*argv, *pod.cluster_flags])
    except PodError as error:
        left = "No cluster was created."
        if found := _look(pod, shell):
            left = f"A cluster is there and paid for ({found.status}): `create` goes on with it, `delete` removes it."
        raise PodError(f"{error}\n{left} README.md has a section on quota") from None
    shell.pretended = "ACTIVE"
    if not _look(pod, shell):
        raise PodError(f"xpk ended well, but there is no cluster {pod.cluster_name}; look at what it printed")
    return shell.say("the cluster is up")


def _kubectl(pod: Pod, shell: Shell) -> list[str]:
    """Log in to the cluster, and begin a kubectl command for it, whatever cluster is the current one."""
    found = _look(pod, shell)
    if not found:
        raise PodError(f"there is no cluster {pod.cluster_name} in {pod.project}; `create` makes it")
    argv = ["gcloud", "container", "clusters", "get-credentials", pod.cluster_name, f"--location={found.location}"]
    shell.run([*argv, f"--project={pod.project}"])
    return ["kubectl", f"--context=gke_{pod.project}_{found.location}_{pod.cluster_name}"]


def _state(pod: Pod, shell: Shell, kubectl: list[str]) -> str:
    """State of the run: absent, queued, running, finished or failed."""
    pretended = {"status": {"terminalState": "Failed"}} if shell.pretended == "SUSPENDED" else None
    argv = [*kubectl, "get", "jobset", pod.name, "--ignore-not-found", "--output=json"]
    found = shell.query(argv, pretended)
    if not found:
        return "absent"
    status = found.get("status", {})
    true = {item["type"] for item in status.get("conditions", []) if item.get("status") == "True"}
    true.add(status.get("terminalState", ""))
    if "Completed" in true:
        return "finished"
    if "Failed" in true:
        return "failed"
    return "queued" if found.get("spec", {}).get("suspend") else "running"


def setup(pod: Pod, shell: Shell) -> None:
    """Check that the cluster answers; the job itself goes into the image that `launch` has xpk build."""
    job.secrets(pod, quote=False)
    state = _state(pod, shell, _kubectl(pod, shell))
    shell.say(f"the cluster answers; the run is {state}")


def launch(pod: Pod, shell: Shell) -> None:
    """Start the run; nothing if it is queued or running.

    Raises:
        PodError: an earlier run of this name has failed, or xpk could not start this one.
    """
    state = _state(pod, shell, _kubectl(pod, shell))
    if state in ("queued", "running"):
        return shell.say(f"the run is already {state}")
    if state == "finished":
        return shell.say("the run has finished; `stop` forgets it, so that `launch` starts it anew")
    if state == "failed":
        raise PodError("an earlier run of this name has failed; `logs` shows why, `resume` starts it again")
    secrets = job.secrets(pod, quote=False)
    packed, digest = job.archive(pod)
    shell.say(f"job {digest[:12]}, {len(packed) / 2**20:.1f} MiB; its command:\n{job.command(pod).rstrip()}")
    with tempfile.TemporaryDirectory() as made:
        local = Path("JOB_DIRECTORY" if shell.dry_run else made)
        if not shell.dry_run:
            (local / "image").mkdir()
            job.unpack(packed, local / "image")
            job.write_private(local / "secrets.env", secrets.encode())
        # No word of the pod file is in this command: YAML, Kubernetes and a shell would each read it in their way.
        command = f"pip install --quiet --requirement {job.REQUIREMENTS} && exec bash {job.COMMAND}"
        argv = [*_xpk(pod, "workload", "create"), f"--workload={pod.name}", f"--tpu-type={_tpu_type(pod)}"]
        argv += [f"--num-slices={pod.slices}", f"--base-docker-image={pod.image}", f"--script-dir={local / 'image'}"]
        argv += [f"--max-restarts={pod.max_restarts}", f"--restart-on-exit-codes={RESTART_STATUSES}"]
        argv += [f"--termination-grace-period-seconds={GRACE_SECONDS}", f"--docker-name={CONTAINER}"]
        argv += [f"--env-file={local / 'secrets.env'}"] if pod.secrets else []
        shell.run([*argv, *pod.workload_flags, f"--command={command}"])
    return shell.say("launched; `logs` shows what the run says")


def resume(pod: Pod, shell: Shell) -> None:
    """Start the run again if it has failed for good or is gone; Kubernetes resumes it after a preemption by itself."""
    state = _state(pod, shell, _kubectl(pod, shell))
    if state in ("queued", "running", "finished"):
        return shell.say(f"the run is {state}; there is nothing to resume")
    if state == "failed":
        stop(pod, shell)
    return launch(pod, shell)


def watch(pod: Pod, shell: Shell, restarts: int) -> None:
    """Wait until the run has finished, starting it again up to `restarts` times after it has failed for good.

    Raises:
        PodError: it has failed more often than that; it could not be started many times in a row; or the cluster could
            not be asked until the time-out.
    """
    job.secrets(pod, quote=False)  # one that is not set is missed now, not when the run has failed
    kubectl, failures, errors, before = _kubectl(pod, shell), 0, 0, ""
    while (state := shell.insist(lambda: _state(pod, shell, kubectl))) != "finished":
        if state != before:
            shell.say(f"the run is {state}")
        before = state
        if state not in ("failed", "absent"):
            errors = 0
        elif failures >= restarts:
            raise PodError(f"the run is {state} again; `logs` shows why. {STILL_PAID}")
        else:
            try:
                resume(pod, shell)
                failures, errors = failures + 1, 0
            except PodError as error:
                errors += 1
                if errors > 5:
                    raise PodError(f"{error}\nGiven up after {errors} errors in a row. {STILL_PAID}") from None
                shell.say(f"{error}\nTrying again")
        if shell.dry_run:
            return shell.say("and so on, until the run has finished")
        shell.wait()
    return shell.say("the run has finished")


def logs(pod: Pod, shell: Shell, node: int, worker: int) -> None:
    """Show what the run says on one worker until it ends; a connection that is cut is made again.

    Raises:
        PodError: there is no such run, or its log could not be had several times in a row.
    """
    kubectl = _kubectl(pod, shell)
    labels = f"jobset.sigs.k8s.io/jobset-name={pod.name},jobset.sigs.k8s.io/job-index={node}"
    # A host of tpu7x runs two containers, one for each half of its chips.
    container = f"{CONTAINER}-1" if pod.topology.startswith("tpu7x") else CONTAINER
    argv = [*kubectl, "logs", "--follow", "--timestamps", "--tail=-1", f"--container={container}"]
    argv += [f"--selector={labels},batch.kubernetes.io/job-completion-index={worker}"]
    recent: deque[str] = deque(maxlen=10000)
    failures = 0
    while True:
        news = 0
        # The whole second of the last line is sent again; what was shown of it is left out.
        old, since = set(recent), [f"--since-time={recent[-1].partition(' ')[0]}"] if recent else []

        def show(line: str, old: set[str] = old) -> None:
            nonlocal news
            if line not in old:
                news += 1
                recent.append(line)
                print(line.partition(" ")[2], flush=True)

        code = shell.stream([*argv, *since], show)
        if shell.dry_run:
            return
        state = _state(pod, shell, kubectl)
        if state == "absent":
            raise PodError("there is no run of this name; `launch` starts it")
        if state in ("finished", "failed") and not code:
            return shell.say(f"the run has {state}")
        failures = 0 if news or state == "queued" else failures + 1
        if failures >= 30:
            raise PodError(f"the run is {state}, but its log could not be had {failures} times in a row")
        shell.wait()


def status(pod: Pod, shell: Shell) -> None:
    """Print what there is of the pod, how the run is, and xpk's own table of it."""
    found = _look(pod, shell)
    if not found:
        return print(f"{pod.cluster_name}: no cluster")
    state = _state(pod, shell, _kubectl(pod, shell))
    if not shell.dry_run:
        print(f"{pod.cluster_name} {found.status}, run {pod.name} {state}")
    shell.run([*_xpk(pod, "workload", "list"), f"--filter-by-job={pod.name}"], check=False)
    return None


def stop(pod: Pod, shell: Shell) -> None:
    """Have the run save and end, and forget it. The cluster stays up and paid for."""
    if _state(pod, shell, _kubectl(pod, shell)) == "absent" and not shell.dry_run:
        return shell.say("there is no run")
    shell.run([*_xpk(pod, "workload", "delete"), f"--workload={pod.name}", "--force"])
    if shell.pretended:
        shell.pretended = "ACTIVE"
    return None


def delete(pod: Pod, shell: Shell) -> None:
    """Remove the run and the pod's own cluster, and wait until Google Cloud lists no machine or disk of it.

    Raises:
        PodError: something is still listed at the time-out.
    """
    if not pod.own_cluster:
        stop(pod, shell)
        return shell.say(f"the run is gone; the cluster {pod.cluster_name} is left as it is, and is paid for")
    late, attempt = shell.deadline(), 0
    while found := _look(pod, shell):
        if late():
            raise PodError(f"the cluster is still there ({found.status}), and paid for; run `delete` again")
        if found.status != "STOPPING":
            # xpk needs a cluster that answers; one that is half made goes without it.
            gcloud = ["gcloud", "container", "clusters", "delete", pod.cluster_name, f"--location={found.location}"]
            force = [*_xpk(pod, "cluster", "delete"), "--force"]
            shell.run([*gcloud, f"--project={pod.project}", "--quiet"] if attempt % 2 else force, check=False)
            attempt += 1
            shell.pretended = None
        shell.wait()
    left = []
    for kind in ("instances", "disks"):
        argv = ["gcloud", "compute", kind, "list", f"--project={pod.project}"]
        argv += [f"--filter=labels.goog-k8s-cluster-name={pod.cluster_name}", "--format=json"]
        left += [f"{kind} {item['name']}" for item in shell.query(argv, []) or []]
    if left:
        raise LastingError(f"the cluster is gone, but these of it are still there and paid for: {', '.join(left)}")
    shell.say(f"nothing of {pod.cluster_name} is left; the bucket with its checkpoints and the images xpk pushed are")
    return None
