"""python -m sd_jax.checkpoints.merge A B [C] OUT: the plain formula, to the bit."""

import dataclasses
import json
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, read
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.merge import main, merge
from sd_jax.checkpoints.read_safetensors import write
from tests.checkpoints.tiny import SPEC, SPECS, assert_same, compvis_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
INPAINTING = dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, in_channels=9))
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def written(path, seed, spec=SPEC, dtype="float32", parts=None, **changed) -> dict:
    """A single file, and what is in it."""
    tensors = {name: a.astype(DTYPES[dtype]) for name, a in compvis_file(spec, seed, parts).items()} | changed
    write(path, tensors, {"sd_jax.spec": json.dumps(spec.to_dict())})
    return tensors


def weights(path) -> dict:
    """Without the empty tensors that are marks."""
    return {name: array for name, array in read(path).items() if array.size}


def wide(array) -> np.ndarray:
    return array.astype(np.float32)


@pytest.fixture
def files(tmp_path):
    paths = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    return paths, [written(path, seed) for seed, path in enumerate(paths)], str(tmp_path / "out.safetensors")


# The formulas


@pytest.mark.parametrize("kind", SPECS)
def test_weighted_sum(tmp_path, kind):
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    x, y = written(a, 0, SPECS[kind]), written(b, 1, SPECS[kind])
    merge([a, b], out, alpha=0.3)
    assert_same(weights(out), {name: (1 - 0.3) * x[name] + 0.3 * y[name] for name in x})


def test_add_difference(files):
    paths, (a, b, c), out = files
    merge(paths, out, "add_difference", alpha=0.7)
    assert_same(weights(out), {name: a[name] + 0.7 * (b[name] - c[name]) for name in a})


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        ("float16", "float16", None),
        ("float16", "float32", None),
        ("bfloat16", "float16", None),
        ("float32", "bfloat16", None),
        ("float16", "bfloat16", "float32"),
        ("float32", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "float16"),
    ],
)
def test_rounded_once_to_the_type_of_the_first_or_to_what_is_asked(tmp_path, first, second, dtype):
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    x, y = written(a, 0, dtype=first), written(b, 1, dtype=second)
    merge([a, b], out, alpha=0.3, dtype=dtype)
    formula = {name: (1 - 0.3) * wide(x[name]) + 0.3 * wide(y[name]) for name in x}
    assert_same(weights(out), {name: array.astype(DTYPES[dtype or first]) for name, array in formula.items()})


def test_alpha_of_zero_is_the_first(files):
    paths, (a, _, _), out = files
    merge(paths[:2], out, alpha=0)
    assert_same(weights(out), a)


def test_into_a_folder_and_from_one(tmp_path, files, tokenizer):
    paths, (a, b, _), out = files
    folder = str(tmp_path / "folder")
    merge(paths[:2], folder, alpha=0.5, tokenizer=str(tokenizer))
    merge([folder, paths[0]], out, alpha=1.5)
    half = {name: (1 - 0.5) * a[name] + 0.5 * b[name] for name in a}
    assert_same(weights(out), {name: (1 - 1.5) * half[name] + 1.5 * a[name] for name in a})


def test_memory_is_that_of_a_few_tensors(tmp_path):
    spec = dataclasses.replace(SPEC, unet=dataclasses.replace(SPEC.unet, block_out_channels=(96, 192)))
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    sizes = [array.nbytes for array in written(a, 0, spec).values()]
    written(b, 1, spec)
    tracemalloc.start()
    try:
        merge([a, b], out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * max(sizes) + 4e6 < sum(sizes)


# What is merged


def test_inpainting_keeps_the_channels_that_only_it_has(tmp_path):
    a, b, c, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c", "out"))
    x, y, z = written(a, 0, INPAINTING), written(b, 1), written(c, 2)
    merge([a, b, c], out, "add_difference", alpha=1)
    got = weights(out)
    want = x[CONV_IN][:, :4] + 1 * (y[CONV_IN] - z[CONV_IN])
    assert_same({"4": got[CONV_IN][:, :4], "5": got[CONV_IN][:, 4:]}, {"4": want, "5": x[CONV_IN][:, 4:]})
    rest = x.keys() - {CONV_IN}
    assert_same({name: got[name] for name in rest}, {name: x[name] + 1 * (y[name] - z[name]) for name in rest})
    with pytest.raises(CheckpointError, match="unet.in_channels is 9, not 4: the model that takes more channels comes"):
        merge([b, a], tmp_path / "other.safetensors")


def test_parts_that_only_the_first_has_are_its_own(tmp_path):
    a, b, out, back = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out", "back"))
    x, y = written(a, 0), written(b, 1, parts=("unet",))
    merge([a, b], out)
    half = {name: (1 - 0.5) * x[name] + 0.5 * y[name] for name in y}
    assert_same(weights(out), x | half)
    merge([b, a], back)
    assert_same(weights(back), {name: (1 - 0.5) * y[name] + 0.5 * x[name] for name in y})


def test_a_vae_is_put_in_as_it_is(tmp_path, files):
    paths, (a, b, c), out = files
    merge(paths[:2], out, vae=paths[2])
    for name, array in weights(out).items():
        want = c[name] if name.startswith("first_stage_model.") else (1 - 0.5) * a[name] + 0.5 * b[name]
        np.testing.assert_array_equal(array, want)


def test_whole_numbers_are_those_of_the_first(tmp_path):
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "out"))
    bias = "model.diffusion_model.out.2.bias"
    written(a, 0, **{bias: np.arange(4)})
    written(b, 1)
    merge([a, b], out, dtype="float16")
    assert_same({bias: weights(out)[bias]}, {bias: np.arange(4)})


