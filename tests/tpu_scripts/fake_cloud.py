"""Stands on the PATH as `gcloud`, `xpk` and `kubectl`: a cloud in one JSON file, whose machines are directories.

It takes the flags that the references of these programs list, and no others, writes every call down, runs what is sent
to a worker as the worker's shell would, and fails as it is told to.
"""

import fcntl
import json
import os
import sys
import types

# Every call is a process, so little is imported before it is needed.
ROOT = os.environ.get("FAKE_CLOUD", "")  # given to those who run it
PROJECT = "projects/my-project/locations/us-west4-a"


def parse(argv, *flags, positional=0, switches=()):
    """The options of a call, as attributes; a flag that the program does not have is an error."""
    options = dict.fromkeys(("--project", "--zone", "--format", "--filter", *flags), "")
    options |= dict.fromkeys(("--quiet", *switches), False)
    words = [word for word in argv if not word.startswith("--")]
    for word in (word for word in argv if word.startswith("--")):
        name, equals, value = word.partition("=")
        if name not in options or bool(equals) != isinstance(options[name], str):
            fail(f"unrecognized arguments: {word}", 2)
        options[name] = value if equals else True
    if positional is not None and len(words) != positional:
        fail(f"expected {positional} positional arguments, got {words}", 2)
    return types.SimpleNamespace(words=words, **{name[2:].replace("-", "_"): options[name] for name in options})


def path(*parts):
    return os.path.join(ROOT, *parts)


def machines(node=""):
    """Directories of the workers of one node, or of all."""
    names = sorted(os.listdir(path("workers")))
    return [path("workers", name) for name in names if name.startswith(f"{node}-w-" if node else "")]


def fail(text, code=1):
    print(f"ERROR: {text}", file=sys.stderr)
    sys.exit(code)


def injected(cloud, name):
    """The next failure planned for a call, "" if it shall succeed."""
    planned = cloud["fail"].get(name, [])
    return planned.pop(0) if planned else ""


def make_nodes(cloud, names):
    for name in names:
        cloud["nodes"][name] = "READY"
        for index in range(cloud["workers"]):
            os.makedirs(path("workers", f"{name}-w-{index}"))


def remove_node(cloud, name):
    cloud["nodes"].pop(name, None)
    for worker in machines(name):
        # Away at once, whatever its processes still write there; the test ends those that are left.
        os.rename(worker, path("gone", f"{len(os.listdir(path('gone')))}"))


def preempt(cloud):
    cloud["requests"] = dict.fromkeys(cloud["requests"], "SUSPENDED")
    for name in list(cloud["nodes"]):
        remove_node(cloud, name)
        cloud["nodes"][name] = "PREEMPTED"


def queued_resources(cloud, verb, argv):
    if verb == "create":
        flags = ("--accelerator-type", "--type", "--topology", "--runtime-version", "--node-id", "--node-count")
        flags += ("--node-prefix", "--labels", "--service-account", "--network")
        options = parse(argv, *flags, positional=1, switches=("--spot", "--reserved"))
        name = options.words[0]
        if error := injected(cloud, "create"):
            fail(error)
        if name in cloud["requests"]:
            fail(f"ALREADY_EXISTS: {name}")
        assert bool(options.accelerator_type) != bool(options.type and options.topology), argv
        assert bool(options.node_id) != bool(options.node_count and options.node_prefix), argv
        names = [options.node_id] if options.node_id else [f"{name}-{i}" for i in range(int(options.node_count))]
        if taken := set(names) & set(cloud["nodes"]):
            fail(f"ALREADY_EXISTS: {taken}")
        cloud["pending"] = {"states": cloud["plans"].pop(0) if cloud["plans"] else ["ACTIVE"], "nodes": names}
        cloud["requests"][name] = "ACCEPTED"
    elif verb == "list":
        parse(argv)
        cloud["looks"] += 1
        if error := injected(cloud, "list"):
            fail(error)
        if cloud["looks"] == cloud["preempt_at"]:
            preempt(cloud)
            cloud["pending"] = None
        for name in cloud["requests"]:
            if cloud.get("pending"):
                state = cloud["requests"][name] = cloud["pending"]["states"].pop(0)
                if state == "FAILED":  # half made: one node came up
                    make_nodes(cloud, cloud["pending"]["nodes"][:1])
                if state == "ACTIVE":
                    make_nodes(cloud, cloud["pending"]["nodes"])
                if not cloud["pending"]["states"]:
                    cloud["pending"] = None
        listed = [{"name": "somebody-elses", "state": {"state": "ACTIVE"}}] if cloud["crowded"] else []
        for name, state in cloud["requests"].items():
            why = {"failedData": {"error": {"message": "no capacity left"}}} if state == "FAILED" else {}
            listed.append({"name": f"{PROJECT}/queuedResources/{name}", "state": {"state": state, **why}})
        print(json.dumps(listed))
    elif verb == "delete":
        options = parse(argv, positional=1, switches=("--force", "--async"))
        assert options.force
        assert options.quiet
        if error := injected(cloud, "delete"):
            fail(error)
        if options.words[0] not in cloud["requests"]:
            fail("NOT_FOUND")
        del cloud["requests"][options.words[0]]
        cloud["pending"] = None
        for name in list(cloud["nodes"]):
            remove_node(cloud, name)
    elif verb == "scp":
        options = parse(argv, "--node", "--worker", positional=None)
        *sources, target = options.words
        assert options.node == options.worker == "all"
        for worker in machines():
            fault = injected(cloud, "scp")
            for source in sources if fault != "lost" else ():
                with open(source, "rb") as file:
                    content = file.read()
                name = os.path.join(worker, target.partition(":")[2], os.path.basename(source))
                # As scp does it: a new file gets the mode of its source, an old one keeps its own.
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                with os.fdopen(os.open(name, flags, os.stat(source).st_mode & 0o755), "wb") as file:
                    file.write(content[:100] if fault == "half" and name.endswith(".gz") else content)
    elif verb == "ssh":
        ssh(cloud, parse(argv, "--node", "--worker", "--command", positional=1))
    else:
        fail(f"unknown: {verb}")


