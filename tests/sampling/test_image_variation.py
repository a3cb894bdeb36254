"""Models that are told pictures in place of text: in and out, what they are told, and what cannot be."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.media import write_png
from sd_jax.models.presets import TINY_CLIP
from sd_jax.sampling.command import Order, carry_out
from sd_jax.sampling.image_prompt import in_place_of_text
from sd_jax.sampling.pipeline import Pipeline, load
from sd_jax.types import Recipe
from tests.sampling.conftest import ONE_LEVEL, random_params

FEW = {"steps": 2, "width": 16, "height": 16, "guidance_scale": 2.0, "output": "latents"}
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def pipe():
    unet = dataclasses.replace(ONE_LEVEL.unet, cross_attention_dim=TINY_CLIP.projection_dim)
    tower = dataclasses.replace(TINY_CLIP, text_config=type(TINY_CLIP)().text_config, image_mean=(0.4, 0.5, 0.6))
    spec = dataclasses.replace(ONE_LEVEL, unet=unet).told_pictures(tower)
    return Pipeline(spec, random_params(spec))


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe.text_to_image(image_prompt=PICTURES, **FEW)


def test_each_picture_tells_its_own(pipe, drawn):
    """A prompt that is a picture, where that of an empty one is zeros: the same walk by its conditioning."""
    told = pipe.encode_pictures(list(PICTURES))
    nothing = told.replace(context=0 * told.context)
    given = {"conditioning": told, "negative_conditioning": nothing}
    np.testing.assert_array_equal(drawn, pipe.text_to_image(**given, **FEW))
    assert np.abs(drawn - pipe.text_to_image(**{**given, "conditioning": nothing}, **FEW)).max() > 1e-3
    two = pipe.text_to_image(image_prompt=PICTURES[0], batch_size=2, **FEW)
    np.testing.assert_allclose(two[0], drawn[0], atol=1e-5)
    at_once = in_place_of_text(pipe, [""], Recipe(batch_size=3), list(PICTURES)).context
    np.testing.assert_allclose(at_once, np.repeat(told.context.transpose(1, 0, 2), 3, axis=0), atol=1e-6)


@pytest.mark.parametrize("form", ["diffusers", "native"])
def test_out_and_in(pipe, drawn, tmp_path, form):
    pipe.save(tmp_path / "out", form)
    again = load(tmp_path / "out")
    assert again.spec == pipe.spec
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.params)
    if form == "native":
        return
    assert not list((tmp_path / "out").glob("t*")), "a text encoder or tokenizer"
    write_png(tmp_path / "0.png", PICTURES[0], {})
    fields = {"guidance_scale": 2.0, "steps": 2, "width": 16, "height": 16}
    order = Order(fields, {"checkpoint": str(tmp_path / "out")}, image_prompts=[str(tmp_path / "0.png")])
    assert next(carry_out(dataclasses.replace(order, out=tmp_path / "made"))).name == "00000.png"


def test_what_cannot_be_is_named(pipe, tmp_path):
    for given, said in [
        ({}, "is told a picture in place of a prompt: give image_prompt="),
        ({"prompt": "a cat", "image_prompt": PICTURES}, "reads pictures and no prompts"),
        ({"negative_prompt": "a dog", "image_prompt": PICTURES}, "reads pictures and no prompts"),
        ({"image_prompt": [PICTURES, np.concatenate([PICTURES, PICTURES])]}, "holds 2 pictures, the prompts ask for 4"),
    ]:
        with pytest.raises(ValueError, match=said):
            pipe.text_to_image(**given, **FEW)
    with pytest.raises(CheckpointError, match="a single file has no place for the image encoder"):
        pipe.save(tmp_path / "out.safetensors", "single_file")
    pipe.save(tmp_path / "out")
    config = tmp_path / "out/image_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 96}))
    with pytest.raises(CheckpointError, match=r"image_encoder/model.safetensors: .*\(96"):
        load_checkpoint(tmp_path / "out")
    config.unlink()
    with pytest.raises(CheckpointError, match="image_encoder: no image encoder here: its config.json is missing"):
        load_checkpoint(tmp_path / "out")
