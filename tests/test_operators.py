"""Operators: adjoints, spectra and solves against dense matrices, on both precisions and on odd and even sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odlkit.operators import (
    Adjoint,
    BlockSampling,
    Blur,
    BlurDecimate,
    Compose,
    Decimation,
    Gradient,
    Identity,
    Mask,
    NotConverged,
    Operator,
    Scaled,
    Stack,
    ValidBlur,
    Wavelet,
    as_operator,
    conjugate_gradient,
)

CG_TOLERANCE = {torch.float64: 2e-10, torch.float32: 2e-5}  # twice what conjugate_gradient promises


def noise(*shape, dtype=torch.float64, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def kernel(h=3, w=3, seed=0, batch=None):
    k = torch.rand((h, w) if batch is None else (batch, 1, h, w), generator=torch.Generator().manual_seed(seed)).double()
    return k / k.sum((-2, -1), keepdim=True)


def dense(op, like):
    """Matrix of ``op`` on one item of the shape of ``like``: column j is ``A e_j``."""
    n = like[0].numel()
    return op.A(torch.eye(n, dtype=like.dtype, device=like.device).view(n, *like.shape[1:])).flatten(1).T


class Halves:
    """A foreign linear physics: it has only A and A_adjoint (extra keywords allowed), and no closed form anywhere."""

    def A(self, x, **kwargs):
        return torch.cat([x[..., ::2], 0.5 * x[..., 1::2]], dim=-1)

    def A_adjoint(self, y, **kwargs):
        x = torch.zeros_like(y)
        x[..., ::2], x[..., 1::2] = y[..., : y.shape[-1] // 2], 0.5 * y[..., y.shape[-1] // 2 :]
        return x


# name -> (operator from a seed, side lengths are multiples of this)
CASES = {
    "identity": (lambda s: Identity(), 1),
    "blur odd kernel": (lambda s: Blur(kernel(3, 5, s)), 1),
    "blur even kernel": (lambda s: Blur(kernel(4, 2, s)), 1),
    "valid blur odd": (lambda s: ValidBlur(kernel(3, 5, s)), 1),
    "valid blur even": (lambda s: ValidBlur(kernel(4, 2, s)), 1),
    "mask": (lambda s: Mask((noise(1, 1, 1, 1, seed=s) > -9) * 0.7), 1),
    "decimation": (lambda s: Decimation(2), 2),
    "blur decimate 2": (lambda s: BlurDecimate(kernel(4, 3, s), 2), 2),
    "blur decimate 3": (lambda s: BlurDecimate(kernel(3, 3, s), 3), 3),
    "gradient": (lambda s: Gradient(), 1),
    "haar": (lambda s: Wavelet("haar", 2), 4),
    "db2": (lambda s: Wavelet("db2", 1), 2),
    "db4": (lambda s: Wavelet("db4", 2), 4),
    "block sampling": (lambda s: BlockSampling(noise(5, 9, seed=s)), 3),
    "block sampling tall": (lambda s: BlockSampling(noise(6, 4, seed=s)), 2),
    "scaled blur": (lambda s: -1.5 * Blur(kernel(3, 3, s)), 1),
    "scaled wavelet": (lambda s: 3.0 * Wavelet("haar", 1), 2),
    "blur of blur": (lambda s: Blur(kernel(3, 3, s)) @ Blur(kernel(2, 5, s + 1)), 1),
    "blur of gradient": (lambda s: Blur(kernel(3, 3, s)) @ Gradient(), 1),
    "gradient of blur": (lambda s: Gradient() @ Blur(kernel(3, 3, s)), 1),
    "wavelet of blur": (lambda s: Wavelet("haar", 1) @ Blur(kernel(3, 3, s)), 2),
    "blur of wavelet": (lambda s: Blur(kernel(3, 3, s)) @ Wavelet("db2", 1), 2),
    "blur of synthesis": (lambda s: Blur(kernel(3, 3, s)) @ Adjoint(Wavelet("db2", 1)), 2),
    "wavelet of mask": (lambda s: Wavelet("haar", 1) @ Mask(torch.tensor([[[[0.2, 1.0]]]]).double().repeat(1, 1, 6, 3)), 6),
    "adjoint of blur": (lambda s: Adjoint(Blur(kernel(2, 3, s))), 1),
    "decimated blur": (lambda s: Decimation(2) @ Blur(kernel(3, 3, s)), 2),
    "stack": (lambda s: Stack(Blur(kernel(3, 3, s)), 0.5 * Gradient(), Identity()), 1),
    "stack with mask": (lambda s: Stack(Gradient(), Mask(torch.ones(1, 1, 1, 1).double())), 1),
    "stack of wavelet": (lambda s: Stack(Blur(kernel(3, 3, s)), Wavelet("haar", 1)), 2),
    "blur of stack": (lambda s: Blur(kernel(3, 3, s)) @ Stack(Wavelet("haar", 1), Identity()), 2),
    "foreign": (lambda s: as_operator(Halves()), 2),
}
every_case = pytest.mark.parametrize("name", CASES)


def build(name, seed, height, width, batch=1, channels=1, dtype=torch.float64, device="cpu"):
    make, unit = CASES[name]
    side = lambda n: 6 if name == "wavelet of mask" else -(-n // unit) * unit  # noqa: E731
    op, x = make(seed), noise(batch, channels, side(height), side(width), dtype=dtype, device=device, seed=seed)
    return op, x


sizes = st.integers(5, 8)
seeds = st.integers(0, 1000)


@every_case
@given(seed=seeds, height=sizes, width=sizes, batch=st.integers(1, 3), channels=st.integers(1, 3))
def test_adjoint(name, device, dtype, seed, height, width, batch, channels):
    """<A x, y> = <x, A^T y>, with A_adjoint called before A as well."""
    op, x = build(name, seed, height, width, batch, channels, dtype, device)
    shape = build(name, seed, height, width, batch, channels)[0].A(x).shape
    y = noise(*shape, dtype=dtype, device=device, seed=seed + 1)
    back, forward = op.A_adjoint(y), op.A(x)
    assert back.shape == x.shape and back.dtype == forward.dtype == dtype and back.device == x.device
    left, right = (forward.double() * y.double()).sum(), (x.double() * back.double()).sum()
    assert abs(left - right) <= 20 * torch.finfo(dtype).eps * (forward.norm() * y.norm() + x.norm() * back.norm())


@every_case
@given(seed=seeds, height=sizes, width=sizes, channels=st.integers(1, 2), rho=st.sampled_from([1e-2, 0.3, 5.0]))
def test_solve(name, device, dtype, seed, height, width, channels, rho):
    """(A^T A + rho I) solve(r) = r, for one rho and for one rho per item; normal is A^T A."""
    op, r = build(name, seed, height, width, 2, channels, dtype, device)
    for penalty in (rho, torch.tensor([rho, 3 * rho], dtype=dtype, device=device).view(2, 1, 1, 1)):
        z = op.solve(r, penalty)
        assert z.dtype == dtype and z.shape == r.shape
        product = op.A_adjoint(op.A(z))
        backward = torch.finfo(dtype).eps * (op.eigenvalue_range(r)[1] + 3 * rho) * z.norm()  # what round-off allows
        assert (product + penalty * z - r).norm() <= CG_TOLERANCE[dtype] * r.norm() + 20 * backward
        atol = 50 * torch.finfo(dtype).eps * (z.norm() + product.norm()).item()
        assert torch.allclose(op.normal(z), product, rtol=0, atol=atol)


@every_case
@given(seed=seeds, height=sizes, width=sizes)
def test_spectrum(name, dtype, seed, height, width):
    """eigenvalue_range bounds the spectrum of the dense A^T A from both sides; gram has exactly its eigenvalues."""
    op, x = build(name, seed, height, width, dtype=dtype)
    matrix = dense(op, x).double()
    eigenvalues = torch.linalg.eigvalsh(matrix.T @ matrix)
    low, high = op.eigenvalue_range(x)
    slack = 30 * torch.finfo(dtype).eps * high
    assert low <= eigenvalues[0] + slack and eigenvalues[-1] <= high + slack
    # the upper bound is the norm itself, except where a bound is documented as such
    assert high <= eigenvalues[-1] * (1 + 1e-5) + slack or name.startswith("valid blur")
    gram = op.gram(x)
    if gram is not None:
        impulse = torch.zeros_like(x)
        impulse[..., 0, 0] = 1
        column = op.A_adjoint(op.A(impulse))
        assert torch.allclose(torch.fft.rfft2(column).real, gram.expand_as(torch.fft.rfft2(column).real), atol=100 * slack)
        assert abs(low - eigenvalues[0].clamp_min(0)) <= 100 * slack


@every_case
def test_autograd_goes_through(name, device):
    """The derivative of ||A x||^2 / 2 is A^T A x, and A_adjoint and solve can be differentiated too."""
    op, x = build(name, 0, 6, 6, 2, 1, device=device)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(op.A(x).square().sum() / 2, x)
    assert torch.allclose(grad, op.normal(x), atol=1e-10)
    y = op.A(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad((op.A_adjoint(y) * x).sum(), y)
    assert torch.allclose(grad, op.A(x), atol=1e-10)
    (grad,) = torch.autograd.grad((op.solve(x, 0.3) * x.detach()).sum(), x)
    assert torch.allclose(grad, op.solve(x.detach(), 0.3), atol=1e-7)  # the solve is its own adjoint


CLOSED = ["identity", "blur odd kernel", "gradient", "haar", "blur of blur", "blur of gradient", "gradient of blur",
          "wavelet of blur", "stack", "stack of wavelet"]  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_is_kept(name):
    op, x = build(name, 0, 6, 6)
    assert op.gram(x) is not None


NOT_CLOSED = ["blur of wavelet", "blur of synthesis", "decimated blur", "blur of stack", "stack with mask", "foreign"]


@pytest.mark.parametrize("name", NOT_CLOSED)
def test_no_false_closed_form(name):
    """Their A^T A is not a circular convolution: claiming one would make the solve wrong."""
    op, x = build(name, 0, 6, 6)
    assert op.gram(x) is None


def test_unitary_solve_is_a_division(dtype):
    """rhs / (1 + rho), to the last bit: no Fourier round trip."""
    for op in (Identity(), Wavelet("db2", 1), Wavelet("haar", 1) @ Wavelet("db2", 1), Adjoint(Wavelet("haar", 1))):
        r = noise(2, 1, 6, 8, dtype=dtype)
        assert torch.equal(op.solve(r, 0.3), r / 1.3) and op.eigenvalue_range(r) == (1.0, 1.0)


@given(seed=seeds, height=sizes, width=sizes, h=st.integers(1, 4), w=st.integers(1, 4))
def test_blur_definition(seed, height, width, h, w):
    """(A x)_i = sum_j k_j x_{i - j + c} with indices mod n and c = (h // 2, w // 2), written as loops of shifts."""
    k, x = kernel(h, w, seed), noise(2, 2, height, width, seed=seed)
    expected = sum(k[a, b] * x.roll((a - h // 2, b - w // 2), (-2, -1)) for a in range(h) for b in range(w))
    assert torch.allclose(Blur(k).A(x), expected, atol=1e-13)


@pytest.mark.parametrize("make", [Blur, ValidBlur, lambda k: BlurDecimate(k, 2), lambda k: Gradient() @ Blur(k),
                                  lambda k: Mask(torch.ones(1, 1, 1, 1)) @ Blur(k)])  # fmt: skip
def test_batched_kernels(make, dtype):
    """Item b with kernel b, alone or in a batch: the same image, solve and (over the batch) the same norm."""
    kernels, x = kernel(4, 3, 1, batch=3), noise(3, 2, 8, 10, dtype=dtype)
    kernels[1] *= 2  # another norm for one item
    together, alone = make(kernels), [make(k[0]) for k in kernels]
    atol = 2e-4 if dtype == torch.float32 else 1e-8
    rho = torch.tensor([0.1, 0.2, 0.5], dtype=dtype).view(3, 1, 1, 1)
    y = together.A(x)
    for b, op in enumerate(alone):
        assert torch.allclose(y[b], op.A(x[b : b + 1])[0], atol=atol)
        assert torch.allclose(together.A_adjoint(y)[b], op.A_adjoint(y[b : b + 1])[0], atol=atol)
        assert torch.allclose(together.solve(x, rho)[b], op.solve(x[b : b + 1], rho[b].item())[0], atol=atol)
    highs = [op.eigenvalue_range(x[:1])[1] for op in alone]
    assert together.eigenvalue_range(x)[1] == pytest.approx(max(highs), rel=1e-4)
    assert max(highs) > 1.5 * min(highs)  # so that looking at the first item only would be caught


@given(seed=seeds, h=st.integers(1, 5), w=st.integers(1, 5), height=sizes, width=sizes)
def test_valid_blur(seed, h, w, height, width):
    """crop undoes extend; the seen part equals the plain valid convolution, hence the circular blur of any continuation."""
    op, y = ValidBlur(kernel(h, w, seed)), noise(1, 1, height, width, seed=seed)
    for mode in ("replicate", "constant"):
        scene = op.extend(y, mode)
        assert scene.shape[-2:] == (height + h - 1, width + w - 1) and torch.equal(op.crop(scene), y)
    scene = noise(1, 1, height + h - 1, width + w - 1, seed=seed + 1)
    flipped = op.blur.kernel.flip(-2, -1)[None, None]
    assert torch.allclose(op.A(scene), torch.nn.functional.conv2d(scene, flipped), atol=1e-13)
    wide = torch.nn.functional.pad(scene, (3, 3, 3, 3))
    wide[..., 0, :] = 9.0  # what lies further outside is not felt
    top, left = 3 + op.margins[2], 3 + op.margins[0]
    assert torch.allclose(op.blur.A(wide)[..., top : top + height, left : left + width], op.A(scene), atol=1e-12)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym5", "coif1"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_wavelet(wavelet, levels, device, dtype):
    """Orthonormal both ways, also when the filter is longer than the band, and equal to PyWavelets' coefficients."""
    pywt = pytest.importorskip("pywt")
    op, x = Wavelet(wavelet, levels), noise(2, 3, 16, 24, dtype=dtype, device=device)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.allclose(op.A_adjoint(op.A(x)), x, atol=atol) and torch.allclose(op.A(op.A_adjoint(x)), x, atol=atol)
    with pytest.warns() if levels > pywt.dwtn_max_level((16, 24), wavelet) else _nothing():
        theirs = pywt.wavedec2(x.cpu().numpy(), wavelet, mode="periodization", level=levels, axes=(-2, -1))
    theirs = pywt.coeffs_to_array([theirs[0], *theirs[1:]], axes=(-2, -1))[0]
    assert torch.allclose(op.A(x).cpu(), torch.from_numpy(theirs), atol=atol)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_blur_decimate_solve_is_dense_solve(factor):
    op, rhs = BlurDecimate(kernel(5, 4), factor), noise(2, 1, 12, 12)
    matrix = dense(op, rhs)
    for rho in (1e-3, 1.0):
        expected = torch.linalg.solve(matrix.T @ matrix + rho * torch.eye(144).double(), rhs.flatten(1).T).T
        assert torch.allclose(op.solve(rhs, rho).flatten(1), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert op.eigenvalue_range(rhs)[1] == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item() ** 2, rel=1e-12)


def test_block_sampling_reads_blocks_row_by_row():
    phi, x = noise(7, 16), noise(2, 3, 8, 12)
    y = BlockSampling(phi).A(x)
    assert y.shape == (2, 21, 2, 3)
    for i in range(2):
        for j in range(3):
            block = x[1, 2, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert torch.allclose(y[1, 14:, i, j], phi @ block.reshape(-1))


def test_decimation_solve_keeps_float32_digits():
    """The textbook Woodbury form loses eps / rho at the samples; this one must not."""
    rhs = noise(1, 1, 8, 8, dtype=torch.float32)
    exact = Decimation(2).solve(rhs.double(), 1e-4)
    assert ((Decimation(2).solve(rhs, 1e-4) - exact).abs() <= 1e-6 * exact.abs()).all()


def test_stack_adjoint_before_forward():
    """The split of channels does not depend on an earlier call, and stacks nest."""
    op = Stack(Gradient(), Stack(Identity(), Blur(kernel())))
    y = noise(1, 8, 5, 6)
    expected = Gradient().A_adjoint(y[:, :4]) + y[:, 4:6] + Blur(kernel()).A_adjoint(y[:, 6:])
    assert torch.allclose(op.A_adjoint(y), expected)


def test_foreign_operators_are_accepted():
    x = noise(1, 1, 6, 6)
    assert isinstance(as_operator(Halves()), Operator)
    for op in (Compose(Halves(), Blur(kernel())), Scaled(Halves(), 2.0), Stack(Halves(), Identity())):
        z = op.solve(x, 0.1)
        assert torch.allclose(op.A_adjoint(op.A(z)) + 0.1 * z, x, atol=1e-8)
    with pytest.raises(TypeError, match="expected an object with A and A_adjoint, got int"):
        as_operator(3)


def test_conjugate_gradient_raises_when_it_cannot():
    scale = torch.logspace(-8, 8, 64).double().view(1, 1, 8, 8)
    with pytest.raises(NotConverged, match="relative residual .* after 20 steps"):
        conjugate_gradient(lambda x: scale * x, noise(1, 1, 8, 8), max_iter=20)
    with pytest.raises(NotConverged):
        conjugate_gradient(lambda x: x * float("nan"), noise(1, 1, 8, 8), max_iter=5)


def test_conjugate_gradient_solves_items_on_their_own(dtype):
    """An easy, a hard and a zero item: each meets the tolerance, and a warm start at the solution costs nothing."""
    scale = torch.stack([torch.ones(16), torch.linspace(0.1, 10, 16), torch.ones(16)]).to(dtype)
    rhs = noise(3, 16, dtype=dtype)
    rhs[2] = 0
    x = conjugate_gradient(lambda z: scale * z, rhs)
    assert torch.allclose(x, rhs / scale, rtol=1e-3 if dtype == torch.float32 else 1e-8, atol=1e-6) and (x[2] == 0).all()
    assert torch.equal(conjugate_gradient(lambda z: scale * z, rhs, x0=rhs / scale, max_iter=0, rtol=1e-5), rhs / scale)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Blur(torch.ones(3)), r"kernel: expected shape \(h, w\) or \(B, 1, h, w\), got \(3,\)"),
        (lambda: Blur(torch.ones(1, 3, 2, 2)), "kernel: expected shape"),
        (lambda: Blur(torch.ones(9, 3)).A(noise(1, 1, 8, 8)), "kernel: 9x3 is larger than the image, 8x8"),
        (lambda: Decimation(2).A(noise(1, 1, 7, 8)), "image: both sides must be multiples of 2"),
        (lambda: Wavelet("haar", 3).A(noise(1, 1, 12, 8)), "image: both sides must be multiples of 8"),
        (lambda: Wavelet("bior2.2"), "wavelet: expected an orthogonal family"),
        (lambda: BlockSampling(noise(3, 5)), r"phi: expected shape \(M, size\^2\)"),
        (lambda: BlockSampling(noise(4)), r"phi: expected shape \(M, size\^2\)"),
        (lambda: BlockSampling(noise(3, 4)).A(noise(1, 1, 5, 4)), "image: both sides must be multiples of 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
