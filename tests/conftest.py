"""Eight simulated CPU devices and one compilation cache for all tests."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# For libtpu, which compiles here for TPUs that are not here: no search for one, and several processes at once.
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Programs are small: to cut one into pieces that are compiled side by side costs more than it gains.
_ONE_PIECE, _OLD_EMITTERS = "--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_use_fusion_emitters=false"
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    _flags += " --xla_force_host_platform_device_count=8"
# Compilation is most of these tests' time, and their shapes are small: without what the CPU backend does to make
# programs fast it takes half. The nightly run has it on.
if "xla_backend_optimization_level" not in _flags:
    _flags += f" --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true {_ONE_PIECE}"
    if int(version("jax").split(".")[1]) < 11:  # later ones do not know it, and end the process
        _flags += f" {_OLD_EMITTERS}"
XLA_FLAGS = _flags.strip()  # for child processes whose programs are to have the same bits
os.environ["XLA_FLAGS"] = XLA_FLAGS

import jax  # noqa: E402
import pytest  # noqa: E402

jax.devices()  # reads the flags
# Nor does libtpu know what is for the CPU alone.
os.environ["XLA_FLAGS"] = XLA_FLAGS.replace(_ONE_PIECE, "").replace(_OLD_EMITTERS, "").strip()

# Traced programs are many objects and little garbage, in which Python would look for cycles a twentieth of the time.
gc.set_threshold(50_000, 5, 5)

# Subprocesses of tests inherit the directory through the environment.
_CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxrl_post_jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="module", autouse=True)
def few_programs_at_a_time():
    """Lets compiled programs go: each takes three mappings of memory, and a process without more of them crashes."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_text().splitlines()) > 30_000:  # Linux allows 65,530
        jax.clear_caches()
        gc.collect()
