"""Stable Diffusion in JAX and Flax."""
