"""Judges a text-to-image model: the pictures that it draws of captions, and what its autoencoder makes of real ones.

METRICS is the table of what may be asked for. Pictures are drawn once for all figures that need them, and forgotten:
what networks say of them is kept. Picture n has the seed `seed + n`, whatever the batches, devices and processes.
"""

import functools
import operator
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sd_jax import media
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.data import shapes
from sd_jax.evals import networks, plot
from sd_jax.evals.clip_score import clip_score
from sd_jax.evals.features import gathered_rows
from sd_jax.evals.fid import Statistics, frechet_distance, gaussian_of, kid, load_statistics
from sd_jax.evals.order import Order
from sd_jax.evals.precision_recall import precision_recall
from sd_jax.evals.reconstruction import Reconstructions
from sd_jax.evals.reference import RealPictures, data_config, share
from sd_jax.evals.shapes_accuracy import accuracy
from sd_jax.models.vae import to_pixels
from sd_jax.sampling.command import adapters_of, read_prompts
from sd_jax.sampling.pipeline import BUNDLED, load
from sd_jax.sampling.recipe import hash_of_weights
from sd_jax.sampling.text_to_image import latent_size
from sd_jax.types import Recipe

Figures = dict[str, float]


class Judgement:
    """A model, the judges, and what is shared between figures. `sheets` {file name: picture} fills as they are made."""

    def __init__(self, order: Order, of_base: bool = False):  # of_base: it is order.base that is judged, as it is
        for name in order.metrics:
            if name not in METRICS:
                raise ValueError(f"--metrics={name}: there are {', '.join(METRICS)}")
            for flag in METRICS[name].needs:
                flag = order.features if flag == "features" else flag
                if not getattr(order, flag):
                    raise ValueError(f"--metrics={name} needs --{flag}={_MENDS[flag]}")
        self.order = order
        if order.base:
            open_checkpoint(order.base)
        self.source, weights = (order.base, "ema") if of_base else (order.checkpoint, order.weights)
        self.pipe = load(self.source, dtype=order.dtype, weights=weights)
        if order.embeddings and not of_base:
            self.pipe = self.pipe.with_adapter(order.embeddings)
        for worn in adapters_of(() if of_base else order.adapter):
            self.pipe = self.pipe.with_adapter(worn["path"], worn["strength"], worn["text_strength"])
        factor = self.pipe.spec.vae.downscale
        self.size = tuple(factor * side for side in latent_size(self.pipe.spec, Recipe()))
        self.sheets: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}
        self.accuracy: dict[str, dict] = {}
        self.data = ""
        self._rows: dict[float, dict[str, np.ndarray]] = {}
        self._figures: dict[tuple[str, float], Figures] = {}

    def prepare(self) -> None:
        """Opens all that figures need, so that what is wrong is said before anything is drawn."""
        metrics = self.order.metrics
        needs = {need for name in metrics for need in METRICS[name].needs}
        asked = {"captions": bool(needs), "real": "reconstruction" in metrics, "reference": "features" in needs}
        for name in (*sorted(needs), *(name for name, wanted in asked.items() if wanted)):
            getattr(self, name)
        if {"kid", "precision_recall"} & set(metrics):
            _reference_rows(self)

    def figures(self, metric: str, guidance_scale: float) -> Figures:
        if (metric, guidance_scale) not in self._figures:
            self._figures[metric, guidance_scale] = METRICS[metric].figures(self, guidance_scale)
        return self._figures[metric, guidance_scale]

    # What judges

    @functools.cached_property
    def clip(self) -> networks.TextAndPictures:
        return networks.open_clip(self.order.clip, self.order.batch_size, self.order.clip_tokenizer)

    @functools.cached_property
    def features(self) -> networks.Network:
        if self.order.features == "clip":
            return networks.Network(self.clip.name, self.clip.pictures)
        return networks.open_inception(self.order.inception, self.order.batch_size)

    @functools.cached_property
    def aesthetic(self) -> networks.Network:
        return networks.open_aesthetic(self.order.aesthetic, self.order.batch_size)

    @functools.cached_property
    def lpips(self) -> tuple[str, Any]:
        return networks.open_lpips(self.order.lpips)

    # What is judged

    @functools.cached_property
    def real(self) -> RealPictures:
        order = self.order
        if order.data.endswith(".npz"):
            raise ValueError(f"--data={order.data} holds statistics: give captions as --captions=, pictures as --data=")
        config = data_config(order.checkpoint, order.data, order.image_key, order.caption_key, max(self.size))
        self.data = str(config.data.path)
        return RealPictures(config, self.size, order.num_images)

    @functools.cached_property
    def reference(self) -> Statistics:
        order = self.order
        if order.data.endswith(".npz"):
            self.data = networks.name_of(order.data)
            return load_statistics(order.data)
        found = self.real.statistics(self.features, pathlib.Path(order.cache or order.out), order.batch_size)
        self.counts["reference"] = len(found.features)
        return found

    @functools.cached_property
    def captions(self) -> list[str]:
        """As many as pictures: those that there are over and over."""
        texts = read_prompts(self.order.captions) if self.order.captions else self.real.captions()
        return [texts[i % len(texts)] for i in range(self.order.num_images)]

    def draw(self, captions: Sequence[str], scale: float, **recipe) -> Iterator[tuple[np.ndarray, Sequence[str]]]:
        """(pixels, captions) of this process' share, a batch at a time; the last is filled up, so that all compile
        once."""
        order, own = self.order, share(range(len(captions)))
        recipe |= {"steps": order.steps, "sampler": order.sampler, "schedule": order.schedule, "guidance_scale": scale}
        for at in range(own.start, own.stop, order.batch_size):
            batch = captions[at : min(at + order.batch_size, own.stop)]
            filled = [*batch, *[""] * (order.batch_size - len(batch))]
            yield self.pipe.text_to_image(filled, seed=order.seed + at, **recipe)[: len(batch)], batch

    def rows(self, scale: float) -> dict[str, np.ndarray]:
        """What networks say of the pictures of `captions`: "features", and of CLIP "pictures" and "texts"."""
        if scale not in self._rows:
            needs = {need for name in self.order.metrics for need in METRICS[name].needs}
            found: dict[str, list] = {"features": [], "pictures": [], "texts": []}
            for pixels, captions in self.draw(self.captions, scale, prompt_syntax="plain"):
                if "features" in needs:
                    found["features"].append(self.features.run(pixels))
                if "clip" in needs:
                    found["pictures"].append(self.clip.pictures(pixels))
                if "clip_score" in self.order.metrics:
                    found["texts"].append(self.clip.texts(captions))
                if "captions.png" not in self.sheets:
                    shown = self.order.shown
                    self.sheets["captions.png"] = media.contact_sheet(pixels[:shown], captions[:shown])
            self._rows[scale] = {name: gathered_rows(np.concatenate(rows)) for name, rows in found.items() if rows}
            self.counts["captions"] = len(self.captions)
        return self._rows[scale]


