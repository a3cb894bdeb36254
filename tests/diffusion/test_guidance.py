"""Guidance: what each option does, that none of their values recompiles, and how momentum lives from call to call.

Plain classifier-free guidance is in test_denoiser.py, parity in test_parity_guidance.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.denoiser import state_dtype
from sd_jax.diffusion.guidance import Guidance, by_gradient, classifier_free, guided, interval_of_steps
from sd_jax.diffusion.noise import image_keys
from sd_jax.diffusion.predictions import from_x0
from sd_jax.diffusion.samplers import sample
from sd_jax.diffusion.schedules import make_sigmas
from sd_jax.types import NoiseScheduleConfig

SHAPE = (3, 4, 4, 2)
AXES = (1, 2, 3)
DRAWS = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
X = jnp.asarray(DRAWS[0])
COND, UNCOND = jnp.asarray(DRAWS[1]), jnp.asarray(DRAWS[2])
SIGMA = jnp.asarray([0.1, 2.0, 9.0])
FULL = Guidance(5.0, 0.7, (0.5, 20.0), 0.3, 2.0, -0.5)


def denoise(x, sigma, answer):
    """Answers what it is conditioned on, bent by x and sigma."""
    return answer + 0.1 * jnp.tanh(x) + 0.01 * sigma[:, None, None, None]


D_COND, D_UNCOND = denoise(X, SIGMA, COND), denoise(X, SIGMA, UNCOND)


def zeros(like):
    """An empty memory."""
    return jax.new_ref(jnp.zeros(like.shape, state_dtype(like.dtype)))


def answer(guidance, sigma=SIGMA, **kwargs):
    return guided(denoise, COND, UNCOND, guidance, memory=zeros(X), **kwargs)(X, sigma)


def norm(x):
    return np.sqrt(np.sum(np.asarray(x) ** 2, AXES))


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(5.0),
        Guidance(5.0, rescale=0.0),
        Guidance(5.0, interval=(0.0, np.inf)),
        Guidance(5.0, eta=1.0),
        Guidance(5.0, norm_threshold=0.0),
        Guidance(5.0, norm_threshold=1e6, momentum=0.0),
        Guidance(jnp.full(3, 5.0), np.zeros(3), (0.0, 1e9), np.ones(3), np.zeros(3), np.zeros(3)),
    ],
)
def test_options_that_do_nothing(guidance):
    np.testing.assert_allclose(answer(guidance), D_UNCOND + 5 * (D_COND - D_UNCOND), rtol=2e-5, atol=2e-5)


def test_scale_of_one_is_no_guidance():
    for guidance in (Guidance(1.0), FULL._replace(scale=1.0)):
        np.testing.assert_allclose(answer(guidance), D_COND, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_rescale_gives_the_spread_of_the_prompt_alone(prediction_type):
    def spread(x0):
        return jnp.std(from_x0(prediction_type, x0, X, SIGMA), AXES)

    wide, narrow = answer(Guidance(7.0)), answer(Guidance(7.0, rescale=1.0), rescale_in=prediction_type)
    assert np.all(spread(wide) > 1.5 * spread(D_COND))
    np.testing.assert_allclose(spread(narrow), spread(D_COND), rtol=1e-4)
    half = answer(Guidance(7.0, rescale=0.5), rescale_in=prediction_type)
    np.testing.assert_allclose(half, (wide + narrow) / 2, rtol=1e-4, atol=1e-4)


def test_rescale_is_finite_on_pure_noise():
    """The largest sigma of zero terminal SNR, and outputs without any spread."""
    sigma = jnp.full(3, 4518.7637)
    assert jnp.isfinite(
        guided(denoise, COND, UNCOND, FULL._replace(interval=None), memory=zeros(X))(X * 4518, sigma)
    ).all()
    flat = guided(lambda x, sigma, c: x / (1 + 4.0) + c, 0.0 * COND, 0.0 * UNCOND, Guidance(7.0, rescale=1.0))
    assert jnp.isfinite(flat(X, jnp.asarray(2.0))).all()


def test_only_what_lies_across_the_prompt_is_added():
    """Eq. 4 with eta = 0: the length along D_c is D_c's own."""
    update = answer(Guidance(5.0, eta=0.0)) - D_COND
    np.testing.assert_allclose(np.sum(update * D_COND, AXES) / norm(D_COND), 0, atol=2e-5)
    difference = D_COND - D_UNCOND
    along = (np.sum(difference * D_COND, AXES) / norm(D_COND) ** 2)[:, None, None, None] * D_COND
    np.testing.assert_allclose(answer(Guidance(5.0, eta=0.4)) - D_COND, 4 * (difference - 0.6 * along), atol=2e-5)


def test_length_of_the_difference_is_limited():
    lengths = norm(D_COND - D_UNCOND)
    threshold = float(np.sort(lengths)[1]) * 0.999
    update = answer(Guidance(3.0, norm_threshold=threshold)) - D_COND
    np.testing.assert_allclose(norm(update), 2 * np.minimum(lengths, threshold), rtol=1e-5)
    assert np.sum(lengths > threshold) == 2


