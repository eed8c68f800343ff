"""What `import jaxrl_post` costs, and what must be installed for which part."""

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest

import jaxrl_post

OPTIONAL = (
    "transformers",
    "reasoning_gym",
    "matplotlib",
    "orbax",
    "grain",
    "rich",
    "tensorboardX",
    "wandb",
    "flax",
    "pyarrow",
    "jinja2",
    "math_verify",
)


def python(code: str) -> object:
    """What a fresh interpreter prints as JSON on its last line."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def block(*names: str) -> str:
    return f"import sys\nfor name in {list(names)}: sys.modules[name] = None\n"


LOADED = "import sys, json\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def test_importing_the_package_imports_no_other():
    loaded = set(python(f"import jaxrl_post\n{LOADED}"))
    assert "jaxrl_post" in loaded
    assert not loaded & {*OPTIONAL, "jax", "numpy", "optax", "chex", "yaml", "tensorstore"}


def test_parts_import_the_heavy_packages_only_when_they_need_them():
    names = [name for name in jaxrl_post.__all__ if name != "training"]
    loaded = set(python(f"import jaxrl_post\nfor name in {names}: getattr(jaxrl_post, name)\n{LOADED}"))
    # Flax is what models are made of, and it imports rich, orbax or tensorstore as it likes.
    assert not loaded & {"transformers", "reasoning_gym", "matplotlib", "grain", "tensorboardX", "wandb"}


def test_advantages_losses_and_kernels_need_jax_chex_and_numpy_only():
    blocked = [name for name in third_party() if name not in REQUIRED]
    assert {"flax", "optax", "yaml", "transformers"} <= set(blocked)
    code = f"""{block(*blocked)}
import json, jax.numpy as jnp
from jaxrl_post import advantages, kernels, losses, masked, mesh, sampling, types
a = advantages.per_token(advantages.grpo(jnp.array([[1.0, 0.0]])), jnp.ones((2, 1)))
value = losses.ppo(jnp.zeros((2, 1)), jnp.zeros((2, 1)), a)
print(json.dumps(float(losses.aggregate(value, jnp.ones((2, 1)), "token_mean"))))
"""
    assert abs(python(code)) < 1e-6


REQUIRED = {"jax", "jaxlib", "chex", "numpy", "scipy", "ml_dtypes", "opt_einsum", "absl", "toolz", "typing_extensions"}


def third_party() -> list[str]:
    """Top-level modules of the packages that jaxrl-post depends on, and of those it may use."""
    return [*OPTIONAL, "optax", "yaml", "tensorstore", "torch", "tensorflow", "sympy", "pandas"]


def test_without_optional_packages_all_but_the_task_source_works(tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "1+1=", "answer": "2"}\n')
    code = f"""{block("reasoning_gym", "transformers", "matplotlib", "grain", "tensorboardX", "wandb")}
import json, jaxrl_post
for name in jaxrl_post.__all__:
    part = getattr(jaxrl_post, name)
    for public in getattr(part, "__all__", ()):
        getattr(part, public)
import jaxrl_post.cli.main
from jaxrl_post import data
source = data.JsonlSource({str(problems)!r}, prompt='{{question}}')
try:
    data.ReasoningGymSource("chain_sum", seed=0, size=4)
except ImportError as error:
    print(json.dumps([len(source), data.CharTokenizer("12").encode("1"), str(error)]))
"""
    count, ids, message = python(code)
    assert count == 1
    assert len(ids) == 1
    assert message == "task 'chain_sum' needs reasoning-gym: pip install \"jaxrl-post[tasks]\""


@pytest.mark.parametrize("part", jaxrl_post.__all__)
def test_every_public_name_exists(part):
    module = getattr(jaxrl_post, part)
    assert module is importlib.import_module(f"jaxrl_post.{part}")
    public = getattr(module, "__all__", [])
    assert public or part in ("mesh", "types"), f"{part} does not say what is public"
    assert len(set(public)) == len(public)
    for name in public:
        assert getattr(module, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxrl_post' has no attribute 'loses'"):
        _ = jaxrl_post.loses
    assert set(jaxrl_post.__all__) <= set(dir(jaxrl_post))


def test_the_version_is_that_of_the_installed_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxrl_post.__version__)
    try:
        installed = importlib.metadata.version("jaxrl-post")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert jaxrl_post.__version__ == installed
