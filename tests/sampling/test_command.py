"""What sample.py does, but for its flags: a tiny pipeline on disk, orders, and the files that come of them."""

import dataclasses
import hashlib
import json
import logging
import shutil

import jax
import numpy as np
import pytest

from sd_jax import media
from sd_jax.adapters.textual_inversion import Embedding
from sd_jax.checkpoints import embeddings, keys_peft
from sd_jax.checkpoints.adapters import open_adapter, save_adapter
from sd_jax.checkpoints.clip import save_clip
from sd_jax.checkpoints.read_safetensors import open_file, write
from sd_jax.sampling import command
from sd_jax.sampling.adapters import hashes
from sd_jax.sampling.command import Order, carry_out, read_prompts
from sd_jax.sampling.pipeline import Pipeline, load
from sd_jax.sampling.recipe import read_recipe, read_record
from sd_jax.types import Recipe
from tests.sampling.conftest import random_params

FEW = {"steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def checkpoint(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    pipe.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(a picture, a mask of its size), in files."""
    folder = tmp_path_factory.mktemp("inputs")
    slope = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[8:24, 8:24] = 255
    for name, pixels in (("image", slope), ("mask", mask)):
        media.write_png(folder / f"{name}.png", pixels, {})
    return str(folder / "image.png"), str(folder / "mask.png")


@pytest.fixture
def make(checkpoint, tmp_path):
    """An order by its parts -> {name of a file: its pixels}, in a new folder each time; `make.folder` is the last."""

    def run(fields=None, **parts):
        run.folder = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        loading = {"checkpoint": checkpoint} if "recipe" not in parts else {}
        order = Order(**{"fields": fields or {}, "loading": loading, "out": run.folder, **parts})
        paths = list(carry_out(order))
        assert {path.name for path in paths} == {path.name for path in run.folder.iterdir()} - {"preview.png"}
        return {path.name: media.decode_image(path) for path in paths}

    run.checkpoint = checkpoint
    return run


# -- Again, bit for bit ----------------------------------------------------------------------------------------------

JOBS = {
    "text_to_image": {},
    "seeds of A1111": {"noise_source": "torch_cpu"},
    "variations": {"variation_strength": 0.4, "variation_seed": 3},
    "image_to_image": {"strength": 0.9},
    "inpaint": {},
    "only_masked": {"only_masked": True, "padding": 4},
    "extend": {"extend": (0, 0, 8, 0), "only_masked": True},
    "hires_fix": {"scale": 1.5, "strength": 0.5, "batch_size": 1},
}
STARTED = ("image_to_image", "inpaint", "only_masked", "extend")


@pytest.mark.parametrize("case", JOBS)
def test_a_picture_is_made_again_to_the_bit(make, inputs, case):
    image = inputs[0] if case in STARTED else None
    mask = inputs[1] if case in ("inpaint", "only_masked") else None
    fields = {"prompt": "a red circle", "negative_prompt": "blue", "seed": 7, "batch_size": 2, **FEW, **JOBS[case]}
    first = make(fields, image=image, mask=mask)
    folder, count = make.folder, fields["batch_size"]
    last = f"{count - 1:05d}.png"
    assert set(first) == {"00000.png", last, "sheet.png"}
    assert count == 1 or (first["00000.png"] != first[last]).any()
    record = read_record(folder / last)
    job = {
        "variations": "text_to_image",
        "seeds of A1111": "text_to_image",
        "only_masked": "inpaint",
        "extend": "inpaint",
    }
    assert record.origin.job == job.get(case, case) and record.recipe.batch_size == 1
    assert record.recipe.seed == (7 if case in ("variations", "hires_fix") else 8)

    again = make(recipe=str(folder / last))
    np.testing.assert_array_equal(again["00000.png"], first[last])
    assert media.read_text(make.folder / "00000.png") == media.read_text(folder / last)
    if case == "text_to_image":
        together = make(recipe=str(folder / "sheet.png"))
        assert all((together[name] == first[name]).all() for name in first)


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_other_formats(make, format):
    first = make({"prompt": "a star", **FEW}, format=format)
    assert set(first) == {f"00000.{format}", "sheet.png"}
    again = make(recipe=str(make.folder / f"00000.{format}"), format=format)
    np.testing.assert_array_equal(again[f"00000.{format}"], first[f"00000.{format}"])


def test_what_is_recorded_is_resolved(make, inputs, checkpoint):
    make({"prompt": "a star", "scale": 1.5, **FEW})
    record = read_record(make.folder / "00000.png")
    assert (record.recipe.width, record.recipe.height, record.recipe.strength) == (32, 32, 0.4)
    assert record.origin.checkpoint == checkpoint and len(record.origin.checkpoint_hash) == 10 and record.batch is None
    text = media.read_text(make.folder / "00000.png")["parameters"]
    assert "Size: 32x32, Model hash: " in text and "Denoising strength: 0.4, " in text and "Hires upscale: 1.5" in text
    make({"prompt": "a star", **FEW}, image=inputs[0])
    record = read_record(make.folder / "00000.png")
    assert (record.recipe.width, record.recipe.height, record.recipe.strength) == (32, 32, 0.75)
    assert record.origin.image["path"] == inputs[0] and len(record.origin.image["sha256"]) == 64


def test_flags_win_over_the_recipe(make, pipe):
    make({"prompt": "a star", "seed": 3, "batch_size": 2, **FEW})
    picture = str(make.folder / "00001.png")
    changed = make({"prompt": "a red circle"}, recipe=picture)
    np.testing.assert_array_equal(changed["00000.png"], pipe.text_to_image("a red circle", seed=4, **FEW)[0])
    assert set(make({"batch_size": 2}, recipe=picture)) == {"00000.png", "00001.png", "sheet.png"}
    assert read_recipe(make.folder / "00001.png").seed == 5


def test_the_model_and_how_it_was_loaded_are_recorded(make, checkpoint, caplog):
    make({"prompt": "a star", **FEW}, loading={"checkpoint": checkpoint, "weights": "raw", "vae": checkpoint})
    picture = make.folder / "00000.png"
    with caplog.at_level(logging.WARNING):
        make(recipe=str(picture))
        again = read_record(make.folder / "00000.png").origin
        assert again == read_record(picture).origin and (again.weights, again.vae) == ("raw", checkpoint)
        assert again.vae_hash == again.checkpoint_hash
        assert caplog.records == []
        make(recipe=str(picture), loading={"weights": "ema"})
        assert read_record(make.folder / "00000.png").origin.weights == "ema"


def test_another_model_or_version_is_told(make, checkpoint, tmp_path, caplog):
    make({"prompt": "a star", **FEW})
    picture = str(make.folder / "00000.png")
    text = media.read_text(picture)
    record = json.loads(text["sd_jax"])
    record["versions"]["jax"], record["checkpoint_hash"] = "0.1.2", "0123456789"
    media.write_png(picture, media.decode_image(picture), {**text, "sd_jax": json.dumps(record)})
    with caplog.at_level(logging.WARNING):
        make(recipe=picture)
    (warning,) = (r.getMessage() for r in caplog.records if "made with" in r.getMessage())
    assert "checkpoint 0123456789 (here " in warning and f"jax 0.1.2 (here {jax.__version__})" in warning
    assert "jaxlib" not in warning and "vae" not in warning


def test_the_picture_that_it_started_from_must_be_the_same(make, inputs, tmp_path):
    image = tmp_path / "image.png"
    shutil.copy(inputs[0], image)
    first = make({"prompt": "a star", **FEW}, image=str(image))
    picture = str(make.folder / "00000.png")
    media.write_png(image, np.zeros((32, 32, 3), np.uint8), {})
    with pytest.raises(ValueError, match=r"image\.png is no longer what .*00000\.png was made from: .*--init_image="):
        make(recipe=picture)
    image.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"image\.png, from which .*00000\.png was made, cannot be read .*--init"
    ):
        make(recipe=picture)
    again = make(recipe=picture, image=inputs[0])
    np.testing.assert_array_equal(again["00000.png"], first["00000.png"])


