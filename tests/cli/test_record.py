"""`visattn record` and what it writes: what attention got, of the modules and steps asked for, within a limit."""

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_pipelines
from tests.support.tiny_pixel_dit import tiny_pixel_dit
from visattn.cli import app
from visattn.layout import Layout
from visattn.pipelines.record import record
from visattn.recorded import Recorded, Recorder, load_recorded, save_recorded
from visattn.watch import Watched


@pytest.fixture(scope="module")
def wan():
    pipeline, options = tiny_pipelines.wan()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {"prompt": "a cat", "num_inference_steps": 3, "output_type": "latent", **options}


def test_keeps_what_attention_gets(wan):
    pipeline, arguments = wan
    arguments = arguments | {"generator": torch.Generator().manual_seed(0)}
    seen = []
    with visattn.apply(pipeline, "dense", dense_steps=1) as handle:
        handle.watch(seen.append)
        pipeline(**arguments)
    arguments["generator"] = torch.Generator().manual_seed(0)
    found = record(pipeline, arguments, modules=["*1.attn1*"], steps=[1])
    wanted = [w for w in seen if w.step == 1 and "1.attn1" in w.site]
    assert len(found.calls) == len(wanted) == 2 and [call.call for call in found.calls] == [0, 1]
    for call, watched in zip(found.calls, wanted, strict=True):
        assert call.step == 1 and call.site == watched.site and call.layout.grid == (3, 3, 4)
        assert all(torch.equal(a, b[:1]) for a, b in zip((call.q, call.k, call.v), watched[1:4], strict=True))
        dense = visattn.attention(call.q, call.k, call.v, "dense", call.layout, scale=call.scale)
        torch.testing.assert_close(dense, watched.out[:1], rtol=1e-4, atol=1e-5)
        assert visattn.tile_choice(call.q, call.k, "topk(keep=0.5, block=1x2x2)", call.layout).any()


def test_what_cannot_be_recorded_is_told(wan):
    pipeline, arguments = wan
    with pytest.raises(ValueError, match=r"steps \[7\] did not run: those that did were \[0, 1, 2\]"):
        record(pipeline, arguments, steps=[0, 7])
    with pytest.raises(ValueError, match=r"no attention module is called nothing; there are \d+, like"):
        record(pipeline, arguments, modules=["nothing"])
    with pytest.raises(ValueError, match=r"steps \[-1\] must be some numbers from 0"):
        record(pipeline, arguments, steps=[-1])
    for options in ({"samples": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="must be one whole number of at least 1"):
            Recorder(**options)


def test_steps_that_there_are_not_are_told_before_a_model_is_loaded(tmp_path):
    args = ["record", "--model", "none", "--steps", "4", "--at", "1,4", "--out", str(tmp_path / "a.safetensors")]
    assert "--at 1,4 must be of steps from 0 to 3: there are --steps 4" in str(CliRunner().invoke(app, args).exception)


def watched(site="a", step=0, batch=2, key_mask=None):
    q, k, v = torch.randn(3, batch, 6, 2, 4).unbind(0)
    return Watched(site, q, k, v, q, visattn.parse("dense"), (Layout((2, 2), 1, 1),), 0.5, key_mask, {}, step)


def test_a_recorder_stays_within_its_limit():
    each = 3 * 6 * 2 * 4 * 4
    recorder = Recorder(["a*"], [0, 2], samples=1, limit=2 * each)
    for site, step in (("a", 0), ("b", 0), ("ab", 1), ("ab", 2), ("a", 2), ("a", 2)):
        recorder(watched(site, step))
    assert [(c.site, c.step, c.call) for c in recorder.calls] == [("a", 0, 0), ("ab", 2, 0)]
    assert recorder.left_out == 2
    given = watched()
    mine = Recorder()
    mine(given)
    given.q.zero_()
    assert mine.calls[0].q.abs().sum() > 0, "a copy"


def test_files_hold_everything(tmp_path):
    mask = torch.rand(2, 6) < 0.5
    recorder = Recorder(samples=2)
    recorder(watched(key_mask=mask))
    recorder(watched("b", None))
    path = tmp_path / "calls.safetensors"
    save_recorded(path, recorder.calls, {"model": "x"})
    found, about = load_recorded(path)
    assert about == {"model": "x"}
    for a, b in zip(found, recorder.calls, strict=True):
        assert isinstance(a, Recorded) and (a.site, a.step, a.call, a.layout, a.scale) == (
            b.site,
            b.step,
            b.call,
            b.layout,
            b.scale,
        )
        assert (
            all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
            and a.tensors.keys() == b.tensors.keys()
        )
    with pytest.raises(ValueError, match="exists"):
        save_recorded(path, recorder.calls)
    save_recorded(path, recorder.calls, force=True)
    with pytest.raises(ValueError, match="nothing was recorded"):
        save_recorded(tmp_path / "none.safetensors", [])
    with pytest.raises(ValueError, match="does not exist"):
        load_recorded(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no file of recorded calls, or not whole"):
        load_recorded(tmp_path / "bad.safetensors")


def test_the_command_writes_a_file(tmp_path):
    tiny_pixel_dit(2).save_pretrained(tmp_path / "model")
    out = tmp_path / "calls.safetensors"
    words = [
        "record",
        "--out",
        str(out),
        "--model",
        str(tmp_path / "model"),
        "--label",
        "3",
        "--steps",
        "3",
        "--at",
        "0,2",
    ]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    told = json.loads(done.stdout)
    calls, about = load_recorded(out)
    assert told["calls"] == len(calls) and told["modules"] == 2 and about["labels"] == [3]
    assert {call.step for call in calls} == {0, 2} and all(call.layout == Layout((8, 8)) for call in calls)
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ValueError) and "exists" in str(done.exception)


def test_tensors_that_share_memory_are_written(tmp_path):
    qkv = torch.randn(1, 6, 3, 2, 4)
    call = Recorded("attn", None, 0, *qkv.unbind(2), Layout((2, 3)), 0.5)
    save_recorded(tmp_path / "calls.safetensors", [call, call])
    for found in load_recorded(tmp_path / "calls.safetensors")[0]:
        assert torch.equal(found.q, qkv[:, :, 0]) and torch.equal(found.v, qkv[:, :, 2])