class Metric(NamedTuple):
    figures: Callable[[Judgement, float], Figures]
    needs: tuple[str, ...] = ()  # flags; "features" is that which --features names
    guided: bool = True  # whether it hangs on the guidance scale
    judge: Callable[[Judgement, str], str] = lambda judgement, figure: judgement.features.name  # of each figure


def _shapes(judgement: Judgement, scale: float) -> Figures:
    """The share of attributes that are right, of `shapes_accuracy`, for pairs that were seen and for held-out ones."""
    order, found = judgement.order, {}
    for split in ("seen", "held_out"):
        scenes = shapes.evaluation_scenes(split, order.one_object, order.seed)
        scenes += shapes.evaluation_scenes(split, order.two_objects, order.seed, two_objects=1.0)
        captions = [shapes.full_caption(scene) for scene in scenes]
        images = gathered_rows(np.concatenate([pixels for pixels, _ in judgement.draw(captions, scale)]))
        right = accuracy(images, scenes)
        if scale == order.guidance_scale:
            judgement.accuracy[split] = right
        found[f"shapes_{split}"] = float(np.mean([value for value in right.values() if value is not None]))
    if scale == order.guidance_scale:
        # As many of one object as the whole set has, in proportion
        shown = np.linspace(0, len(scenes) - 1, order.shown).astype(int)
        judgement.sheets["samples.png"] = media.contact_sheet(images[shown], captions=[captions[i] for i in shown])
    return found


def _fid(judgement: Judgement, scale: float) -> Figures:
    drawn = gaussian_of(judgement.rows(scale)["features"])
    return {"fid": frechet_distance(drawn, judgement.reference.gaussian)}


def _kid(judgement: Judgement, scale: float) -> Figures:
    found = kid(judgement.rows(scale)["features"], _reference_rows(judgement))
    return {"kid": found.mean, "kid_std": found.std}


def _precision_recall(judgement: Judgement, scale: float) -> Figures:
    return precision_recall(judgement.rows(scale)["features"], _reference_rows(judgement))._asdict()


def _reference_rows(judgement: Judgement) -> np.ndarray:
    if judgement.reference.features is None:
        raise ValueError(f"--data={judgement.order.data} has no `feats`: it will do for FID alone")
    return judgement.reference.features


def _clip_score(judgement: Judgement, scale: float) -> Figures:
    rows = judgement.rows(scale)
    return {"clip_score": float(clip_score(rows["pictures"], rows["texts"]).mean())}


def _aesthetic(judgement: Judgement, scale: float) -> Figures:
    return {"aesthetic": float(judgement.aesthetic.run(judgement.rows(scale)["pictures"]).astype(np.float64).mean())}


