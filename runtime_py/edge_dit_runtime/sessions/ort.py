"""Imports onnxruntime without torch, and sets the options of its sessions."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_dit.errors import require


def onnxruntime(why: str) -> Any:
    """The onnxruntime module.

    The training build imports torch if it is installed, for a front end that is not used here. That
    takes two seconds and 180 MB (onnxruntime_validation.py, 1.19.2), so torch is hidden from it.

    Args:
        why: what it is needed for.

    Raises:
        BadInput: it is not installed.
    """
    with _without("torch"):
        return require("onnxruntime", why)


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Let ``import name`` fail, unless it was imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def session_options(module: Any) -> Any:
    """Options of every session here: the same bits in every run, one arena for all sessions, and
    threads that sleep while they wait.

    By default a waiting thread spins, and takes the processor from other work (docs/performance.md,
    "Beside other work").
    ``OMP_WAIT_POLICY=ACTIVE`` in the environment asks for spinning, here as in torch.

    Args:
        module: onnxruntime.
    """
    options = module.SessionOptions()
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    spin = os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE"
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", str(int(spin)))
    share_arena(module)
    options.add_session_config_entry("session.use_env_allocators", "1")
    if _profiles:
        options.enable_profiling = True
        options.profile_file_prefix = str(_profiles[-1] / f"session-{next(_numbers)}")
    return options


_profiles: list[Path] = []
_numbers = itertools.count()


@contextmanager
def profiling(folder: Path) -> Iterator[None]:
    """Sessions opened meanwhile write a profile each, JSON, into a folder when they end."""
    _profiles.append(folder)
    try:
        yield
    finally:
        _profiles.pop()


SPARE = 2**20
"""Most unused bytes in a chunk of the arena. With onnxruntime's default, 128 MiB, FLUX.1-dev's
widened weights lay in chunks of twice their size.
"""
FIRST = 2**26
"""Bytes of the first chunk, if chunks double."""
_shared: list[Any] = []


def share_arena(module: Any, doubling: bool = False) -> None:
    """Let all sessions with ``session.use_env_allocators`` share one arena of memory. The first
    call in a process decides how the arena grows.

    Args:
        module: onnxruntime.
        doubling: every chunk is twice as large as the one before. Sessions that take turns then use
            the same memory, and untouched pages take none. Otherwise the arena grows by what is
            needed, which is less for one large session (SANA-0.6B, 14 blocks: 807 against 842 MB
            fused, but 242 against 236 MB streamed; FLUX.1-dev streamed 1143 against 1076).
    """
    if module in _shared:
        return
    _shared.append(module)
    arena = module.OrtArenaCfg(
        {
            "max_mem": 0,
            "arena_extend_strategy": int(not doubling),
            "initial_chunk_size_bytes": FIRST if doubling else -1,
            "max_dead_bytes_per_chunk": SPARE,
        }
    )
    kind = module.OrtMemoryInfo(
        "Cpu", module.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, module.OrtMemType.DEFAULT
    )
    module.create_and_register_allocator(kind, arena)
