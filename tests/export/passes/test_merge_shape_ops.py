import pytest
import torch
from rewriting import rewrite, trace, train_step

from edge_dit_export.passes.merge_shape_ops import merge_shape_ops


def test_train_step():
    before, after, count = rewrite(train_step(), merge_shape_ops)
    assert (before["view"], before["permute"]) == (259, 228)
    assert after["view"] <= 185
    assert after["permute"] <= 141
    assert after["expand"] <= 2  # the mask's, over heads
    assert after["alias"] == 0
    assert count > 100


X = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.permute(2, 0, 1).permute(1, 2, 0) + 0, {}),
        (lambda x: x.view(6, 4).view(24).view(2, 3, 4) + 0, {}),
        (lambda x: x.expand(2, 3, 4).unsqueeze(1).view(2, 3, 4) + 0, {}),
        (lambda x: x.view(6, 4).view(4, 6) + 0, {"view": 1}),
        (lambda x: x.permute(1, 0, 2).permute(2, 1, 0) + 0, {"permute": 1}),
        # A permute that moves no data is a view.
        (lambda x: x.view(1, 24).permute(1, 0) + 0, {"view": 1}),
        # No single operation does these.
        (lambda x: x.view(6, 4).permute(1, 0) + 0, {"view": 1, "permute": 1}),
        (lambda x: x.permute(1, 0, 2).reshape(6, 4) + 0, {"permute": 1, "clone": 1, "_": 1}),
        # Within a longer chain, its tail is merged.
        (lambda x: x.view(6, 4).permute(1, 0).unsqueeze(0).view(4, 6) + 0,
         {"view": 1, "permute": 1}),
        (lambda x: x.unsqueeze(0).expand(2, 2, 3, 4) + 0, {"expand": 1, "_": 1}),
    ],
)  # fmt: skip
def test_chains(function, left):
    _, after, _ = rewrite(trace(function, X), merge_shape_ops)
    del after["add"]
    found = dict(after)
    if "_" in left:  # one view or unsqueeze more, whichever torch traced
        left = {name: n for name, n in left.items() if name != "_"}
        others = {
            n: found.pop(n) for n in list(found) if n in ("view", "_unsafe_view", "unsqueeze")
        }
        assert sum(others.values()) == 1
    assert found == left


def test_a_view_torch_could_not_take_is_not_made():
    # relu keeps its input's strides, so the two views cannot be one view of relu's result.
    graph = trace(lambda x: torch.relu(x.permute(2, 0, 1)).permute(1, 2, 0).view(6, 4) + 0, X)
    rewrite(graph, merge_shape_ops)
