"""Download a diffusers pipeline from the Hugging Face hub, or take it from the hub's cache.

huggingface_hub does the work, so its environment variables mean what its users know: HF_HOME,
HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT. diffusers chooses the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput, is_installed, require
from edge_dit.models.components import INDEX_FILE, read_json
from edge_dit.models.families import detect
from edge_dit.models.pipeline import quiet

PLACE = "model.path"
VARIANT = re.compile(r"\.([^./]+?)(?:-\d{5}-of-\d{5})?\.safetensors$")
"""The variant in a weight file's name: `model.fp16.safetensors`, `model.fp16-00001-of-00002...`."""
PLAIN = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configurations and tokenizers."""
SHARDS = "*.safetensors.index*.json"
"""Which shard has which tensor."""
AGAIN = "run the same command again; files that were downloaded whole are kept"


def is_hub_id(text: str) -> bool:
    """Whether ``text`` may name a model of the hub: "org/name", by the hub's own rules.

    The hub also knows bare names ("gpt2"). No pipeline of a supported family has one, and a bare
    name is nearly always a misspelled folder, so it counts as none.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII):
        return False
    if not is_installed("huggingface_hub"):
        return True  # `download` says what to install
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def download(
    repo: str,
    revision: str | None = None,
    variant: str | None = None,
    without: Iterable[str] = (),
) -> Path:
    """The snapshot folder of a pipeline in the hub's cache; what is missing there is downloaded.

    Only what `diffusers.DiffusionPipeline.from_pretrained` loads comes: configurations, tokenizers
    and the safetensors weights of one variant. No .bin, no other formats, no checkpoints beside
    the folders of the parts, no folder that model_index.json does not name.

    Args:
        repo: "org/name".
        revision: branch, tag or commit; default the repository's main branch.
        variant: "fp16" takes a part's `model.fp16.safetensors` where there is one.
        without: parts whose weights are not needed; their config.json comes.

    Returns:
        The folder; its name is the commit.

    Raises:
        BadInput: no such repository, revision or variant; no access; no connection and not in the
            cache; not a pipeline of a supported family; or no safetensors.
    """
    require("huggingface_hub", "a model from the hub")
    require("diffusers", "a model from the hub")
    from huggingface_hub import hf_hub_download, snapshot_download

    with _explained(repo, revision, variant), quiet():
        folder = Path(hf_hub_download(repo, INDEX_FILE, revision=revision)).parent
        detect(folder)  # before gigabytes of a pipeline that no family supports
        parts = parts_of(folder)
        commit = folder.name
        plain = [f"{part}/{kind}" for part in parts for kind in PLAIN]
        snapshot_download(repo, revision=commit, allow_patterns=plain, ignore_patterns=SHARDS)
        weights = _weights(repo, commit, variant, [one for one in parts if one not in without])
        if weights:
            snapshot_download(repo, revision=commit, allow_patterns=weights)
    return folder


def parts_of(folder: Path) -> list[str]:
    """Names of the parts that a pipeline folder says it has.

    Raises:
        BadInput: no readable model_index.json.
    """
    index = read_json(folder / INDEX_FILE, "a diffusers pipeline")
    return [name for name, kind in index.items() if isinstance(kind, list) and any(kind)]