# What is refused


def test_differences_are_named(tmp_path, files):
    paths, _, out = files
    other = tmp_path / "other.safetensors"
    for changes, said in [
        ({"unet": dataclasses.replace(SPEC.unet, layers_per_block=2)}, "its unet.layers_per_block is 2, not 1"),
        ({"unet": dataclasses.replace(SPEC.unet, num_attention_heads=4)}, "its unet.num_attention_heads is 4, not 2"),
        ({"vae": dataclasses.replace(SPEC.vae, scaling_factor=0.13025)}, "its vae.scaling_factor is 0.13025, not 0.18"),
        (
            {"noise_schedule": dataclasses.replace(SPEC.noise_schedule, prediction_type="v_prediction")},
            "it predicts v_prediction, not epsilon",
        ),
    ]:
        written(other, 3, dataclasses.replace(SPEC, **changes))
        with pytest.raises(CheckpointError) as error:
            merge([paths[0], other], out)
        assert str(error.value).startswith(f"{other} cannot be merged into {paths[0]}: {said}")
    merge([paths[0], other], out, prediction_type="v_prediction")
    assert load_checkpoint(out).spec.noise_schedule.prediction_type == "v_prediction"
    with pytest.raises(CheckpointError, match="cannot be merged"):
        written(other, 3, SPECS["sdxl"])
        merge([paths[0], other], tmp_path / "two.safetensors")


def test_a_damaged_model_is_not_merged(tmp_path, files):
    paths, (a, _, _), out = files
    name = "model.diffusion_model.out.2.bias"
    written(paths[1], 1, **{name: np.full(4, np.nan, np.float32)})
    with pytest.raises(CheckpointError, match="unet/conv_out/bias is not finite once merged"):
        merge(paths[:2], out)
    written(paths[1], 1, **{name: np.full(4, 1e6, np.float32)})
    with pytest.raises(CheckpointError, match="out.safetensors: unet/conv_out/bias has values beyond float16's"):
        merge(paths[:2], out, dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.safetensors" for name in "abc"]


# The command


def test_command(files, capsys):
    paths, (a, b, c), out = files
    assert main([*paths, out, "--method=add_difference", "--alpha=0.25", "--dtype=float16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"add_difference of {', '.join(paths)}, alpha 0.25 -> {out} in ") and said.count("\n") == 1
    assert_same(weights(out), {name: (a[name] + 0.25 * (b[name] - c[name])).astype(np.float16) for name in a})


def test_errors_of_the_command_are_one_line(files, capsys):
    paths, _, out = files
    for arguments, said in [
        ([*paths, out], "weighted_sum takes 2 checkpoints, and 3 are given"),
        ([out], "weighted_sum takes 2 checkpoints, and 0 are given"),
        ([paths[0], "nowhere", out], "nowhere"),
        ([*paths[:2], paths[2]], "already exists"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="method='sum' is not one of weighted_sum, add_difference"):
        merge(paths[:2], out, "sum")


def test_as_a_command(files):
    command = [sys.executable, "-m", "sd_jax.checkpoints.merge", *files[0][:2], files[2]]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.count("\n") == 1 and ended.stderr == ""
