"""The two files of the first tiny autoencoders -> diffusers' names."""

import pytest

from sd_jax.checkpoints import CheckpointError, keys_taesd, layout
from sd_jax.models.families import TAESD
from tests.checkpoints.tiny import shapes_only

WHOLE = shapes_only(layout.vae(TAESD))


def original(half: str, shift: int) -> dict:
    """As their names stand in taesd_encoder.safetensors and taesd_decoder.safetensors."""
    names = {name: name.removeprefix(f"{half}.layers.").partition(".") for name in WHOLE if name.startswith(half)}
    return {f"{int(number) + shift}.{rest}": WHOLE[name] for name, (number, _, rest) in names.items()}


FILES = {"taesd_encoder.safetensors": original("encoder", 0), "taesd_decoder.safetensors": original("decoder", 1)}


def open_file(path):
    return FILES[path.name]


def test_known_names():
    encoder, decoder = FILES.values()
    assert {"0.weight", "1.conv.4.bias", "2.weight", "14.bias"} <= encoder.keys() and "2.bias" not in encoder
    assert {
        "1.weight",
        "3.conv.0.weight",
        "7.weight",
        "18.conv.0.bias",
        "19.bias",
    } <= decoder.keys() and "0.weight" not in decoder


@pytest.mark.parametrize("name", FILES)
def test_either_file_finds_the_other(tmp_path, name):
    for file in FILES:
        (tmp_path / file).touch()
    found = keys_taesd.whole(tmp_path / name, FILES[name], open_file)
    assert {n: tensor.shape for n, tensor in found.items()} == {n: tensor.shape for n, tensor in WHOLE.items()}


def test_the_other_is_not_there(tmp_path):
    (tmp_path / "taesd_decoder.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"the decoder of a tiny VAE, without its encoder .*taesd_encoder\.saf"):
        keys_taesd.whole(tmp_path / "taesd_decoder.safetensors", FILES["taesd_decoder.safetensors"], open_file)
    (tmp_path / "decoder.pt").touch(), (tmp_path / "encoder.pt").touch()
    with pytest.raises(CheckpointError, match=r"encoder\.pt: not the encoder of a tiny VAE"):
        keys_taesd.whole(tmp_path / "decoder.pt", FILES["taesd_decoder.safetensors"], lambda path: WHOLE)


def test_other_files_stay_as_they_are(tmp_path):
    assert keys_taesd.whole(tmp_path / "a.safetensors", WHOLE, open_file) == WHOLE
    assert keys_taesd.half_of({}) is None
