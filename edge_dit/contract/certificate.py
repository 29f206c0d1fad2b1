"""A parity certificate, parity.json: how far each target of a bundle is from PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from typing import Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from edge_dit.contract.bundle import Bundle
from edge_dit.store.documents import STRICT, parse_json, read_whole
from edge_dit.store.files import write_json

PARITY = "parity.json"
UNROUNDED = "unrounded"
"""Word after a title: the graphs without the rounding of int8, see `edge_dit.app.rounding`."""
SCHEMA = 2
ORDER = (
    "gradients",
    "loss",
    "inputs",
    "optimizer",
    "patch",
    "prompts",
    "collect",
    "paint",
    "trajectory",
    "adapter",
)
"""Kinds of tensors, those first whose failure says most of where a fault is."""


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from the reference's.

    Attributes:
        name: "loss", "gradients.<lora>", "inputs.<number>.<one of these>", "trajectory",
            "adapter.<lora>", "optimizer.<probe>.<state>" or "patch.<number>"; of a bank
            "bank.draw <number>.<tensor>", see `edge_dit.reference.evidence`.
        kind: the part of the name before the first dot; each kind has its own tolerance.
        max, mean: absolute differences; infinite where the tensor is missing or not finite.
        cosine: cosine similarity of both tensors, flattened.
        relative: ``max`` divided by the largest absolute value of the reference. For "trajectory",
            the difference of each loss is divided by that loss.
        tolerance: largest ``relative`` that passes.
    """

    __pydantic_config__ = STRICT | {"allow_inf_nan": True}
    name: str
    kind: str
    max: float
    mean: float
    cosine: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance

    def in_words(self) -> str:
        """The name and its differences, for a tensor beyond its tolerance."""
        return (
            f"{self.name}: max difference {self.max:.3e}, mean {self.mean:.3e}, cosine "
            f"{self.cosine:.6f}; relative {self.relative:.3e} > tolerance {self.tolerance:.0e}"
        )


def differences(
    reference: Mapping[str, np.ndarray],
    measured: Mapping[str, np.ndarray],
    tolerances: Mapping[str, float],
) -> list[Difference]:
    """How far each tensor of ``reference`` is from the one measured.

    Args:
        reference: PyTorch's tensors, by the names of `edge_dit_runtime.measure.measure`.
        measured: the target's tensors.
        tolerances: by kind, the largest `Difference.relative` that passes.
    """
    return [_difference(n, want, measured.get(n), tolerances) for n, want in reference.items()]


def _difference(
    name: str, want: np.ndarray, have: np.ndarray | None, tolerances: Mapping[str, float]
) -> Difference:
    kind = name.partition(".")[0]
    if have is None or have.shape != want.shape or not np.isfinite(have).all():
        return Difference(name, kind, np.inf, np.inf, 0.0, np.inf, tolerances[kind])
    want, have = want.astype(np.float64).ravel(), have.astype(np.float64).ravel()
    error = np.abs(want - have)
    if kind == "trajectory":
        relative = float((error / np.abs(want)).max())  # each step's loss against its own size
    else:
        scale = np.abs(want).max()
        relative = float(error.max() / scale) if scale > 0 else float(error.max())
    norms = np.linalg.norm(want) * np.linalg.norm(have)
    return Difference(
        name=name,
        kind=kind,
        max=float(error.max()),
        mean=float(error.mean()),
        cosine=float(want @ have / norms) if norms > 0 else 1.0,
        relative=relative,
        tolerance=tolerances[kind],
    )


@dataclass(frozen=True)
class Draws:
    """At which draws a target was compared.

    Attributes:
        compared: numbers of the draws: first that of the gradients, then those of the trajectory.
        left_out: numbers of the draws that were left out, because rounding decides PyTorch's own
            gradients there.
        rows_moved: for each compared draw, how many rows of LoRA B were moved before it.
    """

    __pydantic_config__ = STRICT
    compared: list[int]
    left_out: list[int]
    rows_moved: list[int]

    @property
    def left_out_share(self) -> float:
        """Share of the draws that were left out, among these and the compared ones."""
        return len(self.left_out) / max(1, len(self.left_out) + len(self.compared))


