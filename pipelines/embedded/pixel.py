"""What the pipelines that work on pixels share: options, noise, guidance, the denoising loop; and class labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "pt", "np")
Generators = torch.Generator | list[torch.Generator] | None
StepCallback = Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


class PixelPipeline(DiffusionPipeline):
    """Flow matching in pixel space, from -1 (black) to 1 (white), with classifier-free guidance.

    A subclass registers `transformer` and `scheduler` and says how the transformer predicts a velocity under its
    condition: class labels (`ClassPipeline`) or encoded prompts.
    """

    # What the transformer predicts: "flow_prediction" (the velocity) or "sample" (the clean picture).
    prediction_type = "flow_prediction"
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ("latents",)

    def __init__(self) -> None:
        super().__init__()
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    def _predict_velocity(self, latents: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        """Velocity (noise minus sample), shaped like `latents`, at one scheduler time t, guided if guidance is on."""
        raise NotImplementedError

    def _guided_velocity(
        self, latents: torch.Tensor, t: torch.Tensor, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The velocity of a transformer that predicts clean samples, guided if guidance is on.

        Args:
            latents: [B, ...].
            t: The scheduler's time.
            predict: Clean samples of noisy ones and their shares of noise [N]; with guidance the latents come twice,
                for the prompts and for no prompt.
        """
        guided = self.do_classifier_free_guidance
        noisy = torch.cat([latents, latents]) if guided else latents
        sigma = t / self.scheduler.config.num_train_timesteps
        clean = predict(noisy, sigma.expand(len(noisy)))
        if guided:
            conditional, unconditional = clean.chunk(2)
            clean = unconditional + self._guidance_scale * (conditional - unconditional)
        return (latents - clean) / sigma

    @property
    def patch_size(self) -> int:
        """Side of a patch (one token) in pixels."""
        raise NotImplementedError

    def pack_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the transformer takes them; here it takes them as they are."""
        return latents

    def check_inputs(self, *args: Any, **arguments: Any) -> None:
        """Checks what a call is to make, with arguments of the same names, before any work.

        Raises:
            ValueError: If the model cannot make it.
        """
        raise NotImplementedError

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step also runs the null condition."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the current or last call."""
        return self._num_timesteps

    def _set_timesteps(self, num_inference_steps: int, tokens: int) -> None:
        """Sets the scheduler up for the number of tokens, which only dynamic shifting depends on."""
        config = self.scheduler.config
        mu = None
        if config.use_dynamic_shifting:
            # Averaging more pixels hides more noise: the shift grows with the root of their number, so mu with its log.
            mu = config.base_shift + 0.5 * math.log(tokens / config.base_image_seq_len)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device, mu=mu)

    def _denoise(
        self,
        sample: torch.Tensor,
        condition: Any,
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ) -> torch.Tensor:
        """Runs every step of the scheduler, which has been set up, from noise to a clean float32 sample.

        `condition` is what `_predict_velocity` takes: labels, or in a subclass something else.
        """
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        progress_bar = cast(Any, self).progress_bar
        with progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                velocity = self._predict_velocity(sample, t, condition)
                sample = self.scheduler.step(velocity, t, sample, return_dict=False)[0]
                if callback is not None:
                    tensors = dict.fromkeys(tensor_inputs, sample)
                    sample = (callback(self, i, t, tensors) or {}).get("latents", sample)
                progress.update()
        return sample.float()

    def _start_noise(self, shape: tuple[int, ...], generator: Generators, latents: torch.Tensor | None) -> torch.Tensor:
        """Start noise of this shape on the pipeline's device, in the transformer's type."""
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            if isinstance(generator, list) and len(generator) != shape[0]:
                raise ValueError(f"{len(generator)} generators for {shape[0]} labels: pass one, or one for each label")
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape} for these labels and size")
        return latents.to(device=device, dtype=dtype)

    def _check_options(self, steps: int, output_type: str, tensor_inputs: Sequence[str]) -> None:
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}: pass 1 or more")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} does not exist: pass one of {', '.join(OUTPUT_TYPES)}")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback tensor {unknown[0]!r} does not exist: pass names from ('latents',)")


class ClassPipeline(PixelPipeline):
    """A `PixelPipeline` whose condition is class labels; the index of the null class is `num_classes`.

    A subclass says how many classes there are and how the transformer predicts a velocity for labels.
    """

    @property
    def num_classes(self) -> int:
        """Number of real classes; it is also the index of the null class."""
        raise NotImplementedError

    def _velocity(self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Velocity (noise minus sample), shaped like `latents`, at times t [B] from 0 to 1000 for labels [B]."""
        raise NotImplementedError

    def _predict_velocity(self, latents: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See `PixelPipeline._predict_velocity`; the condition is labels [B]."""
        if not self.do_classifier_free_guidance:
            return self._velocity(latents, t.expand(len(condition)), condition)
        both = torch.cat([condition, torch.full_like(condition, self.num_classes)])
        stacked = self._velocity(torch.cat([latents, latents]), t.expand(len(both)), both)
        conditional, unconditional = stacked.chunk(2)
        return unconditional + self._guidance_scale * (conditional - unconditional)

    def _check_labels(self, class_labels: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        if labels.numel() == 0 or labels.is_floating_point():
            raise ValueError(f"class_labels must be one or more whole numbers, got {class_labels!r}")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)].tolist()
        if wrong:
            raise ValueError(f"class label {wrong[0]} does not exist: pass labels from 0 to {self.num_classes - 1}")
        return labels.long()
