"""Plain diffusers loads folders of the embedded pipelines once visattn is imported, in either order."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn import discovery
from visattn.pipelines.embedded import EMBEDDED

CLASSES = [model.pipeline.split(":")[1] for model in EMBEDDED.values()]


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_diffusers_loads_the_shipped_folders(name):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(EMBEDDED[name].folder, local_files_only=True)
    assert f"{type(pipeline).__module__}:{type(pipeline).__name__}" == EMBEDDED[name].pipeline


def test_a_saved_pipeline_makes_the_same_picture(tmp_path):
    pipeline = tiny_pixel_flux()
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "output_type": "pt"}
    first, second = (p("rocket", generator=torch.Generator().manual_seed(0), **options) for p in (pipeline, again))
    torch.testing.assert_close(first.images, second.images, atol=1e-5, rtol=1e-4)


def test_diffusers_keeps_its_own_names_and_errors():
    for name in CLASSES:
        assert getattr(diffusers, name).__name__ == name
    assert diffusers.FluxPipeline.__name__ == "FluxPipeline"
    for name in ("PixelNothing", "nothing"):
        with pytest.raises(AttributeError, match=f"module '?diffusers'? has no attribute '?{name}"):
            getattr(diffusers, name)


def test_installing_again_adds_no_second_finder():
    discovery.install()
    discovery.install()
    assert sum(isinstance(finder, discovery.AfterImport) for finder in sys.meta_path) == 1


@pytest.mark.parametrize("order", [("visattn", "library"), ("library", "visattn")])
def test_either_order_of_imports(tmp_path, order):
    package = tmp_path / "diffusers"
    package.mkdir()
    # As the library does it: an object of its own class takes the place of the module.
    (package / "__init__.py").write_text(
        """
import sys
from types import ModuleType


class Lazy(ModuleType):
    def __getattr__(self, name):
        if name == "Own":
            return "own"
        raise AttributeError(f"module {self.__name__} has no attribute {name}")


lazy = Lazy(__name__)
lazy.__spec__ = __spec__
sys.modules[__name__] = lazy
"""
    )
    imports = "; ".join(f"import {'diffusers' if name == 'library' else name}" for name in order)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
{imports}
assert diffusers.__spec__.origin.startswith({str(tmp_path)!r})
assert diffusers.Own == "own" and not hasattr(diffusers, "Other")
assert not hasattr(diffusers, "PixelNothing") and "torch" not in sys.modules
from visattn import discovery
sys.modules["visattn.pipelines.embedded.pixel_flux"] = type(sys)("fake")
sys.modules["visattn.pipelines.embedded.pixel_flux"].PixelFluxPipeline = "found"
assert diffusers.PixelFluxPipeline == "found"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
