"""`jaxrl-post compile`: the programs of a run through the TPU's own compiler, on a machine that has none."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable

from jaxrl_post.cli import CommandError

PARTS = ("rollout", "score", "step", "evaluate")
"""As in `planning.programs`, which is imported late."""
TRIES = 4

DESCRIPTION = """\
Compile the programs of a run (sampling, scoring, the train step, sampling of held-out problems) for a slice of TPUs,
from the shapes of its configuration alone: no TPU, no weights and no data are needed. Says what each device's memory
holds and whether it fits, what is computed, read and sent, and how long a step takes by the chip's peak rates and by
the compiler's own estimate.
"""


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Declare the arguments of the command."""
    parser.description = DESCRIPTION
    parser.add_argument("config", metavar="CONFIG", help="YAML file, as for train")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. mesh.fsdp=64 training.micro_batches=8"
    )
    parser.add_argument("--topology", required=True, metavar="NAME", help="a slice, e.g. v5e:1x1, v5p:4x4x4 or v6e:2x4")
    parser.add_argument("--slices", type=count, default=1, metavar="N", help="slices of that shape (1)")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=PARTS,
        help=f"one of {', '.join(PARTS)}; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--suggest", action="store_true", help="try meshes and micro-batches, and rank those whose programs fit"
    )
    parser.add_argument("--tries", type=count, metavar="N", help=f"most layouts that --suggest compiles ({TRIES})")
    parser.add_argument(
        "--save",
        metavar="DIR",
        help="write the compiled programs, for train --executables DIR on such devices",
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that would be passed over.

    Raises:
        CommandError: names them.
    """
    if not arguments.suggest:
        if arguments.tries is not None:
            raise CommandError("--tries is for --suggest; leave it out, or pass --suggest too")
        return
    keys = [text.partition("=")[0].strip() for text in arguments.overrides]
    chosen = ("mesh", "rollout.mesh", "training.micro_batches")
    given = [key for key in keys if any(key == name or key.startswith(f"{name}.") for name in chosen)]
    given += [f"--{name}" for name in ("only", "save") if getattr(arguments, name)]
    if given:
        raise CommandError(
            f"--suggest chooses the meshes and micro-batches itself, and compiles what a step needs; leave out "
            f"{', '.join(given)}"
        )


def run(arguments: argparse.Namespace) -> None:
    """Compile and print.

    Raises:
        CommandError: for options that make no sense together.
        ValueError: for a configuration or a topology that cannot be.
        ImportError: if the compiler is not installed.
    """
    _check(arguments)
    from jaxrl_post.planning import compiler

    compiler.prepare()
    from jaxrl_post.planning import chips, plans, summary
    from jaxrl_post.training import config as configs
    from jaxrl_post.training import executables

    topology = chips.topology(arguments.topology, arguments.slices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", configs.ConfigWarning)  # train says them
        config = configs.load(arguments.config, arguments.overrides, check_files=False)
    parts = tuple(arguments.only or plans.PARTS)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if arguments.suggest:
        ranked = plans.suggest(config, topology, tries=arguments.tries or TRIES, say=say)
        if arguments.json:
            print(
                json.dumps(
                    {"topology": topology.name, "slices": topology.slices, "layouts": [one.as_json() for one in ranked]}
                )
            )
        else:
            print(plans.describe(ranked))
        return
    compiled = plans.compile_run(config, topology, parts, say=say)
    mesh = plans.mesh_sizes(config)
    if arguments.save:
        for one in compiled:
            if one.executable is not None:
                program = one.program
                of = program.configuration
                say(f"wrote {executables.save(one.executable, arguments.save, program.name, configuration=of)}")
    print(
        json.dumps(summary.as_json(compiled, topology, mesh))
        if arguments.json
        else summary.table(compiled, topology, mesh)
    )
