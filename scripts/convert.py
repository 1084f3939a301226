"""Convert a Hugging Face checkpoint to Orbax, or back with --export. The same as `qwen-jax convert` / `export`.

    python scripts/convert.py SRC DST [--dtype bfloat16|float32] [--processes N] [--export]
"""

from __future__ import annotations

import argparse
import sys

from qwen_jax.checkpoint import convert, export
from qwen_jax.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src", help="Hugging Face folder or hub id; with --export a converted checkpoint")
    parser.add_argument("dst", help="folder to create")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: as stored, bit for bit")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of this machine, which share the work")
    parser.add_argument("--export", action="store_true", help="from Orbax to a folder that transformers loads")
    args = parser.parse_args()
    if args.export and (args.dtype or args.processes != 1):
        parser.error("--dtype and --processes apply to conversion only: export writes what is stored")
    try:
        if args.export:
            export(args.src, args.dst)
        else:
            convert(args.src, args.dst, args.dtype, processes=args.processes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
