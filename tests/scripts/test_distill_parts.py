"""The parts of distillation that need no run: noise and losses."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from scripts.distill import losses, noise
from tests.support.tiny_digits import tiny_transformer


class TestNoise:
    flow = noise.Noise("flow", (1000.0, 900.0, 100.0), 0.001)

    def test_flow(self):
        clean, dirt, times = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0.0, 250.0])
        mixed, target, told = self.flow.mix(clean, dirt, times)
        assert mixed[:, 0].tolist() == [1.0, 0.75]
        assert target[:, 0].tolist() == [-1.0, -1.0]
        torch.testing.assert_close(told, torch.tensor([0.0, 0.25]))

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_diffusion(self, kind):
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler()
        clean, dirt, times = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0, 500, 999])
        process = noise.Noise(kind, (999.0, 500.0), alphas=scheduler.alphas_cumprod)
        mixed, target, told = process.mix(clean, dirt, times.float())
        torch.testing.assert_close(mixed, scheduler.add_noise(clean, dirt, times))
        truths = {"epsilon": dirt, "sample": clean, "v_prediction": scheduler.get_velocity(clean, dirt, times)}
        torch.testing.assert_close(target, truths[kind])
        assert process.weights(times.float()) is None
        assert told.tolist() == [0, 500, 999]

    def test_errors_of_a_predicted_sample_count_as_those_of_its_velocity(self):
        process = noise.Noise("sample", (1000.0,), 0.001)
        clean, dirt, times = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([100.0, 500.0, 1000.0])
        mixed, target, told = process.mix(clean, dirt, times)
        torch.testing.assert_close(target, clean)
        torch.testing.assert_close(told, times / 1000)
        guess = torch.randn(3, 2, 4)
        velocity = (mixed - guess) / told.view(-1, 1, 1)
        found = losses.distance(guess, target, process.weights(times))
        torch.testing.assert_close(found, torch.nn.functional.mse_loss(velocity, dirt - clean))
        assert process.weights(torch.zeros(1)).isfinite().all()
        assert self.flow.weights(times) is None

    @pytest.mark.parametrize("kind", noise.KINDS)
    @pytest.mark.parametrize("diffusion", [False, True])
    def test_errors_of_steps_are_those_behind_a_step_of_the_sampler(self, kind, diffusion):
        if not diffusion and kind in ("epsilon", "v_prediction"):
            return
        visited = (900.0, 800.0, 500.0, 100.0)
        alphas = torch.linspace(0.999, 0.01, 1000) if diffusion else None
        process, x, off = noise.Noise(kind, visited, alphas=alphas), torch.tensor([2.0]), 0.1

        def shares(time):
            if alphas is None:
                return 1 - time / 1000, time / 1000
            alpha = alphas[int(time)].item() if time else 1.0
            return alpha**0.5, (1 - alpha) ** 0.5

        def step(guess, time, after):
            # What each kind says about the clean sample and the noise, and both mixed for the next time.
            (signal, dirt), (next_signal, next_dirt) = shares(time), shares(after)
            if kind == "flow":
                return x + (next_dirt - dirt) * guess
            if kind == "v_prediction":
                clean, e = signal * x - dirt * guess, dirt * x + signal * guess
            elif kind == "sample":
                clean, e = guess, (x - signal * guess) / dirt
            else:
                clean, e = (x - dirt * guess) / signal, guess
            return next_signal * clean + next_dirt * e

        if kind == "flow" and diffusion:
            return
        found = process.weights(torch.tensor(visited), "step")
        for i, (time, after) in enumerate(zip(visited, (*visited[1:], 0.0), strict=True)):
            moved = step(torch.tensor([0.7 + off]), time, after) - step(torch.tensor([0.7]), time, after)
            torch.testing.assert_close(found[i] * off**2, (moved * len(visited)).square()[0], rtol=1e-4, atol=1e-6)
        assert process.weights(torch.tensor([950.0, 600.0, 50.0, 0.0]), "step").isfinite().all()

    def test_a_sampler_that_visits_time_0_has_a_step_from_there(self):
        alphas = torch.linspace(0.999, 0.01, 1000)
        process = noise.Noise("epsilon", (500.0, 0.0), alphas=alphas)
        ratio = [((1 - alphas[i]) / alphas[i]).sqrt() for i in (500, 0)]
        # An error of the noise moves x / sqrt(alpha) by the difference of these ratios.
        expected = torch.stack([(2 * (ratio[1] - ratio[0]) * alphas[0].sqrt()) ** 2, (2 * ratio[1]) ** 2])
        torch.testing.assert_close(process.weights(torch.tensor([500.0, 0.0]), "step"), expected)

    def test_sampler_times_have_its_density(self):
        times = self.flow.draw(30_000, "sampler", torch.Generator().manual_seed(0))
        assert times.min() >= 0 and times.max() <= 1000
        # A third of the draws falls between each pair of neighbouring times.
        assert ((times > 900).float().mean() - 1 / 3).abs() < 0.02
        assert ((times < 100).float().mean() - 1 / 3).abs() < 0.02

    @pytest.mark.parametrize(("how", "low"), [("uniform", 0.1), ("logit-normal", 0.014)])
    def test_other_times(self, how, low):
        times = self.flow.draw(30_000, how, torch.Generator().manual_seed(0))
        assert ((times < 100).float().mean() - low).abs() < 0.01


class TestLosses:
    def test_attention_distance(self):
        truth = {"a": torch.full((2, 3), 2.0), "b": torch.ones(4)}
        found = {"a": torch.full((2, 3), 3.0), "b": torch.zeros(4)}
        assert losses.attention_distance(found, truth, relative=False).item() == 1.0
        assert losses.attention_distance(found, truth, relative=True).item() == pytest.approx((0.25 + 1) / 2)

    def test_map_distance_is_least_at_the_truth(self):
        truth = torch.rand(1, 2, 3, 5).softmax(-1)
        best = losses.map_distance({"a": truth}, {"a": truth})
        assert best.item() == pytest.approx(-(truth * truth.log()).sum(-1).mean().item(), rel=1e-5)
        assert losses.map_distance({"a": torch.full_like(truth, 0.2)}, {"a": truth}) > best

    @pytest.mark.parametrize("before", [True, False])
    def test_recorder_sees_attention_before_or_after_its_projection(self, before):
        model = tiny_transformer()
        attention = model.transformer_blocks[1].attn1
        recorder = losses.Recorder({"it": attention}, before)
        arguments = {"timestep": torch.tensor([5.0]), "class_labels": torch.tensor([1])}
        with recorder, torch.no_grad():
            model(torch.randn(1, 1, 8, 8), **arguments)
        inside = recorder.kept["it"]
        assert inside.shape == (1, 16, 16)
        with torch.no_grad():
            model(torch.randn(1, 1, 8, 8), **arguments)
        assert recorder.kept["it"] is inside, "it records outside of its context"


@pytest.mark.parametrize("how", ["sampler", "uniform", "logit-normal"])
def test_the_times_of_a_batch_are_spread_over_their_distribution(how):
    flow = noise.Noise("flow", (1000.0, 900.0, 500.0, 100.0))
    batches = [flow.draw(8, how, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert all(batch.min() >= 0 and batch.max() <= 1000 for batch in batches)
    # Each has one time in every eighth, in any order.
    times = torch.stack([batch.sort().values for batch in batches])
    assert (times[:, :-1].amax(0) <= times[:, 1:].amin(0) + 1e-3).all()
    assert len({tuple(batch.argsort().tolist()) for batch in batches}) > 100
    median = torch.cat(batches).median().item()
    assert median == pytest.approx({"sampler": 500, "uniform": 500, "logit-normal": 500}[how], abs=25)


def test_what_all_calls_are_told_is_sent_once(tmp_path):
    from scripts.distill import samples

    constants = {"img_ids": torch.arange(6).view(2, 3), "noise.alphas": torch.rand(3), "w": torch.rand(2).double()}
    samples.save_tensors(tmp_path / "constants.safetensors", constants)
    samples.save_tensors(samples.shard_path(tmp_path, 0), {samples.LATENTS: torch.zeros(1, 2)})
    plain = {"kind": "flow", "timesteps": [1000.0], "plain": {}, "settings": {}, "shards": [1]}
    samples.Index(model="x", denoiser="x", anchor="x", time_scale=1.0, **plain).save(tmp_path)
    found = samples.SampleSet(tmp_path)
    one, again = found.told(torch.device("cpu")), found.told(torch.device("cpu"))
    assert set(one) == {"img_ids", "w"} and one["w"].dtype == torch.float32
    assert one["img_ids"] is again["img_ids"]
