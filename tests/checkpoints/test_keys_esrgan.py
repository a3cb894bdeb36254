"""Upscalers' layouts: what they are is read off their tensors, and everything of them must fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, keys_esrgan
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.presets import RRDBConfig, SRVGGConfig
from sd_jax.models.rrdb import upscaler
from tests.checkpoints import tiny_upscalers

OF_LAYOUT = ("esrgan", "bsrgan", "real_esrgan")
# (scale, unshuffle) of the files that there are: the community's x1, x2 and x8; Real-ESRGAN's x2 and x1
SIZES = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (1, 4)]


def found(tensors):
    return keys_esrgan.from_theirs({name: lazy(array) for name, array in tensors.items()}, "file.pth")


def shapes_of(config):
    """{our parameter: shape} of what the network initialises."""
    image = jnp.zeros((1, config.unshuffle, config.unshuffle, 3))
    tree = jax.eval_shape(upscaler(config).init, jax.random.key(0), image)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("layout", OF_LAYOUT)
@pytest.mark.parametrize(("scale", "unshuffle"), SIZES)
def test_the_config_is_read_off_the_tensors(layout, scale, unshuffle):
    """And they are those that the network has, both ways to the bit."""
    wanted = RRDBConfig(scale, unshuffle, features=6, blocks=2, growth=3)
    theirs = tiny_upscalers.rrdb(layout, wanted, stages=int(np.log2(scale * unshuffle)))
    config, of_layout, ours = found(theirs)
    assert (config, of_layout) == (wanted, layout)
    assert {name: tensor.shape for name, tensor in ours.items()} == shapes_of(config)
    again = keys_esrgan.to_theirs(ours, config, layout, "there")
    assert again.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.asarray(again[name]), array, strict=True)


def test_layouts_name_the_same_network():
    """What lies where: the doublings and the convolutions behind them would fit into each other's places."""
    trees = [found(tiny_upscalers.rrdb(layout))[2] for layout in OF_LAYOUT]
    for layout, tree in zip(OF_LAYOUT, trees, strict=True):
        modules, theirs = tiny_upscalers.names(layout, blocks=2, stages=2), tiny_upscalers.rrdb(layout)
        places = {"first": "conv_first", "trunk": "conv_body", "up1": "conv_up1", "up2": "conv_up2", "hr": "conv_hr"}
        places |= {"last": "conv_last", "dense112": "body_1/rdb1/conv2", "dense035": "body_0/rdb3/conv5"}
        for part, ours in places.items():
            kernel = theirs[f"{modules[part]}.weight"].transpose(2, 3, 1, 0)
            np.testing.assert_array_equal(np.asarray(tree[f"{ours}/kernel"]), kernel)
            np.testing.assert_array_equal(np.asarray(tree[f"{ours}/bias"]), theirs[f"{modules[part]}.bias"])


@pytest.mark.parametrize("wanted", [SRVGGConfig(1, 5, 0), SRVGGConfig(2, 8, 3), tiny_upscalers.COMPACT])
def test_compact(wanted):
    theirs = tiny_upscalers.compact(wanted)
    config, layout, ours = found(theirs)
    assert (config, layout) == (wanted, "compact")
    assert {name: tensor.shape for name, tensor in ours.items()} == shapes_of(config)
    again = keys_esrgan.to_theirs(ours, config, "compact", "there")
    assert list(again) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.asarray(again[name]), array, strict=True)


LAST = {"esrgan": "model.10", "bsrgan": "conv_last", "real_esrgan": "conv_last", "compact": "body.6"}


@pytest.mark.parametrize("layout", keys_esrgan.LAYOUTS)
def test_strict(layout):
    theirs, last = tiny_upscalers.compact() if layout == "compact" else tiny_upscalers.rrdb(layout), LAST[layout]
    with pytest.raises(CheckpointError, match=rf"file\.pth: .*{last}\.bias is missing"):
        found({name: array for name, array in theirs.items() if name != f"{last}.bias"})
    with pytest.raises(CheckpointError, match="extra.weight is unexpected; more is unexpected"):
        found({**theirs, "extra.weight": np.zeros(3), "more": np.zeros(3)})
    with pytest.raises(CheckpointError, match=rf"{last}\.bias is \(5,\), not"):
        found({**theirs, f"{last}.bias": np.zeros(5, np.float32)})


GREY = np.zeros((8, 1, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"conv_first.weight": GREY}, "no upscaler of ESRGAN's or Real-ESRGAN's, its tensors are conv_first.weight"),
        ({}, "its tensors are none"),
        ({**tiny_upscalers.rrdb("esrgan"), "model.0.weight": GREY}, "reads 1 channels.*RGB"),
        ({**tiny_upscalers.rrdb("esrgan"), "model.0.weight": np.zeros(4)}, "model.0.weight is no convolution"),
        ({**tiny_upscalers.compact(), "body.6.weight": GREY}, "makes 8 channels, which are no squares"),
        ({"body.0.weight": GREY, "body.9.weight": GREY}, "body.1.weight is missing"),
        (tiny_upscalers.rrdb("real_esrgan", dataclasses.replace(tiny_upscalers.RRDB, unshuffle=4), 1), "scale=0"),
    ],
)
def test_what_is_none_is_named(theirs, said):
    with pytest.raises(CheckpointError, match=rf"file\.pth: .*{said}") as refused:
        found(theirs)
    assert "\n" not in str(refused.value)


def test_a_layout_is_for_its_kind():
    config, _, ours = found(tiny_upscalers.compact())
    with pytest.raises(ValueError, match="layout='esrgan': a network of this kind has compact"):
        keys_esrgan.to_theirs(ours, config, "esrgan", "there")
    config, _, ours = found(tiny_upscalers.rrdb("bsrgan"))
    with pytest.raises(ValueError, match="layout='compact': .* esrgan or bsrgan or real_esrgan"):
        keys_esrgan.to_theirs(ours, config, "compact", "there")
    with pytest.raises(CheckpointError, match="there: .*conv_up3.weight is missing"):
        keys_esrgan.to_theirs(ours, dataclasses.replace(config, scale=8), "real_esrgan", "there")
