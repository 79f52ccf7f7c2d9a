"""Distillation by stages: what learns when, on which inputs, towards the teacher's mass, under changing lists."""

import functools

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from scripts.distill import loop, ranges, settings, stages, training
from scripts.distill import pipeline as distill
from scripts.distill.config import Config
from scripts.distill.masses import Masses
from scripts.distill.methods import METHODS
from tests.support.runs import equal, stopped
from tests.support.tiny_distill import run, tiny_pipeline_with_samples, words
from visattn import Layout, apply, parse
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline
from visattn.trained import load_trained, trained_weights
from visattn.watch import Watched

SITES = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
TOPK = ("--pattern", "topk(keep=0.25, block=2x2)")
HEDGEHOG = ("--pattern", "linear(feature=hedgehog)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_with_samples(tmp_path_factory.mktemp("tiny"))


def trained_of(folder, out, *more):
    return training.Training(settings.parse(Config, None, words(folder, out, *more)))


class TestRanges:
    def test_ends_are_as_they_are_written(self):
        text = "topp(p=0.9..0.6, least=0.50..0.05)"
        assert ranges.at(text, 0) == "topp(p=0.9, least=0.50)"
        assert ranges.at(text, 1) == "topp(p=0.6, least=0.05)"
        assert ranges.at("keep=0.4..0.1", 0.5) == "keep=0.2"
        assert not ranges.varies("na(window=7x7)") and ranges.varies(text)

    def test_steps_end_at_the_end(self):
        found = [ranges.stepped(done / 100, 0.5, 4) for done in range(100)]
        assert found == sorted(found)
        assert set(found) == {0.0, 0.25, 0.5, 0.75, 1.0}
        assert found[49] == 0.75 and found[50] == 1.0


class TestMethods:
    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("sparsity", [0.3, 0.95])
    def test_are_settings_of_a_run(self, folder, tmp_path, name, sparsity):
        given = ["--model", folder / "model", "--samples", folder / "samples", "--out", tmp_path, "--method", name]
        config = settings.parse(Config, None, [str(word) for word in [*given, "--sparsity", sparsity]])
        final = parse(config.pattern_ends[1])
        assert final == parse(METHODS[name].final(sparsity))
        listed = getattr(getattr(final, "by", final), "keep", None)
        assert listed is None or listed == pytest.approx(1 - sparsity)
        assert all(getattr(config, key) == value for key, value in METHODS[name].options.items())

    def test_what_is_given_wins(self, folder, tmp_path):
        given = ["--model", folder / "model", "--samples", folder / "samples", "--out", tmp_path, "--method", "topk"]
        config = settings.parse(Config, None, [str(word) for word in [*given, "--output", "0.25", "--stages", "all"]])
        assert (config.output, config.stages, config.attention) == (0.25, "all", METHODS["topk"].options["attention"])
        assert config.pattern == "topk(keep=0.5..0.05)"

    @pytest.mark.parametrize(
        ("more", "error"),
        [
            (["--method", "slam"], "'slam' does not exist: topk"),
            (["--method", "topk", "--sparsity", "95"], "between 0 and 1"),
            (["--sparsity", "0.9", "--pattern", "topk(keep=0.1)"], "that of a --method"),
            ([], "--pattern is missing"),
        ],
    )
    def test_wrong_ones(self, folder, tmp_path, more, error):
        given = ["--model", str(folder / "model"), "--samples", str(folder / "samples"), "--out", str(tmp_path), *more]
        with pytest.raises(SystemExit, match=error):
            distill.main(given)


class TestStages:
    def test_shares(self):
        found = stages.parse_stages("router:0.25, transfer:0.25,all")
        assert [(each.name, each.start, each.end) for each in found] == [
            ("router", 0, 0.25),
            ("transfer", 0.25, 0.5),
            ("all", 0.5, 1),
        ]
        assert [stages.stage_at(found, done).name for done in (0, 0.25, 0.5, 1)] == ["router", "transfer", "all", "all"]

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("rooter:1", "names router, transfer, all"),
            ("router:0.5,all:0.4", "add up to 1"),
            ("all:0.5,router:0.5", "in the order"),
            ("router:x,all", "not of the form"),
            ("router:1.5,all", "not of the form"),
        ],
    )
    def test_wrong_ones(self, text, error):
        with pytest.raises(ValueError, match=error):
            stages.parse_stages(text)


