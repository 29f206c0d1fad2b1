"""One exporter per target, each with ``write(source, directory)``, and what they share.

onnx            plain ONNX; streamed is its block by block layout
ort_training    onnxruntime-training artifacts
executorch      ExecuTorch programs
loop            the loop's parts; loop_source is what they are exported from
source          what every target is exported from
frozen          the file of frozen weights
onnx_model      a torch module -> an ONNX model
xnnpack         delegates calls of a graph to XNNPACK; xnnpack_graph writes their programs
"""
