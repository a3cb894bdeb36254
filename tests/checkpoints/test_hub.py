"""Names on the hub: what is taken for one, what is downloaded, and the cache without a network."""

import functools
from pathlib import Path

import pytest

from sd_jax.checkpoints import hub
from sd_jax.checkpoints.load import load_checkpoint
from sd_jax.checkpoints.save import save_checkpoint
from tests.checkpoints.tiny import SPEC, assert_same


@pytest.mark.parametrize("name", ["owner/model", "stabilityai/stable-diffusion-xl-base-1.0", "a/b_c.d"])
def test_names(name):
    assert hub.is_name(name)


@pytest.mark.parametrize("path", ["a", "a/b/c", "./a", "/a/b", "~/a", "../a", "a/", "a/b.safetensors", "a/b.CKPT", ""])
def test_paths_are_no_names(path):
    assert not hub.is_name(path)
    assert str(hub.local(path)) == str(Path(path))


def test_what_is_here_is_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.setattr(hub, "_check_answers", None)
    assert hub.local("owner/model") == Path("owner/model")


def test_cache_without_a_network(tmp_path, monkeypatch, params, tokenizer):
    import huggingface_hub

    repository = tmp_path / "models--owner--model"
    save_checkpoint(repository / "snapshots" / "0123", SPEC, params, tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    download = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load_checkpoint("owner/model").params, params)
    with pytest.raises(FileNotFoundError, match="no such checkpoint: owner/other is neither a path here nor in") as e:
        load_checkpoint("owner/other")
    assert "\n" not in str(e.value) and "hf download owner/other" in str(e.value) and "HF_HUB_OFFLINE" in str(e.value)


def test_what_is_downloaded(monkeypatch):
    asked = {}
    files = [
        "model_index.json",
        "sd_xl_base_1.0.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/flax_model.msgpack",
        "text_encoder_2/model.fp16.safetensors",
    ]
    import huggingface_hub

    monkeypatch.setattr(hub, "_check_answers", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: files)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **arguments: asked.update(arguments, name=name) or "/there"
    )
    assert hub.local("owner/model") == Path("/there") and asked["name"] == "owner/model"
    assert sorted(set(asked["allow_patterns"]) & set(files)) == [
        "model_index.json",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert {"*/config.json", "scheduler/*.json", "tokenizer_2/*"} <= set(asked["allow_patterns"])

    # A network alone
    files[:] = ["config.json", "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors", "README.md"]
    hub.local("owner/vae")
    assert asked["allow_patterns"] == ["config.json", "diffusion_pytorch_model.safetensors"]

    files.remove("config.json")
    with pytest.raises(FileNotFoundError, match="it has neither model_index.json nor a network's config.json"):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", _nothing)
        hub.local("owner/model")


def _nothing(name, **arguments):
    raise OSError("not in the cache")
