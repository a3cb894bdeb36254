"""What a run starts from: a checkpoint, fresh parameters, or some parts of each; and its tokenizer."""

import dataclasses
import pathlib
from logging import getLogger

import jax
from ml_collections import ConfigDict

from sd_jax import distributed
from sd_jax.checkpoints import CheckpointError
from sd_jax.checkpoints.beside import Beside, open_beside
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.checkpoints.tensors import lazy
from sd_jax.models.networks import Networks
from sd_jax.models.presets import KUNetConfig, ModelSpec
from sd_jax.prompts.chunks import CaptionTokenizer
from sd_jax.prompts.tokenize import Tokenizer, load_tokenizer, train_tokenizer
from sd_jax.training import setup
from sd_jax.training.method import Method
from sd_jax.types import Params

_POSITIONS = "max_position_embeddings"

logger = getLogger(__name__)


@dataclasses.dataclass
class Model:
    """A run's networks, what was loaded of them, and its tokenizer (None where no prompt is read)."""

    networks: Networks
    trained: tuple[str, ...]  # parts that the method moves
    frozen: tuple[str, ...]  # parts that it reads besides
    loaded: dict[str, Params]  # not read yet; parts that are not here are made fresh
    tokenizer: Tokenizer | None
    num_tokens: int = 0  # of a caption
    adapter_of: str | None = None  # where an adapter alone is trained: the model that it is for

    @property
    def parts(self) -> tuple[str, ...]:
        return self.trained + self.frozen

    @property
    def num_time_ids(self) -> int:
        """Numbers that batches must tell the U-Net of each picture's size and crop."""
        return self.networks.spec.num_time_ids if "unet" in self.parts else 0

    def caption_tokenizer(self) -> CaptionTokenizer | None:
        """Captions -> int32 [batch, num_tokens], for the data loader; long ones are counted and logged."""
        if self.tokenizer is None:
            return None
        readers = [self.networks.spec.words_of(part) for part in self.networks.spec.readers(self.parts)]
        positions = min(words.max_position_embeddings for words in readers)
        return CaptionTokenizer(self.tokenizer, positions, self.num_tokens // positions)

    def meta(self, step: int) -> dict:
        """What a checkpoint says of itself, beside its arrays."""
        tokenizer = None if self.tokenizer is None else "tokenizer"
        meta = {"spec": self.networks.spec.to_dict(), "step": step, "tokenizer": tokenizer}
        return meta if self.adapter_of is None else {**meta, "adapter_of": self.adapter_of}


def build_model(
    config: ConfigDict, method: Method, workdir: pathlib.Path | None, captions, dry_run: bool = False
) -> Model:
    """Opens `config.init`, checks it against `config.model`, and loads or trains the tokenizer.

    captions: () -> the training captions, asked for only where a tokenizer is made from them.
    Raises ValueError where a part can neither be loaded nor made and for what the method refuses, CheckpointError for
    another architecture.
    """
    # In float32 whatever the file has: an average and small updates do not fit into half precision
    said = {"prediction_type": config.prediction_type or None}
    loaded = open_checkpoint(config.init, weights="ema", dtype="float32", **said) if config.init else None
    if loaded is not None:
        for note in loaded.notes:
            logger.info("%s: %s", config.init, note)
        begun, parts = method.begin(loaded.spec, loaded.params)
        loaded = dataclasses.replace(loaded, spec=begun, params=parts)
    if loaded is None and not config.model:
        raise ValueError("config.model and config.init are both empty: name a checkpoint or describe a model")
    spec = _with_clip_skip(ModelSpec.from_dict(config.model.to_dict()) if config.model else loaded.spec, config)
    if isinstance(spec.unet, KUNetConfig):
        raise ValueError(
            f"config.method={config.method!r}: the x2 latent upscaler is not trained here, choose another model"
        )
    spec, beside = with_beside(config, spec)
    method.check(config, spec)
    trained, frozen = method.trainable(config, spec), method.frozen(config, spec)
    parts = trained + frozen
    there = {} if loaded is None else _chosen(loaded.params, config)
    there |= {part: opened.params for part, opened in beside.items()}
    params = {part: there[part] for part in parts if part in there}
    for part in params.keys() - beside.keys():
        spec = _take_spec(spec, _with_clip_skip(loaded.spec, config), part, config.init)
    setup.check_reads(config, method, spec)
    missing = [part for part in frozen if part not in params]
    if missing:
        raise ValueError(
            f"config.method={config.method!r} needs a trained {missing[0]}, and config.init={config.init!r} has none"
            f"{' among config.init_parts' if config.init_parts else ''}: give the path of a checkpoint that does"
        )
    lacking = sorted(set(parts) - {*params, "adapter"})
    if not config.model and lacking:
        raise ValueError(f"config.init={config.init!r} has no {lacking[0]}, and config.model is empty")
    if "unet" in parts and spec.unet.in_channels != spec.vae.latent_channels + method.beside_latents(spec):
        raise ValueError(
            f"config.method={config.method!r} trains on latents of {spec.vae.latent_channels} channels, and this U-Net "
            f"reads {spec.unet.in_channels} (for inpainting, depth or upscaling): choose another checkpoint"
        )

    tokenizer, num_tokens = None, 0
    readers = spec.readers(parts) if "captions" in method.reads else ()
    if readers:
        made = not any(part in params for part in readers) and not config.tokenizer
        sources = [opened.tokenizer for opened in beside.values() if opened.tokenizer]
        if loaded is not None and loaded.tokenizer:
            sources.append(loaded.tokenizer)
        tokenizer = _tokenizer(config, spec, readers, sources, made, workdir, captions, dry_run)
        if tokenizer is not None and made:
            ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            for part in readers:
                spec = spec.with_vocabulary(part, vocab_size=tokenizer.vocab_size, **ids)
        if tokenizer is not None:
            for part in readers:
                tokenizer.check(spec.words_of(part))
            tokenizer.pad_as(spec.words_of(readers[0]))
        num_tokens = setup.num_tokens(config, spec, parts)
    if method.adapting is not None and tokenizer is not None:
        spec, params, tokenizer = method.adapting.prepare(config, spec, params, tokenizer)

        def held(path, leaf):
            return lazy(leaf).cast(setup.frozen_dtype(config, method, path))

        params = {part: jax.tree_util.tree_map_with_path(held, tree) for part, tree in params.items()}
    networks = Networks.of(spec, config.dtype, config.remat)
    adapter_of = None if method.adapting is None else str(config.init)
    return Model(networks, trained, frozen, params, tokenizer, num_tokens, adapter_of)


def with_beside(config: ConfigDict, spec: ModelSpec) -> tuple[ModelSpec, dict[str, Beside]]:
    """`spec` with the parts that no checkpoint for pictures has, of `config.init_clip` and the like, and these.

    Raises CheckpointError for a path that holds none.
    """
    beside = {part: open_beside(part, path) for part, path in _paths_beside(config).items() if path}
    spec = dataclasses.replace(spec, **{part: opened.config for part, opened in beside.items()})
    if config.method == "full" and "image_encoder" in beside:
        spec = spec.told_pictures(spec.image_encoder)
    return spec, beside


def _paths_beside(config: ConfigDict) -> dict[str, str]:
    """Of what no checkpoint for pictures has; see checkpoints/beside.py."""
    if config.method == "autoencoder":
        return {"perceptual": config.init_perceptual}
    if config.method in ("full", "ip_adapter"):
        return {"image_encoder": config.init_clip}
    if config.method == "esrgan":
        return {"perceptual": config.init_perceptual, "upscaler": config.init_upscaler}
    return {"clip": config.init_clip} if config.method in ("clip", "aesthetic") else {}


def _with_clip_skip(spec: ModelSpec, config: ConfigDict) -> ModelSpec:
    """`spec` with the layer that the run reads, so that its checkpoints and samples read the same."""
    if "diffusion" not in config or not config.diffusion.clip_skip:
        return spec
    texts = {
        part: dataclasses.replace(text, clip_skip=config.diffusion.clip_skip)
        for part, text in spec.text_encoders.items()
    }
    return dataclasses.replace(spec, **texts)


def _chosen(params: dict[str, Params], config: ConfigDict) -> dict[str, Params]:
    """The parts of `config.init` that the run starts from: all, or those of `config.init_parts`."""
    for part in config.init_parts:
        if part not in params:
            raise ValueError(f"config.init_parts names {part!r}, config.init={config.init!r} has {', '.join(params)}")
    return {part: params[part] for part in params if not config.init_parts or part in config.init_parts}


def _take_spec(spec: ModelSpec, loaded: ModelSpec, part: str, path: str) -> ModelSpec:
    """`spec` with the loaded part's own description, once its architecture is known to be the same."""
    want, got = getattr(spec, part), getattr(loaded, part)
    if type(want) is not type(got):
        raise CheckpointError(
            f"{path} is of another architecture: its {part} is a {type(got).__name__}, config.model says "
            f"{type(want).__name__}; change config.model or leave it empty"
        )
    # What is measured or is the tokenizer's business is taken from the checkpoint without asking
    measured = {"vae": ("scaling_factor", "sample_size"), "unet": ("sample_size",)}.get(
        part, ("vocab_size", "eos_token_id", "pad_token_id")
    )
    for field in dataclasses.fields(want):
        a, b = getattr(want, field.name), getattr(got, field.name)
        if a != b and field.name not in measured:
            raise CheckpointError(
                f"{path} is of another architecture: its {part}.{field.name} is {b}, config.model says {a}; "
                "change config.model or leave it empty"
            )
    return dataclasses.replace(spec, **{part: got})


def _tokenizer(config, spec, readers, sources, made, workdir, captions, dry_run) -> Tokenizer | None:
    """The tokenizer of the run, kept in workdir/tokenizer so that samples and exports find it.

    Of several processes the first one writes it, and all read what it wrote: ids must not differ.
    """
    kept = None if workdir is None else workdir / "tokenizer"
    there = kept is not None and kept.exists()
    published = config.tokenizer or next(iter(sources), None)
    if dry_run and not there:
        return None if made else load_tokenizer(published)
    if not dry_run:
        if distributed.is_first() and not there:
            if made:
                words = [spec.words_of(part) for part in readers]
                most, positions = (min(getattr(w, key) for w in words) for key in ("vocab_size", _POSITIONS))
                train_tokenizer(captions(), kept, most, positions)
            else:
                load_tokenizer(published).save(kept)
        distributed.barrier("tokenizer")
    return load_tokenizer(kept)
