"""Parity of targets that multiply in int8 (`edge_dit.models.int8_products`).

A value between two levels is rounded up on one machine and down on another, because float32 sums
differ in their last bits. Each such value changes the next sums, and after some blocks two right
computations differ by about as much as rounding costs at all. So two things are compared:

- The graphs as they would be without rounding, with PyTorch in float32, within the limits of every
  other target (`unrounded`). ExecuTorch's programs cannot be rewritten so.
- The graphs as they are, with PyTorch that rounds the same way (`rounded`): all gradients of a step
  together. Their limit is that of their kind plus `TIMES` what a nudge of the entry state in its
  last bits moves PyTorch's own result by.

What int8 costs is no question of parity; the certificate states it (`Drift`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import ADAPTER, MANIFEST, Bundle, open_bundle
from edge_dit.contract.certificate import Difference, Drift, differences
from edge_dit.contract.targets import TARGETS, OnnxFacts
from edge_dit.errors import BadInput, require
from edge_dit_runtime.measure import Point, measure, replayed

if TYPE_CHECKING:
    from edge_dit.models.subgraph import TrainableSubgraph
    from edge_dit.planning.plan import Plan

TIMES = 4
"""How often what a nudge moves is allowed."""
NUDGE = 2e-6
"""Relative size of the nudge: just above what float32 rounding does."""
SAME = {"inputs": "gradients", "gradients": "gradients"}
"""Kinds that are the same quantity at several draws: what moves it most at one of them counts."""
Tensors = Mapping[str, np.ndarray]


@contextmanager
def unrounded(bundle: Bundle, target: str) -> Iterator[Bundle]:
    """The same bundle with graphs that do not round, in a folder for as long as this lasts.

    Args:
        bundle: opened.
        target: plain ONNX.

    Raises:
        BadInput: a graph rounds in another way than an export does.
    """
    require("onnx_ir", "the parity of products in int8")
    facts = cast(OnnxFacts, bundle.facts(target))
    graphs = {*facts.graphs, *(facts.streamed.graphs if facts.streamed else ())}
    with tempfile.TemporaryDirectory(dir=_place(bundle.folder)) as temporary:
        folder = Path(temporary)
        (folder / target).mkdir()
        files = [path for path in (bundle.folder / target).iterdir() if path.name not in graphs]
        for path in [bundle.folder / MANIFEST, bundle.folder / ADAPTER, *files]:
            _same_file(path, folder / path.relative_to(bundle.folder))
        for name in graphs:
            _rewrite(bundle.file(target, name), folder / target / name)
        yield open_bundle(folder)


def _place(folder: Path) -> Path | None:
    """Beside a bundle, where files can be linked; else where temporary files go."""
    return folder.parent if os.access(folder.parent, os.W_OK) else None


def _same_file(path: Path, copy: Path) -> None:
    with suppress(OSError):
        os.link(path, copy)
        return
    shutil.copy2(path, copy)


def _rewrite(path: Path, copy: Path) -> None:
    import onnx_ir as ir

    from edge_dit_export.passes_onnx.without_rounding import without_rounding

    model = ir.load(path)
    try:
        without_rounding(model)
    except ValueError as error:
        raise BadInput(
            path,
            found=f"{error}",
            expected="products in int8 as an export writes them",
            remedy="export the bundle again",
        ) from None
    ir.save(model, copy)


def rounded(
    subgraph: TrainableSubgraph,
    plan: Plan,
    bank: Bank,
    adapter: Tensors,
    points: list[Point],
    steps: int,
    rows: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """PyTorch's results with products in int8, and the limit of each of `groups`.

    Args:
        subgraph: with LoRA in place, frozen matrices rounded to int8.
        plan: of the bundle.
        bank: its bank.
        adapter: the fresh LoRA.
        points: where to compute.
        steps: length of the trajectory.
        rows: whether each row of an activation has a range of its own, as with ExecuTorch.
    """
    from edge_dit.models.int8_products import computing_in_int8
    from edge_dit.reference.eager import EagerSession

    class Nudged(EagerSession):
        """Moves the entry state in its last bits."""

        sign = 0.0

        def backward(self, draw: Tensors) -> float:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], draw["entry"].shape)
            entry = draw["entry"] * (1 + self.sign * NUDGE * signs)
            return super().backward({**draw, "entry": entry.astype(np.float32)})

    def measured(sign: float) -> dict[str, np.ndarray]:
        session = Nudged(subgraph, plan.optimizer)
        session.sign = sign
        return measure(session, bank, adapter, steps, replayed(points))

    with computing_in_int8(subgraph.blocks(), rows):
        right, *moved = (measured(sign) for sign in (0.0, 1.0, -1.0))
    moves = [groups(right, other, {}) for other in moved]
    tolerances = TARGETS["onnx"].tolerances
    most: dict[str, float] = {}
    for row in [row for move in moves for row in move]:
        what = SAME.get(row.kind, row.name)
        most[what] = max(most.get(what, 0.0), row.relative)
    return right, {
        row.name: tolerances[row.kind] + TIMES * most[SAME.get(row.kind, row.name)]
        for row in moves[0]
    }


def groups(right: Tensors, found: Tensors, limits: Mapping[str, float]) -> list[Difference]:
    """How far results are apart, those of one step together: all its gradients, for example.

    A value that is rounded the other way moves single elements of single tensors; their norm
    together tells it from a fault.

    Args:
        right: PyTorch's results.
        found: the target's.
        limits: by group; the group "inputs.0" has all tensors named "inputs.0.*". Default none.

    Returns:
        differences whose ``relative`` is the norm of the difference over that of ``right``, every
        tensor scaled to norm 1 first.
    """
    names: dict[str, list[str]] = {}
    for name in right:
        kind, *more = name.split(".")
        of_step = kind in ("inputs", "optimizer", "patch")
        names.setdefault(f"{kind}.{more[0]}" if of_step else kind, []).append(name)
    return [
        _together(group, right, found, members, limits.get(group, np.inf))
        for group, members in names.items()
    ]


def _together(
    group: str, right: Tensors, found: Tensors, members: list[str], limit: float
) -> Difference:
    kind = group.partition(".")[0]
    broken = [n for n in members if n not in found or not np.isfinite(found[n]).all()]
    if broken or any(found[name].shape != right[name].shape for name in members):
        return Difference(group, kind, np.inf, np.inf, 0.0, np.inf, limit)
    norms = [float(np.linalg.norm(right[name])) or 1.0 for name in members]
    want, have = (
        np.concatenate([v[n].ravel() / norm for n, norm in zip(members, norms, strict=True)])
        for v in (right, found)
    )
    error = np.abs(want - have)
    both = float(np.linalg.norm(want) * np.linalg.norm(have))
    return Difference(
        name=group,
        kind=kind,
        max=float(error.max()),
        mean=float(error.mean()),
        cosine=float(want @ have) / both if both else 1.0,
        relative=float(np.linalg.norm(error) / (np.linalg.norm(want) or 1.0)),
        tolerance=limit,
    )


def drift(exact: Tensors, found: Tensors) -> Drift:
    """What int8 costs.

    Args:
        exact: results with frozen weights and products in float32, named as by
            `edge_dit_runtime.measure.measure`.
        found: with both in int8.
    """
    rows = differences(exact, found, TARGETS["onnx"].tolerances)
    cosines = [row.cosine for row in rows if row.kind == "gradients"]
    return Drift(
        cosine_median=float(np.median(cosines)),
        cosine_worst=min(cosines),
        steps=len(exact["trajectory"]),
        loss=float(exact["trajectory"][-1]),
        loss_int8=float(found["trajectory"][-1]),
    )
