"""torch on the host: PyTorch's own training step, precompute, held-out loss, full LoRA."""
