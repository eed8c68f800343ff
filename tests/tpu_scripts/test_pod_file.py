"""What a pod file may hold, and what is said of one that is wrong before anything is paid for."""

import json
import re
import tomllib

import job
import pod
import pod_file
import pytest

from tests.tpu_scripts.cloud import SCRIPTS


def change(cloud, old, new):
    path = cloud.root / "pod.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name =", "nmae =", "nmae is unknown; there are name, project"),
        ("install =", "instal =", "run.instal is unknown"),
        ('name = "pod"', 'name = "Pod_1"', "lower-case letters"),
        ('name = "pod"', f'name = "{"p" * 37}"', "1 to 36"),
        ('project = "my-project"', "", "project is missing"),
        ('project = "my-project"', "project = 7", "project must be of type str, got 7"),
        ("us-west4-a", "us-west4", "zone must be a zone such as us-west4-a"),
        ("v5e:4x4", "v5e:4x4x4", "is written as v5e:4x4"),
        ("v5e:4x4", "h100:8", "topology must begin with one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e:4x4", "tpu7x:2x2x2", "offered through GKE only"),
        ("name =", "slices = 0\nname =", "slices must be at least 1"),
        ("name =", "slices = true\nname =", "slices must be of type int"),
        ("name =", 'capacity = "cheap"\nname =', "capacity must be one of spot, reserved, on-demand"),
        ("name =", 'reservation = "r"\nname =', "reservation means nothing on Cloud TPU VMs"),
        ("name =", 'backend = "gke"\ncapacity = "reserved"\nname =', "go together"),
        ("name =", 'backend = "gke"\nservice_account = "a@b"\nname =', "service_account means nothing on gke"),
        ("[run]", '[gke]\ncluster = "c"\n[run]', "the table gke means nothing with backend = 'vm'"),
        ("run_dir=gs://bucket/run", "run_dir=runs/here", "must hold 'run_dir=gs://BUCKET/NAME'"),
        ('files = ["my configs"]', 'files = ["nowhere"]', "run.files names 'nowhere'"),
        ('files = ["my configs"]', 'files = [".."]', "must lie below"),
        ("it's $HOME.yaml", "other.yaml", "run.config must be a file that run.files holds"),
        ("install =", 'secrets = ["A=b"]\ninstall =', "names of environment variables"),
        ("[run]", "[run", "is not TOML"),
    ],
)
def test_a_mistake_is_named_with_what_is_expected(cloud, old, new, said):
    change(cloud, old, new)
    assert said in cloud.pod("create", code=2)
    assert cloud.calls() == []


def test_the_example_is_valid_for_both_ways_with_every_option(tmp_path):
    example = (SCRIPTS / "pod.toml").read_text()
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs/qwen3-8b-grpo.yaml", "data/x", "jaxrl_post/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    common, vm, gke = re.split(r"^\[vm\]|^# \[gke\]", example, flags=re.MULTILINE)
    uncommented = [re.sub(r"^# (?=\w+ = )", "", table, flags=re.MULTILINE) for table in (vm, gke)]
    path = tmp_path / "pod.toml"
    path.write_text(f"{common}[vm]{uncommented[0]}")
    assert pod_file.load(path).ssh_flags == ["--tunnel-through-iap"]
    assert pod_file.load(path).chips == 16
    path.write_text(f"{common}[gke]{uncommented[1]}".replace('"vm" ', '"gke"'))
    assert pod_file.load(path).cluster_name == "my-cluster"
    path.write_text(example)
    assert pod_file.load(path).runtime_version == ""


def test_the_example_installs_what_its_run_needs():
    example = tomllib.loads((SCRIPTS / "pod.toml").read_text())["run"]
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    readme = (SCRIPTS / "README.md").read_text()
    # Its run_dir is in a bucket, and its configuration is another one with larger numbers, which verifies mathematics.
    base = re.search(r"^base: (.+)$", (SCRIPTS.parent / example["config"]).read_text(), re.MULTILINE)
    assert base
    assert "math_verify" in (SCRIPTS.parent / "configs" / base[1]).read_text()
    assert example["install"] == [".[tpu,gcs,math]"]
    assert {"tpu", "gcs", "math"} <= set(project["optional-dependencies"])
    installed = re.findall(r'install = \["jaxrl-post\[(.*?)\]"', readme)
    assert installed == ["tpu,gcs"]


def test_equal_files_make_equal_jobs_whenever_they_were_written_and_caches_stay_at_home(cloud):
    loaded = pod_file.load(cloud.root / "pod.toml")
    first = job.archive(loaded)
    (cloud.root / "my configs" / "__pycache__").mkdir()
    (cloud.root / "my configs" / "__pycache__" / "x.pyc").touch()
    (cloud.root / "my configs" / "it's $HOME.yaml").write_text("seed: 0\n")
    assert job.archive(loaded) == first
    (cloud.root / "my configs" / "it's $HOME.yaml").write_text("seed: 1\n")
    assert job.archive(loaded)[1] != first[1]


def test_cost_is_chips_times_price_times_time(cloud):
    # 2 slices of 16 chips at 1.5 an hour: 48 an hour; a step of 30 s is 1/120 hour: 0.4; 900 of them: 360 in 7.5 hours.
    cloud.pod_file("slices = 2\n")
    printed = cloud.pod("cost", "--price", "1.5", "--step-seconds", "30", "--steps", "900")
    assert "48.00 an hour" in printed
    assert "0.4000" in printed
    assert "900 steps: 360.00, 7.5 hours" in printed
    assert cloud.calls() == []


def test_cost_reads_what_compile_prints_for_this_pod_and_no_other(cloud):
    from jaxrl_post.planning import chips, summary

    path = cloud.root / "compiled.json"
    printed = summary.as_json([], chips.topology("v5e:4x4"), {}) | {"step": {"seconds": 30.0}}
    path.write_text(json.dumps(printed))
    # 16 chips * 1.5 * 30 / 3600
    assert "0.2000" in cloud.pod("cost", "--price", "1.5", "--compiled", str(path))
    for changed, said in (
        ({"slices": 2}, "speaks of 2 x v5e:4x4"),
        ({"step": None, "fits": False}, "does not fit"),
        ({"step": None}, "no duration of a step"),
        ({"step": 3}, "is not what"),
    ):
        path.write_text(json.dumps(printed | changed))
        assert said in cloud.pod("cost", "--price", "1.5", "--compiled", str(path), code=2)


def test_commands_explain_themselves(capsys):
    for words in ([], *([name] for name in pod.COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            pod.main([*words, "--help"])
        assert ended.value.code == 0
        assert (pod.COMMANDS[words[0]][1:] if words else "README.md walks through it") in " ".join(
            capsys.readouterr().out.split()
        )
