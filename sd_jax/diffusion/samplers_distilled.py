"""Samplers for models distilled to answer with the clean picture at once."""


def lcm(denoise, x, state, at):
    """Multistep consistency sampling: Song et al. 2023 (arXiv 2303.01469), Algorithm 1; Luo et al. 2023 (2310.04378).

    Each step takes D as the picture and noises it anew: x' = D + sigma_next noise. Not a solver of the ODE, so without
    an order; 1 call a step, stochastic (s_noise 1). Equals ComfyUI's; diffusers mixes in a share of x below 1e-5.
    """
    denoised = denoise(x, at.sigma)
    return denoised + at.options.s_noise * at.sigma_next * at.noise[0], denoised, state
