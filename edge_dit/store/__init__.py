"""Files: read without trust, written whole. Documents (JSON), tensors (safetensors), locks."""
