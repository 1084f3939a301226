"""A jaxlib that sums wrongly is used safely, or not at all."""
import os
import subprocess
import sys

import jax
import jaxlib.version
import pytest

from qwen_jax import xla_flags

ROWS = 40_000
SUMS = f"""
import jax, jax.numpy as jnp, numpy as np
x = np.zeros(({ROWS}, 3), np.float32)
x[:, 0] = np.arange({ROWS})
sums = np.asarray(jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x))
print("wrong", int(np.sum(sums != (x.astype(np.float64) ** 2).sum(1).astype(np.float32))))
"""
ENGINE = """
from qwen_jax.xla_flags import check_safe_flags
try:
    check_safe_flags()
    print("taken")
except Exception as error:
    print(type(error).__name__, error)
"""
affected = pytest.mark.skipif(jaxlib.version.__version__ not in xla_flags.WRONG_SUMS, reason="this jaxlib is right")


def output(code, flags=""):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout


@affected
def test_the_fault_is_there_without_the_flag():
    """Else there is nothing to protect from, and `WRONG_SUMS` is out of date."""
    assert int(output(SUMS).split()[1]) > 1000


def test_sums_are_right_after_the_import():
    assert output("import qwen_jax" + SUMS) == "wrong 0\n"
    assert output("import qwen_jax" + SUMS, "--xla_force_host_platform_device_count=2") == "wrong 0\n"


@affected
def test_an_import_that_comes_too_late_is_refused():
    early = "import jax; jax.devices(); import qwen_jax"
    assert output(early + ENGINE).startswith("UserError jaxlib")
    assert output(early + ENGINE, xla_flags.SAFE) == "taken\n"
    assert output("import jax; import qwen_jax; jax.devices()" + ENGINE) == "taken\n"


def test_flags_that_a_program_replaces_are_completed():
    replaced = "import os, qwen_jax; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'"
    assert output(replaced + ENGINE + SUMS) == "taken\nwrong 0\n"


def test_a_decision_of_the_user_stays(monkeypatch):
    monkeypatch.setattr(xla_flags, "_version", lambda: "0.10.2")
    monkeypatch.setattr(xla_flags, "_backend_started", lambda: False)
    for before, after in (("", xla_flags.SAFE), ("--a=1", f"--a=1 {xla_flags.SAFE}"), (f"{xla_flags.OPTION}=", None)):
        monkeypatch.setenv("XLA_FLAGS", before)
        xla_flags.set_safe_flags()
        assert os.environ["XLA_FLAGS"] == (before if after is None else after)
    monkeypatch.setattr(xla_flags, "_version", lambda: "0.12.0")
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_flags.set_safe_flags()
    assert not os.environ["XLA_FLAGS"]


@affected
def test_engines_and_trainers_look(monkeypatch):
    from qwen_jax.engine.config import resolve
    from qwen_jax.errors import UserError
    from qwen_jax.training import step

    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match="has started without it"):
        resolve.source_of(None, None)
    with pytest.raises(UserError, match="has started without it"):
        step.make_train_step(None, None)
