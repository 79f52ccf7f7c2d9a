"""Runs a script of timm with the backbones registered: `python -m visattn.models.run train.py --model nat_tiny ...`."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

USAGE = "usage: python -m visattn.models.run SCRIPT [ARGUMENT ...]   (a script like timm's train.py or validate.py)"


def main() -> None:
    """Import the backbones, then run the script as if it had been called itself."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    script = Path(arguments[0])
    if not script.is_file():
        sys.exit(f"visattn.models.run: {script} is not a file; {USAGE}")
    importlib.import_module("visattn.models")
    sys.argv = arguments
    # As `python SCRIPT` does, so that the script finds the modules beside it.
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
