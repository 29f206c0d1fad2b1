"""Rewrites of ONNX graphs, one a file; each edits the model in place."""
