"""What every test shares: CPU, full warm-ups, and executables kept for the session."""

import os

from quick_xla import EIGHT_DEVICES, QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices, for meshes. Tests wait for compilations more than for anything else.
os.environ.setdefault("XLA_FLAGS", f"{QUICK} {EIGHT_DEVICES}")

# A test of the engine is one of all its programs, unless it says otherwise; and there is no second process beside it.
os.environ.setdefault("QWEN_JAX_WARMUP", "full")
# Programs of one layer, as models of many layers have them: they compile in less than half the time of whole steps.
# test_engine.py and test_start.py have whole steps, and test_piecewise_steps.py compares the two.
os.environ.setdefault("QWEN_JAX_LAYERS_PER_PROGRAM", "1")

import pytest  # noqa: E402

# Files that take longest, in this order: they start first, so that no worker is left alone with one at the end.
SLOWEST = (
    "tests/test_docs.py", "tests/engine/test_parallel_engine.py", "tests/cluster/ray_serve", "tests/engine/runner",
    "tests/cluster/routing", "tests/engine/test_resharding.py", "tests/serving/test_faults.py", "tests/test_cli.py",
    "tests/engine/multihost", "tests/training", "tests/model", "tests/engine", "tests/kernels", "tests/checkpoint")


def pytest_collection_modifyitems(items):
    """Sort the files so that `SLOWEST` come first."""
    items.sort(key=lambda item: next((i for i, name in enumerate(SLOWEST) if item.nodeid.startswith(name)), 1000))


@pytest.fixture(scope="session", autouse=True)
def executable_cache(tmp_path_factory):
    """Engines of one run share compiled programs; nothing is read from or left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "qwen-jax-cache"
        directory.mkdir(exist_ok=True)
        patch.setenv("QWEN_JAX_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Folder of the model that live servers of the tests serve."""
    from served import model_with_tools

    return str(model_with_tools(tmp_path_factory.mktemp("served") / "model"))


@pytest.fixture(scope="session")
def server(executable_cache, model):
    """Live server that many tests use; it has small limits."""
    from live import Live
    from served import SIZES

    live = Live(*SIZES, model=model)
    yield live
    live.output()
