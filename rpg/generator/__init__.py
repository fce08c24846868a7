"""The generator: condition, recurrent network, denoiser, diffusion and solvers, saved and loaded as one."""
