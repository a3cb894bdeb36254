"""`config.method="dreambooth"`: a model learns one thing from a few pictures (Ruiz et al. 2023, arXiv 2208.12242).

All of `full`, with the paper's two means: the thing is called by a rare word beside the word of its class (captions, or
`config.data.prompt`: "a sks star"), and so that the class keeps its other members, pictures of it that the model itself
made before the run are mixed in (`config.prior.prompt`: "a star"). `config.prior.path=""` and `prompt=""` leave the
second out, at the class's cost: benchmarks/RESULTS.md. The same mixing, and the same words, serve `method="lora"`.
"""

from sd_jax.training import full

DREAMBOOTH = full.denoising(check=full.check)
