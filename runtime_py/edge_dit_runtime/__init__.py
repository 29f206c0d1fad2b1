"""Trains bundles on the device: numpy and onnxruntime only, no torch (but for ExecuTorch).

    import edge_dit_runtime as er

    bundle = er.open(Path("bundle"))
    run = er.train(Path("bundle"), Path("bank"), Path("run"))
    er.save_lora(Path("run"), Path("lora"))

Names are imported when they are first used: importing this package costs nothing.

    session      opens a target: a `Session` that steps, and the patch sampler
    train        the loop over a bank: progress, checkpoints, resume
    run_folder   what a run keeps on disk; loss_plot: its picture
    measure      what parity compares, in a process of its own
"""
