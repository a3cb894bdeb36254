"""A tiny random StableDiffusionPipeline of diffusers, saved as people's checkpoints are: what parity tests load."""

import json
import warnings
from pathlib import Path

from tests.reference import diffusers

MARKS = ("<|startoftext|>", "<|endoftext|>")


def tiny_tokenizer(folder: str | Path) -> Path:
    """CLIP's byte-level form with three merges: 517 tokens, the marks last. Needs no package to be written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = ["t h", "th e</w>", "r e"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in merges), *MARKS]
    marks = {"bos_token": MARKS[0], "eos_token": MARKS[1], "pad_token": MARKS[1], "unk_token": MARKS[1]}
    settings = {**marks, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(marks), encoding="utf-8")
    return folder


def tiny_diffusers_pipeline(folder: str | Path, dtype: str = "float32", save: dict | None = None, **overrides):
    """Builds the pipeline, saves it into `folder` with `save_pretrained(**save)` and returns it.

    overrides: `unet=`, `vae=`, `text_encoder=`, `scheduler=`, each a dict of config keys. Every parameter is random,
    norms and biases too. Skips the test where torch, diffusers or transformers is not installed.
    """
    library = diffusers()
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers import CLIPTokenizer

        folder = Path(folder)
        tokenizer = CLIPTokenizer.from_pretrained(tiny_tokenizer(folder / "tokenizer"))
        config = lambda part, **defaults: {**defaults, **overrides.get(part, {})}  # noqa: E731
        unet = library.UNet2DConditionModel(
            **config(
                "unet",
                sample_size=8,
                block_out_channels=(32, 64),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                attention_head_dim=2,
                cross_attention_dim=32,
                norm_num_groups=8,
            )
        )
        vae = library.AutoencoderKL(
            **config(
                "vae",
                sample_size=32,
                block_out_channels=(16, 16, 32),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                layers_per_block=1,
                norm_num_groups=8,
                latent_channels=4,
            )
        )
        text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                **config(
                    "text_encoder",
                    vocab_size=len(tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    bos_token_id=len(tokenizer) - 2,
                    eos_token_id=len(tokenizer) - 1,
                    pad_token_id=len(tokenizer) - 1,
                )
            )
        )
        scheduler = library.PNDMScheduler(
            **config(
                "scheduler",
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                steps_offset=1,
            )
        )
        generator = torch.Generator().manual_seed(0)
        for part in (unet, vae, text_encoder):
            part.eval()
            for name, parameter in part.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.data = centre + 0.1 * torch.randn(parameter.shape, generator=generator)
            part.to(getattr(torch, dtype))
        pipeline = library.StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder, **(save or {}))
    return pipeline
