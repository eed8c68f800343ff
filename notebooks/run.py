"""Executes the notebooks, from top to bottom and each in a process of its own.

Without options they run at full size, and what they print and plot is saved in them; a cell with the tag `figure:NAME`
also gives `figures/NAME.png`. With `--check` they run at small size, and nothing is saved.

    python notebooks/run.py
    python notebooks/run.py --check notebooks/01_losses_in_five_minutes.ipynb
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
SIZES = "JAXRL_POST_NOTEBOOKS"
LIMIT = 600
"""Seconds that a cell may take."""


def execute(path: Path, *, small: bool) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run in an empty directory, on this machine's CPU.

    Args:
        path: of the notebook.
        small: whether it is to choose small sizes.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    checkout = os.pathsep.join([str(HERE.parent.resolve()), os.environ.get("PYTHONPATH", "")])  # installed or not
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": checkout,
        SIZES: "small" if small else "full",
    }
    with tempfile.TemporaryDirectory() as scratch:
        client = NotebookClient(
            notebook,
            timeout=LIMIT,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--HistoryManager.enabled=False"],  # the user's own
            resources={"metadata": {"path": scratch}},
        )
        client.execute(env=environment)
    return notebook


def save(notebook: nbformat.NotebookNode, path: Path, figures: Path = FIGURES) -> None:
    """Write a notebook without what changes from machine to machine, and its figures.

    Args:
        notebook: from `execute`.
        path: where to.
        figures: the figures' directory.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        for name in [tag.removeprefix("figure:") for tag in tags if tag.startswith("figure:")]:
            (image,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
            figures.mkdir(exist_ok=True)
            with Image.open(io.BytesIO(base64.b64decode(image))) as picture:
                picture.convert("RGB").quantize(64).save(figures / f"{name}.png", optimize=True)  # half the size
    nbformat.write(notebook, path)


def main() -> None:
    """Execute those notebooks that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="paths of notebooks; all of this directory if none")
    parser.add_argument("--check", action="store_true", help="small sizes, and nothing is saved")
    arguments = parser.parse_args()
    for path in arguments.notebooks or sorted(HERE.glob("*.ipynb")):
        began = time.perf_counter()
        notebook = execute(path, small=arguments.check)
        if not arguments.check:
            save(notebook, path)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
