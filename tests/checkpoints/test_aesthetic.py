"""LAION's aesthetic predictors as files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, aesthetic, files, read_safetensors
from sd_jax.models.aesthetic import KINDS, NUMBERS, WIDTHS, AestheticHead
from sd_jax.models.presets import AestheticConfig

WIDTH = 12


def layout(kind: str) -> dict[str, np.ndarray]:
    """As LAION's files have them."""
    rng = np.random.default_rng(KINDS.index(kind))
    if kind == "linear":
        shapes = {"weight": (1, WIDTH), "bias": (1,)}
    else:
        inner = (WIDTH, *WIDTHS)
        shapes = {f"layers.{n}.weight": (inner[i + 1], inner[i]) for i, n in enumerate(NUMBERS[kind])}
        shapes |= {f"layers.{n}.bias": (inner[i + 1],) for i, n in enumerate(NUMBERS[kind])}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def saved(tmp_path, tensors):
    read_safetensors.write(tmp_path / "head.safetensors", tensors)
    return tmp_path / "head.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_to_the_bit(tmp_path, kind):
    theirs = layout(kind)
    config, params = aesthetic.load(saved(tmp_path, theirs))
    assert config == AestheticConfig(kind, WIDTH)
    made = jax.eval_shape(AestheticHead(config).init, jax.random.key(0), jnp.zeros((1, WIDTH)))
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
    aesthetic.save(tmp_path / "again.safetensors", config, params)
    again = files.read(tmp_path / "again.safetensors")
    assert again.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(FileExistsError):
        aesthetic.save(tmp_path / "again.safetensors", config, params)


@pytest.mark.parametrize("kind", KINDS)
def test_strict(tmp_path, kind):
    theirs = layout(kind)
    bias = "bias" if kind == "linear" else f"layers.{NUMBERS[kind][1]}.bias"
    with pytest.raises(CheckpointError, match=f"{bias} is missing"):
        aesthetic.load(saved(tmp_path, {name: array for name, array in theirs.items() if name != bias}))
    with pytest.raises(CheckpointError, match=r"head\.safetensors.* extra is unexpected"):
        aesthetic.load(saved(tmp_path, theirs | {"extra": theirs[bias]}))
    with pytest.raises(CheckpointError, match=rf"{bias} is \(3,\), not"):
        aesthetic.load(saved(tmp_path, theirs | {bias: np.zeros(3, np.float32)}))


def test_other_files(tmp_path):
    with pytest.raises(CheckpointError, match="no aesthetic predictor of LAION's, its tensors are unet.weight"):
        aesthetic.load(saved(tmp_path, {"unet.weight": np.zeros((3, 3), np.float32)}))
    config, params = aesthetic.load(saved(tmp_path, layout("mlp")))
    with pytest.raises(CheckpointError, match="not the 'linear' head of width 12"):
        aesthetic.save(tmp_path / "new.safetensors", AestheticConfig("linear", WIDTH), params)
    assert not (tmp_path / "new.safetensors").exists()
