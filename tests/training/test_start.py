"""What a run starts from: which parts, which words, which numbers; without training."""

import dataclasses
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from sd_jax import distributed
from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.load import Checkpoint
from sd_jax.config import training_defaults
from sd_jax.models.presets import TinyVAEConfig
from sd_jax.prompts.tokenize import train_tokenizer
from sd_jax.training import start
from sd_jax.training.methods import method_of
from tests.training import tiny_xl

CAPTIONS = ("a red circle on a plain white background", "a large blue star at the top") * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("tokenizer") / "tokenizer", 560, 24)


@pytest.fixture
def build(monkeypatch, tokenizer, tmp_path):
    """(spec of config.model or None, parts of the checkpoint, its spec, ...) -> the Model that a run begins with."""

    def build(model, loaded_parts, loaded_spec=tiny_xl.BASE, notes=(), **keys):
        config = training_defaults(keys.pop("method", "full"))
        workdir, captions = keys.pop("workdir", tmp_path), keys.pop("captions", lambda: CAPTIONS)
        config.init, config.model = "checkpoint", ConfigDict(model.to_dict() if model else {})
        config.update(keys)

        def open_checkpoint(path, weights, dtype, prediction_type):
            assert (path, weights, dtype) == ("checkpoint", "ema", "float32")
            params = {part: {"leaf": np.zeros(1, np.float32)} for part in loaded_parts}
            return Checkpoint(loaded_spec, params, str(tokenizer.source), "single_file", "raw", notes=notes)

        monkeypatch.setattr(start, "open_checkpoint", open_checkpoint)
        return start.build_model(config, method_of(config), workdir, captions)

    return build


def with_words(spec, tokenizer):
    """`spec` for the tokenizer's vocabulary, as loading makes it; the second encoder keeps its own padding."""
    ids = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id}
    pads = {"text_encoder": tokenizer.pad_token_id, "text_encoder_2": 0}
    texts = {p: dataclasses.replace(c, **ids, pad_token_id=pads[p]) for p, c in spec.text_encoders.items()}
    return dataclasses.replace(spec, **texts)


def test_two_text_encoders_from_nothing_share_the_words_of_the_captions(build):
    model = build(tiny_xl.BASE, ["vae"])
    assert model.trained == ("unet", "text_encoder", "text_encoder_2") and model.frozen == ("vae",)
    assert set(model.loaded) == {"vae"} and model.num_time_ids == 6
    spec, tokenizer = model.networks.spec, model.tokenizer
    for text in spec.text_encoders.values():
        assert (text.vocab_size, text.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_token_id)
    assert model.meta(3)["spec"] == spec.to_dict()


def test_all_parts_of_a_checkpoint_are_taken(build, tokenizer):
    whole = with_words(tiny_xl.BASE, tokenizer)
    model = build(None, whole.parts, whole, diffusion={"train_text_encoder": False})
    assert model.trained == ("unet",) and model.frozen == ("vae", "text_encoder", "text_encoder_2")
    assert set(model.loaded) == set(whole.parts) and model.networks.spec == whole


def test_a_refiner_reads_captions_padded_as_its_encoder_was_trained(build, tokenizer):
    spec = with_words(tiny_xl.REFINER, tokenizer)
    model = build(None, spec.parts, spec)
    assert model.trained == ("unet", "text_encoder_2") and model.num_time_ids == 5
    (plain,), (ids,) = tokenizer(["a red circle"], 24), model.caption_tokenizer()(["a red circle"])
    length = int(np.argmax(plain == tokenizer.eos_token_id)) + 1
    assert tokenizer.pad_token_id != 0
    np.testing.assert_array_equal(ids, np.append(plain[:length], np.zeros(24 - length, np.int32)))


def test_captions_have_the_chunks_of_the_config(build, tokenizer):
    spec = with_words(tiny_xl.BASE, tokenizer)
    model = build(None, spec.parts, spec, diffusion={"text_chunks": 3})
    caption = "a red circle on a plain white background " * 7
    ids = model.caption_tokenizer()([caption])
    assert ids.shape == (1, 72) and (ids[0, ::24] == tokenizer.bos_token_id).all()
    words = ids[(ids != tokenizer.bos_token_id) & (ids != tokenizer.eos_token_id)]
    assert words.tolist() == tokenizer.token_ids(caption)


