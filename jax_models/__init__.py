"""The models of vitcmp in JAX (flax.nnx); `torch_models/` tells the same models in PyTorch."""
