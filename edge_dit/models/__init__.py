"""Diffusion Transformers on disk and in torch: families, checkpoints, the trainable sub-graph."""
