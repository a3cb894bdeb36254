"""Real input: a folder of pictures in mixed formats, some broken, and a checkpoint in the SD 1.x layout."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sd_jax.models.presets import TINY
from sd_jax.prompts.tokenize import train_tokenizer
from sd_jax.sampling.pipeline import Pipeline, load
from tests.sampling.conftest import random_params
from tests.training import doors

CAPTIONS = ("a photograph of the sea", "a photograph of a hill", "a grey wall", "red leaves")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A reduced-width Stable Diffusion in one file, and its tokenizer's folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(CAPTIONS * 4, folder / "tokenizer", 600)
    text = dataclasses.replace(
        TINY.text_encoder,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    spec = dataclasses.replace(TINY, text_encoder=text)
    Pipeline(spec, random_params(spec), tokenizer).save(folder / "model.safetensors", format="single_file")
    return folder / "model.safetensors", folder / "tokenizer"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        pixels = np.linspace(0, 255, 72 * 64 * 3).reshape(72, 64, 3) * rng.random(3)
        image = Image.fromarray(pixels.astype(np.uint8))
        name = folder / f"{i:02d}{('.jpg', '.png', '.webp')[i % 3]}"
        (image.convert("CMYK") if i % 9 == 0 else image).save(name)
        name.with_suffix(".txt").write_text(CAPTIONS[i % 4])
    (folder / "cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.mark.slow  # three processes and as many programs; test_loop.py, test_sample_door.py and data/ try the parts
def test_fine_tune_resume_sample_and_save(checkpoint, pictures, tmp_path):
    model, tokenizer = checkpoint
    flags = [
        "--config=configs/finetune.py:runlocal",
        f"--workdir={tmp_path / 'run'}",
        f"--config.init={model}",
        f"--config.tokenizer={tokenizer}",
        f"--config.data.path={pictures}",
        "--config.data.resolution=32",
        "--config.data.held_out=4",
        "--config.batch_size=4",
        "--config.optimizer.learning_rate=1e-3",
        "--config.eval_steps=10",
    ]
    doors.run("train.py", *flags, "--config.total_steps=20")
    doors.run("train.py", *flags, "--config.total_steps=40")

    from sd_jax.training.metrics import read_rows

    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    held_out = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert held_out[-1] < held_out[0]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "cut.jpg" in log and "empty.png" in log

    doors.run(
        "sample.py", f"--checkpoint={tmp_path / 'run'}", "--prompt=red leaves", "--steps=2", f"--out={tmp_path}/out"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "sheet.png"]
    pipe = load(tmp_path / "run")
    pipe.save(tmp_path / "folder")
    pipe.save(tmp_path / "file.safetensors", format="single_file")
    recipe = {"steps": 2, "seed": 3}
    wanted = pipe.text_to_image("red leaves", **recipe)
    np.testing.assert_array_equal(load(tmp_path / "folder").text_to_image("red leaves", **recipe), wanted)
    again = load(tmp_path / "file.safetensors", tokenizer=str(tokenizer))
    np.testing.assert_array_equal(again.text_to_image("red leaves", **recipe), wanted)
