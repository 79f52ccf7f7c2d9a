"""Training-free agent attention of Stable Diffusion's UNet, installed with apply()."""

import copy
import math

import pytest
import torch
from torch.nn.functional import normalize

import visattn
from tests.support import tiny_models, tiny_pipelines
from visattn import parse
from visattn.patterns import AgentSD

# Merges enough of 120 tokens for agents to pay.
PATTERN = "agentsd(ratio=0.4, agent_ratio=0.9, cell=3, late_cell=2, early=1)"


def merged(x, destinations, away):
    """Tokens [N, C] after the `away` sources most like a destination have merged, and what a token became."""
    rest = [i for i in range(len(x)) if i not in destinations]
    unit = normalize(x.detach(), dim=-1)
    scores = (unit @ unit[destinations].T).tolist()
    best = {i: (max(scores[i]), destinations[scores[i].index(max(scores[i]))]) for i in rest}
    gone = sorted(rest, key=lambda i: -best[i][0])[:away]
    groups = {d: [d] + [i for i in gone if best[i][1] == d] for d in destinations}
    groups |= {i: [i] for i in rest if i not in gone}
    tokens = torch.stack([x[members].mean(0) for members in groups.values()])
    place = {token: row for row, members in enumerate(groups.values()) for token in members}
    return tokens, [place[i] for i in range(len(x))]


def softmax_attention(q, k, v, scale):
    return torch.softmax(q @ k.T * scale, -1) @ v


def slow_module(attn, x, grid, cell, ratio, agent_ratio, read_scale=0.3, shortcut=0.075):
    """The attention module by the definition, sample by sample and head by head; merges into corners of cells."""
    height, width = grid
    corners = [y * cell * width + z * cell for y in range(height // cell) for z in range(width // cell)]
    count = height * width
    away, agents_away = (min(int(r * count), count - len(corners)) for r in (ratio, agent_ratio))
    out = []
    for sample in x:
        tokens, place = merged(sample, corners, away)
        agents, _ = merged(sample, corners, agents_away)
        q, k, v, a = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens), attn.to_q(agents)
        heads = []
        for q_h, k_h, v_h, a_h in zip(*(t.chunk(attn.heads, -1) for t in (q, k, v, a)), strict=True):
            dim = q_h.shape[1]
            if 2 * len(agents) < len(tokens):
                gathered = softmax_attention(a_h, k_h, v_h, dim**-0.5)
                head = softmax_attention(q_h, a_h, gathered, dim ** (-0.5 * read_scale)) + shortcut * v_h
            else:
                head = softmax_attention(q_h, k_h, v_h, dim**-0.5)
            heads.append(head)
        out.append(attn.to_out[0](torch.cat(heads, -1))[place])
    return torch.stack(out)


def unet(batch=2):
    return tiny_models.sd15(batch=batch)


@pytest.fixture
def corners(monkeypatch):
    """The oracle merges into corners of cells; draw no other tokens."""
    monkeypatch.setattr("visattn.pipelines.patch.merging.MergingGroup._generator", lambda *_: None)


@pytest.mark.parametrize("step", [0, 1])
def test_equals_the_slow_definition(step, corners, monkeypatch):
    model, inputs = unet()
    weights = [p for n, p in model.named_parameters() if "attn1.to_" in n and n.endswith("weight")]

    def run():
        sample = model(**inputs).sample
        return sample, torch.autograd.grad(sample.square().sum(), weights)

    with visattn.apply(model, PATTERN, strict=True) as handle:
        handle.set_step(step)
        found, gradients = run()
        report = handle.report()
    # The second level has half the side: left alone by max_downsample.
    assert (report.hits, report.dense, report.fallbacks) == (3, 1, {})
    assert [s.calls[0].backend for s in report.modules if s.calls] == ["agentsd"] * 3
    modules = [m.attn1 for m in model.modules() if hasattr(m, "attn1")]
    cell, agent_ratio = ((3, 0.9), (2, 0.5))[step]
    reached = []
    for module in modules:
        real = module.forward

        def slow(hidden_states, *args, real=real, module=module, **options):
            if hidden_states.shape[1] != 120:
                return real(hidden_states, *args, **options)
            reached.append(module)
            return slow_module(module, hidden_states, (12, 10), cell, 0.4, agent_ratio)

        monkeypatch.setattr(module, "forward", slow)
    expected, expected_gradients = run()
    assert len(reached) == 3
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3 * float(b.abs().max()))
    assert not torch.allclose(found, tiny_models.run(*unet()))


