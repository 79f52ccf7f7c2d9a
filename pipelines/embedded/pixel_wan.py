"""A class-conditional video transformer of Wan's kind that works on pixels: no text encoder, no VAE.

Small enough to ship inside the package, and a real diffusers pipeline around diffusers' own
`WanTransformer3DModel`, so that attention patterns for video can be tried on it without a download.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch.nn import functional as F

from visattn.pipelines.asked import check_sides
from visattn.pipelines.embedded.pixel import ClassPipeline, Generators, StepCallback


@dataclass
class PixelWanOutput(BaseOutput):
    """Videos of one call: lists of PIL images, a tensor [B, T, C, H, W] or an array [B, T, H, W, C], values 0 to 1."""

    frames: list[list[PIL.Image.Image]] | torch.Tensor | np.ndarray


class PixelWanPipeline(ClassPipeline):
    """Class-conditional video generation in pixel space with Wan's transformer and flow matching.

    Where Wan reads a text, this model reads `class_tokens` words, each saying "class c, word i" as a one-hot row: the
    transformer's own text projection then learns an embedding for every class and word. The null class of
    classifier-free guidance follows the last real class.

    Args:
        transformer: Wan transformer whose `text_dim` is (classes + 1) * class_tokens.
        scheduler: Flow-matching scheduler with a constant shift.
        class_tokens: Words that name a class.
        num_frames: Length of a video by default.
        sample_size: Height and width in pixels by default.
        fps: Frames per second at which the motion looks as it did in training.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        class_tokens: int = 4,
        num_frames: int = 16,
        sample_size: int = 32,
        fps: int = 8,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(class_tokens=class_tokens, num_frames=num_frames, sample_size=sample_size, fps=fps)
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    @property
    def num_classes(self) -> int:
        """Number of real classes; it is also the index of the null class."""
        return self.transformer.config.text_dim // self._own.class_tokens - 1

    @property
    def patch_size(self) -> int:
        """Side of a patch (one token) of a frame in pixels."""
        return self.transformer.config.patch_size[1]

    @property
    def _own(self) -> Any:
        """The pipeline's own config, which diffusers calls a dict but which also has attributes."""
        return self.config

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor,
        *,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 16,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> PixelWanOutput | tuple[Any]:
        """Generates one video per class label.

        Args:
            class_labels: One label or B labels, each from 0 to `num_classes` - 1.
            guidance_scale: Weight of the class against the null class; 1 or less switches guidance off.
            num_inference_steps: Number of denoising steps.
            num_frames: Number of frames T; the model's own by default.
            height: Frame height in pixels, a multiple of the patch size; the model's own by default.
            width: Frame width in pixels, likewise.
            generator: One generator, or one for each video, for reproducible noise.
            latents: Start noise [B, C, T, height, width] instead of a drawn one.
            output_type: "pil", "pt" (tensor [B, T, C, H, W]) or "np" (array [B, T, H, W, C]), values 0 to 1.
            callback_on_step_end: `f(pipeline, step, timestep, tensors) -> tensors` after every step; it may
                replace the tensors that it was given.
            callback_on_step_end_tensor_inputs: Names of the tensors to pass: only "latents" exists.
            return_dict: Whether to return a `PixelWanOutput` instead of a tuple.

        Raises:
            ValueError: If a label, a size, the noise or an option does not fit the model.
        """
        labels = self._check_labels(class_labels)
        self._check_options(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        shape = (len(labels), self.transformer.config.in_channels, *self._check_size(num_frames, height, width))
        self._guidance_scale = float(guidance_scale)
        sample = self._start_noise(shape, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        sample = self._denoise(sample, labels, callback_on_step_end, callback_on_step_end_tensor_inputs)
        frames: Any = self.video_processor.postprocess_video(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return PixelWanOutput(frames=frames) if return_dict else (frames,)

    def check_inputs(
        self,
        class_labels: int | Sequence[int] | torch.Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Checks labels and size, see `__call__`.

        Raises:
            ValueError: If one does not fit the model.
        """
        self._check_labels(class_labels)
        self._check_size(num_frames, height, width)

    def _velocity(self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        words = class_words(labels, self.num_classes, self._own.class_tokens).to(latents.dtype)
        return self.transformer(latents, timestep=t, encoder_hidden_states=words, return_dict=False)[0]

    def _check_size(self, frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        return clip_size(self, frames, height, width)


def clip_size(pipeline: Any, frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Frames, height and width of a call: the pipeline's own where None.

    Raises:
        ValueError: If one is no whole number of patches, or of more than the transformer has positions for.
    """
    own, patch_frames = pipeline.config, pipeline.transformer.config.patch_size[0]
    long = own.num_frames if frames is None else frames
    tall, wide = (own.sample_size if side is None else side for side in (height, width))
    check_sides(patch_frames, num_frames=long)
    check_sides(pipeline.patch_size, height=tall, width=wide)
    most, patches = pipeline.transformer.config.rope_max_seq_len, pipeline.transformer.config.patch_size
    for name, value, patch in zip(("num_frames", "height", "width"), (long, tall, wide), patches, strict=True):
        if value > most * patch:
            raise ValueError(f"{name} {value} is more than this model has positions for: pass at most {most * patch}")
    return long, tall, wide


def class_words(labels: torch.Tensor, classes: int, tokens: int) -> torch.Tensor:
    """The "text" of class labels: one-hot rows [B, tokens, (classes + 1) * tokens] in float32.

    Args:
        labels: [B], from 0 to `classes`, which is the null class.
        classes: Number of real classes.
        tokens: Words per class; word i of class c has its one at c * tokens + i.
    """
    index = labels[:, None] * tokens + torch.arange(tokens, device=labels.device)
    return F.one_hot(index, (classes + 1) * tokens).float()
