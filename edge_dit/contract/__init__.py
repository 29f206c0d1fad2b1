"""What host and device agree on.

targets       the targets: layouts, dtypes, files and tolerances of each
graphs        names of a graph's arguments and results
loop          what makes draws of pictures on the device, and paints
names         names of tensors; which file names are allowed
bundle        the exported folder and its manifest
bank          the stored draws
noise         random numbers that every language can draw
objective     what a model learns, and at which noise levels
split         numbers of trained and skipped blocks
adapter       LoRA files; adapter_formats, adapter_names: as other tools read them
adamw         the optimizer's formula and hyper-parameters
certificate   how far each target is from PyTorch
integrity     whether a bundle's files are those of its manifest
"""
