"""What says how a CLIP is built: transformers' config.json, OpenCLIP's open_clip_config.json, or the shapes of a file.

Strict, as `config_json`. With the network comes how pictures are normalised for it (preprocessor_config.json,
`preprocess_cfg`); what `data/clip_pixels.py` does not do is an error, not a difference.

A state dict alone tells all but three things. Heads: 64 channels wide, but 80, 88, 104 and 112 in the vision towers of
OpenCLIP's H, g, bigG and e. Activation: quick_gelu where the file is OpenAI's, which shows by three numbers that their
archives carry, or by its types (float16 matrices beside float32 norms); of others gelu, as LAION's have it. That is
wrong of the few with quick_gelu (MetaCLIP's, DFN's, LAION-400M's B/32), which are built alike, so it is logged.
Normalisation of pictures: OpenAI's, which is wrong of the few that were trained with another.
"""

import dataclasses
import math
from collections.abc import Mapping
from logging import getLogger
from typing import Any

from sd_jax.checkpoints import config_json
from sd_jax.checkpoints.config_values import in_order, read_keys
from sd_jax.checkpoints.errors import CheckpointError
from sd_jax.checkpoints.keys_openai_clip import OPENAI_NUMBERS
from sd_jax.checkpoints.tensors import Tensor
from sd_jax.models.clip import INITIAL_LOGIT_SCALE
from sd_jax.models.presets import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

_ACTIVATIONS = ("quick_gelu", "gelu")

logger = getLogger(__name__)

# transformers

_VISION_READ = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# preprocessor_config.json: key -> what is done here
_PIXELS_FIXED = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,  # bicubic
}


def from_transformers(data: Mapping[str, Any], pixels: Mapping[str, Any] | None, where: str) -> CLIPConfig:
    """config.json and, where there is one, preprocessor_config.json. `where` names the folder in messages.

    Old files have `text_config_dict` and `vision_config_dict` besides, which overrule what has no "_dict".
    """
    if data.get("model_type") != "clip":
        raise CheckpointError(
            f"{where}/config.json: model_type={data.get('model_type')!r}, which is no whole CLIP ('clip')"
        )
    towers = {}
    for name in ("text_config", "vision_config"):
        said = data.get(f"{name}_dict") or data.get(name) or {}
        if not isinstance(said, Mapping):
            raise CheckpointError(f"{where}/config.json: {name}={said!r} is damaged")
        towers[name] = said
    file = f"{where}/config.json"
    text = {**towers["text_config"], "model_type": "clip_text_model", "architectures": None}
    vision = read_keys(towers["vision_config"], _VISION_READ, file)
    if towers["vision_config"].get("num_channels", 3) != 3:
        raise CheckpointError(f"{file}: num_channels={towers['vision_config']['num_channels']!r}: only 3 are read")
    config = CLIPConfig(
        text_config=config_json.text_encoder_from_json(text, file),
        vision_config=_sound(CLIPVisionConfig(**vision), file),
        projection_dim=read_keys(data, {"projection_dim": 512}, file)["projection_dim"],
    )
    return config if pixels is None else with_pixels(config, pixels, f"{where}/preprocessor_config.json")


def vision_from_transformers(data: Mapping[str, Any], pixels: Mapping[str, Any] | None, where: str) -> CLIPConfig:
    """The same of a vision tower alone, CLIPVisionModelWithProjection. The text_config is no one's."""
    file = f"{where}/config.json"
    vision = _sound(CLIPVisionConfig(**read_keys(data, _VISION_READ, file)), file)
    projection_dim = read_keys(data, {"projection_dim": 512}, file)["projection_dim"]
    config = CLIPConfig(vision_config=vision, projection_dim=projection_dim)
    return config if pixels is None else with_pixels(config, pixels, f"{where}/preprocessor_config.json")


def with_pixels(config: CLIPConfig, data: Mapping[str, Any], file: str) -> CLIPConfig:
    """That normalises pictures as a preprocessor_config.json says. Raises CheckpointError for one of another kind."""
    for key, value in _PIXELS_FIXED.items():
        if data.get(key, value) != value:
            raise CheckpointError(f"{file}: {key}={data[key]!r} is not supported: only {value!r} is")
    side = config.vision_config.image_size
    size, crop = data.get("size", side), data.get("crop_size", side)
    if size not in (side, {"shortest_edge": side}) or crop not in (side, {"height": side, "width": side}):
        raise CheckpointError(f"{file}: size={size!r}, crop_size={crop!r}: the network reads {side}x{side}")
    return _normalising(config, data.get("image_mean"), data.get("image_std"), file)


