"""find_heads: which heads a search adds, that it goes on where it was killed, and what it refuses."""

import json
import zlib

import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn.pipelines.guidance import search
from visattn.pipelines.guidance.search import find_heads, palette, sharpness
from visattn.pipelines.guidance.trials import Trials

GOOD = {("a", 1): 1.0, ("b", 0): 0.6, ("b", 2): 0.05}
CANDIDATES = [(layer, head) for layer in "ab" for head in range(3)]
PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def drawn(monkeypatch):
    """Pictures whose brightness says how good the heads are, the same noise for each; every drawing is listed."""
    calls = []

    def draw(pipe, prompts, seed, chosen, *rest):
        calls.append((tuple(sorted(chosen)), seed))
        noise = torch.randn(len(prompts), generator=torch.Generator().manual_seed(seed))
        own = torch.randn(len(prompts), generator=torch.Generator().manual_seed(zlib.crc32(repr(calls[-1]).encode())))
        value = sum(GOOD.get(head, -0.5) for head in chosen) + 5 * noise + 0.1 * own
        return value[:, None, None, None].expand(-1, 3, 4, 4)

    monkeypatch.setattr(search, "_draw", draw)
    return calls


def brightness(pictures, prompts):
    return pictures.mean((1, 2, 3))


def look(pipe, out, objective=brightness, **options):
    given = {"candidates": CANDIDATES, "seeds": (1, 2, 8), **options}
    return find_heads(pipe, PROMPTS, objective, out, **given)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pixel_flux()


def test_rounds_add_what_helps(pipe, drawn, tmp_path):
    """Paired: noise of a seed is far larger than what heads do."""
    found = look(pipe, tmp_path / "a.jsonl")
    assert found.heads["a"] == [1] and 0 in found.heads["b"] and found.finished
    assert [each["added"] for each in found.rounds[:2]] == [[("a", 1)], [("b", 0)]]
    assert found.gain == pytest.approx(1.6, abs=0.15)
    # 6 candidates have one seed, 3 have two, 1 has eight; nothing is drawn twice.
    first = [chosen for chosen, _ in drawn if len(chosen) == 1]
    assert {first.count((head,)) for head in CANDIDATES} == {1, 2, 8} and len(drawn) == len(set(drawn))
    assert len(look(pipe, tmp_path / "b.jsonl", most=1).rounds) == 1
    both = look(pipe, tmp_path / "c.jsonl", add=2, most=2)
    assert len(both.rounds) == 1 and both.heads == {"a": [1], "b": [0]}


def test_goes_on_where_it_was_killed(pipe, drawn, tmp_path):
    whole = look(pipe, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for cut in (0, 1, 7, 20):
        # A process that is killed leaves half of the line that it writes.
        file = tmp_path / f"cut-{cut}.jsonl"
        file.write_text("".join(lines[:cut]) + lines[cut][:9])
        drawn.clear()
        again = look(pipe, file)
        assert again.heads == whole.heads and len(drawn) == len(lines) - max(cut, 1)
        assert len(file.read_text().splitlines()) == len(lines)
    drawn.clear()
    assert look(pipe, tmp_path / "whole.jsonl") == whole and not drawn


def test_stops_in_time_and_goes_on(pipe, drawn, tmp_path):
    file = tmp_path / "a.jsonl"
    seen = look(pipe, file, seconds=0.0)
    assert not seen.finished and not seen.heads and not drawn

    def killed(pictures, prompts):
        if len(drawn) > 9:
            raise KeyboardInterrupt
        return brightness(pictures, prompts)

    killed.__name__ = "brightness"
    with pytest.raises(KeyboardInterrupt):
        look(pipe, file, killed)
    assert len(file.read_text().splitlines()) == 10
    assert look(pipe, file).finished


def test_pictures_of_a_pipeline(pipe, tmp_path):
    """The heads that are found are those that `guide` takes; a patched pipeline stays patched."""
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "guidance_scale": 1.0}
    given = {"seeds": (1,), "most": 1, "layers": [0], "scale": 5.0, **size}
    with visattn.apply(pipe, "na(window=3x3)") as handle:
        found = find_heads(pipe, PROMPTS, sharpness, tmp_path / "a.jsonl", handle=handle, **given)
        assert handle.report().hits
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:]]
    assert [record["heads"] for record in records][:1] == [[["transformer_blocks.0", 0]]]
    guided, plain = (torch.tensor(record["scores"]) for record in records)
    heads = {"transformer_blocks.0": [0]}
    with visattn.apply(pipe, "na(window=3x3)") as handle, visattn.guide(pipe, 5.0, heads=heads, handle=handle):
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        pictures = pipe(PROMPTS, generator=noise, output_type="pt", **size)[0]
    torch.testing.assert_close(sharpness(pictures, PROMPTS).double(), guided.double())
    assert not torch.equal(guided, plain) and found.heads in ({}, heads)


def test_objectives():
    flat, checked = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)
    checked[..., ::2, ::2] = checked[..., 1::2, 1::2] = 1.0
    assert sharpness(flat, [""])[0] == 0 and sharpness(checked, [""])[0] == pytest.approx(16.0)
    near = palette(checked)
    assert near(checked, [""])[0] == pytest.approx(0.0, abs=1e-6) and near(flat, [""])[0] < -0.5


def test_a_second_search_is_refused_while_one_writes_its_scores(pipe, drawn, tmp_path):
    with (
        Trials(tmp_path / "a.jsonl", {}),
        pytest.raises(ValueError, match=r"another run is writing to .*a\.jsonl: wait"),
    ):
        look(pipe, tmp_path / "a.jsonl", most=1)


def test_wrong_use_is_refused(pipe, drawn, tmp_path):
    for wrong in ({"seeds": (4, 1)}, {"seeds": ()}, {"add": 0}, {"most": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* must"):
            look(pipe, tmp_path / "a.jsonl", **wrong)
    with pytest.raises(ValueError, match="one picture has no standard error"):
        find_heads(pipe, ["a cat"], brightness, tmp_path / "a.jsonl", seeds=(1,))
    with pytest.raises(ValueError, match="strength=2 must be"):
        look(pipe, tmp_path / "a.jsonl", strength=2)
    look(pipe, tmp_path / "a.jsonl", most=1)
    with pytest.raises(ValueError, match=r"has scores of scale 3.0, not 2.0: name another file"):
        look(pipe, tmp_path / "a.jsonl", scale=2.0)
    with pytest.raises(ValueError, match="the objective gave 1 scores of 2 pictures"):
        look(pipe, tmp_path / "b.jsonl", lambda pictures, prompts: torch.zeros(1))
    (tmp_path / "c.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="is no file of a search"):
        look(pipe, tmp_path / "c.jsonl")
