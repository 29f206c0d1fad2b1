"""Signs bundles, which `edge_dit.contract.signature` checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.certificate import PARITY, why_uncertified
from edge_dit.contract.integrity import check_bundle
from edge_dit.contract.signature import SIGNATURE, check_signature, hashed, no_key
from edge_dit.errors import BadInput, require
from edge_dit.store.files import sha256, write_atomic


def sign(bundle: Bundle, key: Path) -> Path:
    """Sign a bundle whose targets all passed `edge_dit.app.verify.verify`; its signature's path.

    Args:
        bundle: opened.
        key: private key in PEM, on a NIST curve, without password.

    Raises:
        BadInput: a file is not as the manifest says, a target has no certificate, ``key`` is none,
            or model-signing is missing.
    """
    library = require("model_signing.signing", "signing")
    for target in bundle.manifest.targets:
        check_bundle(bundle, target, verify_hashes=True)
        for layout in bundle.layouts(target):
            if reason := why_uncertified(bundle, bundle.titled(target, layout)):
                raise BadInput(
                    bundle.folder,
                    found=reason,
                    expected=f"a passed {PARITY}, whose SHA-256 is signed with the bundle",
                    remedy="edge-dit verify it first",
                )
    try:
        config = library.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise no_key(key, "private", error) from None
    temporary = bundle.folder.parent / f".{bundle.folder.name}.{SIGNATURE}"
    try:
        config.set_hashing_config(hashed()).sign(bundle.folder, temporary)
        write_atomic(bundle.folder / SIGNATURE, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)
    return bundle.folder / SIGNATURE


def check_signed(bundle: Bundle, key: Path) -> dict[str, Any]:
    """What a bundle's maker signed, after `edge_dit.contract.signature.check_signature`."""
    check_signature(bundle, [key])
    return {
        "version": bundle.manifest.version,
        "base_model": bundle.manifest.plan.get("model_name"),
        "base_model_hash": bundle.manifest.plan.get("model_hash"),
        "manifest_sha256": bundle.manifest_sha256,
        "parity_sha256": sha256(bundle.folder / PARITY),
    }


def signed_in_words(bundle: Bundle, facts: dict[str, Any]) -> list[str]:
    """The facts of `check_signed`, for people."""
    return [
        f"{bundle.folder}: signed, and every file is as it was then",
        f"version {facts['version']}, of {facts['base_model']} ({facts['base_model_hash']})",
        f"{PARITY} {facts['parity_sha256']}",
    ]
