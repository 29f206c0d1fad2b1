"""Files on disk: read without trust, written whole.

files           atomic writes of files and folders
locks           one process at a time in a folder
remembered      what was computed from a file, while it is unchanged
documents       JSON files with a digest
tensors         safetensors files with digests
onnx_external   which other files an ONNX file refers to
"""
