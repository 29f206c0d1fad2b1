"""Files of buckets, by fsspec URLs (s3://, gs://, memory://): copied here, used, copied back.

    with mirrored(["precompute", "s3://lab/job.toml", "-o", "s3://lab/bank"]) as arguments:
        main(arguments)                     # paths in the user's cache folder

A copy is taken again where the bucket has another one. What was written is uploaded when the block
ends, also after an error. An object is whole or not there, and a bundle's manifest comes last: an
upload that stops leaves nothing that looks whole, and the same command goes on.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edge_dit.errors import BadInput, require
from edge_dit.store.documents import digest, parse_json, read_whole
from edge_dit.store.files import StrPath, cache_folder, write_json

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "memory": ""}
"""Scheme of a URL -> extra of the distribution that reads it."""
URL = re.compile(rf"({'|'.join(EXTRAS)}):/{{1,2}}(?!/)(.+)")
"""pathlib makes one slash of two."""
LAST = "manifest.json"
"""File without which a folder is no bundle: uploaded last, and taken away first."""
FIRST = "index.json"
"""File without which a folder is no bank: uploaded first, as it is written first."""
UPLOADING = ".uploading"
"""Object beside a bundle's files until all of them are there."""


def is_url(given: StrPath) -> bool:
    """Whether a path as a user gave it is the URL of a bucket."""
    return URL.fullmatch(str(given)) is not None


def path_from(base: Path, given: StrPath) -> Path:
    """A path that a user gave, from the folder that it is relative to; ``~`` is the user's own.

    What lies in a bucket, by its URL or beside a file from there, is copied here.
    """
    if is_url(given):
        return fetched(str(given))
    path = Path(given)
    with suppress(RuntimeError):  # a user of that name is not known: it may be a folder's name
        path = path.expanduser()
    if (url := url_of(base / path)) is not None:
        with suppress(FileNotFoundError):
            return _Mirror(url).fetch()
    return base / path


def copy_of(url: str) -> Path:
    """Where the copy of a URL goes."""
    match = URL.fullmatch(url)
    assert match is not None, url
    inside = [part for part in match[2].split("/") if part not in ("", ".")]
    if ".." in inside:
        raise BadInput(url, found="'..' in it", expected="a plain URL")
    return _root().joinpath(match[1], *inside)


def url_of(path: Path) -> str | None:
    """The URL that a path is the copy of; None for other paths."""
    absolute = Path(os.path.normpath(path.absolute()))
    for root in {_root(), _root().resolve()}:
        with suppress(ValueError):
            scheme, *inside = absolute.relative_to(root).parts
            return f"{scheme}://{'/'.join(inside)}"
    return None


def named(text: str) -> str:
    """A text for people with URLs in place of the paths of their copies."""
    for root in {str(_root()), str(_root().resolve())}:
        text = re.sub(rf"{re.escape(root)}/([a-z0-9+.\-]+)/", r"\1://", text)
    return text


def fetched(url: str) -> Path:
    """The copy of a file or folder.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    try:
        return _Mirror(url).fetch()
    except FileNotFoundError:
        raise BadInput(url, found="not there", expected="a file or a folder") from None


@contextmanager
def mirrored(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of a command with copies in place of URLs; what it writes there is uploaded.

    Args:
        arguments: "s3://bucket/bank" or "--output=s3://bucket/bank".

    Raises:
        BadInput: a bucket cannot be read or written.
    """
    mirrors, local = [], []
    for argument in arguments:
        option, sign, value = argument.partition("=") if argument[:1] == "-" else ("", "", argument)
        if is_url(value):
            mirrors.append(_Mirror(value))
            with suppress(FileNotFoundError):  # an output that is not there yet
                mirrors[-1].fetch()
            value = str(mirrors[-1].path)
        local.append(option + sign + value)
    try:
        yield local
    finally:
        for mirror in mirrors:
            mirror.publish()


