"""A pipeline with adapters on is another one; strengths compile nothing; merged weights make the same picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.adapters import hypernetwork, lora
from sd_jax.adapters.textual_inversion import Embedding
from sd_jax.checkpoints import CheckpointError, embeddings, hypernetworks
from sd_jax.checkpoints.adapters import save_adapter
from sd_jax.sampling import adapters
from sd_jax.sampling.pipeline import Pipeline
from tests.adapters.shapes import shapes_of
from tests.sampling.conftest import ONE_LEVEL, random_params

FEW = {"steps": 2, "width": 16, "height": 16, "guidance_scale": 2.0, "seed": 3}


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return Pipeline(ONE_LEVEL, random_params(ONE_LEVEL), tokenizer)


@pytest.fixture(scope="module")
def layers(pipe):
    patterns = ("unet/.*attn", "text_encoder/.*q_proj$")
    made = lora.init(jax.random.key(0), lora.targets_of(shapes_of(pipe.params), patterns, 2, 4.0))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)  # noqa: E731
    trained, fixed = lora.split(made)
    return lora.join(jax.tree.map(draw, trained), fixed)


def draw(pipe, **fields):
    return pipe.text_to_image("a red circle", output="latents", **{**FEW, **fields})


def test_merged_is_hooked_and_the_first_pipeline_stays(pipe, layers):
    before = draw(pipe)
    on = pipe.with_adapter(layers, 0.8)
    hooked, merged = draw(on), draw(on.merge_adapters())
    assert np.abs(hooked - before).max() > 0.01
    np.testing.assert_allclose(hooked, merged, atol=1e-5 * np.abs(merged).max())
    assert not pipe.adapters and not on.merge_adapters().adapters
    np.testing.assert_array_equal(draw(pipe), before)
    back = on.merge_adapters().with_adapter(layers, -0.8).merge_adapters()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back.params, pipe.params)


def test_strengths_and_other_weights_compile_nothing(pipe, layers):
    draw(pipe.with_adapter(layers, 1.0))
    other = jax.tree.map(lambda leaf: leaf * 0.5, layers)
    with jax.log_compiles(False), _counted() as compiled:
        half = draw(pipe.with_adapter(layers, 0.5, text_strength=0.25))
        draw(pipe.with_adapter(other, -2.0))
    assert not compiled
    assert np.abs(half - draw(pipe.with_adapter(layers, 1.0))).max() > 1e-3


class _counted:
    """The programs that XLA compiles meanwhile."""

    def __enter__(self):
        self.names, self.on = [], True
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self.names

    def _hear(self, event, seconds, **_):
        if self.on and event.endswith("backend_compile_duration"):
            self.names.append(event)

    def __exit__(self, *exception):
        self.on = False


def test_the_unet_and_the_text_encoder_apart(pipe, layers):
    text = pipe.with_adapter(layers, 0.0, text_strength=1.0)
    both = pipe.encode_prompts(["a red circle"]).context, text.encode_prompts(["a red circle"]).context
    assert float(jnp.abs(both[0] - both[1]).max()) > 1e-4
    told = pipe.encode_prompts(["a red circle"])
    latents, times = jnp.ones((1, 4, 4, pipe.spec.vae.latent_channels)), jnp.array([500.0])
    np.testing.assert_array_equal(text.predict(latents, times, told), text.predict(latents, times, told))
    unet = pipe.with_adapter(layers, 1.0, text_strength=0.0)
    np.testing.assert_allclose(unet.encode_prompts(["a red circle"]).context, both[0], atol=1e-6)
    assert float(jnp.abs(unet.predict(latents, times, told) - pipe.predict(latents, times, told)).max()) > 0.01


def test_two_at_once_are_one_after_the_other_merged(pipe, layers):
    second = jax.tree.map(lambda leaf: -0.5 * leaf, layers)
    on = pipe.with_adapter(layers, 0.6).with_adapter(second, 0.9)
    np.testing.assert_allclose(draw(on), draw(on.merge_adapters()), atol=2e-5 * np.abs(draw(on)).max())


def test_a_strength_that_changes_on_the_way(pipe, layers):
    never = draw(pipe.with_adapter(layers, 0.0, 0.0))
    late = pipe.with_adapter(layers, [(0.0, 0.0), (0.5, 1.0)], text_strength=0.0)
    seen = []
    draw(late, callback=lambda step, x, denoised: seen.append(np.asarray(denoised)))
    plain = []
    draw(pipe.with_adapter(layers, 0.0, 0.0), callback=lambda step, x, denoised: plain.append(np.asarray(denoised)))
    np.testing.assert_allclose(seen[0], plain[0], atol=1e-6)
    assert np.abs(seen[1] - plain[1]).max() > 1e-3 and np.isfinite(never).all()
    with pytest.raises(ValueError, match="cannot be merged into weights"):
        late.merge_adapters()


@pytest.mark.parametrize(
    ("schedule", "calls", "expected"),
    [
        (0.5, 2, [0.5, 0.5]),
        ([(0.0, 1.0), (0.5, 0.0)], 4, [1, 1, 0, 0]),
        ([(0.0, 0.2), (0.3, 0.4), (0.9, 1.0)], 10, [0.2] * 3 + [0.4] * 6 + [1.0]),
    ],
)
def test_strength_at_each_call(schedule, calls, expected):
    np.testing.assert_allclose(adapters.at_calls(schedule, calls), expected)


def test_blocks_have_strengths_of_their_own(pipe, layers):
    on = pipe.with_adapter(layers, 1.0, blocks={"unet/down_blocks": 0.0, "unet/": 0.5, "text": 0.0})
    halved = {
        "unet": {path: entry for path, entry in layers["unet"].items() if not path.startswith("down_blocks")},
    }
    np.testing.assert_allclose(draw(on), draw(pipe.with_adapter(halved, 0.5)), atol=1e-5)
    with pytest.raises(ValueError, match="blocks='nowhere' finds no layer of this adapter, such as unet/"):
        pipe.with_adapter(layers, blocks={"nowhere": 1.0})


def test_files_are_told_by_what_they_hold(pipe, layers, tmp_path):
    save_adapter(tmp_path / "style.safetensors", layers, pipe.spec)
    from_file = pipe.with_adapter(tmp_path / "style.safetensors", 0.8)
    np.testing.assert_allclose(draw(from_file), draw(pipe.with_adapter(layers, 0.8)), atol=1e-6)
    width = pipe.spec.text_encoder.hidden_size
    rows = np.random.default_rng(0).normal(0, 5, (2, width)).astype(np.float32)
    folder = tmp_path / "words"
    folder.mkdir()
    embeddings.save(folder / "zorp.safetensors", Embedding("zorp", {"text_encoder": rows}))
    word = pipe.with_adapter(folder)
    assert word.tokenizer.token_ids("zorp") == [pipe.tokenizer.vocab_size, pipe.tokenizer.vocab_size + 1]
    made = word.text_to_image("a zorp", output="latents", **FEW)
    assert np.isfinite(made).all() and np.abs(made - pipe.text_to_image("a zorp", output="latents", **FEW)).max() > 1e-4


def test_hypernetworks_stay_on_when_others_are_merged(pipe, layers):
    network = hypernetwork.init(jax.random.key(0), [pipe.spec.unet.cross_attention_dim], weight_init="xavier_normal")
    on = pipe.with_adapter(network, 0.7)
    assert np.abs(draw(on) - draw(pipe)).max() > 1e-3
    both = on.with_adapter(layers)
    assert len(both.merge_adapters().adapters) == 1
    np.testing.assert_allclose(draw(both), draw(both.merge_adapters()), atol=2e-5 * np.abs(draw(both)).max())


def test_what_is_refused(pipe, layers, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        pipe.with_adapter(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="give a number, or"):
        pipe.with_adapter(layers, [(0.5, 1.0)], text_strength=1.0)
    with pytest.raises(ValueError, match="give text_strength= as well"):
        pipe.with_adapter(layers, [(0.0, 1.0)])
    with pytest.raises(ValueError, match="give finite numbers"):
        pipe.with_adapter(layers, 1.0, text_strength=float("nan"))
    with pytest.raises(ValueError, match="is on: save what merge_adapters"):
        pipe.with_adapter(layers).save(tmp_path / "out")


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), [(0.0, float("nan"))]])
def test_a_strength_is_a_number(pipe, layers, strength):
    with pytest.raises(ValueError, match="^strength=.*: give a number, or"):
        pipe.with_adapter(layers, strength, text_strength=1.0)


def test_a_hypernetwork_of_another_family(pipe, tmp_path):
    other = hypernetwork.init(jax.random.key(0), [16, 768])
    hypernetworks.save(tmp_path / "other.pt", jax.device_get(other))
    with pytest.raises(CheckpointError, match=r"other\.pt: a hypernetwork for states that are 768 wide, .* 16, 32: "):
        pipe.with_adapter(tmp_path / "other.pt")


def test_a_folder_of_embeddings_holds_nothing_else(pipe, layers, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter and no embeddings in it"):
        pipe.with_adapter(tmp_path)
    rows = np.ones((1, pipe.spec.text_encoder.hidden_size), np.float32)
    embeddings.save(tmp_path / "zorp.safetensors", Embedding("zorp", {"text_encoder": rows}))
    (tmp_path / "notes.txt").write_text("of no concern")
    assert pipe.with_adapter(tmp_path).tokenizer.token_ids("zorp") == [pipe.tokenizer.vocab_size]
    save_adapter(tmp_path / "style.safetensors", layers, pipe.spec)
    with pytest.raises(CheckpointError, match=r"style\.safetensors: no embedding .* remove this file from it$"):
        pipe.with_adapter(tmp_path)
    (tmp_path / "style.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"style\.safetensors: .* remove this file from it$"):
        pipe.with_adapter(tmp_path)


def test_an_embedding_of_another_width(pipe, tmp_path):
    rows = np.ones((1, 768), np.float32)
    embeddings.save(tmp_path / "zorp.safetensors", Embedding("zorp", {"text_encoder": rows}))
    with pytest.raises(ValueError, match=r"'zorp' is for SD 1 \(text_encoder 768 wide\), but this model is .* 32 wide"):
        pipe.with_adapter(tmp_path / "zorp.safetensors")
