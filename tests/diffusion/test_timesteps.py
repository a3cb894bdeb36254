"""Timesteps against the densities of their papers, written here in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from sd_jax.diffusion.noise import example_keys, image_keys
from sd_jax.diffusion.timesteps import DISTRIBUTIONS, draw_timesteps, times_of
from tests.reference import diffusers

STEEPEST = 2 / (math.pi - 2)


def mode(u, s):
    return 1 - u - s * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)


def mode_density(t, s):
    u = optimize.brentq(lambda u: mode(u, s) - t, 0, 1)
    return 1 / abs(-1 + s * (np.pi / 2 * np.sin(np.pi * u) - 1))


def logit_normal_density(t, m, s):
    logit = np.log(t / (1 - t))
    return np.exp(-((logit - m) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi) * t * (1 - t))


# name, mean, scale, t of u, density of t
CASES = [
    ("uniform", 0.0, 1.0, lambda u: u, lambda t: 1.0),
    *(
        (
            "logit_normal",
            m,
            s,
            lambda u, m=m, s=s: special.expit(m + s * special.ndtri(u)),
            lambda t, m=m, s=s: logit_normal_density(t, m, s),
        )
        for m, s in [(0.0, 1.0), (-0.5, 0.6), (math.log(3), 1.4)]
    ),
    *(
        ("mode", 0.0, s, lambda u, s=s: mode(u, s), lambda t, s=s: mode_density(t, s))
        for s in (-1.0, -0.4, 0.0, 1.29, STEEPEST)
    ),
    ("cosmap", 0.0, 1.0, lambda u: 1 - 1 / (np.tan(np.pi / 2 * u) + 1), lambda t: 2 / np.pi / (1 - 2 * t + 2 * t**2)),
    ("cubic", 0.0, 1.0, lambda u: 1 - u**3, lambda t: (1 - t) ** (-2 / 3) / 3),
]
IDS = [f"{name}_{mean:.2g}_{scale:.2g}" for name, mean, scale, _, _ in CASES]


def test_every_distribution_has_a_case():
    assert {case[0] for case in CASES} == set(DISTRIBUTIONS)


@pytest.mark.parametrize(("name", "mean", "scale", "formula", "density"), CASES, ids=IDS)
def test_the_map_is_the_formula(name, mean, scale, formula, density):
    u = np.linspace(1e-4, 0.9999, 4001).astype(np.float32)
    t = np.asarray(times_of(name, mean, scale)(jnp.asarray(u)))
    np.testing.assert_allclose(t, formula(u.astype(np.float64)), atol=1e-6)
    rises = np.sign(np.diff(formula(np.array([0.25, 0.75]))))
    assert np.all(np.diff(t) * rises >= -1e-6)  # monotone, so that strata stay strata


@pytest.mark.parametrize(("name", "mean", "scale", "formula", "density"), CASES, ids=IDS)
def test_timesteps_have_the_density(name, mean, scale, formula, density):
    count, parts = 40_000, 20
    drawn = draw_timesteps(image_keys(0, count), 0, 1000, times=times_of(name, mean, scale))
    assert drawn.dtype == jnp.int32 and drawn.min() >= 0 and drawn.max() <= 999
    counts, edges = np.histogram(drawn, parts, (0, 1000))
    ends = edges / 1000
    shares = [integrate.quad(density, a, b, limit=200)[0] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    np.testing.assert_allclose(sum(shares), 1, atol=1e-5)  # the densities of the papers are that
    expected = count * np.array(shares)
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    assert stats.chi2.ppf(1e-4, parts - 1) < chi_squared < stats.chi2.ppf(1 - 1e-4, parts - 1)


@pytest.mark.parametrize(("name", "mean", "scale", "formula", "density"), CASES, ids=IDS)
def test_every_stratum_has_its_example(name, mean, scale, formula, density):
    """Example i of B lies between the quantiles i / B and (i + 1) / B, and is the same in a part of the batch."""
    places, count, steps = jnp.arange(96), 96, 100_000
    keys, times = example_keys(jax.random.key(0), 3, places), times_of(name, mean, scale)
    drawn = np.asarray(draw_timesteps(keys, 1, steps, (places, count), times))
    quantiles = np.clip(formula(np.linspace(1e-12, 1 - 1e-12, count + 1)), 0, 1) * steps
    low, high = np.sort([quantiles[:-1], quantiles[1:]], axis=0)
    assert np.all((drawn >= np.floor(low) - 1) & (drawn <= high + 1))
    some = draw_timesteps(keys[40:], 1, steps, (places[40:], count), times)
    np.testing.assert_array_equal(some, drawn[40:])


def test_the_ends_of_u_are_timesteps(monkeypatch):
    monkeypatch.setattr("sd_jax.diffusion.timesteps.uniform", lambda keys, draw: jnp.asarray([0.0, 1.0], jnp.float32))
    for name, mean, scale, *_ in CASES:
        drawn = draw_timesteps(image_keys(0, 2), 0, 1000, times=times_of(name, mean, scale))
        assert sorted(np.asarray(drawn).tolist()) == [0, 999], name


def test_a_shift_is_another_mean():
    """SD3's Eq. 23, t' = a t / (1 + (a - 1) t), of a logit-normal t."""
    u = jnp.linspace(0.01, 0.99, 99, dtype=jnp.float32)
    t = np.asarray(times_of("logit_normal", 0.2, 0.8)(u), np.float64)
    shifted = times_of("logit_normal", 0.2 + math.log(3), 0.8)(u)
    np.testing.assert_allclose(shifted, 3 * t / (1 + 2 * t), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "mean", "scale", "said"),
    [
        ("lognormal", 0.0, 1.0, "config.diffusion.timesteps='lognormal' is unknown: use uniform, logit_normal, mode"),
        ("uniform", 0.5, 1.0, "config.diffusion.timestep_mean=0.5 is not read by config.diffusion.timesteps='uniform'"),
        ("cosmap", 0.0, 0.5, "config.diffusion.timestep_scale=0.5 is not read by"),
        ("mode", 0.5, 1.0, "config.diffusion.timestep_mean=0.5 is not read by"),
        ("mode", 0.0, 1.8, "config.diffusion.timestep_scale=1.8, .* takes scales from -1 to 1.752"),
        ("mode", 0.0, -1.1, "config.diffusion.timestep_scale=-1.1"),
        ("logit_normal", 0.0, 0.0, "config.diffusion.timestep_scale=0, "),
        ("logit_normal", 0.0, -1.0, "config.diffusion.timestep_scale=-1, "),
        ("logit_normal", math.nan, 1.0, "timestep_mean=nan"),
        ("logit_normal", 0.0, math.inf, "timestep_scale=inf"),
    ],
)
def test_mistakes_are_named(name, mean, scale, said):
    with pytest.raises(ValueError, match=said):
        times_of(name, mean, scale)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "mean", "scale"), [("logit_normal", 0.0, 1.0), ("logit_normal", 0.4, 0.7), ("mode", 0.0, 1.29)]
)
def test_diffusers(name, mean, scale):
    """From the same random numbers. (diffusers indexes timesteps that descend, so its u is one less our t.)"""
    diffusers()
    import torch
    from diffusers.training_utils import compute_density_for_timestep_sampling

    given = {"logit_mean": mean, "logit_std": scale, "mode_scale": scale}
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    theirs = compute_density_for_timestep_sampling(name, 1000, generator=seeded(), **given).numpy()
    if name == "logit_normal":
        u = special.ndtr(torch.normal(0.0, 1.0, (1000,), generator=seeded()).numpy().astype(np.float64))
    else:
        u = torch.rand((1000,), generator=seeded()).numpy()
    ours = times_of(name, mean, scale)(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # u has 24 bits, of which the far tail needs more
