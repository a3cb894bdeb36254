"""The noise of other programs against torch on the CPU, and A1111's ImageRNG restated on torch."""

import numpy as np
import pytest

from sd_jax.diffusion.noise_sources import NoiseSource, TorchCPU, draw, philox, slerp, webui_noise

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # torch tensors in numpy
]
SEEDS = [0, 1, 42, 31337, 2**32 - 1, 2**40 + 5, -7]
SHAPES = [(1,), (4, 3), (15,), (16,), (17,), (31,), (4, 8, 8), (4, 63, 61), (1, 4, 64, 64), (3, 4, 16, 24)]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def generator(torch, seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_integers(torch, seed):
    """To the bit: 64 whole bits (two numbers, the first is the high one), the low 31, and a remainder."""
    whole = torch.empty(700, dtype=torch.int64).random_(-(2**63), None, generator=generator(torch, seed))
    ours = TorchCPU(seed).integers(1400).astype(np.uint64)
    np.testing.assert_array_equal(ours[::2] << np.uint64(32) | ours[1::2], whole.numpy().view(np.uint64))
    low = torch.empty(700, dtype=torch.int32).random_(generator=generator(torch, seed))
    np.testing.assert_array_equal(TorchCPU(seed).integers(700) & (2**31 - 1), low.numpy())
    small = torch.randint(0, 1000, (700,), generator=generator(torch, seed))
    np.testing.assert_array_equal(TorchCPU(seed).integers(700) % 1000, small.numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_randn(torch, shape, seed):
    theirs = torch.randn(shape, generator=generator(torch, seed)).numpy()
    ours = draw("torch_cpu", seed, shape)
    print(f"largest difference {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_draws_after_each_other(torch):
    source, theirs = NoiseSource("torch_cpu", 9), generator(torch, 9)
    for shape in [(3,), (4, 8, 8), (1,), (2,), (7,), (20,), (9,), (1,), (16,), (5,)]:
        np.testing.assert_allclose(source.draw(shape), torch.randn(shape, generator=theirs).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 5, 2**33 + 1])
def test_nv(torch, seed):
    """A1111's arithmetic on the integers: its constants are float32, numpy computes in float64."""
    source = NoiseSource("nv", seed)
    scale, turn = np.float32([2.3283064e-10]), np.float32([2.3283064e-10 * 6.2831855])
    for offset in range(3):
        counter = np.zeros((4, 500), np.uint32)
        counter[0], counter[2] = offset, np.arange(500)
        x, y = philox(counter, np.array([[seed % 2**32], [seed >> 32]], np.uint32))[:2]
        theirs = np.sqrt(-2.0 * np.log(x * scale + scale / 2)) * np.sin(y * turn + turn / 2)
        np.testing.assert_array_equal(source.draw((500,)), theirs.astype(np.float32))


def webui_slerp(torch, low, high, t):
    """On torch, along the axis that A1111 takes."""
    lengths = [noise.norm(dim=1, keepdim=True) for noise in (low, high)]
    cosine = (low / lengths[0] * (high / lengths[1])).sum(1)
    if cosine.mean() > 0.9995:
        return low * t + high * (1 - t)
    angle = torch.acos(cosine)
    return sum((torch.sin(u * angle) / torch.sin(angle)).unsqueeze(1) * noise for u, noise in ((1 - t, low), (t, high)))


@pytest.mark.parametrize("strength", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("nearness", [0.0, 0.99, 0.9999])
def test_slerp(torch, nearness, strength):
    low, other = np.random.default_rng(0).standard_normal((2, 4, 8, 7)).astype(np.float32)
    high = np.float32(nearness) * low + np.float32((1 - nearness**2) ** 0.5) * other
    theirs = webui_slerp(torch, torch.from_numpy(low), torch.from_numpy(high), strength)
    np.testing.assert_allclose(slerp(low, high, strength), theirs.numpy(), atol=2e-5)


@pytest.mark.parametrize("resize_from", [None, (6, 4), (9, 12)])
@pytest.mark.parametrize("strength", [0.0, 0.4])
@pytest.mark.parametrize("ensd", [0, 31337])
def test_webui(torch, ensd, strength, resize_from):
    """The starting noise and three draws of one picture, 8 x 7."""
    seed, subseed, shape = 1234, 99, (4, 8, 7)
    image = generator(torch, seed)
    size = (4, *resize_from) if resize_from else shape
    noise = torch.randn(size, generator=generator(torch, seed) if resize_from else image)
    if strength:
        noise = webui_slerp(torch, noise, torch.randn(size, generator=generator(torch, subseed)), strength)
    if resize_from:
        x = torch.randn(shape, generator=image)
        dy, dx = (shape[1] - size[1]) // 2, (shape[2] - size[2]) // 2
        h, w = (have if d >= 0 else have + 2 * d for have, d in ((size[1], dy), (size[2], dx)))
        ty, tx, dy, dx = max(dy, 0), max(dx, 0), max(-dy, 0), max(-dx, 0)
        x[:, ty : ty + h, tx : tx + w] = noise[:, dy : dy + h, dx : dx + w]
        noise = x
    if ensd:
        image = generator(torch, seed + ensd)
    draws = torch.stack([torch.randn(shape, generator=image) for _ in range(3)])
    ours = webui_noise("torch_cpu", seed, (8, 7, 4), 3, ensd, subseed, strength, resize_from)
    np.testing.assert_allclose(ours[0].transpose(2, 0, 1), noise.numpy(), atol=5e-6)
    np.testing.assert_allclose(ours[1].transpose(0, 3, 1, 2), draws.numpy(), rtol=0, atol=2e-6)
