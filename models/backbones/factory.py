"""How the backbones are registered with timm: configs, the builder, the official weight files."""

from typing import Any, TypeVar

from timm.models import build_model_with_cfg
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def build(
    kind: type[Model], variant: str, pretrained: bool, out_indices: int | tuple[int, ...] = (0, 1, 2, 3), **kwargs: Any
) -> Model:
    """A registered model, as `timm.create_model` asks for it.

    Args:
        kind: Its class.
        variant: Its name.
        pretrained: Whether to load its weights.
        out_indices: Stages of `features_only`.
        kwargs: Arguments of the class and of timm's builder.
    """
    return build_model_with_cfg(
        kind,
        variant,
        pretrained,
        pretrained_filter_fn=official,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def cfg(license: str, paper: str, origin: str, first_conv: str, url: str = "", **more: Any) -> dict[str, Any]:
    """A timm pretrained config of an ImageNet model at 224 pixels, for `generate_default_cfgs`."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
        "license": license,
        "paper_ids": paper,
        "origin_url": origin,
        **more,
    }


def official(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The weights inside an official checkpoint file; their names are this model's names already."""
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state_dict.get(key), dict):
            return state_dict[key]
    return state_dict
