import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sd_jax import flops, hardware
from sd_jax.models import families
from sd_jax.models.networks import Networks
from sd_jax.types import Conditioning


def _shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def _by_xla(function, *inputs):
    return jax.jit(function).lower(*inputs).compile().cost_analysis()["flops"]


def _convolve(x, w, stride=1, padding="VALID", **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=numbers, **kwargs)


# --- against XLA and by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (jnp.matmul, (_shape(3, 20, 30), _shape(3, 30, 40))),
        (lambda a, b: jnp.einsum("bld,bsd->bls", a, b), (_shape(2, 5, 7), _shape(2, 6, 7))),
        (_convolve, (_shape(2, 16, 16, 8), _shape(3, 3, 8, 12))),
        (functools.partial(_convolve, stride=2), (_shape(2, 17, 17, 8), _shape(3, 3, 8, 12))),
        (functools.partial(_convolve, rhs_dilation=(2, 2)), (_shape(2, 16, 16, 8), _shape(3, 3, 8, 12))),
        (functools.partial(_convolve, feature_group_count=4), (_shape(2, 16, 16, 8), _shape(3, 3, 2, 12))),
    ],
    ids=["matmul", "einsum", "convolution", "stride", "dilated kernel", "groups"],
)
def test_count_is_that_of_xla_where_nothing_is_padded(function, inputs):
    assert flops.count(function, *inputs) == _by_xla(function, *inputs)


def test_padding_counts_and_zeros_within_the_input_do_not():
    x, w = _shape(2, 16, 16, 8), _shape(3, 3, 8, 12)
    everywhere = 2.0 * 2 * 16 * 16 * 9 * 8 * 12
    assert flops.count(functools.partial(_convolve, padding="SAME"), x, w) == everywhere
    doubled = functools.partial(_convolve, padding=((1, 2), (1, 2)), lhs_dilation=(2, 2))
    assert flops.count(doubled, x, w) == everywhere  # 32x32 places, of whose inputs a quarter are numbers


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_convolution_take_as_much_as_it_does(stride, groups):
    x, w = _shape(2, 16, 16, 8), _shape(3, 3, 8 // groups, 12)
    padding = ((1, 1), (1, 1)) if stride == 1 else ((0, 1), (0, 1))
    convolve = functools.partial(_convolve, stride=stride, padding=padding, feature_group_count=groups)
    loss = lambda inputs: jnp.sum(jnp.square(convolve(*inputs)))  # noqa: E731
    assert flops.count_gradient(loss, (x, w)) == 3 * flops.count(convolve, x, w)


# --- control flow ----------------------------------------------------------------------------------------------------

A, B = _shape(4, 8), _shape(8, 8)
ONE = 2.0 * 4 * 8 * 8


def _chain(b, a, wrap):
    """Five products, one after the other."""
    return jnp.sum(lax.scan(lambda c, _: (wrap(lambda c: jnp.tanh(c @ b))(c), None), a, length=5)[0])


def test_scan_counts_each_round_a_while_one_and_a_cond_its_dearest_branch():
    assert flops.count(lambda b, a: _chain(b, a, lambda f: f), B, A) == 5 * ONE
    turn = lambda b, a: lax.while_loop(lambda c: jnp.sum(c) < 9.0, lambda c: c @ b, a)  # noqa: E731
    assert flops.count(turn, B, A) == ONE
    branch = lambda b, a: lax.cond(jnp.sum(a) > 0, lambda: a @ b @ b, lambda: a @ b)  # noqa: E731
    assert flops.count(branch, B, A) == 2 * ONE
    assert flops.count(jax.jit(lambda b, a: jax.jit(jnp.matmul)(a, b)), B, A) == ONE


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_gradient_through_a_scan_counts_nothing_twice(wrap):
    chain = functools.partial(_chain, wrap=wrap)
    assert flops.count_gradient(chain, B, A) == 3 * 5 * ONE
    computed = flops.count(jax.grad(chain), B, A)
    assert computed == (4 if wrap is jax.checkpoint else 3) * 5 * ONE


def test_what_no_gradient_reaches_counts_once():
    def loss(b, a):
        frozen = jnp.tanh(a @ jnp.ones((8, 8)))  # forward alone
        return jnp.sum(jnp.square(frozen @ b))  # forward, and the gradient of b

    assert flops.count_gradient(loss, B, A) == 3 * ONE


def test_function_with_a_gradient_of_its_own():
    @jax.custom_vjp
    def double(a, b):
        return a @ b

    double.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    assert flops.count(double, A, B) == ONE
    assert flops.count_gradient(lambda b, a: jnp.sum(jnp.square(double(a, b))), B, A) == 3 * ONE


# --- published figures -----------------------------------------------------------------------------------------------


def _training(spec, side):
    """Forward and backward of the U-Net for one image."""
    networks = Networks.of(spec, "bfloat16")
    params = jax.eval_shape(lambda: networks.init("unet", jax.random.key(0)))
    told = Conditioning(_shape(1, 77, spec.unet.cross_attention_dim))
    if spec.num_time_ids:
        told = told.replace(pooled=_shape(1, 1280), time_ids=_shape(1, spec.num_time_ids))

    def loss(params, *inputs):
        return jnp.sum(networks.unet.apply({"params": params}, *inputs))

    with hardware.target("tpu"):
        return flops.count_gradient(loss, params, _shape(1, side, side, 4), _shape(1), told)


def test_sd2_at_512_takes_what_google_published():
    """2.41 TFLOP an image (tpu-recipes, Diffusion-2-MaxDiffusion): operations, not multiply-adds."""
    assert _training(families.SD2_BASE, 64) == pytest.approx(2.41e12, rel=0.005)


@pytest.mark.slow
def test_sdxl_at_1024_takes_what_google_published():
    """162.27 TFLOP for eight images (tpu-recipes, SDXL)."""
    assert _training(families.SDXL, 128) == pytest.approx(162.27e12 / 8, rel=0.005)
