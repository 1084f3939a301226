"""Put a released model's calibration files into the package, where checkpoints with its weights find them.

    python scripts/models/ship_calibration.py MODEL NAME --calibration FOLDER

NAME is the released model's, such as Qwen2.5-Coder-0.5B-Instruct. The folder has what `qwen-jax calibrate` wrote.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from qwen_jax.checkpoint import resolve
from qwen_jax.checkpoint.shipped_calibration import SHIPPED_CALIBRATIONS, write_model
from qwen_jax.checkpoint.source import EIGHT_BIT, SPARSITY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--calibration", type=Path, required=True)
    args = parser.parse_args()
    folder = SHIPPED_CALIBRATIONS / args.name.lower()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SPARSITY, EIGHT_BIT):
        if (args.calibration / name).is_file():
            shutil.copyfile(args.calibration / name, folder / name)
            print(folder / name)
    write_model(folder, args.name, resolve(args.model))


if __name__ == "__main__":
    main()
