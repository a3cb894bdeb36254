"""The first step of a LoRA: gradients, and what AdamW makes of them, against peft on diffusers' U-Net."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sd_jax
from sd_jax.adapters import lora
from sd_jax.adapters.hooks import hooked
from sd_jax.checkpoints import keys_peft
from sd_jax.types import Conditioning
from tests.reference_families import saved_family

pytestmark = pytest.mark.parity
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
RATE = 1e-3


def test_the_first_step_is_that_of_peft():
    torch = pytest.importorskip("torch")
    from peft import LoraConfig

    folder, pipeline = saved_family("sd15")
    unet, rng = pipeline.unet, np.random.default_rng(0)
    x, target = (rng.normal(size=(2, 8, 8, 4)).astype(np.float32) for _ in range(2))
    context = rng.normal(size=(2, 5, 48)).astype(np.float32)
    times = np.array([20, 700])

    # Theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=2.0, target_modules=TARGETS), "first")
    try:
        named = {n.replace(".first", ""): p for n, p in unet.named_parameters() if "lora_" in n}
        optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.0)
        nchw = lambda array: torch.from_numpy(array.transpose(0, 3, 1, 2).copy())  # noqa: E731
        answer = unet(nchw(x), torch.from_numpy(times), torch.from_numpy(context)).sample
        ((answer - nchw(target)) ** 2).mean().backward()
        before = {name: p.detach().numpy().copy() for name, p in named.items()}
        gradients = {name: p.grad.numpy().copy() for name, p in named.items()}
        optimizer.step()
        after = {name: p.detach().numpy().copy() for name, p in named.items()}
    finally:
        unet.delete_adapters("first")

    # Ours
    pipe = sd_jax.load(folder)
    table, layers = keys_peft.read_names(pipe.spec), {}
    for name, array in before.items():
        module, which = name.split(".lora_")
        entry = layers.setdefault(table[f"unet.{module}"].path, {"alpha": jnp.float32(2)})
        entry["lora_down" if which[0] == "A" else "lora_up"] = jnp.asarray(array)
    trained, fixed = lora.split({"unet": layers})

    @jax.jit
    @jax.grad
    def gradient(trained):
        on = hooked(pipe.networks, [(lora.join(trained, fixed), jnp.float32(1))])
        told = Conditioning(jnp.asarray(context))
        answer = on.unet.apply({"params": pipe.params["unet"]}, jnp.asarray(x), jnp.asarray(times, jnp.float32), told)
        return jnp.mean((answer - jnp.asarray(target)) ** 2)

    found = gradient(trained)
    adam = optax.adamw(RATE, weight_decay=0.0)
    updates, _ = adam.update(found, adam.init(trained), trained)
    stepped = optax.apply_updates(trained, updates)
    largest = max(np.abs(g).max() for g in gradients.values())
    assert largest > 0
    for tree, reference, tolerance in ((found, gradients, 1e-5 * largest), (stepped, after, 1e-5)):
        flat = lora.join(tree, fixed)["unet"]
        for name, array in reference.items():
            module, which = name.split(".lora_")
            ours = np.asarray(flat[table[f"unet.{module}"].path]["lora_down" if which[0] == "A" else "lora_up"])
            if tree is stepped:  # Adam divides by the root of the square: what is rounding may have either sign
                sure = np.abs(gradients[name]) > 1e-4 * largest
                ours, array = ours[sure], array[sure]
            np.testing.assert_allclose(ours, array, atol=tolerance)
