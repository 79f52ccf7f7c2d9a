"""Swapped models written down for other programs: torch.jit.trace, ONNX, torch.export."""

import io

import pytest

pytest.importorskip("timm")

import timm
import torch

import visattn
import visattn.models
from tests.models.test_generic import LIKE_OTHERS, SMALL

pytestmark = pytest.mark.filterwarnings("ignore")

PATTERNS = [
    "na(window=3x3)",
    "clear(radius=3, pool=2)",
    "routing(regions=3x3, topk=2)",
    "agent(agents=3x3)",
    "linear(feature=hedgehog)",
    "sigmoid(sparse=na(window=3x3))",
]
REFUSED = "this call cannot be exported, for it needs kernels of its own"


@pytest.fixture(autouse=True)
def _nothing_kept():
    # What an exporter finds kept is a constant; what it makes has to be one.
    visattn.clear_caches()


def vit(pattern, **options):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=96, num_classes=5, **options).eval()
    visattn.apply(model, pattern, backend="tiles" if pattern.startswith("na") else "auto")
    return model


@pytest.mark.parametrize(("pattern", "grad"), [(PATTERNS[0], True), *((pattern, False) for pattern in PATTERNS)])
def test_a_saved_trace_runs_batches_of_any_size(pattern, grad):
    model, file = vit(pattern), io.BytesIO()
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(model, torch.randn(2, 3, 96, 96), check_trace=False), file)
    file.seek(0)
    images = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        assert (torch.jit.load(file)(images) - model(images)).abs().max() < 1e-5


def onnx_outputs(model, images, folder):
    """What onnxruntime gives for batches that the exporter has not seen."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    file, batch = folder / "model.onnx", {0: torch.export.Dim("batch")}
    torch.onnx.export(
        model, (images[:2] + 1,), file, dynamo=True, opset_version=18, verbose=False, dynamic_shapes=(batch,)
    )
    session = onnxruntime.InferenceSession(file)
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(out)


@pytest.mark.parametrize("pattern", ["na(window=3x3)", "routing(regions=3x3, topk=2)"])
def test_onnx_with_batches_of_any_size(pattern, tmp_path):
    model, images = vit(pattern), torch.randn(3, 3, 96, 96)
    out = onnx_outputs(model, images, tmp_path)
    with torch.no_grad():
        assert (out - model(images)).abs().max() < 1e-5


def backbone(name):
    """A small one with weights at which its images differ, and images that it pads."""
    torch.manual_seed(0)
    # A second block is of another kind only in the second stage.
    deep = [key for key in ("depth", "depths") if isinstance(SMALL[name].get(key), tuple)]
    depths = {key: (1, SMALL[name][key][1], 1, 1) for key in deep}
    dilations = {"dilations": ((2,), (3,), (2,), (1,))} if "dilations" in SMALL[name] else {}
    model = timm.create_model(name, **{**SMALL[name], **depths, **dilations}, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model, torch.randn(3, 3, 64, 96)


def same(found, model, images):
    visattn.clear_caches()
    with torch.no_grad():
        wanted = model(images)
    assert wanted.std(0).max() > 1e-3, "the images are told apart"
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


QUICK = ("nat_small", "biformer_tiny", "agent_deit_base")


def each(quick):
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
    return pytest.mark.parametrize("name", names)


@each(set(SMALL).difference(LIKE_OTHERS))
def test_backbones_export_with_batches_of_any_size(name):
    model, images = backbone(name)
    with torch.no_grad():
        program = torch.export.export(model, (images[:2] + 1,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        same(program.module()(images), model, images)


@each(QUICK)
def test_saved_traces_of_backbones_run_batches_of_any_size(name):
    (model, images), file = backbone(name), io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, images[:2] + 1, check_trace=False), file)
        file.seek(0)
        same(torch.jit.load(file)(images), model, images)


# Those without a grid that is a constant of the program.
OPEN = ("mavit_base", "flowformer_small")


@each((*QUICK, OPEN[1]))
def test_backbones_take_images_of_any_size_or_refuse_to_be_exported(name):
    model, images = backbone(name)
    sides = {i: 32 * torch.export.Dim(axis, min=1, max=8) for i, axis in ((2, "rows"), (3, "columns"))}
    with torch.no_grad():
        if name in OPEN:
            program = torch.export.export(model, (images,), dynamic_shapes=(sides,))
            larger = torch.randn(3, 3, 128, 96)
            same(program.module()(larger), model, larger)
            return
        with pytest.raises(ValueError, match="the pattern of an exported program is that of one grid"):
            torch.export.export(model, (images,), dynamic_shapes=(sides,))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_backbones_in_onnxruntime(name, tmp_path):
    model, images = backbone(name)
    with torch.no_grad():
        out = onnx_outputs(model, images, tmp_path)
    same(out, model, images)


def test_what_has_no_plain_form_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=REFUSED):
        torch.jit.trace(vit("sparselinear(sparse=na(window=3x3))"), torch.randn(1, 3, 96, 96), check_trace=False)


def test_torch_export_keeps_the_operator_and_refuses_images_of_any_size():
    model, images = vit("na(window=3x3)", dynamic_img_size=True), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        assert [str(node.target) for node in program.graph.nodes].count("visattn.attend.default") == 1
        assert torch.equal(program.module()(images), model(images))
    height, width = (16 * torch.export.Dim(name, min=4, max=12) for name in ("rows", "columns"))
    with pytest.raises(ValueError, match="the pattern of an exported program is that of one grid"):
        torch.export.export(model, (images,), dynamic_shapes={"x": {2: height, 3: width}})


@torch.no_grad()
def test_scripting_is_refused_with_the_way():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=96).eval()
    x = torch.randn(1, 3, 96, 96)
    with visattn.apply(model, "na(window=5x5)"), pytest.raises(ValueError, match=r"blocks\.0\.attn.*torch\.jit\.trace"):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
