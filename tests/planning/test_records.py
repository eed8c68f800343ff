"""Published models fit the slices that the README says, and take no more memory or communication than is recorded.

What grows by more than 5% fails here until the record is renewed on purpose: `python -m tests.planning.records`. The
train steps of two models are compiled on every commit; how they sample, and the other models, every night.
"""

import pytest

from tests.planning import records
from tests.planning.records import CASES, PARTS

MORE = 1.05


def cases():
    for name in records.recorded():
        often = ("step",) if CASES[name].every_commit else ()
        seldom = tuple(part for part in PARTS if part not in often)
        if often:
            yield pytest.param(name, often, id=f"{name}-{'-'.join(often)}")
        yield pytest.param(name, seldom, id=f"{name}-{'-'.join(seldom)}", marks=pytest.mark.nightly)


@pytest.mark.parametrize(("name", "parts"), list(cases()))
def test_a_published_model_fits_and_has_not_grown(name, parts):
    before = records.recorded()[name]["programs"]
    now = records.account(CASES[name], parts)["programs"]
    assert set(now) == {name for name in before if name.split("/")[0] in parts}
    for part, program in now.items():
        assert program["fits"], f"{part} no longer fits: {program}"
        for figure in ("peak_bytes", "collective_bytes"):
            limit = MORE * before[part][figure]
            assert program[figure] <= limit, f"{figure} of {part} grew from {before[part][figure]} to {program[figure]}"


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
            assert program["flops"] > program["model_flops"] or program["model_flops"] == 0, name
        step = record["programs"]["step"]
        # Blocks are run again in the backward pass: a third more, and what attention's tiles compute in vain.
        assert step["flops"] / step["model_flops"] < 1.8, name