def test_a_refiner_is_recorded_and_refines_again(make, pipe, tmp_path):
    other = jax.tree.map(lambda leaf: leaf + 0.01, pipe.params["unet"])
    Pipeline(pipe.spec, {**pipe.params, "unet": other}, pipe.tokenizer).save(tmp_path / "refiner")
    fields, refiner = {"prompt": "a star", "refiner_switch": 0.5, **FEW}, str(tmp_path / "refiner")
    with pytest.raises(ValueError, match="refiner_switch=0.5 is for a refiner: give it"):
        make(fields)
    loading = {"checkpoint": make.checkpoint, "refiner": refiner}
    first = make(fields, loading=loading)["00000.png"]
    record = read_record(make.folder / "00000.png")
    assert record.origin.refiner == refiner and len(record.origin.refiner_hash) == 10
    assert record.recipe.refiner_switch == 0.5
    again = make(recipe=str(make.folder / "00000.png"))["00000.png"]
    np.testing.assert_array_equal(again, first)
    assert read_record(make.folder / "00000.png").origin == record.origin
    assert (make({"prompt": "a star", **FEW})["00000.png"] != first).any()


def test_text_encoders_from_elsewhere(make, checkpoint, monkeypatch):
    make({"prompt": "a star", **FEW}, loading={"checkpoint": checkpoint, "text_encoder": checkpoint})
    origin = read_record(make.folder / "00000.png").origin
    assert (origin.text_encoder, origin.text_encoder_hash) == (checkpoint, origin.checkpoint_hash)

    def refuse(path, text_encoder, **given):
        raise ValueError(text_encoder)

    monkeypatch.setattr(command, "load", refuse)
    for given, taken in {"a.safetensors": "a.safetensors", "a,b": ["a", "b"], None: None}.items():
        with pytest.raises(ValueError) as refused:
            make({"prompt": "a star"}, loading={"checkpoint": checkpoint, "text_encoder": given})
        assert refused.value.args == (taken,)


