"""Rewrites of ONNX graphs, one a file; each edits the model in place.

For the plain ONNX target:

    transposes_to_gemm       transposed factors of a product
    weights_in_fewer_bytes   weights as float16, int8 or int4 inputs

For onnxruntime-training:

    cast_like_to_cast, complete_layer_norm, partial_split_to_slice   what has no gradient there
    conv1x1_to_matmul, depthwise_grad_to_conv                        what is slow there
    expand_clip_grad_norm                                            a norm that is not reproducible
    rate_of_b                                                        a learning rate of LoRA B's own
"""
