"""The benchmark of the train step runs, and a step after the first compiles nothing; how fast is not asked here."""

import sys

import pytest

from tests.benchmarks.train_step import run


@pytest.mark.nightly
def test_steps_after_the_first_compile_nothing_and_a_system_that_is_not_there_is_named(capsys):
    records = run(2, {"ours": sys.executable, "tunix": sys.executable})
    assert [record["system"] for record in records] == ["ours"]
    assert records[0]["compilations_after_the_first_step"] == 0
    assert records[0]["ratio"] == {"seconds": 1.0, "generation": 1.0, "rest": 1.0}
    assert 0 < records[0]["generation"] < records[0]["seconds"] < records[0]["first_step"]
    assert "tunix is left out" in capsys.readouterr().out
