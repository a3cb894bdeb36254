"""What diffusers and torch save, in every form that people have: what we open is equal to it, bit for bit."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from sd_jax.checkpoints import inspect, keys_compvis, keys_diffusers
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.read_safetensors import write
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.presets import PARTS
from tests.checkpoints.tiny import assert_same
from tests.reference_families import IN_SINGLE_FILES, saved_family

pytestmark = pytest.mark.parity


def reference(name):
    """(folder, pipeline, {part: {diffusers' name: array}})."""
    folder, pipeline = saved_family(name)
    networks = {part: getattr(pipeline, part, None) for part in PARTS}
    states = {part: network.state_dict() for part, network in networks.items() if network is not None}
    return folder, pipeline, {p: {n: t.numpy() for n, t in state.items()} for p, state in states.items()}


def assert_equal(loaded, theirs, cast=None):
    """Our parameters, by their names, against their state dicts."""
    assert set(loaded.params) == set(theirs)
    for part, tensors in theirs.items():
        config = getattr(loaded.spec, part)
        wanted = keys_diffusers.from_diffusers(part, {n: lazy(t) for n, t in tensors.items()}, config, part)
        wanted = {name: np.asarray(t) if cast is None else np.asarray(t).astype(cast) for name, t in wanted.items()}
        assert_same(loaded.params[part], wanted)


def single_file(theirs, spec):
    """The published layout of such a pipeline's single file, as arrays, without any header."""
    kind, file = keys_compvis.kind_of(spec), {}
    for part, tensors in theirs.items():
        prefix = "text_model." if part.startswith("text_encoder") else ""
        named = {n if n.startswith((prefix, "text_projection")) else prefix + n: lazy(t) for n, t in tensors.items()}
        file |= keys_compvis.from_diffusers(part, named, getattr(spec, part), kind)
    return {name: np.array(tensor) for name, tensor in file.items()}


def torch_tensors(arrays):
    import torch

    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


@pytest.mark.parametrize("name", IN_SINGLE_FILES)
def test_folders_of_every_family(name):
    folder, pipeline, theirs = reference(name)
    loaded = load_checkpoint(folder)
    assert_equal(loaded, theirs)
    schedule = loaded.spec.noise_schedule
    assert schedule.prediction_type == pipeline.scheduler.config.prediction_type
    assert loaded.notes[0].endswith(f"said by {folder}/scheduler/scheduler_config.json")
    for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if part in theirs:
            ids = getattr(pipeline, tokenizer)
            text = getattr(loaded.spec, part)
            assert (text.eos_token_id, text.pad_token_id) == (ids.eos_token_id, ids.pad_token_id)
    assert loaded.spec.force_zeros_for_empty_prompt == pipeline.config.get("force_zeros_for_empty_prompt", False)


@pytest.mark.parametrize("name", IN_SINGLE_FILES)
def test_single_files_of_every_family(tmp_path, name):
    """Without a header: shapes and the family say what the configs of the folder say."""
    folder, _, theirs = reference(name)
    spec = load_checkpoint(folder).spec
    write(tmp_path / "a.safetensors", single_file(theirs, spec))
    given = {"prediction_type": "v"} if name == "sd2_v" else {}
    loaded = load_checkpoint(tmp_path / "a.safetensors", tokenizer=folder / next(iter(_tokenizers(spec))), **given)
    assert_equal(loaded, theirs)
    said = dataclasses.replace(
        loaded.spec,
        unet=dataclasses.replace(loaded.spec.unet, sample_size=spec.unet.sample_size),
        vae=dataclasses.replace(loaded.spec.vae, sample_size=spec.vae.sample_size),
    )
    if name == "sd2_v":  # of which only a mark would tell
        assert spec.noise_schedule.rescale_betas_zero_snr
        said = dataclasses.replace(said, noise_schedule=spec.noise_schedule)
    assert said == spec


def _tokenizers(spec):
    return ["tokenizer"] if spec.text_encoder is not None else ["tokenizer_2"]


@pytest.mark.parametrize(
    ("form", "name"), [("bin", "sdxl"), ("bin_shards", "sd15"), ("shards", "sdxl"), ("fp16", "sd2_v")]
)
def test_forms_of_folders(tmp_path, name, form):
    import torch

    folder, pipeline, theirs = reference(name)
    place, cast = tmp_path / "a", None
    if form in ("fp16", "shards"):
        cast = np.float16 if form == "fp16" else None
        if cast:
            pipeline.to(dtype=torch.float16)
        try:
            save = {"variant": "fp16"} if cast else {"max_shard_size": "200KB"}
            pipeline.save_pretrained(place, **save)
        finally:
            for part, network in ((p, getattr(pipeline, p)) for p in theirs):
                network.to(torch.float32)
                network.load_state_dict(torch_tensors(theirs[part]))
    else:
        shutil.copytree(folder, place)
        for part in theirs:
            stem = "pytorch_model" if part.startswith("text") else "diffusion_pytorch_model"
            for old in (place / part).glob("*.safetensors"):
                old.unlink()
            tensors = torch_tensors(theirs[part])
            if form == "bin":
                torch.save(tensors, place / part / f"{stem}.bin")
                continue
            shards = {n: f"{stem}-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(tensors)}
            for shard in set(shards.values()):
                torch.save({n: t for n, t in tensors.items() if shards[n] == shard}, place / part / shard)
            (place / part / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    if form != "fp16":
        count = {p: len([*(place / p).glob("*.bin"), *(place / p).glob("*.safetensors")]) for p in theirs}
        assert (max(count.values()) > 1) == ("shards" in form), count
    assert_equal(load_checkpoint(place), theirs, cast)


@pytest.mark.parametrize(
    ("name", "legacy"), [("sd15", True), ("sd2_v", False), ("sd_x4_upscaler", False), ("sdxl", False)]
)
def test_pickled_single_files(tmp_path, capsys, name, legacy):
    """As trainers leave them: a state_dict among other things, averages beside the weights, half precision."""
    import torch

    folder, _, theirs = reference(name)
    spec = load_checkpoint(folder).spec
    file = torch_tensors(single_file(theirs, spec))
    prefix = "model.diffusion_model."
    ema = {
        f"model_ema.diffusion_model{n.removeprefix(prefix).replace('.', '')}": t * 2
        for n, t in file.items()
        if n.startswith(prefix)
    }
    path = tmp_path / "model.ckpt"
    checkpoint = {"state_dict": {**file, **ema}, "global_step": 875000, "epoch": 3, "optimizer_states": [{"lr": 0.1}]}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    raw = load_checkpoint(path, weights="raw")
    assert_equal(raw, theirs)
    assert raw.weights == "raw"
    averaged = load_checkpoint(path)
    doubled = {**theirs, "unet": {n: array * 2 for n, array in theirs["unet"].items()}}
    assert_equal(averaged, doubled)
    if name == "sd2_v":
        assert averaged.notes == ("prediction type epsilon: its global step is 875000, Stable Diffusion 2 base's",)

    assert inspect.main([str(path)]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["ema"] == "yes" and said["metadata.global_step"] == "875000"
    assert said["format"].startswith("pickle of torch") and "UNKNOWN" not in said["imports"]

    half = {name: tensor.half() for name, tensor in file.items()}
    torch.save(half, tmp_path / "half.pt")
    assert_equal(load_checkpoint(tmp_path / "half.pt"), theirs, np.float16)


def test_the_text_half_of_a_whole_clip(tmp_path):
    """As text_encoder=: the folder of a CLIPModel, whose projection SD 1 has no use for, and its file alone."""
    import transformers

    folder, pipeline, theirs = reference("sd15")
    text = pipeline.text_encoder.config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4})
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path / "clip")
    state = {n: t.numpy() for n, t in whole.state_dict().items() if n.startswith("text_model.")}
    shutil.copy(tmp_path / "clip" / "model.safetensors", tmp_path / "alone.safetensors")
    for given in (tmp_path / "clip", tmp_path / "clip" / "model.safetensors", tmp_path / "alone.safetensors"):
        loaded = load_checkpoint(folder, text_encoder=given)
        assert loaded.spec.text_encoder == load_checkpoint(folder).spec.text_encoder
        assert_equal(loaded, {**theirs, "text_encoder": state})


def test_tiny_vae(tmp_path):
    """AutoencoderTiny's folder, and its file alone, as vae=."""
    from tests.reference import diffusers

    vae = diffusers().AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(2, 1, 1),
    )
    vae.save_pretrained(tmp_path / "taesd")
    folder, _, theirs = reference("sd15")
    state = {name: tensor.numpy() for name, tensor in vae.state_dict().items()}
    file = tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file, alone)
    for given in (tmp_path / "taesd", file, alone):
        loaded = load_checkpoint(folder, vae=given)
        assert_equal(loaded, {**theirs, "vae": state})
        assert loaded.spec.vae.num_encoder_blocks == (1, 2, 1) and loaded.spec.vae.scaling_factor == 1.0
