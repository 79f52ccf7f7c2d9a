"""Distillation: losses, and runs that are killed and go on."""

import functools
import itertools
import signal
import sys
import types

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


from safetensors.torch import load_file

from scripts.cli import only_run
from scripts.distill import (
    loop,
    losses,
    optimizers,
    settings,
    state,
    training,
)
from scripts.distill.config import Config
from tests.support.runs import equal, killed, log_of, stopped
from tests.support.tiny_digits import tiny_transformer
from tests.support.tiny_distill import run, tiny_pipeline_with_samples, words
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline
from visattn.trained import load_own, load_trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_with_samples(tmp_path_factory.mktemp("tiny"))


class TestFaults:
    @pytest.mark.parametrize("size", [0, 100, 20000])
    def test_a_checkpoint_that_is_not_whole_is_said(self, folder, tmp_path, size, monkeypatch):
        run(folder, tmp_path / "out", "--steps", "1")
        path = tmp_path / "out" / "checkpoint.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match=r"checkpoint.safetensors is no checkpoint .* pass --no-resume to begin"):
            run(folder, tmp_path / "out", "--steps", "1")

    def test_a_file_that_is_no_checkpoint_is_said(self, folder, tmp_path):
        run(folder, tmp_path / "out", "--steps", "1")
        (tmp_path / "out" / "student.safetensors").replace(tmp_path / "out" / "checkpoint.safetensors")
        with pytest.raises(SystemExit, match=r"checkpoint.safetensors is no checkpoint of a distillation: pass"):
            run(folder, tmp_path / "out", "--steps", "1")

    def test_a_second_run_does_not_write_to_the_folder_of_one_that_runs(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with only_run(tmp_path / "out"), pytest.raises(SystemExit, match=r"another run is writing to .*out"):
            run(folder, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())

    @pytest.mark.parametrize("every", ["1", "10"])
    def test_a_training_that_diverges_writes_no_student(self, folder, tmp_path, every):
        with pytest.raises(SystemExit, match="the training has diverged"):
            run(folder, tmp_path / "out", "--lr", "1e30", "--clip", "0", "--log-every", every, "--save-every", every)
        assert not list((tmp_path / "out").glob("student*"))
        # What is there is of before, and can be read.
        for path in (tmp_path / "out").glob("*.safetensors"):
            assert all(value.isfinite().all() for value in load_file(path).values())


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
        with pytest.raises(SystemExit, match=r"out is that of two runs: give each one behind --then its own"):
            run(folder, tmp_path / "out", "--then", "--steps", "2")

    @pytest.mark.parametrize(
        ("more", "error"),
        [
            (
                ("--out", "{tmp}/b", "--weights", "{tmp}/old/student.safetensors"),
                "starts from the one before it",
            ),
            (("--out", "{tmp}/old"), r"old.checkpoint\.safetensors is from another run \(steps 2 then, 4 now\)"),
        ],
    )
    def test_folders_and_starts_of_later_runs_are_looked_at_before_the_first(
        self, folder, tmp_path, more, error, monkeypatch
    ):
        run(folder, tmp_path / "old", "--steps", "2")
        monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match=error):
            run(folder, tmp_path / "a", "--then", *(each.format(tmp=tmp_path) for each in more))

    def test_runs_that_are_stopped_in_the_second_go_on_to_the_same_weights(self, folder, tmp_path, monkeypatch):
        whole = run(folder, tmp_path / "a", "--then", "--out", str(tmp_path / "b"), "--lr", "0.02")
        again = functools.partial(run, folder, tmp_path / "c", "--then", "--out", str(tmp_path / "d"), "--lr", "0.02")
        stopped(monkeypatch, loop.Run, "train_step", lambda each: each.config.out.name == "d" and each.step == 2, again)
        assert equal(again(), whole)

    def test_lora_of_another_scale_is_no_start(self, folder, tmp_path):
        pytest.importorskip("peft")
        run(folder, tmp_path / "a", "--lora", "2", "--lora-alpha", "4", "--steps", "1")
        start = ("--weights", str(tmp_path / "a" / "student.safetensors"), "--steps", "1")
        with pytest.raises(SystemExit, match="counts 2 times, here it counts 1 times: pass --lora-alpha 4"):
            run(folder, tmp_path / "b", "--lora", "2", *start)
        run(folder, tmp_path / "b", "--lora", "2", "--lora-alpha", "4", *start)

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
        before = tmp_path / "before.jsonl"
        before.hardlink_to(log)
        state.trim_log(log, 2)
        assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
        # Another file took its place: a kill meanwhile leaves the older one whole.
        assert before.read_text().endswith('{"st')

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
