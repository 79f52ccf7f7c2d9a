"""Layers of vLLM-Omni with the backend "VISATTN" against masked dense attention; `test_real` has the package."""

import gc
import json
import sys
import warnings

import pytest
import torch

import visattn
from tests.support.omni import double
from visattn import Layout
from visattn.clients.vllm_omni.callable import sparse_attn
from visattn.clients.vllm_omni.plugin import NAME, register
from visattn.served.run import reports

GRID, PATTERN = (3, 6, 8), "na(window=3)"
TOKENS = 3 * 6 * 8


@pytest.fixture
def omni(monkeypatch):
    return double(monkeypatch)


def _ready(monkeypatch, **environment):
    register()
    given = {"VISATTN_PATTERN": PATTERN, "VISATTN_BACKEND": "tiles", **environment}
    for name in ("VISATTN_PATTERN", "VISATTN_CONFIG", "VISATTN_BACKEND", "VISATTN_DENSE_STEPS", "VISATTN_STRICT"):
        monkeypatch.delenv(name, raising=False)
        if given.get(name):
            monkeypatch.setenv(name, given[name])
    torch.manual_seed(0)


def _layers(omni, count=2, **options):
    return [omni.attention(2, 16, prefix=f"blocks.{i}.attn1", role="self", **options) for i in range(count)]


def _tensors(length=TOKENS, kv_heads=2):
    return torch.randn(2, length, 2, 16), *(torch.randn(2, length, kv_heads, 16) for _ in range(2))


def _wan(omni, **metadata):
    layout = omni.VideoTokenLayout(prefix_len=0, latent_grid=GRID, used_len=TOKENS)
    return omni.AttentionMetadata(video_layout=layout, **metadata)


def _masked(tensors, layout, keys=None, pattern=PATTERN):
    mask = visattn.dense_mask(visattn.parse(pattern), layout)[None, None]
    mask = mask if keys is None else mask & keys[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in tensors)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return out.transpose(1, 2)


def _report(layer):
    return layer.attention.layer.run.report()


def test_layers_equal_masked_dense_and_the_report_counts_them(omni, monkeypatch):
    _ready(monkeypatch)
    register()
    assert list(omni.Backends.__members__).count(NAME) == 1
    with omni.building(NAME):
        layers = _layers(omni)
    tensors, metadata = _tensors(), _wan(omni)
    with omni.step(0, 2):
        for layer in layers:
            found = layer(*tensors, metadata)
            assert (found - _masked(tensors, Layout(GRID))).abs().max() <= 1e-5
    report = _report(layers[0])
    assert [(site.site, site.hits) for site in report.sites] == [("blocks.0.attn1", 1), ("blocks.1.attn1", 1)]
    assert report.sites[0].calls[0].problem.layout == Layout(GRID)


def test_padding_text_and_references_around_the_grid(omni, monkeypatch):
    _ready(monkeypatch, VISATTN_STRICT="1")
    with omni.building(NAME):
        (layer,) = _layers(omni, 1, num_kv_heads=1)
    tensors = _tensors(TOKENS + 11, 1)
    keys = torch.ones(2, TOKENS + 11, dtype=torch.bool)
    keys[:, -4:] = False
    tail = omni.VideoTokenLayout(prefix_len=7, latent_grid=GRID, used_len=TOKENS + 7)
    wanted = _masked(tensors, Layout(GRID, 7, 4), keys)
    for mask in (keys, keys[:, None, None]):
        found = layer(*tensors, omni.AttentionMetadata(attn_mask=mask, video_layout=tail))
        assert (found - wanted).abs().max() <= 1e-5
    spans = (omni.VideoTokenSpan(0, (1, 2, 2), "reference"), omni.VideoTokenSpan(9, GRID, "target"))
    several = omni.VideoTokenLayout(used_len=TOKENS + 9, video_spans=spans)
    found = layer(*tensors, omni.AttentionMetadata(video_layout=several))
    assert (found - _masked(tensors, Layout(GRID, 9, 2))).abs().max() <= 1e-5


def test_what_tells_no_grid_stays_dense_and_says_why(omni, monkeypatch):
    _ready(monkeypatch)
    with omni.building(NAME):
        layer, _ = _layers(omni)
        cross = omni.attention(2, 16, prefix="blocks.0.attn2", role="cross")
    tensors = _tensors()
    stock = _masked(tensors, Layout(GRID), pattern="dense")
    with pytest.warns(UserWarning, match=r"blocks.0.attn1 of WanPipeline .*its model does not tell the grid"):
        assert (layer(*tensors, omni.AttentionMetadata()) - stock).abs().max() <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(*tensors, None)
        assert (cross(*tensors, _wan(omni)) - stock).abs().max() <= 1e-6
    few = omni.AttentionMetadata(video_layout=omni.VideoTokenLayout(prefix_len=0, latent_grid=(9, 9, 9)))
    with pytest.warns(UserWarning, match="144 tokens is not grid 9x9x9"):
        layer(*tensors, few)
    report = _report(layer)
    assert report.hits == 0 and len(report.fallbacks) == 2
    assert [site.site for site in report.sites] == ["blocks.0.attn1", "blocks.1.attn1"]
    _ready(monkeypatch, VISATTN_STRICT="1")
    with omni.building(NAME):
        (layer,) = _layers(omni, 1)
    with pytest.raises(ValueError, match=r"strict: blocks.0.attn1 of WanPipeline .*does not tell the grid"):
        layer(*tensors, None)