def gaps_of(folder: Path) -> list[str]:
    """Parts of a pipeline folder, or their weights, that are not there."""
    gaps = []
    try:
        for part in (folder / name for name in parts_of(folder)):
            if not part.is_dir():
                gaps.append(part.name)
            elif (part / "config.json").is_file() and not any(part.glob("*.safetensors")):
                gaps.append(f"{part.name}/*.safetensors")
            for shards in part.glob(SHARDS):
                named = set(json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values())
                gaps += [f"{part.name}/{one}" for one in named if not (part / one).is_file()]
    except (BadInput, OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged: reading it says so
    return sorted(gaps)


def _weights(repo: str, commit: str, variant: str | None, parts: list[str]) -> list[str]:
    """Weight files of parts, as diffusers chooses them; none if only the cache knows the files.

    Raises:
        BadInput: a part has none.
        ValueError: no part has the variant.
    """
    from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = [file.path for file in get_cached_repo_tree(repo, revision=commit)]
    except CachedRepoTreeNotFoundError:  # a hand-made or old cache, and no connection
        return []
    named = [name for name in tree if name.count("/") == 1 and name.split("/")[0] in parts]
    kept = [n for n in named if n.endswith(".safetensors") or fnmatch(n, SHARDS)]
    siblings: Any = variant_compatible_siblings(kept, variant=variant)[0]  # mistyped by diffusers
    chosen: list[str] = sorted(siblings)
    for part in parts:
        if f"{part}/config.json" in named and not any(n.startswith(f"{part}/") for n in chosen):
            raise _no_weights(f"{PLACE} ({repo}/{part})", tree, variant)
    return chosen


@contextmanager
def _explained(repo: str, revision: str | None, variant: str | None) -> Iterator[None]:
    """Turn what huggingface_hub and diffusers raise into one `BadInput`."""
    from huggingface_hub.errors import HTTPError  # of whichever HTTP library this release uses

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        raise _fault(error, repo, revision, variant) from None


def _fault(error: Exception, repo: str, revision: str | None, variant: str | None) -> BadInput:
    """What went wrong and what the user can do, by the first cause that the hub's library names."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))

    def cause(*kinds: type[BaseException]) -> BaseException | None:
        return next((one for one in chain if isinstance(one, kinds)), None)

    where = f"{PLACE} ({repo})"
    if cause(errors.GatedRepoError):
        return BadInput(
            where,
            found="a gated model, and no token of an account that may read it",
            remedy=f"accept its licence at {constants.ENDPOINT}/{repo}, then set HF_TOKEN, or log "
            "in: hf auth login",
        )
    if cause(errors.RevisionNotFoundError):
        return BadInput(
            "model.revision",
            found=f"{repo} has no revision {revision!r}",
            expected="a branch, a tag or a full commit hash",
            remedy=f"see {constants.ENDPOINT}/{repo}/tree/main",
        )
    if cause(errors.RepositoryNotFoundError):
        return BadInput(
            where,
            found=f"no such folder beside the job, and no such model on {constants.ENDPOINT} that "
            "you may read",
            expected="a folder, a .safetensors file, or a hub id (org/name)",
            remedy="correct its spelling; for a private model set HF_TOKEN, or log in: hf auth "
            "login",
        )
    if cause(errors.RemoteEntryNotFoundError):
        return _no_pipeline(where, repo, revision)
    if variant is not None and f"variant={variant}" in str(error):
        return _no_weights(f"{PLACE} ({repo})", _files(repo, revision), variant)
    return _unreachable(where, chain)


def _unreachable(where: str, chain: list[BaseException]) -> BadInput:
    """The error for a hub that does not answer, answers strangely, or may not be asked."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return BadInput(
            where,
            found=f"not, or not all of it, in the hub's cache ({constants.HF_HUB_CACHE}), and "
            "HF_HUB_OFFLINE is set",
            remedy="unset HF_HUB_OFFLINE once, or set HF_HOME to the cache that has it",
        )
    for one in chain:
        if isinstance(one, errors.HfHubHTTPError):
            status = one.response.status_code
            token = "HF_TOKEN, or the token of hf auth login, is refused"
            return BadInput(
                where,
                found=f"{constants.ENDPOINT} answers {status} ({one.server_message or one})",
                remedy=f"{token}: make a new one" if status in (401, 403) else AGAIN,
            )
    for one in chain:
        if isinstance(one, OSError) and one.errno:
            return BadInput(
                where,
                found=f"the hub's cache cannot be written or read ({one.strerror}: {one.filename})",
                remedy="free some space there, or set HF_HOME to another folder",
            )
    last = chain[-1]
    return BadInput(
        where,
        found=f"the download from {constants.ENDPOINT} failed ({type(last).__name__}: {last})",
        remedy=f"check connection, proxy and HF_ENDPOINT, then {AGAIN}",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _files(repo: str, revision: str | None) -> list[str]:
    """Names of a repository's files; none where the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        return sorted(HfApi().list_repo_files(repo, revision=revision))
    except (OSError, ValueError, HTTPError):
        return []


def _no_pipeline(where: str, repo: str, revision: str | None) -> BadInput:
    files = _files(repo, revision)
    single = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    remedy = "take a repository in diffusers format; its name often ends in -diffusers"
    if single:
        remedy += f"; or fetch one file (hf download {repo} {single[0]}) and give its path"
    return BadInput(
        where,
        found=f"no {INDEX_FILE} in it" + (f", but {', '.join(files[:5])}" if files else ""),
        expected="a whole pipeline in diffusers format",
        remedy=remedy,
    )


def _no_weights(where: str, files: list[str], variant: str | None) -> BadInput:
    """The error for a pipeline without safetensors of the wanted variant."""
    there = sorted({found[1] for name in files if "/" in name and (found := VARIANT.search(name))})
    if variant is not None and there:
        return BadInput(
            "model.variant",
            found=f"{where} has no variant {variant!r}",
            expected=f"one of {', '.join(there)}",
            remedy="choose another, or remove the key",
        )
    return BadInput(
        where if variant is None else "model.variant",
        found="no weights as safetensors"
        if variant is None
        else f"{where} has no variant {variant!r}, nor any other",
        expected="safetensors; .bin files are not loaded"
        if variant is None
        else "weights of that variant",
        remedy=f'set variant = "{there[0]}"'
        if there
        else "remove the key"
        if variant
        else "take another repository, or load it with diffusers and save_pretrained() it",
    )
