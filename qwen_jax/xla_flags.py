"""Setting and check of an XLA flag without which some versions of jaxlib compute wrong sums on CPUs.

jaxlib 0.10.2 fuses a product and the sum over it into a YNNPACK reduction that is wrong for some large arrays on CPUs
(https://github.com/jax-ml/jax/issues/39103). The smallest known example: of ``x``, float32 ``[32769, 3]``, the sums
over each row of ``(x @ eye(3)) ** 2`` are wrong in the last row. 0.11.0, 0.11.2 and 0.12.0.1 give the right ones, and
so does 0.10.2 without that fusion.
"""

from __future__ import annotations

import os
import sys

from qwen_jax.errors import UserError

WRONG_SUMS = ("0.10.2",)  # versions of jaxlib
OPTION = "--xla_cpu_experimental_ynn_fusion_type"
SAFE = f"{OPTION}=-reduce"


def set_safe_flags() -> None:
    """Add the flag `SAFE` to the variable XLA_FLAGS if the installed jaxlib needs it and its option is not set there.

    Takes effect until JAX starts its backend, with its first computation or its first look at devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _version() in WRONG_SUMS and OPTION not in flags and not _backend_started():
        os.environ["XLA_FLAGS"] = f"{flags} {SAFE}".strip()


def check_safe_flags() -> None:
    """Raise UserError when JAX computes on a CPU with a jaxlib that gets sums wrong, and without the flag `SAFE`.

    Before the backend has started, add the flag instead: a program may have replaced XLA_FLAGS since the import.
    """
    import jax

    set_safe_flags()
    if _version() in WRONG_SUMS and jax.default_backend() == "cpu" and OPTION not in os.environ.get("XLA_FLAGS", ""):
        raise UserError(f"jaxlib {_version()} computes some sums wrongly on CPUs unless XLA_FLAGS has {SAFE}, and JAX "
                        "has started without it: import qwen_jax before JAX is used and keep what it adds to "
                        "XLA_FLAGS, or use another jaxlib")


def _version() -> str:
    from jaxlib.version import __version__

    return __version__


def _backend_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()
