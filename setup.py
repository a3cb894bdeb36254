"""Installation of sd_jax. `make test` and `make demo` call it; by hand: `pip install -e . -c constraints.txt`."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    # The stack itself. jax 0.10.2 is the newest one for Python 3.11; Python 3.12 and later get a newer one.
    "jax>=0.10.2",  # brings scipy, ml_dtypes (bfloat16 and float8 in weight files) and opt_einsum
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "transformers>=5",  # CLIP's tokenizer only; its Flax classes are gone since 5.0
    "datasets>=5",
    "numpy>=2.0",
    "pillow>=11,<13",  # common tools beside us (gradio, beam) refuse 13
    "ml-collections>=1.1",
    # Beyond the stack, each with its reason.
    "absl-py>=2.1",  # flags of the doors train.py and sample.py; ml-collections defines its config flags on it
    "tokenizers>=0.23",  # trains the byte-level BPE of models trained from nothing; transformers brings it anyway
    "tqdm>=4.66",  # progress bars; datasets and transformers bring it anyway
    "tensorboardX>=2.6.5",  # TensorBoard events without TensorFlow or torch
    "pyyaml>=6",  # the .yaml that A1111 keeps beside a checkpoint; transformers brings it anyway
    "jaxtyping>=0.3.11",  # shapes in signatures; checked only under the tests
]

EXTRAS_REQUIRE = {
    # CUDA 12 rather than 13: it runs on drivers from 525 on and GPUs from Maxwell on; CUDA 13 asks for drivers from 580
    # and GPUs from Turing on. Who has those may install "jax[cuda13]" instead: nothing here depends on the choice.
    "cuda": ["jax[cuda12]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "test": [
        "pytest>=9",
        "pytest-xdist>=3.8",  # two test files at a time: most tests compile, on one core
        "beartype>=0.22",  # checks every annotation while the tests run
        "ruff>=0.15",
        "safetensors>=0.8",  # what our own reader and writer of weight files are compared with
        "nbclient>=0.10",  # these three execute the notebooks
        "nbformat>=5.10",
        "ipykernel>=7",
    ],
    # Preparing data on several machines (`sd_jax.data.prepare --executor=ray`): scheduling and retries across them
    "prep": ["ray[data]>=2.60"],
    # References that the parity tests compare with. sd_jax itself never imports them. k-diffusion, open_clip, lycoris
    # and spandrel are four more: what they require (wandb, torchvision) is not wanted, so `make parity` installs them
    # with --no-deps.
    "parity": ["torch==2.13.0", "diffusers==0.42.1", "peft>=0.21", "accelerate>=1.15", "scikit-image>=0.26"],
}

setup(
    name="sd_jax",
    version="0.1.0",
    description="Stable Diffusion in JAX and Flax: training, fine-tuning, sampling and checkpoint conversion",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["sd_jax", "sd_jax.*"]),
    package_data={"sd_jax": [f"assets/**/*.{suffix}" for suffix in ("json", "txt", "safetensors", "md")]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
