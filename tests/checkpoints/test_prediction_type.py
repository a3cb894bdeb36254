"""Who says what a U-Net predicts, in which order; and what a .yaml says."""

import dataclasses

import numpy as np
import pytest

from sd_jax.checkpoints import CheckpointError, ldm_yaml, prediction_type
from sd_jax.checkpoints.tensors import lazy
from tests.checkpoints.reduced import REDUCED

PROBE = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
MARKS = {"v_pred": lazy(np.zeros(0, np.float32))}
ZERO = {"ztsnr": lazy(np.zeros(0, np.float32))}


def spread(deviation, dtype=np.float32):
    return {PROBE: lazy(np.array([-deviation, deviation] * 8, dtype))}


def decided(name="sd1", file=None, unet=None, metadata=None, said=None):
    spec = REDUCED[name]
    kind = {"sd1": "sd1", "sdxl": "sdxl"}.get(name, "sd2")
    schedule, reason = prediction_type.decide(spec, file or {}, unet, kind, metadata or {}, said)
    return schedule.prediction_type, schedule.rescale_betas_zero_snr, reason


def test_order():
    """Each source is believed before those that follow it."""
    said = ldm_yaml.Said(prediction_type="v_prediction", prediction_reason="parameterization=v in a.yaml")
    header = {"modelspec.prediction_type": "epsilon", "global_step": "1"}
    sources = [
        ({"said": said}, "v_prediction", "said by parameterization=v in a.yaml"),
        ({"metadata": header}, "epsilon", "said by modelspec.prediction_type in the header"),
        ({"file": MARKS}, "v_prediction", "said by the tensor v_pred"),
        ({"metadata": {"global_step": "875000"}}, "epsilon", "its global step is 875000, Stable Diffusion 2 base's"),
        ({"unet": spread(0.1)}, "v_prediction", f"guessed: {PROBE} deviates by 0.100, v above 0.09"),
        ({}, "epsilon", "nothing says otherwise"),
    ]
    for i, (_, found, reason) in enumerate(sources):
        given = {}
        for arguments, _, _ in reversed(sources[i:]):
            given |= arguments
        assert decided("sd2", **given) == (found, False, reason)


@pytest.mark.parametrize(("said", "meant"), [("v", "v_prediction"), ("V", "v_prediction"), ("eps", "epsilon")])
def test_words_of_the_header(said, meant):
    assert decided(metadata={"modelspec.prediction_type": said})[0] == meant
    assert decided(file=MARKS, metadata={"modelspec.prediction_type": "unheard of"})[0] == "v_prediction"


def test_zero_terminal_snr():
    assert decided("sdxl", file={**MARKS, **ZERO})[:2] == ("v_prediction", True)
    assert decided("sdxl", file=ZERO) == ("v_prediction", True, "said by the tensor ztsnr")
    assert decided("sdxl", file=ZERO, metadata={"modelspec.prediction_type": "v"})[1]


def test_guesses_of_sd2():
    for dtype in (np.float32, np.float16):
        assert decided("sd2", unet=spread(0.1, dtype))[0] == "v_prediction"
        assert decided("sd2", unet=spread(0.08, dtype))[0] == "epsilon"
    step = {"global_step": lazy(np.array(875000))}
    assert decided("sd2", file=step, unet=spread(0.1))[0] == "epsilon"
    step = {"global_step": lazy(np.array(220000))}
    assert decided("sd2", file=step, unet=spread(0.1))[0] == "v_prediction"
    # Depth's is epsilon, and only SD 2 is guessed at
    assert decided("sd2_depth", unet=spread(0.1)) == (
        "epsilon",
        False,
        "as all of SD 2 but its plain model for text to image",
    )
    assert decided("sd1", unet=spread(0.1))[0] == decided("sdxl", unet=spread(0.1))[0] == "epsilon"
    assert decided("upscaler") == ("v_prediction", False, "the x4 upscaler's")


def test_the_argument():
    assert prediction_type.checked(None) is None
    assert prediction_type.checked("v") == prediction_type.checked("v_prediction") == "v_prediction"
    with pytest.raises(ValueError, match="prediction_type='x' is not one of epsilon, v_prediction"):
        prediction_type.checked("x")
    spec = REDUCED["sd1"]
    assert prediction_type.overridden(spec, None, "why") == (spec, "why")
    changed, reason = prediction_type.overridden(spec, "v_prediction", "why")
    schedule = dataclasses.replace(spec.noise_schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert changed.noise_schedule.prediction_type == "v_prediction" and reason == "said by prediction_type="
    assert prediction_type.note(schedule, "why") == "prediction type v_prediction, zero terminal SNR: why"


# The .yaml

LDM = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    {parameterization}
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    scale_factor: 0.18215
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {{num_head_channels: 64, use_fp16: True}}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params: {{freeze: True, layer: "penultimate"}}
"""
SGM = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.13025
    denoiser_config:
      params:
        {scaling}
    network_config:
      params: {{num_head_channels: -1, num_heads: 5}}
"""


def written(path, text):
    path.write_text(text)
    return ldm_yaml.read(path)


def test_what_the_yaml_of_ldm_says(tmp_path):
    path = tmp_path / "a.yaml"
    said = written(path, LDM.format(parameterization='parameterization: "v"'))
    assert (said.prediction_type, said.prediction_reason) == ("v_prediction", f"parameterization=v in {path}")
    assert (said.head_channels, said.heads, said.penultimate, said.scale_factor) == (64, None, True, 0.18215)
    assert said.schedule == {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    said = written(path, LDM.format(parameterization=""))
    assert (said.prediction_type, said.prediction_reason) == (
        "epsilon",
        f"no parameterization in {path}, so LDM's default",
    )
    with pytest.raises(CheckpointError, match="parameterization='y' is not supported"):
        written(path, LDM.format(parameterization="parameterization: y"))


@pytest.mark.parametrize(
    ("scaling", "found"),
    [
        ("scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}", "v_prediction"),
        ("scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling}", "epsilon"),
        ("num_idx: 1000", None),
    ],
)
def test_what_the_yaml_of_sgm_says(tmp_path, scaling, found):
    said = written(tmp_path / "a.yaml", SGM.format(scaling=scaling))
    assert (said.prediction_type, said.heads, said.head_channels) == (found, 5, None)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['false']", "not YAML"),
        ("just words", "no model.params"),
        ("", "no model.params"),
        ("model: {params: {timesteps: many}}", "not the .yaml of a model"),
        ("model: {params: {denoiser_config: {params: {scaling_config: {target: x.EDMScaling}}}}}", "EDMScaling is not"),
        ("model: 1 #" + "x" * 1_000_000, "too many for a model's"),
    ],
)
def test_yamls_that_are_none(tmp_path, text, fault):
    with pytest.raises(CheckpointError, match=fault) as error:
        written(tmp_path / "a.yaml", text)
    assert str(error.value).startswith(f"{tmp_path}/a.yaml: ") and "\n" not in str(error.value)


def test_beside_a_checkpoint(tmp_path):
    assert ldm_yaml.beside(tmp_path / "model.ckpt") is None
    (tmp_path / "model.yaml").write_text("")
    assert ldm_yaml.beside(tmp_path / "model.ckpt") == tmp_path / "model.yaml"
    assert ldm_yaml.beside(tmp_path / "other.ckpt") is None
