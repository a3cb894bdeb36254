import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax.models.families import SD15
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY
from sd_jax.sampling import denoising, pipeline, tiles
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.tiles import lay_tiles, window
from tests.sampling.conftest import ONE_LEVEL, random_params
from tests.test_tiles import layouts

RNG = np.random.default_rng(0)


# -- The autoencoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 4, 8])
def test_what_is_pointwise_comes_back_exactly(factor):
    """Within a latent the pixels differ, so a tile that began between two latents would show."""
    pattern = RNG.standard_normal((1, 1, factor, 1, factor, 3)).astype(np.float32)
    shapes = set()

    def decode(z):
        shapes.add(z.shape)
        batch, height, width, _ = z.shape
        x = z[:, :, None, :, None, :3] * pattern + z[:, :, None, :, None, 3:] ** 2
        return jnp.asarray(x.reshape(batch, height * factor, width * factor, 3))

    def encode(x):
        shapes.add(x.shape)
        cells = x.reshape(len(x), x.shape[1] // factor, factor, x.shape[2] // factor, factor, 3) * pattern
        return jnp.asarray(np.concatenate([cells.mean((2, 4)), cells.max((2, 4, 5))[..., None]], -1))

    for i, (height, width, tile, overlap) in enumerate(layouts(30, most=20)):
        z = RNG.standard_normal((1 + i % 3, height, width, 4)).astype(np.float32)
        shapes.clear()
        tiled = tiles.decode_tiled(decode, jnp.asarray(z), factor, tile, overlap)
        assert shapes == {(1, min(tile, height), min(tile, width), 4)}  # one picture at a time, one compilation
        np.testing.assert_allclose(tiled, decode(z), atol=1e-6, rtol=1e-6)

        x = RNG.uniform(-1, 1, (1 + i % 3, height * factor, width * factor, 3)).astype(np.float32)
        shapes.clear()
        tiled = tiles.encode_tiled(encode, x, factor, tile, overlap)
        assert shapes == {(1, min(tile, height) * factor, min(tile, width) * factor, 3)}
        np.testing.assert_allclose(tiled, encode(x), atol=1e-6, rtol=1e-6)
    assert tiled.dtype == np.float32


def test_seams_do_not_show():
    """Of a smooth picture, by the bundled autoencoder, in tiles of 12 latents.

    Where tiles end without overlapping, the step from a column to the next is 16 times the median step (decoded; in
    latents 5 times). Feathered over a quarter of the tile it is 2.6 times (1.3 times). What is left are not seams:
    a tile is lit by its own group norms and its own attention, so that the whole differs, by 0.22 of the picture's
    spread (in latents 0.33) for a model that was trained on pictures of 8 latents. These are the numbers measured.
    """
    pipe = sd_jax.load()
    factor, tile, width = pipe.spec.vae.downscale, 12, 24
    y, x = np.mgrid[: 16 * factor, : width * factor]
    picture = 0.8 * np.stack([np.sin(x / 40 + y / 60), np.cos(x / 50), np.sin(y / 35)], -1).astype(np.float32)[None]
    latents = np.asarray(pipe.encode_image(picture))
    ways = {
        "decode": (tiles.decode_tiled, pipe.decode_latents, latents, np.asarray(pipe.decode_latents(latents)), factor),
        "encode": (tiles.encode_tiled, pipe.encode_image, picture, latents, 1),
    }
    for way, (run, function, array, whole, scale) in ways.items():

        def at_edges(overlap, tiled, scale=scale):
            starts = {left for _, left in lay_tiles(16, width, tile, overlap).corners}
            edges = [e * scale - 1 for start in starts for e in (start, start + tile) if 0 < e < width]
            steps = np.abs(np.diff(tiled, axis=2)).mean((0, 1, 3))
            return steps[edges].max() / np.median(steps)

        tiled = {overlap: run(function, array, factor, tile, overlap) for overlap in (0, None)}
        hard, feathered = (at_edges(overlap, each) for overlap, each in tiled.items())
        spread = np.std(whole - whole.mean((1, 2), keepdims=True))
        error = np.sqrt(np.mean((tiled[None] - whole) ** 2)) / spread
        print(f"{way}: steps at edges {hard:.2f}, feathered {feathered:.2f}; error {error:.2f} of the spread")
        assert hard > 4 and feathered < min(3, hard / 3)
        assert error < 0.4


# -- Whether tiles are needed ------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("way", "dtype", "side"),
    [
        ("decode", "float32", 256),
        pytest.param("decode", "float32", 512, marks=SLOW),
        pytest.param("decode", "bfloat16", 256, marks=SLOW),
        pytest.param("decode", "bfloat16", 512, marks=SLOW),
        pytest.param("encode", "float32", 512, marks=SLOW),
        pytest.param("encode", "bfloat16", 512, marks=SLOW),
    ],
)
def test_estimate_of_memory_holds(way, dtype, side):
    """XLA's own account of a compiled SD 1.5 autoencoder is within the estimate, and more than a third of it."""
    if jax.default_backend() != "cpu":
        pytest.skip("the account of a CPU's compiler")
    networks = Networks.of(SD15, dtype)
    params = jax.eval_shape(lambda key: networks.init("vae", key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)
    shape = (1, side // 8, side // 8, 4) if way == "decode" else (1, side, side, 3)
    apply = jax.jit(lambda params, x: networks.vae.apply({"params": params}, x, method=way))
    compiled = apply.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    used, estimate = compiled.memory_analysis().temp_size_in_bytes, tiles.peak_bytes(SD15.vae, side, side)
    print(f"{way} {dtype} {side}: {used / 1e6:.0f} MB, estimate {estimate / 1e6:.0f}")
    assert estimate / 3 < used < estimate


def test_tile_is_the_largest_that_memory_allows():
    choose = functools.partial(tiles.choose_tile, SD15.vae)
    fits = lambda side: tiles.peak_bytes(SD15.vae, side, side)  # noqa: E731
    assert choose(1024, 1024, 1, None) is None  # unknown
    assert choose(1024, 1024, 1, fits(1024)) is None
    assert choose(1024, 1024, 4, 4 * fits(1024)) is None
    assert choose(1024, 768, 4, fits(1024)) == 128  # the whole picture, one after the other
    assert choose(1024, 1024, 1, fits(1024) - 1) == 96
    assert choose(2048, 512, 1, tiles.peak_bytes(SD15.vae, 1024, 512)) == 128  # the short side is never more than 512
    assert choose(1024, 1024, 1, fits(512)) == 64
    assert choose(1024, 1024, 1, 0) == 32  # tried all the same
    assert tiles.choose_tile(TINY.vae, 512, 512, 1, 1_000_000) == 32


def test_the_largest_tile_may_be_given():
    """And then memory is flat: it does not grow with the picture."""
    choose = functools.partial(tiles.choose_tile, SD15.vae, most=1024)
    for side in (1032, 2048, 4096, 16384):
        assert choose(side, side, 1, None) == choose(side, 512, 1, 10**12) == 128
    assert choose(1024, 1024, 4, None) is None and choose(1024, 1024, 4, 10**12) is None
    assert choose(4096, 4096, 1, tiles.peak_bytes(SD15.vae, 512, 512)) == 64


# -- Denoising ---------------------------------------------------------------------------------------------------------


def test_tiled_denoiser_of_what_is_pointwise_is_the_plain_one():
    def pointwise(x, sigma, told):
        return jnp.tanh(x) / (1 + sigma[:, None, None, None]) + told[:, None, None]

    sigma, told = jnp.asarray([0.5, 4.0]), jnp.asarray(RNG.standard_normal((2, 4)), jnp.float32)
    for height, width, tile, overlap in [(9, 13, 4, 1), (9, 13, 6, None), (5, 30, 8, 7), (3, 4, 8, 2), (1, 17, 2, 0)]:
        x = jnp.asarray(RNG.standard_normal((2, height, width, 4)), jnp.float32)
        tiled = jax.jit(tiles.tiled_denoiser(pointwise, tile, overlap))(x, sigma, told)
        np.testing.assert_allclose(tiled, pointwise(x, sigma, told), atol=1e-6)


def test_tiled_denoiser_sees_one_tile_at_a_time_and_joins_them():
    """A denoiser that answers with the mean of what it sees: Eq. 1 of the means of the tiles."""
    seen = []

    def mean(x, sigma, told):
        seen.append(x.shape)
        return jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)

    x = RNG.standard_normal((2, 10, 14, 3)).astype(np.float32)
    tiled = jax.jit(tiles.tiled_denoiser(mean, 6, 2))(jnp.asarray(x), jnp.asarray(1.0))
    assert set(seen) == {(2, 6, 6, 3)}
    sides, corners, shares = lay_tiles(10, 14, 6, 2)
    expected = np.zeros_like(x)
    for corner, share in zip(corners, shares, strict=True):
        part = (slice(None), *window(corner, sides))
        expected[part] += share * x[part].mean((1, 2), keepdims=True)
    np.testing.assert_allclose(tiled, expected, atol=1e-6)


def test_conditioning_that_belongs_to_places_is_cut_like_the_latents():
    def with_hint(x, sigma, told):
        hint, rest = told
        assert hint.shape == (1, *x.shape[1:3], 1) and rest.shape == (2,)
        return x * hint + rest[:, None, None, None]

    def cut(told, of_tile, number):
        return of_tile(told[0]), told[1]

    x = jnp.asarray(RNG.standard_normal((2, 9, 11, 4)), jnp.float32)
    told = jnp.asarray(RNG.standard_normal((1, 9, 11, 1)), jnp.float32), jnp.asarray([1.0, 2.0])
    tiled = jax.jit(tiles.tiled_denoiser(with_hint, 5, 2, cut))(x, jnp.asarray(1.0), told)
    np.testing.assert_allclose(tiled, with_hint(x, jnp.asarray(1.0), told), atol=1e-6)


# -- A prompt for each tile --------------------------------------------------------------------------------------------

STEP = {"output": "latents", "seed": 3, "steps": 1, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return Pipeline(ONE_LEVEL, random_params(ONE_LEVEL), tokenizer)


@pytest.fixture
def two_tiles(pipe):
    """Beside each other: columns 0 to 2, and 4 to 6, are of one of them alone."""
    side = pipe.spec.vae.downscale
    return {"width": 7 * side, "height": 4 * side, "tile": 4 * side}


@pytest.fixture
def told(monkeypatch):
    """Jobs walk on the spot and no U-Net is compiled. The list holds what each walk was told."""
    walks = []

    def stand(params, run, carry, first, last, **static):
        walks.append(run.told)
        return carry

    monkeypatch.setattr(denoising, "_walk", stand)
    return walks


def test_each_tile_is_told_its_own_prompt(pipe, two_tiles, caplog):
    draw = functools.partial(pipe.text_to_image, **two_tiles, **STEP)
    star, circle = draw("a star"), draw("a red circle")
    assert np.abs(star - circle).max() > 1e-4
    made = draw("a star", tile_prompts=("a red circle", ""))
    np.testing.assert_array_equal(made[:, :, :3], circle[:, :, :3])
    np.testing.assert_array_equal(made[:, :, 4:], star[:, :, 4:])
    with jax.log_compiles(True), caplog.at_level("WARNING"):
        swapped = draw("a red circle", tile_prompts=("a star", "a red circle"))
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]  # nor for any other text
    np.testing.assert_array_equal(swapped[:, :, :3], star[:, :, :3])
    np.testing.assert_array_equal(swapped[:, :, 4:], circle[:, :, 4:])


def test_tiles_of_a_batch_are_told_alike_where_they_have_a_prompt(pipe, two_tiles, told):
    pipe.text_to_image(["a star", "a square"], batch_size=2, tile_prompts=["", "a red circle"], **two_tiles, **STEP)
    rows = [np.asarray(each.texts) for each in (told[0].positive, told[0].negative)]
    assert told[0].batch == 4 and [each.shape for each in rows] == [(4, 2, 1), (4, 2, 1)]
    texts = ("a star", "a square", "a red circle", "")
    star, square, circle, empty = (pipe.encode_prompts([text]).context[0] for text in texts)
    wanted = [[star, circle], [star, circle], [square, circle], [square, circle]]
    np.testing.assert_array_equal(told[0].table.context[rows[0][..., 0]], wanted)
    np.testing.assert_array_equal(told[0].table.context[rows[1][..., 0]], [[empty] * 2] * 4)


def test_hires_fix_tells_tiles_of_the_large_picture_alone(pipe, two_tiles, told):
    side = pipe.spec.vae.downscale
    small = {**two_tiles, **STEP, "height": 2 * side, "width": 3 * side}
    pipe.hires_fix("", scale=2.0, strength=1.0, upscaler="nearest", tile_prompts=("a star", "a square"), **small)
    assert [np.shape(each.positive.texts) for each in told] == [(1, 1), (1, 2, 1)]


def test_in_jobs_with_tiles_the_autoencoder_has_them_too(pipe, told, monkeypatch):
    most = []
    monkeypatch.setattr(pipeline, "choose_tile", lambda *given: most.append(given[-1]))
    image = np.zeros((1, 8, 8, 3), np.uint8)
    for tile in (8, 2048, None):
        given = {"tile": tile, "steps": 2, "guidance_scale": 1.0, "strength": 1.0}
        pipe.upscale(image, "", scale=2.0, **given)
        pipe.inpaint("", image=image, extend=(8, 0, 0, 0), **given)
        pipe.hires_fix("", width=8, height=8, scale=2.0, upscaler="lanczos", **given)
    assert most == [1024] * 7 + [2048] * 7 + [None] * 7  # each encodes and decodes, hires fix decodes twice


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tile_prompts": ("a",) * 3}, "tile_prompts= holds 3, and here are 2 tiles, 1 rows of 2"),
        ({"tile_prompts": ("a", "b"), "tile": None}, "tile_prompts= is for the tiles of tile=: give both"),
        ({"tile_prompts": "ab"}, "tile_prompts='ab' is one text: give a list"),
        ({"tile_prompts": ("a AND b", "c")}, "tile_prompts= goes with neither conditioning= nor AND"),
    ],
)
def test_prompts_that_tiles_cannot_have(pipe, two_tiles, fields, words):
    with pytest.raises(ValueError, match=words) as refused:
        pipe.text_to_image("a star", **{**two_tiles, **STEP, **fields})
    assert "\n" not in str(refused.value)
