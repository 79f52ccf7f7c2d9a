"""The weights that a distillation leaves: into models, pipelines and the command line, and back out."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from scripts.distill import samples, settings, training
from scripts.distill.config import Config
from tests.support.runs import equal
from tests.support.tiny_digits import tiny_transformer
from tests.support.tiny_distill import run, tiny_pipeline_with_samples, words
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline
from visattn.trained import Trained, load_own, load_trained, save_trained, trained_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_with_samples(tmp_path_factory.mktemp("tiny"))


class TestTrained:
    def test_into_the_model_and_out_again(self, folder, tmp_path):
        path = tmp_path / "out" / "student.safetensors"
        run(folder, tmp_path / "out")
        model = PixelDiTPipeline.from_pretrained(folder / "model").transformer
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trained = load_trained(path)
        with trained_weights(model, trained):
            now = model.state_dict()
            assert all(torch.equal(now[name], value) for name, value in trained.model.items())
            assert not equal(dict(now), before)
        assert equal(dict(model.state_dict()), before)
        assert trained.about["pattern"] == "na(window=3x3)"

    def test_lora_is_the_students_forward(self, folder, tmp_path):
        more = ("--lora", "2", "--lora-alpha", "6", "--ema", "0")
        config = settings.parse(Config, None, words(folder, tmp_path / "out", *more))
        made = training.Training(config)
        for _ in range(2):
            made.train_step()
        made.config.out.mkdir()
        trained = load_trained(made.export())
        assert set(trained.lora) == set(made.learner.lora) and not trained.model
        model = PixelDiTPipeline.from_pretrained(folder / "model").transformer
        arguments = {"timestep": torch.tensor([300.0]), "class_labels": torch.tensor([1])}
        x = torch.randn(1, 1, 8, 8)
        from visattn import apply

        with torch.no_grad(), trained_weights(model, trained), apply(model, config.pattern) as handle:
            load_own(handle, trained)
            found = model(x, **arguments).sample
            torch.testing.assert_close(found, made.learner.student(x, **arguments).sample, atol=1e-5, rtol=1e-4)

    def test_wrong_files(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            load_trained(tmp_path / "nothing.safetensors")
        (tmp_path / "text.safetensors").write_text("text")
        with pytest.raises(ValueError, match="is no file of weights, or not whole"):
            load_trained(tmp_path / "text.safetensors")
        samples.save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"not written by scripts\.distill\.pipeline"):
            load_trained(tmp_path / "other.safetensors")

    @pytest.mark.parametrize(
        "trained",
        [
            Trained({"nowhere.weight": torch.zeros(2)}, {}, {}, {"model": "x"}),
            Trained({}, {"nowhere": (torch.zeros(1, 2), torch.zeros(2, 1))}, {}, {"model": "x"}),
        ],
    )
    def test_another_models_weights(self, trained, tmp_path):
        path = tmp_path / "w.safetensors"
        save_trained(path, trained)
        with (
            pytest.raises(ValueError, match="the weights are for 'x'"),
            trained_weights(tiny_transformer(), load_trained(path)),
        ):
            pass

    def test_generate_uses_them(self, folder, tmp_path):
        from typer.testing import CliRunner

        from visattn.cli import app

        run(folder, tmp_path / "out", "--lr", "0.1")
        command = ["generate", "image", "--model", str(folder / "model"), "--pattern", "na(window=3x3)", "--label", "1"]
        command += ["--steps", "2", "--device", "cpu"]
        weights = ["--weights", str(tmp_path / "out" / "student.safetensors")]
        for name, more in (("with", weights), ("without", [])):
            result = CliRunner().invoke(app, [*command, *more, "--out", str(tmp_path / name)])
            assert result.exit_code == 0, result.output
        one, other = ((tmp_path / name / "sparse-000.png").read_bytes() for name in ("with", "without"))
        assert one != other


class TestStart:
    """`--weights`: a run that starts from an earlier student."""

    STILL = ("--lr", "1e-12", "--own-lr", "1e-12", "--ema", "0", "--steps", "1")

    @pytest.mark.parametrize("more", [(), ("--pattern", "linear(feature=hedgehog)", "--lora", "2", "--own-lr", "0.1")])
    def test_is_that_student(self, folder, tmp_path, more):
        first = run(folder, tmp_path / "first", *more)
        start = ("--weights", str(tmp_path / "first" / "student.safetensors"))
        again = run(folder, tmp_path / "again", *more, *start, *self.STILL)
        plain = run(folder, tmp_path / "plain", *more, *self.STILL)
        assert first.keys() == again.keys()
        for name, value in first.items():
            torch.testing.assert_close(again[name], value, atol=1e-7, rtol=0)
        assert not all(torch.equal(plain[name], value) for name, value in first.items())

    def test_another_pattern_of_its_kind(self, folder, tmp_path):
        run(folder, tmp_path / "first")
        start = ("--weights", str(tmp_path / "first" / "student.safetensors"), "--pattern", "na(window=2x2)")
        run(folder, tmp_path / "again", *start)
        assert load_trained(tmp_path / "again" / "student.safetensors").about["pattern"] == "na(window=2x2)"

    def test_wrong_ones(self, folder, tmp_path, monkeypatch):
        run(folder, tmp_path / "first")
        path = str(tmp_path / "first" / "student.safetensors")
        with pytest.raises(SystemExit, match=r"first/student.safetensors .* which does not learn here: train the same"):
            run(folder, tmp_path / "again", "--weights", path, "--train", "q")
        monkeypatch.setattr(training, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(SystemExit, match="does not exist"):
            run(folder, tmp_path / "again", "--weights", str(tmp_path / "nothing.safetensors"))


class TestStudentFile:
    """`apply(target, "student.safetensors")`: weights, pattern and layers of a student at once."""

    @pytest.fixture(scope="class")
    @staticmethod
    def path(folder, tmp_path_factory):
        out = tmp_path_factory.mktemp("student")
        more = ("--pattern", "linear(feature=hedgehog)", "--lora", "2", "--own-lr", "0.1", "--dense-layers", "1")
        run(folder, out, *more)
        return out / "student.safetensors"

    @staticmethod
    def draw(pipe):
        return pipe([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    def test_one_argument(self, folder, path):
        import visattn

        pipe = PixelDiTPipeline.from_pretrained(folder / "model")
        before, dense = {n: v.clone() for n, v in pipe.transformer.state_dict().items()}, self.draw(pipe)
        trained = load_trained(path)
        with (
            trained_weights(pipe.transformer, trained),
            visattn.apply(pipe, "linear(feature=hedgehog)", dense_layers=1, strict=True) as handle,
        ):
            load_own(handle, trained)
            expected = self.draw(pipe)
        for target in (pipe, pipe.transformer):
            with visattn.apply(target, str(path)) as handle:
                assert self.draw(pipe).equal(expected)
                assert [str(site.pattern) for site in handle.report().sites] == ["dense", "linear(feature=hedgehog)"]
            assert equal(dict(pipe.transformer.state_dict()), before)
            assert self.draw(pipe).equal(dense) and not dense.equal(expected)

    def test_wrong_ones_change_nothing(self, folder, path, tmp_path):
        import visattn

        pipe = PixelDiTPipeline.from_pretrained(folder / "model")
        before = {n: v.clone() for n, v in pipe.transformer.state_dict().items()}
        with pytest.raises(ValueError, match=r"layers='0': .*itself says"):
            visattn.apply(pipe, path, layers="0")
        with pytest.raises(ValueError, match="does not exist"):
            visattn.apply(pipe, tmp_path / "nothing.safetensors")
        with pytest.raises(ValueError, match="nothing"):
            visattn.apply(pipe, path, backend="nothing")
        other = tmp_path / "other.safetensors"
        save_trained(other, Trained({"nowhere.weight": torch.zeros(2)}, {}, {}, {"model": "x", "pattern": "mala"}))
        with pytest.raises(ValueError, match="fit no model of PixelDiTPipeline: the weights are for 'x'"):
            visattn.apply(pipe, other)
        # Its weights fit, its pattern does not.
        trained = load_trained(path)
        save_trained(other, Trained({}, trained.lora, trained.own, trained.about | {"pattern": "mala"}))
        with pytest.raises(ValueError, match="parameters of the pattern"):
            visattn.apply(pipe, other)
        assert equal(dict(pipe.transformer.state_dict()), before)
        with visattn.apply(pipe, path):
            pass

    def test_export_is_a_plain_folder(self, folder, path, tmp_path):
        import visattn
        from scripts.distill import export

        export.main(["--model", str(folder / "model"), "--weights", str(path), "--out", str(tmp_path / "out")])
        plain, pipe = (PixelDiTPipeline.from_pretrained(each) for each in (tmp_path / "out", folder / "model"))
        with trained_weights(pipe.transformer, load_trained(path)):
            assert self.draw(plain).equal(self.draw(pipe))
        with visattn.apply(pipe, path), visattn.apply(plain, tmp_path / "out" / "student.safetensors"):
            assert self.draw(plain).equal(self.draw(pipe))

    def test_an_export_that_fails_leaves_no_folder(self, folder, path, tmp_path, monkeypatch):
        from scripts.distill import export

        words = ["--model", str(folder / "model"), "--weights", str(path), "--out", str(tmp_path / "out")]
        with monkeypatch.context() as patched:
            patched.setattr(
                "visattn.trained.save_trained", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
            )
            with pytest.raises(SystemExit, match="No space left"):
                export.main(words)
        assert not (tmp_path / "out").exists()
        export.main(words)
        assert load_trained(tmp_path / "out" / path.name).about["model"] == str(tmp_path / "out")

    def test_export_refuses_before_a_model_is_loaded(self, folder, tmp_path, monkeypatch):
        from scripts.distill import export

        monkeypatch.setattr(export, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
        given = ["--model", str(folder / "model"), "--weights", str(tmp_path / "no.safetensors")]
        with pytest.raises(SystemExit, match="does not exist"):
            export.main([*given, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="is not empty"):
            export.main([*given, "--out", str(folder)])
