"""A1111's infotext, the text that stable-diffusion-webui and its kin write into pictures, to a Recipe and back.

    prompt, on as many lines as it has
    Negative prompt: ...                                (left out where there is none)
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, ...

The last line holds `key: value` pairs; a value with a comma, a colon or a line break is a JSON string. The keys, their
order and what missing ones mean: stable-diffusion-webui 1.10, modules/processing.py, infotext_utils.py,
sd_schedulers.py, sd_samplers_*.py; of "Lora hashes" and "TI hashes", extensions-builtin/Lora/extra_networks_lora.py and
modules/sd_hijack_clip.py. Fields of a Recipe that A1111 has no key for do not survive, nor do prompts of which a line
begins with "Negative prompt:"; `recipe.py` keeps the whole recipe beside this text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sd_jax.types import Recipe

SAMPLERS = {  # ours -> A1111's; what has no name there keeps ours
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "ddim": "DDIM",
    "plms": "PLMS",
    "uni_pc": "UniPC",
    "lcm": "LCM",
    "restart": "Restart",
}
OURS_ALONE = ("heunpp2", "ddpm", "pndm", "uni_pc_bh2", "deis", "ipndm")
SCHEDULES = {  # A1111's "Uniform" is another name of its "Normal"
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "kl_optimal": "KL Optimal",
    "align_your_steps_webui": "Align Your Steps",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta_webui": "Beta",
}
SCHEDULES_OURS_ALONE = ("beta", "linear_quadratic", "align_your_steps", "lcm", "leading", "trailing", "linspace")
SCHEDULES_OURS_ALONE += ("log_linear",)
# What a sampler walks on where the text names no schedule, as before A1111 1.9; others: normal. These three have
# timesteps of their own, of which UniPC's end at sigma_0 and not at 0.
UNNAMED = {"ddim": "leading", "plms": "leading", "uni_pc": "sgm_uniform"}
AUTOMATIC = {  # and where it is named "Automatic"
    **UNNAMED,
    "dpmpp_2m": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2s_ancestral": "karras",
    "dpm_2": "karras",
    "dpm_2_ancestral": "karras",
    "restart": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_2m_sde_heun": "exponential",
    "dpmpp_3m_sde": "exponential",
}
UPSCALERS = {
    "bilinear": "Latent",
    "bicubic": "Latent (bicubic)",
    "nearest": "Latent (nearest)",
    "lanczos": "Lanczos",
    "bislerp": "bislerp",
}
NOISE_SOURCES = {"torch_cpu": "CPU", "nv": "NV", "threefry": "threefry"}  # none named: that of the GPU, which nv is

# Keys whose value is that of a field
_NUMBERS = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
    "Denoising strength": ("strength", float),
    "Clip skip": ("clip_skip", int),
    "ENSD": ("ensd", int),
    "Eta": ("eta", float),
    "Eta DDIM": ("eta", float),
    "Sigma churn": ("s_churn", float),
    "Sigma tmin": ("s_tmin", float),
    "Sigma tmax": ("s_tmax", float),
    "Sigma noise": ("s_noise", float),
    "Hires upscale": ("scale", float),
    "Hires steps": ("second_steps", int),
    "Masked area padding": ("padding", int),
    "Refiner switch at": ("refiner_switch", float),
}
_HASHES = {"Lora hashes": "lora", "TI hashes": "embed"}
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # the format's own definition
_NEGATIVE = "Negative prompt:"


# -- Out -------------------------------------------------------------------------------------------------------------


def write(
    recipe: Recipe,  # of one picture: with its own seed, its width and height, and strength where it has one
    model: str | None = None,  # its name and the short hash of its weights, None = not known
    model_hash: str | None = None,
    vae: str | None = None,  # the same of an autoencoder that is not the model's own
    vae_hash: str | None = None,
    version: str | None = None,
    refiner: str | None = None,  # "name [hash]"
    clip_score: float | None = None,  # by which it was chosen among others
    hashes: Mapping[str, str] | None = None,  # of adapters and words, as `Parsed` has them
    control: Sequence[Mapping[str, Any]] = (),  # {"path": the name, "strength", "start", "end"} of each
) -> str:
    """The infotext of a picture."""
    varied, second = recipe.variation_strength > 0, recipe.scale is not None
    pairs = {
        "Steps": recipe.steps,
        "Sampler": SAMPLERS.get(recipe.sampler, recipe.sampler),
        "Schedule type": _schedule_type(recipe),
        "CFG scale": recipe.guidance_scale,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}" if recipe.width and recipe.height else None,
        "Model hash": model_hash,
        "Model": model,
        "VAE hash": vae_hash,
        "VAE": vae,
        "Variation seed": recipe.variation_seed if varied else None,
        "Variation seed strength": recipe.variation_strength if varied else None,
        "Denoising strength": recipe.strength,
        "Clip skip": recipe.clip_skip if (recipe.clip_skip or 1) > 1 else None,
        "ENSD": recipe.ensd or None,
        "RNG": NOISE_SOURCES.get(recipe.noise_source, recipe.noise_source),
        "Eta DDIM" if recipe.sampler == "ddim" else "Eta": recipe.eta,
        "Sigma churn": recipe.s_churn,
        "Sigma tmin": recipe.s_tmin,
        "Sigma tmax": recipe.s_tmax,
        "Sigma noise": recipe.s_noise,
        "Inpaint area": "Only masked" if recipe.only_masked else None,
        "Masked area padding": recipe.padding if recipe.only_masked else None,
        "Hires upscale": recipe.scale,
        "Hires steps": recipe.second_steps if second else None,
        "Hires upscaler": UPSCALERS.get(recipe.upscaler, recipe.upscaler) if second else None,
        "Refiner": refiner,
        "Refiner switch at": None if refiner is None else recipe.refiner_switch,
        **{key: _listed(hashes or {}, kind) for key, kind in _HASHES.items()},
        **{f"ControlNet {i}": _control_unit(each) for i, each in enumerate(control)},
        "CLIP score": None if clip_score is None else f"{clip_score:.4f}",
        "Version": version,
    }
    lines = [recipe.prompt] if recipe.prompt else []
    if recipe.negative_prompt:
        lines.append(f"{_NEGATIVE} {recipe.negative_prompt}")
    settings = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value is not None)
    return "\n".join([*lines, settings])


def _schedule_type(recipe: Recipe) -> str:
    if recipe.schedule in SCHEDULES:
        return SCHEDULES[recipe.schedule]
    return "Automatic" if recipe.schedule == AUTOMATIC.get(recipe.sampler) else recipe.schedule


def _listed(hashes: Mapping[str, str], kind: str) -> str | None:
    """Those of a kind: "ink: 0123456789ab, fur: ba9876543210"; names without what parts them, None for none."""
    here = {name.partition(":")[2]: digits for name, digits in hashes.items() if name.startswith(f"{kind}:")}
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digits}" for name, digits in here.items()) or None


def _control_unit(hint: Mapping[str, Any]) -> str:
    """As sd-webui-controlnet has it (internal_controlnet/args.py); the map is made before, so there is no module."""
    pairs = {"Module": "none", "Model": hint["path"], "Weight": hint["strength"]}
    pairs |= {"Guidance Start": hint["start"], "Guidance End": hint["end"]}
    return ", ".join(f"{key}: {value}" for key, value in pairs.items())


def _quoted(value: Any) -> str:
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value  # 7 and not 7.0
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


# -- In --------------------------------------------------------------------------------------------------------------


class Parsed(NamedTuple):
    """What an infotext says."""

    recipe: Recipe
    model: str | None  # its name
    model_hash: str | None
    hashes: dict[str, str]  # of adapters and words: {"lora:ink": "0123456789ab", "embed:zorp": ...}
    ignored: list[str]  # "key: value" of all that is not understood


def parse(text: str) -> Parsed:
    """The infotext of a picture, by whatever version of A1111 or its kin.

    Steps that start from a picture are counted as A1111 counts them. Raises ValueError for a text without settings.
    """
    *lines, last = text.rstrip().split("\n")
    values = {key: _unquoted(value.strip()) for key, value in _PAIR.findall(last)}
    if len(values) < 3:
        raise ValueError("its text holds no settings (a last line such as 'Steps: 20, Sampler: Euler a, Seed: 1')")
    at = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    fields = {
        "prompt": "\n".join(lines[:at]),
        "negative_prompt": "\n".join(lines[at:]).removeprefix(_NEGATIVE).removeprefix(" "),
    }
    model, model_hash = values.pop("Model", None), values.pop("Model hash", None)
    hashes = {}
    for key, kind in _HASHES.items():
        pairs = (pair.rpartition(":") for pair in values.pop(key, "").split(",") if ":" in pair)
        hashes |= {f"{kind}:{name.strip()}": digits.strip() for name, _, digits in pairs}
    for key in ("Version", "CLIP score"):
        values.pop(key, None)
    _read_numbers(values, fields)
    _read_names(values, fields)
    if "strength" in fields:
        fields["strength_steps"] = "a1111"
    return Parsed(Recipe(**fields), model, model_hash, hashes, [f"{key}: {value}" for key, value in values.items()])


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value[:1] == value[-1:] == '"' else value
    except ValueError:
        return value


def _read_numbers(values: dict[str, str], fields: dict[str, Any]) -> None:
    """Moves what it understands from `values` to `fields`, as `_read_names` does."""
    for key, (field, kind) in _NUMBERS.items():
        try:
            fields[field] = kind(values[key])
        except (KeyError, ValueError):  # not there, or not a number
            continue
        del values[key]
    if fields.get("second_steps") == 0:
        del fields["second_steps"]
    size, larger = (re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", values.get(key, "")) for key in ("Size", "Hires resize"))
    if size:
        fields["width"], fields["height"] = int(size[1]), int(size[2])
        del values["Size"]
    if size and larger and int(larger[1]) / int(size[1]) == int(larger[2]) / int(size[2]):
        fields["scale"] = int(larger[1]) / int(size[1])
        del values["Hires resize"]


def _read_names(values: dict[str, str], fields: dict[str, Any]) -> None:
    sampler, schedule = _sampler(values.get("Sampler", ""))
    if sampler is not None:
        fields["sampler"] = sampler
        del values["Sampler"]
    named = values.get("Schedule type")
    if named is not None and named != "Automatic":
        schedule = _ours(named, SCHEDULES, SCHEDULES_OURS_ALONE)
    fields["schedule"] = schedule or (UNNAMED if named is None else AUTOMATIC).get(sampler, "normal")
    if named == "Automatic" or (named is not None and schedule is not None):
        del values["Schedule type"]

    source = values.get("RNG", "GPU")
    fields["noise_source"] = "nv" if source == "GPU" else _ours(source, NOISE_SOURCES)
    upscaler = values.get("Hires upscaler", "")
    fields["upscaler"] = _ours(upscaler, UPSCALERS)
    for key, field in (("RNG", "noise_source"), ("Hires upscaler", "upscaler")):
        if fields[field] is None:
            del fields[field]
        else:
            values.pop(key, None)
    if (area := values.pop("Inpaint area", None)) is not None:
        fields["only_masked"] = area == "Only masked"


def _sampler(name: str) -> tuple[str | None, str | None]:
    """(sampler, the schedule that older versions name behind it), None where there is none: "DPM++ 2M Karras"."""
    if ours := _ours(name, SAMPLERS, OURS_ALONE):
        return ours, None
    for schedule, label in SCHEDULES.items():
        for ending in (label, label.replace(" ", "")):  # "SGMUniform"
            plain = re.sub(rf" {re.escape(ending)}$", "", name, flags=re.IGNORECASE)
            if plain != name and (ours := _ours(plain, SAMPLERS, OURS_ALONE)):
                return ours, schedule
    return None, None


def _ours(name: str, table: dict[str, str], others: tuple[str, ...] = ()) -> str | None:
    """Our name for a name of A1111's, or for one of ours: first as it is written, then in any case."""
    if table is SCHEDULES and name.lower() == "uniform":
        return "normal"
    theirs = {label: ours for ours, label in table.items()}
    known = theirs | {ours: ours for ours in (*others, *table) if ours not in theirs}
    return known.get(name) or {key.lower(): ours for key, ours in reversed(known.items())}.get(name.lower())
