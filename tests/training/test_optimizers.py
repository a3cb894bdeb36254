import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd_jax import trees
from sd_jax.config import training_defaults
from sd_jax.training import optimizers, quantized


def config(schedule="cosine", total=100, warmup=10, peak=1e-3):
    cfg = training_defaults("full")
    cfg.total_steps, cfg.optimizer.warmup_steps = total, warmup
    cfg.optimizer.schedule, cfg.optimizer.learning_rate = schedule, peak
    return cfg


@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
def test_warm_up_is_linear_and_starts_above_zero(schedule):
    rate = optimizers.learning_rate(config(schedule))
    np.testing.assert_allclose([float(rate(i)) for i in range(10)], 1e-4 * np.arange(1, 11), rtol=1e-5)


def test_after_the_warm_up():
    cosine, linear, constant = (optimizers.learning_rate(config(s)) for s in ("cosine", "linear", "constant"))
    half = 10 + 45
    np.testing.assert_allclose([cosine(half), linear(half), constant(half)], [5e-4, 5e-4, 1e-3], rtol=1e-5)
    np.testing.assert_allclose([cosine(100), linear(100), constant(100)], [0, 0, 1e-3], atol=1e-9)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="schedule='cosin'"):
        optimizers.learning_rate(config("cosin"))
    with pytest.raises(ValueError, match="warmup_steps=100"):
        optimizers.learning_rate(config(warmup=100))


def test_vectors_are_not_decayed():
    cfg = config(warmup=0)
    cfg.optimizer.weight_decay = 0.5
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    optimizer = optimizers.make_optimizer(cfg)
    zeros = {name: np.zeros_like(value) for name, value in params.items()}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.all(np.asarray(updates["kernel"]) < 0)
    assert np.all(np.asarray(updates["bias"]) == 0)


# -- Every optimiser -------------------------------------------------------------------------------------------------

RATES = {"adamw": 0.02, "adamw8bit": 0.02, "muon": 0.02, "lion": 0.005, "adafactor": 0.02, "prodigy": 1.0}


