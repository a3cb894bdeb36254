"""Pictures with IP-Adapters on, against diffusers: both kinds, from files as h94/IP-Adapter has them, two at once."""

import warnings

import numpy as np
import pytest
from PIL import Image

import sd_jax
from sd_jax.adapters.ip_adapter import layers_of
from sd_jax.checkpoints import ip_adapters
from tests.reference_families import saved_family
from tests.sampling.test_parity_control import randomised

pytestmark = pytest.mark.parity
PROMPT, SIDE, STEPS = "a photo of the sea", 32, 4
FEATURES, STATES, INNER = 24, 48, 128  # of the tower, and of the resampler
KINDS = {"base": ["base.bin"], "plus": ["plus.safetensors"], "both": ["base.bin", "plus.safetensors"]}


def write_encoder(folder):
    """A vision tower alone, as transformers writes it."""
    import torch
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=STATES,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
        projection_dim=FEATURES,
    )
    tower, generator = transformers.CLIPVisionModelWithProjection(config), torch.Generator().manual_seed(1)
    for name, parameter in tower.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    tower.eval().save_pretrained(folder)


def random_file(kind, unet, seed):
    """{"image_proj": ..., "ip_adapter": ...} by the names of the reference's networks."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.3 * torch.randn(shape, generator=generator)  # noqa: E731
    width = unet.cross_attention_dim
    norm = lambda name, size: {f"{name}.weight": 1 + draw(size), f"{name}.bias": draw(size)}  # noqa: E731
    linear = lambda name, out, size: {f"{name}.weight": draw(out, size), f"{name}.bias": draw(out)}  # noqa: E731
    if kind == "base":
        projection = linear("proj", 4 * width, FEATURES) | norm("norm", width)
    else:
        projection = {"latents": draw(1, 16, INNER)} | linear("proj_in", INNER, STATES)
        projection |= linear("proj_out", width, INNER) | norm("norm_out", width)
        for i in range(4):
            projection |= norm(f"layers.{i}.0.norm1", INNER) | norm(f"layers.{i}.0.norm2", INNER)
            projection[f"layers.{i}.0.to_q.weight"] = draw(INNER, INNER)
            projection[f"layers.{i}.0.to_kv.weight"] = draw(2 * INNER, INNER)
            projection[f"layers.{i}.0.to_out.weight"] = draw(INNER, INNER)
            projection |= norm(f"layers.{i}.1.0", INNER)
            projection[f"layers.{i}.1.1.weight"] = draw(4 * INNER, INNER)
            projection[f"layers.{i}.1.3.weight"] = draw(INNER, 4 * INNER)
    layers = {}
    for number, out in enumerate(layers_of(unet).values()):
        layers |= {f"{2 * number + 1}.to_{which}_ip.weight": draw(out, width) for which in "kv"}
    return {"image_proj": projection, "ip_adapter": layers}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def both(request, tmp_path_factory, one_thread):
    """(diffusers' pipeline, ours, the folder of the files, two pictures of sizes that are no square)"""
    import diffusers
    import safetensors.torch
    import torch

    folder, pipeline = saved_family(request.param)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipe, out = sd_jax.load(folder), tmp_path_factory.mktemp("models")
    write_encoder(out / "image_encoder")
    torch.save(random_file("base", pipe.spec.unet, 0), out / "base.bin")
    plus = random_file("plus", pipe.spec.unet, 1)
    flat = {f"{part}.{name}": tensor for part, tensors in plus.items() for name, tensor in tensors.items()}
    safetensors.torch.save_file(flat, out / "plus.safetensors")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for shape in ((40, 57, 3), (61, 45, 3))]
    return pipeline, pipe, out, pictures


def theirs(pipeline, folder, names, scales, shown, noise, scale=3.0, **more):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_ip_adapter(str(folder), subfolder="", weight_name=names)
        pipeline.set_ip_adapter_scale(scales)
        latents = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
        kwargs = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "guidance_scale": scale}
        picture = pipeline(PROMPT, latents=latents, output_type="np", ip_adapter_image=shown, **kwargs, **more).images
        pipeline.unload_ip_adapter()
        pipeline.image_encoder = pipeline.feature_extractor = None
    return picture * 255


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)


