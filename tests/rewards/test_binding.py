"""Keywords of rewards that are given once."""

import asyncio
import dataclasses
import inspect

import pytest

from jaxrl_post import rewards
from jaxrl_post.training import config as configs
from jaxrl_post.training.config import ConfigError
from jaxrl_post.training.reward_setup import make_rewards
from tests.training import runs


def starts(prompts, completions, answer, *, word, bonus=0.0):
    del prompts, answer
    return [float(text.startswith(word)) + bonus for text in completions]


async def starts_later(prompts, completions, *, word):
    await asyncio.sleep(0)
    return [float(text.startswith(word)) for text in completions]


def test_a_bound_keyword_is_no_column_any_more():
    bound = rewards.with_options(starts, {"word": "So"})
    assert list(inspect.signature(bound).parameters) == ["prompts", "completions", "answer", "bonus"]
    function = rewards.RewardFunction("starts", bound, 1.0)
    columns = {"answer": ["", ""], "word": ["It", "It"]}
    scored = rewards.score([function], ["", ""], ["So it is", "It is so"], columns)
    assert scored.total.tolist() == [1.0, 0.0]
    rewards.check_columns([function], ["answer"])
    assert rewards.with_options(starts, {}) is starts
    with pytest.raises(ValueError, match=r"takes no words; it takes prompts, .*word"):
        rewards.with_options(starts, {"words": "So"})


def test_a_coroutine_stays_one_and_a_threshold_may_follow():
    bound = rewards.thresholded(rewards.with_options(starts_later, {"word": "So"}), 0.5)
    function = rewards.RewardFunction("starts", bound, 1.0)
    assert rewards.score([function], ["", ""], ["So it is", "It is so"], {}).total.tolist() == [1.0, 0.0]


def made(tmp_path, **reward):
    path = runs.tiny_run(tmp_path)
    config = configs.load(path)
    config = dataclasses.replace(config, rewards=(configs.RewardConfig(**reward),))
    (function,) = make_rewards(config, lambda: pytest.fail("no reward needs the task"))
    return function.function


def test_a_configuration_gives_options_to_rewards_of_the_library_and_of_ones_own(tmp_path):
    vote = made(tmp_path / "a", name="agreement", options={"vote": "majority", "pattern": "<a>(.*?)</a>"})
    assert vote(["?"] * 3, ["<a>1</a>", "<a>1</a>", "1"]) == [1.0, 1.0, 0.0]
    file = tmp_path / "own.py"
    file.write_text("def starts(completions, *, word):\n    return [float(c.startswith(word)) for c in completions]\n")
    own = made(tmp_path / "b", path=f"{file}:starts", options={"word": "So"})
    assert own(completions=["So", "It"]) == [1.0, 0.0]
    with pytest.raises(ConfigError, match=r"rewards.0.options: the function takes no wort"):
        made(tmp_path / "c", path=f"{file}:starts", options={"wort": "So"})


def test_a_judge_may_compare_with_an_anchor(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def longer(first, second):\n    return [float(len(a) > len(b)) for a, b in zip(first, second)]\n")
    reward = made(tmp_path / "a", path=f"{file}:longer", adapter="judge", options={"against": "anchor"})
    assert reward(["?", "!"], ["a", "abc"], anchor=["ab", "ab"]) == [0.0, 1.0]
