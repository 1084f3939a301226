"""What every test shares: CPU, full warm-ups, and executables kept for the session."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices, for meshes. Tests wait for compilations more than for anything else, and these take a third
# less time without LLVM's passes.
os.environ.setdefault("XLA_FLAGS",
                      "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8")

# A test of the engine is one of all its programs, unless it says otherwise; and there is no second process beside it.
os.environ.setdefault("QWEN_JAX_WARMUP", "full")

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def executable_cache(tmp_path_factory):
    """Engines of one run share compiled programs; nothing is read from or left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "qwen-jax-cache"
        directory.mkdir(exist_ok=True)
        patch.setenv("QWEN_JAX_CACHE", str(directory))
        yield directory
