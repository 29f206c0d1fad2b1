import numpy as np
import torch
from onnx_graphs import kinds, run
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edge_dit_export.passes_onnx.transposes_to_gemm import transposes_to_gemm
from edge_dit_export.targets.onnx_model import onnx_model


class Products(torch.nn.Module):
    def forward(self, x, w, bias):
        return x @ w.t(), x.t() @ x, torch.addmm(bias, x, w.t()), x[None] @ w.t()


def exported():
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(5, 4, generator=generator),
        "w": torch.randn(3, 4, generator=generator),
        "bias": torch.randn(3, generator=generator),
    }
    model = onnx_model(Products(), inputs, ["forward", "gram", "linear", "batched"])
    return model, inputs


def test_values_stay_and_transposes_go():
    model, inputs = exported()
    before = run(model, inputs)
    assert (kinds(model).count("MatMul"), kinds(model).count("Gemm")) == (3, 1)
    assert transposes_to_gemm(model) == 3
    RemoveUnusedNodesPass()(model)
    for want, have in zip(before, run(model, inputs), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-6)
    # The product of a batch is no Gemm: its Transpose stays.
    assert (kinds(model).count("MatMul"), kinds(model).count("Gemm")) == (1, 3)
    assert kinds(model).count("Transpose") == 1
