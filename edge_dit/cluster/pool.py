"""Tasks on a Ray cluster. What each returns is written by the process that asked, so no file of a
worker is left half.

A task is a plain function of something opened - a model with its plan, say - and one argument. The
processes of the cluster keep what they opened, so a skeleton is loaded once in each. A task that
lost its process is run again, by Ray; it must give the same result then.
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from edge_dit.errors import BadInput, CheckFailed, require

LOCAL = "local"
"""Address of a cluster that is started on this machine, for this process alone."""
KEPT = 2
"""Opened things that a process keeps."""
AHEAD = 2
"""Tasks for every place that has one: as many results may wait in memory to be written."""
PATIENCE = 20
"""Seconds that the head node may take to answer."""
T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")


class Pool:
    """A cluster that this process is connected to. Its processes begin to import what tasks need
    while this one reads what it was asked for.

    Args:
        ray: the module.
        threads: of a task. Sums depend on their number, so a result has the bits of this machine
            only if workers take as many.
    """

    def __init__(self, ray: Any, threads: int) -> None:
        self._ray, self.threads = ray, threads
        # -1: a process that was killed says nothing about its task.
        self._do = ray.remote(_do).options(num_cpus=threads, max_retries=-1)
        warm_up = ray.remote(_warm_up).options(num_cpus=threads)
        for _ in range(self.places):
            warm_up.remote()

    @property
    def places(self) -> int:
        """Tasks that can run at once, by the processors that the cluster has now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)) // self.threads)

    def map(
        self, opener: Callable[[], T], work: Callable[[T, A], R], arguments: Iterable[A]
    ) -> Iterator[R]:
        """``work(opened, argument)`` of each argument, in their order.

        Args:
            opener: opens what the tasks share, in every process once. It is sent to them.
            work: a function of a module.
            arguments: of the tasks.

        Raises:
            BadInput, CheckFailed: as ``work`` does.
        """
        shared, key = self._ray.put(opener), os.urandom(16)
        submit = partial(self._do.remote, key, shared, work, self.threads)
        waiting: list[Any] = []
        for argument in arguments:
            waiting.append(submit(argument))
            if len(waiting) > AHEAD * self.places:
                yield self._result(waiting.pop(0))
        while waiting:
            yield self._result(waiting.pop(0))

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (BadInput, CheckFailed)):
                raise error.cause from None
            raise


@contextmanager
def asked(address: str | None) -> Iterator[Pool | None]:
    """`connected`, or None where no cluster is asked for."""
    if address is None:
        yield None
        return
    with connected(address) as pool:
        yield pool


@contextmanager
def connected(address: str, threads: int | None = None) -> Iterator[Pool]:
    """A pool on a cluster, until the block ends.

    Args:
        address: "host:port" or "ray://host:port" of a head node, "auto" for the one that this
            machine belongs to, or `LOCAL`.
        threads: of a task; default as many as torch takes here.

    Raises:
        BadInput: Ray is missing, or does not answer at the address.
    """
    # Before the import: Ray reports its use to its makers otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", "--ray")
    torch = require("torch", "--ray")
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            "--ray",
            found=f"no cluster at {address} ({str(error).splitlines()[0]})",
            expected="the address of a head node, auto, or nothing for a cluster on this machine",
            remedy="ray start --head, and take the address that it prints",
        ) from None
    try:
        yield Pool(ray, threads or torch.get_num_threads())
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Connect to a head node's port and hang up: Ray itself tries for minutes where nobody is.

    Raises:
        OSError: nothing answers at the address.
    """
    host, separator, port = address.rpartition("//")[2].rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()


_opened: OrderedDict[bytes, Any] = OrderedDict()
"""What this process of a cluster opened, by key; the last ones."""


def _warm_up() -> None:
    """Import what takes seconds; nearly every task needs it."""
    import diffusers.pipelines.pipeline_utils  # noqa: F401


def _do(key: bytes, opener: Any, work: Any, threads: int, argument: Any) -> Any:
    """Run a task in a process of the cluster."""
    import torch

    torch.set_num_threads(threads)
    if key not in _opened:
        _opened[key] = opener()
    _opened.move_to_end(key)
    while len(_opened) > KEPT:
        _opened.popitem(last=False)
    return work(_opened[key], argument)
