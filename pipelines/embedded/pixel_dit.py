"""A class-conditional diffusion transformer that works on pixels: no text encoder, no VAE.

Small enough to ship inside the package, and a real diffusers pipeline, so that attention patterns can be
tried on it without a download.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput

from visattn.pipelines.asked import check_sides
from visattn.pipelines.embedded.pixel import ClassPipeline, Generators, StepCallback


@dataclass
class PixelDiTOutput(BaseOutput):
    """Images of one call: PIL images, a tensor [B, C, H, W] or an array [B, H, W, C], values 0 to 1."""

    images: list[PIL.Image.Image] | torch.Tensor | np.ndarray


class PixelDiTPipeline(ClassPipeline):
    """Class-conditional image generation in pixel space with a DiT and flow matching.

    Pixels run from -1 (black) to 1 (white) inside the model. Classifier-free guidance uses the null class
    that follows the last real class in the transformer's label table.

    Args:
        transformer: DiT whose `num_embeds_ada_norm` is the number of real classes.
        scheduler: Flow-matching scheduler. With `use_dynamic_shifting` its noise schedule follows the image
            size: mu is `base_shift` at `base_image_seq_len` tokens, plus log(4)/2 each time the tokens quadruple.
    """

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def num_classes(self) -> int:
        """Number of real classes; it is also the index of the null class."""
        return self.transformer.config.num_embeds_ada_norm

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor,
        *,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 24,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> PixelDiTOutput | tuple[Any]:
        """Generates one image per class label.

        Args:
            class_labels: One label or B labels, each from 0 to `num_classes` - 1.
            guidance_scale: Weight of the class against the null class; 1 or less switches guidance off.
            num_inference_steps: Number of denoising steps.
            height: Image height in pixels, a multiple of the patch size; the model's own size by default.
            width: Image width in pixels; diffusers' DiT makes squares only, so it must equal the height.
            generator: One generator, or one for each image, for reproducible noise.
            latents: Start noise [B, C, height, width] instead of a drawn one.
            output_type: "pil", "pt" (tensor [B, C, H, W]) or "np" (array [B, H, W, C]), values 0 to 1.
            callback_on_step_end: `f(pipeline, step, timestep, tensors) -> tensors` after every step; it may
                replace the tensors that it was given.
            callback_on_step_end_tensor_inputs: Names of the tensors to pass: only "latents" exists.
            return_dict: Whether to return a `PixelDiTOutput` instead of a tuple.

        Raises:
            ValueError: If a label, a size, the noise or an option does not fit the model.
        """
        labels = self._check_labels(class_labels)
        height, width = self._check_size(height, width)
        self._check_options(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        self._guidance_scale = float(guidance_scale)
        shape = (len(labels), self.transformer.config.in_channels, height, width)
        sample = self._start_noise(shape, generator, latents)
        self._set_timesteps(num_inference_steps, (height // self.patch_size) * (width // self.patch_size))
        sample = self._denoise(sample, labels, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images: Any = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return PixelDiTOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self, class_labels: int | Sequence[int] | torch.Tensor, height: int | None = None, width: int | None = None
    ) -> None:
        """Checks labels and size, see `__call__`.

        Raises:
            ValueError: If one does not fit the model.
        """
        self._check_labels(class_labels)
        self._check_size(height, width)

    def _velocity(self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.transformer(latents, timestep=t, class_labels=labels).sample

    @property
    def patch_size(self) -> int:
        """Side of a patch (one token) in pixels."""
        return self.transformer.config.patch_size

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        own, patch = self.transformer.config.sample_size, self.patch_size
        tall, wide = own if height is None else height, own if width is None else width
        check_sides(patch, height=tall, width=wide)
        if tall != wide:
            # diffusers' DiT puts its tokens back together as a square.
            raise ValueError(f"{tall}x{wide} is not square: this model needs equal height and width")
        return tall, wide
