"""`style_transfer`: draws the content of one picture with the textures and colours of another, without training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch

from visattn.given import real, said, word
from visattn.handle import Handle, apply, check_handle
from visattn.patterns.values import LARGEST_REAL, whole_number
from visattn.pipelines.control.features import Features
from visattn.pipelines.control.injection import RESULT, Injection, Recording, adain
from visattn.pipelines.control.latents import encode, packed, unpacked, why_not
from visattn.pipelines.control.trajectory import Inverted, Noised, Trajectory, inverse_scheduler, plain_scheduler
from visattn.pipelines.guidance.perturbing import chosen_sites
from visattn.pipelines.patch.install import PatchedModel
from visattn.pipelines.patch.sites import Site
from visattn.pipelines.patch.targets import DENOISERS
from visattn.report import Report
from visattn.selectors import Layers

# In pixels.
SIZE = ("height", "width")


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
    mode: Literal["batch", "store"] = "batch",
    memory: float = 8.0,
    generator: torch.Generator | None = None,
    handle: Handle | None = None,
    **options: Any,
) -> Styled:
    """Draw a content in the style of another picture, by injecting the style's keys and values.

    Both pictures are led to noise. From there content, style and result are denoised together, as a batch of three: in
    the chosen layers the result's queries, in part the content's, attend to the keys and values of the style. Content
    and style are put back to their own states after every step. Or, with `mode="store"`, the result is denoised alone,
    with features that content and style left on their way to noise. There is no classifier-free guidance. Chung et al.,
    https://arxiv.org/abs/2312.09008. The form for sequences with text is ours: queries of the grid see the style's grid
    and the result's own text.

    Args:
        pipe: A diffusers pipeline that takes `latents` [B, C, H, W], or packs those as FLUX does, and
            `callback_on_step_end`.
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
        mode: "batch": needs no memory beyond a batch of three. "store", as in the source: the content's queries and the
            style's keys and values are kept for every step, where their pictures pass it on the way to noise (with
            drawn noise: in a run before), so that the result is a batch of one.
        memory: GiB that "store" may take, where the model is.
        generator: Draws the noise.
        handle: That of a pipeline which is patched already: its patterns run in the other layers.
        options: Given to the pipeline; `height` and `width` are the size.

    Returns:
        The picture and the report.

    Raises:
        ValueError: If an option is out of its range, or the pipeline or a chosen layer cannot do it.
    """
    _check(gamma, temperature, steps, start, noise, mode, memory, options)
    for name, value in (("prompt", prompt), ("style_prompt", prompt if style_prompt is None else style_prompt)):
        if not isinstance(value, str):
            raise ValueError(f"{name}={said(value)} must be the text of a prompt")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator={said(generator)} must be a torch.Generator, or None")
    check_handle(handle)
    _check_pipeline(pipe)
    size = {name: whole_number(options[name], name, 1) for name in SIZE if options.get(name) is not None}
    if len(size) < 2:
        raise ValueError("style_transfer needs the size: pass height= and width= in pixels")
    own, applied = handle is None, apply(pipe, "dense") if handle is None else handle
    before = pipe.scheduler
    given = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pil", **options}
    try:
        patched = _denoiser(pipe, applied)
        groups: dict[str, Any] = {site.name.path: site.group for site in _sites(patched, layers)}
        features = Features(steps - start, memory) if mode == "store" else None
        injections = {
            path: Injection(patched.run, group, gamma, temperature, features) for path, group in groups.items()
        }
        runs = _Runs(pipe, patched, given, start, injections)
        if features is not None:
            runs.store(features, {path: Recording(patched.run, group, features) for path, group in groups.items()})
        clean = encode(pipe, [content, style], size)
        prompts = [prompt, prompt if style_prompt is None else style_prompt]
        path: Trajectory
        if noise == "inverted":
            pipe.scheduler = inverse_scheduler(before.config)
            path = Inverted(runs.invert(packed(pipe, clean), prompts))
            both = unpacked(path.at(0, pipe.scheduler), clean.shape)
            # The channels of an inverted white picture may be constant.
            begin = packed(pipe, adain(both[:1], both[1:], 1e-4))
            pipe.scheduler = plain_scheduler(before.config)
        else:
            path = Noised(packed(pipe, clean), packed(pipe, _drawn(clean, generator)))
            pipe.scheduler = plain_scheduler(before.config)
            if mode == "store":
                runs.record(path, prompts)
            begin = path.at(0, None)[:1]
        image = runs.alone(begin, prompt) if mode == "store" else runs.together(path, begin, [*prompts, prompt])
        report = applied.report()
    finally:
        pipe.scheduler = before
        if own:
            applied.remove()
    return Styled(image, report)


class _Runs:
    """The runs of a pipeline for one picture.

    Args:
        pipe: The pipeline.
        patched: Its denoiser.
        given: Options of each run.
        start: How many first steps are not injected.
        injections: What stands for attention modules where styles are injected, by their path.
    """

    def __init__(
        self, pipe: Any, patched: PatchedModel, given: dict[str, Any], start: int, injections: dict[str, Injection]
    ) -> None:
        self._pipe, self._patched, self._given = pipe, patched, given
        self._start, self._injections = start, injections
        self._steps = given["num_inference_steps"]
        self._features: Features | None = None
        self._recordings: dict[str, Recording] | None = None

    def store(self, features: Features, recordings: dict[str, Recording]) -> None:
        """Store content and style in the runs that pass them, instead of having them in the batch."""
        self._features, self._recordings = features, recordings

    def invert(self, latents: torch.Tensor, prompts: list[str]) -> list[torch.Tensor]:
        """The states from clean to noise of content and style; stores them where that is asked for."""
        states = [latents]

        def keep(done: int, latents: torch.Tensor) -> torch.Tensor:
            states.append(latents)
            return latents

        # The last step towards noise is at the time of the first one from it.
        modules, last = self._recordings, self._steps - 1
        self._run(latents, prompts, modules, lambda done: last - done, keep, output_type="pt")
        return states

    def record(self, path: Trajectory, prompts: list[str]) -> None:
        """Store content and style in a run of their own."""
        self._run(path.at(0, None), prompts, self._recordings, put=self._put_back(path), output_type="pt")

    def together(self, path: Trajectory, begin: torch.Tensor, prompts: list[str]) -> Any:
        """The result, denoised beside content and style."""
        latents = torch.cat([path.at(0, None), begin])
        return self._injected(latents, prompts, self._put_back(path))[RESULT]

    def alone(self, begin: torch.Tensor, prompt: str) -> Any:
        """The result, with what was stored."""
        return self._injected(begin, [prompt])[0]

    def _put_back(self, path: Trajectory) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Content and style stay on their path."""

        def put_back(done: int, latents: torch.Tensor) -> torch.Tensor:
            return torch.cat([path.at(done, self._pipe.scheduler).to(latents), latents[RESULT:]])

        return put_back

    def _injected(self, latents: torch.Tensor, prompts: list[str], put: Any = None) -> Any:
        images = self._run(latents, prompts, self._injections, put=put)
        missed = [path for path, module in self._injections.items() if not module.calls]
        if missed:
            raise ValueError(f"style_transfer: {type(self._patched.model).__name__} did not call {', '.join(missed)}")
        return images

    def _run(
        self,
        latents: torch.Tensor,
        prompts: list[str],
        modules: Mapping[str, Injection | Recording] | None,
        step_of: Callable[[int], int] = lambda done: done,
        put: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Pictures of one run.

        Args:
            latents: What it begins with.
            prompts: One for each sample.
            modules: What stands for attention modules, from step `start` on.
            step_of: Number of a step, counted from noise, after so many that are done.
            put: What takes the place of latents after so many steps.
            options: Of the pipeline.
        """
        here: Any = self._patched.run.here

        def begin(done: int) -> None:
            step = step_of(done)
            here.perturbed = modules if step >= self._start else None
            if self._features is not None:
                self._features.step = step

        def after(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            begin(step + 1)
            return tensors if put is None else {**tensors, "latents": put(step + 1, tensors["latents"])}

        begin(0)
        try:
            return self._pipe(
                prompt=prompts, latents=latents, callback_on_step_end=after, **{**self._given, **options}
            )[0]
        finally:
            here.perturbed = None


def _check(
    gamma: float,
    temperature: float,
    steps: int,
    start: int,
    noise: str,
    mode: str,
    memory: float,
    options: dict[str, Any],
) -> None:
    share = "from 0 to 1, the share of the content's queries: 0.75 is usual"
    real(gamma, "gamma", share, lambda x: 0 <= x <= 1)
    real(temperature, "temperature", "a positive float32 number, 1.5 is usual", lambda x: 0 < x <= LARGEST_REAL)
    whole_number(steps, "steps", 1)
    if whole_number(start, "start", 0) >= steps:
        raise ValueError(f"start={start} and steps={steps} must leave steps to inject in: 0 <= start < steps")
    word(noise, "noise", ("inverted", "drawn"))
    word(mode, "mode", ("batch", "store"))
    real(memory, "memory", "GiB above 0", lambda x: x > 0)
    taken = {"latents", "prompt", "guidance_scale", "num_inference_steps", "callback_on_step_end"} & options.keys()
    if taken:
        raise ValueError(f"style_transfer sets {', '.join(sorted(taken))} itself: leave it out")


def _check_pipeline(pipe: Any) -> None:
    needed = ("prompt", "latents", "guidance_scale", "callback_on_step_end")
    missing = [name for name in needed if name not in inspect.signature(type(pipe).__call__).parameters]
    why = f"takes no {missing[0]}" if missing else ""
    if not why and not hasattr(pipe, "image_processor"):
        why = "has no image processor"
    why = why or why_not(pipe)
    if why:
        raise ValueError(
            f"style_transfer: {type(pipe).__name__} {why}: use Stable Diffusion 1.x to 3, FLUX.1, QwenImage, or one "
            "like these"
        )


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


def _drawn(clean: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    device = clean.device if generator is None else generator.device
    return torch.randn(clean[:1].shape, generator=generator, device=device, dtype=torch.float32).to(clean)
