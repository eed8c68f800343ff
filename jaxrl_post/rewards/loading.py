"""A user's own function, named in a config.

Loading runs the user's code in this process; what the function does with model output is its author's responsibility.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load(spec: str) -> Callable[..., Any]:
    """The function that `"module:function"` or `"path/file.py:function"` names.

    Args:
        spec: a module that Python can import, or a file, relative to the working directory; after the last colon a name
            in it, which may be dotted.

    Returns:
        The function.

    Raises:
        ValueError: if there is no such file, module or name, if running it fails, or if what it names is not callable.

    Example:
        >>> load("math:sqrt")(9.0)
        3.0
    """
    location, colon, name = spec.rpartition(":")
    if not colon or not location or not name:
        raise ValueError(f"a function is named 'module:function' or 'path/file.py:function', got {spec!r}")
    module = _run_file(Path(location)) if location.endswith(".py") else _import(location)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(module) if not key.startswith("_")]
            near = difflib.get_close_matches(part, public, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(sorted(public)) or 'nothing'}"
            raise ValueError(f"{location} has no {name!r}; {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{spec!r} must name a function, got {type(found).__name__} {found!r}")
    return found


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"there is no module {name!r} to import; install it, put its folder on PYTHONPATH, or name the file "
                f"itself: 'path/{name.rpartition('.')[2]}.py:function'"
            ) from error
        raise ValueError(f"importing {name!r} failed: {error}; install what it imports") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"importing {name!r} failed with {type(error).__name__}: {error}") from error


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path} (looked for it at {path.resolve()})")
    # The name is made from the path, so that two files of one name do not take each other's place.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"_jaxrl_post_user_{path.stem}_{digest}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(f"running {path} failed with {type(error).__name__}: {error}") from error
    return module