def ours(pipe, noise, image_prompt=None, scale=3.0, **more):
    recipe = {"sampler": "ddim", "schedule": "leading", "steps": STEPS, "guidance_scale": scale}
    made = pipe.text_to_image(
        PROMPT, latents=noise, width=SIDE, height=SIDE, image_prompt=image_prompt, output="images", **recipe, **more
    )
    return made.astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "scales"),
    [("base", [0.3]), ("base", [1.0]), ("plus", [0.3]), ("plus", [1.0]), ("both", [0.6, 0.4]), ("both", [1.0, 1.0])],
)
def test_pictures_are_those_of_diffusers(both, noise, kind, scales):
    pipeline, pipe, folder, pictures = both
    shown, on = pictures[: len(scales)], pipe
    for name, scale in zip(KINDS[kind], scales, strict=True):
        on = on.with_adapter(folder / name, scale)
    made = ours(on, noise, shown if kind == "both" else shown[0])
    wanted = theirs(pipeline, folder, KINDS[kind], list(scales), shown, noise)
    assert np.abs(made - ours(pipe, noise)).max() > 8, "the IP-Adapter changes nothing"
    assert np.abs(made - wanted).max() <= 2


def test_several_pictures_at_once(both, noise):
    pipeline, pipe, folder, pictures = both
    made = ours(pipe.with_adapter(folder / "plus.safetensors", 0.7), noise, pictures)
    wanted = theirs(pipeline, folder, ["plus.safetensors"], [0.7], [pictures], noise)
    assert np.abs(made - wanted).max() <= 2


def test_strengths_of_blocks(both, noise):
    pipeline, pipe, folder, pictures = both
    layers = [path for path in layers_of(pipe.spec.unet) if path.startswith("up")]
    (block,) = {path.split("/")[0] for path in layers}
    scales = {"up": {f"block_{block[-1]}": [0.0, 0.9]}}  # and nothing elsewhere
    on = pipe.with_adapter(folder / "base.bin", 1.0, blocks={f"{block}/attentions_1/": 0.9, "": 0.0})
    made, wanted = ours(on, noise, pictures[0]), theirs(pipeline, folder, "base.bin", scales, pictures[0], noise)
    assert np.abs(made - wanted).max() <= 2
    assert np.abs(made - ours(pipe, noise)).max() > 2


@pytest.mark.parametrize("name", ["base.bin", "plus.safetensors"])
def test_files_of_ours_make_the_same_picture_there(both, noise, tmp_path, name):
    pipeline, pipe, folder, pictures = both
    other = {"base.bin": "base.safetensors", "plus.safetensors": "plus.bin"}[name]
    adapter = ip_adapters.load(folder / name, pipe.spec.unet)
    ip_adapters.save(folder / other, adapter, pipe.spec.unet, overwrite=True)
    first, second = (theirs(pipeline, folder, file, 1.0, pictures[0], noise) for file in (name, other))
    np.testing.assert_array_equal(first, second)


def test_beside_a_controlnet(both, noise, tmp_path):
    """Which is told the text alone, here as there."""
    import diffusers

    pipeline, pipe, folder, pictures = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = diffusers.ControlNetModel.from_unet(
            pipeline.unet, conditioning_embedding_out_channels=(8, 16, 16), load_weights_from_unet=False
        )
        randomised(net, 1).save_pretrained(tmp_path)
        xl, extra = ("XL", {}) if "XL" in type(pipeline).__name__ else ("", {"requires_safety_checker": False})
        steered = getattr(diffusers, f"StableDiffusion{xl}ControlNetPipeline")(
            **pipeline.components, controlnet=net, **extra
        )
    steered.set_progress_bar_config(disable=True)
    drawn = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    wanted = theirs(steered, folder, "base.bin", 1.0, pictures[0], noise, image=Image.fromarray(drawn))
    on, hint = pipe.with_adapter(folder / "base.bin"), sd_jax.load_control(tmp_path).hint(drawn)
    made = ours(on, noise, pictures[0], control=[hint])
    for less in (ours(on, noise, pictures[0]), ours(pipe, noise, control=[hint])):
        assert np.abs(made - less).max() > 8
    assert np.abs(made - wanted).max() <= 2
