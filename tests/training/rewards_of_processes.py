"""A reward that writes down what each process scores, and at a given call ends the process in a given way.

`REWARD_LOG` is a directory; `REWARD_SIGNAL` is `<process>:<call>:<signal>`.
"""

import json
import os
import signal
from pathlib import Path

import jax

from tests.training import runs

calls = []


def reward(completions, answer, prompt_id):
    me = jax.process_index()
    calls.append(len(completions))
    if directory := os.environ.get("REWARD_LOG"):
        with (Path(directory) / f"scored{me}.jsonl").open("a") as file:
            file.write(json.dumps(sorted(set(prompt_id))) + "\n")
    if given := os.environ.get("REWARD_SIGNAL"):
        process, call, number = map(int, given.split(":"))
        if process == me and call == len(calls):
            os.kill(os.getpid(), signal.Signals(number))
    return runs.reward(completions, answer)
