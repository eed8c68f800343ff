"""What a run is planned to compile is what it compiles, and what its model asks for; nothing here is compiled."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import pytest

from jaxrl_post.planning import compiler, programs
from jaxrl_post.training import batches, evaluate, sampler
from jaxrl_post.training import config as configs

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.yaml"))


def planned(*overrides, file=TINY, devices=None):
    config = configs.load(file, overrides, check_files=False)
    return programs.plan(config, jax.devices()[:1] if devices is None else devices)


def test_a_run_whose_data_are_there_is_planned_without_reading_them(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}+1=", "answer": f"#### {i + 1}"}) + "\n" for i in range(9)))
    setup = planned(
        f"data.files=[{rows}]",
        f"data.eval_files=[{rows}]",
        file=ROOT / "configs" / "qwen3-0.6b-grpo.yaml",
        devices=compiler.devices("v5e:1x1"),
    )
    found = programs.programs(setup, ("step", "evaluate"))
    assert [one.name for one in found] == ["step", "evaluate/greedy", "evaluate/sampled"]


class Sampled(Exception):
    """Raised in the place of sampling."""


@pytest.mark.parametrize(("method", "going_on"), [("grpo", False), ("remax", False), ("grpo", True)])
def test_what_is_sampled_in_steps_and_evaluations_is_what_is_planned(monkeypatch, method, going_on):
    asked = []

    def recorded(policy, how):
        class Function:
            def lower(self, params, prompts, key, version):
                asked.append((how, jax.tree.map(lambda x: (x.shape, x.dtype), prompts)))

            def __call__(self, *arguments, **keywords):
                self.lower(*arguments, **keywords)
                raise Sampled

        return Function()

    for module in (programs, sampler):
        monkeypatch.setattr(module, "compiled_generate", recorded)
    over_steps = ("rollout.tokens_per_step=5",) if going_on else ()
    setup = planned(
        f"method={{name: {method}}}", "eval={problems: 40, samples: 3, k: 1}", "rollout.group_size=3", *over_steps
    )
    found = programs.programs(setup, ("rollout", "evaluate"))
    greedy = ["rollout/greedy"] if method == "remax" else []
    assert [one.name for one in found] == ["rollout", *greedy, "evaluate/greedy", "evaluate/sampled"]
    for one in found:
        one.lower()
    plan, asked[:] = list(asked), []
    (stage,) = setup.stages
    steps, evaluator = batches.Batches(setup, stage, batches.Cursor()), evaluate.Evaluator(setup)
    samplers = [*([steps._greedy] if greedy else []), evaluator._greedy, evaluator._sampled]
    with pytest.raises(Sampled):
        steps.next(types.SimpleNamespace(params={"policy": {}}), batches.Cursor())
    for one in samplers:
        with pytest.raises(Sampled):
            one({}, setup.problems.held_out, setup.key)
    assert asked == plan
    assert [shapes.id[0] for *_, shapes in plan[-2:]] == [(12, 1), (4, 3)]  # of 4 prompts and 3 completions a step


def test_a_mesh_for_sampling_costs_a_copy_of_the_parameters_as_they_are_multiplied_with():
    layout = ("mesh.fsdp=8", "rollout.prompts=16", "model.heads=4", "rollout.mesh.fsdp=2", "rollout.mesh.tensor=4")
    setup = planned(*layout, "training.micro_batches=1", devices=jax.devices())
    copy, rollout, step = programs.programs(setup, ("rollout", "step"))
    assert (copy.name, rollout.name) == step.needs == ("rollout/params", "rollout")
    sizes = programs.weight_shapes(jax.eval_shape(setup.policy.init, setup.key))
    matrices = sum(x.size for x in jax.tree.leaves(sizes["layers"]) if x.ndim > 2)
    norms = sum(x.size for x in jax.tree.leaves(sizes) if x.ndim < 3) - 2 * sizes["embedding"].size
    # Two bytes a number, split over all devices; but tables, whose odd vocabulary tensor does not split, over two, and
    # that of the tokens and the norms keep four bytes.
    expected = 2 * matrices / 8 + (2 + 4) * sizes["embedding"].size / 2 + 4 * norms
    assert rollout.arguments["parameters"] == expected
    assert rollout.resident["parameters"] == step.arguments["parameters"]  # which training goes on with
    assert 2 * copy.arguments["parameters"] == step.arguments["parameters"]  # which reads the reference too


def test_a_rollout_reads_a_prompt_once_for_its_group():
    (found,) = programs.programs(planned(), ("rollout",))
    layers, width, mlp, length, new, prompts, group = 2, 256, 512, 128, 128, 4, 4
    vocabulary = planned().tokenizer.vocab_size
    matrices, rows = layers * (4 * width**2 + 3 * width * mlp), prompts * group
    # Of a prompt all but the last token, which each completion reads for itself, to draw its first.
    seen = prompts * sum(range(1, length)) + rows * sum(range(length, length + new))
    logits = rows * new
    tokens = prompts * (length - 1) + rows * new
    assert found.model_flops == 2 * (tokens * matrices + logits * vocabulary * width) + 4 * layers * width * seen


def test_weights_in_few_bits_count_as_the_weights_that_they_stand_for():
    lora = "model.lora={rank: 4, alpha: 8, targets: [q_proj, down_proj]}"
    plain, *quantized = (
        programs.ModelSizes.of(planned(lora, f"model.quantize={kind}")) for kind in ("none", "nf4", "int8")
    )
    assert [dataclasses.astuple(one) for one in quantized] == [dataclasses.astuple(plain)] * 2
