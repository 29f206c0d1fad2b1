"""A parity certificate: read, and shown to people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from edge_dit.contract.bundle import MANIFEST
from edge_dit.store.documents import parse_json, read_whole
from edge_dit.store.files import sha256

PARITY = "parity.json"


def read_certificate(bundle: Path) -> dict[str, Any] | None:
    """The bundle's certificate, or None when there is none or it is of another manifest.

    The manifest holds the hash of every file, so that a certificate of it is one of them.
    """
    try:
        certificate = parse_json(read_whole(bundle / PARITY))
        fits = certificate["manifest_sha256"] == sha256(bundle / MANIFEST)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return certificate if fits else None


def why_uncertified(bundle: Path, target: str) -> str:
    """Why no certificate says that ``target`` computes what PyTorch does; empty if one does."""
    if not (bundle / PARITY).is_file():
        return "no parity certificate"
    certificate = read_certificate(bundle)
    if certificate is None:
        return f"{PARITY} is of another export"
    targets = certificate.get("targets")
    result = targets.get(target) if isinstance(targets, dict) else None
    if not isinstance(result, dict):
        return f"{PARITY} says nothing of {target}"
    return "" if result.get("passed") is True else f"{PARITY} says that {target} failed"


def parity_table(certificate: dict[str, Any]) -> Table:
    """A certificate as a table: the worst relative difference of each kind and target."""
    kinds = ("loss", "gradients", "trajectory", "adapter")
    limits: dict[str, list[str]] = {}
    for target, result in certificate["targets"].items():
        words = ", ".join(f"{kind} {result['tolerances'][kind]:.0e}" for kind in kinds)
        limits.setdefault(words, []).append(target)
    caption = "\n".join(f"limits of {', '.join(names)}: {words}" for words, names in limits.items())
    title = f"parity with {certificate['reference']}, {certificate['steps']} steps"
    table = Table(title=title, caption=caption, caption_justify="left")
    for heading in ("target", *kinds, "verdict"):
        table.add_column(heading)
    for target, result in certificate["targets"].items():
        cells = []
        for kind in kinds:
            worst = result.get("worst", {}).get(kind)
            cells.append(f"{worst['relative']:.1e}" if worst else "-")
        table.add_row(target, *cells, "passed" if result["passed"] else "FAILED")
    return table


def why_failed(certificate: dict[str, Any]) -> str:
    """The worst tensor of each target that failed."""
    lines = ["parity failed"]
    lines += [f"  not what was exported: {name}" for name in certificate["changed_files"]]
    for target, result in certificate["targets"].items():
        if "error" in result:
            lines.append(f"  {target}: {result['error']}")
        elif result["failed"]:
            worst = result["failed"][0]
            lines.append(
                f"  {target}: {worst['name']}: max difference {worst['max']:.3e}, mean "
                f"{worst['mean']:.3e}, cosine {worst['cosine']:.6f}; relative "
                f"{worst['relative']:.3e} > tolerance {worst['tolerance']:.0e} "
                f"({len(result['failed'])} tensors failed)"
            )
    return "\n".join(lines)
