"""One module per target, and what they share.

trainer          what every session can do
graph            the session of targets whose programs have no state
onnx             plain ONNX; streamed runs it block by block
executorch       ExecuTorch programs
ort_training     onnxruntime-training artifacts; ort_checkpoint reads its checkpoints
int8             whether products in int8 are exact here
ort              imports onnxruntime and sets the options of its sessions
onnx_program     runs an ONNX graph on numpy arrays
mapped           memory-mapped frozen weights
state            checks of draws, adapters and states
"""
