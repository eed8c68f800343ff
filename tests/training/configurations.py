"""A small configuration and changes of it, for the tests of what a configuration may say."""

import copy

import pytest

from jaxrl_post.training import config as configs
from jaxrl_post.training.config import ConfigError

MINIMAL = {
    "run_dir": "runs/test",
    "data": {"task": "spell_backward", "max_prompt_length": 11},
    "rewards": [{"name": "task_score"}],
    "rollout": {"max_new_tokens": 12},
    "method": {"name": "grpo", "beta": 0.0},
    "training": {"steps": 10, "optimizer": {"learning_rate": 1e-3}},
}


def make(**changes):
    """MINIMAL with dotted keys changed (`rollout__prompts=8`); the value `...` removes the key."""
    values = copy.deepcopy(MINIMAL)
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return values


def problems_of(**changes):
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(make(**changes))
    return caught.value.problems


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path
