"""A text-to-video transformer of Wan's kind that works on pixels: a small text encoder of its own, no VAE.

Small enough to ship inside the package, and a real diffusers pipeline around diffusers' own `WanTransformer3DModel`,
so that attention patterns for video can be tried on prompts without a download.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from visattn.pipelines.embedded.pixel import Generators, PixelPipeline, StepCallback
from visattn.pipelines.embedded.pixel_wan import PixelWanOutput, clip_size
from visattn.pipelines.embedded.prompts import check_prompts, encode_tokens, null_ids, tokenize

TIMES = 1000.0  # the transformer's time of pure noise


class PixelWanTextPipeline(PixelPipeline):
    """Text to video in pixel space with Wan's transformer and flow matching.

    As in `PixelFluxPipeline`, the transformer predicts the clean clip, from which the velocity follows.

    Args:
        transformer: Wan transformer of RGB pixels, whose `text_dim` is the text encoder's width.
        scheduler: Flow-matching scheduler. With `use_dynamic_shifting` its noise schedule follows the clip's size: mu
            is `base_shift` at `base_image_seq_len` tokens, plus log(4)/2 each time the tokens quadruple.
        text_encoder: Small T5 encoder.
        tokenizer: Its tokenizer; `model_max_length` is the number of text tokens.
        num_frames: Length of a clip by default.
        sample_size: Height and width in pixels by default.
        fps: Frames per second at which the motion looks as it did in training.
    """

    prediction_type = "sample"
    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
        num_frames: int = 16,
        sample_size: int = 64,
        fps: int = 8,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(num_frames=num_frames, sample_size=sample_size, fps=fps)
        self.video_processor = VideoProcessor(vae_scale_factor=1)

    @property
    def patch_size(self) -> int:
        """Side of a patch (one token) of a frame in pixels."""
        return self.transformer.config.patch_size[1]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        guidance_scale: float = 4.5,
        num_inference_steps: int = 24,
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
        """Generates one clip per prompt.

        Args:
            prompt: One text or B texts, such as "clapping hands".
            guidance_scale: Weight of the prompt against no prompt; 1 or less switches guidance off.
            num_inference_steps: Number of denoising steps.
            num_frames: Number of frames T; the model's own by default.
            height: Frame height in pixels, a multiple of the patch size; the model's own by default.
            width: Frame width in pixels, likewise.
            generator: One generator, or one for each clip, for reproducible noise.
            latents: Start noise [B, 3, T, height, width] instead of a drawn one.
            output_type: "pil", "pt" (tensor [B, T, C, H, W]) or "np" (array [B, T, H, W, C]), values 0 to 1.
            callback_on_step_end: `f(pipeline, step, timestep, tensors) -> tensors` after every step; it may
                replace the tensors that it was given.
            callback_on_step_end_tensor_inputs: Names of the tensors to pass: only "latents" exists.
            return_dict: Whether to return a `PixelWanOutput` instead of a tuple.

        Raises:
            ValueError: If a prompt, a size, the noise or an option does not fit the model.
        """
        prompts = check_prompts(prompt)
        size = clip_size(self, num_frames, height, width)
        self._check_options(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        self._guidance_scale = float(guidance_scale)
        text = self.encode_prompt(prompts)
        sample = self._start_noise((len(prompts), self.transformer.config.in_channels, *size), generator, latents)
        patches = math.prod(self.transformer.config.patch_size)
        self._set_timesteps(num_inference_steps, math.prod(size) // patches)
        sample = self._denoise(sample, text, callback_on_step_end, callback_on_step_end_tensor_inputs)
        frames: Any = self.video_processor.postprocess_video(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        return PixelWanOutput(frames=frames) if return_dict else (frames,)

    def check_inputs(
        self,
        prompt: str | Sequence[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Checks prompts and size, see `__call__`.

        Warns:
            PromptWarning: If a prompt is used, but not as it was written.

        Raises:
            ValueError: If one does not fit the model.
        """
        clip_size(self, num_frames, height, width)
        tokenize(self.tokenizer, check_prompts(prompt))

    def encode_prompt(self, prompts: Sequence[str]) -> torch.Tensor:
        """The encoded prompts [B, tokens, width]; with guidance the null prompt follows for each."""
        ids = tokenize(self.tokenizer, prompts)
        if self.do_classifier_free_guidance:
            ids = torch.cat([ids, null_ids(self.tokenizer, len(prompts))])
        found = encode_tokens(self.text_encoder, ids.to(self._execution_device), self.tokenizer.pad_token_id)
        return found.text.to(self.transformer.dtype)

    def _predict_velocity(self, latents: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self._guided_velocity(
            latents, t, lambda noisy, sigma: predict_clean(self.transformer, noisy, sigma, condition)
        )


def predict_clean(transformer: Any, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The clean clips that the transformer sees behind the noise.

    Args:
        transformer: The model.
        noisy: [B, 3, T, H, W].
        sigma: [B], share of noise, 0 to 1.
        text: [B, tokens, width] of the prompts.

    Returns:
        [B, 3, T, H, W].
    """
    return transformer(noisy, timestep=sigma * TIMES, encoder_hidden_states=text, return_dict=False)[0]
