"""A configuration may name a method that the library does not have."""

import pytest

from jaxrl_post.training import config as configs
from jaxrl_post.training.stages import make_stages

OWN = """
from jaxrl_post import methods

def mine(*, strength: float, clip_high: float = 0.28) -> methods.Method:
    loss = {"name": "ppo", "clip_high": clip_high}
    return methods.policy_gradient(advantage=lambda s: strength * s.reward, loss=loss)

def nothing(**options):
    return None
"""


def make(**method):
    return configs.from_dict(
        {
            "run_dir": "runs/own",
            "data": {"files": ["problems.jsonl"], "max_prompt_length": 4},
            "rewards": [{"name": "exact_match"}],
            "rollout": {"max_new_tokens": 4},
            "method": method,
            "training": {"steps": 1, "optimizer": {"learning_rate": 1e-3}},
        },
        check_files=False,
    )


@pytest.fixture
def path(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "own.py"


def test_a_method_of_a_users_file_is_made_with_its_keywords(path):
    config = make(name=f"{path}:mine", strength=2, clip_high=0.5)
    assert config.method.keywords == {"strength": 2.0, "clip_high": 0.5}
    (stage,) = make_stages(config)
    assert stage.name == "mine"
    assert stage.method.needs == {"policy": frozenset({"logp"})}
    assert configs.from_dict(configs.to_dict(config), check_files=False) == config  # as a resumed run reads it


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "mine", "strength": 1.0}, "there is no such method; known here"),
        ({"name": "none.py:mine"}, "there is no file none.py"),
        ({"name": "own.py:nine"}, "own.py has no 'nine'; did you mean mine"),
        ({"name": "own.py:mine"}, "method.strength: own.py:mine needs this"),
        (
            {"name": "own.py:mine", "strength": 1.0, "clip": 1.0},
            "own.py:mine has no such keyword; did you mean 'method.clip_high'",
        ),
        ({"name": "own.py:nothing"}, "must name a function that returns a Method, got NoneType"),
    ],
)
def test_what_is_wrong_with_a_users_method_is_said(path, method, message):
    with pytest.raises(configs.ConfigError, match=message):
        make(**method)