def test_nothing_merged_and_no_agents_is_stock():
    model, inputs = unet()
    stock = tiny_models.run(model, inputs)
    before = [m.processor for m in model.modules() if hasattr(m, "processor")]
    text = "agentsd(ratio=0, agent_ratio=0, late_agent_ratio=0)"
    with visattn.apply(model, text) as handle:
        handle.set_step(0, 4)
        assert torch.equal(tiny_models.run(model, inputs), stock)
        assert handle.report().hits == 3
    after = [m.processor for m in model.modules() if hasattr(m, "processor")]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert torch.equal(tiny_models.run(model, inputs), stock)


def test_destinations_depend_on_seed_step_and_module_alone():
    model, inputs = unet()

    def run(pattern, step):
        with visattn.apply(model, pattern, strict=True) as handle:
            handle.set_step(step, 4)
            return tiny_models.run(model, inputs)

    all_early = "agentsd(agent_ratio=0.9, cell=3, early={})"
    first = run(all_early.format(3), 0)
    torch.manual_seed(99)
    assert torch.equal(run(all_early.format(3), 0), first)
    assert not torch.equal(run(all_early.format(3), 1), first)
    assert not torch.equal(run(all_early.format("3, seed=1"), 0), first)


def test_pipeline_with_guidance():
    pipeline, options = tiny_pipelines.stable_diffusion()
    stock = tiny_pipelines.generate(pipeline, options, steps=2)
    pattern = "agentsd(agent_ratio=0.9, cell=4, early=0.5)"
    options = {**options, "height": 32}
    stock = tiny_pipelines.generate(pipeline, options, steps=2)
    with visattn.apply(pipeline, pattern, strict=True) as handle:
        first = tiny_pipelines.generate(pipeline, options, steps=2)
        report = handle.report()
        assert torch.equal(tiny_pipelines.generate(pipeline, options, steps=2), first)
    assert (report.hits, report.dense, report.sites_hit) == (2 * 3, 2 * 1, 3) and not report.fallbacks
    assert {call.problem.batch for site in report.sites for call in site.calls} == {2}
    assert "agentsd (the only one that merges tokens)" not in str(report) and "agentsd on" in str(report)
    assert torch.isfinite(first).all() and not torch.equal(first, stock)
    with visattn.apply(pipeline, pattern, dense_steps=2, strict=True):
        assert torch.equal(tiny_pipelines.generate(pipeline, options, steps=2), stock)


def test_lives_with_lora_fused_projections_and_copies():
    peft = pytest.importorskip("peft")
    model, inputs = unet()
    pattern = "agentsd(agent_ratio=0.9, cell=3, early=1.0)"
    with visattn.apply(model, pattern, strict=True):
        plain = tiny_models.run(model, inputs)
        twin = copy.deepcopy(model)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        assert not torch.allclose(tiny_models.run(model, inputs), plain)
    assert torch.equal(tiny_models.run(twin, inputs), tiny_models.run(*unet()))
    with visattn.apply(twin, pattern, strict=True):
        assert torch.equal(tiny_models.run(twin, inputs), plain)
        with pytest.warns(UserWarning, match="installed again"):
            twin.fuse_qkv_projections()
            torch.testing.assert_close(tiny_models.run(twin, inputs), plain)


def test_compiled_code_stops_at_the_modules():
    torch._dynamo.reset()
    model, inputs = unet()
    pattern = "agentsd(agent_ratio=0.9, cell=3, early=1.0)"
    with visattn.apply(model, pattern) as handle:
        eager = tiny_models.run(model, inputs)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(tiny_models.run(compiled, inputs), eager)
        assert handle.report().hits == 6
    torch._dynamo.reset()


def test_levels():
    model, inputs = tiny_models.sdxl()
    stock = tiny_models.run(model, inputs)
    pattern = "agentsd(cell=2, early=0, max_downsample={})"
    with (
        visattn.apply(model, pattern.format(1)) as handle,
        pytest.warns(UserWarning, match="its grid is 2 times smaller than the latents, beyond max_downsample=1"),
    ):
        assert torch.equal(tiny_models.run(model, inputs), stock)
        assert handle.report().dense == 8
    with visattn.apply(model, pattern.format(1), strict=True), pytest.raises(ValueError, match="max_downsample=1"):
        tiny_models.run(model, inputs)
    with visattn.apply(model, pattern.format(2), strict=True) as handle:
        assert not torch.allclose(tiny_models.run(model, inputs), stock)
        assert handle.report().hits == 8


