"""Fixes the platform before JAX starts, shares one compilation cache, and gates slow tests."""

import gc
import os
import pathlib
import resource
import tempfile

PAGE = resource.getpagesize()
CACHE = pathlib.Path(tempfile.gettempdir()) / f"sage_grpo_jax_test_cache_{os.getuid()}"
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little. Without the optimiser a third of the compile time goes, and
# with the older of XLA's two code generators half of the rest; the quick start has the defaults.
QUICK_COMPILE = (
    "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        QUICK_COMPILE,
    ]
).strip()
# Subprocess tests inherit these, so that a program compiles once for the whole suite; a small one
# too: there are thousands, writing one costs next to nothing, and reading a fraction of compiling.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest  # noqa: E402

# The fixtures of the tiny recipe, which every room above the models uses.
pytest_plugins = ["tiny_recipe"]


# Compiled programs stay in memory; above this much of it a worker lets go of them between files.
MAX_RESIDENT_BYTES = 3 << 30


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Keeps a worker from collecting the programs of the whole suite (10 GB)."""
    yield
    statm = pathlib.Path("/proc/self/statm")  # Linux
    if statm.exists() and int(statm.read_text().split()[1]) * PAGE > MAX_RESIDENT_BYTES:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_collection_finish() -> None:
    """Lets the garbage collector look at what tests make, less often, and at no imported module.

    Tracing makes millions of objects; looking through all of them is a sixth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


# The longest first, so that no worker is left alone with them at the end.
LONGEST = (
    "loop_test",
    "learner_test",
    "tpu_compile_test",
    "whole_update_test",
    "direction_test",
    "vae_test",
    "run_test",
    "entries_test",
    "doors_test",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="needs --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
