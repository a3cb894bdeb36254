"""Upscalers of small random weights: whole, in tiles, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax import hardware
from sd_jax.checkpoints import read_safetensors, write_torch
from sd_jax.models.presets import RRDBConfig, SRVGGConfig
from sd_jax.models.rrdb import upscaler as network_of
from sd_jax.upscalers import esrgan
from tests.checkpoints import tiny_upscalers

RNG = np.random.default_rng(0)
UNSHUFFLED = RRDBConfig(scale=1, unshuffle=4, features=8, blocks=1, growth=4)


def pictures(batch, height, width):
    """Smooth ones, of which a seam would stand out."""
    y, x = np.mgrid[:height, :width] / 9
    waves = [np.stack([np.sin(x + i), np.cos(y - i), np.sin((x + y) / 2)], -1) for i in range(batch)]
    return np.round(127.5 + 100 * np.stack(waves)).astype(np.uint8)


def moderate(tensors, last):
    """With less contrast, so that few pixels are clipped."""
    return {**tensors, f"{last}.weight": tensors[f"{last}.weight"] / 10, f"{last}.bias": tensors[f"{last}.bias"] + 0.3}


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    path = tmp_path_factory.mktemp("compact") / "a.safetensors"
    read_safetensors.write(path, moderate(tiny_upscalers.compact(), "body.6"))
    return sd_jax.load_upscaler(path)


@pytest.fixture(scope="module")
def unshuffled(tmp_path_factory):
    path = tmp_path_factory.mktemp("unshuffled") / "a.pth"
    tensors = moderate(tiny_upscalers.rrdb("real_esrgan", UNSHUFFLED), "conv_last")
    write_torch.write_object(path, {"params_ema": tensors})
    return sd_jax.load_upscaler(path)


@pytest.fixture
def seen(monkeypatch):
    """The shapes of what is computed at once."""
    shapes, run = set(), esrgan._run
    monkeypatch.setattr(esrgan, "_run", lambda network, params, x: shapes.add(x.shape) or run(network, params, x))
    return shapes


def test_whole_pictures_are_what_the_network_makes(compact):
    small = pictures(2, 9, 11)
    made = compact(small)
    assert compact.scale == 3 and made.shape == (2, 27, 33, 3) and made.dtype == np.uint8
    image = compact.network.apply({"params": compact.params}, jnp.asarray(small / 127.5 - 1, jnp.float32))
    expected = np.clip(np.asarray(image) * 127.5 + 127.5, 0, 255)
    assert expected.std() > 10 and np.abs(made - expected).max() < 0.51


def test_sides_that_do_not_divide_are_padded(unshuffled):
    small = pictures(1, 10, 13)
    assert unshuffled.config == UNSHUFFLED
    mirrored = np.pad(small, ((0, 0), (0, 2), (0, 3), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(unshuffled(small), unshuffled(mirrored)[:, :10, :13])


@pytest.mark.parametrize(("name", "tile", "overlap"), [("compact", 20, 16), ("unshuffled", 96, 64)])
def test_seams_do_not_show(name, tile, overlap, request):
    """Nowhere is the joined picture steeper than the whole one by more than 5 %; without overlap it is.

    At the edges of a tile the convolutions meet zeros: margins leave out most of what comes of it, and ramps spread
    the rest. The compact network sees 4 pixels around each, which is its margin here: what is left is rounding.
    """
    upscaler = request.getfixturevalue(name)
    small = pictures(1, tile + 16, 2 * tile - 8)
    whole = upscaler(small).astype(int)
    joined = {between: upscaler(small, tile=tile, overlap=between).astype(int) for between in (overlap, 0)}
    steeper = {between: np.max(steps(each) / steps(whole)) for between, each in joined.items()}
    error = np.abs(joined[overlap] - whole)
    print(f"{name}: steps {steeper}, error {error.mean():.3f} levels, at most {error.max()}")
    assert steeper[overlap] < 1.05 and steeper[0] > 1.1
    assert error.max() <= 1 if name == "compact" else error.mean() < 1


def steps(pixels):
    """From each column to the next, on average."""
    return np.abs(np.diff(pixels, axis=2)).mean((0, 1, 3))


def test_tiles_are_of_one_shape_whatever_the_picture(compact, seen):
    """So nothing is compiled for another picture, and the device holds one tile."""
    sizes = [(1, 40, 40), (2, 33, 70), (1, 16, 17)]
    made = [compact(pictures(*size), tile=16).shape for size in sizes]
    assert made == [(batch, 3 * height, 3 * width, 3) for batch, height, width in sizes]
    assert seen == {(1, 16, 16, 3)}


def test_one_tile_is_the_whole_picture(compact, unshuffled):
    for upscaler in (compact, unshuffled):
        small = pictures(2, 9, 14)
        np.testing.assert_array_equal(upscaler(small, tile=32), upscaler(small))


@pytest.mark.parametrize(
    ("images", "tile", "said"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), None, r"images: float32 of the shape \(1, 8, 8, 3\): give uint8"),
        (np.zeros((8, 8, 3), np.uint8), None, r"give uint8 \[batch, height, width, 3\]; of one picture images\[None\]"),
        (np.zeros((1, 8, 8, 4), np.uint8), None, "give uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), None, "give uint8"),
        (pictures(1, 8, 8), 6, "tile=6: this upscaler takes multiples of 4: give 4"),
        (pictures(1, 8, 8), 0, "tiles of side 0 cannot overlap"),
    ],
)
def test_refused(unshuffled, images, tile, said):
    with pytest.raises(ValueError, match=said) as refused:
        unshuffled(images, tile=tile)
    assert "\n" not in str(refused.value)


def test_what_is_too_large_at_once_is_refused_and_fits_in_tiles(compact, monkeypatch):
    small = pictures(1, 40, 40)
    needed = esrgan.peak_bytes(compact.config, 1600)
    monkeypatch.setattr(hardware, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="1 of 40x40 pixels at once take about .* GB are free: give tile=512"):
        compact(small)
    assert compact(small, tile=16).shape == (1, 120, 120, 3)


@pytest.mark.parametrize("config", [RRDBConfig(4, 1, 16, 1, 8), RRDBConfig(1, 1, 16, 1, 8), SRVGGConfig(2, 16, 2)])
def test_estimate_of_memory_holds(config):
    """XLA's own account is within the estimate, and more than a third of it."""
    if jax.default_backend() != "cpu":
        pytest.skip("the account of a CPU's compiler")
    network, image = network_of(config), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), image)
    used = jax.jit(network.apply).lower(params, image).compile().memory_analysis().temp_size_in_bytes
    assert esrgan.peak_bytes(config, 64 * 64) / 3 < used < esrgan.peak_bytes(config, 64 * 64)
