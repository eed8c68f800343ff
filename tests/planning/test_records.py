"""Published models fit the slices that the README says, and take no more memory or communication than is recorded.

What grows by more than 5% fails here until the record is renewed on purpose: `python -m tests.planning.records`.
"""

import pytest

from tests.planning import records
from tests.planning.records import CASES

MORE = 1.05


def cases():
    for case in CASES.values():
        yield pytest.param(case, id=case.name, marks=() if case.every_commit else pytest.mark.nightly)


@pytest.mark.parametrize("case", list(cases()))
def test_a_published_model_fits_and_has_not_grown(case):
    before = records.recorded().get(case.name, {}).get("programs", {})
    assert before, f"nothing is recorded of {case.name}: python -m tests.planning.records {case.name}"
    now = records.account(case, ("step",) if case.every_commit else records.PARTS)["programs"]
    assert set(now) <= set(before)
    for name, program in now.items():
        assert program["fits"], f"{name} no longer fits: {program}"
        for figure in ("peak_bytes", "collective_bytes"):
            limit = MORE * before[name][figure]
            assert program[figure] <= limit, f"{figure} of {name} grew from {before[name][figure]} to {program[figure]}"


def test_the_readme_shows_the_records():
    found = records.recorded()
    assert found
    readme = (records.ROOT / "README.md").read_text()
    assert f"{records.BEGIN}\n{records.table(found)}\n{records.END}" in readme


def test_every_recorded_program_fits_and_computes_what_its_model_asks_for():
    for name, record in records.recorded().items():
        for program in record["programs"].values():
            assert program["fits"], name
            assert program["peak_bytes"] <= record["memory_bytes"]
        step = record["programs"]["step"]
        # Blocks are run again in the backward pass: a third more, and what attention's tiles compute in vain.
        assert 1.0 < step["flops"] / step["model_flops"] < 1.8, name
