"""Writes a student as a plain folder of diffusers: the teacher's pipeline with the weights that were trained.

    python -m scripts.distill.export --model emoji --weights runs/sla2/student.safetensors --out runs/emoji-sla2

LoRA is multiplied out. What the pattern itself learned (a router, feature maps) has no place in such a folder: it goes
into a student.safetensors beside it. In both cases `visattn.apply(pipe, "runs/emoji-sla2/student.safetensors")` gives
the pipeline its attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts import cli
from scripts.distill.settings import option, parse
from visattn.files import output_folder
from visattn.pipelines.load import load_pipeline
from visattn.trained import export_student, load_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to write.

    Raises:
        ValueError: If there is no such student, or something is in the way.
    """

    model: str = field(metadata={"help": "the teacher: an embedded model, a folder in diffusers' format, or a hub id"})
    weights: Path = field(metadata={"help": "student.safetensors that scripts.distill.pipeline wrote"})
    out: Path = field(metadata={"help": "folder for the pipeline"})
    dtype: str | None = option("float32", "float32, bfloat16 or float16")

    def __post_init__(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out} is not empty: name a new folder")
        load_trained(self.weights)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    with cli.told("export"):
        settings = parse(Settings, __doc__, None if arguments is None else list(arguments))
        with output_folder(settings.out) as folder:
            pipe = load_pipeline(settings.model, "cpu", settings.dtype)
            rest = export_student(pipe, settings.weights, folder, settings.out)
    own = sum(value.numel() for value in rest.own.values())
    beside = (
        f"{own:,} parameters of {rest.about['pattern']} beside it" if own else f"trained for {rest.about['pattern']}"
    )
    print(f"{settings.out}: a plain pipeline, {beside}")


if __name__ == "__main__":
    main()
