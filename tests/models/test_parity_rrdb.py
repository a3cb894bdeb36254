"""ESRGAN's networks against spandrel's, with random weights, in every layout that spandrel reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import keys_esrgan
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.presets import RRDBConfig, SRVGGConfig
from sd_jax.models.rrdb import upscaler
from tests.checkpoints import tiny_upscalers
from tests.reference import spandrel

pytestmark = pytest.mark.parity

# (layout, scale, unshuffle). spandrel's dense blocks always grow by 32
RRDB = [("esrgan", 4, 1), ("bsrgan", 2, 1), ("real_esrgan", 4, 1), ("real_esrgan", 2, 2), ("real_esrgan", 1, 4)]
RRDB += [("esrgan", 1, 1), ("esrgan", 8, 1)]


def assert_equal(architecture, tensors, config):
    import torch

    theirs = architecture.load({name: torch.tensor(array) for name, array in tensors.items()})
    found, _, ours = keys_esrgan.from_theirs({name: lazy(array) for name, array in tensors.items()}, "the reference")
    assert found == config and theirs.scale == config.scale
    params = traverse_util.unflatten_dict({name: jnp.asarray(np.asarray(x)) for name, x in ours.items()}, sep="/")
    picture = np.random.default_rng(1).uniform(0, 1, (2, 12, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.model.eval()(torch.tensor(picture.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    made = jax.jit(upscaler(config).apply)({"params": params}, jnp.asarray(2 * picture - 1))
    assert expected.std() > 0.1
    np.testing.assert_allclose((np.asarray(made) + 1) / 2, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("layout", "scale", "unshuffle"), RRDB)
def test_rrdb(layout, scale, unshuffle):
    architecture = spandrel("ESRGAN").ESRGANArch()
    config = RRDBConfig(scale, unshuffle, features=8, blocks=2, growth=32)
    tensors = tiny_upscalers.rrdb(layout, config, stages=int(np.log2(scale * unshuffle)))
    assert_equal(architecture, tensors, config)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_compact(scale):
    config = SRVGGConfig(scale, features=8, convolutions=2)
    assert_equal(spandrel("Compact").CompactArch(), tiny_upscalers.compact(config), config)
