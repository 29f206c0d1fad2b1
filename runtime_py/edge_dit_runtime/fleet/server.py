"""The server of a fleet: Flower's ServerApp that averages what devices learned.

It sees no picture: adapters come in, and their mean goes out. It needs the bundle's manifest and
adapter, and neither a runtime nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_dit.contract.adapter import write_adapter_folder
from edge_dit.contract.adapter_formats import format_of
from edge_dit.contract.bundle import Bundle, open_bundle
from edge_dit.errors import BadInput, require
from edge_dit.progress import warn
from edge_dit_runtime.fleet.averaging import FIXED, How, received, sent

DELTA = 1e-3
"""Default delta of the privacy that is stated; to be well below one over the number of devices."""


@dataclass(frozen=True)
class Privacy:
    """Noise that hides whether a device took part, by Flower's central differential privacy.

    Attributes:
        noise: standard deviation of the noise over ``clip``, of the sum over devices.
        clip: largest norm of what a device may change in a round.
        delta: of the epsilon that Flower's accountant states.
    """

    noise: float
    clip: float
    delta: float = DELTA


@dataclass(frozen=True)
class Rounds:
    """What a fleet does.

    Attributes:
        devices: that take part in every round.
        rounds: of training and averaging.
        steps: AdamW steps of a device in a round.
        how: what is averaged, see `edge_dit_runtime.fleet.averaging`.
        privacy: noise, or none.
    """

    devices: int
    rounds: int
    steps: int
    how: How = FIXED
    privacy: Privacy | None = None


@dataclass(frozen=True)
class Outcome:
    """What a fleet learned.

    Attributes:
        adapter: the mean, LoRA tensors by diffusers name.
        losses: mean training loss of each round.
        epsilon: as Flower's accountant says, or None without noise.
    """

    adapter: dict[str, np.ndarray]
    losses: list[float]
    epsilon: float | None


def lead(
    bundle: Path, asked: Rounds, grid: Any, seen: Callable[[int, Any], None] | None = None
) -> Outcome:
    """Lead the rounds of a fleet.

    Args:
        bundle: the folder that all devices have; manifest and adapter are read.
        asked: what the fleet does.
        grid: Flower's, from a ServerApp's main function.
        seen: told the number of each round, from 0, and the mean adapter after it.

    Raises:
        BadInput: Flower or its accountant is missing; or no device answered in a round.
    """
    flower = require("flwr.app", "a fleet")
    base = open_bundle(bundle).adapter()
    strategy = strategy_of(asked, base)
    first = flower.ArrayRecord(
        {name: flower.Array(value) for name, value in sent(base, asked.how).items()}
    )

    def evaluate(number: int, arrays: Any) -> None:
        if seen is not None:
            seen(number, received(_numbers(arrays), base, asked.how))

    result = strategy.start(
        grid=grid,
        initial_arrays=first,
        num_rounds=asked.rounds,
        train_config=flower.ConfigRecord(
            {"rounds": asked.rounds, "steps": asked.steps, "how": asked.how}
        ),
        evaluate_fn=evaluate,
    )
    losses = [float(each["loss"]) for _, each in sorted(result.train_metrics_clientapp.items())]
    if len(losses) < asked.rounds:
        raise BadInput(
            "fleet",
            found=f"{asked.rounds - len(losses)} of {asked.rounds} rounds without an answer of all "
            f"{asked.devices} devices",
            expected="devices that train and answer",
            remedy="see what the devices say",
        )
    spent = strategy.privacy_spent() if asked.privacy else None
    adapter = received(_numbers(result.arrays), base, asked.how)
    return Outcome(adapter, losses, None if spent is None else float(spent.epsilon))


def _numbers(arrays: Any) -> dict[str, np.ndarray]:
    return {name: array.numpy().astype(np.float32) for name, array in arrays.items()}


def strategy_of(asked: Rounds, base: Mapping[str, np.ndarray]) -> Any:
    """Flower's FedAvg, with its central differential privacy around it where that is asked for.

    What devices send is averaged as it is, so that clipping and noise are Flower's own. With
    ``how = "product"`` a device gets the mean product, and finds the factors to train on itself.
    """
    flower, count = require("flwr.serverapp.strategy", "a fleet"), asked.devices
    plain = flower.FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=count,
        min_available_nodes=count,
    )
    if asked.privacy is None:
        return plain
    return flower.DifferentialPrivacyServerSideFixedClipping(
        plain,
        asked.privacy.noise,
        asked.privacy.clip,
        count,
        accountant=_accountant(asked),
    )


def _accountant(asked: Rounds) -> Any:
    assert asked.privacy is not None
    require("dp_accounting", "differential privacy")
    flower = require("flwr.supercore.privacy_accounting", "a fleet")
    return require("flwr.serverapp", "a fleet").RdpAccountant(
        flower.PrivacyConfig(
            target_delta=asked.privacy.delta,
            population_size=asked.devices,
            neighboring_relation=flower.NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=flower.SamplingMethod.NO_AMPLIFICATION,
        )
    )


def server_app(bundle: Path, asked: Rounds, out: Path) -> Any:
    """Flower's ServerApp, which writes the mean of the last round as a LoRA folder.

    Args:
        bundle: the folder that all devices have.
        asked: what the fleet does.
        out: where the LoRA goes.
    """
    app = require("flwr.serverapp", "a fleet").ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        outcome = lead(bundle, asked, grid)
        write_outcome(open_bundle(bundle), outcome, out)
        if outcome.epsilon is not None and asked.privacy is not None:
            warn(f"privacy spent: epsilon {outcome.epsilon:.3g} at delta {asked.privacy.delta:g}")

    return app


def write_outcome(bundle: Bundle, outcome: Outcome, out: Path) -> None:
    """Write what a fleet learned as a folder for ``pipe.load_lora_weights``, or PEFT's."""
    plan = bundle.manifest.plan
    rank, alpha, name = int(plan["rank"]), float(plan["alpha"]), str(plan["model_name"])
    form = format_of(bundle.manifest.family)
    write_adapter_folder(out, outcome.adapter, rank, alpha, name, form)
