"""The notebooks run from top to bottom, show what they say, and use what is public."""

import ast
import importlib
import importlib.util
from pathlib import Path

import nbformat
import pytest

import jaxrl_post
from tests.conftest import XLA_FLAGS

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))

_spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
assert _spec is not None
assert _spec.loader is not None
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@each
def test_a_notebook_runs_at_small_size(path, monkeypatch):
    if path.stem != "05_from_one_chip_to_a_pod":  # whose compiler is that of TPUs, which does not know them all
        monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)
    run.execute(path, small=True)


@pytest.mark.nightly
@each
def test_a_notebook_runs_at_full_size(path):
    run.execute(path, small=False)


@each
def test_a_saved_notebook_shows_one_run_from_top_to_bottom_without_complaints(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 300_000


@each
def test_a_notebook_uses_only_what_is_public(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = list(ast.walk(ast.parse("\n".join(cells))))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    ours = {node.module: {alias.name for alias in node.names} for node in imports if "jaxrl_post" in str(node.module)}
    assert set(ours) <= {"jaxrl_post", "jaxrl_post.types"}
    assert ours["jaxrl_post"] <= set(jaxrl_post.__all__)
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours["jaxrl_post"]:
            module = getattr(jaxrl_post, node.value.id)
            assert node.attr in getattr(module, "__all__", vars(module)), f"{node.value.id}.{node.attr}"
            assert not node.attr.startswith("_")


def test_each_figure_is_of_a_tagged_cell_and_small():
    tags = [
        tag.removeprefix("figure:")
        for path in PATHS
        for cell in nbformat.read(path, as_version=4).cells
        for tag in cell.metadata.get("tags", [])
    ]
    assert sorted(tags) == sorted(path.stem for path in (FOLDER / "figures").iterdir())
    assert all(path.stat().st_size < 60_000 for path in (FOLDER / "figures").iterdir())
