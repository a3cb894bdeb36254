"""The command `python -m sd_jax.preprocessors`."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sd_jax import media
from sd_jax.data.shapes import draw_scene, render
from sd_jax.preprocessors import apply
from sd_jax.preprocessors.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
PICTURES = {name: render(draw_scene(RNG), 40) for name in ("a.png", "b.webp", "C.BMP")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(tmp_path / "in" / name, lossless=True)
    (tmp_path / "in" / "a.txt").write_text("a caption")
    return tmp_path / "in"


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_as_a_command_without_jax(folder, tmp_path):
    """It starts in a moment: JAX is not imported."""
    script = "import runpy, sys; runpy.run_module('sd_jax.preprocessors', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-X", "importtime", "-c", script, "blur", f"{folder}/a.png", f"{tmp_path}/out.png"]
    done = subprocess.run([*command, "--sigma=2"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/out.png\n"
    assert not any(line.split("|")[-1].strip() == "jax" for line in done.stderr.splitlines())
    np.testing.assert_array_equal(media.decode_image(tmp_path / "out.png"), apply("blur", PICTURES["a.png"], sigma=2))


def test_a_picture(folder, tmp_path, capsys):
    out = tmp_path / "new" / "edges.png"
    assert run(capsys, "canny", folder / "a.png", out, "--sigma=0.5", "--channels=colour") == (0, f"{out}\n", "")
    wanted = apply("canny", PICTURES["a.png"], sigma=0.5, channels="colour")
    np.testing.assert_array_equal(media.decode_image(out), wanted)
    assert run(capsys, "tile", folder / "C.BMP", tmp_path / "new")[1] == f"{tmp_path}/new/C.png\n"


def test_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "out"
    status, told, errors = run(capsys, "shuffle", folder, out, "--seed=4")
    assert (status, errors) == (0, "") and told.split() == [f"{out}/C.png", f"{out}/a.png", f"{out}/b.png"]
    assert {path.name for path in out.iterdir()} == {"a.png", "b.png", "C.png"}
    for name, pixels in PICTURES.items():
        made = media.decode_image(out / f"{pathlib.Path(name).stem}.png")
        np.testing.assert_array_equal(made, apply("shuffle", pixels, seed=4))


def test_what_is_there_is_left_as_it_is(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"mine")
    status, told, errors = run(capsys, "blur", folder, tmp_path / "out")
    assert status == 1 and told == "" and errors.count("\n") == 1
    assert errors.startswith(f"error: {tmp_path}/out/b.png already exists and is left as it is: give another OUT")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.png"}
    assert run(capsys, "blur", folder, tmp_path / "out", "--overwrite")[0] == 0
    np.testing.assert_array_equal(media.decode_image(tmp_path / "out" / "b.png"), apply("blur", PICTURES["b.webp"]))
    assert run(capsys, "blur", folder / "a.png", folder / "a.png")[0] == 1  # nor is what it was made from


def test_a_bad_picture_is_told_of_and_the_others_are_done(folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    status, told, errors = run(capsys, "grayscale", folder, tmp_path / "out")
    assert status == 1 and len(told.split()) == 3
    assert errors.startswith(f"error: {folder}/broken.png: ") and errors.count("\n") == 1


def test_masks(folder, tmp_path, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, name in enumerate(PICTURES):
        Image.fromarray(np.where(np.arange(40) < 10 * i, 255, 0).astype(np.uint8)[None].repeat(40, axis=0)).save(
            masks / name, lossless=True
        )
    assert run(capsys, "inpaint", folder, tmp_path / "out", f"--mask={masks}")[0] == 0
    for i, (name, pixels) in enumerate(PICTURES.items()):
        hint = np.load(tmp_path / "out" / f"{pathlib.Path(name).stem}.npy")
        assert hint.dtype == np.float32 and (hint[:, : 10 * i] == -1).all()
        np.testing.assert_array_equal(hint[:, 10 * i :], pixels[:, 10 * i :] / np.float32(255))
    one = tmp_path / "one.npy"
    assert run(capsys, "inpaint", folder / "a.png", one, f"--mask={masks}/C.BMP")[0] == 0
    assert (np.load(one)[:, :20] == -1).all() and (np.load(one)[:, 20:] >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cany", "{}/a.png", "{}/o.png"), "unknown preprocessor 'cany': did you mean canny?"),
        (("canny", "{}/a.png", "{}/o.png", "--sigm=1"), "canny: unknown option 'sigm': did you mean sigma"),
        (("canny", "{}/a.png", "{}/o.png", "--sigma=x"), "canny: sigma='x': give a number"),
        (("canny", "{}/a.png", "{}/o.png", "--sigma=-1"), "sigma=-1.0: give a number from 0.0 to 100.0"),
        (("canny", "{}/a.png", "{}/o.png", "--sigma", "1"), "unexpected argument '--sigma': options are given as"),
        (("canny", "{}/a.png", "{}/o.png", "more"), "unexpected argument 'more': options are given as --name=value"),
        (("canny", "{}/none.png", "{}/o.png"), "{}/none.png: cannot be read (No such file or directory)"),
        (("canny", "{}/a.txt", "{}/o.png"), "{}/a.txt: not a picture in a known format"),
        (("canny", "{}/a.png", "{}/o.tga"), "{}/o.tga: pictures are written as png, jpg, webp"),
        (("canny", "{}", "{}/a.txt"), "{}/a.txt is a file, and {} a folder: give a folder as OUT"),
        (("inpaint", "{}/a.png", "{}/o.npy"), "inpaint: mask is needed: give mask="),
        (("inpaint", "{}/a.png", "{}/o.npy", "--mask={}/none.png"), "{}/none.png: cannot be read (No such file"),
        (("inpaint", "{}/a.png", "{}/o.png", "--mask={}/a.png"), "{}/o.png: the hint has numbers below 0, as no"),
    ],
)
def test_mistakes_are_one_line(arguments, words, folder, capsys):
    before = {path.name for path in folder.iterdir()}
    status, told, errors = run(capsys, *(argument.replace("{}", str(folder)) for argument in arguments))
    assert status == 1 and told == "" and errors.count("\n") == 1
    assert errors.startswith(f"error: {words.replace('{}', str(folder))}")
    assert {path.name for path in folder.iterdir()} == before


def test_folders_that_cannot_be_done(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(capsys, "blur", tmp_path / "empty", tmp_path / "out")[2].startswith(
        f"error: {tmp_path}/empty holds no pictures (.jpg, "
    )
    (folder / "a.jpg").write_bytes((folder / "a.png").read_bytes())
    assert run(capsys, "blur", folder, tmp_path / "out")[2] == (
        f"error: {folder}/a.jpg and {folder}/a.png would both become {tmp_path}/out/a.png: rename one of them\n"
    )
    assert not (tmp_path / "out").exists()
