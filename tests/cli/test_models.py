"""The commands for timm models, and the way to run timm's scripts."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("timm")

import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import visattn.models
import visattn.models.run
from visattn.cli import app
from visattn.models.load import create_with_weights, open_image, read_weights
from visattn.models.measure import compare, create, peak_memory


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_models_lists_backbones_and_swappable_classes():
    found = json.loads(call("models", "--filter", "dinat_s_*", "--json").stdout)
    assert found["backbones"] == {"dinat_s": ["dinat_s_base", "dinat_s_large", "dinat_s_small", "dinat_s_tiny"]}
    assert not any(names for title, names in found.items() if title != "backbones")
    everything = call("models").stdout
    assert "biformer_stl" in everything and "timm.models.beit.Attention" in everything
    shown = call("models", "--filter", "*wan*").stdout
    assert "WanTransformer3DModel" in shown and "FluxTransformer2DModel" not in shown and "biformer" not in shown
    assert "nothing here matches --filter 'gpt*'" in str(call("models", "--filter", "gpt*").exception)


@pytest.fixture
def weights(tmp_path):
    model = timm.create_model("test_vit", num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path


def test_classify(weights):
    given = ("classify", weights / "red.png", "--model", "test_vit", "--checkpoint", weights / "weights.pth", "--json")
    plain = json.loads(call(*given).stdout)
    assert len(plain["classes"]) == 5
    assert abs(sum(entry["probability"] for entry in plain["classes"])) <= 1 + 1e-6
    swapped = json.loads(call(*given, "--pattern", "na(window=3)", "--top", 7).stdout)
    assert len(swapped["classes"]) == 7 and "attention modules ran a pattern" in swapped["report"]
    assert "%" in call(*given[:-1], "--pattern", "na(window=3)").stdout


def test_classify_says_what_is_missing(weights):
    image = weights / "red.png"
    assert "needs weights" in str(call("classify", image, "--model", "test_vit").exception)
    with pytest.raises(ValueError, match="does not exist"):
        read_weights(weights / "none.pth")
    (weights / "bad.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="no checkpoint of tensors only"):
        read_weights(weights / "bad.pth")
    (weights / "bad.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"bad.safetensors is no checkpoint of tensors only"):
        read_weights(weights / "bad.safetensors")
    torch.save([1, 2], weights / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth holds a list, not the tensors of a model by name"):
        read_weights(weights / "list.pth")
    with pytest.raises(ValueError, match="there are no weights of biformer_tiny to download: pass those of a file"):
        create_with_weights("biformer_tiny", None, True, None, None)
    given = ("classify", image, "--model", "test_vit", "--checkpoint", weights / "weights.pth")
    assert "both give weights" in str(call(*given, "--pretrained").exception)
    with pytest.raises(ValueError, match="timm knows no model 'vit_huh'"):
        create_with_weights("vit_huh", None, False, None, None)
    with pytest.raises(ValueError, match="does not fit test_vit2"):
        create_with_weights("test_vit2", weights / "weights.pth", False, None, None)
    with pytest.raises(ValueError, match=r"it has no cls_token.*; the model has no reg_token, .* and \d+ more"):
        create_with_weights("test_vit", weights_of("test_vit2", weights), False, None, None)
    with pytest.raises(ValueError, match=r"other shapes: head.weight is \[7, 64\] instead of \[3, 64\]"):
        create_with_weights("test_vit", weights / "weights.pth", False, None, 3)
    with pytest.raises(ValueError, match=r"image .*none.png does not exist"):
        open_image(weights / "none.png")
    with pytest.raises(ValueError, match="is a folder, not an image"):
        open_image(weights)
    wrong = call("classify", image, "--model", "test_vit", "--checkpoint", weights / "weights.pth", "--size", 97)
    assert "test_vit does not take images of 97 pixels per side: Input height (97)" in str(wrong.exception)
    with pytest.raises(ValueError, match="is no image that can be read"):
        open_image(weights / "weights.pth")


def weights_of(name, folder):
    path = folder / f"{name}.pth"
    torch.save(timm.create_model(name, num_classes=7).state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["test_vit", "test_maxvit", "deit_tiny_distilled_patch16_224", "nat_mini"])
def test_the_classes_are_those_of_the_checkpoint(name, tmp_path):
    assert create_with_weights(name, weights_of(name, tmp_path), False, None, None).num_classes == 7


def test_a_checkpoint_of_another_image_size_is_resampled(weights):
    model = create_with_weights("test_vit", weights / "weights.pth", False, 96, None)
    own = torch.load(weights / "weights.pth", weights_only=True)["model"]
    assert model.pos_embed.shape == (1, 37, 64) and own["pos_embed"].shape == (1, 101, 64)
    assert torch.equal(model.head.weight, own["head.weight"])
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_bench_model(tmp_path):
    out = call(
        *("bench-model", "test_vit", "--size", "96,160", "--pattern", "na(window=3)", "--repeats", 1),
        *("--device", "cpu", "--save", tmp_path / "a.json", "--plot", tmp_path / "a.png"),
    )
    assert out.exit_code == 0 and "swapped" in out.stdout
    found = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [result["tokens"] for result in found] == [37, 101]
    for result in found:
        assert 0 < result["swapped"]["flops"] < result["stock"]["flops"]
        assert result["density"] < 1 and result["stock"]["seconds"]["median"] > 0
    assert Image.open(tmp_path / "a.png").size[0] > 100
    assert "--size 'big' must be whole numbers" in str(
        call("bench-model", "test_vit", "--pattern", "na(window=3)", "--size", "big").exception
    )


def test_operations_of_a_swapped_model_are_those_of_visible_pairs():
    result = compare("test_vit", 96, "na(window=3)", repeats=1)
    heads_times_width = 64 * 6  # of all layers together
    hidden = (1 - result.density) * 37**2
    assert result.stock.flops - result.swapped.flops == pytest.approx(4 * heads_times_width * hidden)


def test_windowed_models_are_not_compared_with_dense_attention(tmp_path):
    picture = tmp_path / "a.png"
    given = (
        "bench-model",
        "test_maxvit",
        "--size",
        128,
        "--pattern",
        "na(window=3)",
        "--repeats",
        1,
        "--device",
        "cpu",
    )
    out = call(*given, "--save", tmp_path / "a.json", "--plot", picture)
    assert out.exit_code == 0 and "not dense" in out.stdout and Image.open(picture).size[0] > 100
    (found,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert found["stock"]["attention"] is None and found["swapped"]["attention"]["median"] > 0
    # 9 visible keys of a query instead of 16: products of the block half shrink, the rest stays.
    assert 0.9 * found["stock"]["flops"] < found["swapped"]["flops"] < found["stock"]["flops"]


def test_bench_model_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"timm knows no model 'test_vi': did you mean .*test_vit"):
        create("test_vi", 224)
    with pytest.raises(
        ValueError, match=r"no model 'vit_tiny': did you mean vit_tiny_\w+ or vit_tiny_\w+ or vit_tiny_\w+\?"
    ):
        create("vit_tiny", 224)
    with pytest.raises(ValueError, match="test_vit does not take images of 97 pixels per side"):
        compare("test_vit", 97, "na(window=3)", repeats=1)
    with pytest.raises(ValueError, match="dense ran nowhere in test_vit at 96 pixels"):
        compare("test_vit", 96, "dense", repeats=1)


def test_sizes_are_checked_before_any_is_measured():
    out = call("bench-model", "test_vit", "--size", "96,97", "--pattern", "na(window=3)", "--device", "cpu")
    assert "test_vit does not take images of 97 pixels" in str(out.exception)
    assert "at 96 x 96 pixels" not in out.output


def test_too_little_memory_is_said_and_keeps_what_was_measured(tmp_path, monkeypatch):
    def peak(run, device):
        if len(calls) >= 2:
            raise RuntimeError("can't allocate memory")
        calls.append(run)

    calls = []
    monkeypatch.setattr("visattn.models.measure.peak_memory", peak)
    given = ("bench-model", "test_vit", "--pattern", "na(window=3)", "--repeats", 1, "--device", "cpu")
    assert "test_vit at 96000000 pixels needs more memory" in str(call(*given, "--size", 96_000_000).exception)
    out = call(*given, "--size", "96,112", "--save", tmp_path / "a.json")
    assert out.exit_code == 0 and "the sizes before it are reported" in out.output
    assert [result["size"] for result in json.loads((tmp_path / "a.json").read_text())["results"]] == [96]
    assert "test_vit at 96 pixels needs more memory than there is on cpu" in str(call(*given, "--size", 96).exception)


def test_peak_memory():
    megabytes = peak_memory(lambda: torch.zeros(2**24), "cpu")
    if megabytes is None:
        pytest.skip("this system does not tell")
    assert 2**26 * 0.9 < megabytes < 2**26 * 1.5


def test_run_registers_the_backbones_for_a_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "beside.py").write_text("WORD = 'beside'")
    (tmp_path / "script.py").write_text(
        "import sys, timm, beside\nprint(timm.is_model('nat_tiny'), sys.argv[1:], __name__, beside.WORD)"
    )
    command = [sys.executable, "-m", "visattn.models.run", str(tmp_path / "script.py"), "--model", "x"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.stdout == "True ['--model', 'x'] __main__ beside\n"
    for given, status in (["none.py"], "visattn.models.run: none.py is not a file; usage"), ([], "2"), (["-h"], "0"):
        monkeypatch.setattr(sys, "argv", ["run.py", *given])
        with pytest.raises(SystemExit, match=status):
            visattn.models.run.main()
    assert capsys.readouterr().out == 2 * f"{visattn.models.run.USAGE}\n"


def test_every_backbone_is_registered():
    assert timm.is_model("nat_mini") and timm.is_model("moh_vit_small_80") and visattn.models.__all__


@pytest.fixture
def folder(tmp_path):
    """A tiny classifier of transformers as `save_pretrained` writes it, and an image."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(**sizes, image_size=48, patch_size=8, id2label={0: "red", 1: "LABEL_1"})
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "vit")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path