def ssh(cloud, options):
    import subprocess

    chosen = machines()
    if options.worker != "all":
        chosen = [path("workers", f"{sorted(cloud['nodes'])[int(options.node)]}-w-{options.worker}")]
    cut = injected(cloud, "log") if " log " in options.command else ""
    save(cloud)  # what runs on workers may last; other calls go on meanwhile
    LOCK.close()
    running = []
    for worker in chosen:
        env = {"HOME": worker, "HOSTNAME": os.path.basename(worker), "PATH": f"{path('worker_bin')}:/usr/bin:/bin"}
        # sshd hands the words that gcloud split at spaces, joined again, to the login shell.
        argv = ["bash", "-c", " ".join(options.command.split(" "))]
        output = subprocess.PIPE if cut else None
        running.append(subprocess.Popen(argv, cwd=worker, env=env, stdout=output, text=True))
    if cut:
        print(running[0].stdout.read(int(cut)), end="", flush=True)
        running[0].kill()
        os._exit(255)
    codes = [process.wait() for process in running]
    if len(chosen) == 1:
        sys.exit(codes[0])
    for index, code in enumerate(codes):
        if code:
            print(
                f"##### Command execution on worker {index} failed with exit status {code}. Continuing.",
                file=sys.stderr,
            )
    sys.exit(0)


def tpu_vm(cloud, verb, argv):
    if verb == "list":
        parse(argv)
        endpoints = [{"ipAddress": f"10.0.0.{index}"} for index in range(cloud["workers"])]
        made = {} if cloud["by_hand"] else {"labels": {"jaxrl-post": "pod"}}
        nodes = [
            {
                "name": f"{PROJECT}/nodes/{name}",
                "state": state,
                "networkEndpoints": endpoints,
                "acceleratorConfig": {"type": "V5LITE_POD", "topology": "4x4"},
                **made,
            }
            for name, state in cloud["nodes"].items()
        ]
        print(json.dumps(nodes))
    elif verb == "delete":
        options = parse(argv, positional=1)
        assert options.quiet
        remove_node(cloud, options.words[0])
    else:
        fail(f"unknown: {verb}")


def gcloud(cloud, argv):
    if argv[:3] == ["compute", "tpus", "queued-resources"]:
        queued_resources(cloud, argv[3], argv[4:])
    elif argv[:3] == ["compute", "tpus", "tpu-vm"]:
        tpu_vm(cloud, argv[3], argv[4:])
    elif argv[:3] == ["container", "clusters", "list"]:
        parse(argv[3:])
        listed = [
            {"name": name, "status": status, "location": "us-west4"} for name, status in cloud["clusters"].items()
        ]
        print(json.dumps(listed))
    elif argv[:3] == ["container", "clusters", "get-credentials"]:
        options = parse(argv[3:], "--location", positional=1)
        if cloud["clusters"].get(options.words[0]) != "RUNNING":
            fail("the cluster does not answer")
    elif argv[:3] == ["container", "clusters", "delete"]:
        options = parse(argv[3:], "--location", positional=1)
        assert options.quiet
        del cloud["clusters"][options.words[0]]
    elif argv[:1] == ["compute"] and argv[2] == "list":
        parse(argv[3:])
        print(json.dumps([{"name": name} for name in cloud["left"].get(argv[1], [])]))
    else:
        fail(f"unknown: {argv}")


