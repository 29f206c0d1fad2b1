"""Turns a trainable sub-graph into artifacts that train without PyTorch.

export         a plan -> a bundle
graph/         sub-graph and optimizer -> flat graphs of core ATen calls
passes/        rewrites of those graphs
targets/       one exporter per target, and what they share
passes_onnx/   rewrites of ONNX graphs
"""
