"""The noise of other programs: published vectors, torch's recorded numbers, and the order in which A1111 draws."""

import numpy as np
import pytest

from sd_jax.diffusion.noise_sources import (
    SOURCES,
    NoiseSource,
    Philox,
    TorchCPU,
    centred,
    draw,
    philox,
    slerp,
    webui_noise,
)


def words(text):
    return np.array([int(word, 16) for word in text.split()], np.uint32)[:, None]


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "want"),
    [  # kat_vectors of Random123, the library of Philox's authors
        (10, "0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, "ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            10,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
        (7, "0 0 0 0", "0 0", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff " * 4, "ffffffff " * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            7,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_philox_vectors(rounds, counter, key, want):
    np.testing.assert_array_equal(philox(words(counter), words(key), rounds), words(want))


def test_philox_counts_apart():
    """Many counters with one key are those counters one by one."""
    counters = np.arange(20, dtype=np.uint32).reshape(4, 5)
    together = philox(counters, words("7 8"))
    for i in range(5):
        np.testing.assert_array_equal(together[:, i : i + 1], philox(counters[:, i : i + 1], words("7 8")))


def test_nv_is_what_a1111_says_of_its_own():
    """The numbers in the docstring of its generator, for seed 0."""
    want = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(draw("nv", 0, (3, 4)), want, atol=3e-7)


def test_nv_numbers_do_not_depend_on_how_many_are_drawn():
    np.testing.assert_array_equal(draw("nv", 5, (4, 8, 8)).reshape(-1)[:7], draw("nv", 5, (7,)))
    source = NoiseSource("nv", 5)
    source.draw((3,))
    second = source.draw((4,))
    source = NoiseSource("nv", 5)
    source.draw((100,))
    np.testing.assert_array_equal(second, source.draw((4,)))


def test_mersenne_twister():
    """The C++ standard's check of mt19937: the 10,000th number of its default seed."""
    assert TorchCPU(5489).integers(10000)[-1] == 4123659995


@pytest.mark.parametrize(
    ("seed", "shape", "place", "want"),
    [  # torch 2.13 on the CPU
        (0, (5,), slice(None), [1.5409960746765137, -0.293428897857666, -2.1787893772, 0.56843125820, -1.0845223665]),
        (42, (4, 4, 4), slice(4), [1.9269152879714966, 1.4872840642929077, 0.9007171988487244, -2.1055209636688232]),
        (42, (4, 4, 4), slice(60, 64), [-0.0978068932890892, 1.8445940017700195, -1.184537410736084, 1.3835493326]),
        # Of 37 numbers the last 16 are made anew, so of the second block of 16 only the first 5 remain
        (7, (37,), slice(18, 22), [1.9263681173324585, -0.3300117254257202, 0.19844505190849304, -0.6618675589561462]),
        (7, (37,), slice(35, 37), [-1.3677396774291992, -0.10073431581258774]),
    ],
)
def test_torch_vectors(seed, shape, place, want):
    np.testing.assert_allclose(draw("torch_cpu", seed, shape).reshape(-1)[place], want, atol=1e-6)


def test_torch_keeps_the_second_of_a_pair():
    """Three one by one leave a fourth, which the next draw of less than 16 begins with, whatever came between."""
    source = NoiseSource("torch_cpu", 3)
    np.testing.assert_allclose(source.draw((3,)), [0.8032760620117188, 0.17483338713645935, 0.08897809684276581])
    np.testing.assert_allclose(source.draw((16,))[:2], [0.6053608059883118, 1.9861493110656738], atol=1e-6)
    np.testing.assert_allclose(source.draw((2,)), [-0.6137180328369141, -0.8646355867385864])


@pytest.mark.parametrize("source", SOURCES)
def test_numbers_are_normal(source):
    numbers = draw(source, 1, (4, 96, 96))
    assert numbers.dtype == np.float32 and numbers.shape == (4, 96, 96)
    np.testing.assert_allclose([numbers.mean(), numbers.std()], [0, 1], atol=0.02)
    np.testing.assert_allclose((numbers**4).mean(), 3, atol=0.2)
    assert abs(np.corrcoef(numbers.reshape(4, -1))[np.triu_indices(4, 1)]).max() < 0.04


@pytest.mark.parametrize("source", SOURCES)
def test_seeds(source):
    seeds = [0, 1, 2**31, 2**32 - 1]
    assert len({float(draw(source, seed, (4, 4, 4))[0, 0, 0]) for seed in seeds}) == len(seeds)
    same = np.array_equal(draw(source, 2**32 + 1, (20,)), draw(source, 1, (20,)))
    assert same == (source == "torch_cpu")  # whose generator takes 32 bits
    np.testing.assert_array_equal(draw(source, -3, (20,)), draw(source, 2**64 - 3, (20,)))


@pytest.mark.parametrize("source", SOURCES)
def test_webui_draws_all_from_one_generator(source):
    start, draws = webui_noise(source, 9, (6, 5, 4), 3)
    assert start.shape == (6, 5, 4) and draws.shape == (3, 6, 5, 4)
    generator = NoiseSource(source, 9)
    for ours in (start, *draws):
        np.testing.assert_array_equal(ours, np.moveaxis(generator.draw((4, 6, 5)), 0, -1))
    assert webui_noise(source, 9, (6, 5, 4), 0)[1].shape == (0, 6, 5, 4)


@pytest.mark.parametrize("source", SOURCES)
def test_ensd_seeds_the_draws_anew(source):
    start, draws = webui_noise(source, 9, (6, 5, 4), 2, ensd=31337)
    plain, _ = webui_noise(source, 9, (6, 5, 4), 2)
    np.testing.assert_array_equal(start, plain)
    first, second = webui_noise(source, 9 + 31337, (6, 5, 4), 1)
    np.testing.assert_array_equal(draws, np.stack([first, second[0]]))


@pytest.mark.parametrize("source", SOURCES)
def test_variation_seeds(source):
    shape = (6, 5, 4)
    [seed, subseed] = (webui_noise(source, s, shape, 2) for s in (9, 77))
    for strength in (0.0, 0.3, 1.0):
        start, draws = webui_noise(source, 9, shape, 2, subseed=77, subseed_strength=strength)
        want = slerp(np.moveaxis(seed[0], -1, 0), np.moveaxis(subseed[0], -1, 0), strength)
        np.testing.assert_allclose(np.moveaxis(start, -1, 0), want, atol=1e-6)
        np.testing.assert_array_equal(draws, seed[1])  # the draws remain the seed's
    np.testing.assert_allclose(start, subseed[0], atol=1e-6)


def test_slerp():
    low, high = np.random.default_rng(0).standard_normal((2, 3, 8, 5)).astype(np.float32)
    middle = slerp(low, high, 0.5)
    assert middle.dtype == np.float32
    cosine = np.sum(low * high, 1) / np.linalg.norm(low, axis=1) / np.linalg.norm(high, axis=1)
    np.testing.assert_allclose(middle, (low + high) / np.sqrt(2 + 2 * cosine)[:, None], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slerp(low, high, 0.0), low, atol=1e-6)
    np.testing.assert_allclose(slerp(low, high, 1.0), high, atol=1e-6)
    lengths = np.linalg.norm(slerp(low / np.linalg.norm(low, axis=1, keepdims=True), high, 0.0), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    near = low + np.float32(1e-3) * high
    np.testing.assert_allclose(slerp(low, near, 0.25), 0.25 * low + 0.75 * near, atol=1e-6)  # backwards, as there
    assert np.isfinite(slerp(low[:, :1], high[:, :1], 0.3)).all()


@pytest.mark.parametrize("resize_from", [(6, 5), (4, 5), (3, 2), (8, 9), (9, 2), (2, 12)])
def test_seed_resize(resize_from):
    """The middle of the picture is the middle of the picture of the other size."""
    start, draws = webui_noise("torch_cpu", 9, (6, 5, 4), 1, resize_from=resize_from)
    plain, plain_draws = webui_noise("torch_cpu", 9, (6, 5, 4), 1)
    other, _ = webui_noise("torch_cpu", 9, (*resize_from, 4), 0)
    np.testing.assert_array_equal(draws, plain_draws)
    if resize_from == (6, 5):
        np.testing.assert_array_equal(start, plain)
    mine, theirs = [], []
    for have, want in zip(resize_from, (6, 5), strict=True):
        margin = (want - have) // 2
        kept = range(max(margin, 0), max(margin, 0) + (have if margin >= 0 else have + 2 * margin))
        mine.append(kept)
        theirs.append([k - margin for k in kept])
    np.testing.assert_array_equal(start[np.ix_(*mine)], other[np.ix_(*theirs)])
    changed = np.zeros((6, 5), bool)
    changed[np.ix_(*mine)] = True
    np.testing.assert_array_equal(start[~changed], plain[~changed])


def test_centred_leaves_its_arguments_alone():
    noise, around = np.ones((1, 2, 2), np.float32), np.zeros((1, 4, 4), np.float32)
    np.testing.assert_array_equal(centred(noise, around)[0, 1:3, 1:3], 1)
    assert around.sum() == 0


def test_unknown_sources():
    with pytest.raises(ValueError, match="unknown noise source 'threefry': choose one of torch_cpu, nv"):
        draw("threefry", 0, (1,))


def test_philox_takes_all_64_bits():
    assert not np.array_equal(Philox(1).normal(4), Philox(1 + 2**40).normal(4))
