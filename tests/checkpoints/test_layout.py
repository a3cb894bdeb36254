"""The lists of tensors: those that our modules initialise, and the known sizes of SD 1.5."""

import math

import jax
import numpy as np
import pytest
from flax import traverse_util

from sd_jax.checkpoints import CheckpointError, keys_diffusers, layout
from sd_jax.models.networks import Networks
from sd_jax.models.presets import SD15, SHAPES_64, TINY
from tests.checkpoints.tiny import shapes_only


@pytest.mark.parametrize("part", layout.PARTS)
@pytest.mark.parametrize("spec", [TINY, SHAPES_64, SD15], ids=["tiny", "shapes_64", "sd15"])
def test_modules_initialise_what_the_layout_lists(spec, part):
    tree = jax.eval_shape(lambda key: Networks.of(spec).init(part, key), jax.random.key(0))
    ours = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    config = getattr(spec, part)
    listed = keys_diffusers.from_diffusers(part, shapes_only(layout.LAYOUTS[part](config)), config, "layout")
    assert {name: tensor.shape for name, tensor in listed.items()} == ours


@pytest.mark.parametrize(
    ("part", "tensors", "parameters"),
    [("unet", 686, 859_520_964), ("vae", 248, 83_653_863), ("text_encoder", 196, 123_060_480)],
)
def test_sizes_of_sd15(part, tensors, parameters):
    shapes = layout.LAYOUTS[part](getattr(SD15, part))
    assert (len(shapes), sum(math.prod(shape) for shape in shapes.values())) == (tensors, parameters)


def test_faults_are_listed_ten_at_most():
    tensors = shapes_only(layout.unet(TINY.unet))
    for name in [name for name in tensors if "mid_block" in name][:12]:
        del tensors[name]
    tensors["conv_in.extra"] = tensors["conv_in.bias"]
    tensors["conv_in.weight"] = tensors["conv_in.weight"].reshape(32, 36)
    with pytest.raises(CheckpointError) as error:
        layout.check("unet", tensors, TINY.unet, "file.safetensors")
    text = str(error.value)
    assert text.startswith("file.safetensors: not the U-Net of its config: mid_block.resnets.0.norm1.weight is missing")
    assert text.count("missing") == 10 and text.endswith("; and 4 more") and "\n" not in text

    few = shapes_only(layout.unet(TINY.unet))
    few["conv_in.extra"], few["conv_in.weight"] = few["conv_in.bias"], few["conv_in.weight"].reshape(32, 36)
    with pytest.raises(CheckpointError) as error:
        layout.check("unet", few, TINY.unet, "file")
    assert "conv_in.extra is unexpected" in str(error.value)
    assert "conv_in.weight is (32, 36), not (32, 4, 3, 3)" in str(error.value)
    np.testing.assert_equal(len(few), 1 + len(layout.unet(TINY.unet)))
