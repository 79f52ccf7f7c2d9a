"""`style_transfer`: draws the content of one picture with the textures and colours of another, without training."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, NamedTuple

import torch

from visattn.handle import Handle, apply
from visattn.pipelines.control.injection import RESULT, Injection, adain
from visattn.pipelines.control.trajectory import Inverted, Noised, Trajectory, inverse_scheduler, plain_scheduler
from visattn.pipelines.guidance.perturbing import chosen_sites
from visattn.pipelines.patch.install import PatchedModel
from visattn.pipelines.patch.sites import Site
from visattn.pipelines.patch.targets import DENOISERS
from visattn.report import Report
from visattn.selectors import Layers


class Styled(NamedTuple):
    """What `style_transfer` made.

    Attributes:
        image: The picture, as the pipeline gives pictures.
        report: What ran where; modules that inject are dense, for the reason "style injection".
    """

    image: Any
    report: Report


def style_transfer(
    pipe: Any,
    content: Any,
    style: Any,
    *,
    gamma: float = 0.75,
    temperature: float = 1.5,
    layers: Layers = None,
    steps: int = 50,
    start: int = 1,
    prompt: str = "",
    style_prompt: str | None = None,
    noise: Literal["inverted", "drawn"] = "inverted",
    generator: torch.Generator | None = None,
    handle: Handle | None = None,
    **options: Any,
) -> Styled:
    """Draw a content in the style of another picture, by injecting the style's keys and values.

    Both pictures are led to noise. From there content, style and result are denoised together, as a batch of three: in
    the chosen layers the result's queries, in part the content's, attend to the keys and values of the style. Content
    and style are put back to their own states after every step. There is no classifier-free guidance. Chung et al.,
    https://arxiv.org/abs/2312.09008. The form for sequences with text is ours: queries of the grid see the style's grid
    and the result's own text.

    Args:
        pipe: A diffusers pipeline that takes `latents` [B, C, H, W] and `callback_on_step_end`.
        content: A picture, as the pipeline's image processor takes it.
        style: Another one; both are brought to the same size.
        gamma: Share of the content's queries, from 0 to 1; less is more style.
        temperature: Factor on the logits of what is injected.
        layers: Which layers, as in `apply`; None for those of a UNet's up blocks but for the first with attention, and
            for the later half of a transformer's.
        steps: Denoising steps.
        start: How many first steps are not injected.
        prompt: Of the content and the result; the source uses none.
        style_prompt: Of the style, `prompt` if None.
        noise: "inverted": the noise of DDIM inversion, or of Euler steps backwards, and its statistics are moved to
            those of the style's. "drawn": drawn noise for all (ours), for models whose inversion finds none.
        generator: Draws the noise.
        handle: That of a pipeline which is patched already: its patterns run in the other layers.
        options: Given to the pipeline; `height` and `width` are the size.

    Returns:
        The picture and the report.

    Raises:
        ValueError: If an option is out of its range, or the pipeline or a chosen layer cannot do it.
    """
    _check(gamma, temperature, steps, start, noise, options)
    _check_pipeline(pipe)
    own, applied = handle is None, apply(pipe, "dense") if handle is None else handle
    before = pipe.scheduler
    try:
        patched = _denoiser(pipe, applied)
        modules = {
            site.name.path: Injection(patched.run, site.group, gamma, temperature)  # type: ignore[arg-type]
            for site in _sites(patched, layers)
        }
        prompts = [prompt, prompt if style_prompt is None else style_prompt]
        given = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pil", **options}
        clean = _encoded(pipe, [content, style], given)
        config = before.config
        path: Trajectory
        if noise == "inverted":
            pipe.scheduler = inverse_scheduler(config)
            path = Inverted(_inverted(pipe, clean, prompts, given))
            both = path.at(0, pipe.scheduler)
            # The channels of an inverted white picture may be constant.
            begin = adain(both[:1], both[1:], 1e-4)
        else:
            path = Noised(clean, _drawn(clean, generator))
            both = path.at(0, None)
            begin = both[:1]
        pipe.scheduler = plain_scheduler(config)
        images = _denoised(pipe, patched, modules, path, torch.cat([both, begin]), [*prompts, prompt], given, start)
        report = applied.report()
    finally:
        pipe.scheduler = before
        if own:
            applied.remove()
    return Styled(images[RESULT], report)


def _check(gamma: float, temperature: float, steps: int, start: int, noise: str, options: dict[str, Any]) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} must be from 0 to 1, the share of the content's queries: 0.75 is usual")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be a positive number, 1.5 is usual")
    if steps < 1 or not 0 <= start < steps:
        raise ValueError(f"start={start} and steps={steps} must leave steps to inject in: 0 <= start < steps")
    if noise not in ("inverted", "drawn"):
        raise ValueError(f"noise={noise!r} must be 'inverted' or 'drawn'")
    taken = {"latents", "prompt", "guidance_scale", "num_inference_steps", "callback_on_step_end"} & options.keys()
    if taken:
        raise ValueError(f"style_transfer sets {', '.join(sorted(taken))} itself: leave it out")


def _check_pipeline(pipe: Any) -> None:
    needed = ("prompt", "latents", "guidance_scale", "callback_on_step_end")
    missing = [name for name in needed if name not in inspect.signature(type(pipe).__call__).parameters]
    why = f"takes no {missing[0]}" if missing else ""
    if not why and not hasattr(pipe, "image_processor"):
        why = "has no image processor"
    if not why and hasattr(pipe, "_pack_latents"):
        why = "packs its latents, so that they are no [B, C, H, W]"
    if why:
        raise ValueError(f"style_transfer: {type(pipe).__name__} {why}: use Stable Diffusion 1.x to 3 or one like it")


def _denoiser(pipe: Any, handle: Handle) -> PatchedModel:
    models = [getattr(pipe, name, None) for name in DENOISERS]
    found = [each for each in handle.patches if isinstance(each, PatchedModel)]
    found = [each for each in found if any(each.model is model for model in models)]
    if len(found) != 1:
        raise ValueError(f"style_transfer needs a pipeline with one denoiser, {type(pipe).__name__} has {len(found)}")
    if hasattr(found[0].model, "_orig_mod") or getattr(found[0].model, "_compiled_call_impl", None) is not None:
        raise ValueError("style_transfer: the model is compiled, which hides its attention modules: give it uncompiled")
    return found[0]


def _sites(patched: PatchedModel, layers: Layers) -> list[Site]:
    """The modules that inject."""
    if layers is None:
        names = list(dict.fromkeys(site.name.layer for site in patched.sites))
        ups = [name for name in names if name.startswith("up_blocks.")]
        first = min((int(name.split(".")[1]) for name in ups), default=0)
        later = [name for name in ups if int(name.split(".")[1]) > first]
        layers = later or names[len(names) // 2 :]
    return [site for site, _ in chosen_sites(patched, layers, None)]


def _encoded(pipe: Any, pictures: list[Any], given: dict[str, Any]) -> torch.Tensor:
    """Clean latents [2, C, H, W] of content and style."""
    size = {name: given[name] for name in ("height", "width") if given.get(name) is not None}
    if len(size) < 2:
        raise ValueError("style_transfer needs the size: pass height= and width= in pixels")
    model = next(getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None)
    processed = [pipe.image_processor.preprocess(picture, **size) for picture in pictures]
    both = torch.cat(processed).to(device=pipe._execution_device, dtype=model.dtype)
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return both
    with torch.no_grad():
        encoded = vae.encode(both.to(vae.dtype))
    found = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((found - shift) * vae.config.scaling_factor).to(model.dtype)


def _drawn(clean: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    device = clean.device if generator is None else generator.device
    return torch.randn(clean[:1].shape, generator=generator, device=device, dtype=torch.float32).to(clean)


def _inverted(pipe: Any, clean: torch.Tensor, prompts: list[str], given: dict[str, Any]) -> list[torch.Tensor]:
    """The states from clean to noise."""
    states = [clean]

    def keep(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        states.append(tensors["latents"])
        return tensors

    pipe(prompt=prompts, latents=clean, callback_on_step_end=keep, **{**given, "output_type": "pt"})
    return states


def _denoised(
    pipe: Any,
    patched: PatchedModel,
    modules: dict[str, Injection],
    path: Trajectory,
    latents: torch.Tensor,
    prompts: list[str],
    given: dict[str, Any],
    start: int,
) -> Any:
    """Pictures of content, style and result."""
    here: Any = patched.run.here

    def put_back(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        here.perturbed = modules if step + 1 >= start else None
        both = path.at(step + 1, pipe.scheduler).to(tensors["latents"])
        return {**tensors, "latents": torch.cat([both, tensors["latents"][RESULT:]])}

    here.perturbed = modules if start == 0 else None
    try:
        found = pipe(prompt=prompts, latents=latents, callback_on_step_end=put_back, **given)[0]
    finally:
        here.perturbed = None
    missed = [path for path, module in modules.items() if not module.calls]
    if missed:
        raise ValueError(f"style_transfer: {type(patched.model).__name__} did not call {', '.join(missed)}")
    return found
