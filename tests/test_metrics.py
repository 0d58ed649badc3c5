"""Scores against scikit-image, hand-computed values and known shifts."""

import math

import pytest
import torch

from odlkit import metrics


def pair(device="cpu", shape=(2, 3, 40, 37)):
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(shape, generator=generator)
    return (truth + 0.1 * torch.randn(shape, generator=generator)).to(device), truth.to(device)


def smooth(seed=0, size=80):
    """A smooth random picture, so that neighbouring shifts are told apart by degrees."""
    noise = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel = torch.ones(1, 1, 5, 5, dtype=torch.float64) / 25
    return torch.nn.functional.conv2d(torch.nn.functional.conv2d(noise, kernel), kernel)


@pytest.mark.parametrize("border", [0, 4])
def test_psnr_equals_scikit_image(device, border):
    from skimage.metrics import peak_signal_noise_ratio

    x, truth = pair(device)
    score = metrics.psnr(x, truth, border=border)
    assert score.shape == (2,) and score.dtype == torch.float64 and score.device == x.device
    for i in range(2):
        inside = [t[i, :, border : 40 - border, border : 37 - border].double().cpu().numpy() for t in (truth, x)]
        assert score[i].item() == pytest.approx(peak_signal_noise_ratio(*inside, data_range=1), abs=1e-9)


def test_psnr_values():
    truth = torch.full((1, 1, 8, 8), 0.5)
    assert metrics.psnr(truth + 0.1, truth).item() == pytest.approx(20, abs=1e-5)  # mean square 0.01
    assert metrics.psnr(truth * 255 + 25.5, truth * 255, data_range=255).item() == pytest.approx(20, abs=1e-5)
    assert metrics.psnr(truth, truth).item() == math.inf
    framed = truth.clone()
    framed[..., 0] = 0
    assert metrics.psnr(framed, truth).item() < 20 and metrics.psnr(framed, truth, border=1).item() == math.inf


@pytest.mark.parametrize("border", [0, 4])
def test_ssim_equals_scikit_image(device, border):
    from skimage.metrics import structural_similarity

    x, truth = pair(device)
    score = metrics.ssim(x, truth, border=border)
    assert score.shape == (2,) and score.device == x.device
    for i in range(2):
        one, two = (t[i, :, border : 40 - border, border : 37 - border].double().cpu().numpy() for t in (x, truth))
        channels = [structural_similarity(one[c], two[c], data_range=1, gaussian_weights=True, sigma=1.5, win_size=11,
                                          use_sample_covariance=False) for c in range(3)]  # fmt: skip
        assert score[i].item() == pytest.approx(sum(channels) / 3, abs=1e-9)
    assert metrics.ssim(truth, truth).tolist() == pytest.approx([1, 1])


def test_ssim_of_constant_images_by_hand():
    """Without variance SSIM is its luminance term ``(2 a b + C1) / (a^2 + b^2 + C1)``, C1 = 0.01^2."""
    a, b = 0.4, 0.6
    score = metrics.ssim(*(torch.full((1, 1, 16, 16), value, dtype=torch.float64) for value in (a, b))).item()
    assert score == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-9)


def test_luminance_values(device):
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0.2, 0.5, 0.8]], dtype=torch.float64, device=device)
    y = metrics.luminance(colours.view(4, 3, 1, 1))
    assert y.shape == (4, 1, 1, 1)
    by_hand = [16, 235, 81.481, 16 + 13.0962 + 64.2765 + 19.9728]
    assert (255 * y).flatten().tolist() == pytest.approx(by_hand, abs=1e-9)


def test_luminance_equals_scikit_image():
    from skimage.color import rgb2ycbcr

    x, _ = pair()
    x = x.clamp(0, 1).double()
    reference = torch.from_numpy(rgb2ycbcr(x.numpy(), channel_axis=1))[:, :1] / 255
    torch.testing.assert_close(metrics.luminance(x), reference, atol=1e-9, rtol=0)


def test_align_recovers_whole_shifts_per_item(device):
    truth = smooth().to(device)
    x = torch.stack([truth[0].roll((-3, 2), (-2, -1)), truth[1].roll((5, 0), (-2, -1))])
    assert metrics.best_shift(x, truth).tolist() == [[3, -2], [-5, 0]]
    moved, inside = metrics.align(x, truth)
    assert moved.shape == inside.shape == (2, 1, 42, 42)
    assert torch.equal(moved, inside) and torch.equal(inside, truth[..., 15:-15, 15:-15])
    assert (metrics.psnr_up_to_shift(x, truth) == math.inf).all() and (metrics.psnr(x, truth) < 40).all()
    assert metrics.ssim_up_to_shift(x, truth).tolist() == pytest.approx([1, 1])


