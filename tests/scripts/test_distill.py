"""Distillation: cached samples, losses, settings, and runs that are killed and go on."""

import functools
import itertools
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from safetensors.torch import load_file

from scripts.distill import (
    cache_samples,
    loop,
    losses,
    optimizers,
    samples,
    settings,
    state,
    training,
)
from scripts.distill import pipeline as distill
from scripts.distill.config import Config
from tests.support.runs import equal, killed, log_of, stopped
from tests.support.tiny_digits import tiny_transformer
from tests.support.tiny_distill import cache, run, tiny_pipeline_with_samples, words
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline
from visattn.trained import load_own, load_trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_with_samples(tmp_path_factory.mktemp("tiny"))


class TestSamples:
    def test_are_what_the_pipeline_made_and_told(self, folder):
        found = samples.SampleSet(folder / "samples")
        assert len(found) == 10
        assert found.index.kind == "flow"
        assert found.index.anchor == "hidden_states"
        assert found.index.time_scale == 1.0
        pipe = PixelDiTPipeline.from_pretrained(folder / "model")
        generator = torch.Generator().manual_seed(5)
        image = pipe([2], num_inference_steps=3, generator=generator, output_type="pt").images
        latents, told = found.take([5], torch.zeros(1))
        torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), image, atol=1e-5, rtol=1e-4)
        assert told["class_labels"].tolist() == [2]

    def test_rows_of_guidance_belong_to_the_sample(self, folder):
        found = samples.SampleSet(folder / "samples")
        _, told = found.take([3, 7, 7], torch.tensor([0.9, 0.2, 0.6]))
        # Row 0 is the label (index mod 3), row 1 the null class.
        assert told["class_labels"].tolist() == [3, 1, 3]

    def test_resume_makes_the_same_shards(self, folder, tmp_path):
        out = tmp_path / "samples"
        shutil.copytree(folder / "samples", out)
        (out / "index.json").unlink()
        samples.shard_path(out, 1).unlink()
        cache(folder, out)
        for path in (folder / "samples").glob("*.safetensors"):
            assert equal(load_file(path), load_file(out / path.name))

    def test_other_settings_are_refused(self, folder):
        with pytest.raises(SystemExit, match="other settings"):
            cache(folder, folder / "samples", "--seed", "3")

    def test_images_with_labels_of_their_folders(self, folder, tmp_path):
        from PIL import Image

        for label in (0, 2):
            (tmp_path / "in" / str(label)).mkdir(parents=True)
            pixels = np.full((12, 10), 255 * (label == 2), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / str(label) / "a.png")
        cache(folder, tmp_path / "out", "--images", str(tmp_path / "in"))
        latents, told = samples.SampleSet(tmp_path / "out").take([0, 1], torch.zeros(2))
        assert latents.shape == (2, 1, 8, 8)
        assert latents.mean((1, 2, 3)).tolist() == [-1.0, 1.0]
        assert told["class_labels"].tolist() == [0, 2]

    @pytest.mark.parametrize(
        ("more", "error"),
        [
            (["--shard", "3"], "multiple of --batch"),
            (["--count", "0"], "at least 1"),
            (["--prompts", "nothing.txt"], "one of them"),
            (["--images", "nowhere"], "does not exist"),
            (["--size", "1x2x3"], "height x width"),
            (["--steps", "-1"], "below 0"),
        ],
    )
    def test_wrong_settings(self, folder, tmp_path, more, error, monkeypatch):
        monkeypatch.setattr(cache_samples, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match=error):
            cache(folder, tmp_path / "out", *more)

    def test_a_missing_shard_is_named(self, folder, tmp_path):
        shutil.copytree(folder / "samples", tmp_path / "samples")
        samples.shard_path(tmp_path / "samples", 1).unlink()
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors"):
            samples.SampleSet(tmp_path / "samples")


