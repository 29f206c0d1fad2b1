"""Eight devices learn four toys together: the mean of what they learned beside each device alone.

    pip install "edge-dit[onnx,ort,flower]"
    python samples/fleet/run.py --work DIR [--rounds 4] [--steps 25] [--noise 1 --clip 1]

Each toy of samples/reproduce/subjects.py is on two devices, which have four pictures of it each.
All train tiny-sana's blocks from one bundle. DIR then holds results.json, results.md and
results.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# No reports to their makers; and workers as quick as this process, not at niceness 15.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_worker_niceness": "0"}

import matplotlib
import numpy as np
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

import edge_dit as ed
import edge_dit_runtime as er
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.evaluate import adapted, encode_whole, heldout_loss
from edge_dit.store.files import write_atomic, write_json
from edge_dit_runtime.fleet.averaging import FIXED, PRODUCT
from edge_dit_runtime.fleet.client import Place, client_app
from edge_dit_runtime.fleet.server import Privacy, Rounds, lead, write_outcome

SAMPLES = Path(__file__).resolve().parents[1]
sys.path.append(str(SAMPLES / "reproduce"))
from subjects import HELD_OUT, TOYS, TRAIN, write_subject  # noqa: E402

DEVICES, TOYS_USED = 8, list(TOYS)[:4]
BEFORE, POOLED = "before", "all pictures in one place"
SIMULATION = {"client_resources": {"num_cpus": 1}, "init_args": {"address": "local"}}
"""A Ray of its own: Flower's would join one that runs here, of another version perhaps."""
FLEETS = {"fleet, A fixed": FIXED, "fleet, products": PRODUCT}


def share_out(work: Path) -> None:
    """Write every device's pictures, all of them together, and those that nobody trains on."""
    for number, toy in enumerate(TOYS_USED):
        write_subject(toy, work / "toys" / toy)
        for part, views in (("train", TRAIN), ("heldout", HELD_OUT)):
            for view in range(len(views)):
                device = 2 * number + view % 2
                folders = ["heldout"] if part == "heldout" else ["all", f"device-{device}"]
                for folder in folders:
                    (work / folder).mkdir(parents=True, exist_ok=True)
                    for suffix in ("png", "txt"):
                        source = work / "toys" / toy / part / f"toy-{view}.{suffix}"
                        shutil.copy(source, work / folder / f"{toy}-{view}.{suffix}")


