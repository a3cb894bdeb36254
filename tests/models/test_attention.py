import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sd_jax import hardware
from sd_jax.models import attention as module
from sd_jax.models.attention import Attention, FeedForward, SpatialTransformer, attention, choose_implementation


def arrays(batch=2, queries=12, keys=9, heads=3, dim=8, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda length: jnp.asarray(rng.normal(size=(batch, length, heads, dim)), dtype)  # noqa: E731
    return draw(queries), draw(keys), draw(keys)


def exact(q, k, v, causal=False):
    """(Eq. 1) in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture
def small_chunks(monkeypatch):
    """Four queries at a time for the nine keys of `arrays`."""
    monkeypatch.setattr(module, "CHUNK_LIMIT", {"cpu": 36, "gpu": 6 * 36, "tpu": 6 * 36})


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
@pytest.mark.parametrize("queries", [1, 4, 7, 12, 13])
def test_every_implementation_is_equation_1(implementation, queries, small_chunks):
    q, k, v = arrays(queries=queries)
    np.testing.assert_allclose(attention(q, k, v, implementation=implementation), exact(q, k, v), atol=1e-6)


@pytest.mark.parametrize("queries", [7, 12])
def test_every_implementation_has_the_same_gradient(queries, small_chunks):
    inputs, weights = arrays(queries=queries), arrays(queries=queries, seed=1)[0]

    def gradients(implementation):
        loss = lambda q, k, v: (attention(q, k, v, implementation=implementation) * weights).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)

    for plain, chunked in zip(gradients("plain"), gradients("chunked"), strict=True):
        np.testing.assert_allclose(chunked, plain, atol=1e-6)


def test_gradient_is_that_of_finite_differences():
    inputs = arrays(batch=1, queries=3, keys=4, heads=2, dim=4)
    function = lambda *x: attention(*map(jnp.asarray, x), implementation="plain")  # noqa: E731
    check_grads(function, inputs, 1, ["rev"], atol=2e-2, rtol=2e-2)


def test_causal_sees_no_later_key():
    q, k, v = arrays(queries=6, keys=6)
    out = attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, exact(q, k, v, causal=True), atol=1e-6)
    changed = attention(q, k, v.at[:, 4:].add(1.0), causal=True)
    np.testing.assert_array_equal(out[:, :4], changed[:, :4])


@pytest.mark.parametrize("implementation", ["plain", "chunked"])
def test_bfloat16_in_bfloat16_out_with_float32_scores(implementation):
    q, k, v = arrays(dtype=jnp.bfloat16)
    out = attention(q, k, v, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact(q, k, v), atol=2e-2)


def test_choice_of_implementation():
    long, short = 16 * 4096 * 4096, 16 * 256 * 77
    for scores, head_dim, dtype, backend, expected in [
        (long, 40, jnp.float32, "cpu", "chunked"),
        (short, 40, jnp.float32, "cpu", "plain"),
        (long, 40, jnp.bfloat16, "gpu", "cudnn"),
        (long, 40, jnp.float32, "gpu", "plain"),
        (2 * long, 40, jnp.float32, "gpu", "chunked"),
        (2 * long, 512, jnp.bfloat16, "gpu", "chunked"),  # the VAE's single head is too wide for cuDNN
        (short, 40, jnp.bfloat16, "tpu", "plain"),
    ]:
        assert choose_implementation(scores, head_dim, dtype, backend) == expected


def test_chunks_keep_memory_below_the_score_matrix():
    shape = jax.ShapeDtypeStruct((1, 4096, 16, 8), jnp.float32)
    compiled = (
        jax.jit(lambda q, k, v: attention(q, k, v, implementation="chunked")).lower(shape, shape, shape).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 4096 * 4096 * 4 / 4


def test_what_a_mesh_shares_is_judged_by_what_each_device_has(monkeypatch):
    """Under jit over a mesh shapes are global; pmap's and shard_map's are those of a device already."""
    seen = []
    monkeypatch.setattr(module, "choose_implementation", lambda scores, *_: seen.append(scores) or "plain")
    shape = jax.ShapeDtypeStruct((8, 16, 2, 4), jnp.float32)
    trace = lambda: jax.jit(lambda x: attention(x, x, x)).trace(shape)  # noqa: E731
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_hand = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Manual,))
    trace()
    for over in (mesh, by_hand):
        with jax.sharding.use_abstract_mesh(over):
            trace()
    scores = 8 * 2 * 16 * 16
    assert seen == [scores, scores // 4, scores]


def test_pairs_go_together_where_devices_share_them():
    """A loop over pairs would make each device do all of them."""
    shape = jax.ShapeDtypeStruct((4, 64, 2, 4), jnp.float32)

    def loops():
        traced = jax.jit(lambda x: attention(x, x, x, implementation="chunked")).trace(shape)
        return [e.params["length"] for e in traced.jaxpr.jaxpr.eqns if e.primitive.name == "scan"]

    with hardware.target("cpu"):
        assert loops() == [8]
        mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        with jax.sharding.use_abstract_mesh(mesh):
            assert loops() == [1]
    with hardware.target("tpu"):
        assert loops() == [1]


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'flash' is unknown: use auto, plain, chunked or cudnn"):
        attention(*arrays(), implementation="flash")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_modules_keep_shape_and_dtype(dtype, initialise):
    x, words = jnp.ones((2, 6, 16), dtype), jnp.ones((2, 5, 12), dtype)
    for layer, inputs in [(Attention(4, dtype=dtype), (x, words)), (FeedForward(dtype=dtype), (x,))]:
        out = layer.apply({"params": initialise(layer, *inputs)}, *inputs)
        assert out.shape == x.shape and out.dtype == dtype
    feature_map = jnp.ones((2, 4, 6, 16), dtype)
    transformer = SpatialTransformer(4, 8, dtype=dtype)
    out = transformer.apply({"params": initialise(transformer, feature_map, words)}, feature_map, words)
    assert out.shape == feature_map.shape and out.dtype == dtype