class TestConfig:
    @pytest.mark.parametrize(
        ("more", "error"),
        [
            (["--pattern", "na(windows=3)"], "no parameter 'windows'"),
            (["--pattern", "dense"], "what the teacher has"),
            (["--samples", "nowhere"], r"no index\.json"),
            (["--model", "nowhere"], "neither an embedded model"),
            (["--model", "digits"], "were made by"),
            (["--steps", "0"], "at least 1"),
            (["--clip", "-1"], "at least 0"),
            (["--ema", "1"], "from 0 to below 1"),
            (["--optimizer", "adam"], "adamw or prodigy or muon"),
            (["--optimizer", "muon", "--fsdp"], "needs whole weights"),
            (["--train", "all", "--lora", "2"], "needs projections to be put on, but --train is all"),
            (["--train", "q,z"], "'z' is none of"),
            (["--query-heads", "1"], "pass --attention-at after"),
            (["--train", "none", "--lora", "4"], "--train is none"),
            (["--denoising", "0", "--output", "0", "--attention", "0"], "every loss has weight 0"),
            (["--maps", "1"], r"linear or agent, not na\(window=3x3\)"),
            (["--micro-batch", "3"], "must be a multiple of"),
            (["--layers", "7"], "7"),
            (["--train", "none"], "leaves nothing to train"),
        ],
    )
    def test_wrong_settings(self, folder, tmp_path, more, error, monkeypatch):
        late = ("--micro-batch", "--layers", "none")
        if not any(word in more for word in late) or "--lora" in more:
            monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match=error):
            distill.main(words(folder, tmp_path / "out", *more))

    def test_out_is_a_file(self, folder, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(SystemExit, match="is a file"):
            distill.main(words(folder, tmp_path / "out"))

    @pytest.mark.parametrize(
        ("more", "package"), [(["--optimizer", "prodigy"], "prodigyopt"), (["--tensorboard"], "tensorboard")]
    )
    def test_missing_packages_are_named(self, folder, tmp_path, more, package, monkeypatch):
        found = settings.importlib.util.find_spec
        monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None if name == package else found(name))
        with pytest.raises(SystemExit, match=f"pip install {package}"):
            distill.main(words(folder, tmp_path / "out", *more))

    def test_help_has_every_setting(self, capsys):
        with pytest.raises(SystemExit):
            distill.main(["--help"])
        shown = capsys.readouterr().out
        assert all(settings.flag(entry) in shown for entry in settings.fields(Config))


