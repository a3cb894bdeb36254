"""Methods that train an adapter: the model stays as it is, runs resume, and their files do what the runs learnt."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax import media
from sd_jax.checkpoints import CheckpointError
from sd_jax.config import training_defaults
from sd_jax.data.shapes import ShapesWorld
from sd_jax.prompts.tokenize import train_tokenizer
from sd_jax.sampling.pipeline import Pipeline, load
from sd_jax.training import prior, setup, start
from sd_jax.training.loop import train
from sd_jax.training.methods import method_of
from sd_jax.training.metrics import read_rows
from tests.sampling.conftest import ONE_LEVEL, random_params

RECIPE = {"prompt": "a red circle", "steps": 2, "width": 16, "height": 16, "output": "latents", "guidance_scale": 1.0}
FILES = {"lora": "adapter.safetensors", "textual_inversion": "sks.safetensors", "hypernetwork": "hypernetwork.pt"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    world = ShapesWorld(16, num_examples=200, seed=0, split="train")
    tokenizer = train_tokenizer([world.caption(i) for i in range(200)], folder / "tokenizer", 560)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    spec = ONE_LEVEL.with_vocabulary("text_encoder", vocab_size=tokenizer.vocab_size, **ids)
    Pipeline(spec, random_params(spec), tokenizer).save(folder / "model")
    (folder / "pictures").mkdir()  # without captions
    for i in range(8):
        media.write_png(folder / "pictures" / f"{i}.png", world[i]["pixels"], {})
    return folder / "model"


@pytest.fixture(scope="module")
def pipe(base):
    return load(base)


def config_of(method, base, steps=4):
    config = training_defaults(method)
    config.init = str(base)
    config.total_steps, config.batch_size = steps, 4
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 1, 0.02
    config.data.num_examples, config.data.resolution, config.data.held_out = 40, 16, 0.0
    config.data.num_workers = 0
    config.checkpoint_steps = config.eval_steps = config.sample_steps = 0
    if method == "textual_inversion":
        config.textual_inversion.tokens = (("<sks>", 2, "red circle"),)
        config.data.path, config.data.prompt = str(base.parent / "pictures"), "a <sks>"
    if method == "hypernetwork":
        config.hypernetwork.dropout = (0, 0.3, 0)
    if method == "lora":
        config.checkpoint_steps = 2
        config.adapter.rank = 2
        config.adapter.targets = (r"attn\d/to_[qkv]$", r"text_encoder/.*fc1$")
    if method == "lcm_lora":
        config.adapter.rank = 2
        config.data.cache_latents = config.data.cache_text = True
        config.data.crop = "centre"
    return config


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """{method: the workdir of four steps in one go}"""
    made = {}
    for method in ("lora", "textual_inversion", "hypernetwork", "lcm_lora"):
        made[method] = tmp_path_factory.mktemp(method) / "run"
        train(config_of(method, base), made[method])
    return made


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "hypernetwork", "lcm_lora"])
def test_a_run_leaves_a_file_that_does_what_it_learnt(runs, pipe, method):
    rows = read_rows(runs[method])
    assert len(rows) == 4 and np.isfinite([row["loss"] for row in rows]).all()
    assert (runs[method] / FILES.get(method, "adapter.safetensors")).is_file()
    on = pipe.with_adapter(runs[method]).merge_adapters()  # which compiles nothing more
    if method != "textual_inversion":
        assert np.abs(on.text_to_image(**RECIPE) - pipe.text_to_image(**RECIPE)).max() > 1e-4
        return
    say = lambda pipe, prompt: np.asarray(pipe.encode_prompts([prompt]).context)  # noqa: E731
    assert np.abs(say(on, "a <sks>") - say(pipe, "a <sks>")).max() > 1e-4
    np.testing.assert_array_equal(say(on, "a red circle"), say(pipe, "a red circle"))  # nothing else has changed


@pytest.mark.parametrize("name", ["lora", "textual_inversion", "hypernetwork", "lcm_lora"])
def test_in_bfloat16_frozen_kernels_take_half_as_a_plan_says_and_what_learns_stays_whole(base, tmp_path, name):
    config = config_of(name, base)
    config.dtype = "bfloat16"
    method = method_of(config)
    model = start.build_model(config, method, tmp_path, captions=None)
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
    make_state = functools.partial(setup.initial_state, config, method, model.networks)
    state = jax.eval_shape(make_state, jax.tree.map(shape, model.loaded))
    assert jax.tree.map(shape, state.frozen) == setup.frozen_shapes(config, method, model.networks)
    assert state.frozen["unet"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    assert state.frozen["unet"]["conv_in"]["bias"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert ("vae" in state.frozen) == (not config.data.cache_latents)


def test_the_adapter_of_each_checkpoint_stays(runs, pipe):
    assert [folder.name for folder in (runs["lora"] / "adapters").iterdir()] == ["2"]
    early, late = (pipe.with_adapter(path).adapters[0].adapter for path in (runs["lora"] / "adapters/2", runs["lora"]))
    assert jax.tree.map(np.shape, early) == jax.tree.map(np.shape, late)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (early, late)), strict=True))


def test_checkpoints_hold_the_adapter_alone(runs):
    for run in runs.values():
        with pytest.raises(
            CheckpointError, match="an adapter of .*model, not a model: load that, and give .* as an adap"
        ):
            load(run)
        sizes = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file())
        assert sizes < 2_000_000


def test_resumed_is_uninterrupted(runs, base, tmp_path, method="lora"):
    train(config_of(method, base, steps=2), tmp_path / "run")
    train(config_of(method, base), tmp_path / "run")
    assert [row["loss"] for row in read_rows(tmp_path / "run")] == [row["loss"] for row in read_rows(runs[method])]
    assert (tmp_path / "run" / FILES[method]).read_bytes() == (runs[method] / FILES[method]).read_bytes()


def test_dreambooth_makes_pictures_of_its_class_once(base, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "sd_jax")
    config = config_of("dreambooth", base, steps=1)
    config.data.path, config.data.prompt = str(base.parent / "pictures"), "a sks circle"
    config.prior.update(prompt="a circle", count=2, weight=0.5)
    config.optimizer.warmup_steps, config.diffusion.train_text_encoder = 0, False
    config.samples.update(steps=2, guidance_scale=1.0)
    config.diffusion.masked_loss = True  # of which these pictures have none
    train(config, tmp_path / "run")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "prior").iterdir()}
    assert sorted(path.name for path in made) == ["00000.png", "00000.txt", "00001.png", "00001.txt"]
    first, second = (media.decode_image(tmp_path / "run" / "prior" / f"0000{i}.png") for i in range(2))
    assert first.shape == (16, 16, 3) and (first != second).any()
    monkeypatch.setattr(prior, "_make", lambda *_: pytest.fail("made again"))
    config.total_steps = 2
    train(config, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "prior").iterdir()} == made
    assert np.isfinite([row["loss"] for row in read_rows(tmp_path / "run")]).all()
    said = "2 of the 4 images of a batch are others: 8 of its own, 2 others, their loss times 0.5"
    assert caplog.text.count(said) == 2


def test_vectors_keep_their_length(runs, pipe):
    from sd_jax.adapters.textual_inversion import rows_of
    from sd_jax.checkpoints import embeddings

    before = rows_of(pipe.spec, pipe.params, pipe.tokenizer, "red circle")["text_encoder"]
    after = embeddings.load(runs["textual_inversion"] / FILES["textual_inversion"]).vectors["text_encoder"]
    length = lambda rows: np.linalg.norm(np.asarray(rows), axis=-1)  # noqa: E731
    began = np.asarray(before)[[0, len(before) // 2]]
    np.testing.assert_allclose(length(after), length(began), rtol=1e-5)
    assert np.abs(np.asarray(after) - began).max() > 1e-3


@pytest.mark.parametrize(
    ("method", "key", "value", "message"),
    [
        ("lora", "adapter.rank", 4000, "config.adapter.rank=4000: unet/.* wide and gives .* numbers: give 1 to"),
        ("lora", "adapter.algorithm", "glora", "config.adapter.algorithm='glora' is unknown: use lora, loha, lokr"),
        ("lora", "adapter.targets", ("nowhere",), "'nowhere' finds no linear or convolution of unet, text_encoder"),
        ("lora", "adapter.format", "pt", "config.adapter.format='pt' is unknown: use kohya or diffusers"),
        ("lora", "data.cache_text", True, "config.data.cache_text keeps what the text encoders say"),
        ("lora", "init", "", "config.model and config.init are both empty"),
        ("textual_inversion", "textual_inversion.tokens", (("a", 2, "circle"),), "'a' is a token of .* already: "),
        ("textual_inversion", "textual_inversion.tokens", ("<s>", 2, "circle"), r"give a \(word, vectors, words that"),
        ("textual_inversion", "textual_inversion.tokens", (("<s>", "2", "circle"),), r"give a \(word, vectors, words"),
        ("textual_inversion", "textual_inversion.tokens", (("<s>", 2, ""),), r"give a \(word, vectors, words that it"),
        ("textual_inversion", "textual_inversion.tokens", (), r"give a \(word, vectors, words that it starts as\)"),
        ("textual_inversion", "data.cache_text", True, "config.data.cache_text keeps what words say"),
        ("hypernetwork", "hypernetwork.activation", "relux", "config.hypernetwork: activation='relux' is unknown"),
        ("hypernetwork", "hypernetwork.dropout", (0, 0.3), r"config.hypernetwork: dropout=\(0, 0.3\): give as many"),
        ("hypernetwork", "hypernetwork.widths", (5,), "config.hypernetwork.widths=5: attentions read"),
        ("lcm_lora", "consistency.solver_steps", 7, "config.consistency.solver_steps=7: give a divisor of the 1000"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_compiled(
    base, tmp_path, monkeypatch, method, key, value, message
):
    config = config_of(method, base)
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises((ValueError, CheckpointError), match=message):
        train(config, tmp_path / "run")