def test_a_map_of_depth_is_recorded_and_seen_again(make, pipe, inputs, tmp_path):
    unet = dataclasses.replace(pipe.spec.unet, in_channels=5, block_out_channels=(16,), attention_blocks=(True,))
    spec = dataclasses.replace(pipe.spec, unet=unet)
    Pipeline(spec, {**pipe.params, "unet": random_params(spec)["unet"]}, pipe.tokenizer).save(tmp_path / "depth")
    image, depth = inputs
    fields, loading = {"prompt": "a star", **FEW}, {"checkpoint": str(tmp_path / "depth")}
    with pytest.raises(ValueError, match="give it image_to_image with depth="):
        make(fields, loading=loading, image=image)
    first = make(fields, loading=loading, image=image, depth=depth)["00000.png"]
    record = read_record(make.folder / "00000.png")
    assert record.origin.depth["path"] == depth and record.origin.job == "image_to_image"
    np.testing.assert_array_equal(make(recipe=str(make.folder / "00000.png"))["00000.png"], first)
    with pytest.raises(ValueError, match="depth is for image_to_image, not for text_to_image"):
        make(fields, loading=loading, depth=depth)


# -- Pictures of other programs --------------------------------------------------------------------------------------


def test_a_picture_of_another_program(make, checkpoint, inputs, tmp_path, pipe, caplog):
    text = (
        "a star\nSteps: 2, Sampler: Euler Karras, CFG scale: 3, Seed: 5, Size: 32x32, Model hash: 0123456789, "
        'Model: m, TI hashes: "zorp: ba9876543210"'
    )
    media.write_png(tmp_path / "theirs.png", np.zeros((32, 32, 3), np.uint8), {"parameters": text})
    with pytest.raises(ValueError, match=r"by another program with m \(hash 0123456789\): give it as --checkpoint"):
        make(recipe=str(tmp_path / "theirs.png"))
    with caplog.at_level(logging.WARNING):
        made = make(recipe=str(tmp_path / "theirs.png"), loading={"checkpoint": checkpoint})
    assert "made with checkpoint 0123456789 (here " in caplog.text
    assert "embed:zorp ba9876543210 (here none): it may come out otherwise" in caplog.text
    recipe = Recipe("a star", schedule="karras", seed=5, width=32, height=32, noise_source="nv", **FEW)
    assert read_recipe(tmp_path / "theirs.png") == recipe
    np.testing.assert_array_equal(made["00000.png"], pipe.make(recipe)[0])

    text = f"{text}, Denoising strength: 0.9"
    media.write_png(tmp_path / "theirs.png", np.zeros((32, 32, 3), np.uint8), {"parameters": text})
    with pytest.raises(ValueError, match="made from a picture that it does not name: give it as --init_image="):
        make(recipe=str(tmp_path / "theirs.png"), loading={"checkpoint": checkpoint})
    make(recipe=str(tmp_path / "theirs.png"), loading={"checkpoint": checkpoint}, image=inputs[0])
    assert read_record(make.folder / "00000.png").origin.job == "image_to_image"


