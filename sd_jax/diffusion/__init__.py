"""The mathematics. A model is only a function `denoise(x, sigma) -> x0`."""
