"""Settings of the distillation of a timm model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from scripts.distill.settings import RunConfig, option

DIGITS = "digits"
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig(RunConfig):
    """Settings of one run; `python -m scripts.distill.classifier --help` says what each means.

    Raises:
        ValueError: If a value is out of range, or two of them contradict each other.
    """

    model: str = field(metadata={"help": f"teacher: a name that timm knows, or {DIGITS}, the ViT of digits_vit.py"})
    data: str = field(metadata={"help": f"folder of pictures, labels are not needed, or {DIGITS}"})
    checkpoint: Path | None = option(None, "file with the teacher's weights; timm's pretrained ones from the hub")
    size: int = option(0, "side of the pictures in pixels; 0: the model's own")
    logits: float = option(1.0, "weight of the divergence of class probabilities from the teacher's")
    features: float = option(1.0, "weight of the distance of the last tokens to the teacher's")
    attention: float = option(0.5, "weight of the distance of attention outputs to the teacher's")
    maps: float = option(0.0, "weight of the cross-entropy to the teacher's attention rows (linear and agent)")
    temperature: float = option(1.0, "of both sides' class probabilities")
    train: str = option(
        "attention",
        "what is trained: the attention modules, all, or none: only the pattern's own",
        ("attention", "all", "none"),
    )
    augment: float = option(1.0, "strength of crops (pictures) or of jitter (digits); 0: none")

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one that this function was made in.
        RunConfig.__post_init__(self)
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature} must be above 0")
        if self.augment > 2:
            raise ValueError(f"--augment {self.augment} must be from 0 to 2")
        if self.lora and self.train != "attention":
            raise ValueError(
                f"--lora {self.lora} goes on the attention modules, but --train is {self.train}: pass --train attention"
            )
        if self.checkpoint is not None and not self.checkpoint.is_file():
            fix = "train it with scripts/train/digits_vit.py" if self.model == DIGITS else "name one that does"
            raise ValueError(f"--checkpoint {self.checkpoint} does not exist: {fix}")
        if self.model == DIGITS and self.checkpoint is None:
            raise ValueError(f"--model {DIGITS} needs --checkpoint: train it with scripts/train/digits_vit.py")
        if (self.model == DIGITS) != (self.data == DIGITS):
            raise ValueError(f"--model {self.model} and --data {self.data}: {DIGITS} goes with {DIGITS} only")
        self._check_names()

    def _check_names(self) -> None:
        if self.model != DIGITS:
            # Importing timm takes seconds: the cheap checks come first.
            import timm

            name = self.model.partition(".")[0]
            if not timm.is_model(name):
                near = timm.list_models(f"{name.split('_')[0]}*")[:3]
                raise ValueError(
                    f"--model {self.model!r} is no model of timm: e.g. {', '.join(near) or 'see timm.list_models'}"
                )
        if self.data != DIGITS and not list_pictures(Path(self.data)):
            raise ValueError(f"--data {self.data} holds no {', '.join(IMAGES)}: name a folder with some")

    @classmethod
    def losses(cls) -> tuple[str, ...]:
        """The settings that are weights of losses."""
        return ("logits", "features", "attention", "maps")


def list_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder and its subfolders, sorted; none if there is no such folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES) if folder.is_dir() else []