def test_classify_with_a_model_of_transformers(folder):
    given = ("classify", folder / "red.png", "--model", folder / "vit", "--json")
    plain = json.loads(call(*given).stdout)
    assert {entry["name"] for entry in plain["classes"]} == {"red", ""}
    assert sum(entry["probability"] for entry in plain["classes"]) == pytest.approx(1)
    swapped = json.loads(call(*given, "--pattern", "na(window=3)").stdout)
    assert "2 of 2 attention modules ran a pattern" in swapped["report"]
    assert "leave --checkpoint and --classes out" in str(call(*given, "--classes", 3).exception)
    assert "pass --pretrained to download it" in str(call(*given[:2], "--model", "some/repository").exception)
    (folder / "vit" / "model.safetensors").unlink()
    assert "no classifier of images that transformers loads from safetensors" in str(call(*given).exception)


def test_bench_model_of_transformers():
    result = compare("transformers:segformer", 64, "na(window=3)", repeats=1)
    assert result.tokens == 4 and result.density == 1
    for kind, meant in (("dinov3", "did you mean .*dinov3_vit"), ("qqq", "visattn models has the towers")):
        with pytest.raises(ValueError, match=f"transformers makes no model of type '{kind}': {meant}"):
            create(f"transformers:{kind}", 64)
    with pytest.raises(ValueError, match="takes more than images, or videos"):
        create("transformers:clip", 64, device="meta")


def test_towers_of_transformers_are_listed():
    found = json.loads(call("models", "--json").stdout)
    assert found["transformers"]["vit"] == "ViT" and "vit_mae" not in found["transformers"]
    assert {"vit_mae", "dinat"} <= set(found["no pattern"])
    assert "V-JEPA 2: the encoder" in call("models").stdout


def test_weights_that_cannot_be_downloaded_are_told_for_models_of_one_size_too(monkeypatch):
    def created(name, pretrained, **kwargs):
        raise TypeError("no argument img_size") if "img_size" in kwargs else OSError("no network")

    monkeypatch.setattr("timm.create_model", created)
    for size in (None, 96):
        with pytest.raises(ValueError, match=r"weights of resnet18 cannot be had \(no network\): pass .* --checkpoint"):
            create_with_weights("resnet18", None, True, size, None)
    with pytest.raises(OSError, match="no network"):
        create_with_weights("resnet18", None, False, None, None)