def _reconstruction(judgement: Judgement, scale: float) -> Figures:
    order, pipe = judgement.order, judgement.pipe
    features = judgement.features.run if getattr(order, order.features) else None
    judge = Reconstructions(judgement.lpips[1] if order.lpips else None, features, order.batch_size)
    for originals in judgement.real.batches(order.batch_size):
        again = np.asarray(to_pixels(pipe.decode_latents(pipe.encode_image(originals))))
        judge.add(originals, again)
        if "reconstructions.png" not in judgement.sheets:
            pairs = np.concatenate([originals[: order.shown // 2], again[: order.shown // 2]])
            judgement.sheets["reconstructions.png"] = media.contact_sheet(pairs, columns=len(pairs) // 2)
    found = judge.results()
    judgement.counts["reconstruction"] = int(found.pop("pictures"))
    return found


def _judge_of_reconstruction(judgement: Judgement, figure: str) -> str:
    if figure == "lpips":
        return judgement.lpips[0]
    return judgement.features.name if figure == "rfid" else _BY_RULE


_BY_RULE = "no network"

METRICS = {
    "shapes": Metric(_shapes, judge=lambda judgement, figure: _BY_RULE),
    "fid": Metric(_fid, ("features",)),
    "kid": Metric(_kid, ("features",)),
    "clip_score": Metric(_clip_score, ("clip",), judge=lambda judgement, figure: judgement.clip.name),
    "precision_recall": Metric(_precision_recall, ("features",)),
    "aesthetic": Metric(
        _aesthetic,
        ("clip", "aesthetic"),
        judge=lambda judgement, figure: f"{judgement.aesthetic.name} on {judgement.clip.name}",
    ),
    "reconstruction": Metric(_reconstruction, guided=False, judge=_judge_of_reconstruction),
}

_MENDS = {
    "inception": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or another file of its layout",
    "clip": "a folder or file of a CLIP, or a run of method 'clip'",
    "aesthetic": "a predictor of LAION's, or a run of method 'aesthetic'",
}


def judge(order: Order) -> tuple[dict[str, Any], list[Figures], dict[str, np.ndarray]]:
    """-> the report, the points of the sweep (`guidance_scale` and figures; none without one), {file name: sheet}.

    The same in every process, each of which calls it. Raises ValueError, OSError and FloatingPointError, which name the
    flag or file at fault.
    """
    report, sweep, sheets = _judge(order)
    if order.base:
        # After the first model is let go of; against the same data, which is the first one's where none is named
        before, _, sheets_before = _judge(order, of_base=True)
        after = report["figures"]
        report["base"] = before["model"]
        report["forgetting"] = {
            name: {"before": value, "after": after[name], "change": after[name] - value}
            for name, value in before["figures"].items()
        }
        sheets |= {f"before-{name}": sheet for name, sheet in sheets_before.items()}
    return report, sweep, sheets


def _judge(order: Order, of_base: bool = False) -> tuple[dict[str, Any], list[Figures], dict[str, np.ndarray]]:
    judgement = Judgement(order, of_base)
    judgement.prepare()
    figures, judges = {}, {}
    for name in order.metrics:
        found = judgement.figures(name, order.guidance_scale)
        figures |= found
        judges |= {figure: METRICS[name].judge(judgement, figure) for figure in found}
    sweep = []
    for scale in () if of_base else order.guidance_scales:
        guided = [judgement.figures(name, scale) for name in order.metrics if METRICS[name].guided]
        sweep.append(functools.reduce(operator.or_, guided, {"guidance_scale": scale}))
    source = judgement.source or str(BUNDLED)
    report: dict[str, Any] = {"model": {"checkpoint": source, "sha256": hash_of_weights(source)}}
    if (order.adapter or order.embeddings) and not of_base:
        report["model"] |= {"adapters": list(order.adapter), "embeddings": order.embeddings}
    if judgement.accuracy:
        report["accuracy"] = judgement.accuracy
        judgement.counts |= {"one_object": order.one_object, "two_objects": order.two_objects}
    report |= {"figures": figures, "judges": judges, "pictures": judgement.counts}
    if judgement.data:
        report["data"] = judgement.data
    names = ("steps", "sampler", "schedule", "guidance_scale", "seed", "weights", "dtype")
    report["recipe"] = {name: getattr(order, name) for name in names}
    return report, sweep, judgement.sheets


def curve_of(sweep: Sequence[Figures]) -> np.ndarray:
    """FID over CLIP score; without a CLIP score over the scale, without FID whatever figure comes first."""
    named = {"fid": "FID", "clip_score": "CLIP score", "guidance_scale": "guidance scale"}
    figures = [name for name in sweep[0] if name != "guidance_scale"]
    x = "clip_score" if {"clip_score", "fid"} <= set(figures) else "guidance_scale"
    y = "fid" if "fid" in figures else figures[0]
    points = [(point[x], point[y]) for point in sweep]
    labels = [f"{point['guidance_scale']:g}" for point in sweep]
    return plot.curve(points, labels, named[x], named.get(y, y.replace("_", " ")), "labels: guidance scale")
