"""The same through xpk: a cluster, a JobSet that Kubernetes starts again, and tear-down."""

import pytest

from tests.tpu_scripts.cloud import COMMAND


@pytest.fixture
def gke(cloud):
    cloud.pod_file('backend = "gke"\n')
    return cloud


@pytest.fixture
def launched(gke):
    gke.change(clusters={"pod": "RUNNING"}, jobset="running")
    return gke


def test_a_pod_is_made_launched_and_torn_down(gke):
    gke.pod("create")
    (create,) = gke.calls("xpk", "cluster", "create")
    assert {"--tpu-type=v5litepod-16", "--num-slices=1", "--spot", "--cluster=pod"} <= set(create)
    gke.pod("setup")
    gke.pod("launch")
    (workload,) = gke.calls("xpk", "workload", "create")
    assert {"--workload=pod", "--max-restarts=50", "--restart-on-exit-codes=75"} <= set(workload)
    assert gke.received(gke.root) == COMMAND
    assert "running" in gke.pod("status")
    gke.pod("delete")
    assert gke.state["clusters"] == {}
    gke.pod("delete")
    assert len(gke.calls("xpk", "cluster", "delete")) == 1


def test_no_word_of_the_pod_file_is_in_the_command_that_kubernetes_reads(launched):
    launched.change(jobset=None)
    launched.pod("launch")
    (workload,) = launched.calls("xpk", "workload", "create")
    (command,) = (word for word in workload if word.startswith("--command="))
    assert not set(command) & set("$'\"\\`{}")


def test_launching_twice_starts_one_run(launched):
    assert "already running" in launched.pod("launch")
    launched.change(jobset="queued")
    assert "already queued" in launched.pod("launch")
    assert not launched.calls("workload", "create")


def test_a_dry_run_prints_every_command_and_runs_none(gke):
    for command in ("create", "setup", "launch", "resume", "watch", "logs", "status", "stop", "delete"):
        printed = gke.pod(command, "--dry-run")
        lines = [line for line in printed.splitlines() if not line.startswith("#")]
        assert lines
        assert all(line.split()[0] in ("gcloud", "xpk", "kubectl") for line in lines), printed
    assert gke.calls() == []
    printed = gke.pod("resume", "--dry-run")
    order = ["get-credentials", "kubectl", "xpk workload delete", "xpk workload create"]
    assert [printed.index(word) for word in order] == sorted(printed.index(word) for word in order)


@pytest.mark.parametrize(
    ("topology", "tpu_type"),
    [("v6e:2x4", "v6e-8"), ("v5p:4x4x8", "v5p-4x4x8"), ("tpu7x:2x2x2", "tpu7x-2x2x2")],
)
def test_generations_are_asked_for_by_xpks_names(gke, topology, tpu_type):
    path = gke.root / "pod.toml"
    reserved = 'capacity = "reserved"\nreservation = "mine"\nslices = 2\nname ='
    path.write_text(path.read_text().replace("v5e:4x4", topology).replace("name =", reserved, 1))
    gke.pod("create")
    (create,) = gke.calls("cluster", "create")
    assert {f"--tpu-type={tpu_type}", "--reservation=mine", "--num-slices=2"} <= set(create)


def test_a_quota_error_says_whether_a_cluster_is_left_to_pay_for(gke):
    gke.change(fail={"create": ["Insufficient quota to satisfy the request", "half made: no TPU quota in the region"]})
    said = gke.pod("create", code=1)
    assert "Insufficient quota" in said
    assert "No cluster was created" in said
    said = gke.pod("create", code=1)
    assert "is there and paid for (ERROR)" in said
    # xpk cannot talk to a cluster that is half made; it is deleted without it.
    gke.pod("delete")
    assert gke.state["clusters"] == {}
    assert len(gke.calls("gcloud", "clusters", "delete")) == 1


def test_a_run_that_has_failed_for_good_is_forgotten_and_started_again(launched):
    launched.change(jobset="failed")
    assert "`resume` starts it again" in launched.pod("launch", code=1)
    launched.pod("resume")
    assert launched.state["jobset"] == "running"
    assert "nothing to resume" in launched.pod("resume")
    assert len(launched.calls("workload", "create")) == 1


def test_watch_waits_through_preemptions_and_restarts_a_failed_run_a_few_times(launched):
    launched.change(states=["running", "queued", "running", "failed", "failed", "failed", "running", "finished"])
    said = launched.pod("watch", "--restarts", "1", "--then-delete")
    assert "the run has finished" in said
    assert launched.state["clusters"] == {}
    assert len(launched.calls("workload", "create")) == 1


def test_watch_outlives_a_cluster_that_does_not_answer_and_a_start_that_fails(launched):
    states = ["running", "failed", "failed", "failed", "finished"]
    launched.change(states=states, fail={"get": ["no route to host"] * 4, "workload": ["cannot push the image"]})
    said = launched.pod("watch", "--restarts", "1")
    assert "no route to host" in said
    assert "cannot push the image" in said
    assert "the run has finished" in said


def test_watch_gives_up_on_a_run_that_cannot_be_started(launched):
    launched.change(jobset=None, fail={"workload": ["cannot push the image"] * 50})
    said = launched.pod("watch", code=1)
    assert "Given up after 6 errors" in said
    assert "still paid for" in said


def test_watch_gives_up_on_a_run_that_keeps_failing(launched):
    launched.change(states=["failed"] * 50)
    assert "still paid for" in launched.pod("watch", "--restarts", "2", code=1)
    assert len(launched.calls("workload", "create")) == 2


def test_a_log_that_is_cut_goes_on_without_a_line_lost_or_twice(launched):
    # Cut after two lines and a half, then before the first, then for good.
    launched.change(fail={"log": ["80", "1"]}, states=["running", "running", "finished"])
    said = launched.pod("logs")
    assert [line for line in said.splitlines() if line.startswith("step")] == [f"step {n}" for n in range(8)]
    assert "the run has finished" in said


def test_secrets_are_in_a_private_file_not_in_a_command_and_not_in_the_image(launched):
    launched.pod_file('backend = "gke"\n', run='secrets = ["HF_TOKEN"]\n')
    launched.change(jobset=None)
    assert "xpk garbles" in launched.pod("launch", code=2, HF_TOKEN='a"b')
    said = launched.pod("launch", HF_TOKEN="hf_secret")
    assert launched.state["env_file"] == ["HF_TOKEN=hf_secret\n", 0o600]
    assert "hf_secret" not in said + (launched.root / "calls.jsonl").read_text()
    assert not any("hf_secret" in path.read_text() for path in (launched.root / "image").rglob("*") if path.is_file())


def test_a_cluster_of_somebody_else_is_used_and_left(gke):
    gke.pod_file('backend = "gke"\n', gke='cluster = "theirs"')
    assert "no cluster theirs" in gke.pod("create", code=1)
    assert not gke.calls("xpk")


def test_machines_or_disks_that_outlive_their_cluster_are_named(launched):
    launched.change(left={"disks": ["pvc-1"], "instances": ["gke-pod-7"]})
    said = launched.pod("delete", code=1)
    assert "disks pvc-1" in said
    assert "instances gke-pod-7" in said
