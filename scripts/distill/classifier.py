"""Distills a timm model's attention into a sparse or linear one, on pictures without labels.

    python -m scripts.distill.classifier --model vit_small_patch16_224 --data pictures --pattern "na(window=7x7)" \
        --out runs/na
    python -m scripts.train.digits_vit --out out/digits-vit
    python -m scripts.distill.classifier --model digits --checkpoint out/digits-vit/model.safetensors --data digits \
        --pattern "na(window=3x3)" --out runs/digits-na

The student learns the teacher's class probabilities, its last tokens, the outputs of its attention and, for linear and
agent attention, its attention rows. `accelerate launch -m scripts.distill.classifier ...` runs the same on many GPUs.
Stop or kill it at any time: the same command goes on from the last checkpoint to the very weights of an uninterrupted
run. --out gets `checkpoint.safetensors`, `log.jsonl` and at the end `student.safetensors`; in Python:

    trained = load_trained(Path("student.safetensors"))  # of visattn.trained, with the other two
    with trained_weights(model, trained), visattn.apply(model, trained.about["pattern"], always=True) as handle:
        load_own(handle, trained)
        logits = model(images)
"""

from __future__ import annotations

from pathlib import Path

from scripts import cli
from scripts.distill.settings import parse
from scripts.distill.vit_config import VitConfig


def main(arguments: list[str] | None = None) -> Path:
    """Entry point; returns the file of the result."""
    with cli.told("distill_vit"):
        config = parse(VitConfig, __doc__, arguments)
        # Only now what takes seconds to import: a wrong setting is answered at once.
        from scripts.distill.loop import prepared, train
        from scripts.distill.vit import VitTraining

        with prepared(config):
            result = train(VitTraining(config))
    return result


if __name__ == "__main__":
    main()
