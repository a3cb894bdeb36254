"""A whole judgement of a tiny model by tiny judges; each figure is found again from the pictures themselves."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from sd_jax import media
from sd_jax.adapters import lora
from sd_jax.checkpoints import keys_peft
from sd_jax.checkpoints.adapters import save_adapter
from sd_jax.checkpoints.load import open_checkpoint
from sd_jax.data.shapes import ShapesWorld
from sd_jax.evals import judging
from sd_jax.evals.clip_score import clip_score
from sd_jax.evals.fid import frechet_distance, gaussian_of, kid
from sd_jax.evals.order import Order
from sd_jax.evals.precision_recall import precision_recall
from sd_jax.sampling.recipe import hash_of_weights

COUNT, SIDE = 6, 32
CAPTIONS = ["a red circle", "a (blue) square", "a green star AND a ring", "a cross"]
RECIPE = {"steps": 1, "sampler": "euler", "schedule": "normal"}


@pytest.fixture(scope="module")
def order(files, tmp_path_factory):
    """For FID by a CLIP, on a folder of shapes world's pictures."""
    out = tmp_path_factory.mktemp("judged")
    (out / "real").mkdir()
    for example in ShapesWorld(SIDE, COUNT):
        Image.fromarray(example["pixels"]).save(out / "real" / f"{example['index']}.png")
        (out / "real" / f"{example['index']}.txt").write_text(example["caption"])
    (out / "real" / "9.png").write_bytes(b"no picture")
    (out / "captions.txt").write_text("\n".join(CAPTIONS))
    return Order(
        out=out,
        checkpoint=str(files / "model"),
        metrics=tuple(judging.METRICS),
        captions=str(out / "captions.txt"),
        data=str(out / "real"),
        num_images=COUNT + 1,
        features="clip",
        clip=str(files / "clip"),
        aesthetic=str(files / "head.safetensors"),
        one_object=3,
        two_objects=1,
        batch_size=4,
        guidance_scale=2.0,
        guidance_scales=(2.0, 3.0),
        seed=5,
        shown=2,
        **RECIPE,
    )


@pytest.fixture(scope="module")
def judged(order):
    return judging.judge(order)


@pytest.fixture(scope="module")
def rows(order, judged):
    """The CLIP's features of pictures drawn in other batches, and of the real ones."""
    judgement = judging.Judgement(order)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(COUNT + 1)]
    recipe = {**RECIPE, "guidance_scale": 2.0, "prompt_syntax": "plain"}
    first = judgement.pipe.text_to_image(captions[:4], seed=order.seed, **recipe)
    last = judgement.pipe.text_to_image(captions[3:], seed=order.seed + 3, **recipe)
    drawn = np.concatenate([first[:3], last])
    real = np.stack([example["pixels"] for example in ShapesWorld(SIDE, COUNT)])
    clip = judgement.clip
    return {"drawn": clip.pictures(drawn), "real": clip.pictures(real), "texts": clip.texts(captions)}


def test_figures_are_those_of_the_pictures(judged, rows):
    figures = judged[0]["figures"]
    expected = {
        "fid": frechet_distance(gaussian_of(rows["drawn"]), gaussian_of(rows["real"])),
        "kid": kid(rows["drawn"], rows["real"]).mean,
        "clip_score": clip_score(rows["drawn"], rows["texts"]).mean(),
        **precision_recall(rows["drawn"], rows["real"])._asdict(),
    }
    assert figures["fid"] > 1e-3
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert figures["psnr"] > 0 and -1 <= figures["ssim"] <= 1 and figures["rfid"] > 0
    assert set(judged[0]["accuracy"]) == {"seen", "held_out"} and 0 <= figures["shapes_seen"] <= 1


def test_a_report_says_which_weights_judged(order, judged):
    report = judged[0]
    digits = hash_of_weights(order.clip)
    assert report["judges"]["fid"] == f"CLIP clip (sha256 {digits}, not known as published)"
    assert digits in report["judges"]["aesthetic"] and "head.safetensors" in report["judges"]["aesthetic"]
    assert report["judges"]["psnr"] == "no network" and report["judges"].keys() == report["figures"].keys()
    assert report["model"] == {"checkpoint": order.checkpoint, "sha256": hash_of_weights(order.checkpoint)}
    counts = {"captions": 7, "reference": 6, "reconstruction": 6, "one_object": 3, "two_objects": 1}
    assert report["pictures"] == counts  # one of the real ones cannot be read
    assert report["recipe"]["guidance_scale"] == 2.0 and report["data"] == order.data


