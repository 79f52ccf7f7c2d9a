"""A text-to-image transformer of FLUX.1's kind that works on pixels: a small text encoder of its own, no VAE.

Small enough to ship inside the package, and a real diffusers pipeline around diffusers' own `FluxTransformer2DModel`,
so that attention patterns can be tried on pictures with text tokens without a download.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from visattn.pipelines.asked import check_sides
from visattn.pipelines.embedded.pixel import Generators, PixelPipeline, StepCallback
from visattn.pipelines.embedded.prompts import Encoded, check_prompts, encode_tokens, null_ids, tokenize

COLORS = 3


@dataclass
class PixelFluxOutput(BaseOutput):
    """Images of one call: PIL images, a tensor [B, C, H, W] or an array [B, H, W, C], values 0 to 1."""

    images: list[PIL.Image.Image] | torch.Tensor | np.ndarray


class PixelFluxPipeline(PixelPipeline):
    """Text to image in pixel space with FLUX.1's transformer and flow matching.

    The transformer predicts the clean picture, from which the velocity follows: pixels are so redundant that a small
    model draws clean areas far better than it carries noise through its layers (Li and He 2025, "Back to Basics: Let
    Denoising Generative Models Denoise"). Position ids always cover the sample size: at other sizes the tokens lie
    closer or farther apart, and the picture keeps its composition.

    Args:
        transformer: FLUX transformer whose tokens are patches of RGB pixels: in_channels 3 * patch * patch.
        scheduler: Flow-matching scheduler. With `use_dynamic_shifting` its noise schedule follows the image size: mu
            is `base_shift` at `base_image_seq_len` tokens, plus log(4)/2 each time the tokens quadruple.
        text_encoder: Small T5 encoder trained with the transformer; the mean of its tokens is the pooled projection.
        tokenizer: Its tokenizer; `model_max_length` is the number of text tokens.
        sample_size: Height and width in pixels by default.
    """

    prediction_type = "sample"
    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
        sample_size: int = 256,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(sample_size=sample_size)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def patch_size(self) -> int:
        """Side of a patch (one token) in pixels."""
        return math.isqrt(self.transformer.config.in_channels // COLORS)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        guidance_scale: float = 4.5,
        num_inference_steps: int = 24,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> PixelFluxOutput | tuple[Any]:
        """Generates one image per prompt.

        Args:
            prompt: One text or B texts, such as "a red apple, 3d".
            guidance_scale: Weight of the prompt against no prompt; 1 or less switches guidance off.
            num_inference_steps: Number of denoising steps.
            height: Image height in pixels, a multiple of the patch size; the sample size by default.
            width: Image width in pixels, likewise.
            generator: One generator, or one for each image, for reproducible noise.
            latents: Start noise [B, 3, height, width] instead of a drawn one.
            output_type: "pil", "pt" (tensor [B, C, H, W]) or "np" (array [B, H, W, C]), values 0 to 1.
            callback_on_step_end: `f(pipeline, step, timestep, tensors) -> tensors` after every step; it may
                replace the tensors that it was given.
            callback_on_step_end_tensor_inputs: Names of the tensors to pass: only "latents" exists.
            return_dict: Whether to return a `PixelFluxOutput` instead of a tuple.

        Raises:
            ValueError: If a prompt, a size, the noise or an option does not fit the model.
        """
        prompts = check_prompts(prompt)
        height, width = self._check_size(height, width)
        self._check_options(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        self._guidance_scale = float(guidance_scale)
        condition = self.encode_prompt(prompts)
        sample = self._start_noise((len(prompts), COLORS, height, width), generator, latents)
        self._set_timesteps(num_inference_steps, (height // self.patch_size) * (width // self.patch_size))
        sample = self._denoise(sample, condition, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images: Any = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return PixelFluxOutput(images=images) if return_dict else (images,)

    def check_inputs(self, prompt: str | Sequence[str], height: int | None = None, width: int | None = None) -> None:
        """Checks prompts and size, see `__call__`.

        Warns:
            PromptWarning: If a prompt is used, but not as it was written.

        Raises:
            ValueError: If one does not fit the model.
        """
        self._check_size(height, width)
        tokenize(self.tokenizer, check_prompts(prompt))

    def encode_prompt(self, prompts: Sequence[str]) -> Encoded:
        """Encodes the prompts; with guidance the null prompt follows for each."""
        ids = tokenize(self.tokenizer, prompts)
        if self.do_classifier_free_guidance:
            ids = torch.cat([ids, null_ids(self.tokenizer, len(prompts))])
        found = encode_tokens(self.text_encoder, ids.to(self._execution_device), self.tokenizer.pad_token_id)
        dtype = self.transformer.dtype
        return Encoded(found.text.to(dtype), found.pooled.to(dtype))

    def _predict_velocity(self, latents: torch.Tensor, t: torch.Tensor, condition: Encoded) -> torch.Tensor:
        spacing = self._spacing(latents)
        return self._guided_velocity(
            latents, t, lambda noisy, sigma: predict_clean(self.transformer, noisy, sigma, condition, spacing)
        )

    def pack_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] as the transformer's tokens [B, tokens, 3 patch patch]."""
        return to_tokens(latents, self.patch_size)

    def _spacing(self, latents: torch.Tensor) -> float:
        config: Any = self.config
        return config.sample_size / max(latents.shape[-2:])

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config: Any = self.config
        tall, wide = (config.sample_size if side is None else side for side in (height, width))
        check_sides(self.patch_size, height=tall, width=wide)
        return tall, wide


def predict_clean(
    transformer: Any, noisy: torch.Tensor, sigma: torch.Tensor, condition: Encoded, spacing: float = 1.0
) -> torch.Tensor:
    """The clean picture that the transformer sees behind the noise.

    Args:
        transformer: The model.
        noisy: [B, 3, H, W].
        sigma: [B], share of noise, 0 to 1.
        condition: Encoded prompts, as many.
        spacing: Distance between the position ids of neighbouring tokens.

    Returns:
        [B, 3, H, W].
    """
    config: Any = transformer.config
    patch = math.isqrt(config.in_channels // COLORS)
    grid = (noisy.shape[-2] // patch, noisy.shape[-1] // patch)
    tokens = transformer(
        hidden_states=to_tokens(noisy, patch),
        encoder_hidden_states=condition.text,
        pooled_projections=condition.pooled,
        timestep=sigma,
        img_ids=position_ids(grid, spacing, noisy.device),
        txt_ids=torch.zeros(condition.text.shape[1], 3, device=noisy.device),
        return_dict=False,
    )[0]
    return to_picture(tokens, grid, patch)


def position_ids(grid: tuple[int, int], spacing: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Position ids [tokens, (0, y, x)]: token centres, so that every size covers the same square."""
    y, x = (spacing * (torch.arange(n, device=device) + 0.5) - 0.5 for n in grid)
    rows = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)


def to_tokens(picture: torch.Tensor, patch: int) -> torch.Tensor:
    """Patches of a picture [B, C, H, W] as tokens [B, (H / patch) (W / patch), C patch patch], as FLUX.1 packs them."""
    batch, channels, height, width = picture.shape
    split = picture.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def to_picture(tokens: torch.Tensor, grid: tuple[int, int], patch: int) -> torch.Tensor:
    """The reverse of `to_tokens`."""
    split = tokens.reshape(len(tokens), *grid, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(len(tokens), -1, grid[0] * patch, grid[1] * patch)
