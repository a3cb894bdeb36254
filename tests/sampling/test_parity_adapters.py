"""Pictures with LoRAs on, against diffusers and peft: files that either wrote, several strengths, and two at once."""

import warnings

import numpy as np
import pytest

import sd_jax
from sd_jax.checkpoints.adapters import open_adapter, save_adapter
from tests.reference_families import saved_family

pytestmark = pytest.mark.parity
PROMPT, SIDE, STEPS = "a photo of the sea", 32, 4
# As kohya's trainer has them: of a text encoder's attention all four, or diffusers leaves them out of kohya's files
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1"],
    "text_encoder": [*ATTENTION, "fc1", "fc2"],
}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def both(request, tmp_path_factory, one_thread):
    """(diffusers' pipeline, ours, two files that peft wrote of different ranks and alphas)"""
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder, pipeline = saved_family(request.param)
    files = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (rank, alpha) in enumerate([(4, 2.0), (2, 6.0)]):
            generator, states, told = torch.Generator().manual_seed(number), {}, {}
            parts = ("unet", "text_encoder", "text_encoder_2")[: 3 if request.param == "sdxl" else 2]
            for part in parts:
                network = getattr(pipeline, part)
                config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[part.removesuffix("_2")])
                network.add_adapter(config, "made")
                for name, parameter in network.named_parameters():
                    if "lora_" in name:
                        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
                states[part] = get_peft_model_state_dict(network, adapter_name="made")
                told[part] = network.peft_config["made"]
                network.delete_adapters("made") if part == "unet" else network.delete_adapter("made")
            named = {"unet": "unet_lora_layers", "text_encoder": "text_encoder_lora_layers"}
            named["text_encoder_2"] = "text_encoder_2_lora_layers"
            out = tmp_path_factory.mktemp("lora")
            layers = {named[part]: state for part, state in states.items()}
            metadata = {f"{part}_lora_adapter_metadata": config.to_dict() for part, config in told.items()}
            type(pipeline).save_lora_weights(out, **layers, **metadata)
            files.append(out / "pytorch_lora_weights.safetensors")
    return pipeline, sd_jax.load(folder), files


def theirs(pipeline, files, strengths, noise):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"number{i}" for i in range(len(files))]
        for name, file in zip(names, files, strict=True):
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        if names:
            pipeline.set_adapters(names, list(strengths))
        latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
        kwargs = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": 3.0}
        picture = pipeline(PROMPT, latents=latents, output_type="np", **kwargs).images
        if names:
            pipeline.unload_lora_weights()
    return picture * 255


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)


def ours(pipe, noise):
    recipe = {"sampler": "ddim", "schedule": "leading", "steps": STEPS, "guidance_scale": 3.0}
    return pipe.text_to_image(PROMPT, latents=noise, width=SIDE, height=SIDE, **recipe).astype(np.float32)


@pytest.fixture(scope="module")
def ddim(both):
    import diffusers

    pipeline = both[0]
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


@pytest.mark.parametrize("strengths", [(0.3,), (1.0,), (1.7,), (0.6, 1.2)])
def test_pictures_are_those_of_diffusers(both, ddim, noise, strengths):
    _, pipe, files = both
    files = files[: len(strengths)]
    on = pipe
    for file, strength in zip(files, strengths, strict=True):
        on = on.with_adapter(file, strength)
    wanted, plain = theirs(ddim, files, strengths, noise), ours(pipe, noise)
    made = ours(on, noise)
    assert np.abs(made - plain).max() > 8, "the LoRA changes nothing"
    assert np.abs(made - wanted).max() <= 2
    assert np.abs(ours(on.merge_adapters(), noise) - made).max() <= 1


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_files_of_ours_make_the_same_picture_there(both, ddim, noise, tmp_path, format):
    _, pipe, files = both
    opened = open_adapter(files[0], pipe.spec)
    path = tmp_path / "ours.safetensors"
    save_adapter(path, opened.layers, pipe.spec, format=format)
    wanted = theirs(ddim, files[:1], (1.0,), noise)
    assert np.abs(theirs(ddim, [path], (1.0,), noise) - wanted).max() <= 0.01
    assert np.abs(ours(pipe.with_adapter(path), noise) - wanted).max() <= 2
