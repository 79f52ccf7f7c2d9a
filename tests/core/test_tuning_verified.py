"""The figures of a tuned schedule in words: units, no null, no sixteen digits."""

import pytest

from visattn.tuning.verified import in_words


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ({"held": True}, "yes"),
        ({"samples": 20}, "20"),
        ({"psnr_mean": 30.04}, "30.0 dB"),
        ({"psnr_worst": None}, "equal to dense"),
        ({"snr_worst": 19.96}, "20.0 dB"),
        ({"attention_seconds": 0.0871754809995764}, "87.2 ms"),
        ({"seconds_dense": 1.8129520194997895}, "1.81 s"),
        ({"ssim_mean": 1.0}, "1.000"),
        ({"accuracy_lost": -0.34}, "-0.34 points"),
        ({"accuracy_dense": 0.966}, "96.6%"),
    ],
)
def test_each_figure_has_its_unit(figure, words):
    ((name,),) = (figure,)
    assert in_words(figure) == [(name.replace("_", " "), words)]
