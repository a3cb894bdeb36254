"""Latents and text made once, and pictures of several sizes: whole runs of the tiny pretraining configs."""

import ast

import jax
import numpy as np
import pytest

from configs import sd15_pretrain_256
from sd_jax.checkpoints import read
from sd_jax.checkpoints.native import read_params
from sd_jax.data import DataError, cache
from sd_jax.sampling.pipeline import Pipeline, load
from sd_jax.training.loop import train
from tests.checkpoints.tiny import assert_same
from tests.training import doors, processes

FLAGS = (
    "--config=configs/sd15_pretrain_256.py:runlocal",
    *("--config.data.buckets.step=32", "--config.data.aspects=(1.0,3.0)", "--config.total_steps=6"),
    *("--config.data.num_workers=0", "--config.eval_steps=0", "--config.sample_steps=0"),
    # One level, which compiles in a third of the time
    *("--config.model.unet.block_out_channels=(32,)", "--config.model.unet.attention_blocks=(True,)"),
)
AT_ONCE = ("--config.data.cache_latents=False", "--config.data.cache_text=False")


def config_of_flags():
    config = sd15_pretrain_256.get_config("runlocal")
    config.update_from_flattened_dict(
        {
            flag.removeprefix("--config.").split("=", 1)[0]: ast.literal_eval(flag.split("=", 1)[1])
            for flag in FLAGS
            if flag.startswith("--config.")
        }
    )
    return config


def shards_of(workdir):
    """{shard: when it was written}"""
    return {path: path.stat().st_mtime_ns for path in (workdir / "cache").rglob("*.safetensors")}


@pytest.fixture(scope="module")
def precomputed(tmp_path_factory):
    """A workdir of which only the caches are there, and these."""
    workdir, config = tmp_path_factory.mktemp("cached"), config_of_flags()
    config.mesh.fsdp = 4  # which this machine has not
    train(config, workdir, only_caches=True)
    return workdir, shards_of(workdir)


@pytest.fixture(scope="module")
def cached(precomputed):
    """A run over pictures of several sizes, latents and text states computed before."""
    doors.run("train.py", *FLAGS, f"--workdir={precomputed[0]}")
    return precomputed[0]


def test_caches_are_filled_once(precomputed, monkeypatch):
    workdir, shards = precomputed
    assert {path.parent.name for path in shards} == {"train", "held_out"}
    assert not (workdir / "checkpoints").exists() and not (workdir / "metrics.jsonl").exists()
    monkeypatch.setattr(cache, "make", None)
    train(config_of_flags(), workdir, only_caches=True)
    filled = f"the caches in {workdir / 'cache'} are filled: the same command without --precompute trains"
    assert (workdir / "log.txt").read_text().count(filled) == 2


def test_a_run_encodes_nothing_that_was_precomputed(precomputed, cached):
    assert shards_of(cached) == precomputed[1]


def test_to_precompute_there_must_be_caches(tmp_path):
    done = doors.run("train.py", "--precompute", *FLAGS, *AT_ONCE, f"--workdir={tmp_path}/run", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: --precompute fills caches, and this run has none: set config.data.cache_latents or "
        "config.data.cache_text to True"
    )


def test_there_is_a_program_for_each_size_and_no_other(cached):
    (line,) = [line for line in (cached / "log.txt").read_text().splitlines() if "compiled, for pictures of" in line]
    sizes = line.split("pictures of ")[1].rsplit(":", 1)[0].split(", ")
    assert len(sizes) > 1 and f" {len(sizes)} compiled" in line
    shards = {tuple(read(path)["moments"].shape[1:3]) for path in (cached / "cache" / "train").glob("*.safetensors")}
    assert shards == {(int(h) // 8, int(w) // 8) for w, h in (size.split("x") for size in sizes)}


def test_checkpoints_hold_what_the_step_does_not_read(cached):
    params, bundled = read_params(cached / "checkpoints", weights="raw")[0], load().params
    assert params.keys() == {"unet", "vae", "text_encoder"}
    for part in ("vae", "text_encoder"):
        assert_same(params[part], jax.tree.map(np.asarray, bundled[part]))


def test_what_was_computed_before_gives_the_losses_of_what_is_computed_in_the_step(cached, tmp_path):
    config = config_of_flags()
    config.data.cache_latents = config.data.cache_text = False
    train(config, tmp_path)
    before, now = doors.losses(cached), doors.losses(tmp_path)
    assert before.keys() == now.keys() and len(before) == 6
    assert all(before[step] == pytest.approx(now[step], rel=1e-5) for step in before)


@pytest.mark.slow
def test_in_bfloat16_they_are_the_same_within_its_rounding(tmp_path):
    half = "--config.dtype=bfloat16"
    for name, flags in (("before", ()), ("now", AT_ONCE)):
        doors.run("train.py", *FLAGS, half, *flags, f"--workdir={tmp_path / name}")
    before, now = doors.losses(tmp_path / "before"), doors.losses(tmp_path / "now")
    assert all(before[step] == pytest.approx(now[step], rel=2**-8) for step in before)


@pytest.mark.slow
def test_several_sizes_resume_to_the_bit(cached, tmp_path):
    cache = f"--config.data.cache_dir={cached / 'cache'}"
    for steps in (2, 6):
        doors.run("train.py", *FLAGS, cache, f"--workdir={tmp_path}", f"--config.total_steps={steps}")
    assert doors.losses(tmp_path) == doors.losses(cached)


@pytest.mark.slow
def test_two_processes_take_the_same_sizes_and_keep_what_was_computed_before(cached, tmp_path):
    """What is cached is no part of the sharded state: the first process writes it into the checkpoint."""
    cache = f"--config.data.cache_dir={cached / 'cache'}"
    flags = (*FLAGS, cache, f"--workdir={tmp_path}", "--config.mesh.fsdp=2")
    for code, _, err in processes.finish(processes.start(doors.command("train.py", *flags), num_processes=2)):
        assert code == 0, err[-3000:]
    alone, together = doors.losses(cached), doors.losses(tmp_path)
    assert alone.keys() == together.keys()
    assert all(alone[step] == pytest.approx(together[step], rel=1e-5) for step in alone)
    ours, theirs = (read_params(workdir / "checkpoints", weights="raw")[0] for workdir in (tmp_path, cached))
    assert ours.keys() == theirs.keys() == {"unet", "vae", "text_encoder"}
    for part in ("vae", "text_encoder"):
        assert_same(ours[part], theirs[part])


def test_a_cache_of_other_sizes_or_another_autoencoder_is_refused_by_name(cached, tmp_path):
    files = {path: path.read_bytes() for path in (cached / "cache").rglob("*") if path.is_file()}
    pipe = load()
    changed = jax.tree.map(lambda x: 1.01 * x, pipe.params["vae"])
    Pipeline(pipe.spec, {**pipe.params, "vae": changed}, pipe.tokenizer).save(tmp_path / "other")
    for key, value, words in (
        ("data.resolution", 96, "config.data.resolution was 64, is 96"),
        ("init", str(tmp_path / "other"), r"another vae \(its weights have changed\)"),
    ):
        config = config_of_flags()
        config.update_from_flattened_dict({"data.cache_dir": str(cached / "cache"), key: value})
        with pytest.raises(DataError, match=words):
            train(config, tmp_path / "run")
    assert {path: path.read_bytes() for path in files} == files