def test_interval_is_for_each_image():
    got = answer(Guidance(5.0, interval=(1.0, 9.0)))
    want = D_UNCOND + 5 * (D_COND - D_UNCOND)
    for image, inside in enumerate([False, True, False]):  # both ends are outside
        np.testing.assert_allclose(got[image], (want if inside else D_COND)[image], rtol=1e-5, atol=1e-5)


def test_outside_the_interval_the_work_is_half():
    batches = []

    def counting(x, sigma, condition):
        jax.debug.callback(lambda: batches.append(x.shape[0]))
        return denoise(x, sigma, condition)

    sigmas = make_sigmas("karras", 10, NoiseScheduleConfig())
    low, high = interval_of_steps(sigmas, 0.2, 0.75)

    @jax.jit
    def run(low, high):
        return sample(guided(counting, COND, UNCOND, Guidance(5.0, interval=(low, high))), X * sigmas[0], sigmas)

    jax.block_until_ready(run(low, high))
    jax.effects_barrier()
    assert sorted(batches) == [3] * 5 + [6] * 5


def test_interval_of_steps():
    sigmas = make_sigmas("karras", 10, NoiseScheduleConfig())
    low, high = interval_of_steps(sigmas, 0.25, 0.7)
    np.testing.assert_array_equal((low < sigmas) & (sigmas < high), np.isin(np.arange(11), range(2, 7)))
    middle = np.sqrt(sigmas[:-2] * sigmas[1:-1])  # where two-stage samplers call the model in between
    np.testing.assert_array_equal((low < middle) & (middle < high), np.isin(np.arange(9), range(2, 7)))
    assert sigmas[2] * 1.1 < high and sigmas[7] * 1.1 < low  # churn
    assert interval_of_steps(sigmas) == (0, np.inf)
    assert interval_of_steps(sigmas, 0.5, 0.5)[0] == interval_of_steps(sigmas, 0.5, 0.5)[1]
    with pytest.raises(ValueError, match="0 <= start <= stop <= 1 is needed"):
        interval_of_steps(sigmas, 0.6, 0.5)


def momentum_by_hand(x, sigmas, momentum, order):
    """Euler (order 1) or Heun (order 2) with Eq. 3 and 4, in plain steps; the difference is remembered call by call."""
    memory = np.zeros_like(x)

    def d(x, sigma):
        nonlocal memory
        cond, uncond = (np.asarray(denoise(jnp.asarray(x), jnp.full(3, sigma), c)) for c in (COND, UNCOND))
        memory = cond - uncond + momentum * memory
        return cond + 4 * memory

    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - d(x, sigma)) / sigma
        following_x = x + (following - sigma) * slope
        if order == 2 and following > 0:
            slope = (slope + (following_x - d(following_x, following)) / following) / 2
            following_x = x + (following - sigma) * slope
        x = following_x
    return x


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_momentum_lives_from_call_to_call(sampler, order, jit):
    """Through the sampler's scan, and through the branch in which heun calls the model a second time."""
    sigmas = np.array([9.0, 4.0, 1.0, 0.3, 0.0], np.float32)

    def run(x, sigmas, momentum):
        denoiser = guided(denoise, COND, UNCOND, Guidance(5.0, momentum=momentum), memory=zeros(x))
        return sample(denoiser, x, sigmas, sampler)

    for momentum in (-0.7, 0.4, 0.0):  # a second run begins with an empty memory
        ours = (jax.jit(run) if jit else run)(X * 9, sigmas, jnp.float32(momentum))
        np.testing.assert_allclose(ours, momentum_by_hand(DRAWS[0] * 9, sigmas, momentum, order), rtol=2e-4, atol=2e-4)


def test_negative_momentum_amplifies_change():
    """Two calls with differences d1, d2: the second is guided by d2 + momentum d1, for -1 by the change d2 - d1."""
    denoiser = guided(denoise, COND, UNCOND, Guidance(2.0, momentum=-1.0), memory=zeros(X))
    first, second = denoiser(X, SIGMA), denoiser(X, SIGMA)
    np.testing.assert_allclose(first, 2 * D_COND - D_UNCOND, atol=1e-5)
    np.testing.assert_allclose(second, D_COND, atol=1e-5)


@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral"])
def test_batch_equals_singles(sampler):
    sigmas = make_sigmas("karras", 6, NoiseScheduleConfig())

    @jax.jit
    def run(x, keys, cond, uncond, guidance):
        denoiser = guided(denoise, cond, uncond, guidance, memory=zeros(x))
        return sample(denoiser, x * sigmas[0], sigmas, sampler, rng=keys)

    keys = image_keys(0, 3)
    guidance = FULL._replace(scale=jnp.asarray([2.0, 5.0, 9.0]), interval=interval_of_steps(sigmas, 0.2, 0.9))
    batch = run(X, keys, COND, UNCOND, guidance)
    for i in range(3):
        one = slice(i, i + 1)
        alone = run(X[one], keys[one], COND[one], UNCOND[one], guidance._replace(scale=guidance.scale[one]))
        np.testing.assert_allclose(alone[0], batch[i], rtol=1e-4, atol=1e-4)


