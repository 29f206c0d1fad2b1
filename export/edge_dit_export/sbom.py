"""What a bundle was made with, as a CycloneDX bill of materials: packages, and the base model.

The same environment and plan give the same bytes: no time and no random number is in it.
"""

from __future__ import annotations

import importlib.metadata
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edge_dit.errors import require
from edge_dit.planning.plan import Plan
from edge_dit.store.files import write_atomic

SBOM = "sbom.cdx.json"
"""File of a bundle; the name by which CycloneDX's tools know it."""
OURS = "edge-dit"
ALWAYS = ("host",)
"""Extras of edge-dit that every export uses; the others are the targets' own packages."""


def write_sbom(path: Path, plan: Plan, packages: Iterable[str]) -> None:
    """Write the bill of materials of a bundle.

    Args:
        path: of the file.
        plan: of the bundle; its model is a component.
        packages: distributions that wrote the targets; what they require is added.
    """
    require("cyclonedx", "the bundle's bill of materials")
    # Any: the library's decorators hide the types of its classes.
    cyclonedx, boms, parts = (
        _module(f"cyclonedx.model{inner}") for inner in ("", ".bom", ".component")
    )
    purls, needs = _module("packageurl"), installed_closure(packages)

    def component(name: str) -> Any:
        version = importlib.metadata.version(name)
        purl = purls.PackageURL("pypi", name=name, version=version)
        return parts.Component(name=name, version=version, purl=purl, bom_ref=str(purl))

    components = {name: component(name) for name in sorted(needs)}
    digest = cyclonedx.HashType(alg=cyclonedx.HashAlgorithm.SHA_256, content=plan.model_hash)
    model = parts.Component(
        name=plan.model_name,
        version=plan.model_revision,
        type=parts.ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="base-model",
        hashes=[digest],
    )
    bundle = parts.Component(
        name=f"bundle of {plan.model_name}", type=parts.ComponentType.DATA, bom_ref="bundle"
    )
    never = datetime.fromtimestamp(0, UTC)  # the library writes the present time for None
    bom = boms.Bom(
        components=[*components.values(), model],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"edge-dit:{plan.identity()}"),
        metadata=boms.BomMetaData(component=bundle, timestamp=never),
    )
    bom.register_dependency(bundle, [model, *(components[canonicalize_name(n)] for n in packages)])
    for name, required in needs.items():
        bom.register_dependency(components[name], [components[other] for other in sorted(required)])
    written = _module("cyclonedx.output.json").JsonV1Dot6(bom)
    write_atomic(path, written.output_as_string(indent=1) + "\n")


def _module(name: str) -> Any:
    return import_module(name)


def installed_closure(packages: Iterable[str]) -> dict[str, set[str]]:
    """Distributions and all that they require here: name -> names that it requires itself.

    Names are canonical ("onnx-ir"). What is not installed is left out.
    """
    found: dict[str, set[str]] = {}
    waiting: list[str] = [canonicalize_name(name) for name in packages]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _required(name)
            waiting += found[name]
    return found


def _required(name: str) -> set[str]:
    extras = ("", *ALWAYS) if name == OURS else ("",)
    required = set()
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        other = canonicalize_name(requirement.name)
        if other != name and _is_installed(other):
            required.add(other)
    return required


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
