"""edge-dit: personalise Diffusion Transformers on the device their user owns.

The host side. Importing this package needs neither torch nor onnx nor executorch; each module that
needs one imports it itself.

    errors      what goes wrong, said once and clearly
    job         job.toml
    plan        which blocks to train, at which sizes
    sampler     crop geometry of the dynamic patch (numpy); patch_sampler: the same in torch
    images      image folders and captions
    bank        stored draws
    bundle      the exported folder and its manifest
    families    what is known of each Diffusion Transformer
    subgraph    the trainable middle of a model, as a torch module
    precompute  fills a bank
    adapter     LoRA files
    reference   PyTorch's own training step, what exports are held against
    evaluate    held-out loss and pictures; quickstart: the whole road
"""

__version__ = "0.1.0"
