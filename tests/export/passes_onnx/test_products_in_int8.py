"""Products in int8 in ONNX: what onnxruntime computes of them, and the graph without rounding."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import kinds, run

from edge_dit.models.int8_products import frozen_product
from edge_dit.models.quantize import to_int8
from edge_dit_export.graph.trace import trace
from edge_dit_export.passes_onnx.products_in_int8 import share_quantised
from edge_dit_export.passes_onnx.weights_in_fewer_bytes import weights_in_fewer_bytes
from edge_dit_export.passes_onnx.without_rounding import without_rounding
from edge_dit_export.targets.onnx_model import onnx_model


def exported(function, **inputs):
    """The model of a function of named tensors; its input "w" is stored as int8."""
    module = trace(lambda tensors: function(**tensors), inputs)
    model = onnx_model(module, inputs, ["y"])
    weights_in_fewer_bytes(model, {"w": "int8"})
    share_quantised(model)
    return model


def feeds(w, **others):
    values, scale = to_int8(w)
    return {**others, "w": values, "w.scale": scale}


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 70), st.integers(1, 20), st.booleans()
)
@settings(max_examples=25, deadline=None)
def test_onnxruntime_computes_the_same_bits_as_torch(seed, rows, inputs, outputs, back):
    x, w = numbers(seed, rows, outputs if back else inputs), numbers(seed + 1, outputs, inputs)
    model = exported(lambda x, w: frozen_product(x, w, back), x=x, w=w)
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= set(kinds(model))
    (found,) = run(model, feeds(w, x=x))
    np.testing.assert_array_equal(found, frozen_product(x, w, back))


def test_a_kernel_of_a_convolution_is_reshaped_as_int8():
    x, w = numbers(0, 6, 5), numbers(1, 4, 5, 1, 1)
    model = exported(lambda x, w: frozen_product(x, w.flatten(1), False), x=x, w=w)
    (found,) = run(model, feeds(w, x=x))
    np.testing.assert_array_equal(found, frozen_product(x, w.flatten(1), False))


def test_an_activation_is_quantised_once():
    x, w = numbers(0, 6, 4), numbers(1, 4, 4)

    def twice(x, w):
        return frozen_product(x, w, False) + 2 * frozen_product(x, w, False)

    model = exported(twice, x=x, w=w)
    assert kinds(model).count("DynamicQuantizeLinear") == 1
    np.testing.assert_allclose(run(model, feeds(w, x=x))[0], twice(x, w), rtol=1e-6, atol=1e-6)


def test_no_weight_is_dequantised_beside_products():
    """Onnxruntime would keep turned copies of all int8 weights then."""
    x, w, v = numbers(0, 6, 5), numbers(1, 4, 5), numbers(2, 3, 4)
    inputs = {"x": x, "w": w, "v": v}
    module = trace(lambda t: frozen_product(t["x"], t["w"], False) @ t["v"].T, inputs)
    model = onnx_model(module, inputs, ["y"])
    weights_in_fewer_bytes(model, {"w": "int8", "v": "int8"})
    share_quantised(model)
    assert "DequantizeLinear" not in kinds(model)
    values, scale = to_int8(v)
    (found,) = run(model, {**feeds(w, x=x), "v": values, "v.scale": scale})
    want = frozen_product(x, w, False) @ (values * scale[:, None]).T
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def both_ways(x, w):
    return frozen_product(frozen_product(x, w, False).sin(), w, True)


def test_without_rounding_it_is_the_product_in_float():
    x, w = numbers(0, 6, 5), numbers(1, 4, 5)
    model = exported(both_ways, x=x, w=w)
    rounded = run(model, feeds(w, x=x))[0]
    assert without_rounding(model) == 2
    assert not {"DynamicQuantizeLinear", "MatMulInteger"} & set(kinds(model))
    values, scale = to_int8(w)
    exact = (values * scale[:, None]).double()
    want = (x.double() @ exact.T).sin() @ exact
    np.testing.assert_allclose(run(model, feeds(w, x=x))[0], want, rtol=1e-4, atol=1e-5)
    assert np.abs(rounded - want.numpy()).max() > 1e-3


def _another_zero(model, node):
    zero = ir.val("zero", const_value=ir.tensor(np.uint8(3), name="zero"))
    model.graph.register_initializer(zero)
    node.replace_input_with(2, zero)


def _another_activation(model, node):
    other = ir.node("DynamicQuantizeLinear", [model.graph.inputs[0]], num_outputs=3)
    model.graph.insert_before(node, other)
    node.replace_input_with(0, other.outputs[0])


def _no_zero(model, node):
    node.resize_inputs(2)


@pytest.mark.parametrize("damage", [_another_zero, _another_activation, _no_zero])
def test_a_product_that_rounds_otherwise_is_refused(damage):
    model = exported(both_ways, x=numbers(0, 6, 5), w=numbers(1, 4, 5))
    products = [node for node in model.graph if node.op_type == "MatMulInteger"]
    damage(model, products[1])
    with pytest.raises(ValueError, match=r"reads|no quantised"):
        without_rounding(model)
