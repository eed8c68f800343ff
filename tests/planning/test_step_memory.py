"""What a whole train step needs of one chip's memory, by the compiler's own account."""

from pathlib import Path

import pytest

from jaxrl_post.planning import chips, plans
from jaxrl_post.planning.chips import GIB
from jaxrl_post.training import config as configs

CONFIG = Path(__file__).parents[2] / "configs" / "qwen3-0.6b-grpo.yaml"
EIGHT_ROWS_OF_2048 = (
    "data.max_prompt_length=512",
    "rollout.max_new_tokens=1536",
    "rollout.prompts=1",
    "rollout.group_size=8",
    "training.micro_batches=1",
)


@pytest.mark.nightly
def test_eight_rows_of_2048_tokens_train_qwen3_with_wide_parameters_in_less_than_nine_gib():
    config = configs.load(CONFIG, EIGHT_ROWS_OF_2048, check_files=False)
    (step,) = plans.compile_run(config, chips.topology("v5e:1x1"), ("step",))
    assert step.peak is not None
    assert step.peak < 8.95 * GIB  # 6.66 of it are parameters and the optimiser's state