class TestRefusals:
    def test_models_without_merging(self):
        for build in (tiny_models.flux, tiny_models.wan, tiny_models.dit):
            model, _ = build()
            with pytest.raises(ValueError, match=r"agentsd merges tokens of a UNet .* is none: use agent\("):
                visattn.apply(model, "agentsd")
        model, _ = unet()
        with pytest.raises(ValueError, match="was given a layout"):
            visattn.apply(model, "agentsd", layout=visattn.Layout((12, 10)))
        with pytest.raises(
            ValueError, match="agentsd runs attention of its own: pass backend='auto' instead of 'sdpa'"
        ):
            visattn.apply(model, "agentsd", backend="sdpa")

    def test_timm(self):
        timm = pytest.importorskip("timm")
        with pytest.raises(ValueError, match="agentsd merges tokens of a UNet of diffusers: use agent"):
            visattn.apply(timm.create_model("test_vit"), "agentsd")

    def test_attention(self):
        q = torch.zeros(1, 4, 1, 8)
        with pytest.raises(ValueError, match=r"agentsd merges tokens of a UNet before they are projected"):
            visattn.attention(q, q, q, "agentsd", visattn.Layout((2, 2)))

    def test_unknown_step(self):
        model, inputs = unet()
        with visattn.apply(model, "agentsd(early=2)") as handle:
            with pytest.raises(
                ValueError, match=r"early=2 needs the step, and nothing tells it: apply to the pipeline"
            ):
                tiny_models.run(model, inputs)
            handle.set_step(0)
            tiny_models.run(model, inputs)

    def test_cells_larger_than_the_grid(self):
        model, inputs = unet()
        with visattn.apply(model, "agentsd(cell=11, early=1.0)") as handle, pytest.warns(UserWarning, match="no att"):
            tiny_models.run(model, inputs)
        assert handle.report().fallbacks == {"its 12x10 tokens are fewer than a cell of 11x11": 3}

    def test_other_sequences_fall_back(self):
        model, inputs = unet()
        module = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        x = tiny_models.noise(2, 120, 4)
        stock = module(x, encoder_hidden_states=x[:, :7])
        with visattn.apply(model, "agentsd(cell=3, early=1.0)") as handle:
            inside = []
            hook = model.conv_out.register_forward_hook(
                lambda *_: inside.append(module(x, encoder_hidden_states=x[:, :7]))
            )
            tiny_models.run(model, inputs)
            hook.remove()
            assert torch.equal(inside[0], stock)
            assert handle.report().fallbacks == {"its keys are masked or another sequence": 1}
            assert torch.equal(module(x), module.processor._visattn_original(module, x))
        assert handle.report().fallbacks["called outside of the model's forward"] == 1

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ratio=1.0", "ratio=1.0 must be a share of the tokens"),
            ("agent_ratio=-0.1", "agent_ratio=-0.1 must be a share"),
            ("late_agent_ratio=none", "late_agent_ratio=None must be a share"),
            ("cell=0", "cell=0 must be a whole number of at least 1"),
            ("late_cell=1.5", "late_cell=1.5 must be a whole number"),
            ("early=1.5", "early=1.5 must be a count of steps like 20 or a fraction like 0.4"),
            ("early=true", "early=True must be"),
            ("max_downsample=0", "max_downsample=0 must be one whole number of at least 1"),
            ("seed=-1", "seed=-1 must be one whole number of at least 0"),
            ("read_scale=nan", "read_scale=nan must be a finite float32 number"),
            ("shortcut=none", "shortcut=None must be a finite float32 number"),
        ],
    )
    def test_values(self, text, message):
        with pytest.raises(ValueError) as error:
            parse(f"agentsd({text})")
        assert message in str(error.value)


def test_text_and_steps():
    assert str(AgentSD()) == "agentsd" and parse("agentsd") == AgentSD()
    assert parse(str(parse(PATTERN))) == parse(PATTERN)
    assert parse(PATTERN).stepped and not parse("agentsd(early=0)").stepped and not parse("agentsd(early=1.0)").stepped
    assert not parse("agentsd(cell=2, agent_ratio=0.5)").stepped
    assert math.isclose(AgentSD().merge(True).agents, 0.95) and AgentSD().merge(False).cell == 2
