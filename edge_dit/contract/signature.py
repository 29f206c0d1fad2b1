"""Signatures of bundles, by OpenSSF's model-signing; nothing here is cryptography of ours.

model.sig is a Sigstore bundle: a DSSE envelope around an in-toto statement, which lists the SHA-256
of every other file of the folder. So it covers parity.json, and manifest.json with the bundle's
version and its base model's hash. Other tools read it too:

    model_signing verify key bundle/ --signature bundle/model.sig --public-key key.pub
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from edge_dit.contract.bundle import Bundle
from edge_dit.errors import BadInput, require
from edge_dit.store.documents import STRICT, parse_json, read_whole, validated
from edge_dit.store.files import write_json

SIGNATURE = "model.sig"
"""File of a bundle; the name that OpenSSF's tools use."""
POLICY_VARIABLE = "EDGE_DIT_POLICY"
"""Environment variable with the path of a policy that holds for whatever opens a bundle."""
KEYS = (
    "openssl ecparam -genkey -name prime256v1 -noout -out key.pem; "
    "openssl ec -in key.pem -pubout -out key.pub"
)
"""Makes a pair of keys."""

MISMATCH = "Signature mismatch: "
NAMED = re.compile(
    r"Hash mismatch for \\?'(.*?)\\?':|files (?:found )?in model \\?'.*?\\?': ([^'\"\\]*)"
)
"""What model-signing says of files that are not as they were signed, a list's repr, and their names
in it."""


@dataclass(frozen=True)
class Policy:
    """Which bundles a device accepts: the content of a policy file, which its owner writes.

    Attributes:
        keys: public keys in PEM, at least one; relative paths are from the file's folder. One of
            them must have signed.
        minimum_version: oldest version that is accepted.
        keep_newest: whether the version of an accepted bundle becomes ``minimum_version``; the file
            is written then.
    """

    __pydantic_config__ = STRICT
    keys: Annotated[tuple[str, ...], Field(min_length=1)]
    minimum_version: Annotated[int, Field(ge=1)] = 1
    keep_newest: bool = False


def check_signature(bundle: Bundle, keys: Sequence[Path]) -> None:
    """Raise `BadInput` unless one of ``keys`` signed the bundle, and every file is as it was then.

    Args:
        bundle: opened.
        keys: public keys in PEM.
    """
    library = require("model_signing.verifying", "checking a signature")
    path = bundle.folder / SIGNATURE
    if not path.is_file():
        raise BadInput(
            bundle.folder,
            found=f"not signed: no {SIGNATURE}",
            expected="a bundle that its maker signed",
            remedy="get it from its maker again, who signs with edge-dit sign",
        )
    refusals = []
    for key in keys:
        try:
            config = library.Config().use_elliptic_key_verifier(public_key=key)
        except (OSError, ValueError, TypeError) as error:
            raise no_key(key, "public", error) from None
        config.set_hashing_config(hashed())
        try:
            read_whole(path)  # refuses a pipe, and what is too large to be a signature
            config.verify(bundle.folder, path)
            return
        except Exception as error:  # whatever a forged file makes the library raise, it is refused
            refusals.append(error)
    raise _refused(bundle.folder, path, keys, refusals)


def _refused(
    folder: Path, path: Path, keys: Sequence[Path], refusals: Sequence[Exception]
) -> BadInput:
    mismatch = next((str(e) for e in refusals if str(e).startswith(MISMATCH)), None)
    if mismatch is None:
        named = ", ".join(map(str, keys))
        return BadInput(
            path,
            found="damaged, or made with another key",
            expected=f"a signature that {named} confirms",
            remedy="get bundle and public key from their maker again",
        )
    names = dict.fromkeys(name for found in NAMED.findall(mismatch) for name in found if name)
    return BadInput(
        folder,
        found=f"changed since it was signed: {', '.join(names)[:200]}",
        expected="the files that were signed, no more and no less",
        remedy="get it from its maker again",
    )


def hashed() -> Any:
    """model-signing's configuration of what is signed: every file of a folder but the signature."""
    hashing = require("model_signing.hashing", "signatures")
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def no_key(key: Path, kind: str, error: Exception) -> BadInput:
    """The error for a file that is not a key; ``kind`` is "private" or "public"."""
    return BadInput(
        key,
        found=f"no {kind} key ({error})" if str(error) else f"no {kind} key",
        expected=f"an elliptic {kind} key in PEM without password, of curve P-256, P-384 or P-521",
        remedy=f"make a pair: {KEYS}",
    )


# ---------------------------------------------------------------- what a device accepts


def check_policy(bundle: Bundle, file: Path) -> None:
    """Raise `BadInput` unless a bundle is what a policy file asks for.

    Args:
        bundle: opened.
        file: JSON, see `Policy`.
    """
    policy = read_policy(file)
    check_signature(bundle, [file.parent / key for key in policy.keys])
    version = bundle.manifest.version
    if version < policy.minimum_version:
        raise BadInput(
            bundle.folder,
            found=f"version {version}",
            expected=f"{policy.minimum_version} or newer, as {file} says",
            remedy="get the newest bundle from its maker",
        )
    if policy.keep_newest and version > policy.minimum_version:
        raw = parse_json(read_whole(file))
        write_json(file, {**raw, "minimum_version": version})


def read_policy(file: Path) -> Policy:
    """Read a policy file.

    Raises:
        BadInput: missing, not JSON, or not a `Policy`.
    """
    remedy = f'write it: {{"keys": ["key.pub"], "minimum_version": 1}}; or unset {POLICY_VARIABLE}'
    try:
        raw = parse_json(read_whole(file))
    except (OSError, ValueError) as error:
        raise BadInput(file, found=f"unreadable policy ({error})", remedy=remedy) from None
    return validated(file, TypeAdapter(Policy), raw, remedy)


def check_trusted(bundle: Bundle) -> None:
    """Hold a bundle against the policy that `POLICY_VARIABLE` names, if it is set.

    Raises:
        BadInput: the policy refuses the bundle.
    """
    if file := os.environ.get(POLICY_VARIABLE):
        check_policy(bundle, Path(file))
