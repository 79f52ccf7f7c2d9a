"""Runs the Python blocks of pages, each in one namespace, as a reader would: python -m tests.docs.run_page PAGE ...

Where a page loads a model of many gigabytes, it gets a tiny random one of the same class; everything else is real. Each
page runs in a process of its own, since pages register patterns and the like for all. They fork from one that
has imported what takes seconds. Prints what went wrong as JSON: the traceback of each page, "" for none.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import timm
import torch
import transformers

from scripts.pages import blocks
from tests.support import tiny_pipelines, tiny_towers
from visattn.dispatch import BACKENDS, load

STEPS = 6
BUILDERS = {
    "FluxPipeline": tiny_pipelines.flux,
    "StableDiffusionPipeline": tiny_pipelines.stable_diffusion,
    "StableDiffusion3Pipeline": tiny_pipelines.stable_diffusion3,
    "WanPipeline": tiny_pipelines.wan,
    "HunyuanVideoPipeline": tiny_pipelines.hunyuan_video,
    "CogVideoXPipeline": tiny_pipelines.cogvideox,
}
# What most pages import where they first need it; not `visattn.models`, whose import is what registers its backbones.
IMPORTED = [
    *("handle", "pipelines.patch", "pipelines.guidance", "pipelines.control"),
    "pipelines.embedded.pixel_flux",
]

LOAD = diffusers.DiffusionPipeline.from_pretrained.__func__


def here(to):
    """A pipeline's `to`, on machines without the GPU that a page's reader has."""

    def moved(self, *args, **given):
        left = [each for each in args if each != "cuda" or torch.cuda.is_available()]
        return to(self, *left, **given) if left or given else self

    return moved


def tiny_pipeline(kind, name, **options):
    """In place of `DiffusionPipeline.from_pretrained`: a tiny pipeline of the class, which makes tiny pictures.

    Models that ship with the package are the real ones.
    """
    if Path(name).is_dir():
        return LOAD(kind, name, **options)
    if kind.__name__ not in BUILDERS:
        raise ValueError(f"{kind.__name__} of {name} has no tiny stand-in: add one to tests/support/tiny_pipelines.py")
    pipeline, size = BUILDERS[kind.__name__]()

    def call(self, *args, **given):
        given.pop("num_frames", None)
        steps = min(STEPS, given.pop("num_inference_steps", STEPS))
        return kind.__call__(self, *args, **{**given, **size, "num_inference_steps": steps})

    pipeline.__class__ = type(
        kind.__name__, (kind,), {"__call__": call, "to": here(kind.to), "__module__": kind.__module__}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(options["torch_dtype"]) if "torch_dtype" in options else pipeline


def untrained(create):
    """In place of `timm.create_model`: transformers of two layers without a download."""

    def create_model(name, pretrained=False, **options):
        if name.startswith(("vit_", "deit")):
            options.setdefault("depth", 2)
        return create(name, pretrained=False, **options)

    return create_model


def tiny_tower(kind, name, **options):
    """In place of `AutoModel.from_pretrained`: a tiny tower of the family."""
    return tiny_towers.make(name.rpartition("/")[2].rpartition("-")[0], **options)


def stand_in_modular():
    """The same for modular pipelines of FLUX, which load their components apart."""
    blocks, modular = diffusers.ModularPipelineBlocks, diffusers.ModularPipeline
    made, called = blocks.init_pipeline, modular.__call__

    def load(self, **options):
        tiny, self.tiny_size = BUILDERS["FluxPipeline"]()
        self.update_components(
            **{name: tiny.components[name] for name in self.component_names if name in tiny.components}
        )
        self.to(options["torch_dtype"])

    def call(self, *args, **given):
        return called(self, *args, **{**given, **self.tiny_size, "num_inference_steps": STEPS})

    blocks.init_pipeline = lambda self, *_: made(self)
    modular.load_components, modular.__call__, modular.to = load, call, here(modular.to)


def import_ahead():
    """Import here, once, what forks of this process would import each for itself."""
    for name in IMPORTED:
        importlib.import_module(f"visattn.{name}")
    for name in BACKENDS.own:
        load(name)
    for name in BUILDERS:
        getattr(diffusers, name)


def stand_in():
    """Put tiny models in the places where pages load large ones."""
    diffusers.DiffusionPipeline.from_pretrained = classmethod(tiny_pipeline)
    stand_in_modular()
    timm.create_model = untrained(timm.create_model)
    transformers.AutoModel.from_pretrained = classmethod(tiny_tower)


def run(page):
    """Run a page here; an error's traceback has the page's own line."""
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language in ("python", "py"):
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def in_child(page):
    """Run a page in a forked process and an empty folder; returns its traceback, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "error")
        child = os.fork()
        if not child:
            status = 1
            try:
                os.chdir(tempfile.mkdtemp(dir=folder))
                with contextlib.redirect_stdout(io.StringIO()):
                    run(page)
                status = 0
            except BaseException:
                said.write_text(traceback.format_exc())
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        return said.read_text() if said.exists() else f"ended by {status}" * bool(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_ahead()
    stand_in()
    print(json.dumps({page: in_child(Path(page)) for page in sys.argv[1:]}))
