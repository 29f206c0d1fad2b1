"""A device of a fleet: Flower's ClientApp that trains a bundle and sends the adapter alone.

    flower-supernode --superlink HOST:PORT --node-config 'bundle="bundle" images="photos"'

A bundle with the loop's parts reads ``images``; any bundle trains on its ``bank``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.adamw import learning_rate
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput, require
from edge_dit_runtime.fleet.averaging import FIXED, A, How, check_how, received, sent
from edge_dit_runtime.run_folder import all_finite
from edge_dit_runtime.session import open as open_session
from edge_dit_runtime.sessions.trainer import Draws, Session


@dataclass(frozen=True)
class Place:
    """Where a device has its bundle and its pictures.

    Attributes:
        bundle: folder.
        images: folder of pictures, for a bundle with the loop's parts; or
        bank: its bank.
        target: "onnx" or "onnx:streamed"; default the bundle's first.
    """

    bundle: Path
    images: Path | None = None
    bank: Path | None = None
    target: str | None = None

    def draws(self) -> Draws:
        """What the device trains on.

        Raises:
            BadInput: neither images nor bank, or both; or they do not fit the bundle.
        """
        if (self.images is None) == (self.bank is None):
            raise BadInput(
                "fleet", found="images and bank" if self.bank else "neither images nor bank"
            )
        if self.bank is not None:
            return Bank(self.bank, open_bundle(self.bundle).manifest.plan_hash)
        from edge_dit_runtime.loop.live import live

        return live(self.bundle, self.images or Path())


@dataclass(frozen=True)
class Order:
    """What a server asks for in a round.

    Attributes:
        round: from 1.
        rounds: of the whole run, over which the learning rate takes its course.
        steps: AdamW steps of a round.
        how: what is sent, see `edge_dit_runtime.fleet.averaging`.
    """

    round: int
    rounds: int
    steps: int
    how: How


@dataclass(frozen=True)
class Learned:
    """What a device sends after a round.

    Attributes:
        arrays: of its adapter, see `edge_dit_runtime.fleet.averaging.sent`.
        loss: mean over the steps.
    """

    arrays: dict[str, np.ndarray]
    loss: float


def learn(place: Place, mean: Mapping[str, np.ndarray], order: Order) -> Learned:
    """Train from the fleet's mean for some steps, with a new optimizer.

    Args:
        place: of bundle and pictures.
        mean: as the server sends it.
        order: what it asks for.

    Raises:
        BadInput: bundle, pictures and mean do not fit together, or a step is not finite.
    """
    bundle = open_bundle(place.bundle)
    plan = bundle.manifest.plan
    seed = int(plan.get("seed", 0))
    if plan.get("accumulate", 1) > 1 or plan.get("ema", 0) > 0:
        raise BadInput(
            place.bundle,
            found="a plan with [train] accumulate or ema",
            expected="one without: a fleet averages adapters itself, after plain steps",
            remedy="remove both from the job, plan and export again",
        )
    session, draws = open_session(place.bundle, place.target), place.draws()
    base = received(mean, bundle.adapter(), order.how)
    session.load_adapter(base)
    losses = []
    first, total = (order.round - 1) * order.steps, order.rounds * order.steps
    course = plan.get("schedule", "decay"), plan.get("warmup", 0)
    for step in range(first, first + order.steps):
        session.lr = learning_rate(step, total, bundle.manifest.optimizer.lr, *course)
        number = draws.number(step, seed)
        losses.append(session.step(draws[number]))
        if order.how == FIXED:
            _put_back(session, base)
    adapter = session.adapter()
    if not all_finite(adapter):
        raise BadInput(place.bundle, found="a step that is not finite", remedy="plan a lower lr")
    return Learned(sent(adapter, order.how), float(np.mean(losses)))


def _put_back(session: Session, base: Mapping[str, np.ndarray]) -> None:
    """Undo what a step changed of A: the exported optimizer updates all tensors."""
    fixed = {name: value for name, value in base.items() if name.endswith(A)}
    session.load_adapter({**session.adapter(), **fixed})


def client_app(place_of: Callable[[Mapping[str, Any]], Place] | None = None) -> Any:
    """Flower's ClientApp of a device.

    Args:
        place_of: the device's `Place` by Flower's node config; default by its keys "bundle",
            "images", "bank" and "target".

    Raises:
        BadInput: Flower is not installed.
    """
    flower = require("flwr.app", "a fleet")
    app = require("flwr.clientapp", "a fleet").ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        place = (place_of or configured)(context.node_config)
        config = message.content.config_records["config"]
        order = Order(
            int(config["server-round"]),
            int(config["rounds"]),
            int(config["steps"]),
            check_how(str(config["how"])),
        )
        record = message.content.array_records["arrays"]
        mean = {name: array.numpy() for name, array in record.items()}
        learned = learn(place, mean, order)
        arrays = flower.ArrayRecord(
            {name: flower.Array(value) for name, value in learned.arrays.items()}
        )
        # Every device counts the same: weights that differ would tell how many pictures it has.
        metrics = flower.MetricRecord({"num-examples": 1, "loss": learned.loss})
        content = flower.RecordDict({"arrays": arrays, "metrics": metrics})
        return flower.Message(content=content, reply_to=message)

    return app


def configured(config: Mapping[str, Any]) -> Place:
    """The place that a node config names.

    Raises:
        BadInput: it names no bundle.
    """
    if "bundle" not in config:
        raise BadInput(
            "node config",
            found=f"keys {', '.join(config) or 'none'}",
            expected="bundle, and images or bank",
            remedy="""flower-supernode --node-config 'bundle="bundle" images="photos"'""",
        )
    paths = {name: Path(str(config[name])) for name in ("images", "bank") if name in config}
    target = str(config["target"]) if "target" in config else None
    return Place(Path(str(config["bundle"])), **paths, target=target)
