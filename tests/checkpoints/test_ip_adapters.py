"""IP-Adapters as files, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters import ip_adapter
from sd_jax.checkpoints import CheckpointError, ip_adapters, read_safetensors, write_torch
from sd_jax.checkpoints.files import open_any
from sd_jax.models.families import SD15
from sd_jax.models.networks import Networks
from sd_jax.models.presets import TINY

CONFIG = TINY.unet


def of(kind="base", dtype=np.float32):
    """One of random numbers, norms and biases included."""
    unet = jax.eval_shape(lambda: Networks.of(TINY).init("unet", jax.random.key(0)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), unet)
    made, rng = ip_adapter.init(jax.random.key(0), kind, 12, CONFIG, zeros), np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), made)


def names_of(path):
    return {name: np.asarray(tensor) for name, tensor in open_any(path).tensors.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ip_adapter.KINDS)
@pytest.mark.parametrize("suffix", ip_adapters.SUFFIXES)
def test_round_trips(tmp_path, kind, suffix, dtype):
    wanted, file = of(kind, dtype), tmp_path / f"a{suffix}"
    ip_adapters.save(file, wanted, CONFIG)
    found = ip_adapters.load(file, CONFIG)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, wanted)
    first = file.read_bytes()
    ip_adapters.save(file, found, CONFIG, overwrite=True)
    assert file.read_bytes() == first


def test_attentions_are_numbered_down_up_middle(tmp_path):
    wanted = of()
    ip_adapters.save(tmp_path / "a.bin", wanted, CONFIG)
    names = names_of(tmp_path / "a.bin")
    assert {name.split(".")[1] for name in names if name.startswith("ip_adapter.")} == {"1", "3", "5", "7"}
    paths = ("down_blocks_0/attentions_0", "up_blocks_1/attentions_0", "up_blocks_1/attentions_1")
    for number, path in zip((1, 3, 5, 7), (*paths, "mid_block/attentions_0"), strict=True):
        there = wanted.layers[f"{path}/transformer_blocks_0/attn2"]["to_k_ip"]
        np.testing.assert_array_equal(names[f"ip_adapter.{number}.to_k_ip.weight"], there)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda names: names.pop("ip_adapter.7.to_v_ip.weight"),
            r"not an IP-Adapter for this model: ip_adapter\.7.* miss",
        ),
        (lambda names: names.update({"ip_adapter.9.to_v_ip.weight": np.ones(3)}), r"ip_adapter\.9.* is unexpected"),
        (lambda names: names.update({"image_proj.odd": np.ones(3)}), r"image_proj\.odd is unexpected"),
        (lambda names: names.update({"image_proj.proj.bias": np.ones(3)}), r"proj\.bias is \(3,\), not \(128,\)"),
        (lambda names: names.update({"image_proj.norm.bias": np.ones(32, np.int32)}), r"norm\.bias holds int32"),
        (lambda names: names.update({"image_proj.norm.bias": np.full(32, np.nan)}), r"norm\.bias .* not finite"),
        (lambda names: names.pop("image_proj.norm.weight"), r"norm\.weight is missing or damaged: download it again"),
        (lambda names: names.update({"image_proj.proj.0.weight": np.ones(3)}), "a FaceID of the IP-Adapters, which is"),
        (lambda names: names.update({"image_proj.proj.3.weight": np.ones(3)}), "the full-face kind of the IP-Adapters"),
        (lambda names: names.update({"other": np.ones(3)}), "no IP-Adapter, its tensors are "),
    ],
)
def test_what_is_refused(tmp_path, change, said):
    ip_adapters.save(tmp_path / "a.safetensors", of(), CONFIG)
    names = names_of(tmp_path / "a.safetensors")
    change(names)
    read_safetensors.write(tmp_path / "b.safetensors", names)
    with pytest.raises(CheckpointError, match=rf"b\.safetensors: .*{said}"):
        ip_adapters.load(tmp_path / "b.safetensors", CONFIG)


def test_a_plus_one_of_odd_parts(tmp_path):
    ip_adapters.save(tmp_path / "a.safetensors", of("plus"), CONFIG)
    names = names_of(tmp_path / "a.safetensors")
    del names["image_proj.layers.2.0.to_q.weight"]
    names["image_proj.layers.3.1.3.weight"] = np.ones((5, 5), np.float32)
    read_safetensors.write(tmp_path / "b.safetensors", names)
    with pytest.raises(
        CheckpointError, match=r"layers\.2\.0\.to_q\.weight is missing; .*layers\.3\.1\.3\.weight is \("
    ):
        ip_adapters.load(tmp_path / "b.safetensors", CONFIG)


def test_one_of_another_family(tmp_path):
    ip_adapters.save(tmp_path / "a.bin", of(), CONFIG)
    with pytest.raises(CheckpointError, match="text states that are 32 wide, and this model's are 768: take one"):
        ip_adapters.load(tmp_path / "a.bin", SD15.unet)
    with pytest.raises(ValueError, match="text states that are 32 wide"):
        ip_adapters.save(tmp_path / "b.bin", of(), SD15.unet)
    with pytest.raises(ValueError, match=r"IP-Adapters are called \*\.safetensors or \*\.bin"):
        ip_adapters.save(tmp_path / "b.pt", of(), CONFIG)
    with pytest.raises(FileNotFoundError):
        ip_adapters.load(tmp_path / "nothing.bin", CONFIG)
    write_torch.write(tmp_path / "words.pt", {"word": np.ones((1, 32), np.float32)})
    with pytest.raises(CheckpointError, match="no IP-Adapter, its tensors are word"):
        ip_adapters.load(tmp_path / "words.pt", CONFIG)