def test_a_file_of_layers_and_dense_steps(omni, monkeypatch, tmp_path):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"0": "dense", "blocks.1*": "na(window=(-1, 3, 3))"}))
    _ready(monkeypatch, VISATTN_PATTERN="", VISATTN_CONFIG=str(file), VISATTN_DENSE_STEPS="0.5")
    with omni.building(NAME, {"cross": "TORCH_SDPA"}):
        layers = _layers(omni)
    tensors = _tensors()
    for index in range(4):
        with omni.step(index, 4):
            for layer in layers:
                layer(*tensors, _wan(omni))
    first, second = _report(layers[0]).sites
    assert (first.hits, first.dense, second.hits, second.dense) == (0, 4, 2, 2)
    with omni.step(None, None), pytest.raises(ValueError, match=r"dense_steps=0\.5 needs the step"):
        layers[0](*tensors, _wan(omni))


def test_two_models_with_layers_of_the_same_names(omni, monkeypatch):
    _ready(monkeypatch)
    with omni.building(NAME):
        high, low = _layers(omni), _layers(omni)
    for layer in (high[0], *low):
        layer(*_tensors(), _wan(omni))
    gc.collect()
    found = reports()
    assert list(found) == ["WanPipeline", "WanPipeline 2"]
    assert sorted(report.hits for report in found.values()) == [1, 2]
    assert high[0].attention.layer.run is high[1].attention.layer.run is not low[0].attention.layer.run


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"VISATTN_PATTERN": "na(windw=3)"}, "windw"),
        ({"VISATTN_PATTERN": "na(window=3x3)"}, r"2 axes but the tokens of vLLM-Omni are a \(frames, height, width\)"),
        ({"VISATTN_PATTERN": ""}, "neither VISATTN_PATTERN nor VISATTN_CONFIG says"),
        ({"VISATTN_CONFIG": "none.json"}, "both say"),
        ({"VISATTN_PATTERN": "", "VISATTN_CONFIG": "none.json"}, "does not exist"),
        ({"VISATTN_PATTERN": "sigmoid()"}, "has parameters or merges tokens"),
        ({"VISATTN_DENSE_STEPS": "some"}, "must be a count of steps"),
        ({"VISATTN_STRICT": "maybe"}, "must be 0 or 1"),
        ({"VISATTN_BACKEND": "best"}, "best"),
    ],
)
def test_mistakes_are_said_before_a_model_is_built(monkeypatch, environment, text):
    omni = double(monkeypatch)
    _ready(monkeypatch, **environment)
    with omni.building(NAME), pytest.raises(ValueError, match=text):
        _layers(omni, 1)


def test_parallel_attention_that_passes_by_is_refused(omni, monkeypatch):
    _ready(monkeypatch)
    with omni.building(NAME, ring_degree=2), pytest.raises(ValueError, match="ring_degree=2: ring attention passes"):
        _layers(omni, 1)


def test_another_version_is_said_and_never_stops_the_server(monkeypatch):
    double(monkeypatch)
    room = sys.modules["vllm_omni.diffusion.attention.backends.registry"]
    monkeypatch.delattr(room, "DiffusionAttentionBackendEnum")
    with pytest.warns(UserWarning, match=r"no backend VISATTN, as its list of backends is not that of 0\.30\.0"):
        register()


def test_one_function_by_parameters():
    tensors = _tensors(TOKENS + 7)
    keys = torch.ones(2, TOKENS + 7, dtype=torch.bool)
    keys[0, -2:] = False
    params = {"pattern": PATTERN, "grid": GRID, "prefix": 4, "key_mask": keys, "backend": "tiles"}
    found = sparse_attn(*tensors, params, softmax_scale=0.25)
    assert (found - _masked(tensors, Layout(GRID, 4, 3), keys)).abs().max() <= 1e-5
    for wrong, text in (({"grid": (9, 9, 9)}, "shorter than"), ({"topk": 1}, "topk"), ({"grid": None}, "pattern and")):
        given = {name: value for name, value in {**params, **wrong}.items() if value is not None}
        with pytest.raises(ValueError, match=text):
            sparse_attn(*tensors, given)
    with pytest.raises(ValueError, match="is_causal=True"):
        sparse_attn(*tensors, params, is_causal=True)