def to_transformers(config: CLIPConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and preprocessor_config.json."""
    text, side = config.text_config, config.vision_config.image_size
    whole = in_order(
        {},
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=config.projection_dim,
        logit_scale_init_value=INITIAL_LOGIT_SCALE,
        initializer_factor=1.0,
        text_config=config_json.text_encoder_to_json(text, text.eos_token_id - 1, dtype),
        vision_config=_vision_config(config),
        torch_dtype=dtype,
        transformers_version=config_json.TRANSFORMERS_VERSION,
    )
    pixels = in_order(
        _PIXELS_FIXED,
        crop_size={"height": side, "width": side},
        do_convert_rgb=True,
        image_mean=list(config.image_mean),
        image_processor_type="CLIPImageProcessor",
        image_std=list(config.image_std),
        rescale_factor=1 / 255,
        size={"shortest_edge": side},
    )
    return whole, pixels


def vision_to_transformers(config: CLIPConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of the vision tower alone."""
    _, pixels = to_transformers(config, dtype)
    version = config_json.TRANSFORMERS_VERSION
    said = {"architectures": ["CLIPVisionModelWithProjection"], "torch_dtype": dtype, "transformers_version": version}
    return in_order(_vision_config(config), **said), pixels


def _vision_config(config: CLIPConfig) -> dict[str, Any]:
    return in_order(
        {key: getattr(config.vision_config, key) for key in _VISION_READ},
        model_type="clip_vision_model",
        num_channels=3,
        attention_dropout=0.0,
        initializer_factor=1.0,
        initializer_range=0.02,
        projection_dim=config.projection_dim,
    )


# OpenCLIP

_OPEN_VISION = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16}
_OPEN_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
# Settings of other networks, at the values that leave ours as they are; and what only tokenizers and training read
_OPEN_INERT = {"pos_embed_type": ("learnable",), "pool_type": ("tok", "argmax"), "proj_type": ("linear",)}
_OPEN_BESIDE = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "patch_dropout", "pad_id", "eos_id")


def from_open_clip(data: Mapping[str, Any], where: str) -> CLIPConfig:
    """open_clip_config.json. Raises CheckpointError on a feature that our CLIP has not."""
    model = data.get("model_cfg")
    towers = [model.get(name) if isinstance(model, Mapping) else None for name in ("vision_cfg", "text_cfg")]
    if not all(isinstance(tower, Mapping) for tower in towers):
        raise CheckpointError(f"{where}: no model_cfg with a vision_cfg and a text_cfg is in it")
    for tower, read in zip(towers, (_OPEN_VISION, _OPEN_TEXT), strict=True):
        for key, value in tower.items():
            inert = key in _OPEN_BESIDE or value in (None, False) or value in _OPEN_INERT.get(key, ())
            if key not in read and not inert:
                raise CheckpointError(f"{where}: {key}={value!r} is not supported: none of the published CLIPs has it")
    for key, value in model.items():
        if key not in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text") and value is not None:
            raise CheckpointError(f"{where}: {key}={value!r} is not supported: none of the published CLIPs has it")
    vision, text = (read_keys(t, r, where) for t, r in zip(towers, (_OPEN_VISION, _OPEN_TEXT), strict=True))
    if not 1 <= vision["head_width"] <= vision["width"]:
        raise CheckpointError(f"{where}: head_width={vision['head_width']} is none of {vision['width']} channels")
    for tower in (vision, text):
        for key, most in (("layers", 256), ("mlp_ratio", 256)):
            if tower[key] > most:
                raise CheckpointError(f"{where}: {key}={tower[key]} is more than any network has")
    act = _ACTIVATIONS[0] if model.get("quick_gelu") else _ACTIVATIONS[1]
    config = _assembled(
        act,
        embed_dim=read_keys(model, {"embed_dim": 512}, where)["embed_dim"],
        vision=(vision["width"], int(vision["width"] * vision["mlp_ratio"]), vision["layers"]),
        vision_heads=vision["width"] // vision["head_width"],
        pixels=(vision["image_size"], vision["patch_size"]),
        text=(text["width"], int(text["width"] * text["mlp_ratio"]), text["layers"]),
        text_heads=text["heads"],
        words=(text["vocab_size"], text["context_length"]),
        where=where,
    )
    pixels = data.get("preprocess_cfg") or {}
    fixed = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}
    fixed["size"] = (config.vision_config.image_size, [config.vision_config.image_size] * 2)
    for key, value in fixed.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if pixels.get(key) is not None and pixels[key] not in allowed:
            raise CheckpointError(f"{where}: {key}={pixels[key]!r} is not supported: only {allowed[0]!r} is")
    return _normalising(config, pixels.get("mean"), pixels.get("std"), where)


def to_open_clip(config: CLIPConfig, where: str) -> dict[str, Any]:
    """Raises CheckpointError for what OpenCLIP's settings cannot say."""
    text, vision = config.text_config, config.vision_config
    data = {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": vision.hidden_act == "quick_gelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "mlp_ratio": _ratio(vision),
                "patch_size": vision.patch_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": _ratio(text),
            },
        },
        "preprocess_cfg": {"mean": list(config.image_mean), "std": list(config.image_std)},
    }
    _must_equal(from_open_clip(data, where), config, where)
    return data


def _ratio(config: CLIPTextConfig | CLIPVisionConfig) -> float:
    """To four digits, as OpenCLIP's files have it, rounded up: `int(width * ratio)` is the width inside."""
    return math.ceil(config.intermediate_size / config.hidden_size * 10_000) / 10_000


# Shapes

_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # of OpenCLIP's vision towers by their width; else 64