class _Mirror:
    """A file or folder of a bucket and its copy.

    What both were when they were last the same is kept beside the copies: by name within the folder
    ("" for a file), the bucket's mark of the object and the copy's size and time.
    """

    def __init__(self, url: str) -> None:
        match = URL.fullmatch(url)
        assert match is not None, url
        self.url, self.path = f"{match[1]}://{match[2].rstrip('/')}", copy_of(url)
        fsspec = require("fsspec", "a URL")
        try:
            self._system, self._place = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            remedy = f'pip install "edge-dit[{EXTRAS[match[1]]}]"'
            raise BadInput(self.url, found=str(error), remedy=remedy) from None
        self._notes = _root() / ".state" / f"{digest(self.url)}.json"

    def fetch(self) -> Path:
        """Copy what the bucket has and the copy lacks.

        Raises:
            FileNotFoundError: the bucket has nothing there.
            BadInput: it cannot be read.
        """
        there, known = self._listed(), self._known()
        if not there:
            raise FileNotFoundError(self.url)
        for name in known.keys() - there.keys():
            (self.path / name).unlink(missing_ok=True)
        for name, mark in there.items():
            copy = self.path / name
            if not copy.is_file() or known.get(name, [None])[0] != mark:
                self._download(name, copy)
            known[name] = [mark, _stamp(copy)]
        self._note({name: known[name] for name in there})
        return self.path

    def publish(self) -> None:
        """Upload what the copy has and the bucket lacks, or has otherwise.

        Raises:
            BadInput: it cannot be written.
        """
        here, known = self._files(), self._known()
        changed = [n for n, path in here.items() if known.get(n, [0, 0])[1] != _stamp(path)]
        gone = [name for name in known if name not in here] if here else []
        if not changed and not gone:
            return
        try:
            self._upload(here, sorted(changed, key=lambda name: (name != FIRST, name)), gone)
        except Exception as error:  # each system has errors of its own
            raise BadInput(
                self.url,
                found=f"cannot be written ({error})",
                expected="a bucket that may be written",
                remedy=f"run the same command again: what it made is in {self.path}",
            ) from error
        there = self._listed()
        self._note({name: [there.get(name), _stamp(path)] for name, path in here.items()})

    def _upload(self, here: dict[str, Path], changed: list[str], gone: list[str]) -> None:
        replaced = LAST in changed
        if replaced:
            self._system.pipe_file(self._at(UPLOADING), b"")
            self._remove(LAST)
        for name in changed:
            if name != LAST:
                self._system.put_file(str(here[name]), self._at(name))
        for name in gone:
            self._remove(name)
        if replaced:
            self._system.put_file(str(here[LAST]), self._at(LAST))
            self._remove(UPLOADING)

    def _listed(self) -> dict[str, str]:
        """Name within the folder -> the bucket's mark of what is there; nothing of a bundle whose
        upload was not finished.
        """
        self._system.invalidate_cache()
        try:
            found = self._system.find(self._place, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:  # each system has errors of its own
            raise BadInput(
                self.url,
                found=f"cannot be read ({error})",
                remedy="check the address and the credentials that fsspec uses for it",
            ) from error
        base = self._place.rstrip("/")
        there = {
            name.removeprefix(base).lstrip("/"): _mark(info)
            for name, info in found.items()
            if info["type"] == "file"
        }
        return {} if UPLOADING in there else there

    def _download(self, name: str, copy: Path) -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=copy.parent, prefix=f".{copy.name}.")
        os.close(handle)
        try:
            self._system.get_file(self._at(name), temporary)
            if Path(temporary).stat().st_size != self._system.info(self._at(name))["size"]:
                raise OSError("it came in part")
            os.replace(temporary, copy)
        except Exception as error:
            Path(temporary).unlink(missing_ok=True)
            place = f"{self.url}/{name}".rstrip("/")
            raise BadInput(place, found=f"cannot be read ({error})") from error

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._place}/{name}" if name else self._place

    def _files(self) -> dict[str, Path]:
        if self.path.is_file():
            return {"": self.path}
        inner = [path for path in self.path.rglob("*") if path.is_file()]
        names = {path.relative_to(self.path): path for path in inner}
        return {
            name.as_posix(): path
            for name, path in names.items()
            if not any(part[0] == "." for part in name.parts)
        }

    def _known(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, TypeError):
            return dict(parse_json(read_whole(self._notes)))
        return {}

    def _note(self, known: dict[str, Any]) -> None:
        write_json(self._notes, known)


def _root() -> Path:
    return cache_folder() / "remote"


def _mark(info: dict[str, Any]) -> str:
    """What changes when an object is replaced, by what its system says of it."""
    keys = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    return digest([info["size"], *(str(info.get(key)) for key in keys)])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
