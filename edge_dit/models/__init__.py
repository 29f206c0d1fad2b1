"""Diffusion Transformers on disk and in torch.

families/        what edge-dit knows of each kind of model
model            a diffusers pipeline folder, opened
components       which files of the folder are loaded
health           is the folder what it seems?
weights          its safetensors: headers and content
checkpoint       the transformer's weights, read lazily
pipeline         the whole pipeline in torch
objective        what a model is trained to predict
subgraph         the trained blocks, head and loss
quantize         frozen weights in float16, int8 or int4
int8_products    products with them in int8
rotation         frozen weights rotated first
public_configs   public checkpoints by name, without weights
"""
