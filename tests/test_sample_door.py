"""sample.py as a user runs it; tests/sampling/test_command.py has what it does."""

import dataclasses

import numpy as np
import pytest

from sd_jax import media
from sd_jax.sampling.recipe import read_recipe
from sd_jax.types import Recipe
from tests.sampling.conftest import pipe, tokenizer  # noqa: F401
from tests.training import doors


def test_every_field_has_a_flag():
    told = doors.run("sample.py", "--help", check=False).stdout
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name}:" in told or f"--[no]{field.name}:" in told, field.name


def test_a_picture_and_the_same_again(pipe, tmp_path):  # noqa: F811
    pipe.save(tmp_path / "model")
    slope = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    media.write_png(tmp_path / "image.png", slope, {})
    flags = ["--prompt=a star", "--seed=9", "--steps=2", "--guidance_scale=3", "--extend=0,0,8,0", "--only_masked"]
    flags += [f"--checkpoint={tmp_path}/model", f"--init_image={tmp_path}/image.png", "--eta=none", "--format=webp"]
    made = doors.run("sample.py", *flags, f"--out={tmp_path}/out")
    assert made.stdout.splitlines() == [f"{tmp_path}/out/00000.webp", f"{tmp_path}/out/sheet.png"]
    assert made.stderr.count("prediction type v_prediction") == 1
    recipe = Recipe("a star", steps=2, guidance_scale=3.0, seed=9, extend=(0, 0, 8, 0), only_masked=True, strength=1.0)
    assert read_recipe(tmp_path / "out" / "00000.webp") == recipe
    first = media.decode_image(tmp_path / "out" / "00000.webp")
    assert first.shape == (32, 40, 3) and (first[:, :16] == slope[:, :16]).all()

    doors.run("sample.py", f"--recipe={tmp_path}/out/00000.webp", f"--out={tmp_path}/again")
    np.testing.assert_array_equal(media.decode_image(tmp_path / "again" / "00000.png"), first)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--grid=samplr=euler", "error: grid: 'samplr' is no field of a recipe: did you mean sampler"),
        ("--steps=many", "error: steps='many': a whole number is needed"),
        ("--extend=1,2", "error: extend='1,2': left,top,right,bottom or none is needed"),
    ],
)
def test_mistakes_are_one_line(flag, words, tmp_path):
    failed = doors.run("sample.py", flag, f"--out={tmp_path}/out", check=False)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith(words)
    assert "Traceback" not in failed.stderr and not (tmp_path / "out").exists()