LEARNS = {
    "topk(keep=0.25, block=2x2)": True,
    "gate(by=topk(keep=0.25, block=2x2), dim=8)": False,
    "sla2(keep=0.25, block=2x2)": False,
    "vsa(keep=0.25, block=2x2)": True,
}


@pytest.mark.parametrize("text", LEARNS)
def test_scores_come_closer_to_the_mass(text):
    """Of a gate by its maps, of a rule by the queries and keys."""
    pattern, layout, generator = parse(text), Layout((8, 8), suffix=1), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, layout.length, 2, 8, generator=generator) for _ in range(3))
    # Tokens of a row of the grid are alike.
    q[:, :64] += 4 * torch.randn(2, 8, 2, 8, generator=generator).repeat_interleave(8, 1)
    k[:, :64] += 4 * torch.randn(2, 8, 2, 8, generator=generator).repeat_interleave(8, 1)
    given = {
        name: torch.nn.Parameter(value + 0.1 * torch.randn(value.shape, generator=generator))
        for name, value in pattern.initial_parameters(2, 8, (8, 8)).items()
    }
    ours = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    masses, found = Masses(), []
    optimizer = torch.optim.Adam(ours if LEARNS[text] else list(given.values()), lr=0.05)
    for _ in range(25):
        with masses.of(torch.rand(8, generator=generator), 1.5):
            masses.teacher(Watched("x", q, k, v, v, parse("dense"), (layout,), 0.3, None, {}))
            masses.student(Watched("x", *ours, v, v, pattern, (layout,), 0.3, None, given))
        optimizer.zero_grad()
        masses.loss().backward()
        optimizer.step()
        found.append(masses.loss().item())
    assert min(found) > 0
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
    assert (ours[0].grad is not None) == LEARNS[text]


