"""From a sub-graph or an optimizer to one flat graph of core ATen calls.

trace          a function of tensors -> a flat graph
blocks         each block, and the head, as functions of tensors
parts          what is before and after the blocks, and the autoencoder, likewise
train_step     the whole training step as a flat graph
optimizer      AdamW as a flat graph
flat_program   a flat graph -> torch's ExportedProgram
"""
