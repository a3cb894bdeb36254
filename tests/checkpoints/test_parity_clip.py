"""CLIP in the files of transformers, OpenAI and OpenCLIP: what comes out of our networks is what theirs give."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.checkpoints.clip import load_clip, open_clip, save_clip
from sd_jax.models.clip import CLIP
from sd_jax.models.presets import TINY_CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tests.reference_clip import open_clip as reference_of

pytestmark = pytest.mark.parity

# Heads of 64 channels, as the state dicts of OpenAI have them, and two of them: a wrong order would show
OPENAI = CLIPConfig(
    text_config=CLIPTextConfig(
        vocab_size=60,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=59,
        pad_token_id=59,
    ),
    vision_config=CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    ),
    projection_dim=24,
)


def with_gelu(config, **kwargs):
    towers = {
        name: dataclasses.replace(getattr(config, name), hidden_act="gelu", **more)
        for name, more in (("text_config", {"pad_token_id": 0}), ("vision_config", {}))
    }
    return dataclasses.replace(config, **towers, **kwargs)


def inputs(config):
    rng, text = np.random.default_rng(1), config.text_config
    size = config.vision_config.image_size
    ids = rng.integers(1, text.eos_token_id, (3, text.max_position_embeddings))
    for row, end in enumerate((2, 5, text.max_position_embeddings - 1)):
        ids[row, end], ids[row, end + 1 :] = text.eos_token_id, text.pad_token_id
    return rng.normal(size=(2, size, size, 3)).astype(np.float32), ids


@functools.partial(jax.jit, static_argnums=0)
def run(clip, params, images, ids):
    """-> features of pictures and of texts, logits."""
    features = clip.encode_image(params, images), clip.encode_text(params, ids)
    return *features, clip.similarity(params, *features)


def error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def run_transformers(model, config):
    import torch

    images, ids = inputs(config)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


def run_open_clip(model, config):
    import torch

    images, ids = inputs(config)
    images, ids = torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(ids)
    image, text = model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)
    return image.numpy(), text.numpy(), model.get_logits(images, ids)[0].numpy()


def check(path, reference, config, said=None):
    found, params = load_clip(path, config=said)
    assert found == config
    images, ids = inputs(config)
    states = run(CLIP.of(config), params, jnp.asarray(images), jnp.asarray(ids, jnp.int32))
    errors = [error(*pair) for pair in zip(states, reference, strict=True)]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize(
    ("config", "kind"),
    [(TINY_CLIP, "safetensors"), (TINY_CLIP, "shards"), (with_gelu(TINY_CLIP), "pickle")],
    ids=["safetensors", "shards", "pickle and gelu"],
)
def test_folders_of_transformers(config, kind, tmp_path):
    """Theirs by us, and ours by them."""
    import torch
    import transformers

    text, vision = (dataclasses.asdict(tower) for tower in (config.text_config, config.vision_config))
    torch.manual_seed(0)
    theirs = transformers.CLIPConfig(
        text_config={**text, "bos_token_id": 0}, vision_config=vision, projection_dim=config.projection_dim
    )
    model = transformers.CLIPModel(theirs).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no norm and no bias at its initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference = run_transformers(model, config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB" if kind == "shards" else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file() == (kind == "shards")
    if kind == "pickle":
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    check(tmp_path / "theirs", reference, config)

    opened = open_clip(tmp_path / "theirs")
    save_clip(tmp_path / "ours", opened.config, opened.params)
    back, info = transformers.CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert all(map(np.array_equal, run_transformers(back.eval(), config), reference))
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert processor.crop_size == {"height": 32, "width": 32} and processor.size == {"shortest_edge": 32}


def halved(model):
    """The names of what OpenAI's files have in float16: all but norms and embeddings; rounded, so nothing is lost."""
    state = model.state_dict()
    names = [n for n in state if ".ln_" not in f".{n}" and not n.startswith("ln_") and "embedding" not in n]
    names.remove("logit_scale")
    for name in names:
        state[name].copy_(state[name].half())
    return names


def test_state_dicts_of_openai(tmp_path):
    import torch

    model = reference_of(OPENAI)
    half = halved(model)
    torch.save({n: t.half() if n in half else t for n, t in model.state_dict().items()}, tmp_path / "a.pt")
    check(tmp_path / "a.pt", run_open_clip(model, OPENAI), OPENAI)

    # To the bit, types included, and torch opens what we write
    opened = open_clip(tmp_path / "a.pt")
    save_clip(tmp_path / "b.pt", opened.config, opened.params, "single_file")
    theirs, back = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert back.keys() - theirs.keys() == {"input_resolution", "context_length", "vocab_size"}
    for name, tensor in theirs.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


@pytest.mark.filterwarnings("ignore")  # tracing warns of branches, and of itself
def test_torchscript_archives_of_openai(tmp_path):
    """What openai/CLIP downloads: modules and three numbers in an archive with code, which is not run."""
    import torch

    model = reference_of(OPENAI)
    half, reference = halved(model), run_open_clip(model, OPENAI)
    del model.context_length, model.vocab_size
    for name, number in (("input_resolution", 16), ("context_length", 8), ("vocab_size", 60)):
        model.register_buffer(name, torch.tensor(number))
    images, ids = inputs(OPENAI)
    traced = torch.jit.trace(model, (torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(ids)), check_trace=False)
    for name, parameter in traced.named_parameters():
        if name in half:
            parameter.data = parameter.data.half()
    traced.save(str(tmp_path / "ViT-B-32.pt"))
    check(tmp_path / "ViT-B-32.pt", reference, OPENAI)
    kernel = load_clip(tmp_path / "ViT-B-32.pt", dtype=None)[1]["visual_projection"]["kernel"]
    assert kernel.dtype == jnp.float16


def test_files_of_open_clip(tmp_path):
    """A folder of the hub with its config, and a checkpoint of training over several devices, whose state dict has
    none: it is LAION's kind, and only its normalisation must be said."""
    import torch

    from sd_jax.checkpoints.read_safetensors import write

    config = with_gelu(OPENAI, image_mean=(0.5,) * 3, image_std=(0.25,) * 3)
    model = reference_of(config)
    reference = run_open_clip(model, config)
    text = {"context_length": 8, "vocab_size": 60, "width": 128, "heads": 2, "layers": 2, "mlp_ratio": 0.75}
    vision = {"image_size": 16, "layers": 2, "width": 128, "head_width": 64, "patch_size": 8, "mlp_ratio": 1.25}
    settings = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "open_clip_config.json").write_text(json.dumps(settings))
    torch.save(model.state_dict(), hub / "open_clip_pytorch_model.bin")
    check(hub, reference, config)
    write(hub / "open_clip_model.safetensors", {n: t.numpy() for n, t in model.state_dict().items()})
    (hub / "open_clip_pytorch_model.bin").unlink()
    check(hub, reference, config)

    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "a", "state_dict": state}, tmp_path / "epoch_3.pt")
    check(tmp_path / "epoch_3.pt", reference, with_gelu(OPENAI))
    check(tmp_path / "epoch_3.pt", reference, config, said=config)

    # Ours, by torch
    opened = open_clip(hub)
    save_clip(tmp_path / "ours.pt", opened.config, opened.params, "single_file")
    back = torch.load(tmp_path / "ours.pt", weights_only=True)["state_dict"]
    model.load_state_dict(back, strict=True)
    assert all(map(np.array_equal, run_open_clip(model, config), reference))
