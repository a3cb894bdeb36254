"""Against torch's `interpolate`, and against ComfyUI's bislerp, restated here from its description."""

import numpy as np
import pytest

from sd_jax.sampling.resize import resize_latents

pytestmark = pytest.mark.parity

SIZES = [((8, 8), (16, 16)), ((9, 13), (17, 20)), ((64, 48), (96, 72)), ((12, 10), (7, 9)), ((5, 7), (5, 1))]
SIZES += [((2, 3), (82, 94)), ((40, 33), (20, 11)), ((1, 4), (3, 6))]  # 2 -> 82: where torch's nearest rounds


def latents(size, channels=4, seed=0):
    return np.random.default_rng(seed).standard_normal((2, *size, channels)).astype(np.float32)


def interpolate(x, size, mode):
    torch = pytest.importorskip("torch")
    options = {} if mode == "nearest" else {"align_corners": False}
    y = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), size=size, mode=mode, **options
    )
    return y.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "new"), SIZES)
def test_equals_torch(method, size, new):
    x = latents(size)
    difference = np.abs(resize_latents(x, *new, method) - interpolate(x, new, method)).max()
    print(f"{method} {size} -> {new}: {difference:.1e}")
    assert difference < (1e-9 if method == "nearest" else 3e-5)  # torch counts places in float32


def ramp(values, new):
    """A list of numbers, interpolated linearly to `new` of them by torch."""
    torch = pytest.importorskip("torch")
    values = torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)
    return torch.nn.functional.interpolate(values, size=new, mode="linear", align_corners=False).flatten()


def slerp_one(a, b, share):
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    unit_a = a / norm_a if norm_a else a
    unit_b = b / norm_b if norm_b else b
    dot = unit_a @ unit_b
    if dot > 1 - 1e-5:
        return a
    if dot < 1e-5 - 1:
        return (1 - share) * a + share * b
    angle = np.arccos(dot)
    direction = (np.sin((1 - share) * angle) * unit_a + np.sin(share * angle) * unit_b) / np.sin(angle)
    return direction * ((1 - share) * norm_a + share * norm_b)


def comfy_bislerp(x, size):
    """Vector after vector, in float64: along each row, then along each column of the result.

    The two neighbours of a place are what the ramps 0, 1, ..., n-1 and 1, 2, ..., n-1, n-1 give there, cut to whole
    numbers; the share is what is cut from the first.
    """
    for axis, new in ((2, size[1]), (1, size[0])):
        count = x.shape[axis]
        places = ramp(list(range(count)), new)
        first = places.long().tolist()
        second = ramp([min(i + 1, count - 1) for i in range(count)], new).long().tolist()
        shares = (places - places.floor()).tolist()
        lines = np.moveaxis(x.astype(np.float64), axis, 0)
        flat = lines.reshape(count, -1, x.shape[-1])
        made = [
            [slerp_one(a, b, share) for a, b in zip(flat[i], flat[j], strict=True)]
            for i, j, share in zip(first, second, shares, strict=True)
        ]
        x = np.moveaxis(np.asarray(made).reshape(new, *lines.shape[1:]), 0, axis)
    return x


@pytest.mark.parametrize(("size", "new"), [pair for pair in SIZES if pair[0] != (64, 48)])
def test_bislerp_is_that_of_comfyui(size, new):
    x = latents(size)
    x[0, 0, 0] = 0.0  # a vector without a direction,
    x[0, -1, -1] = 2 * x[0, -1, -2]  # one that is parallel to its neighbour,
    x[1, 0, 0] = -2 * x[1, 0, 1] if size[1] > 1 else x[1, 0, 0]  # and one that is opposite
    difference = np.abs(resize_latents(x, *new, "bislerp") - comfy_bislerp(x, new)).max()
    print(f"bislerp {size} -> {new}: {difference:.1e}")
    assert difference < 1e-4  # places are float32, and almost opposite vectors turn fast
