"""Export by the name of a format."""

from __future__ import annotations

from pathlib import Path

from qwen_jax.checkpoint.conversion import export
from qwen_jax.checkpoint.gguf import export_gguf
from qwen_jax.checkpoint.stablehlo import export_stablehlo
from qwen_jax.errors import UserError

FORMATS = ("hf", "gguf", "stablehlo")


def export_as(src: str | Path, dst: str | Path, format: str = "hf", dtype: str | None = None) -> Path:
    """What `export` (hf), `export_gguf` or `export_stablehlo` does; returns ``dst``.

    dtype: as the format's own function takes it, None for its default. ``hf`` keeps what is stored and takes none.
    Raises UserError for an unknown format, and as those functions do.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: use {', '.join(FORMATS)}")
    if format == "hf":
        if dtype is not None:
            raise UserError("the format hf keeps the stored element type: leave --dtype out, or name it to "
                            "qwen-jax convert")
        return export(src, dst)
    chosen = {} if dtype is None else {"dtype": dtype}
    return (export_gguf if format == "gguf" else export_stablehlo)(src, dst, **chosen)