def problem():
    """(weights of a two-layer network, its loss against another one's answers)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)  # noqa: E731
    teacher, x = (draw(32, 160), draw(160, 32)), draw(64, 32) * 8
    params = {"unet": {"in": {"kernel": draw(32, 160), "bias": jnp.zeros(160)}, "out": {"kernel": draw(160, 32)}}}
    answer = jnp.tanh(x @ teacher[0]) @ teacher[1]

    def loss(params):
        unet = params["unet"]
        hidden = jnp.tanh(x @ unet["in"]["kernel"] + jnp.broadcast_to(unet["in"]["bias"], (64, 160)))
        return jnp.mean((hidden @ unet["out"]["kernel"] - answer) ** 2)

    return params, loss


def run(cfg, params, loss, steps):
    """(losses, last parameters, last state)."""
    optimizer = optimizers.make_optimizer(cfg)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(optimizer.init)(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params, state


def configured(name, **keys):
    cfg = config("constant", total=1000, warmup=5, peak=RATES[name])
    cfg.optimizer.name = name
    cfg.optimizer.update(keys)
    return cfg


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_learns(name):
    losses, _, _ = run(configured(name, b2=0.99), *problem(), 150)
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("name", RATES)
def test_no_optimizer_decays_vectors_and_each_leaves_alone_what_is_not_named(name):
    params, loss = problem()
    params["unet"]["in"]["bias"] = jnp.full(160, 0.5)
    still = lambda params: params["unet"]["in"]["kernel"].sum()  # noqa: E731  the others have no gradient
    cfg = configured(name, weight_decay=0.1, learning_rate=10.0 if name == "prodigy" else 0.01)
    _, after, _ = run(cfg, params, still, 3)
    np.testing.assert_array_equal(after["unet"]["in"]["bias"], params["unet"]["in"]["bias"])
    ratio = after["unet"]["out"]["kernel"] / params["unet"]["out"]["kernel"]
    assert (ratio < 1).all()
    cfg.trainable = "unet/in/"
    _, after, _ = run(cfg, params, loss, 3)
    np.testing.assert_array_equal(after["unet"]["out"]["kernel"], params["unet"]["out"]["kernel"])
    assert (after["unet"]["in"]["kernel"] != params["unet"]["in"]["kernel"]).any()


@pytest.mark.parametrize("name", RATES)
def test_state_may_be_donated_with_the_parameters(name):
    params, loss = problem()
    optimizer = optimizers.make_optimizer(configured(name))
    params, state = jax.jit(lambda p: (p := jax.tree.map(lambda x: x * 1, p), optimizer.init(p)))(params)
    step = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s, p), donate_argnums=(0, 1))
    updates, _ = step(params, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_prodigy_refuses_the_rate_of_another():
    with pytest.raises(ValueError, match=r"learning_rate=0\.0001: prodigy .* set it to 1\.0"):
        optimizers.make_optimizer(configured("prodigy", learning_rate=1e-4))


def test_an_unknown_optimizer_is_named():
    cfg = config()
    cfg.optimizer.name = "adamm"
    with pytest.raises(ValueError, match="name='adamm' is unknown: use adamw, adamw8bit, muon, lion, adafactor, prod"):
        optimizers.make_optimizer(cfg)


# -- Rates of groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "lion", "prodigy"])
def test_the_first_pattern_that_finds_a_parameter_scales_its_steps(name):
    params, loss = problem()
    rates = (("in/bias", 0.0), ("unet/in", 0.5), ("in/kernel", 7.0))
    gradient = jax.grad(loss)(params)
    plain, scaled = (optimizers.make_optimizer(configured(name, rates=r, weight_decay=0.1)) for r in ((), rates))
    one, _ = plain.update(gradient, plain.init(params), params)
    other, _ = scaled.update(gradient, scaled.init(params), params)
    times = {"in": {"kernel": 0.5, "bias": 0.0}, "out": {"kernel": 1.0}}
    for layer, arrays in times.items():
        for leaf, factor in arrays.items():
            np.testing.assert_allclose(other["unet"][layer][leaf], factor * one["unet"][layer][leaf], rtol=1e-6)
    assert np.abs(one["unet"]["in"]["bias"]).max() > 0


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((("in/", 2.0), ("attn2", 1.0)), r"rates: 'attn2' matches no parameter, e\.g\. unet/in/bias"),
        ((("(", 2.0),), r"rates: '\(' is no pattern"),
        ((("in/", -1.0),), r"rates: 'in/' has -1\.0: give 0 or more"),
    ],
)
def test_rates_that_cannot_be_are_named(rates, said):
    with pytest.raises(ValueError, match=said):
        optimizers.make_optimizer(configured("adamw", rates=rates)).init(problem()[0])


def test_a_pattern_must_find_something_that_is_trained():
    cfg = configured("adamw", rates=(("unet/out", 2.0),))
    cfg.trainable = "unet/in/"
    with pytest.raises(ValueError, match="'unet/out' matches no parameter"):
        optimizers.make_optimizer(cfg).init(problem()[0])


# -- Moments of 8 bits -----------------------------------------------------------------------------------------------


def test_eight_bits_keep_what_is_there():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(7, 300)) * 10.0 ** rng.uniform(-3, 0, (7, 1)), jnp.float32)
    for values, code, error in ((x, quantized.FIRST, 0.016), (x * x, quantized.SECOND, 0.017)):
        codes, scales = quantized.quantized(values, code, jnp.int32(5))
        assert codes.shape == values.shape and codes.dtype == code.dtype and scales.shape == (9,)
        back = quantized.dequantized(codes, scales, code)
        largest = np.repeat(np.asarray(scales), 256)[:2100].reshape(7, 300)
        assert (np.abs(back - values) <= error * largest).all()  # a step of the code, where it is widest
        assert ((back == 0) <= (np.abs(values) < 1e-4 * largest)).all()
    assert (codes[np.asarray(values) > 0] > 0).all()  # no second moment is rounded to nothing
    zeros = quantized.quantized(jnp.zeros((3, 5)), quantized.FIRST, jnp.int32(0))
    assert (quantized.dequantized(*zeros, quantized.FIRST) == 0).all()


@pytest.mark.parametrize(("code", "sign"), [("FIRST", -1.0), ("SECOND", 1.0)])
def test_rounding_keeps_the_mean(code, sign):
    """Over 4096 steps each number comes back on average, though no single step holds it."""
    code = getattr(quantized, code)
    x = jnp.asarray(np.random.default_rng(0).uniform(0.02, 1, 256).astype(np.float32)).at[0].set(1.0) * sign

    def back(step):
        return quantized.dequantized(*quantized.quantized(x, code, step), code)

    every = jax.lax.map(back, jnp.arange(4096, dtype=jnp.int32))
    np.testing.assert_allclose(every.mean(0), x, atol=2e-5)
    assert np.abs(every[0] - x).max() > 1e-3


def test_an_average_that_moves_less_than_a_step_of_the_code_still_moves():
    """With rounding to the nearest it would stay at 1 for ever."""
    v, other = (jnp.ones(4096), jnp.full(4096, 0.5)), 0.999
    state = quantized.quantized(v[0], quantized.SECOND, jnp.int32(0))

    def step(t, state):
        x = other * quantized.dequantized(*state, quantized.SECOND) + (1 - other) * v[1]
        x = x.at[::256].set(1.0)  # of every block one number stays the largest
        return quantized.quantized(x, quantized.SECOND, t)

    x = quantized.dequantized(*jax.lax.fori_loop(0, 1000, step, state), quantized.SECOND)
    expected = 0.5 + 0.5 * other**1000
    np.testing.assert_allclose(np.delete(np.asarray(x).reshape(16, 256), 0, 1).mean(), expected, rtol=0.01)


def test_eight_bits_train_as_32_do_in_a_quarter_of_the_memory():
    params, loss = problem()
    whole, _, state = run(configured("adamw", b2=0.99), params, loss, 300)
    eight, _, small = run(configured("adamw8bit", b2=0.99), params, loss, 300)
    assert trees.num_bytes(small) < 0.27 * trees.num_bytes(state)
    steps = np.array([10, 30, 100, 299])
    np.testing.assert_allclose(np.log(np.array(eight)[steps]), np.log(np.array(whole)[steps]), atol=0.5)