# -- A file of prompts -----------------------------------------------------------------------------------------------

LONG = "a small green star on the left " * 8  # two chunks of 22
PROMPTS = ["a red circle", "a blue square", "a star", LONG, "a green circle", "a red star"]


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# shapes\n\n" + "\n".join(f"  {prompt} " for prompt in PROMPTS) + "\n#\n", encoding="utf-8-sig")
    return str(path)


def test_batches_are_of_neighbours_of_one_shape(pipe):
    batches = command.batches_of(pipe, Recipe(seed=10, batch_size=2, **FEW), [p.strip() for p in PROMPTS])
    assert [batch.prompts for batch in batches] == [PROMPTS[:2], PROMPTS[1:3], [LONG.strip()], PROMPTS[4:]]
    assert [list(batch.numbers) for batch in batches] == [[0, 1], [None, 2], [3], [4, 5]]
    assert [batch.recipe.seed for batch in batches] == [10, 11, 13, 14]
    assert {batch.recipe.batch_size for batch in batches} == {1}
    mixed = command.batches_of(pipe, Recipe(batch_size=4, **FEW), ["a", "b AND c", "d AND e", "[f:g:1]", "h"])
    assert [batch.prompts for batch in mixed] == [["a"], ["b AND c", "d AND e"], ["[f:g:1]", "h"]]


def test_each_prompt_is_drawn_as_it_would_be_alone(make, pipe, prompts_file):
    together = make({"seed": 10, "batch_size": 2, **FEW}, prompts_file=prompts_file)
    assert sorted(together) == [*(f"{i:05d}.png" for i in range(6)), "sheet.png"]
    folder = make.folder
    for i, prompt in enumerate(PROMPTS):
        own = read_recipe(folder / f"{i:05d}.png")
        assert (own.prompt, own.seed, own.batch_size) == (prompt.strip(), 10 + i, 1)
        alone = pipe.text_to_image(prompt.strip(), seed=10 + i, **FEW)[0]
        assert np.abs(together[f"{i:05d}.png"].astype(int) - alone).max() <= 1  # rounded on the other side
    for i in (2, 5):
        again = make(recipe=str(folder / f"{i:05d}.png"))
        np.testing.assert_array_equal(again["00000.png"], together[f"{i:05d}.png"])
    again = make(recipe=str(folder / "sheet.png"))
    assert all((again[name] == together[name]).all() for name in together)


def test_files_of_prompts(tmp_path, prompts_file):
    assert read_prompts(prompts_file) == [prompt.strip() for prompt in PROMPTS]
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match=r"none\.txt: no prompts in it"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="--prompts_file, and --grid: give one"):
        next(carry_out(Order(prompts_file=prompts_file, grid="steps=1,2")))
    with pytest.raises(ValueError, match="--prompts_file, and --prompt: give one"):
        next(carry_out(Order({"prompt": "x"}, prompts_file=prompts_file)))