class TestTraining:
    @pytest.mark.parametrize(
        ("more", "error"),
        [
            ([*TOPK, "--stages", "router:0.5,all:0.5"], "no parameters of its own"),
            ([*HEDGEHOG, "--stages", "router:0.5,all:0.5", "--attention", "0"], "learn by --attention"),
            (["--mass", "1"], "chooses no blocks by scores"),
            (["--mass", "1", "--pattern", "topk(keep=0.5, score=lowbit(4))"], "has no gradient"),
            ([*TOPK, "--mass", "1", "--temperature", "0"], "above 0"),
            ([*TOPK, "--mass", "1", "--checkpointing"], "checkpointing"),
            ([*TOPK, "--mass", "1", "--mass-blocks", "100"], "from 1 to --map-rows"),
            (["--pattern", "topk(keep=0..0.5)"], "above 0"),
            (["--pattern", "topk(keep=0.5..0.1)", "--anneal", "0"], "--anneal 0.0"),
            (["--pattern", "topk(keep=0.5..0.1)", "--fsdp"], "applied anew"),
            ([*HEDGEHOG, "--quantize", "fp8"], "list key tiles"),
            (["--quantize", "int4"], "int4"),
        ],
    )
    def test_wrong_settings(self, folder, tmp_path, more, error, monkeypatch):
        monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match=error):
            distill.main(words(folder, tmp_path / "out", *more))

    def test_each_stage_trains_its_parameters(self, folder, tmp_path):
        made = trained_of(folder, tmp_path, *HEDGEHOG, "--stages", "router:0.25,transfer:0.25,all", "--ema", "0")
        moved = []
        for _ in range(4):
            before = {name: value.detach().clone() for name, value in made.trained.items()}
            figures = made.train_step()
            changed = {name for name, value in made.trained.items() if not value.equal(before[name])}
            moved.append({name.partition(".")[0] for name in changed})
            assert ("denoising" in figures) == (made.learner.stage.name == "all")
            if made.learner.stage.name == "transfer":
                # What a layer gives before its output projection says nothing about that.
                assert not any("to_out" in name for name in changed)
        assert moved == [{"own"}, {"own", "student"}, {"own", "student"}, {"own", "student"}]
        assert made.progress.began == 2
        assert [made.learner.stage_share(done) for done in (0.5, 0.75, 1)] == [0, 0.5, 1]

    def test_a_stage_that_no_loss_reaches_is_named(self, folder, tmp_path):
        gate = ("--pattern", "gate(by=topk(keep=0.5, block=2x2), dim=4)", "--stages", "router:0.5,all:0.5")
        with pytest.raises(SystemExit, match=r"no loss \(attention\) reaches what learns here"):
            run(folder, tmp_path, *gate)
        run(folder, tmp_path, *gate, "--mass", "1")

    def test_a_gradient_that_is_not_finite_teaches_nothing(self, folder, tmp_path):
        made = trained_of(folder, tmp_path)
        made.train_step()
        before = {name: value.detach().clone() for name, value in made.trained.items()}
        broken = next(iter(made.trained.values())).register_hook(lambda grad: grad * float("nan"))
        for group in made.optimizer.param_groups:
            group["betas"] = (0.0, 0.0)
        assert not made.train_step()["gradient"].isfinite()
        assert all(torch.equal(value, before[name]) for name, value in made.trained.items())
        broken.remove()
        assert made.train_step()["gradient"].isfinite()
        assert not all(torch.equal(value, before[name]) for name, value in made.trained.items())

    def test_layers_learn_from_the_teachers_inputs(self, folder, tmp_path):
        made = trained_of(folder, tmp_path, "--stages", "transfer", "--attention-at", "after")
        seen = {}
        for model in (made.learner.teacher, made.learner.student):
            for site in SITES:
                kept = seen.setdefault(site, [])
                model.get_submodule(site).to_q.register_forward_pre_hook(
                    lambda module, args, kept=kept: kept.append(args[0].detach())
                )
        made.train_step()
        assert all(len(kept) == 2 and kept[0].equal(kept[1]) for kept in seen.values())
        seen.clear()
        # The second layer's gradient is its own: what it gives does not reach the first one.
        batch = made.draw(made.parts[0])
        made.learner(batch)
        made.learner._seen[1].kept[SITES[1]].sum().backward()
        first, second = (made.learner.student.get_submodule(site).to_q.weight.grad for site in SITES)
        assert first is None and second is not None

    def test_lists_shrink_and_the_parameters_stay(self, folder, tmp_path):
        more = ("--pattern", "sparselinear(sparse=clear(radius=3..1))", "--anneal", "0.5", "--ema", "0")
        made = trained_of(folder, tmp_path, *more)
        own, texts = dict(made.learner.own.named_parameters()), []
        for _ in range(4):
            made.train_step()
            texts.append(made.learner.pattern)
        now = dict(made.learner.handle.parameters.named_parameters())
        assert all(now[name] is value for name, value in own.items())
        assert texts[0].endswith("clear(radius=3))") and texts[-1].endswith("clear(radius=1))")
        assert all(value.abs().min() > 0 for name, value in own.items() if name.endswith("mix"))
        made.config.out.mkdir(exist_ok=True)
        assert load_trained(made.export()).about["pattern"] == "sparselinear(sparse=clear(radius=1))"

    @pytest.mark.parametrize(
        "more",
        [
            (*HEDGEHOG, "--stages", "router:0.3,transfer:0.3,all"),
            ("--pattern", "topk(keep=0.5..0.25, block=2x2)", "--mass", "0.1", "--temperature", "4..1", "--lora", "2"),
        ],
    )
    def test_stopped_and_resumed_is_the_same(self, folder, tmp_path, more, monkeypatch):
        whole = run(folder, tmp_path / "whole", *more)
        go_on = functools.partial(run, folder, tmp_path / "parts", *more)
        stopped(monkeypatch, loop.Run, "train_step", lambda run: run.step == 2, go_on)
        assert equal(whole, go_on())

    @pytest.mark.parametrize("more", [(), ("--lora", "2")])
    def test_frozen_weights_are_rounded_once(self, folder, tmp_path, more, monkeypatch, request):
        from accelerate.state import AcceleratorState

        # One for the process, in one precision.
        AcceleratorState._reset_state(True)
        request.addfinalizer(lambda: AcceleratorState._reset_state(True))
        given = (*HEDGEHOG, "--precision", "bf16", *more)
        made = trained_of(folder, tmp_path, *given)
        kinds = {value.dtype for value in made.learner.student.parameters() if not value.requires_grad}
        assert torch.bfloat16 in kinds and all(value.dtype == torch.float32 for value in made.trained.values())
        ours = made.train_step()
        monkeypatch.setattr(loop, "round_frozen", lambda model: None)
        plain = trained_of(folder, tmp_path, *given).train_step()
        assert {name: float(value) for name, value in ours.items()} == {name: float(v) for name, v in plain.items()}

    def test_guidance_compares_pairs(self, folder, tmp_path):
        made = trained_of(folder, tmp_path, "--guidance", "3", "--denoising", "0", "--attention", "0", "--output", "1")
        batch = made.draw(made.parts[0])
        assert batch.noisy[0].equal(batch.noisy[1]) and not batch.noisy[0].equal(batch.noisy[2])
        # The null class is 3; see test_rows_of_guidance_belong_to_the_sample.
        labels = batch.arguments["class_labels"].tolist()
        assert labels[::2] == [3, 3] and max(labels[1::2]) < 3
        with torch.no_grad():
            given = {"hidden_states": batch.noisy, "timestep": batch.times} | batch.arguments
            both = [model(**given).sample for model in (made.learner.student, made.learner.teacher)]
            guided = [x[::2] + 3 * (x[1::2] - x[::2]) for x in both]
            found = made.learner(batch)["output"]
        torch.testing.assert_close(found, (guided[0] - guided[1]).square().mean())
        with pytest.raises(SystemExit, match="must be even"):
            run(folder, tmp_path, "--guidance", "3", "--batch", "3")

    def test_low_rank_and_a_router_leave_the_base_as_it_is(self, folder, tmp_path):
        more = ("--method", "sla2", "--sparsity", "0.5", "--pattern", "sla2(keep=0.5, block=2x2)", "--lora", "1")
        run(folder, tmp_path, *more)
        trained = load_trained(tmp_path / "student.safetensors")
        assert not trained.model
        assert {path.rpartition(".")[2] for path in trained.lora} == {"to_q", "to_k", "to_v", "0"}
        assert {path.rpartition(".")[2] for path in trained.own} == {"route_query", "route_key", "ratio"}
        assert all(b.abs().sum() > 0 for _, b in trained.lora.values())

    def test_trained_through_8_bits(self, folder, tmp_path):
        made = trained_of(folder, tmp_path, *TOPK, "--quantize", "int8", "--ema", "0")
        made.train_step()
        made.config.out.mkdir(exist_ok=True)
        trained = load_trained(made.export())
        assert trained.about["precision"] == "int8"
        model = PixelDiTPipeline.from_pretrained(folder / "model").transformer
        given = {"timestep": torch.tensor([300.0]), "class_labels": torch.tensor([1])}
        x = torch.randn(1, 1, 8, 8)
        with torch.no_grad(), trained_weights(model, trained):
            with apply(model, trained.about["pattern"], precision="int8", strict=True):
                rounded = model(x, **given).sample
            with apply(model, trained.about["pattern"], strict=True):
                exact = model(x, **given).sample
            ours = made.learner.student(x, **given).sample
        assert ours.equal(rounded) and not ours.equal(exact)