@dataclass(frozen=True)
class TargetResult:
    """How far one target and layout is from PyTorch.

    Attributes:
        draws: at which it was compared.
        tensors: every difference; empty if the target's process ended early.
        error: why that process ended early, or empty.
        likely: module of the model in which a fault is most likely (`edge_dit.reference.locate`);
            empty if none was found.
        beside: modules with LoRA that are nearest to it, or itself.
    """

    __pydantic_config__ = STRICT
    draws: Draws
    tensors: list[Difference] = field(default_factory=list)
    error: str = ""
    likely: str = ""
    beside: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are differences, and all are within their tolerances."""
        return bool(self.tensors) and not self.error and all(t.passed for t in self.tensors)

    @property
    def failed(self) -> list[Difference]:
        """The tensors beyond their tolerance, by `ORDER`. Of a kind first those of modules beside
        the likely one, then the worst.
        """

        def place(row: Difference) -> tuple[int, bool, float]:
            excess = row.relative / row.tolerance
            near = any(f".{module}." in row.name for module in self.beside)
            return ORDER.index(row.kind), not near, -excess if isfinite(excess) else -inf

        return sorted((t for t in self.tensors if not t.passed), key=place)

    def in_words(self) -> str:
        """The first of the failed tensors, and where the fault is most likely."""
        guess = f", most like a fault in {self.likely}" if self.likely else ""
        return self.failed[0].in_words() + guess

    @property
    def worst(self) -> dict[str, Difference]:
        """The largest difference of each kind."""
        largest: dict[str, Difference] = {}
        for row in self.tensors:
            if row.kind not in largest or not row.relative <= largest[row.kind].relative:
                largest[row.kind] = row
        return largest


@dataclass(frozen=True)
class BankResult:
    """How far stored draws are from the same draws recomputed.

    Attributes:
        index_sha256: SHA-256 of the bank's index.json, which its other files name.
        draws: numbers of the draws that were recomputed.
        tensors: every difference, prompts first, of each draw in the order of computation.
        false_claims: what index.json says against the plan, a line each.
        recomputed: what was recomputed and from what, a line each.
        out_of_reach: what could not be, and why, a line each.
    """

    __pydantic_config__ = STRICT
    index_sha256: str
    draws: list[int]
    tensors: list[Difference]
    false_claims: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)
    out_of_reach: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are differences, all within tolerance, and the index is the plan's."""
        return bool(self.tensors) and not self.false_claims and not self.failed

    @property
    def failed(self) -> list[Difference]:
        """The tensors beyond their tolerance: of each draw first that which others follow from."""
        return [row for row in self.tensors if not row.passed]


@dataclass(frozen=True)
class Drift:
    """What products in int8 cost: PyTorch in int8 beside PyTorch in float32, weights included.

    Attributes:
        cosine_median, cosine_worst: of the gradients of one draw, over the LoRA tensors.
        steps: length of the trajectory.
        loss, loss_int8: of its last step.
    """

    __pydantic_config__ = STRICT
    cosine_median: float
    cosine_worst: float
    steps: int
    loss: float
    loss_int8: float

    def in_words(self) -> str:
        """One line."""
        return (
            f"cosine of gradients {self.cosine_median:.4f} (worst {self.cosine_worst:.3f}), loss "
            f"of step {self.steps} {self.loss_int8:.4f}, in float32 {self.loss:.4f}"
        )