# -- The best of several -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(clip, checkpoint, tmp_path_factory):
    """What is loaded where a CLIP chooses."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    save_clip(folder, clip.config, clip.params, tokenizer=clip.tokenizer)
    return {"checkpoint": checkpoint, "clip": str(folder)}


def test_the_best_of_several_is_made_again_alone(make, judge, clip):
    fields, seeds = {"prompt": "a red circle", **FEW}, range(5, 8)
    alone = np.stack([make({**fields, "seed": seed})["00000.png"] for seed in seeds])
    scores = clip.scores(alone, ["a red circle"])
    best = int(scores.argmax())
    assert best and len(set(scores)) == 3

    kept = make({**fields, "seed": seeds[0]}, loading=judge, best_of=3)
    np.testing.assert_array_equal(kept["00000.png"], alone[best])
    folder = make.folder
    record = read_record(folder / "00000.png")
    assert record.recipe.seed == seeds[best] and record.batch is record.best_of is record.origin.clip is None
    assert record.chosen == {
        "candidates": 3,
        "score": pytest.approx(scores[best]),
        "clip_hash": read_record(folder / "sheet.png").origin.clip_hash,
    }
    assert f", CLIP score: {scores[best]:.4f}, Version: " in media.read_text(folder / "00000.png")["parameters"]
    for name in ("00000.png", "sheet.png"):
        np.testing.assert_array_equal(make(recipe=str(folder / name))["00000.png"], alone[best])


def test_the_best_of_several_for_each_prompt(make, judge, clip, tmp_path):
    """Of n pictures, candidate j of the k-th has seed + k + j n, whatever is made at once."""
    prompts, fields = ["a red circle", "a blue square"], {"seed": 10, "batch_size": 2, **FEW}
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    given = {"prompts_file": str(tmp_path / "prompts.txt")}
    rounds = [make({**fields, "seed": seed}, **given) for seed in (10, 12)]
    kept = make(fields, loading=judge, best_of=2, **given)
    folder = make.folder
    for k, prompt in enumerate(prompts):
        name = f"{k:05d}.png"
        best = int(clip.scores(np.stack([made[name] for made in rounds]), [prompt]).argmax())
        np.testing.assert_array_equal(kept[name], rounds[best][name])
        assert read_recipe(folder / name).seed == 10 + k + 2 * best
        np.testing.assert_array_equal(make(recipe=str(folder / name))["00000.png"], kept[name])


def test_what_the_best_of_several_needs(make, judge):
    with pytest.raises(ValueError, match=r"^--best_of=2 needs a CLIP that chooses: give it as --clip=PATH$"):
        make({"prompt": "a star", **FEW}, best_of=2)
    with pytest.raises(ValueError, match="^--best_of=0: at least 1"):
        make({"prompt": "a star", **FEW}, loading=judge, best_of=0)
    with pytest.raises(ValueError, match="give both or neither"):
        make({"prompt": "a star", **FEW}, loading=judge)


# -- Grids -----------------------------------------------------------------------------------------------------------


def test_a_grid(make, pipe):
    fields = {"prompt": "a red circle", "seed": 4, **FEW}
    made = make(fields, grid="seed=4,5;schedule=normal,karras;prompt_sr=red,blue")
    assert sorted(made) == [*(f"{i:05d}.png" for i in range(8)), "grid.png"]
    folder = make.folder
    own = read_recipe(folder / "00007.png")
    assert (own.prompt, own.seed, own.schedule) == ("a blue circle", 5, "karras")
    np.testing.assert_array_equal(made["00007.png"], pipe.make(own)[0])
    assert made["grid.png"].shape[0] > 2 * 128 and made["grid.png"].shape[1] > 4 * 128

    record = read_record(folder / "grid.png")
    axes = [{"field": "seed", "values": [4, 5]}, {"field": "schedule", "values": ["normal", "karras"]}]
    assert record.grid == [*axes, {"field": "prompt_sr", "values": ["red", "blue"]}]
    assert record.recipe == Recipe(**fields)
    assert "Schedule type: Normal, " in media.read_text(folder / "grid.png")["parameters"]
    again = make(recipe=str(folder / "grid.png"))
    assert all((again[name] == made[name]).all() for name in made)
    one = make(recipe=str(folder / "00007.png"))
    np.testing.assert_array_equal(one["00000.png"], made["00007.png"])


def test_a_grid_of_sizes_and_jobs(make):
    made = make({"prompt": "a star", **FEW, "steps": 3}, grid="scale=none,1.5")
    assert [made[f"{i:05d}.png"].shape[:2] for i in range(2)] == [(32, 32), (48, 48)]
    assert read_record(make.folder / "00000.png").origin.job == "text_to_image"
    assert read_record(make.folder / "00001.png").origin.job == "hires_fix"
    with pytest.raises(ValueError, match="width=33"):
        make({"prompt": "a star", **FEW}, grid="width=32,33")


def test_what_cannot_be_made_is_said_before_anything_is(make):
    with pytest.raises(ValueError, match="unknown sampler 'eular'"):
        make({"prompt": "a star", **FEW}, grid="sampler=euler,eular")
    assert not make.folder.exists()


# -- While it is made ------------------------------------------------------------------------------------------------


def test_progress_and_previews(make, capfd, monkeypatch):
    monkeypatch.setattr(command, "SECONDS_BETWEEN_PREVIEWS", 0.0)
    fields = {"prompt": "a star", "scale": 1.5, "strength": 0.5, **FEW}
    make(fields, previews=True)
    assert (make.folder / "preview.png").is_file()
    preview = media.decode_image(make.folder / "preview.png")
    assert preview.shape[1] >= 128 and preview.std() > 1
    steps = load(read_record(make.folder / "00000.png").origin.checkpoint).steps_of(Recipe(**fields))
    assert f"{steps}/{steps}" in capfd.readouterr().err


def test_orders_have_what_a_recipe_has_not():
    assert not {field.name for field in dataclasses.fields(Order)} & {f.name for f in dataclasses.fields(Recipe)}


# -- Adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(pipe, tmp_path_factory):
    """A folder with a LoRA and the words of another."""
    folder, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(0)
    path = "down_blocks_0/attentions_0/transformer_blocks_0/attn2/to_v"
    out, into = keys_peft.shapes_of(pipe.spec)["unet"][path]
    draw = lambda *shape: rng.normal(0, 2, shape).astype(np.float32)  # noqa: E731
    entry = {"lora_down": draw(2, into), "lora_up": draw(out, 2), "alpha": np.float32(2)}
    (folder / "styles").mkdir()
    save_adapter(folder / "styles" / "ink.safetensors", {"unet": {path: entry}}, pipe.spec)
    words = Embedding("zorp", {"text_encoder": draw(1, pipe.spec.text_encoder.hidden_size)})
    embeddings.save(folder / "zorp.safetensors", words)
    return folder


def test_adapters_are_put_on_and_recorded(make, pipe, adapters, tmp_path, caplog):
    ink = str(shutil.copytree(adapters, tmp_path / "adapters") / "styles" / "ink.safetensors")
    fields = {**FEW, "prompt": "a red circle"}
    plain, on = make(fields)["00000.png"], make(fields, adapters=(f"{ink}:0.5",))["00000.png"]
    assert np.abs(on.astype(int) - plain).max() > 0
    np.testing.assert_array_equal(on, pipe.with_adapter(ink, 0.5).text_to_image(**fields)[0])
    (digits,) = hashes(ink).values()
    assert parameters(make).startswith("a red circle <lora:ink:0.5>\n")
    assert f'Lora hashes: "ink: {digits}", Version: ' in parameters(make)
    again = make(recipe=str(make.folder / "00000.png"))["00000.png"]
    np.testing.assert_array_equal(again, on)
    folder = str(tmp_path / "adapters")
    tagged = make({**FEW, "prompt": "a red circle <lora:ink:0.5>"}, adapter_folder=folder)["00000.png"]
    np.testing.assert_array_equal(tagged, on)
    assert parameters(make).startswith("a red circle <lora:ink:0.5>\n")
    assert f'Lora hashes: "ink: {digits}", Version: ' in parameters(make)
    recipe = str(make.folder / "00000.png")
    again = make(recipe=recipe)["00000.png"]
    np.testing.assert_array_equal(again, on)

    layers = jax.tree.map(lambda array: np.asarray(array * 2), open_adapter(ink, pipe.spec).layers)
    save_adapter(ink, layers, pipe.spec, overwrite=True)
    with caplog.at_level(logging.WARNING):
        make(recipe=recipe)
    assert f"was made with lora:ink {digits} (here {hashes(ink)['lora:ink']}): it may come out otherwise" in caplog.text


def parameters(make):
    """A1111's text of what was made last."""
    return media.read_text(make.folder / "00000.png")["parameters"]


