"""What sample.py is told besides the fields of a recipe, in words: the text of its flags."""

LOADING = {  # what the model is loaded with
    "checkpoint": "A workdir, a diffusers folder, a single file or a hub name; none = the bundled model.",
    "dtype": "Of weights and computation: float32, bfloat16 or float16.",
    "tokenizer": "A folder or hub name, for files without one.",
    "vae": "Another checkpoint to take the autoencoder from, which may be a tiny one.",
    "text_encoder": "Another checkpoint to take the text encoders from, or two: FIRST,SECOND.",
    "weights": "ema: the averaged weights; ema:0.999: another average; raw: those of the last step.",
    "config": "The .yaml that describes a single file; none = that beside it.",
    "prediction_type": "What the U-Net predicts: epsilon, v_prediction, ...; none = what the checkpoint says.",
    "refiner": "Another checkpoint, which walks the last steps.",
    "enlarger": "ESRGAN or Real-ESRGAN, which enlarges before a picture is drawn again in its larger size.",
    "clip": "A CLIP, which guides as far as clip_guidance_scale says, or chooses as best_of says.",
}
INPUTS = {  # what a command is given besides
    "mask": "White where the picture is redrawn; of its size.",
    "depth": "For models that see depth: a map of it, bright where it is near.",
    "recipe": "A picture to make again, of ours or of A1111.",
    "grid": "Up to three axes: field=value,value;field=first-last (+step).",
    "prompts_file": "A prompt a line.",
    "embeddings": "A file of textual inversion, or a folder of them: words that prompts may say.",
    "image_encoder": "The CLIP that IP-Adapters see through; none = the folder image_encoder beside their file.",
    "adapter_folder": "Where <lora:name:0.8> in a prompt finds its file.",
}