def test_a_clip_skip_is_kept_with_the_model(build, tokenizer):
    """So that samples and exports read the layer that was trained with; also where `init` was trained with another."""
    spec = with_words(tiny_xl.SD1, tokenizer)
    for model in (spec, None):
        built = build(model, spec.parts, spec, diffusion={"clip_skip": 2}).networks
        assert built.spec.text_encoder.clip_skip == built.text_encoder.config.clip_skip == 2
    assert build(None, spec.parts, spec).networks.spec.text_encoder.clip_skip == 1
    with pytest.raises(ValueError, match="config.diffusion.clip_skip=3"):
        build(None, spec.parts, spec, diffusion={"clip_skip": 3})


def test_one_process_makes_the_tokenizer_and_the_others_read_it(build, monkeypatch, tmp_path):
    first = build(tiny_xl.BASE, ["vae"], workdir=tmp_path / "first")

    def arrive(name):
        """The first process is through when the barrier opens."""
        shutil.copytree(tmp_path / "first" / "tokenizer", tmp_path / "second" / "tokenizer")

    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed, "barrier", arrive)
    second = build(tiny_xl.BASE, ["vae"], workdir=tmp_path / "second", captions=None)
    assert second.networks.spec == first.networks.spec
    np.testing.assert_array_equal(second.caption_tokenizer()(CAPTIONS), first.caption_tokenizer()(CAPTIONS))


def test_an_autoencoder_is_told_nothing(build):
    model = build(tiny_xl.BASE, [], method="autoencoder")
    assert model.parts == ("vae",) and model.num_time_ids == 0 and model.caption_tokenizer() is None


def test_what_was_decided_on_opening_is_logged(build, tokenizer, caplog):
    spec = with_words(tiny_xl.BASE, tokenizer)
    with caplog.at_level("INFO"):
        build(None, spec.parts, spec, notes=("prediction type epsilon: the family's",))
    assert "checkpoint: prediction type epsilon: the family's" in caplog.text


def test_what_does_not_fit_is_refused(build, tokenizer):
    words = with_words(tiny_xl.BASE, tokenizer)
    with pytest.raises(ValueError, match="needs a trained vae"):
        build(tiny_xl.BASE, ["unet"])
    with pytest.raises(ValueError, match="has no text_encoder_2, and config.model is empty"):
        build(None, ["unet", "vae", "text_encoder"], words)
    other = dataclasses.replace(words, text_encoder_2=dataclasses.replace(words.text_encoder_2, projection_dim=8))
    with pytest.raises(CheckpointError, match="text_encoder_2.projection_dim is 8, config.model says 24"):
        build(tiny_xl.BASE, words.parts, other)
    tiny = dataclasses.replace(words, vae=TinyVAEConfig())
    with pytest.raises(CheckpointError, match="its vae is a TinyVAEConfig, config.model says VAEConfig"):
        build(tiny_xl.BASE, ["vae"], tiny)
    inpainting = dataclasses.replace(words, unet=dataclasses.replace(words.unet, in_channels=9))
    with pytest.raises(ValueError, match="latents of 4 channels, and this U-Net reads 9"):
        build(None, words.parts, inpainting)


def test_parts_of_a_checkpoint_may_be_left_behind(build, tokenizer):
    """Pretraining takes the frozen parts of a checkpoint and not its U-Net."""
    whole, frozen = with_words(tiny_xl.BASE, tokenizer), {"train_text_encoder": False}
    chosen = ("vae", "text_encoder", "text_encoder_2")
    model = build(whole, whole.parts, whole, init_parts=chosen, diffusion=frozen)
    assert model.trained == ("unet",) and set(model.loaded) == set(chosen)
    with pytest.raises(ValueError, match="config.init_parts names 'unet', config.init='checkpoint' has vae"):
        build(whole, ["vae"], whole, init_parts=("unet",))
    with pytest.raises(ValueError, match="trained text_encoder, .* has none among config.init_parts: give the path"):
        build(whole, whole.parts, whole, init_parts=("vae",), diffusion=frozen)
