"""The machines of a pod of Cloud TPU VMs: asked for as a queued resource, waited for, replaced, deleted.

What there is, is always asked of Google Cloud, never remembered here: every function may be called again after it was
interrupted, from another machine too.
"""

from __future__ import annotations

from typing import NamedTuple

from pod_file import Pod
from shell import LastingError, PodError, Shell

WAITING = {"CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"}
COMING_UP = {"CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING"}
LABEL = "jaxrl-post"


class Look(NamedTuple):
    """What Google Cloud says there is of a pod."""

    state: str  # absent, waiting, ready or broken
    request: str  # state of the queued resource, "" if there is none
    nodes: dict[str, str]  # state of each node
    workers: int  # machines of all nodes
    why: str  # what the service says about a request that failed
    unlike: bool  # whether the machines are others than the pod file describes

    def __str__(self) -> str:
        parts = [f"request {self.request or 'none'}", *(f"{name} {state}" for name, state in self.nodes.items())]
        return f"{self.state}: {', '.join(parts)}" + (f" ({self.why})" if self.why else "")


def look(pod: Pod, shell: Shell) -> Look:
    """Ask what there is of the pod: its queued resource and its nodes.

    Raises:
        LastingError: a node has the pod's name, but was made by hand.
    """
    where = [f"--project={pod.project}", f"--zone={pod.zone}", "--format=json"]
    pretended = [{"name": pod.name, "state": {"state": shell.pretended}}] if shell.pretended else []
    requests = shell.query(["gcloud", "compute", "tpus", "queued-resources", "list", *where], pretended) or []
    up = {"state": "READY", "labels": {LABEL: pod.name}}
    pretended = [{"name": name, **up} for name in pod.nodes] if shell.pretended == "ACTIVE" else []
    nodes = _nodes(pod, shell.query(["gcloud", "compute", "tpus", "tpu-vm", "list", *where], pretended) or [])
    states = {_id(node): node.get("state", "UNKNOWN") for node in nodes}
    found = next((item.get("state", {}) for item in requests if _id(item) == pod.name), None)
    request = "" if found is None else found.get("state", "UNKNOWN")
    if not request:
        state = "broken" if nodes else "absent"
    elif request in WAITING:
        state = "waiting"
    elif request != "ACTIVE" or set(states) != set(pod.nodes):
        state = "broken"
    elif set(states.values()) == {"READY"}:
        state = "ready"
    else:
        state = "waiting" if set(states.values()) <= {"READY"} | COMING_UP else "broken"
    shapes = {node.get("acceleratorConfig", {}).get("topology", pod.shape) for node in nodes}
    return Look(
        state,
        request,
        states,
        workers=sum(len(node.get("networkEndpoints", [])) for node in nodes),
        why=(found or {}).get("failedData", {}).get("error", {}).get("message", ""),
        unlike=not (set(states) <= set(pod.nodes) and shapes <= {pod.shape}),
    )


def _nodes(pod: Pod, listed: list[dict]) -> list[dict]:
    ours = []
    for node in listed:
        request, label = node.get("queuedResource", ""), node.get("labels", {}).get(LABEL)
        if label == pod.name or request.endswith(f"/{pod.name}"):
            ours.append(node)
        elif _id(node) in pod.nodes:
            # What is left of a request of ours may be deleted; a machine that somebody made by hand may not.
            raise LastingError(f"{_id(node)} is there, but not by these scripts; delete it or choose another name")
    return ours


def _id(item: dict) -> str:
    return item["name"].rpartition("/")[2]