@dataclass(frozen=True)
class Certificate:
    """Every target of a bundle, compared with PyTorch.

    Attributes:
        manifest_sha256: of the bundle's manifest, which lists the hash of every file.
        reference: what the targets were compared with ("torch 2.13.0 eager, float32").
        steps: length of the trajectory.
        targets: results by `Bundle.titled`: "onnx", "onnx (streamed)".
        bank: whether the draws they were compared at are the plan's; None where there was none.
        changed_files: files that are missing or not as the manifest lists them.
        false_claims: what manifest and adapter say against the plan, a line each.
        varied: inputs of the exported graphs that had several values, a line each.
        exercised: what of the optimizer was tried from made-up states, a line each.
        drift: what int8 costs, of each target that computes in it.
    """

    __pydantic_config__ = STRICT
    manifest_sha256: str
    reference: str
    steps: int
    targets: Mapping[str, TargetResult]
    bank: BankResult | None = None
    changed_files: list[str] = field(default_factory=list)
    false_claims: list[str] = field(default_factory=list)
    varied: list[str] = field(default_factory=list)
    exercised: list[str] = field(default_factory=list)
    drift: Mapping[str, Drift] = field(default_factory=dict)
    schema_version: Literal[2] = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether every difference is within its tolerance, no file changed, and manifest, adapter
        and bank are the plan's.
        """
        wrong = self.changed_files or self.false_claims or (self.bank and not self.bank.passed)
        return not wrong and all(result.passed for result in self.targets.values())

    def as_json(self) -> dict[str, object]:
        """The fields, and what follows from them (`DERIVED`), as parity.json has them."""
        targets = {
            name: {
                "passed": result.passed,
                **asdict(result),
                "worst": {kind: asdict(row) for kind, row in result.worst.items()},
                "failed": [asdict(row) for row in result.failed],
                "left_out_share": result.draws.left_out_share,
            }
            for name, result in self.targets.items()
        }
        made = {"passed": self.passed, **asdict(self), "targets": targets}
        if self.bank:
            failed = [asdict(row) for row in self.bank.failed]
            made["bank"] = {"passed": self.bank.passed, **asdict(self.bank), "failed": failed}
        return made


DERIVED = ("passed", "worst", "failed", "left_out_share")
"""Keys of `Certificate.as_json` that follow from the others."""


def write_certificate(bundle: Bundle, certificate: Certificate) -> None:
    """Write parity.json into a bundle."""
    write_json(bundle.folder / PARITY, certificate.as_json())


def read_certificate(bundle: Bundle) -> Certificate | None:
    """The bundle's certificate; None if it is missing, damaged, or of another manifest."""
    try:
        raw = parse_json(read_whole(bundle.folder / PARITY))
        stored = {key: value for key, value in raw.items() if key not in DERIVED}
        stored["targets"] = {
            name: {key: value for key, value in result.items() if key not in DERIVED}
            for name, result in raw["targets"].items()
        }
        if stored.get("bank"):
            stored["bank"] = {k: v for k, v in stored["bank"].items() if k not in DERIVED}
        certificate = TypeAdapter(Certificate).validate_python(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        return None
    return certificate if certificate.manifest_sha256 == bundle.manifest_sha256 else None


def why_uncertified(bundle: Bundle, title: str) -> str:
    """Why a target has no certificate that it passed; empty if it has one.

    Args:
        bundle: opened.
        title: of the target and layout, see `Bundle.titled`.
    """
    if not (bundle.folder / PARITY).is_file():
        return "no parity certificate"
    certificate = read_certificate(bundle)
    if certificate is None:
        return f"{PARITY} belongs to another export, or is damaged"
    if certificate.changed_files:
        return f"{PARITY} says that files changed"
    if certificate.false_claims:
        return f"{PARITY} says that the manifest is not the plan's"
    if certificate.bank and not certificate.bank.passed:
        return f"{PARITY} says that the bank is not the plan's"
    if title not in certificate.targets:
        return f"{PARITY} has no result of {title}"
    both = [title, f"{title} {UNROUNDED}"]
    failed = [name for name in both if not _passed(certificate, name)]
    return f"{PARITY} says that {failed[0]} failed" if failed else ""


def _passed(certificate: Certificate, title: str) -> bool:
    return title not in certificate.targets or certificate.targets[title].passed