def test_words_are_known_to_prompts(make, pipe, adapters):
    fields = {**FEW, "prompt": "a zorp"}
    said = make(fields, embeddings=str(adapters))["00000.png"]
    wanted = pipe.with_adapter(adapters / "zorp.safetensors").text_to_image(**fields)[0]
    np.testing.assert_array_equal(said, wanted)
    digits = hashlib.sha256((adapters / "zorp.safetensors").read_bytes()).hexdigest()[:12]
    assert parameters(make).startswith("a zorp\n") and f'TI hashes: "zorp: {digits}", Version: ' in parameters(make)


def test_adapters_are_known_as_a1111_knows_them(pipe, adapters, tmp_path):
    ink, bare = adapters / "styles" / "ink.safetensors", tmp_path / "bare.safetensors"
    contents, found = open_file(ink), ink.read_bytes()
    digits = hashlib.sha256(found[8 + int.from_bytes(found[:8], "little") :]).hexdigest()[:12]
    assert hashes(ink) == {"lora:ink": digits} and contents.metadata["sshs_model_hash"].startswith(digits)
    assert hashes(ink, "styles/ink") == {"lora:styles/ink": digits}
    write(bare, {name: tensor.read() for name, tensor in contents.tensors.items()})  # with nothing in its header
    assert hashes(bare) == {"lora:bare": digits}
    write(bare, dict(contents.tensors), {"sshs_model_hash": "f" * 64})
    assert hashes(bare) == {"lora:bare": "f" * 12}

    shutil.copy(ink, tmp_path / "adapter.safetensors")  # as a run leaves it
    assert hashes(tmp_path) == hashes(tmp_path / "adapter.safetensors") == {f"lora:{tmp_path.name}": digits}
    worn = command.adapters_of([f"{ink}:0.5", f"{ink}:1:0.25", str(adapters / "zorp.safetensors")])
    assert [each["tag"] for each in worn] == ["<lora:ink:0.5>", "<lora:ink:0.25:1>", ""]  # the text encoder's first


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({"adapters": ("ink:much",)}, "--adapter=ink:much: give PATH, PATH:STRENGTH or PATH:STRENGTH:TEXT_STRENGTH"),
        ({"adapters": ("nowhere.safetensors",)}, "nowhere.safetensors"),
        ({"adapter_folder": "nowhere"}, "no such folder: nowhere"),
    ],
)
def test_what_no_adapter_is(make, order, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make({**FEW, "prompt": "x"}, **order)


def test_tags_that_name_nothing(make, pipe, adapters):
    with pytest.raises(ValueError, match="<lora:inc>: .* has no such file: .*ink"):
        make({**FEW, "prompt": "x <lora:inc>"}, adapter_folder=str(adapters))
    tagged = pipe.with_tags(adapters)
    with pytest.raises(ValueError, match="prompts of one batch ask for different adapters"):
        tagged.text_to_image(["a <lora:ink>", "b"], **FEW)
