"""Torch on the host: precompute, and what training is compared with.

precompute      fills a bank
eager           PyTorch's own training step
recording       the steps of a scheduler, written down
kinks           moves LoRA weights away from places where a gradient jumps
evaluate        held-out loss of an adapter
full_lora       LoRA on all blocks at full resolution
contact_sheet   pictures of several prompts and seeds on one sheet
"""