def from_shapes(tensors: Mapping[str, Tensor], file: Mapping[str, Tensor], where: str) -> CLIPConfig:
    """`tensors` by OpenAI's names, as `keys_openai_clip.modern` leaves them; `file`: all that there was.

    Raises CheckpointError where the shapes are none of a CLIP.
    """

    def shape(name, ndim):
        if name not in tensors or tensors[name].ndim != ndim or not all(tensors[name].shape):
            found = tensors[name].shape if name in tensors else "missing"
            raise CheckpointError(f"{where}: {name} is {found}: no CLIP with two transformers by OpenAI's names")
        return tensors[name].shape

    def count(prefix):
        numbers = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
        return len(numbers)

    vision_width, _, _, patch = shape("visual.conv1.weight", 4)
    vocab_size, width = shape("token_embedding.weight", 2)
    vision_layer, layer = "visual.transformer.resblocks.", "transformer.resblocks."
    head_width = _HEAD_WIDTHS.get(vision_width, 64)
    for name, channels, head in (("vision", vision_width, head_width), ("text", width, 64)):
        if channels % head:
            raise CheckpointError(
                f"{where}: a {name} tower of {channels} channels does not divide into heads of {head}: give its config"
            )
    matrix, norm = tensors.get(f"{layer}0.mlp.c_fc.weight"), tensors.get(f"{layer}0.ln_1.weight")
    half = matrix is not None and norm is not None and (str(matrix.dtype), str(norm.dtype)) == ("float16", "float32")
    act = _ACTIVATIONS[0 if half or any(name in file for name in OPENAI_NUMBERS) else 1]
    if act == "gelu":
        logger.warning(
            "%s: it does not say its activation, gelu is taken, as LAION's have it: of one with quick_gelu (MetaCLIP, "
            "DFN) keep the whole folder, with open_clip_config.json",
            where,
        )
    grid = math.isqrt(max(shape("visual.positional_embedding", 2)[0] - 1, 0))
    return _assembled(
        act,
        embed_dim=shape("text_projection", 2)[1],
        vision=(vision_width, shape(f"{vision_layer}0.mlp.c_fc.weight", 2)[0], count(vision_layer)),
        vision_heads=vision_width // head_width,
        pixels=(grid * patch, patch),
        text=(width, shape(f"{layer}0.mlp.c_fc.weight", 2)[0], count(layer)),
        text_heads=width // 64,
        words=(vocab_size, shape("positional_embedding", 2)[0]),
        where=where,
    )


def _assembled(act, *, embed_dim, vision, vision_heads, pixels, text, text_heads, words, where) -> CLIPConfig:
    """Widths, widths inside and layers of the towers; image and patch size; vocabulary and positions."""
    tower = ("hidden_size", "intermediate_size", "num_hidden_layers")
    image_size, patch_size = pixels
    vocab_size, positions = words
    last = vocab_size - 1
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            **dict(zip(tower, text, strict=True)),
            vocab_size=vocab_size,
            num_attention_heads=text_heads,
            max_position_embeddings=positions,
            hidden_act=act,
            eos_token_id=last,
            pad_token_id=last if act == "quick_gelu" else 0,
        ),
        vision_config=CLIPVisionConfig(
            **dict(zip(tower, vision, strict=True)),
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            hidden_act=act,
        ),
        projection_dim=embed_dim,
    )
    _sound(config.text_config, where)
    _sound(config.vision_config, where)
    return config


# Both


def _sound(config, where: str):
    heads, width = config.num_attention_heads, config.hidden_size
    if not heads or width % heads:
        raise CheckpointError(f"{where}: {heads} heads do not divide {width} channels")
    if config.hidden_act not in _ACTIVATIONS:
        raise CheckpointError(f"{where}: hidden_act={config.hidden_act!r} is not supported: only {_ACTIVATIONS} are")
    if isinstance(config, CLIPVisionConfig) and (not config.patch_size or config.image_size % config.patch_size):
        raise CheckpointError(f"{where}: patch_size={config.patch_size} does not divide image_size={config.image_size}")
    return config


def _normalising(config: CLIPConfig, mean: Any, std: Any, where: str) -> CLIPConfig:
    said = {"image_mean": mean, "image_std": std}
    for key, value in said.items():
        if value is None:
            said[key] = getattr(config, key)
        elif not isinstance(value, list) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
            raise CheckpointError(f"{where}: {key}={value!r} is damaged: it must be three numbers")
    if not all(v > 0 for v in said["image_std"]):
        raise CheckpointError(f"{where}: image_std={said['image_std']!r} is damaged: it must be positive")
    return dataclasses.replace(config, **{key: tuple(map(float, value)) for key, value in said.items()})


def _must_equal(said: CLIPConfig, config: CLIPConfig, where: str) -> None:
    """What is written must be read back as it is."""
    for tower in ("text_config", "vision_config"):
        for key, value in vars(getattr(config, tower)).items():
            if vars(getattr(said, tower))[key] != value and key not in ("pad_token_id", "clip_skip", "context_norm"):
                raise CheckpointError(
                    f"{where}: {tower} with {key}={value!r} has no place in OpenCLIP's settings: save it as "
                    "'transformers'"
                )
