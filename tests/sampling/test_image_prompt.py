"""Jobs with IP-Adapters on: whose row sees which picture, what compiles, where the vision tower is found."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters import ip_adapter
from sd_jax.checkpoints import CheckpointError, ip_adapters
from sd_jax.checkpoints.clip import save_clip, vision_of
from sd_jax.checkpoints.read_safetensors import open_file, write
from sd_jax.media import write_png
from sd_jax.sampling.command import Order, carry_out
from sd_jax.sampling.image_prompt import ImageEncoder
from sd_jax.sampling.pipeline import Pipeline
from sd_jax.sampling.recipe import read_record
from tests.sampling.conftest import ONE_LEVEL, random_params
from tests.sampling.test_adapters import _counted

FEW = {"steps": 2, "width": 16, "height": 16, "guidance_scale": 2.0, "seed": 3}
CONFIG = ONE_LEVEL.unet


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return Pipeline(ONE_LEVEL, random_params(ONE_LEVEL), tokenizer)


@pytest.fixture(scope="module")
def encoder(clip):
    return ImageEncoder(clip.config, vision_of(clip.params))


def of(encoder, kind="base", seed=0):
    """Of random weights."""
    make = lambda: ip_adapter.init(jax.random.key(0), kind, encoder.width_for(kind), CONFIG, zeros)  # noqa: E731
    zeros = jax.tree.map(jnp.zeros_like, random_params(ONE_LEVEL)["unet"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), jax.eval_shape(make))


@pytest.fixture(scope="module")
def on(pipe, encoder):
    return pipe.with_adapter(of(encoder), 0.8, image_encoder=encoder)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(2)]


def draw(pipe, prompt="a red circle", **fields):
    return pipe.text_to_image(prompt, output="latents", **{**FEW, **fields})


def test_another_picture_strength_or_adapter_compiles_nothing(pipe, on, encoder, pictures):
    first = draw(on, image_prompt=pictures[0])
    with _counted() as compiled:
        second = draw(on, image_prompt=pictures[1])
        half = draw(pipe.with_adapter(of(encoder), 0.4, image_encoder=encoder), image_prompt=pictures[0])
        other = pipe.with_adapter(of(encoder, seed=1), [(0.0, 0.0), (0.5, 1.0)], 1.0, image_encoder=encoder)
        late = draw(other, image_prompt=pictures[0])
        blocks = pipe.with_adapter(of(encoder), 0.8, blocks={"mid": 0.0, "": 1.0}, image_encoder=encoder)
        partly = draw(blocks, image_prompt=pictures[0])
        none = pipe.with_adapter(of(encoder), 0.8, blocks={"": 0.0}, image_encoder=encoder)
        nowhere = draw(none, image_prompt=pictures[0])
    assert not compiled
    made = [first, second, half, late, partly, nowhere]
    for i, one in enumerate(made):
        assert all(np.abs(one - other).max() > 1e-3 for other in made[:i])
    np.testing.assert_allclose(nowhere, draw(pipe), atol=1e-5)


def test_each_picture_of_a_batch_sees_its_own(on, pictures):
    prompts = ["a red circle"] * 2
    size = draw(on, image_prompt=pictures[0]).shape
    noise = np.random.default_rng(0).normal(size=size).astype(np.float32)
    one_by_one = [draw(on, latents=noise, image_prompt=picture) for picture in pictures]
    both = draw(on, prompts, latents=noise, image_prompt=np.stack(pictures))
    np.testing.assert_allclose(both, np.concatenate(one_by_one), atol=1e-4)
    with pytest.raises(ValueError, match="image_prompt holds 2 pictures, the prompts ask for 1"):
        draw(on, image_prompt=np.stack(pictures))


def test_parts_of_a_prompt_all_see_it(on, pictures):
    alone = draw(on, image_prompt=pictures[0])
    halves = draw(on, "a red circle :0.5 AND a red circle :0.5", image_prompt=pictures[0])
    np.testing.assert_allclose(halves, alone, atol=1e-4)


def test_guidance_of_one_is_the_pictures_alone(on, pictures):
    """And the negative row sees no picture: so guidance goes away from what it would be without."""
    first, second = (draw(on, guidance_scale=scale, image_prompt=pictures[0]) for scale in (1.0, 2.0))
    assert np.isfinite(first).all() and np.abs(first - second).max() > 1e-3


def test_two_adapters_and_several_pictures(pipe, on, encoder, pictures):
    both = on.with_adapter(of(encoder, "plus", 1), 0.5, image_encoder=encoder)
    made = draw(both, image_prompt=[pictures[0], [pictures[0], pictures[1]]])
    assert np.abs(made - draw(on, image_prompt=pictures[0])).max() > 1e-3
    off = on.with_adapter(of(encoder, "plus", 1), 0.0, image_encoder=encoder)
    np.testing.assert_allclose(
        draw(off, image_prompt=[pictures[0], [pictures[0], pictures[1]]]),
        draw(on, image_prompt=pictures[0]),
        atol=1e-5,
    )
    for wrong in (pictures[0], [pictures[0]], None):
        with pytest.raises(ValueError, match="image_prompt="):
            draw(both, image_prompt=wrong)


def test_what_is_refused(pipe, on, encoder, pictures):
    with pytest.raises(ValueError, match="^an adapter is an IP-Adapter and has no picture to show: give image_prompt="):
        draw(on)
    with pytest.raises(ValueError, match="^image_prompt= is for IP-Adapters, and none is on"):
        draw(pipe, image_prompt=pictures[0])
    with pytest.raises(ValueError, match="holds no picture"):
        draw(on, image_prompt=[])
    with pytest.raises(CheckpointError, match="^an adapter: reads CLIP features .* give the CLIP that it was trained"):
        pipe.with_adapter(of(encoder))
    with pytest.raises(ValueError, match="blocks='nowhere' finds no layer of this adapter, such as unet/"):
        pipe.with_adapter(of(encoder), blocks={"nowhere": 1.0}, image_encoder=encoder)
    wide = of(encoder)
    wide = wide.replace(projection={**wide.projection, "proj.weight": np.ones((4 * wide.width, 5), np.float32)})
    with pytest.raises(CheckpointError, match="reads CLIP features 5 wide, and those of the image encoder are"):
        pipe.with_adapter(wide, image_encoder=encoder)
    assert len(on.merge_adapters().adapters) == 1  # which no weights could hold


def write_tower(folder, encoder):
    """As transformers' CLIPVisionModelWithProjection is saved."""
    vision = dataclasses.asdict(encoder.config.vision_config)
    save_clip(folder, encoder.config, encoder_params(encoder))
    names = {
        name: tensor
        for name, tensor in open_file(folder / "model.safetensors").tensors.items()
        if name.startswith(("vision_model.", "visual_projection."))
    }
    tensors = {name: np.asarray(tensor) for name, tensor in names.items()}
    write(folder / "model.safetensors", tensors, {"format": "pt"})
    told = {**vision, "model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"]}
    (folder / "config.json").write_text(json.dumps(told))


