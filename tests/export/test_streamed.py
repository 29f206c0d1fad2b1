"""The streamed layout: one graph per kind of block, weights as inputs, float32 or fewer bytes."""

import onnx
import pytest
import torch

import bundles
import tiny
from edge_dit.app.verify import verify
from edge_dit.contract.targets import FROZEN
from edge_dit.errors import BadInput
from edge_dit.models.quantize import round_frozen
from edge_dit.models.subgraph import lora_name
from edge_dit_runtime.session import open_session


@pytest.fixture(
    scope="module", params=[("flux-dev", "int8"), ("sana-1.5", "float16"), ("sd3.5-medium", "int4")]
)
def streamed(request, tmp_path_factory):
    variant, dtype = request.param
    sub, batch = bundles.made_variant(variant, "across")
    folder = tmp_path_factory.mktemp("streamed")
    facts = bundles.streamed(folder, (sub, batch), dtype)
    return folder, sub, batch, facts, dtype


def test_gradients_are_eagers_with_the_same_rounded_weights(streamed):
    folder, sub, batch, facts, dtype = streamed
    exact = tiny.eager(sub, batch)
    round_frozen(sub, dtype)
    want = tiny.eager(sub, batch)
    found = bundles.streamed_gradients(folder, (sub, batch), facts)
    tiny.assert_close(want, found, 1e-5)
    assert not torch.equal(want["loss"], exact["loss"])  # rounding did change the model


def test_blocks_of_one_kind_share_their_graphs(streamed):
    folder, sub, _, facts, _ = streamed
    assert [block["name"] for block in facts["blocks"]] == sub.order
    kinds = {block["kind"] for block in facts["blocks"]}
    files = {path.name for path in (folder / "onnx").glob("*.onnx")}
    wanted = {f"block.{kind}.{way}.onnx" for kind in kinds for way in ("forward", "backward")}
    assert files == {*wanted, "head.onnx"} == set(facts["graphs"])
    named = [name for block in facts["blocks"] for name in block["lora"].values()]
    assert sorted(named) == sorted(sub.lora_parameters())


def test_graphs_hold_no_weights_and_standard_operators_only(streamed):
    folder, _, _, facts, _ = streamed
    for file in facts["graphs"]:
        model = onnx.load(folder / "onnx" / file)
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain for entry in model.opset_import} == {""}
        # Constants are shapes, scalars and the like; a weight would be larger.
        assert sum(len(i.raw_data) for i in model.graph.initializer) < 20_000


def test_int8_weights_are_widened_once_for_each_reader_and_late(streamed):
    folder, _, _, facts, dtype = streamed
    if dtype != "int8":
        pytest.skip("int8 only")
    for file in facts["graphs"]:
        graph = onnx.load(folder / "onnx" / file).graph
        inputs = {value.name for value in graph.input}
        producers = {name: node for node in graph.node for name in node.output}
        wide = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        for node in wide:
            assert sum(node.output[0] in other.input for other in graph.node) == 1
        late = [node for node in wide if node.input[1] not in inputs]
        assert all(producers[node.input[1]].op_type == "Add" for node in late)
        if "block" in file:
            assert len(late) > len(wide) / 2


SMALL = {"int8": 0.4, "int4": 0.3}
"""How weights are stored -> most of the bytes in float32 that the road's frozen weights take."""


@pytest.fixture(scope="module", params=SMALL)
def small_road(request, road, tmp_path_factory):
    """The road's plan with small weights, exported to onnx."""
    from edge_dit_export.export import export

    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    return export(road.plan.model_copy(update={"weights": request.param}), folder, ["onnx"])


def test_a_bundle_with_small_weights_is_certified_and_trains(road, small_road, tmp_path):
    from edge_dit_runtime.training import train

    folder = small_road.folder
    assert small_road.layouts("onnx") == ["streamed"]
    certificate = verify(folder, road.bank, steps=5)
    assert certificate.passed, certificate.targets
    run = train(folder, road.bank, tmp_path / "run", steps=3)
    assert (run.done, run.layout) == (3, "streamed")
    small = sum(p.stat().st_size for p in folder.rglob(FROZEN))
    large = sum(p.stat().st_size for p in (road.bundle / "onnx").rglob(FROZEN))
    assert small < SMALL[small_road.dtype("onnx")] * large


def test_a_layout_that_is_not_there_is_refused(small_road):
    with pytest.raises(BadInput, match="no layout 'fused'"):
        open_session(small_road, "onnx", "fused")


def test_a_run_goes_on_in_the_layout_it_was_started_with(road, tmp_path):
    from edge_dit_runtime.training import train

    folder = tmp_path / "run"
    stop = lambda done, _: done == 2  # noqa: E731
    train(road.bundle, road.bank, folder, target="onnx:streamed", steps=4, on_step=stop)
    with pytest.raises(BadInput, match="streamed"):
        train(road.bundle, road.bank, folder, target="onnx:fused", resume=True)
    resumed = train(road.bundle, road.bank, folder, target="onnx", resume=True)
    assert (resumed.layout, resumed.done) == ("streamed", 4)


def test_names_of_lora_are_diffusers(streamed):
    _, _, _, facts, _ = streamed
    block = facts["blocks"][0]
    for local, name in block["lora"].items():
        assert name == lora_name(f"{block['name']}.{local}")
