"""The loop on the device: photographs in, adapter and pictures out; numpy, Pillow and onnxruntime.

parts      the graphs of `edge_dit.contract.loop`, with their weights mapped
starts     a draw on its way to the first trained block
collect    pictures -> bank, as `edge_dit.reference.precompute` makes it
live       pictures -> draws just in time, without a bank
paint      prompt and adapter -> picture
previews   pictures painted while training
"""
