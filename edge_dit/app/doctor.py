"""What is installed, and what each target still needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from edge_dit.contract.targets import TARGETS
from edge_dit.errors import EXTRA_OF, is_installed

PACKAGES = (
    "edge-dit",
    "numpy",
    "safetensors",
    "torch",
    "diffusers",
    "peft",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-training-cpu",
    "executorch",
)
NEEDS = {
    "plan, precompute": ("torch", "diffusers", "peft", "transformers"),
    **{f"export {t.name}": ("torch", "peft", *t.needs_to_export) for t in TARGETS.values()},
    **{f"train {t.name}": t.needs_to_train for t in TARGETS.values()},
    "verify": ("torch", "diffusers", "peft"),
    "read .heic": ("pillow_heif",),
}
"""Piece of work -> modules that it imports."""


def package_versions() -> dict[str, str | None]:
    """Package -> installed version; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def examine() -> dict[str, Any]:
    """Facts about this machine: versions of packages, and what each piece of work still needs."""
    versions = package_versions()
    work = {}
    for name, modules in NEEDS.items():
        missing = [module for module in modules if not is_installed(module)]
        extras = sorted({EXTRA_OF[module] for module in missing})
        install = f'pip install "edge-dit[{",".join(extras)}]"' if missing else None
        work[name] = {"ready": not missing, "missing": missing, "install": install}
    notes = []
    if versions["onnxruntime"] and versions["onnxruntime-training-cpu"]:
        notes.append(
            "onnxruntime and onnxruntime-training-cpu are both installed and overwrite each other: "
            "pip uninstall both, then install one extra, ort or ort-training"
        )
    if sys.version_info >= (3, 12):
        notes.append("onnxruntime-training has no wheel for Python 3.12 or newer: use 3.11")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "packages": versions,
        "work": work,
        "notes": notes,
    }


def in_words(facts: dict[str, Any]) -> list[str]:
    """The facts of `examine` as lines for people."""
    lines = [f"Python {facts['python']} on {facts['system']}, {facts['cores']} cores", ""]
    for package, version in facts["packages"].items():
        lines.append(f"  {package:26} {version or '-'}")
    lines.append("")
    for name, state in facts["work"].items():
        detail = "ready" if state["ready"] else f"missing {', '.join(state['missing'])}"
        lines.append(f"  {name:22} {detail}")
        if state["install"]:
            lines.append(f"  {'':22} {state['install']}")
    return [*lines, *(f"note: {note}" for note in facts["notes"])]
