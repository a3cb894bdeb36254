"""Steered pictures: a new ControlNet changes nothing, strengths and steps act as named, nothing compiles twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax import media
from sd_jax.adapters import controlnet, t2i_adapter
from sd_jax.adapters.controlnet import ControlNetConfig
from sd_jax.adapters.t2i_adapter import T2IAdapterConfig
from sd_jax.models.families import SDXL
from sd_jax.models.presets import shrink
from sd_jax.sampling.command import Order, carry_out
from sd_jax.sampling.control import ControlModel, load_control
from sd_jax.sampling.pipeline import Pipeline
from tests.sampling.conftest import ONE_LEVEL, random_params
from tests.sampling.test_adapters import _counted

FEW = {"steps": 4, "width": 16, "height": 16, "guidance_scale": 2.0, "seed": 3}
UNET = dataclasses.replace(ONE_LEVEL.unet, sample_size=64)  # which no file says
CONTROLNET = ControlNetConfig(UNET, (4, 8))
ADAPTER = T2IAdapterConfig("full_adapter", channels=(16,), num_res_blocks=1, downscale_factor=2)
RNG = np.random.default_rng(0)
MAP, OTHER = (RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(2))


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return Pipeline(ONE_LEVEL, random_params(ONE_LEVEL), tokenizer)


def random_of(shapes, seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(spread * rng.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def control():
    return ControlModel(CONTROLNET, random_of(controlnet.shapes_of(CONTROLNET)))


@pytest.fixture(scope="module")
def adapter():
    return ControlModel(ADAPTER, random_of(t2i_adapter.shapes_of(ADAPTER)))


def draw(pipe, control=(), prompt="a red circle", **fields):
    return pipe.text_to_image(prompt, output="latents", control=control, **{**FEW, **fields})


@pytest.fixture(scope="module")
def plain(pipe):
    return draw(pipe)


def test_a_new_controlnet_changes_nothing_to_the_bit(pipe, plain):
    new = controlnet.init(jax.random.key(0), CONTROLNET, pipe.params["unet"])
    np.testing.assert_array_equal(draw(pipe, ControlModel(CONTROLNET, new).hint(MAP)), plain)
    copied = {name: tree for name, tree in new.items() if name in pipe.params["unet"]}
    assert {"conv_in", "time_embedding", "down_blocks_0", "mid_block"} <= copied.keys()
    jax.tree.map(np.testing.assert_array_equal, copied, {name: pipe.params["unet"][name] for name in copied})


def test_its_zeros_have_gradients(pipe):
    new = controlnet.init(jax.random.key(0), CONTROLNET, pipe.params["unet"])
    told = pipe.encode_prompts(["a red circle"])
    latents, t = jnp.ones((1, 8, 8, ONE_LEVEL.vae.latent_channels)), jnp.full(1, 500.0)
    hint = jnp.asarray(MAP[None], jnp.float32) / 255

    def loss(params):
        read = controlnet.HintEmbedding(CONTROLNET).apply({"params": params[controlnet.EMBEDDING]}, hint)
        added = controlnet.ControlNet(UNET).apply({"params": params}, latents, t, told, read)
        answer = pipe.networks.unet.apply({"params": pipe.params["unet"]}, latents, t, told, added)
        return jnp.mean(answer**2)

    found = jax.jit(jax.grad(loss))(new)
    zeros = [name for name in new if name.startswith("controlnet_") and name != controlnet.EMBEDDING]
    assert len(zeros) == CONTROLNET.num_residuals
    for name in zeros:
        assert np.abs(found[name]["kernel"]).max() > 0, name
    # What lies behind the zeros learns from the second step on
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(found["mid_block"]))


def test_strength_and_steps_act_as_named(pipe, control, adapter, plain):
    for each in (control, adapter):
        whole = draw(pipe, each.hint(MAP))
        assert np.abs(whole - plain).max() > 0.05
        np.testing.assert_array_equal(draw(pipe, each.hint(MAP, strength=0.0)), plain)
        weak = draw(pipe, each.hint(MAP, strength=0.5))
        assert 0 < np.abs(weak - plain).mean() < np.abs(whole - plain).mean()
        assert np.abs(draw(pipe, each.hint(OTHER)) - whole).max() > 1e-3

    def walked(**how):
        seen = []
        hint = control.hint(MAP, **how)
        draw(pipe, hint, callback=lambda step, x, denoised: seen.append(np.asarray(denoised)))
        return np.stack(seen)

    none, late, early = walked(strength=0.0), walked(start=0.5), walked(end=0.5)
    np.testing.assert_array_equal(late[:2], none[:2])
    assert np.abs(late[2] - none[2]).max() > 1e-3
    np.testing.assert_array_equal(early[:2], walked()[:2])
    nearly = control.hint(MAP, end=0.49)  # whose second step would end behind it
    assert np.abs(draw(pipe, nearly) - draw(pipe, control.hint(MAP, end=0.5))).max() > 1e-3


def test_guess_mode_leaves_the_negative_prompt_alone(pipe, control, plain):
    told, nothing = pipe.encode_prompts(["a red circle"]), pipe.encode_prompts([""])
    swapped = {"conditioning": nothing, "negative_conditioning": told}
    hint = control.hint(MAP, guess_mode=True)
    assert (
        hint.weights[0] == pytest.approx(0.1) and hint.weights[-1] == 1 and list(hint.weights) == sorted(hint.weights)
    )
    # At guidance 0 the negative prompt alone decides
    swapped |= {"guidance_scale": 0.0}
    np.testing.assert_array_equal(draw(pipe, hint, **swapped), draw(pipe, **swapped))
    assert np.abs(draw(pipe, control.hint(MAP, weights=hint.weights), **swapped) - draw(pipe, **swapped)).max() > 1e-3
    assert np.abs(draw(pipe, hint) - plain).max() > 1e-3


def test_weights_are_of_each_residual(pipe, control, plain):
    none = [0.0] * control.num_weights
    np.testing.assert_array_equal(draw(pipe, control.hint(MAP, weights=none)), plain)
    middle = draw(pipe, control.hint(MAP, weights=[*none[:-1], 1.0]))
    assert np.abs(middle - plain).max() > 1e-3
    assert np.abs(middle - draw(pipe, control.hint(MAP))).max() > 1e-3


def test_several_add_up_in_any_order(pipe, control, adapter):
    hints = [control.hint(MAP, 0.7), adapter.hint(OTHER, 0.6), control.hint(OTHER, 0.3)]
    made = draw(pipe, hints)
    np.testing.assert_allclose(draw(pipe, hints[::-1]), made, atol=1e-4 * np.abs(made).max())
    assert all(np.abs(draw(pipe, hints[:i] + hints[i + 1 :]) - made).max() > 1e-3 for i in range(3))


def test_pictures_and_strengths_compile_nothing(pipe, control):
    draw(pipe, control.hint(MAP))
    other = ControlModel(CONTROLNET, jax.tree.map(lambda leaf: 0.5 * leaf, control.params))
    with _counted() as compiled:
        draw(pipe, control.hint(OTHER, strength=0.4, start=0.25, weights=[0.5] * control.num_weights))
        draw(pipe, other.hint(OTHER, guess_mode=True))
    assert not compiled


def test_a_batch_has_a_hint_each(pipe, control):
    prompts, noise = ["a red circle", "a blue square"], RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
    both = draw(pipe, control.hint(np.stack([MAP, OTHER])), prompts, latents=noise)
    each = [
        draw(pipe, control.hint(hint), prompt, latents=noise[i : i + 1])
        for i, (hint, prompt) in enumerate(zip((MAP, OTHER), prompts, strict=True))
    ]
    np.testing.assert_allclose(both, np.concatenate(each), atol=1e-4 * np.abs(both).max())
    with pytest.raises(ValueError, match="a hint holds 2 pictures, the prompts ask for 3"):
        draw(pipe, control.hint(np.stack([MAP, OTHER])), ["a", "b", "c"])


def test_every_job_is_steered(pipe, control):
    picture = RNG.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 2:10] = 255
    small = {"steps": 4, "guidance_scale": 2.0}
    jobs = {
        "image_to_image": {"image": picture, "strength": 0.5},
        "inpaint": {"image": picture, "mask": mask},
        "hires_fix": {"width": 8, "height": 8, "scale": 2.0},
    }
    for job, inputs in jobs.items():
        steered, free = (
            getattr(pipe, job)("a red circle", control=hints, **inputs, **small) for hints in (control.hint(MAP), ())
        )
        assert (steered != free).any(), job
    masked = {"image": picture, "mask": mask, "only_masked": True, "padding": 0, "width": 16, "height": 16, **small}
    made = pipe.inpaint("a red circle", control=control.hint(MAP), **masked)
    outside = MAP.copy()
    outside[12:] = 0  # of which the part that is worked on shows nothing
    np.testing.assert_array_equal(pipe.inpaint("a red circle", control=control.hint(outside), **masked), made)
    outside[4:8] = 0
    assert (pipe.inpaint("a red circle", control=control.hint(outside), **masked) != made).any()


def test_a_large_canvas_is_steered_tile_by_tile(pipe, control):
    hint = control.hint(np.tile(MAP, (2, 2, 1)))
    large = {"width": 32, "height": 32, "tile": 16}
    tiled = draw(pipe, hint, **large)
    assert np.abs(tiled - draw(pipe, **large)).max() > 0.01
    changed = np.tile(MAP, (2, 2, 1))
    changed[24:, 24:] = 0
    other = draw(pipe, control.hint(changed), **large, callback=None, steps=1)
    first = draw(pipe, hint, **large, steps=1)
    np.testing.assert_array_equal(other[:, :4, :4], first[:, :4, :4])  # no tile of this corner sees that one
    assert np.abs(other[:, -2:, -2:] - first[:, -2:, -2:]).max() > 1e-4


def test_a_masked_hint_is_minus_one_there(pipe, control):
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    made = draw(pipe, control.hint(MAP, mask=mask))
    hidden = MAP.copy()
    hidden[:8] = 7
    np.testing.assert_array_equal(draw(pipe, control.hint(hidden, mask=mask)), made)
    hidden[:8] = 0
    assert np.abs(draw(pipe, control.hint(hidden)) - made).max() > 1e-3


@pytest.mark.parametrize("format", ["diffusers", "single_file"])
def test_saved_and_loaded_it_is_the_same(pipe, control, adapter, tmp_path, format):
    for name, each in (("control", control), ("adapter", adapter)):
        path = tmp_path / (name if format == "diffusers" else f"{name}.safetensors")
        each.save(path, format)
        again = load_control(path)
        assert again.config == each.config
        np.testing.assert_array_equal(draw(pipe, again.hint(MAP)), draw(pipe, each.hint(MAP)))


def test_what_does_not_fit_is_told(pipe, control, adapter):
    xl = shrink(SDXL).unet
    other = ControlModel(ControlNetConfig(xl, (4, 8)), random_of(controlnet.shapes_of(ControlNetConfig(xl, (4, 8)))))
    with _counted() as compiled:
        with pytest.raises(ValueError, match="the control is for another family of models: its block_out_channels is"):
            draw(pipe, other.hint(MAP))
        with pytest.raises(ValueError, match=r"start=0\.5, end=0\.5: shares of the steps"):
            control.hint(MAP, start=0.5, end=0.5)
        with pytest.raises(ValueError, match="strength=nan: give a finite number"):
            control.hint(MAP, strength=float("nan"))
        with pytest.raises(ValueError, match=r"weights=\(1\.0,\): this control has"):
            control.hint(MAP, weights=[1.0])
        with pytest.raises(ValueError, match="mask= is for inpainting ControlNets"):
            adapter.hint(MAP, mask=np.ones((16, 16), bool))
        with pytest.raises(ValueError, match="control= takes what"):
            draw(pipe, [MAP])
        with pytest.raises(ValueError, match="a T2I-Adapter sees the picture as a whole: leave tile= out"):
            draw(pipe, adapter.hint(MAP), width=32, height=32, tile=16)
    assert not compiled


def test_a_command_follows_a_map_and_its_picture_is_made_again(pipe, control, tmp_path):
    pipe.save(tmp_path / "model", format="native")
    control.save(tmp_path / "net")
    media.write_png(tmp_path / "map.png", MAP, {})
    told = f"{tmp_path / 'net'}:{tmp_path / 'map.png'}:0.8:0:0.75"
    fields = {"prompt": "a red circle", "steps": 4, "width": 16, "height": 16}
    made = list(carry_out(Order(fields, {"checkpoint": str(tmp_path / "model")}, control=[told], out=tmp_path / "a")))
    wanted = pipe.text_to_image(**fields, control=control.hint(MAP, 0.8, 0.0, 0.75))
    np.testing.assert_array_equal(media.decode_image(made[0]), wanted[0])
    text = media.read_text(made[0])["parameters"]
    assert 'ControlNet 0: "Module: none, Model: net, Weight: 0.8, Guidance Start: 0.0, Guidance End: 0.75"' in text
    again = list(carry_out(Order(recipe=str(made[0]), out=tmp_path / "b")))
    np.testing.assert_array_equal(media.decode_image(again[0]), wanted[0])
    media.write_png(tmp_path / "map.png", OTHER, {})
    with pytest.raises(ValueError, match=r"map\.png is no longer what .* give that as --control="):
        list(carry_out(Order(recipe=str(made[0]), out=tmp_path / "c")))
    for wrong in ("net", f"net:{tmp_path / 'map.png'}:much", f"net:{tmp_path / 'map.png'}:1:0"):
        with pytest.raises(ValueError, match=f"--control={wrong}: give PATH:IMAGE:STRENGTH"):
            list(carry_out(Order(fields, control=[wrong], out=tmp_path / "d")))


def test_a_control_may_be_of_another_dtype_than_the_model(pipe, control, adapter):
    half = Pipeline(pipe.spec, pipe.params, pipe.tokenizer, "bfloat16")
    hints = [control.hint(MAP), adapter.hint(MAP)]
    made, wanted = draw(half, hints, steps=1), draw(pipe, hints, steps=1)
    assert np.isfinite(made).all() and np.abs(made - wanted).mean() < 0.2 * np.abs(wanted - draw(pipe, steps=1)).mean()