def test_no_value_recompiles():
    traces = []

    @jax.jit
    def run(x, guidance):
        traces.append(1)
        return sample(guided(denoise, COND, UNCOND, guidance, memory=zeros(x)), x, np.float32([9, 3, 0]))

    results = [
        run(X, Guidance(*values[:2], tuple(values[2:4]), *values[4:]))
        for values in np.float32([[5, 0.7, 0.5, 20, 0.3, 2, -0.5], [2, 0, 0, np.inf, 1, 0, 0], [1, 1, 4, 5, 0, 9, 0.5]])
    ]
    assert len(traces) == 1 and all(jnp.isfinite(x).all() for x in results)
    run(X, Guidance(np.float32(5)))
    assert len(traces) == 2  # another set of options is another function


def test_float64_and_half_precision():
    def half(x, sigma, condition):
        return denoise(x, sigma, condition).astype(jnp.bfloat16)

    assert guided(half, COND, UNCOND, FULL, memory=zeros(X))(X, SIGMA).dtype == jnp.float32
    assert guided(denoise, COND, UNCOND, FULL, memory=zeros(X))(X.astype(jnp.bfloat16), SIGMA).dtype == jnp.float32
    with jax.enable_x64(True):
        double = [jnp.asarray(np.float64(a)) for a in (COND, UNCOND, X, SIGMA)]
        got = guided(denoise, double[0], double[1], FULL, memory=zeros(double[2]))(*double[2:])
        assert got.dtype == jnp.float64
    np.testing.assert_allclose(answer(FULL), got, rtol=1e-5, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="momentum remembers .*: give it memory"):
        guided(denoise, COND, UNCOND, Guidance(momentum=0.5))
    with pytest.raises(ValueError, match="unknown prediction_type 'velocity'"):
        answer(Guidance(rescale=1.0), rescale_in="velocity")


def test_classifier_free_is_guided_with_a_scale():
    ours = classifier_free(denoise, COND, UNCOND, jnp.float32(3.0))(X, SIGMA)
    np.testing.assert_array_equal(ours, answer(Guidance(jnp.float32(3.0))))


def test_parts_of_a_prompt_add_up():
    """Eq. 5 by hand, one image whose second part weighs nothing; a single part of weight 1 is the plain answer."""
    weights = jnp.asarray([[1.0, 0.5], [1.0, 0.0], [0.7, -1.2]])
    parts = jnp.stack([COND, 2 * COND], 1)  # [batch, parts, ...]
    both = parts.reshape(-1, *COND.shape[1:])
    got = guided(denoise, both, UNCOND, Guidance(3.0), weights=weights)(X, SIGMA)
    d_parts = [denoise(X, SIGMA, parts[:, p]) for p in range(2)]
    wanted = D_UNCOND + 3 * sum(weights[:, p, None, None, None] * (d_parts[p] - D_UNCOND) for p in range(2))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    one = guided(denoise, COND, UNCOND, FULL, memory=zeros(X), weights=jnp.ones((3, 1)))(X, SIGMA)
    np.testing.assert_allclose(one, answer(FULL), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, np.array([0.0, 1.0, 2.0], np.float32)])
def test_a_gradient_leads_to_what_is_known_of_the_condition(scale):
    """x0 ~ N(0, a^2), x = x0 + sigma n, and c = x0 + b n' is seen: at scale 1, D' = E[x0 | x, c] in closed form."""
    a, b = 0.8, 0.3
    sigma = SIGMA[:, None, None, None]

    def plain(x, sigma):
        return x * a**2 / (a**2 + sigma[:, None, None, None] ** 2)

    def log_likelihood(x, sigma):
        mean, variance = plain(x, sigma), a**2 * sigma**2 / (a**2 + sigma**2) + b**2
        return -0.5 * jnp.sum((COND - mean) ** 2, AXES) / variance

    found = by_gradient(plain, log_likelihood, scale)(X, SIGMA)
    known = (X / sigma**2 + COND / b**2) / (1 / a**2 + 1 / sigma**2 + 1 / b**2)
    share = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (3,))[:, None, None, None]
    np.testing.assert_allclose(found, plain(X, SIGMA) + share * (known - plain(X, SIGMA)), rtol=1e-4, atol=1e-5)


def test_a_clamp_shortens_only_the_long_steps():
    """Each picture's own; none is turned."""
    scales, clamp = jnp.asarray([0.01, 1.0, 1.0]), 0.2

    def steps(clamp):
        plain = by_gradient(lambda x, sigma: x * 0, lambda x, sigma: jnp.sum(x**3, AXES), scales, clamp)
        return np.asarray(plain(X, SIGMA[::-1])).reshape(3, -1)

    free, held = steps(np.inf), steps(clamp)
    rms = np.sqrt(np.mean(free**2, axis=1))
    assert rms[2] < clamp < rms[1]  # there is something of each
    np.testing.assert_allclose(held, free * np.minimum(1, clamp / rms)[:, None], rtol=1e-5)
