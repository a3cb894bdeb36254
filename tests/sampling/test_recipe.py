"""What is written into a picture and read again; tests of infotext.py have the other programs' text."""

import dataclasses
import hashlib
import json
import logging

import numpy as np
import pytest
from PIL import Image

from sd_jax import media
from sd_jax.media import BadImage
from sd_jax.sampling import recipe as recipes
from sd_jax.sampling.recipe import Origin, hash_of_weights, kind_of, own_recipe, read_value, texts, whole_recipe
from sd_jax.types import Recipe

PIXELS = np.zeros((8, 16, 3), np.uint8)


# -- Values as text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "kind", "optional"),
    [
        ("prompt", str, False),
        ("width", int, True),
        ("steps", int, False),
        ("guidance_scale", float, False),
        ("eta", float, True),
        ("only_masked", bool, False),
        ("extend", tuple, True),
        ("original_size", tuple, True),
        ("crops_coords_top_left", tuple, False),
    ],
)
def test_kinds(field, kind, optional):
    assert kind_of(field) == (kind, optional)


def test_every_default_is_of_its_kind():
    for name in recipes.FIELDS:
        kind, optional = kind_of(name)
        default = getattr(Recipe(), name)
        assert optional if default is None else type(default) is kind, name


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("prompt", " none ", " none "),
        ("width", "512", 512),
        ("width", "None", None),
        ("eta", "1e-3", 0.001),
        ("only_masked", "True", True),
        ("only_masked", "0", False),
        ("extend", "1, 2,3,4", (1, 2, 3, 4)),
        ("extend", "none", None),
        ("original_size", "768,1024", (768, 1024)),
        ("crops_coords_top_left", "(0, 8)", (0, 8)),  # as --help shows it
        ("tile_prompts", "a red circle, large || || [a|b]", ("a red circle, large", "", "[a|b]")),
        ("tile_prompts", "none", None),
    ],
)
def test_values(field, text, value):
    assert read_value(field, text) == value and type(read_value(field, text)) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("steps", "1.5", "steps='1.5': a whole number is needed"),
        ("steps", "none", "steps='none': a whole number is needed"),
        ("eta", "x", "eta='x': a number or none is needed"),
        ("only_masked", "perhaps", "true or false is needed"),
        ("extend", "1,2,3", "left,top,right,bottom or none is needed"),
        ("target_size", "768", "height,width or none is needed"),
        ("crops_coords_top_left", "none", "top,left is needed"),
    ],
)
def test_values_that_are_none(field, text, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        read_value(field, text)


# -- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_own_recipes(strength):
    whole = Recipe("a", seed=5, batch_size=4, variation_seed=50, variation_strength=strength)
    own = own_recipe(whole, 2)
    seeds = (7, 50) if strength == 0 else (5, 52)
    assert own == dataclasses.replace(whole, batch_size=1, seed=seeds[0], variation_seed=seeds[1])
    assert whole_recipe(own, {"size": 4, "index": 2}) == whole
    named = own_recipe(dataclasses.replace(whole, batch_size=1), 2, "b")
    assert named == dataclasses.replace(own, prompt="b")
    several = {"size": 4, "index": 2, "prompts": ["x", "y", "b", "z"]}
    assert whole_recipe(named, several) == dataclasses.replace(whole, batch_size=1, prompt="b")


# -- In pictures -----------------------------------------------------------------------------------------------------

FULL = Recipe(
    'a "cat", 猫\nSteps: 3, Sampler: Euler, Seed: 9',
    "blurry",
    width=16,
    height=8,
    guidance_scale=6.1,
    sampler="dpmpp_2m",
    schedule="beta",
    seed=2**40,
    clip_skip=2,
    s_tmax=float("inf"),
    guidance_stop=0.8,
    apg_momentum=-0.75,
    strength=0.4,
    extend=(0, 8, 0, 16),
    original_size=(768, 1024),
    crops_coords_top_left=(0, 64),
    negative_aesthetic_score=2.0,
)


def origin(**changes):
    return Origin(
        job="inpaint",
        checkpoint="models/one, two.safetensors",
        checkpoint_hash="0123456789",
        image={"path": "/a/ü.png", "sha256": "ff"},
        **changes,
    )


@pytest.mark.parametrize("format", media.FORMATS)
def test_pictures_carry_their_recipe(tmp_path, format):
    path = tmp_path / f"a.{format}"
    place = {"size": 2, "index": 1, "prompts": ["x", "猫"]}
    media.write_picture(path, PIXELS, texts(FULL, origin(), (16, 8), batch=place))
    assert recipes.read_recipe(path) == FULL
    assert recipes.read_record(path) == recipes.Record(FULL, origin(), batch=place)
    text = media.read_text(path)
    assert 'Model hash: 0123456789, Model: "one, two", ' in text["parameters"]
    assert set(recipes.FIELDS) < set(json.loads(text["sd_jax"]))


def test_the_bundled_model_has_a_name():
    text = texts(Recipe("x"), Origin(checkpoint_hash="0123456789"), (16, 8))["parameters"]
    assert "Size: 16x8, Model hash: 0123456789, Model: shapes_64, " in text


def test_the_refiner_is_named_as_a1111_names_it():
    made = Origin(checkpoint="base.ckpt", refiner="models/xl_refiner.safetensors", refiner_hash="9876543210")
    text = texts(Recipe("x", refiner_switch=0.7), made, (16, 8))["parameters"]
    assert "Model: base, " in text and "Refiner: xl_refiner [9876543210], Refiner switch at: 0.7, Version: " in text


def test_a1111_is_told_of_adapters_and_words():
    on = [{"path": "a", "tag": "<lora:ink:0.5>"}, {"path": "b", "tag": ""}, {"path": "of an older version"}]
    hashes = {"lora:ink": "0" * 12, "lora:other": "1" * 12, "embed:zorp": "2" * 12, "embed:zo": "3" * 12}
    made = Origin(checkpoint_hash="0123456789", adapters=on, hashes=hashes)
    text = texts(Recipe("a ZORP, <lyco:other>", "a zoo"), made, (16, 8))["parameters"]
    assert text.startswith("a ZORP, <lyco:other> <lora:ink:0.5>\nNegative prompt: a zoo\n")
    assert f'Lora hashes: "ink: {"0" * 12}, other: {"1" * 12}", TI hashes: "zorp: {"2" * 12}", Version: ' in text
    bare = texts(Recipe("", "zo"), dataclasses.replace(made, adapters=[]), (16, 8))["parameters"]
    assert "Lora hashes" not in bare and f'TI hashes: "zo: {"3" * 12}"' in bare


def test_origin_says_what_computed():
    import jax

    made = Origin()
    assert set(made.versions) == {"sd_jax", "jax", "jaxlib", "python"} and made.versions["jax"] == jax.__version__
    assert made.platform.startswith(jax.devices()[0].platform) and made.adapters == []
    assert not {field.name for field in dataclasses.fields(Origin)} & set(recipes.FIELDS)  # they stand in one record


def test_a_record_of_a_later_version(tmp_path, caplog):
    text = texts(FULL, origin(), (16, 8))
    record = {**json.loads(text["sd_jax"]), "sparkle": 3}
    del record["padding"]
    media.write_picture(tmp_path / "a.png", PIXELS, {**text, "sd_jax": json.dumps(record)})
    with caplog.at_level(logging.WARNING):
        assert recipes.read_recipe(tmp_path / "a.png") == FULL
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}/a.png: not understood and left out: sparkle"]


