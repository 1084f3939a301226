"""Orbax folders of arrays under flat names, written and read in groups. No other file imports Orbax.

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
_ARRAYS, _METADATA = "state", "_METADATA"  # in a finished checkpoint: the arrays' folder, and the file that lists them


def groups(sizes: Mapping[str, int], limit: int = GROUP_BYTES) -> Iterator[list[str]]:
    """Split arrays, given as name -> bytes, into lists of consecutive names of at most ``limit`` bytes together.

    A larger array is alone in its list.
    """
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
    """Join finished checkpoints, which have different arrays, into a new one at ``folder``, and remove them.

    Arrays, which are folders under their own names, are moved; their metadata is put into one file.
    """
    first, *others = parts
    joined = first / _ARRAYS / _METADATA
    metadata = json.loads(joined.read_text())
    for part in others:
        metadata["tree_metadata"] |= json.loads((part / _ARRAYS / _METADATA).read_text())["tree_metadata"]
        (part / _ARRAYS / _METADATA).unlink()
        for array in (part / _ARRAYS).iterdir():
            array.rename(first / _ARRAYS / array.name)
        shutil.rmtree(part)
    joined.write_text(json.dumps(metadata))
    first.rename(folder)


def read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read the named arrays of an Orbax checkpoint, and no others.

    Args:
      wanted: name -> ``jax.ShapeDtypeStruct`` with a sharding (each device then receives its own shard, already
        cast), or ``np.ndarray`` for a host array as stored.

    Raises UserError when the checkpoint is damaged.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    # Without barriers: each process reads what its devices need, which may be other arrays than other processes read.
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    try:
        with context, _quiet():
            return ocp.load(folder.absolute(), dict(wanted))
    except jax.errors.JaxRuntimeError:
        raise  # a failure of the device (out of memory), not of the checkpoint
    except Exception as error:  # Orbax has no exception type of its own for a damaged folder
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the checkpoint in {folder} is damaged ({reason}): convert it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's logs and "unraisable" tracebacks, so that the only report of a failure is the exception raised.

    Orbax works on many arrays at once. When one fails, the others go on and report to an event loop that is gone, in
    pages of tracebacks: a full disk would be hard to recognise among them.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.disabled for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.disabled = True
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except Exception:
        time.sleep(0.2)  # so that the other arrays fail now, while nothing is logged
        gc.collect()
        raise
    finally:
        sys.unraisablehook = hook
        for logger, value in zip(loggers, before, strict=True):
            logger.disabled = value