def create(pod: Pod, shell: Shell) -> None:
    """Have the machines: ask for them, wait for them, replace what was preempted or half-made.

    Raises:
        PodError: the request was refused (quota, permissions), failed, or was not met within the time-out; nothing of a
            request that failed is left. Or there are machines of another shape or number, which are left alone.
    """
    late = shell.deadline()
    asked, lost, said = False, 0, ""
    while True:
        found = look(pod, shell)
        if str(found) != said:
            said = str(found)
            shell.say(said)
        if found.unlike:
            raise LastingError(
                "the machines are others than the pod file describes; `delete` removes them, then `create` again"
            )
        if found.state == "ready":
            return
        if found.state == "broken":
            if asked and found.request == "FAILED":
                remove(pod, shell)
                raise PodError(f"the request failed and was removed: {found.why or 'no reason given'}\n{_QUOTA}")
            lost += 1 if asked else 0
            if lost > 3:
                raise PodError(f"the machines were taken away {lost} times before they were up; try another zone")
            remove(pod, shell)
            asked = False
        elif found.state == "absent":
            _ask(pod, shell)
            asked = True
        elif late():
            raise PodError(
                f"still {found.request} after {shell.timeout:g} minutes. The place in the queue is kept: `create` goes "
                "on waiting, `delete` gives it up"
            )
        else:
            shell.wait()


_QUOTA = "README.md, section Quota, says how to see and raise quotas; capacity = 'spot' has quotas of its own"


def _ask(pod: Pod, shell: Shell) -> None:
    kind = pod.topology.partition(":")[0]
    if pod.generation.dimensions == 2:
        accelerator = [f"--accelerator-type={pod.generation.prefix}-{pod.chips // pod.slices}"]
    else:  # an accelerator type says how many TensorCores there are, but not in which shape
        accelerator = [f"--type={kind}", f"--topology={pod.shape}"]
    several = [f"--node-count={pod.slices}", f"--node-prefix={pod.name}"]
    argv = ["gcloud", "compute", "tpus", "queued-resources", "create", pod.name]
    argv += [f"--project={pod.project}", f"--zone={pod.zone}", "--quiet", *accelerator]
    argv += [f"--runtime-version={pod.runtime_version or pod.generation.runtime}"]
    argv += [f"--labels={LABEL}={pod.name}"]
    argv += several if pod.slices > 1 else [f"--node-id={pod.name}"]
    argv += [f"--{pod.capacity}"] if pod.capacity != "on-demand" else []
    argv += [f"--service-account={pod.service_account}"] if pod.service_account else []
    try:
        shell.run([*argv, *pod.create_flags])
    except PodError as error:
        if look(pod, shell).request in WAITING | {"ACTIVE"}:
            return  # the answer was lost, the request was not
        remove(pod, shell)
        raise PodError(f"{error}\nNothing was created. {_QUOTA}") from None
    shell.pretended = "ACTIVE"


def remove(pod: Pod, shell: Shell) -> None:
    """Delete the queued resource and every node of the pod, and wait until Google Cloud lists none of them.

    Raises:
        PodError: something is still listed at the time-out.
    """
    late = shell.deadline()
    where = [f"--project={pod.project}", f"--zone={pod.zone}", "--quiet"]
    while (found := look(pod, shell)).state != "absent":
        if late():
            raise PodError(f"still there, and perhaps paid for: {found}; run `delete` again")
        # An attempt that fails is made again: a request cannot be deleted while it is changing state.
        if found.request:
            argv = ["gcloud", "compute", "tpus", "queued-resources", "delete", pod.name, "--force", *where]
            if found.request != "DELETING":
                shell.run(argv, check=False)
                shell.pretended = None
        else:
            for node in [name for name, state in found.nodes.items() if state != "DELETING"]:
                shell.run(["gcloud", "compute", "tpus", "tpu-vm", "delete", node, *where], check=False)
        shell.wait()


def delete(pod: Pod, shell: Shell) -> None:
    """Remove the pod, then say what TPUs of the project are left in its zone."""
    remove(pod, shell)
    where = [f"--project={pod.project}", f"--zone={pod.zone}", "--format=json"]
    shell.say(f"nothing of {pod.name} is left; the bucket with its checkpoints is")
    for group in ("queued-resources", "tpu-vm"):
        for item in shell.query(["gcloud", "compute", "tpus", group, "list", *where], []) or []:
            state = item.get("state")
            shell.say(
                f"others in {pod.zone}: {group} {_id(item)} {state['state'] if isinstance(state, dict) else state}"
            )
