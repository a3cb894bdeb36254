"""Methods that learn to steer a model: what they train, what a run leaves, and what cannot be."""

import functools

import jax
import numpy as np
import pytest

from sd_jax.models.families import SDXL
from sd_jax.models.presets import TINY_SHAPES, shrink
from sd_jax.sampling.control import load_control
from sd_jax.sampling.pipeline import load
from sd_jax.training import setup, start
from sd_jax.training.control import config_of as made_of
from sd_jax.training.loop import train
from sd_jax.training.methods import method_of
from sd_jax.training.metrics import read_rows
from tests.sampling.conftest import ONE_LEVEL
from tests.training.test_adapting import base, config_of  # noqa: F401 - a fixture

MAP = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
RECIPE = {"prompt": "a red circle", "steps": 2, "width": 16, "height": 16, "output": "latents", "guidance_scale": 1.0}


def steering(method, base, steps=3):  # noqa: F811
    config = config_of(method, base, steps).unlock()
    config.control.hint_key, config.diffusion.caption_dropout = "segment", 0.0
    return config


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):  # noqa: F811
    """The workdir of two steps of a ControlNet."""
    config = steering("controlnet", base, 2)
    config.sample_steps, config.data.held_out, config.samples.steps = 2, 4, 1
    train(config, tmp_path_factory.mktemp("controlnet") / "run")
    return tmp_path_factory.getbasetemp() / "controlnet0" / "run"


def test_a_run_leaves_a_control(run, base):  # noqa: F811
    pipe, control = load(base), load_control(run)
    assert control.is_controlnet
    steered, free = (pipe.text_to_image(**RECIPE, control=hints) for hints in (control.hint(MAP), ()))
    assert np.abs(steered - free).max() > 1e-4
    assert all(np.isfinite(row["loss"]) for row in read_rows(run))


def test_what_is_drawn_meanwhile_shows_hints(run):
    from PIL import Image

    (sheet,) = (run / "samples").iterdir()
    with Image.open(sheet) as opened:
        assert opened.size[1] > 3 * 16  # hints, pictures, and what they are of


@pytest.mark.parametrize("method", ["controlnet", "t2i_adapter"])
def test_what_is_trained_stands_beside_the_model(base, tmp_path, method):  # noqa: F811
    config = steering(method, base)
    row = method_of(config)
    model = start.build_model(config, row, tmp_path, captions=None)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.loaded)
    make_state = functools.partial(setup.initial_state, config, row, model.networks)
    state = jax.eval_shape(make_state, shapes)
    assert state.params.keys() == {"adapter"} and {"unet", "vae"} <= state.frozen.keys()
    batch = setup.batch_shapes(config, row, model.networks, (16, 16))
    assert batch["hint"].shape == (4, 16, 16, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.cache_latents": True}, "config.data.cache_latents: hints are cut as pixels are"),
        ({"prior.path": "others"}, "config.prior: those pictures have no hints"),
        ({"control.format": "kohya"}, "config.control.format='kohya': use diffusers or single_file"),
        ({"data.resolution": 17}, "config.data.resolution=17: give a multiple of 2"),
    ],
)
def test_what_cannot_be_is_refused(base, change, message):  # noqa: F811
    config = steering("controlnet", base)
    for key, value in change.items():
        part, name = key.split(".")
        config[part][name] = value
    with pytest.raises(ValueError, match=message):
        method_of(config).check(config, ONE_LEVEL)


def test_adapters_are_of_the_kind_that_the_u_net_takes(base):  # noqa: F811
    config = steering("t2i_adapter", base)
    assert made_of(config, TINY_SHAPES).adapter_type == "full_adapter" and made_of(config, TINY_SHAPES).channels == (
        16,
        32,
    )
    found = made_of(config, shrink(SDXL))
    assert found.adapter_type == "full_adapter_xl" and found.downscale_factor == 2 * shrink(SDXL).vae.downscale
    config.control.light = True
    with pytest.raises(ValueError, match="config.control.light=True: no T2I-Adapter of this kind fits a U-Net"):
        made_of(config, TINY_SHAPES)
