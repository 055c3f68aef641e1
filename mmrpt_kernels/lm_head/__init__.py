"""What the operators of the lm head share: the chunk loop, its matrix products, row kernels and gradients."""
