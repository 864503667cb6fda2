"""The models of vitcmp in PyTorch; `jax_models/` tells the same models in JAX (flax.nnx)."""