def xpk(cloud, argv):
    shared = ("--cluster", "--workload", "--tpu-type", "--num-slices", "--reservation")
    noun, verb, *argv = argv
    if (noun, verb) == ("cluster", "create"):
        options = parse(argv, *shared, "--custom-nodepool-arguments", switches=("--spot", "--on-demand"))
        if error := injected(cloud, "create"):
            if "half" in error:
                cloud["clusters"][options.cluster] = "ERROR"
            fail(error)
        cloud["clusters"][options.cluster] = "RUNNING"
    elif (noun, verb) == ("cluster", "delete"):
        options = parse(argv, *shared, switches=("--force",))
        assert options.force
        if cloud["clusters"].get(options.cluster) != "RUNNING":
            fail("cannot talk to the cluster")
        del cloud["clusters"][options.cluster]
        cloud["jobset"] = None
    elif (noun, verb) == ("workload", "create"):
        flags = ("--base-docker-image", "--script-dir", "--max-restarts", "--restart-on-exit-codes", "--env-file")
        flags += ("--termination-grace-period-seconds", "--docker-name", "--command", "--priority")
        import shutil
        import subprocess

        options = parse(argv, *shared, *flags)
        assert cloud["jobset"] is None, "would ask whether to overwrite it"
        if error := injected(cloud, "workload"):
            fail(error)
        shutil.copytree(options.script_dir, path("image"), dirs_exist_ok=True)
        if options.env_file:
            with open(options.env_file) as file:
                cloud["env_file"] = [file.read(), os.stat(options.env_file).st_mode & 0o777]
        # As xpk's container does it.
        env = {"HOME": ROOT, "PATH": f"{path('worker_bin')}:/usr/bin:/bin", "FAKE_RECEIVED": ROOT}
        command = ["bash", "-c", f"({options.command}) & wait $!"]
        subprocess.run(command, cwd=path("image"), env=env, check=False, stdout=subprocess.DEVNULL)
        cloud["jobset"] = "running"
    elif (noun, verb) == ("workload", "delete"):
        options = parse(argv, *shared, switches=("--force",))
        assert options.force
        cloud["jobset"] = None
    elif (noun, verb) == ("workload", "list"):
        parse(argv, *shared, "--filter-by-job")
        print("Jobset Name  Status")
    else:
        fail(f"unknown: {noun} {verb}")


def kubectl(cloud, argv):
    assert argv[0] == "--context=gke_my-project_us-west4_pod", argv
    if argv[1:3] == ["get", "jobset"]:
        cloud["looks"] += 1
        if error := injected(cloud, "get"):
            fail(error)
        if cloud["jobset"] and cloud["states"]:
            cloud["jobset"] = cloud["states"].pop(0)
        conditions = {"finished": ["Completed"], "failed": ["Failed"]}.get(cloud["jobset"], [])
        status = {"conditions": [{"type": kind, "status": "True"} for kind in conditions]}
        spec = {"suspend": cloud["jobset"] == "queued"}
        print(json.dumps({"spec": spec, "status": status}) if cloud["jobset"] else "")
    elif argv[1] == "logs":
        lines = [f"2026-01-01T00:00:{second:02}.5Z step {second}\n" for second in range(8)]
        since = next((word.partition("=")[2] for word in argv if word.startswith("--since-time=")), "")
        text = "".join(line for line in lines if line[:19] >= since[:19])
        cut = injected(cloud, "log")
        print(text[: int(cut)] if cut else text, end="")
        if cut:
            fail("unexpected EOF")
    else:
        fail(f"unknown: {argv}")


def save(cloud):
    with open(path("cloud.json.new"), "w") as file:
        json.dump(cloud, file)
    os.replace(path("cloud.json.new"), path("cloud.json"))


def main():
    program, *arguments = sys.argv[1:]
    # Open until the call is over, or until what it runs on workers may take long.
    global LOCK
    LOCK = open(path("lock"), "w")  # noqa: SIM115
    fcntl.flock(LOCK, fcntl.LOCK_EX)
    with open(path("calls.jsonl"), "a") as calls:
        calls.write(json.dumps([program, *arguments]) + "\n")
    with open(path("cloud.json")) as saved:
        state = json.load(saved)
    try:
        {"gcloud": gcloud, "xpk": xpk, "kubectl": kubectl}[program](state, arguments)
    finally:
        if not LOCK.closed:
            save(state)
