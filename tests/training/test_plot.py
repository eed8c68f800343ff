"""Curves and the progress display: what is drawn and printed of the rows of a run."""

import io
import json
import re

import numpy as np
import pytest

from jaxrl_post.training.plot import plot, run_names, running_mean, series
from jaxrl_post.training.progress import Progress


def write_run(directory, rows):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def rows(count):
    random = np.random.default_rng(0)
    result = []
    for step in range(1, count + 1):
        row = {"step": step, "reward": step / count + random.normal() / 10, "entropy": 1 / step, "kl": None}
        row["completions/mean_length"] = 10.0
        if step % 10 == 0:
            row["eval/accuracy"] = step / count
        result.append(row)
    return result


def read_picture(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_one_picture_is_drawn_of_several_runs_and_no_part_of_it_is_left_behind(tmp_path):
    first = write_run(tmp_path / "one", rows(150))
    second = write_run(tmp_path / "two", rows(20))
    path = plot([first, second])
    assert path == first / "comparison.png"  # the run keeps its own
    assert sorted(file.name for file in first.iterdir()) == ["comparison.png", "metrics.jsonl"]
    together = read_picture(path)
    alone = read_picture(plot([first], tmp_path / "alone.png"))
    assert together.shape == alone.shape
    assert np.abs(together - alone).max() > 0.5


def test_runs_are_told_apart_without_colour(tmp_path):
    from matplotlib.colors import to_rgb

    from jaxrl_post.training.plot import _STYLES

    lightness = sorted(np.dot(to_rgb(color), (0.299, 0.587, 0.114)) for color, _, _ in _STYLES)
    assert len({dash for _, dash, _ in _STYLES}) == len({marker for *_, marker in _STYLES}) == len(_STYLES)
    assert min(np.diff(lightness)) > 0.02
    assert lightness[-1] < 0.75  # visible on white paper


def drawn(run_dirs, monkeypatch):
    """The panels of a picture."""
    from matplotlib.figure import Figure

    saved = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: saved.append(self) or real(self, *a, **k))
    plot(run_dirs)
    return saved[0].axes


def test_runs_that_sample_nothing_have_losses_and_margins_in_their_picture(tmp_path, monkeypatch):
    given = [{"step": n, "loss": 1 / n, "rewards/margins": n, "completions/mean_length": 4.0} for n in (1, 2)]
    given[1]["eval/loss"] = 0.75
    panels = drawn([write_run(tmp_path / "run", given)], monkeypatch)
    titles = ["Loss", "Held-out accuracy", "Held-out loss", "Margin of the chosen", "Completion length"]
    assert [axes.get_title() for axes in panels[:5]] == titles
    assert panels[0].lines[0].get_xydata().tolist() == [[1, 1.0], [2, 0.5]]
    assert panels[2].lines[0].get_xydata().tolist() == [[2, 0.75]]


def test_panels_have_titles_units_and_the_points_of_the_run(tmp_path, monkeypatch):
    panels = drawn([write_run(tmp_path / "run", rows(30))], monkeypatch)
    assert [axes.get_ylabel() for axes in panels[:5]] == [
        "mean reward per completion",
        "fraction solved, greedy",
        "nats per token",
        "nats per token",
        "tokens, mean",
    ]
    assert {axes.get_xlabel() for axes in panels[:5]} == {"training step"}
    assert panels[1].lines[0].get_xydata().tolist() == [[10, 10 / 30], [20, 20 / 30], [30, 1.0]]
    assert [text.get_text() for text in panels[2].texts] == ["not logged"]
    assert [text.get_text() for text in panels[5].get_legend().get_texts()] == ["run"]


def test_rows_without_a_number_are_left_out_of_a_series():
    steps, values = series([{"step": 1, "kl": None}, {"step": 2, "kl": 0.5}, {"step": 3}, {"step": 4, "kl": 1}], "kl")
    assert (steps.tolist(), values.tolist()) == ([2, 4], [0.5, 1.0])
    assert series([], "kl")[0].shape == (0,)


def test_a_running_mean_is_centred_and_keeps_the_length():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2.0, 6.0, 3.0]), 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(running_mean(np.full(100, 2.5), 5), 2.5)


def test_runs_are_named_as_shortly_as_tells_them_apart(tmp_path):
    assert run_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert run_names(["x/a/0", "x/b/0"]) == ["a/0", "b/0"]
    assert run_names(["x/a", "x/a"]) == ["x/a (0)", "x/a (1)"]


