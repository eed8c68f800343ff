"""Runs the claim checks and writes what they measured into the catalog and its table into the README.

`python -m tests.claims.record [ID ...]`, or with `--readme` the table alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from jaxrl_post.methods import records

README = Path(__file__).parents[2] / "README.md"
CATALOG = Path(records.__file__).parent / "catalog.yaml"


def main(wanted: list[str]) -> int:
    """Run the checks of all rows, or of those named, and write their results."""
    if wanted == ["--readme"]:
        write_readme()
        return 0
    rows = yaml.safe_load(CATALOG.read_text())
    chosen = [row for row in rows if row.get("claim") and (not wanted or row["id"] in wanted)]
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as file:
        environment = {**os.environ, "CLAIM_RESULTS": file.name, "JAX_PLATFORMS": "cpu"}
        claims = sorted({row["claim"] for row in chosen})
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", *claims]  # with those of the night
        status = subprocess.run(command, env=environment, check=False).returncode
        results = {}
        for line in file:
            result = json.loads(line)
            results[result.pop("id")] = result
    for row in chosen:
        if row["id"] in results:
            row["claim_result"] = results[row["id"]]
    CATALOG.write_text(records.to_yaml(rows))
    records.catalog.cache_clear()
    write_readme()
    return status


def write_readme() -> None:
    """Put the catalog's table between the README's marks."""
    before, rest = README.read_text().split("<!-- methods -->\n")
    _, after = rest.split("\n<!-- /methods -->")
    README.write_text(f"{before}<!-- methods -->\n{records.table()}\n<!-- /methods -->{after}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
