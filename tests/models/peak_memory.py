"""Prints, as JSON, what reading and writing a checkpoint hold beside the parameters, in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np

from jaxrl_post import models

BIG = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 2048}
BIG |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
TENSOR = 4 * 512 * 2048


@contextlib.contextmanager
def peaks():
    """Most bytes that the host's arrays, and the whole process, held above what they held before."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    found = {}
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free would be used again and not show
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark of resident memory
    before = resident("VmRSS")
    tracemalloc.start()
    yield found
    kept, most = tracemalloc.get_traced_memory()  # on a CPU some of the host's arrays become parameters as they are
    found["arrays"] = most - kept
    tracemalloc.stop()
    found["process"] = resident("VmHWM") - before


def main(directory: Path) -> None:
    """Write a model, read it twice (the first time compiles what is compiled), and write it again."""
    policy = models.from_config(BIG)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(policy.init, jax.random.key(0)))
    size = sum(x.nbytes for x in jax.tree.leaves(zeros))
    models.save_pretrained(directory / "model", zeros, BIG, max_shard_size=20 * TENSOR)
    del zeros
    models.from_pretrained(directory / "model")
    reading = least(lambda: models.from_pretrained(directory / "model"))
    found = models.from_pretrained(directory / "model")
    writing = least(lambda: models.save_pretrained(directory / "again", found.params, BIG, overwrite=True))
    print(json.dumps({"size": size, "reading": reading, "writing": writing}))


def least(action):
    """The least peaks of three times: what else happens in a process adds to them, now more and now less."""
    every = []
    for _ in range(3):
        with peaks() as found:
            result = action()
        del result
        every.append(found)
    return {name: min(peak[name] for peak in every) for name in found}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