def write_job(work: Path, steps: int, draws: int) -> Path:
    """tiny-sana's job with the pictures of all devices, for whose captions the plan has room."""
    text = (SAMPLES / "sana.toml").read_text()
    text = text[: text.index("[export]")] + '[export]\ntargets = ["onnx"]\n'
    for old, new in {
        'path = "tiny-sana"': f"path = {json.dumps(str(SAMPLES / 'tiny-sana'))}",
        'images = "subject/train"': 'images = "all"',
        "steps = 700": f"steps = {steps}",
        "draws = 400": f"draws = {draws}",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    write_atomic(work / "job.toml", text)
    return work / "job.toml"


def place_of(work: str, config: Any) -> Place:
    """The place of a simulated device."""
    folder = Path(work)
    return Place(folder / "bundle", bank=folder / f"bank-{int(config['partition-id'])}")


def fleet(work: Path, name: str, asked: Rounds) -> dict[str, Any]:
    """Let a fleet learn in the simulation engine; losses and epsilon. Its LoRA goes to ``name``."""
    app, told = ServerApp(), {}

    @app.main()
    def main(grid: Any, context: Any) -> None:
        outcome = lead(work / "bundle", asked, grid)
        write_outcome(open_bundle(work / "bundle"), outcome, work / name)
        told.update(losses=outcome.losses, epsilon=outcome.epsilon)

    run_simulation(
        app, client_app(partial(place_of, str(work))), DEVICES, backend_config=SIMULATION
    )
    if not told:
        raise BadInput("fleet", found="no outcome", remedy="see what Flower printed")
    return told


def alone(work: Path, bank: str, name: str, steps: int) -> None:
    """Train one device on its own bank, as `edge-dit train` does."""
    er.train(work / "bundle", work / bank, work / f"{name}-run", steps=steps)
    er.save_lora(work / f"{name}-run", work / name)


def judge(work: Path, plan: Plan) -> Callable[[str], float]:
    """Held-out losses of LoRA folders, over the pictures of all toys that nobody trained on."""
    model = model_of(plan)
    pipeline = load_pipeline(model.folder, variant=model.variant)
    pictures = encode_whole(plan, model, pipeline, read_folder(work / "heldout", None, plan.s_max))

    def loss(name: str) -> float:
        with adapted(pipeline, None if name == BEFORE else work / name):
            return heldout_loss(model, pipeline, pictures)

    return loss


def write_results(work: Path, facts: dict[str, Any]) -> None:
    """results.json, the table and the figure."""
    losses, epsilon = facts["losses"], facts["epsilon"]
    rows = [f"| {name} | {loss:.4f} |" for name, loss in losses.items()]
    rounds = f"{facts['rounds']} rounds of {facts['steps']} steps"
    words = (
        f"| {DEVICES} devices, {rounds} | held-out loss |\n"
        "|---|---|\n" + "\n".join(rows) + "\n\n"
        f"epsilon {epsilon:.1f} at delta {facts['delta']:g}, as Flower's accountant says.\n"
    )
    write_json(work / "results.json", facts)
    write_atomic(work / "results.md", words)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    bars = axes.barh(list(losses)[::-1], list(losses.values())[::-1], color="#4477aa")
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.margins(x=0.12)  # room for the numbers
    axes.set_xlabel("held-out loss over the pictures of all toys")
    figure.savefig(work / "results.png", dpi=120)
    print(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything goes")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25, help="of a device in a round")
    parser.add_argument("--draws", type=int, default=64, help="in the bank of each device")
    parser.add_argument("--noise", type=float, default=1.0, help="multiplier")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a device's change")
    asked = parser.parse_args()
    work, begun = asked.work.resolve(), time.monotonic()
    total = asked.rounds * asked.steps
    share_out(work)
    job = ed.read_job(write_job(work, total, asked.draws))
    plan = ed.plan(job)
    ed.export(plan, work / "bundle", ["onnx"])
    for bank, folder in [("bank-all", "all")] + [
        (f"bank-{n}", f"device-{n}") for n in range(DEVICES)
    ]:
        ed.precompute(plan, read_folder(work / folder, None, plan.s_max), work / bank)
    for number in range(DEVICES):
        alone(work, f"bank-{number}", f"alone-{number}", total)
    alone(work, "bank-all", "pooled", total)
    private = Privacy(asked.noise, asked.clip)
    plain = {
        name: fleet(work, how, Rounds(DEVICES, asked.rounds, asked.steps, how))
        for name, how in FLEETS.items()
    }
    noised = fleet(work, "private", Rounds(DEVICES, asked.rounds, asked.steps, FIXED, private))
    loss = judge(work, plan)
    each = [loss(f"alone-{number}") for number in range(DEVICES)]
    losses = {
        BEFORE: loss(BEFORE),
        f"a device alone (mean of {DEVICES})": float(np.mean(each)),
        "a device alone (best)": min(each),
        **{name: loss(how) for name, how in FLEETS.items()},
        f"fleet, A fixed, noise {asked.noise:g}, clip {asked.clip:g}": loss("private"),
        POOLED: loss("pooled"),
    }
    facts = {
        "losses": losses, "alone": each, "epsilon": noised["epsilon"], "delta": private.delta,
        "rounds": asked.rounds, "steps": asked.steps, "draws": asked.draws,
        "train_losses": {name: told["losses"] for name, told in plain.items()},
        "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    write_results(work, facts)


if __name__ == "__main__":
    main()
