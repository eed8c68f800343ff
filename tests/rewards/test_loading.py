"""A user's function by module or by file."""

import pytest

from jaxrl_post.rewards import load


def test_a_function_is_loaded_from_a_module():
    import os.path

    assert load("os.path:basename") is os.path.basename
    assert load("collections:OrderedDict.fromkeys")("a") == {"a": None}


def test_files_of_one_name_do_not_take_each_others_place(tmp_path, monkeypatch):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"import dataclasses\n\n@dataclasses.dataclass\nclass R:\n    x: int = {value}\n\n"
            "def reward(completions):\n    return [R().x for _ in completions]\n"
        )
    monkeypatch.chdir(tmp_path)
    first, second = load("a/mine.py:reward"), load(f"{tmp_path}/b/mine.py:reward")
    assert (first(["x"]), second(["x", "y"])) == ([1], [2, 2])


@pytest.mark.parametrize("spec", ["mine.py", "mine:", ":reward", ""])
def test_a_spec_without_both_halves_is_explained(spec):
    with pytest.raises(ValueError, match=r"'module:function' or 'path/file.py:function'"):
        load(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_module_here:f",
            r"no module 'no_such_module_here'.*PYTHONPATH.*'path/no_such_module_here.py:function'",
        ),
        ("os.no_such_part:f", "no module 'os.no_such_part'"),
        ("nowhere/mine.py:f", r"no file nowhere/mine.py \(looked for it at /"),
        ("math:sqart", "math has no 'sqart'; did you mean sqrt"),
        ("math:pi", "must name a function, got float"),
    ],
)
def test_what_is_not_there_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        load(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "failed with SyntaxError"),
        ("1 / 0\n", "failed with ZeroDivisionError"),
        ("import no_such_module_here\n", "failed with ModuleNotFoundError.*no_such_module_here"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_with_the_reason(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=rf"broken.py {message}"):
        load(f"{tmp_path / 'broken.py'}:f")


def test_a_module_that_lacks_something_it_imports_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"importing 'needs_more' failed: No module named 'no_such_module_here'"):
        load("needs_more:f")


def test_a_file_that_exits_is_an_error_and_does_not_end_the_process(tmp_path):
    path = tmp_path / "leaves.py"
    path.write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError, match="SystemExit"):
        load(f"{path}:reward")
