"""Which kernels a target makes of a model, and why not others."""
