"""Numbers of TRL and verl, made by running their released code: writes `inputs`, `trl`, `trl_pairs` and `verl` here.

The environment, apart from the library's own (Python 3.11; the CPU build of torch is enough):

    python3.11 -m venv parity && . parity/bin/activate
    pip install torch==2.13.0 trl==1.16.0 transformers==5.10.4 tensordict==0.10.0
    pip install omegaconf==2.4.0 pandas codetiming pillow
    pip install --no-deps verl==0.9.1
    python tests/methods/peer_fixtures/make_fixtures.py

What is not the released code, and why:

- verl imports Ray, for its remote workers, when any of it is imported. Ray takes no part in the numbers; it is an empty
  shell here (`STUBS`).
- TRL's numbers are inside trainer methods. They run unchanged on a stand-in object (`trainer`), which holds the
  attributes that the method reads and answers its three questions to the outside: the completions, the rewards of the
  reward functions, and the log-probs of a model. No trainer is constructed and no model is run.
- verl's `ppo_loss` unpacks nested tensors first; here the tensors are padded already (`no_padding_2_padding` is the
  identity).

Left out: verl's `grpo_vectorized` and `gdpo` with several rewards, which compute in float32 whatever they are given
(`gdpo` with one reward is here); Clip-Cov with a random subset (here its share is 1, so that every candidate is
chosen); whatever samples, generates or talks to an inference engine.

Inputs (float64, numpy's default generator, one seed a case): `P` groups of `G` rows of `T` tokens, rows prompt-major,
without prompts. Masks are ragged and have holes (tool tokens); in case 1 a row is wholly masked. Group 0 has rewards of
no special kind, group 1 equal ones, group 2 rewards 0 and 1; of the last group only the first row is valid (`valid`),
which makes it a group of one; functions that make no sense there, and the whole losses (`actor`, `whole`), go
without that group or with all of its rows. Log-probs: `logp` of the trained policy, `old` at the start of the step
(stale; some tokens far off), `sampler` of the sampling engine, `ref` of a reference.

Keys are `case/what/variant/part`: `0/mask` (inputs), `0/advantage/grpo`, `0/loss/gspo/value`, `0/loss/gspo/grad` (with
respect to `logp`). Rows that are not valid are not handed to verl, and are zero in what is stored; to TRL they are
handed with rewards of NaN, which is how a reward function says that it could not score. The tables in
`of_verl` and `of_trl` say which options a variant has.
"""

import importlib.machinery
import math
import sys
import types
import typing
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

STUBS = ("ray",)


class _Shell(types.ModuleType):
    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUBS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Shell(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())  # last: what is installed is used

import of_trl  # noqa: E402
import of_trl_pairs  # noqa: E402
import of_verl  # noqa: E402
import torch  # noqa: E402
from drawn import SEEDS, inputs  # noqa: E402

torch.set_default_dtype(torch.float64)

HERE = Path(__file__).parent


def save(name, version, found):
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, version=np.array(version), **found)
    print(path.name, version, len(found), "arrays", math.ceil(path.stat().st_size / 1024), "KiB")


if __name__ == "__main__":
    from importlib.metadata import version

    save("inputs", "", {f"{seed}/{name}": array for seed in SEEDS for name, array in inputs(seed).items()})
    for name, system, run in (
        ("verl", "verl", of_verl.run),
        ("trl", "trl", of_trl.run),
        ("trl_pairs", "trl", of_trl_pairs.run),
    ):
        save(name, version(system), run())
