"""Cloud TPU VMs, from nothing to nothing, and what goes wrong between."""

import shlex
import subprocess
import time

import pytest

from tests.tpu_scripts.cloud import COMMAND

JOB = "jaxrl-post/pod"


def up(cloud):
    """A pod on which the run is running."""
    for command in ("create", "setup", "launch"):
        cloud.pod(command)


def wait_for(cloud, state):
    while state not in cloud.pod("status"):
        time.sleep(0.1)


def test_a_pod_is_asked_for_waited_for_set_up_launched_and_torn_down(cloud):
    cloud.change(plans=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    said = cloud.pod("create")
    assert said.index("WAITING_FOR_RESOURCES") < said.index("PROVISIONING") < said.index("ready")
    (create,) = cloud.calls("create")
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    assert {"--node-id=pod", "--project=my-project", "--zone=us-west4-a"} <= set(create)
    cloud.pod("setup")
    cloud.pod("launch")
    assert "running" in cloud.pod("status")
    for worker in cloud.workers():
        assert cloud.received(worker) == COMMAND
    assert len(cloud.workers()) == 2
    cloud.pod("delete")
    assert cloud.state["requests"] == cloud.state["nodes"] == {}
    assert not cloud.workers()


def test_every_command_may_be_given_twice(cloud):
    for command in ("create", "setup", "launch"):
        cloud.pod(command)
        cloud.pod(command)
    assert len(cloud.calls("create")) == 1
    for worker in cloud.workers():
        assert cloud.read(worker, "launches").count("launched") == 1
    for _ in range(2):
        cloud.pod("stop")
    assert "ended 130" in cloud.pod("status")
    for worker in cloud.workers():
        assert cloud.read(worker, "launches").count("launched") == 1
    for _ in range(2):
        cloud.pod("delete")
    assert len(cloud.calls("delete")) == 1


def test_a_dry_run_prints_every_command_and_runs_none(cloud):
    for command in ("create", "setup", "launch", "resume", "watch", "logs", "status", "stop", "delete"):
        printed = cloud.pod(command, "--dry-run")
        lines = [line for line in printed.splitlines() if not line.startswith("#")]
        assert lines, command
        assert all(line.startswith("gcloud compute tpus ") for line in lines), printed
    assert cloud.calls() == []
    printed = cloud.pod("resume", "--dry-run")
    order = ["queued-resources delete", "queued-resources create", "scp", "worker.sh setup", "worker.sh launch"]
    assert [printed.index(word) for word in order] == sorted(printed.index(word) for word in order)


def test_a_dry_run_prints_the_commands_of_the_real_run(cloud):
    def changing(lines):
        return [line for line in lines if " list " not in line and " scp " not in line]

    printed = [cloud.pod(command, "--dry-run").splitlines() for command in ("create", "setup", "launch")]
    up(cloud)
    planned = changing([line for lines in printed for line in lines if not line.startswith("#")])
    assert planned == changing([shlex.join(call) for call in cloud.calls()])


def test_several_slices_are_one_request_of_several_nodes(cloud):
    cloud.pod_file("slices = 2\n", vm='create_flags = ["--network=mine"]')
    up(cloud)
    (create,) = cloud.calls("create")
    assert {"--node-count=2", "--node-prefix=pod", "--network=mine"} <= set(create)
    assert sorted(cloud.state["nodes"]) == ["pod-0", "pod-1"]
    assert [cloud.received(worker) for worker in cloud.workers()] == [COMMAND] * 4
    cloud.end_runs()
    assert "step 3" in cloud.pod("logs", "--slice", "1", "--worker", "1")
    assert {"--node=1", "--worker=1"} <= set(cloud.calls("ssh")[-1])


@pytest.mark.parametrize(
    ("topology", "flags"),
    [
        ("v6e:2x4", {"--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"}),
        ("v5p:4x4x8", {"--type=v5p", "--topology=4x4x8", "--runtime-version=v2-alpha-tpuv5"}),
        ("v4:2x2x2", {"--type=v4", "--topology=2x2x2", "--runtime-version=tpu-ubuntu2204-base"}),
    ],
)
def test_generations_are_asked_for_by_googles_names(cloud, topology, flags):
    path = cloud.root / "pod.toml"
    path.write_text(path.read_text().replace("v5e:4x4", topology).replace("name =", 'capacity = "reserved"\nname =', 1))
    printed = cloud.pod("create", "--dry-run")
    (create,) = (line.split() for line in printed.splitlines() if " create " in line)
    assert flags | {"--reserved"} <= set(create)


def test_a_quota_error_leaves_nothing_and_says_what_to_do(cloud):
    cloud.change(fail={"create": ["RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded"]})
    said = cloud.pod("create", code=1)
    assert "Quota limit 'TPUV5sPreemptible' has been exceeded" in said
    assert "Nothing was created" in said
    assert "README.md" in said
    assert cloud.state["requests"] == {}


def test_a_request_that_fails_half_made_is_removed_with_the_node_that_came_up(cloud):
    cloud.pod_file("slices = 2\n")
    cloud.change(plans=[["PROVISIONING", "FAILED"]])
    said = cloud.pod("create", code=1)
    assert "no capacity left" in said
    assert cloud.state["nodes"] == cloud.state["requests"] == {}
    cloud.pod("create")
    assert cloud.state["nodes"] == {"pod-0": "READY", "pod-1": "READY"}


def test_nodes_left_without_their_request_are_replaced_but_not_one_made_by_hand(cloud):
    cloud.change(nodes={"pod": "READY"}, by_hand=True)
    assert "not by these scripts" in cloud.pod("create", code=1)
    assert "not by these scripts" in cloud.pod("delete", code=1)
    assert "not by these scripts" in cloud.pod("watch", "--then-delete", code=1)
    assert cloud.state["nodes"] == {"pod": "READY"}
    cloud.change(by_hand=False)
    cloud.pod("create")
    assert len(cloud.calls("tpu-vm", "delete")) == 1
    assert cloud.state["requests"] == {"pod": "ACTIVE"}


@pytest.mark.parametrize(("old", "new"), [("name =", "slices = 2\nname ="), ("v5e:4x4", "v5e:8x8")])
def test_machines_unlike_a_changed_pod_file_are_left_to_the_user_to_delete(running, old, new):
    path = running.root / "pod.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    for command in ("create", "resume"):
        assert "others than the pod file describes" in running.pod(command, code=1)
    assert running.state["nodes"] == {"pod": "READY"}
    running.pod("delete")
    assert running.state["nodes"] == running.state["requests"] == {}


def test_waiting_ends_at_the_time_out_and_keeps_the_place_in_the_queue(cloud):
    cloud.change(plans=[["WAITING_FOR_RESOURCES"] * 100])
    said = cloud.pod("create", "--timeout", "0.003", code=1)
    assert "still WAITING_FOR_RESOURCES" in said
    assert cloud.state["requests"] == {"pod": "WAITING_FOR_RESOURCES"}
    assert not cloud.calls("delete")


def test_machines_taken_away_before_they_are_up_are_asked_for_again(cloud):
    cloud.change(plans=[["PROVISIONING", "SUSPENDED"], ["ACTIVE"]])
    cloud.pod("create")
    assert len(cloud.calls("create")) == 2


def test_a_worker_that_fails_in_set_up_is_named_and_set_up_alone_mends_it(cloud):
    cloud.pod("create")
    broken = cloud.workers()[1]
    (broken / "broken").touch()
    said = cloud.pod("setup", code=1)
    assert "pod-w-1 failed" in said
    assert "no such package" in said
    assert "still up and paid for" in said
    assert "set up" in cloud.pod("launch", code=1)
    assert not list(cloud.root.glob("workers/*/launches"))
    (broken / "broken").unlink()
    cloud.pod("setup")
    cloud.pod("launch")
    assert len(list(cloud.root.glob("workers/*/launches"))) == 2


@pytest.mark.parametrize("fault", ["lost", "half"])
def test_a_worker_that_got_no_files_or_half_of_them_is_noticed_though_gcloud_ends_well(cloud, fault):
    cloud.pod("create")
    cloud.change(fail={"scp": [fault]})
    said = cloud.pod("setup", code=1)
    assert {"lost": "1 of 2 workers answered: pod-w-1", "half": "pod-w-0 failed"}[fault] in said
    cloud.pod("setup")
    cloud.pod("launch")


def test_a_changed_job_replaces_the_old_one_but_not_under_a_run(running):
    (running.root / "my configs" / "more.yaml").write_text("seed: 1\n")
    assert "stop it first" in running.pod("setup", code=1)
    running.pod("stop")
    (running.root / "my configs" / "more.yaml").write_text("seed: 2\n")
    running.change(fail={"scp": ["lost"]})
    assert "pod-w-0 failed" in running.pod("setup", code=1)  # it has the former job
    running.pod("setup")
    for worker in running.workers():
        assert (worker / JOB / "files" / "my configs" / "more.yaml").read_text() == "seed: 2\n"


def test_a_run_preempted_midway_is_resumed_on_new_machines_by_the_same_command(running):
    running.change(preempt_at=running.state["looks"] + 1)
    assert "SUSPENDED" in running.pod("status")
    running.pod("resume")
    assert [running.received(worker) for worker in running.workers()] == [COMMAND] * 2
    assert "running" in running.pod("status")
    calls = len(running.calls("create"))
    assert "nothing to resume" in running.pod("resume")
    assert len(running.calls("create")) == calls == 2


def test_watch_resumes_after_preemption_whatever_fails_meanwhile_until_the_run_has_finished_and_then_deletes(running):
    faults = {"list": [""] * 4 + ["connection lost"], "create": ["UNAVAILABLE: try again later"] * 6, "scp": ["lost"]}
    running.change(preempt_at=running.state["looks"] + 3, fail=faults)
    watch = running.start("watch", "--then-delete")
    while not (list(running.root.glob("gone/*")) and len(list(running.root.glob("workers/*/launches"))) == 2):
        time.sleep(0.05)
        assert watch.poll() is None, watch.communicate()[0]
    running.end_runs()
    said = watch.communicate(timeout=60)[0]
    assert watch.returncode == 0, said
    assert said.count("UNAVAILABLE: try again later\nNothing was created") == 6
    assert "1 of 2 workers answered" in said
    assert "the run has finished" in said
    assert running.state["requests"] == running.state["nodes"] == {}


def test_watch_and_its_tear_down_outlive_a_network_that_is_away(running):
    running.end_runs()
    wait_for(running, "finished")
    running.change(fail={"list": ["no network"] * 4 + [""] + ["no network"] * 4})
    assert "the run has finished" in running.pod("watch", "--then-delete")
    assert running.state["requests"] == running.state["nodes"] == {}
    assert running.state["fail"] == {"list": []}


def test_watch_gives_up_at_the_time_out_and_says_that_machines_are_paid_for(running):
    running.change(fail={"list": ["no network"] * 1000})
    said = running.pod("watch", "--timeout", "0.003", code=1)
    assert "no network" in said
    assert "Given up after 0.003 minutes" in said
    assert "still paid for" in said


def test_watch_gives_up_on_machines_that_are_up_and_cannot_be_set_up(cloud):
    cloud.pod("create")
    (cloud.workers()[1] / "broken").touch()
    said = cloud.pod("watch", code=1)
    assert said.count("no such package") == 6
    assert "Given up after 6 errors" in said
    assert "still paid for" in said


def test_watch_misses_a_secret_before_it_is_needed(cloud):
    cloud.pod_file(run='secrets = ["HF_TOKEN"]\n')
    assert "HF_TOKEN, which is not set" in cloud.pod("watch", code=2)
    assert cloud.calls() == []


def test_watch_gives_up_on_a_run_that_fails_by_itself_and_counts_no_other_failure(running):
    running.end_runs(1)
    (running.root / "my configs" / "more.yaml").write_text("seed: 1\n")
    running.change(fail={"scp": ["lost"]})
    said = running.pod("watch", "--restarts", "1", code=1)
    assert "pod-w-0 failed" in said
    assert "has ended 1 2 times" in said
    assert [running.read(worker, "launches").count("launched") for worker in running.workers()] == [2, 2]


def test_watch_starts_a_run_again_that_ended_because_it_had_lost_a_worker(running):
    running.end_runs(75)
    wait_for(running, "ended 75")
    running.end_runs(0)
    assert "the run has finished" in running.pod("watch", "--restarts", "0")
    assert [running.read(worker, "launches").count("launched") for worker in running.workers()] == [2, 2]


def test_workers_that_have_lost_one_are_stopped_and_all_are_launched_again(running):
    running.end_runs(1, slice(0, 1))
    wait_for(running, "ended")
    (running.workers()[0] / "end").unlink()
    running.pod("launch")
    assert [running.read(worker, "launches").count("launched") for worker in running.workers()] == [2, 2]
    assert "saved" in running.read(running.workers()[1], f"{JOB}/log")


def test_workers_that_finish_one_after_the_other_are_left_to_finish(running):
    running.end_runs(0, slice(0, 1))
    watch = running.start("watch")
    looks = running.state["looks"]
    while running.state["looks"] < looks + 8:
        time.sleep(0.05)
        assert watch.poll() is None, watch.communicate()[0]
    running.end_runs(0)
    assert "has finished" in watch.communicate(timeout=60)[0]
    assert running.read(running.workers()[1], "launches").count("launched") == 1


def test_two_looks_at_once_take_neither_for_the_run(set_up):
    set_up.program("true", "sleep 0.3")  # what is run under the lock
    argv = ["bash", str(set_up.workers()[0] / JOB / "worker.sh"), "status"]
    env = {"HOSTNAME": "here", "PATH": f"{set_up.root}/worker_bin:/usr/bin:/bin"}
    looks = [subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [look.communicate()[0] for look in looks] == ["@pod here set up\n"] * 2


def test_a_worker_on_which_the_run_was_not_started_is_named_and_launch_starts_all(set_up):
    lock = 'if [[ -f $HOME/held ]] && grep -q launch /proc/$PPID/cmdline; then rm "$HOME/held"; exit 1; fi'
    set_up.program("flock", f'{lock}\nexec /usr/bin/flock "$@"')
    (set_up.workers()[1] / "held").touch()  # by somebody else, for a moment
    assert "not started on pod-w-1;" in set_up.pod("launch", code=1)
    set_up.pod("launch")
    assert "run running" in set_up.pod("status")


def test_a_launch_that_starts_nothing_ends(set_up):
    set_up.program("setsid", "exit 0")
    set_up.program("sleep", "exit 0")
    assert "has not started within 10 s" in set_up.pod("launch", code=1)


def test_stop_lets_the_run_save_and_launch_goes_on(running):
    running.pod("stop")
    for worker in running.workers():
        assert "saved" in running.read(worker, f"{JOB}/log")
    assert "ended 130" in running.pod("status")
    running.pod("launch")
    assert "running" in running.pod("status")


def test_a_log_that_is_cut_goes_on_where_it_was_cut_without_a_line_lost_or_twice(running):
    running.end_runs()
    wait_for(running, "finished")
    # After ten characters the connection is gone: in the middle of the second line; then before the first.
    running.change(fail={"log": ["10", "0", "3"]})
    said = running.pod("logs")
    printed = [line for line in said.splitlines() if line.startswith(("step", "over", "ste", "st"))]
    assert printed == ["step 1", "step 2", "step 3", "over"]
    assert "ended 0" in said


def test_logs_follow_a_run_until_it_ends(running):
    logs = running.start("logs", "--worker", "1")
    while not running.calls("ssh", "--worker=1"):
        time.sleep(0.05)
        assert logs.poll() is None
    running.end_runs(7)
    said = logs.communicate(timeout=60)[0]
    assert "step 3" in said
    assert "over" in said
    assert "ended 7" in said


def test_logs_of_a_pod_that_was_taken_away_say_so(running):
    running.change(preempt_at=running.state["looks"] + 1, fail={"log": ["7"] * 9})
    assert "`resume` brings it back" in running.pod("logs", code=1)


def test_secrets_are_in_no_command_and_readable_by_the_worker_alone(cloud):
    cloud.pod_file(run='secrets = ["HF_TOKEN"]\nenv = {NOTE = "a \'b\' $c"}\n')
    assert "not set" in cloud.pod("setup", code=2)
    cloud.pod("create")
    token = 'hf_it\'s "secret" $HOME'
    for worker in cloud.workers()[:1]:
        (worker / JOB).mkdir(parents=True, mode=0o700)
        (worker / JOB / "secrets.env").touch(0o644)  # of an earlier time
    said = cloud.pod("setup", HF_TOKEN=token) + cloud.pod("launch")
    for worker in cloud.workers():
        assert cloud.read(worker, "environment") == f"{token}|a 'b' $c"
        path = worker / JOB / "secrets.env"
        assert path.stat().st_mode & 0o777 == (path.parent / "log").stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "hf_it" not in said
    assert "hf_it" not in (cloud.root / "calls.jsonl").read_text()


def test_tear_down_goes_on_until_nothing_is_listed_and_names_what_others_have(running):
    running.change(fail={"delete": ["the request is changing state"] * 2}, crowded=True)
    said = running.pod("delete")
    assert len(running.calls("delete")) == 3
    assert "nothing of pod is left" in said
    assert "somebody-elses" in said


def test_tear_down_that_does_not_succeed_says_what_may_still_be_paid_for(running):
    running.change(fail={"delete": ["no"] * 1000})
    said = running.pod("delete", "--timeout", "0.01", code=1)
    assert "still there, and perhaps paid for" in said
    assert "pod READY" in said
