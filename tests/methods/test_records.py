"""The catalog tells the truth: its functions, configurations and claim checks are there, and the README shows it."""

import importlib
import re
from pathlib import Path

import pytest

from jaxrl_post import methods
from jaxrl_post.methods import records
from jaxrl_post.training.config.methods_check import method_functions

ROOT = Path(__file__).parents[2]
RECORDS = methods.catalog()


def test_ids_are_unique_and_written_as_configurations_are():
    ids = [record.id for record in RECORDS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) for name in ids)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_a_records_functions_are_public_and_documented_and_its_files_are_there(record):
    assert record.functions
    for name in record.functions:
        module, _, attribute = name.rpartition(".")
        home = importlib.import_module(module)
        assert attribute in home.__all__, f"{name} is not public"
        assert getattr(home, attribute).__doc__, name
    assert record.summary
    assert record.config is None or (ROOT / record.config).is_file()
    assert record.claim is not None
    path, _, test = record.claim.partition("::")
    assert f"def {test}(" in (ROOT / path).read_text(), record.claim
    result = record.claim_result
    assert result is not None
    assert result["interval"][0] <= result["interval"][1]
    assert result["seeds"] >= 2 or result["interval"][0] == result["interval"][1]


def test_every_method_of_reinforcement_stands_in_the_catalog():
    named = {record.method for record in RECORDS}
    named |= {name.rpartition(".")[2] for record in RECORDS for name in record.functions}
    missing = set(method_functions()) - named - {"sft", "policy_gradient", "orpo", "cpo", "kto"}
    assert not missing


def test_what_is_written_is_read_back():
    import yaml

    rows = [{k: v for k, v in vars(record).items() if v is not None} for record in RECORDS]
    rows = [{**row, "functions": list(row["functions"])} for row in rows]
    assert yaml.safe_load(records.to_yaml(rows)) == [
        {name: value for name, value in row.items() if value not in ("", [])} for row in rows
    ]


def test_the_readmes_table_is_the_catalogs():
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- methods -->\n(.*?)\n<!-- /methods -->", text, re.DOTALL)
    assert shown is not None
    assert shown[1] == records.table(), "python -m tests.claims.record --readme writes it anew"
