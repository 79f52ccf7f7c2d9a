"""A class-conditional diffusion transformer that works on pixels: no text encoder, no VAE.

Small enough to ship inside the package, and a real diffusers pipeline, so that attention patterns can be
tried on it without a download.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "pt", "np")
StepCallback = Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class PixelDiTOutput(BaseOutput):
    """Images of one call: PIL images, a tensor [B, C, H, W] or an array [B, H, W, C], values 0 to 1."""

    images: list[PIL.Image.Image] | torch.Tensor | np.ndarray


class PixelDiTPipeline(DiffusionPipeline):
    """Class-conditional image generation in pixel space with a DiT and flow matching.

    Pixels run from -1 (black) to 1 (white) inside the model. Classifier-free guidance uses the null class
    that follows the last real class in the transformer's label table.

    Args:
        transformer: DiT whose `num_embeds_ada_norm` is the number of real classes.
        scheduler: Flow-matching scheduler. With `use_dynamic_shifting` its noise schedule follows the image
            size: mu is `base_shift` at `base_image_seq_len` tokens, plus log(4)/2 each time the tokens quadruple.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step also runs the null class."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the current or last call."""
        return self._num_timesteps

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
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        sample = self._prepare_latents(len(labels), height, width, generator, latents)
        timesteps = self._prepare_timesteps(num_inference_steps, height, width)

        progress_bar: Any = self.progress_bar
        with progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                velocity = self._predict_velocity(sample, t, labels)
                sample = self.scheduler.step(velocity, t, sample, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, sample)
                    sample = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", sample)
                progress.update()

        images: Any = self.image_processor.postprocess(sample.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return PixelDiTOutput(images=images) if return_dict else (images,)

    def _predict_velocity(self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Velocity (noise minus image) [B, C, H, W] at scheduler time t, guided if guidance is on."""
        if not self.do_classifier_free_guidance:
            return self.transformer(latents, timestep=t.expand(len(labels)), class_labels=labels).sample
        both = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        stacked = self.transformer(torch.cat([latents, latents]), timestep=t.expand(len(both)), class_labels=both)
        conditional, unconditional = stacked.sample.chunk(2)
        return unconditional + self._guidance_scale * (conditional - unconditional)

    def _prepare_latents(
        self,
        batch: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Start noise [B, C, height, width] on the pipeline's device, in the transformer's type."""
        shape = (batch, self.transformer.config.in_channels, height, width)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            if isinstance(generator, list) and len(generator) != batch:
                raise ValueError(f"{len(generator)} generators for {batch} labels: pass one, or one for each label")
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape} for these labels and size")
        return latents.to(device=device, dtype=dtype)

    def _prepare_timesteps(self, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
        """Sets the scheduler up and returns its times [num_inference_steps], 1000 (noise) down to 0."""
        config = self.scheduler.config
        mu = None
        if config.use_dynamic_shifting:
            tokens = (height // self.patch_size) * (width // self.patch_size)
            # Averaging more pixels hides more noise: the shift grows with the side length, so mu with its log.
            mu = config.base_shift + 0.5 * math.log(tokens / config.base_image_seq_len)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device, mu=mu)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    @property
    def patch_size(self) -> int:
        """Side of a patch (one token) in pixels."""
        return self.transformer.config.patch_size

    def _check_labels(self, class_labels: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        if labels.numel() == 0 or labels.is_floating_point():
            raise ValueError(f"class_labels must be one or more whole numbers, got {class_labels!r}")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)].tolist()
        if wrong:
            raise ValueError(f"class label {wrong[0]} does not exist: pass labels from 0 to {self.num_classes - 1}")
        return labels.long()

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        own, patch = self.transformer.config.sample_size, self.patch_size
        tall, wide = own if height is None else height, own if width is None else width
        for name, value in (("height", tall), ("width", wide)):
            if value < patch or value % patch:
                near = max(patch, round(value / patch) * patch)
                raise ValueError(f"{name} {value} is not a multiple of the patch size {patch}: pass e.g. {near}")
        if tall != wide:
            # diffusers' DiT puts its tokens back together as a square.
            raise ValueError(f"{tall}x{wide} is not square: this model needs equal height and width")
        return tall, wide

    def _check_options(self, steps: int, output_type: str, tensor_inputs: Sequence[str]) -> None:
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}: pass 1 or more")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} does not exist: pass one of {', '.join(OUTPUT_TYPES)}")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback tensor {unknown[0]!r} does not exist: pass names from ('latents',)")