class TestTraining:
    def test_trains_the_projections_and_nothing_else(self, folder, tmp_path):
        found = run(folder, tmp_path / "out", "--tensorboard" if _has("tensorboard") else "--no-tensorboard")
        own = dict(tiny_transformer().named_parameters())
        sites = [f"transformer_blocks.{i}.attn1" for i in range(2)]
        expected = {f"model.{s}.{p}.{w}" for s in sites for p in ("to_q", "to_k", "to_v", "to_out.0") for w in _parts}
        assert set(found) == expected
        moved = [(value - own[name.removeprefix("model.")]).abs().max().item() for name, value in found.items()]
        assert min(moved) > 0
        lines = log_of(tmp_path / "out")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert {"denoising", "output", "attention", "gradient", "lr"} <= lines[0].keys()

    def test_every_weight_is_trained_if_asked_for(self, folder, tmp_path):
        found = run(folder, tmp_path / "out", "--train", "all", "--optimizer", "muon")
        model = PixelDiTPipeline.from_pretrained(folder / "model").transformer
        own = dict(model.named_parameters())
        assert {f"model.{name}" for name in own} == set(found)
        same = [name for name, value in own.items() if torch.equal(value, found[f"model.{name}"])]
        assert len(same) < len(own) / 2

    def test_runs_one_after_the_other(self, folder, tmp_path):
        more = ("--pattern", "linear(feature=hedgehog)", "--own-lr", "0.1")
        run(folder, tmp_path / "first", *more)
        start = ("--weights", str(tmp_path / "first" / "student.safetensors"))
        apart = run(folder, tmp_path / "second", *more, "--steps", "2", *start)
        both = run(folder, tmp_path / "small", *more, "--then", "--steps", "2", "--out", str(tmp_path / "both"))
        assert load_trained(tmp_path / "both" / "student.safetensors").about["steps"] == 2
        assert equal(apart, both)

    def test_a_wrong_run_is_told_before_the_first_begins(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match="--ema 2"):
            run(folder, tmp_path / "out", "--then", "--steps", "2", "--then", "--ema", "2")

    def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest(self, folder, tmp_path):
        more = ("--optimizer", "muon", "--lr", "0.01", "--own-lr", "0.3")
        config = settings.parse(Config, None, words(folder, tmp_path, *more))
        named = {
            "student.transformer_blocks.0.attn1.to_q.weight": torch.nn.Parameter(torch.ones(4, 4)),
            "student.transformer_blocks.0.attn1.to_q.bias": torch.nn.Parameter(torch.ones(4)),
            "student.proj_out.weight": torch.nn.Parameter(torch.ones(4, 4)),
            "own.site.query_map": torch.nn.Parameter(torch.ones(4, 4)),
        }
        optimizer = optimizers.build_optimizer(named, config)
        muon, adam = optimizer.parts
        inner, *rest = named.values()
        assert [p for group in muon.param_groups for p in group["params"]] == [inner]
        assert [p for group in adam.param_groups for p in group["params"]] == rest
        assert [group["peak"] for group in optimizer.param_groups] == [0.01, 0.005, 0.3]
        for each in named.values():
            each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        other = optimizers.build_optimizer(named, config)
        other.load_state_dict(optimizer.state_dict())
        assert set(other.parts[0].state) == set(named.values())
        assert torch.equal(other.parts[0].state[inner]["momentum"], optimizer.state[inner]["momentum"])
        # Singular values of an orthogonal step are about 1, whatever those of the gradient.
        change = torch.linalg.svdvals((1 - inner.detach()) / (0.01 * 0.2 * 2))
        assert 0.5 < change.min() < change.max() < 1.5

    def test_comes_closer_to_the_teacher(self, folder, tmp_path):
        more = ("--steps", "60", "--denoising", "0", "--output", "1", "--save-every", "60", "--lr", "0.003")
        run(folder, tmp_path / "out", *more)
        lines = log_of(tmp_path / "out")
        first, last = ([line["output"] for line in part] for part in (lines[:10], lines[-10:]))
        assert sum(last) < 0.7 * sum(first)

    @pytest.mark.parametrize(
        "more",
        [
            (),
            ("--lora", "2", "--schedule", "constant"),
            ("--ema", "0", "--checkpointing"),
            ("--optimizer", "muon", "--train", "all", "--pattern", "linear(feature=hedgehog)"),
        ],
    )
    def test_stopped_and_resumed_is_the_same(self, folder, tmp_path, more, monkeypatch):
        whole = run(folder, tmp_path / "whole", *more)
        go_on = functools.partial(run, folder, tmp_path / "parts", *more)
        stopped(monkeypatch, loop.Run, "train_step", lambda run: run.step == 2, go_on)
        assert equal(whole, go_on())
        assert [line["step"] for line in log_of(tmp_path / "parts")] == [1, 2, 3, 4]

    def test_a_patterns_own_parameters_learn_and_are_kept(self, folder, tmp_path):
        from visattn import apply

        found = run(folder, tmp_path / "out", "--pattern", "linear(feature=hedgehog)", "--own-lr", "0.1")
        assert any(name.startswith("own.") for name in found)
        trained = load_trained(tmp_path / "out" / "student.safetensors")
        model = PixelDiTPipeline.from_pretrained(folder / "model").transformer
        with apply(model, "linear(feature=hedgehog)") as handle:
            start = {name: value.detach().clone() for name, value in handle.parameters.named_parameters()}
            load_own(handle, trained)
            now = dict(handle.parameters.named_parameters())
            assert all(torch.equal(now[name], value) for name, value in trained.own.items())
            assert not any(torch.equal(start[name], value) for name, value in trained.own.items())
        with apply(model, "mala") as handle, pytest.raises(ValueError, match=r"pass --pattern 'linear"):
            load_own(handle, trained)

    def test_attention_rows_come_closer_to_the_teachers(self, folder, tmp_path):
        from visattn import apply

        alone = ("--maps", "1", "--denoising", "0", "--output", "0", "--attention", "0", "--map-rows", "16")
        more = ("--steps", "40", "--train", "none", "--lr", "0.03", "--save-every", "40", "--warmup", "0")
        run(folder, tmp_path / "out", "--pattern", "linear(feature=hedgehog)", *alone, *more)
        rows, trained = {}, load_trained(tmp_path / "out" / "student.safetensors")
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        for name in ("dense", "before", "after"):
            model = PixelDiTPipeline.from_pretrained(folder / "model").transformer
            with apply(model, "dense" if name == "dense" else "linear(feature=hedgehog)") as handle, torch.no_grad():
                if name == "after":
                    load_own(handle, trained)
                found = rows.setdefault(name, {})
                handle.watch(lambda seen, found=found: found.setdefault(seen.site, seen.rows(torch.arange(16))))
                model(x, timestep=torch.full((4,), 500.0), class_labels=torch.tensor([0, 1, 2, 0]))
        assert len(rows["dense"]) == 2
        before, after = (losses.map_distance(rows[name], rows["dense"]) for name in ("before", "after"))
        least = losses.map_distance(rows["dense"], rows["dense"])
        assert least < after < before

    def test_interrupted_between_steps(self, folder, tmp_path, monkeypatch, capsys):
        before = signal.getsignal(signal.SIGINT)
        whole = run(folder, tmp_path / "whole")
        step = loop.Run.train_step

        def interrupted(self):
            if self.step == 1:
                signal.raise_signal(signal.SIGINT)
            return step(self)

        monkeypatch.setattr(loop.Run, "train_step", interrupted)
        run(folder, tmp_path / "parts")
        assert "stopped after 2 of 4 steps" in capsys.readouterr().out
        monkeypatch.setattr(loop.Run, "train_step", step)
        assert signal.getsignal(signal.SIGINT) is before
        assert equal(whole, run(folder, tmp_path / "parts"))

    def test_the_clock_ends_a_run_and_its_rate(self, folder, tmp_path, monkeypatch):
        seconds = itertools.count()
        monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(seconds))))
        # A step begins and ends with a look at the clock: it takes a second.
        run(folder, tmp_path, "--steps", "1000", "--seconds", "8", "--warmup", "0", "--log-every", "1")
        lines = log_of(tmp_path)
        assert [line["step"] for line in lines] == list(range(1, 9))
        rates = [line["lr"] for line in lines]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < 0.1 * rates[0]
        assert load_trained(tmp_path / "student.safetensors").about["steps"] == 8
        # What is over stays over.
        run(folder, tmp_path, "--steps", "1000", "--seconds", "8", "--warmup", "0", "--log-every", "1")
        assert log_of(tmp_path) == lines

    @pytest.mark.slow
    def test_killed_and_resumed_is_the_same(self, folder, tmp_path):
        more = ("--steps", "40", "--threads", "1")
        torch.set_num_threads(1)
        whole = run(folder, tmp_path / "whole", *more)
        command = [sys.executable, "-m", "scripts.distill.pipeline", *words(folder, tmp_path / "killed", *more)]
        checkpoint = tmp_path / "killed" / loop.CHECKPOINT
        for _ in range(2):
            killed(command, checkpoint)
        assert checkpoint.exists()
        assert equal(whole, run(folder, tmp_path / "killed", *more))

    @pytest.mark.slow
    def test_killed_with_two_processes_goes_on_with_one(self, folder, tmp_path):
        more = ("--attention", "0", "--clip", "0", "--threads", "1", "--lr", "0.001", "--ema", "0", "--steps", "12")
        torch.set_num_threads(1)
        whole = run(folder, tmp_path / "one", *more)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "scripts.distill.pipeline", *words(folder, tmp_path / "killed", *more)]
        killed(command, tmp_path / "killed" / loop.CHECKPOINT)
        assert not (tmp_path / "killed" / "student.safetensors").exists()
        rest = run(folder, tmp_path / "killed", *more)
        for name in (name for name in whole if not name.endswith("to_k.bias")):
            torch.testing.assert_close(whole[name], rest[name], atol=1e-3, rtol=1e-3)

    def test_micro_batches_sum_to_the_batch(self, folder, tmp_path):
        # Relative attention distances are of each part.
        more = ("--clip", "0", "--attention", "0")
        whole, parts = (run(folder, tmp_path / n, "--micro-batch", n, *more) for n in ("4", "2"))
        # Softmax does not see the bias of keys: its gradient is rounding, which Adam makes large.
        for name in (name for name in whole if not name.endswith("to_k.bias")):
            torch.testing.assert_close(whole[name], parts[name], atol=1e-3, rtol=1e-3)

    def test_parts_of_processes_are_the_batch(self, folder, tmp_path):
        config = settings.parse(Config, None, words(folder, tmp_path, "--batch", "8", "--micro-batch", "2"))
        parts = [part for rank in range(2) for part in optimizers.micro_batches(config, rank, 2)]
        assert [i for part in parts for i in range(8)[part]] == list(range(8))
        with pytest.raises(ValueError, match="multiple of 3 processes"):
            optimizers.micro_batches(config, 0, 3)

    def test_another_runs_checkpoint_is_refused(self, folder, tmp_path):
        run(folder, tmp_path / "out")
        with pytest.raises(SystemExit, match=r"seed 0 then, 1 now.*--no-resume"):
            run(folder, tmp_path / "out", "--seed", "1")
        run(folder, tmp_path / "out", "--seed", "1", "--no-resume")

    def test_pictures(self, folder, tmp_path):
        from PIL import Image

        run(folder, tmp_path / "out", "--sample-every", "4")
        with Image.open(tmp_path / "out" / "samples" / "000004.png") as picture:
            assert picture.size == (3 * 8, 8)

    def test_log_of_a_killed_run_is_trimmed(self, tmp_path):
        log = tmp_path / "log.jsonl"
        log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
        state.trim_log(log, 2)
        assert log.read_text() == '{"step": 1}\n{"step": 2}\n'

    def test_rates(self, folder, tmp_path):
        config = settings.parse(Config, None, words(folder, tmp_path, "--steps", "100", "--warmup", "10"))
        rates = [optimizers.rate_share(step, step / 100, config) for step in range(100)]
        assert rates[0] == pytest.approx(0.1, abs=0.01)
        assert max(rates) == rates[9] or max(rates) == rates[10]
        assert rates[-1] < 0.03


_parts = ("weight", "bias")


def _has(package):
    import importlib.util

    return importlib.util.find_spec(package) is not None
