"""Distills a model's attention into a sparse or linear one: the student learns what the dense teacher does.

    python -m scripts.distill.cache_samples --model digits --count 1000 --steps 8 --out runs/samples
    python -m scripts.distill.pipeline --model digits --pattern "clear(radius=3)" --samples runs/samples \
        --out runs/clear
    visattn generate image --model digits --pattern "clear(radius=3)" --weights runs/clear/student.safetensors --out x

`accelerate launch -m scripts.distill.pipeline ...` runs the same on many GPUs. Stop or kill it at any time: the same
command goes on from the last checkpoint to the very weights of an uninterrupted run. --out gets
`checkpoint.safetensors`, `log.jsonl`, `samples/*.png` and at the end `student.safetensors`: the trained tensors and
nothing else.
"""

from __future__ import annotations

from pathlib import Path

from scripts.distill.config import Config
from scripts.distill.settings import parse


def main(arguments: list[str] | None = None) -> Path:
    """Entry point; returns the file of the result."""
    try:
        config = parse(Config, __doc__, arguments)
        # Only now what takes seconds to import: a wrong setting is answered at once.
        from scripts.distill.loop import prepare, train
        from scripts.distill.training import Training

        prepare(config)
        result = train(Training(config))
    except ValueError as error:
        raise SystemExit(f"distill: {error}") from error
    return result


if __name__ == "__main__":
    main()
