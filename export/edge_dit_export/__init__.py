"""Turns a trainable sub-graph into artifacts that train without PyTorch.

trace               a function of tensors -> one flat ATen graph
blocks              a sub-graph's blocks and head as functions of tensors
train_step          sub-graph -> one flat ATen graph: loss and gradients
passes/             rewrites of that graph, one a file
onnx_model          torch module -> ONNX model
passes_onnx/        rewrites of ONNX models, one a file
xnnpack             frozen layers -> XNNPACK delegates
frozen              the file of frozen weights
onnx_target         plain ONNX: train_step, optimizer, patch_sampler
streamed_target     plain ONNX, one graph per kind of block
ort_training_target onnxruntime-training artifacts
executorch_target   ExecuTorch programs
optimizer           AdamW, written once, exported everywhere
export              a job and a plan -> a bundle
"""
