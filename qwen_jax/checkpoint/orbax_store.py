"""The only file that knows Orbax: a folder of arrays under flat names, written and read in groups.

Orbax's partial save takes the tree a piece at a time and merges the pieces' metadata at the end, so memory is bounded
by one group. NumPy arrays are written without a copy once Orbax is told not to make one. Two of its defaults are off:
compression, because bfloat16 weights barely shrink and zstd would cost more time than the disk; and OCDBT, which packs
arrays into a few files under random names. Without it each array is a folder of raw chunks under its own name, and
converting was measured 15-25 % faster.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from qwen_jax.errors import UserError

# A chunk is what one read fetches: a shard of a large tensor needs only the chunks it overlaps.
_CHUNK_BYTES = 64 << 20
GROUP_BYTES = 256 << 20
_ARRAYS, _METADATA = "state", "_METADATA"  # in a finished checkpoint: the arrays' folder, and what it says of them


def groups(sizes: Mapping[str, int], limit: int = GROUP_BYTES) -> Iterator[list[str]]:
    """Consecutive names whose bytes sum to at most ``limit``, or a single name that is larger."""
    group, total = [], 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def write(folder: Path, pieces: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write arrays to a new Orbax checkpoint at ``folder``; each piece is saved before the next is asked for."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.use_ocdbt = False
    context.array.saving.use_zarr3 = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.memory.deepcopy_host_arrays = False
    with context, _quiet():
        for piece in pieces:
            ocp.partial.save(folder.absolute(), dict(piece))
            del piece  # else two groups would be alive while the next one is read
        ocp.partial.finalize(folder.absolute())


def join(folder: Path, parts: Sequence[Path]) -> None:
    """Make one new checkpoint at ``folder`` of finished ones with different arrays; they are gone afterwards.

    Arrays, which are folders under their own names, are moved; what Orbax says of them is put into one file.
    """
    first, *others = parts
    whole = first / _ARRAYS / _METADATA
    metadata = json.loads(whole.read_text())
    for part in others:
        metadata["tree_metadata"] |= json.loads((part / _ARRAYS / _METADATA).read_text())["tree_metadata"]
        (part / _ARRAYS / _METADATA).unlink()
        for array in (part / _ARRAYS).iterdir():
            array.rename(first / _ARRAYS / array.name)
        shutil.rmtree(part)
    whole.write_text(json.dumps(metadata))
    first.rename(folder)


def read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read the named arrays only.

    Args:
      wanted: name -> ``jax.ShapeDtypeStruct`` with a sharding (each device then receives its own part, already
        cast), or ``np.ndarray`` for a host array as stored.

    Raises UserError when the checkpoint is damaged.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Without barriers: each process reads what its devices need, which may be other arrays than its neighbours read.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    try:
        with context, _quiet():
            return ocp.load(folder.absolute(), dict(wanted))
    except jax.errors.JaxRuntimeError:
        raise  # the device's trouble (out of memory), not the checkpoint's
    except Exception as error:  # Orbax has no exception type of its own for a damaged folder
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the checkpoint in {folder} is damaged ({reason}): convert it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave a failure to the one exception raised.

    Orbax works on many arrays at once. When one fails, the others go on and report to an event loop that is gone, in
    pages of logged and "unraisable" tracebacks: a full disk would be hard to recognise among them.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.disabled for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.disabled = True
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except Exception:
        time.sleep(0.2)  # the others' turn to fail
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
        for logger, value in zip(loggers, before, strict=True):
            logger.disabled = value
