"""Predicts what a Pallas TPU kernel costs, without a TPU, from the compiler's own schedule.

libtpu can dump the final VLIW bundles of every kernel that it compiles. `measure` compiles a program for a chip in a
subprocess (the flags must be set before libtpu loads) and reads them: `bundles` reads, `issue` finds how often each
block is issued, `prediction` adds up. Times reported for real chips were 1.05 (v5p), 1.14 (tpu7x) and 1.33 (v6e) times
such predictions.

    python -m tests.kernels.schedule tests.benchmarks.serial_logsumexp:build --chip v6e --set tokens=8192 --blocks
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tests.kernels.bundles import ScheduleError, read_vmem
from tests.kernels.prediction import CHIPS, Block, Prediction, Work, predict

__all__ = ["CHIPS", "Block", "Prediction", "ScheduleError", "Work", "compare", "measure", "measure_all", "predict"]

_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_(bundles|hlo-static-per-bundle-utilization).*"
)
_BUNDLES = re.compile(r"(?P<prefix>\d+-(?P<kernel>.*))-\d+-final_bundles\.txt")


def read_folder(folder: Path, chip: str, work: Mapping[str, Work] | Work | None = None) -> list[Prediction]:
    """A prediction for every Pallas kernel whose dump lies in a folder."""
    texts = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    vmem = read_vmem(text for name, text in texts.items() if name.endswith("vmem_report.html"))
    predictions = []
    for name, text in texts.items():
        matched = _BUNDLES.fullmatch(name)
        if matched is None or "schedule-analysis" in name:
            continue
        kernel = matched["kernel"]
        beside = {other: content for other, content in texts.items() if other.startswith(matched["prefix"] + "-")}
        call = re.compile(rf"\): %{re.escape(kernel)} = .*tpu_custom_call")
        if not any(call.search(content) for other, content in beside.items() if "schedule-analysis" in other):
            continue  # the program around the kernels
        tables = [content for other, content in beside.items() if "per-bundle-utilization" in other]
        if len(tables) != 1:
            raise ScheduleError(f"expected one table of slot use for {name}, found {len(tables)}")
        own = work.get(_stem(kernel)) if isinstance(work, Mapping) else work
        predictions.append(predict(text, tables[0], chip, kernel, own, vmem.get(kernel)))
    found = {_stem(prediction.kernel) for prediction in predictions}
    missing = set(work) - found if isinstance(work, Mapping) else set()
    if missing or not predictions:
        raise ScheduleError(f"expected kernels {sorted(missing) or ''}, found {sorted(found)} in {sorted(texts)[:8]}")
    return predictions


def _stem(kernel: str) -> str:
    return re.sub(r"\.\d+$", "", kernel)


def _resolve(builder: str) -> Callable:
    module, _, name = builder.partition(":")
    if not name:
        raise ValueError(f"expected 'module:function', got {builder!r}")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def _worker(chip: str, requests: Iterable[tuple[str, Mapping]], folder: Path) -> list[list[Prediction]]:
    """Runs where libtpu was told to dump into `folder`; a sub-folder is left for each request."""
    import jax

    from tests.tpu import one_chip

    jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled is not dumped
    results = []
    for number, (builder, keywords) in enumerate(requests):
        with one_chip(chip):
            function, arguments, work = _resolve(builder)(**keywords)
            for left in folder.glob("*.*"):
                left.unlink()
            jax.jit(function).lower(*arguments).compile()
        own = folder / str(number)
        own.mkdir()
        for path in list(folder.glob("*.*")):
            path.rename(own / path.name)
        results.append(read_folder(own, chip, work))
    return results


def measure_all(
    chip: str, requests: Sequence[tuple[str, Mapping]], *, dump: str | None = None, timeout: float = 900
) -> list[list[Prediction]]:
    """Predictions of several programs on one chip, compiled one after the other in one subprocess.

    Args:
        chip: a name in `CHIPS`.
        requests: of each program, `"module:builder"` and the builder's keywords (JSON). The builder returns the
            function, its arguments as `jax.ShapeDtypeStruct`s, and a `Work`, or one for each kernel by name, or None.
        dump: a folder that keeps the dumps, in `<chip>/<number of the request>`, which is replaced.
        timeout: seconds for all.

    Returns:
        Of each program, a prediction for every Pallas kernel in it.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip is one of {sorted(CHIPS)}, got {chip!r}")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": _FLAGS.format(folder=folder),
        }
        finished = subprocess.run(
            [sys.executable, "-m", "tests.kernels.schedule", "--worker"],
            input=json.dumps({"chip": chip, "requests": list(requests), "folder": folder}),
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        for made in Path(folder).iterdir() if dump else ():
            kept = Path(dump or "") / chip / made.name
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(made, kept) if made.is_dir() else None
    answer = finished.stdout.rpartition("\n=== predictions ===\n")[2]
    if finished.returncode or not answer:
        raise ScheduleError(f"compiling for {chip} failed:\n{finished.stderr[-4000:]}")
    return [[from_json(entry) for entry in program] for program in json.loads(answer)]


def measure(builder: str, chip: str, **keywords) -> list[Prediction]:
    """Predictions of one program: `measure("tests.benchmarks.serial_logsumexp:build", "v6e", tokens=8192)`."""
    return measure_all(chip, [(builder, keywords)])[0]


def from_json(entry: Mapping) -> Prediction:
    """The inverse of `dataclasses.asdict`."""
    return Prediction(**{**entry, "blocks": tuple(Block(**block) for block in entry["blocks"])})


# ---------------------------------------------------------------------------------------------------- the guard


def compare(recorded: Mapping[str, float], found: Mapping[str, float], tolerance: float = 0.05) -> list[str]:
    """What got worse than recorded, one sentence each; empty if nothing did.

    Args:
        recorded: name of a measurement -> its recorded `Prediction.fraction`; higher is better.
        found: the same, now.
        tolerance: part of the recorded fraction that may be lost.

    Returns:
        Sentences on the losses, and on names that are on one side only: a record changes on purpose or not at all.
    """
    complaints = [f"{name}: recorded, but not predicted now" for name in recorded if name not in found]
    complaints += [f"{name}: not recorded, predicted {found[name]:.3f}" for name in found if name not in recorded]
    for name in recorded.keys() & found.keys():
        if not found[name] >= recorded[name] * (1 - tolerance):
            complaints.append(
                f"{name}: {found[name]:.3f} of the MXU floor predicted from the compiler's schedule, "
                f"{recorded[name]:.3f} recorded ({found[name] / recorded[name] - 1:+.1%}, allowed {-tolerance:+.0%})"
            )
    return sorted(complaints)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builder", nargs="?", help="module:function")
    parser.add_argument("--chip", default="v5e,v5p,v6e,tpu7x", help="comma-separated")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="keyword of the builder (JSON)"
    )
    parser.add_argument("--dump", help="keep the dumps in this folder")
    parser.add_argument("--blocks", action="store_true", help="also print where the cycles go")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        request = json.load(sys.stdin)
        answer = _worker(request["chip"], request["requests"], Path(request["folder"]))
        print("\n=== predictions ===\n" + json.dumps([[dataclasses.asdict(p) for p in ps] for ps in answer]))
        return
    keywords = {}
    for pair in options.set:
        name, _, value = pair.partition("=")
        try:
            keywords[name] = json.loads(value)
        except json.JSONDecodeError:
            keywords[name] = value
    for chip in options.chip.split(","):
        for prediction in measure_all(chip, [(options.builder, keywords)], dump=options.dump)[0]:
            print(json.dumps(dataclasses.asdict(prediction)) if options.json else prediction)
            if options.blocks:
                for block in prediction.blocks:
                    if block.count * block.cycles > 0.002 * prediction.cycles:
                        slots = " ".join(f"{name}:{used}" for name, used in block.slots.items() if used)
                        print(
                            f"    {block.start:#7x} +{block.stop - block.start:<6d} x {block.count:<9.0f} "
                            f"{block.count * block.cycles / prediction.cycles:6.1%} depth {block.depth} {slots}"
                        )


if __name__ == "__main__":
    # Under its own name, so that a builder that imports `Work` gets the class that is compared with here.
    importlib.import_module("tests.kernels.schedule")._main()
