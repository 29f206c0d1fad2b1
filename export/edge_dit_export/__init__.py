"""Turns a trainable sub-graph into artifacts that train without PyTorch.

train_step          sub-graph -> one flat ATen graph: loss and gradients
passes/             one graph rewrite a file
onnx_target         plain ONNX: train_step, optimizer, patch_sampler
ort_training_target onnxruntime-training artifacts
executorch_target   ExecuTorch programs
optimizer           AdamW, written once, exported everywhere
export              a job and a plan -> a bundle
"""