def test_a_run_that_has_nothing_to_draw_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match="has not logged a step yet"):
        plot([write_run(tmp_path / "empty", [])])
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        plot([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="at least one run"):
        plot([])


@pytest.mark.parametrize("name", ["picture.foo", "picture", "picture."])
def test_a_picture_of_no_known_format_is_refused_before_any_run_is_read(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.pdf, \.svg"):
        plot([tmp_path / "nothing"], tmp_path / name)


@pytest.mark.parametrize("name", ["a.pdf", "a.svg", "a.JPG", "a.jpeg", "a.webp", "a.tif", "a.tiff", "a.eps", "a.ps"])
def test_every_format_that_is_offered_can_be_written(tmp_path, name):
    assert plot([write_run(tmp_path / "run", rows(3))], tmp_path / name).stat().st_size > 1000


def test_no_directory_is_made_for_a_picture(tmp_path):
    run = write_run(tmp_path / "run", rows(3))
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nope; make it first"):
        plot([run], tmp_path / "nope" / "x.png")
    assert not (tmp_path / "nope").exists()


def test_a_picture_that_cannot_be_put_in_its_place_leaves_nothing_behind(tmp_path):
    run = write_run(tmp_path / "run", rows(3))
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OSError, match=r"x\.png"):
        plot([run], tmp_path / "x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.png"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def clock_of(times):
    return iter(times).__next__


def test_without_a_terminal_a_plain_line_comes_every_few_seconds_and_after_the_last_step():
    stream = io.StringIO()
    with Progress(100, True, stream=stream, interval=5.0, clock=clock_of([0.0, 2.0, 6.0, 7.0])) as progress:
        for step, tokens in ((1, 100), (2, 300), (3, 700), (4, 800)):
            progress.update(step, {"reward": step / 10, "num_tokens": tokens, "kl": None}, stage="grpo")
    assert stream.getvalue().splitlines() == [
        "grpo  step 1/100  reward 0.100",
        # 600 tokens and 2 steps in 6 s; 97 steps are left
        "grpo  step 3/100  reward 0.300  tokens/s 100  left 4m 51s",
        # 700 tokens and 3 steps in 7 s; 96 steps are left
        "grpo  step 4/100  reward 0.400  tokens/s 100  left 3m 44s",
    ]


def test_what_a_step_does_not_measure_stays_as_it_was():
    stream = io.StringIO()
    with Progress(9, True, stream=stream, interval=0.0) as progress:
        progress.update(1, {"eval/accuracy": 0.5})
        progress.update(2, {"entropy": 1.0, "eval/accuracy": None})
    assert stream.getvalue().splitlines()[-1].startswith("step 2/9  accuracy 0.500  entropy 1.000")


def test_a_loss_is_shown_where_there_is_no_reward():
    stream = io.StringIO()
    with Progress(9, True, stream=stream, interval=0.0) as progress:
        progress.update(1, {"loss": 0.5, "eval/loss": 0.625, "rewards/margins": 0.25})
        progress.update(2, {"loss": 0.5, "reward": 1.0})
    first, second = stream.getvalue().splitlines()
    assert first == "step 1/9  loss 0.5000  held-out loss 0.6250  margin 0.2500"
    assert second.startswith("step 2/9  reward 1.000  held-out loss 0.6250")


def test_speed_is_measured_anew_in_each_stage_and_the_time_left_in_the_last():
    with Progress(100, True, stream=io.StringIO(), clock=clock_of([0.0, 1.0, 50.0, 52.0])) as progress:
        progress.update(1, {"num_tokens": 5}, stage="warm start", later=50)
        progress.update(2, {"num_tokens": 9}, stage="warm start", later=50, total_steps=52)  # and ends early
        assert progress.speed() == (4.0, None)  # steps of the next stage take another time
        progress.update(3, {}, stage="grpo")
        assert progress.speed() == (None, None)
        progress.update(4, {"num_tokens": 13}, stage="grpo")
        assert progress.speed() == (2.0, 96.0)


def test_completions_are_shown_literally_whatever_markup_or_control_codes_they_hold():
    completion = "[bold red]x[/bold red] [/nonsense] \x1b[2J\nnext"
    for stream in (io.StringIO(), Terminal()):
        with Progress(5, True, stream=stream) as progress:
            progress.completions(3, [{"prompt": "a=", "completion": completion, "reward": 1}, {"reward": None}])
        printed = re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()))
        assert "1.000 'a=' -> '[bold red]x[/bold red] [/nonsense] \\x1b[2J\\nnext'" in printed
        assert "none '' -> ''" in printed
        assert "\x1b[2J" not in stream.getvalue()


def test_on_a_terminal_the_numbers_are_live_and_the_cursor_comes_back_after_an_exception(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()

    def run():
        with Progress(5, True, stream=stream) as progress:
            progress.update(2, {"reward": 0.125, "entropy": 0.5}, stage="grpo")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    text = stream.getvalue()
    assert "0.125" in text
    assert "2/5" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown again after it was hidden


def test_a_disabled_display_prints_messages_on_standard_error_and_nothing_else(capsys):
    stream = Terminal()
    with Progress(5, False, stream=stream) as progress:
        progress.update(1, {"reward": 1.0})
        progress.completions(1, [{"completion": "x"}])
        progress.message("resuming from step 3")
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "resuming from step 3\n")
