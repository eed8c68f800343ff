"""Problems from the data sets of environments that other systems define. How these environments act is not known."""

from __future__ import annotations

import json
from typing import Any

from jaxrl_post.data.problems import Problem
from jaxrl_post.data.schemas import to_problem


def verifiers_problems(env: Any, *, split: str = "train") -> list[Problem]:
    """The data set of an environment of `verifiers` as problems; the package itself is not needed.

    Args:
        env: has `get_dataset()` and `get_eval_dataset()`, whose rows have a `prompt`: messages or text.
        split: `"train"`, or `"eval"` for the environment's own evaluation data.

    Returns:
        A problem for each row: every column as it stands (the answer too, whatever its type, for the rubric compares
        it), with `prompt` as text, `prompt_messages` and `prompt_id`. An `info` that is JSON is parsed.

    Raises:
        ValueError: for another split, an environment without such data, or a row that cannot be read.

    Example:
        >>> from types import SimpleNamespace
        >>> turn = {"role": "user", "content": "1+1?"}
        >>> rows = [{"prompt": [turn], "answer": 2, "info": '{"digits": 1}'}]
        >>> (problem,) = verifiers_problems(SimpleNamespace(get_dataset=lambda: rows))
        >>> problem["prompt"], problem["prompt_messages"], problem["answer"], problem["info"], problem["prompt_id"]
        ('1+1?', [{'role': 'user', 'content': '1+1?'}], 2, {'digits': 1}, 0)

    Reference: verifiers, verifiers/envs/environment.py.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    name = "get_dataset" if split == "train" else "get_eval_dataset"
    if not hasattr(env, name):
        raise ValueError(f"{type(env).__name__} has no {name}(); those of verifiers 0.1.14 to 0.3 have one")
    rows = getattr(env, name)()
    if split == "eval" and getattr(env, "eval_dataset", rows) is None:  # it has given its training data instead
        raise ValueError("the environment has no evaluation data; hold problems out of split='train' by data.held_out")
    problems = []
    for number, row in enumerate(rows):
        try:
            problem = to_problem(row, "prompt")
            if isinstance(row.get("info"), str):
                problem["info"] = json.loads(row["info"])
        except ValueError as error:
            raise ValueError(f"row {number} of the environment's data: {error}") from error
        if row.get("answer") is not None:
            problem["answer"] = row["answer"]
        problems.append({**problem, "prompt_id": number})
    return problems
