"""PSNR and SSIM against scikit-image's."""

import pytest
import torch

from visattn.metrics import psnr, ssim


def pictures(shape, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=generator)
    return a, (a + noise * torch.randn(shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("shape", [(2, 3, 32, 40), (1, 1, 11, 11), (3, 1, 64, 17)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_same_as_scikit_image(shape, noise):
    skimage = pytest.importorskip("skimage.metrics")
    a, b = pictures(shape, noise=noise)
    for i in range(shape[0]):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        assert psnr(a, b)[i].item() == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=1), abs=1e-9)
        expected = skimage.structural_similarity(
            x, y, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(a, b)[i].item() == pytest.approx(expected, abs=1e-9)


def test_equal_pictures_and_known_distance():
    a, _ = pictures((2, 3, 16, 16))
    assert psnr(a, a).tolist() == [float("inf")] * 2
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    black, grey = torch.zeros(1, 1, 12, 12), torch.full((1, 1, 12, 12), 0.1)
    assert psnr(black, grey).item() == pytest.approx(20, abs=1e-5)


def test_half_precision_is_widened():
    a, b = pictures((1, 3, 16, 16))
    assert psnr(a.half(), b.half()).dtype == torch.float64
    assert ssim(a.half(), b.half()).item() == pytest.approx(ssim(a, b).item(), abs=1e-3)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_shapes_are_refused(metric):
    with pytest.raises(ValueError, match=r"pictures \[1, 3, 16, 16\] and \[1, 3, 16, 17\] must both be"):
        metric(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 17))
    with pytest.raises(ValueError, match="must both be"):
        metric(torch.rand(3, 16, 16), torch.rand(3, 16, 16))
    with pytest.raises(ValueError, match="sides of at least 11"):
        ssim(torch.rand(1, 1, 10, 16), torch.rand(1, 1, 10, 16))
