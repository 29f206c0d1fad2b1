"""torch on the host: precompute, PyTorch's own training step, held-out loss, full LoRA."""