def test_a_picture_of_another_program(tmp_path, caplog):
    parameters = "a cat\nSteps: 7, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x32, Tiling: True, Model: m"
    media.write_picture(tmp_path / "a.jpg", PIXELS, {"parameters": parameters, "sd_jax": "my holiday"})
    with caplog.at_level(logging.WARNING):
        record = recipes.read_record(tmp_path / "a.jpg")
    assert record.recipe == Recipe(
        "a cat", width=64, height=32, steps=7, guidance_scale=7.0, sampler="euler_ancestral", seed=1, noise_source="nv"
    )
    assert record.origin is None and record.model == "m"
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}/a.jpg: not understood and left out: Tiling: True"]


def test_pictures_without_a_recipe(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a\.png: carries no recipe"):
        recipes.read_recipe(tmp_path / "a.png")
    media.write_png(tmp_path / "b.png", PIXELS, {"parameters": "a cat", "sd_jax": "[1]"})
    with pytest.raises(BadImage, match=r"b\.png: its text holds no settings"):
        recipes.read_recipe(tmp_path / "b.png")
    with pytest.raises(BadImage, match=r"c\.png: cannot be read"):
        recipes.read_recipe(tmp_path / "c.png")


# -- Hashes ----------------------------------------------------------------------------------------------------------


def test_a_single_file_has_the_hash_that_others_give_it(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"weights" * 1000)
    assert hash_of_weights(tmp_path / "m.safetensors") == hashlib.sha256(b"weights" * 1000).hexdigest()[:10]


def test_a_folder_of_pickled_weights(tmp_path):
    (tmp_path / "unet").mkdir()
    hashes = []
    for words in (b"weights", b"others"):
        (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(words)
        hashes.append(hash_of_weights(tmp_path))
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("format", ["diffusers", "native"])
def test_a_folder_is_known_by_its_weights(pipe, tmp_path, format):
    pipe.save(tmp_path / "a", format=format)
    first = hash_of_weights(tmp_path / "a")
    assert len(first) == 10 and hash_of_weights(str(tmp_path / "a")) == first
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("nothing that computes")
    assert hash_of_weights(tmp_path / "b") == first
    if format == "diffusers":
        changed = tmp_path / "b" / "vae" / "diffusion_pytorch_model.safetensors"
    else:
        changed = next(path for path in (tmp_path / "b").rglob("state/**/*") if path.is_file())
    changed.write_bytes(changed.read_bytes() + b"x")
    assert hash_of_weights(tmp_path / "b") != first


def test_a_run_is_known_by_its_latest_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / "checkpoints" / str(step) / "state").mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "state" / "arrays").write_text(f"of step {step}")
    by_step = [hash_of_weights(tmp_path / "checkpoints" / str(step)) for step in (9, 10)]
    assert by_step[0] != by_step[1] == hash_of_weights(tmp_path)