def test_a_shift_beyond_the_reach_is_not_forgiven():
    truth = smooth()
    x = truth.roll((0, 4), (-2, -1))
    assert (metrics.psnr_up_to_shift(x, truth, reach=3) < 40).all()
    assert (metrics.psnr_up_to_shift(x, truth, reach=4) == math.inf).all()


def test_align_recovers_fractions():
    """``truth`` is ``x`` interpolated half a pixel down and a quarter to the right of a whole shift."""
    x = smooth(seed=3)
    down = 0.5 * x + 0.5 * x.roll(1, -2)
    truth = (0.75 * down + 0.25 * down.roll(1, -1)).roll((-2, 1), (-2, -1))
    assert metrics.best_shift(x, truth, step=0.25).tolist() == [[-1.5, 1.25]] * 2
    assert (metrics.psnr_up_to_shift(x, truth, step=0.25) > 200).all()
    half, whole = (metrics.psnr_up_to_shift(x, truth, step=step) for step in (0.5, 1.0))
    assert (whole < half).all() and (half < 100).all()


def test_equal_candidates_take_the_smallest_shift():
    constant = torch.full((1, 1, 40, 40), 0.5)
    assert metrics.best_shift(constant, constant, step=0.5).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    "call, argument",
    [
        (lambda x: metrics.psnr(x, x[..., 1:]), "x, truth"),
        (lambda x: metrics.ssim(x, x[:1]), "x, truth"),
        (lambda x: metrics.psnr(x[0], x[0]), "x, truth"),
        (lambda x: metrics.best_shift(x, x[..., 1:, :]), "x, truth"),
        (lambda x: metrics.psnr(x.byte(), x.byte()), "floating"),
        (lambda x: metrics.psnr(x, x, border=19), "border"),
        (lambda x: metrics.psnr(x, x, border=-1), "border"),
        (lambda x: metrics.psnr(x, x, data_range=0), "data_range"),
        (lambda x: metrics.ssim(x, x, data_range=-1), "data_range"),
        (lambda x: metrics.ssim(x, x, border=14), "11 pixels"),
        (lambda x: metrics.luminance(x[:, :1]), "rgb"),
        (lambda x: metrics.align(x, x, reach=5, border=4), "border"),
        (lambda x: metrics.align(x, x, reach=5, border=20), "border"),
        (lambda x: metrics.align(x, x, step=0.3), "step"),
    ],
)
def test_bad_input_names_the_argument(call, argument):
    with pytest.raises(ValueError, match=argument):
        call(pair()[0])


def test_gmsd_equals_a_direct_computation_and_has_its_known_properties(device):
    """Against scipy; zero for equal pictures, symmetric, worse for more noise; it sees a lost edge."""
    from scipy.ndimage import correlate

    x, truth = pair(device, (2, 3, 40, 36))
    kernel = torch.tensor([[1.0, 0, -1]] * 3).double().numpy() / 3

    def magnitude(picture):
        luma = 255 * (picture * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1).to(picture)).sum(0).double().cpu().numpy()
        small = sum(luma[i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        parts = [correlate(small, k, mode="constant") for k in (kernel, kernel.T)]
        return (parts[0] ** 2 + parts[1] ** 2) ** 0.5

    score = metrics.gmsd(x, truth)
    assert score.shape == (2,) and score.dtype == torch.float64 and score.device == x.device
    for i in range(2):
        a, b = magnitude(x[i].double()), magnitude(truth[i].double())
        assert score[i].item() == pytest.approx(((2 * a * b + 170) / (a**2 + b**2 + 170)).std(), abs=1e-6)
    assert metrics.gmsd(truth, truth).max() == 0
    assert torch.allclose(metrics.gmsd(x, truth), metrics.gmsd(truth, x))
    noise = x - truth
    levels = [metrics.gmsd(truth + s * noise, truth).mean().item() for s in (0.3, 1, 3)]
    assert levels == sorted(levels) and levels[0] > 0.001
    black = torch.zeros(1, 1, 20, 20)
    framed = torch.nn.functional.pad(black + 0.5, [10] * 4)
    assert metrics.gmsd(framed, framed + 0.0).item() == 0 < metrics.gmsd(0 * framed, framed).item()
    with pytest.raises(ValueError, match="expected 1 or 3 channels and sides of 6 pixels or more"):
        metrics.gmsd(x[:, :2], truth[:, :2])
