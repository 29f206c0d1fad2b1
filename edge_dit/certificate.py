"""A parity certificate for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table


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
