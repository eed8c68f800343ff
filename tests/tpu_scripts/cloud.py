"""A fake cloud for one test: the programs on a PATH, a pod file, and ways to look at what became of them."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
sys.path.insert(0, str(SCRIPTS))

import pod  # noqa: E402

FAKE = Path(__file__).parent

UV = """#!/bin/bash
if [[ $1 == venv ]]; then
  mkdir -p venv/bin
elif [[ -f $HOME/broken ]]; then
  echo "no such package" >&2
  exit 1
else
  [[ $(<.pod/requirements.txt) == "jaxrl-post[tpu]" ]]
  cp "$(dirname "$0")/jaxrl-post" ../venv/bin
fi
"""
PIP = '#!/bin/bash\n[[ $1 == install && $(<"${@: -1}") == "jaxrl-post[tpu]" ]]\n'
# A run that says three lines, and ends when it is told to: by a file, or by SIGTERM after it has saved.
RUN = """#!/bin/bash
received=${FAKE_RECEIVED:-$HOME}
printf '%s\\0' "$@" >"$received/received"
printf '%s' "${HF_TOKEN-}|${NOTE-}" >"$received/environment"
echo launched >>"$received/launches"
trap 'echo saved; exit 130' TERM
for step in 1 2 3; do echo "step $step"; done
if [[ -n ${FAKE_RECEIVED-} ]]; then exit 0; fi
until [[ -f $HOME/end ]]; do
  if ((SECONDS > 100)); then exit 99; fi # should a test leave it behind
  sleep 0.02
done
echo over
exit "$(<"$HOME/end")"
"""

POD = """
name = "pod"
project = "my-project"
zone = "us-west4-a"
topology = "v5e:4x4"
[run]
config = "my configs/it's $HOME.yaml"
overrides = ["run_dir=gs://bucket/run", 'data.prompt="{word}>  `x` $(y) \\\\ $Z"', "a=b c"]
files = ["my configs"]
install = ["jaxrl-post[tpu]"]
"""
COMMAND = ["train", "my configs/it's $HOME.yaml", "run_dir=gs://bucket/run"]
COMMAND += ['data.prompt="{word}>  `x` $(y) \\\\ $Z"', "a=b c"]


class Cloud:
    """One fake cloud in a directory."""

    def __init__(self, root: Path, **state):
        self.root = root
        start = {"requests": {}, "nodes": {}, "workers": 2, "fail": {}, "plans": [], "looks": 0, "preempt_at": -1}
        start |= {"crowded": False, "by_hand": False, "clusters": {}, "jobset": None, "states": [], "left": {}}
        self.state = start | state
        for folder, programs in (("bin", ("gcloud", "xpk", "kubectl")), ("worker_bin", ("uv", "pip", "jaxrl-post"))):
            (root / folder).mkdir()
            for name in programs:
                text = {"uv": UV, "pip": PIP, "jaxrl-post": RUN}.get(name)
                # Imported, not run, so that it is compiled once.
                code = f"import sys; sys.path.insert(0, {str(FAKE)!r}); import fake_cloud; fake_cloud.main()"
                text = text or f'#!/bin/sh\nexec {sys.executable} -I -S -c "{code}" {name} "$@"\n'
                (root / folder / name).write_text(text)
                (root / folder / name).chmod(0o755)
        (root / "workers").mkdir()
        (root / "gone").mkdir()
        (root / "my configs").mkdir()
        (root / "my configs" / "it's $HOME.yaml").write_text("seed: 0\n")
        self.pod_file()

    def pod_file(self, top: str = "", **tables: str) -> None:
        """Write the pod file: `top` before the tables, and more lines or tables by name."""
        run = tables.pop("run", "")
        text = top + POD + run + "".join(f"\n[{name}]\n{lines}" for name, lines in tables.items())
        (self.root / "pod.toml").write_text(text)

    def pod(self, command: str, *flags: str, code: int = 0, **env: str) -> str:
        """Run pod.py and return all that it printed, after comparing its exit status."""
        printed = io.StringIO()
        environment = mock.patch.dict(os.environ, self._environment(env), clear=True)
        with environment, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            ended = pod.main(self._arguments(command, flags))
        assert ended == code, printed.getvalue()
        return printed.getvalue()

    def start(self, command: str, *flags: str) -> subprocess.Popen:
        """Run pod.py in a process of its own, which goes on while the test does something else."""
        argv = [sys.executable, str(SCRIPTS / "pod.py"), *self._arguments(command, flags)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(argv, env=self._environment({}), cwd=self.root, **output)

    def _arguments(self, command: str, flags: tuple[str, ...]) -> list[str]:
        return [command, str(self.root / "pod.toml"), *flags, *(["--poll", "0.05"] if command != "cost" else [])]

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        return {"PATH": f"{self.root}/bin:/usr/bin:/bin", "FAKE_CLOUD": str(self.root), **more}

    @property
    def state(self) -> dict:
        return json.loads((self.root / "cloud.json").read_text())

    @state.setter
    def state(self, value: dict) -> None:
        new = self.root / "cloud.json.test"
        new.write_text(json.dumps(value))
        new.replace(self.root / "cloud.json")

    def change(self, **values) -> None:
        self.state = self.state | values

    def calls(self, *words: str) -> list[list[str]]:
        """The calls of the fake programs that hold all of these words, in order."""
        path = self.root / "calls.jsonl"
        made = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in made if all(word in call for word in words)]

    def workers(self) -> list[Path]:
        return sorted((self.root / "workers").iterdir())

    def read(self, worker: Path, name: str) -> str:
        return (worker / name).read_text()

    def received(self, directory: Path) -> list[str]:
        """The arguments with which the run was started there."""
        return (directory / "received").read_text().split("\0")[:-1]

    def program(self, name: str, text: str) -> None:
        """Put a program, or another one in its place, on the PATH of the workers."""
        path = self.root / "worker_bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def end_runs(self, code: int = 0, workers: slice = slice(None)) -> None:
        """Let the runs end with a status."""
        for worker in self.workers()[workers]:
            (worker / "end").write_text(f"{code}\n")

    def close(self) -> None:
        """End what still runs on the machines."""
        for pid in self.root.glob("*/*/jaxrl-post/*/pid"):
            try:
                os.kill(int(pid.read_text()), 9)
            except (ProcessLookupError, ValueError):
                continue
