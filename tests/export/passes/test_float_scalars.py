import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes.float_scalars import float_scalars


def test_train_step_has_only_float_scalars_left():
    graph = train_step()
    before, after, count = rewrite(graph, float_scalars)
    assert count > 10
    assert before == after
    operations = [n for n in graph[0].graph.nodes if n.op == "call_function"]
    arithmetic = ("aten.add.", "aten.sub.", "aten.mul.Tensor", "aten.div.Tensor")
    arguments = [a for n in operations if str(n.target).startswith(arithmetic) for a in n.args]
    assert any(type(a) is float for a in arguments)
    assert not any(type(a) is int for a in arguments)


def test_whole_number_tensors_are_left():
    graph = trace(lambda x: (x * 3) + 1, torch.tensor([2, 3]))
    _, _, count = rewrite(graph, float_scalars)
    assert count == 0
    assert graph[0](torch.tensor([2, 3]))[0].dtype == torch.int64