def encoder_params(encoder):
    from sd_jax.models.clip import CLIP

    return {**CLIP.of(encoder.config).init(jax.random.key(0)), **encoder.params}


def test_the_tower_is_found_beside_the_file(pipe, on, encoder, pictures, tmp_path):
    wanted = draw(on, image_prompt=pictures[0])
    ip_adapters.save(tmp_path / "sdxl_models/a.bin", of(encoder), CONFIG)
    write_tower(tmp_path / "models/image_encoder", encoder)
    write_png(tmp_path / "shown.png", pictures[0], {})
    for file in (tmp_path / "sdxl_models/a.bin", tmp_path / "models/a.safetensors"):
        ip_adapters.save(file, of(encoder), CONFIG, overwrite=True)
        beside = pipe.with_adapter(file, 0.8)
        np.testing.assert_allclose(draw(beside, image_prompt=tmp_path / "shown.png"), wanted, atol=1e-5)
    twice = beside.with_adapter(file, 0.1)
    assert twice.adapters[0].encoder is twice.adapters[1].encoder
    save_clip(tmp_path / "clip.safetensors", encoder.config, encoder_params(encoder), "single_file")
    whole = pipe.with_adapter(file, 0.8, image_encoder=tmp_path / "clip.safetensors")
    np.testing.assert_allclose(draw(whole, image_prompt=pictures[0]), wanted, atol=1e-5)
    names = {
        name: np.asarray(t)
        for name, t in open_file(tmp_path / "models/image_encoder/model.safetensors").tensors.items()
    }
    names.pop("visual_projection.weight")
    write(tmp_path / "models/image_encoder/model.safetensors", names)
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight"):
        pipe.with_adapter(file)
    (tmp_path / "models/image_encoder/config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no folder image_encoder is beside it: .* as image_encoder= \(--image_e"
    ):
        pipe.with_adapter(file)


def test_the_command_shows_pictures_and_makes_them_again(pipe, encoder, pictures, tmp_path):
    pipe.save(tmp_path / "model")
    ip_adapters.save(tmp_path / "a.safetensors", of(encoder), CONFIG)
    write_tower(tmp_path / "tower", encoder)
    for number, picture in enumerate(pictures):
        write_png(tmp_path / f"{number}.png", picture, {})
    shown = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    fields = {"prompt": "a red circle", **FEW}
    order = Order(
        fields,
        {"checkpoint": str(tmp_path / "model")},
        adapters=[f"{tmp_path / 'a.safetensors'}:0.7"],
        image_prompts=shown,
        image_encoder=str(tmp_path / "tower"),
        out=tmp_path / "out",
    )
    first = next(iter(carry_out(order)))
    record = read_record(str(first))
    assert [each["path"] for each in record.origin.image_prompts] == shown
    assert record.origin.adapters[0]["tag"] == ""
    again = next(iter(carry_out(Order(recipe=str(first), out=tmp_path / "again"))))
    assert again.read_bytes() == first.read_bytes()
    write_png(tmp_path / "1.png", pictures[0], {})
    with pytest.raises(ValueError, match=r"1\.png is no longer what .* was made from: give that as --image_prompt="):
        list(carry_out(Order(recipe=str(first), out=tmp_path / "changed")))