def test_a_sweep_has_what_hangs_on_the_scale(judged):
    report, sweep, sheets = judged
    assert [point["guidance_scale"] for point in sweep] == [2.0, 3.0]
    assert sweep[0]["fid"] == report["figures"]["fid"] != sweep[1]["fid"]
    assert "psnr" not in sweep[0] and {"clip_score", "shapes_held_out", "aesthetic"} <= sweep[0].keys()
    assert judging.curve_of(sweep).shape == (480, 720, 3)
    assert set(sheets) == {"samples.png", "captions.png", "reconstructions.png"}


def test_what_is_known_of_real_pictures_is_not_computed_again(order, judged, monkeypatch):
    judgement = judging.Judgement(order)
    assert len(list(order.out.glob("reference-*.npz"))) == 1

    def fails(pixels):
        raise AssertionError("computed again")

    judgement.features = judgement.features._replace(run=fails)
    assert len(judgement.reference.features) == COUNT
    other = judging.Judgement(dataclasses.replace(order, num_images=COUNT))
    other.features = judgement.features
    with pytest.raises(AssertionError, match="computed again"):
        other.reference  # noqa: B018


def test_statistics_of_others_will_do(order, judged):
    file = next(order.out.glob("reference-*.npz"))
    found = judging.judge(
        dataclasses.replace(order, data=str(file), metrics=("fid", "precision_recall"), guidance_scales=())
    )[0]
    assert {name: judged[0]["figures"][name] for name in found["figures"]} == found["figures"]
    assert found["data"].startswith(f"{file.name} (sha256 ")
    alone = order.out / "alone.npz"
    with np.load(file) as both:
        np.savez(alone, mu=both["mu"], sigma=both["sigma"])
    with pytest.raises(ValueError, match="no `feats`: it will do for FID alone"):
        judging.judge(dataclasses.replace(order, data=str(alone), metrics=("kid",)))


def test_captions_are_those_of_the_data_where_no_file_is_given(order):
    judgement = judging.Judgement(dataclasses.replace(order, captions=""))
    assert judgement.captions[:COUNT] == [ShapesWorld(SIDE, COUNT).caption(i) for i in range(COUNT)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": ("beauty",)}, "--metrics=beauty: there are shapes, fid, kid"),
        ({"features": "inception"}, "--metrics=fid needs --inception=pt_inception-2015-12-05-6726825d.pth"),
        ({"aesthetic": ""}, "--metrics=aesthetic needs --aesthetic=a predictor of LAION's"),
        ({"data": "", "metrics": ("reconstruction",)}, "no data to hold pictures against: give --data="),
        ({"data": "real.npz", "captions": ""}, "--data=real.npz holds statistics: give captions as --captions="),
    ],
)
def test_what_is_missing_is_named(order, change, said):
    with pytest.raises(ValueError, match=said):
        judging.judge(dataclasses.replace(order, **{"metrics": order.metrics[1:]} | change))


def test_sheets_show_captions(judged):
    sheet = judged[2]["captions.png"]
    again = media.contact_sheet(np.zeros((2, SIDE, SIDE, 3), np.uint8), CAPTIONS[:2])
    assert sheet.shape == again.shape


def test_what_was_forgotten_is_told_of_every_figure(order, judged, tmp_path):
    model = order.checkpoint
    spec = open_checkpoint(model).spec
    targets = lora.targets_of(keys_peft.shapes_of(spec), (r"unet/.*(to_v|to_out_0|proj_out)$",), 2, 2.0, False)
    layers = lora.init(jax.random.key(0), targets, "lora", False, -1, {})
    layers = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32), layers)
    save_adapter(tmp_path / "lora.safetensors", layers, spec, "kohya", {}, "float32")
    changes = {"metrics": ("clip_score",), "guidance_scales": (), "base": model}
    changes |= {"adapter": (f"{tmp_path}/lora.safetensors:3",)}
    report, _, sheets = judging.judge(dataclasses.replace(order, **changes))
    told, before = report["forgetting"]["clip_score"], judged[0]["figures"]["clip_score"]
    assert told["before"] == pytest.approx(before, abs=1e-6) and report["figures"]["clip_score"] == told["after"]
    assert told["change"] == told["after"] - told["before"] and abs(told["change"]) > 1e-4
    np.testing.assert_array_equal(sheets["before-captions.png"], judged[2]["captions.png"])
    assert report["model"]["adapters"] == [f"{tmp_path}/lora.safetensors:3"]
    assert report["base"]["sha256"] == hash_of_weights(model)


def test_before_and_after_are_held_against_the_same_data(order, monkeypatch):
    asked, data_config = [], judging.data_config
    monkeypatch.setattr(judging, "data_config", lambda *args: asked.append(args[0]) or data_config(*args))
    both = dataclasses.replace(order, checkpoint="runs/tuned", base=order.checkpoint, weights="ema:0.5")
    judgement = judging.Judgement(both, of_base=True)
    assert judgement.real.captions() and asked == ["runs/tuned"]
    assert judgement.source == order.checkpoint
