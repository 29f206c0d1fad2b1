"""Trains bundles: numpy and onnxruntime only (the ExecuTorch session aside), no torch.

session    what a loaded bundle can do; `open_session` picks the target
train      the loop over a bank: progress, checkpoints, resume, loss curve
verify     parity of every target with PyTorch (needs torch for the reference)
"""
