"""Imports point one way: a part of the package imports parts on lower lines only."""

import ast
import re
from pathlib import Path

import pytest

import jaxrl_post

ROOT = Path(jaxrl_post.__file__).parent

LINES = (  # the lowest line first; parts on one line do not import each other
    ("types",),
    ("masked",),
    ("mesh",),
    ("kernels",),
    ("advantages", "losses", "sampling", "models", "diffusion", "control"),
    ("rollout", "rewards", "curation", "data"),
    ("methods",),
    ("training",),
    ("planning",),
    ("cli",),
    ("__main__",),
)
LINE = {part: number for number, line in enumerate(LINES) for part in line}
ROOT_NAMES = {"__version__"}  # attributes of the bare package that any part may read


def imported(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Dotted names that a statement or call imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            return [f"{base}.{alias.name}" for alias in node.names]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def violations(root: Path) -> list[str]:
    """One line for every import under `root` that does not point to a lower line."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        part = relative.parts[0]
        if part == "__init__":  # the table of contents, which names every part and imports none until it is used
            continue
        if part not in LINE:
            found.append(f"{relative}: {part} has no line; give it one in DESIGN and in this test")
            continue
        names = [*relative.parts[:-1], *([] if relative.name == "__init__" else [relative.name])]
        module = ".".join([root.name, *names])
        for node in ast.walk(ast.parse(path.read_text())):
            for target in imported(node, module, relative.name == "__init__"):
                package, _, rest = target.partition(".")
                if package != root.name:
                    continue
                other = rest.partition(".")[0]
                where = f"{path.relative_to(root)}:{node.lineno}: {part} imports {target}"
                if other not in LINE and other not in ROOT_NAMES:
                    found.append(f"{where}, which hides what is used; import the part by name")
                elif other in LINE and other != part and LINE[other] >= LINE[part]:
                    found.append(f"{where}, which is not on a lower line")
    return found


def test_every_import_points_to_a_lower_line():
    assert violations(ROOT) == []


def test_the_parts_are_the_ones_that_the_lines_name():
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} <= set(LINE)
    assert {"types", "losses", "models", "rollout", "methods", "training", "cli"} <= parts


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("losses/policy.py", "from jaxrl_post import training", "losses imports jaxrl_post.training, which is not"),
        (
            "losses/policy.py",
            "import jaxrl_post.models.decoder",
            "losses imports jaxrl_post.models.decoder, which is not",
        ),
        ("losses/policy.py", "from jaxrl_post.advantages import grpo", "losses imports jaxrl_post.advantages.grpo"),
        (
            "losses/policy.py",
            "def f():\n    from jaxrl_post import data",
            "policy.py:2: losses imports jaxrl_post.data",
        ),
        ("losses/policy.py", "from .. import rollout", "losses imports jaxrl_post.rollout"),
        ("losses/__init__.py", "from ..methods import grpo", "losses imports jaxrl_post.methods.grpo"),
        ("losses/deep/more.py", "from ...cli import main", "losses imports jaxrl_post.cli.main"),
        ("losses/policy.py", "import jaxrl_post as j", "losses imports jaxrl_post, which hides"),
        ("losses/policy.py", "from jaxrl_post import *", r"losses imports jaxrl_post.\*, which hides"),
        ("losses/policy.py", "import_module('jaxrl_post.cli')", "losses imports jaxrl_post.cli, which is not"),
        ("types.py", "from jaxrl_post import masked", "types imports jaxrl_post.masked, which is not"),
        ("mesh.py", "from jaxrl_post import kernels", "mesh imports jaxrl_post.kernels, which is not"),
        ("helpers/__init__.py", "", "helpers has no line"),
    ],
)
def test_an_import_that_does_not_is_found(tmp_path, path, code, message):
    file = tmp_path / "jaxrl_post" / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    (found,) = violations(tmp_path / "jaxrl_post")
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("losses/policy.py", "from jaxrl_post import masked\nfrom jaxrl_post.types import Array"),
        ("losses/policy.py", "from jaxrl_post.losses import kl\nfrom . import value\nfrom .value import clip"),
        ("losses/__init__.py", "from .policy import ppo\nfrom ..masked import mean\nimport jax"),
        ("masked.py", "from jaxrl_post.types import Array"),
        ("kernels/__init__.py", "from jaxrl_post import masked, mesh"),
        ("cli/main.py", "from jaxrl_post import __version__, training\nimport jaxrl_post.types"),
        ("training/loop.py", "from jaxrl_post_other import cli"),
    ],
)
def test_an_import_that_does_is_allowed(tmp_path, path, code):
    file = tmp_path / "jaxrl_post" / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert violations(tmp_path / "jaxrl_post") == []
