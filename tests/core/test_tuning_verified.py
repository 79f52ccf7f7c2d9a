"""The figures of a tuned schedule in words: units, no null, no sixteen digits."""

import pytest

from visattn.tuning.verified import in_words


@pytest.mark.parametrize(
    ("figure", "name", "words"),
    [
        ({"held": True}, "held", "yes"),
        ({"samples": 20}, "samples", "20"),
        ({"psnr_mean": 30.04}, "PSNR mean", "30.0 dB"),
        ({"psnr_worst": None}, "PSNR worst", "equal to dense"),
        ({"snr_worst": 19.96}, "SNR worst", "20.0 dB"),
        ({"attention_seconds": 0.0871754809995764}, "time in attention", "87.2 ms"),
        ({"seconds_dense": 1.8129520194997895}, "time of a sample dense", "1.81 s"),
        ({"ssim_mean": 1.0}, "SSIM mean", "1.000"),
        ({"accuracy_lost": -0.34}, "accuracy lost", "-0.34 points"),
        ({"accuracy_dense": 0.966}, "accuracy dense", "96.6%"),
    ],
)
def test_each_figure_has_its_name_and_unit(figure, name, words):
    assert in_words(figure) == [(name, words)]
