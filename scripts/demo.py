"""What scripts/demo.sh draws: two emoji and a clip of a third, each with dense attention and with blocks that matter.

The first steps, where the composition is made, stay dense; the others keep what the first of them chose. Both commands
run in one process, which loads torch and diffusers once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from visattn import cli

SEED = ("--compare", "--seed", "1")
IMAGES = (
    *("--model", "emoji", "--prompt", "bus, gradient", "--prompt", "post office, gradient"),
    *("--pattern", "topk(keep=0.1, rest=mean, every=8, drift=inf)", "--steps", "12", "--dense-steps", "4", *SEED),
)
CLIP = (
    *("--model", "animoji", "--prompt", "waving hand, 3d"),
    *("--pattern", "topk(keep=0.2, rest=slope, every=4, drift=inf)", "--steps", "8", "--dense-steps", "4", *SEED),
)


def main() -> None:
    """Run both commands, each of which is printed before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("out/demo"), help="Folder (%(default)s).")
    out = parser.parse_args().out
    run("generate", "image", *IMAGES, "--out", str(out), "--force")
    run("generate", "video", *CLIP, "--out", str(out / "clip"), "--force")


def run(*words: str) -> None:
    """One command of `visattn`; one that fails ends the demo with its status."""
    print(f"$ visattn {shlex.join(words)}", flush=True)
    sys.argv = ["visattn", *words]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    main()
