"""Plants mistakes in bundles of all families and counts what verify finds and names.

    python tests/trust/mutants.py --run --work FOLDER [--each 10] [--out docs/results/mutants.json]

A run can be stopped and started again: worlds and verdicts in FOLDER are kept. What counts:

- Caught: verify's comparison fails, or refuses the bundle.
- Equivalent: not caught, and at fresh points (`fresh_points`: 8 draws, 20 updates, 20 patches) the
  mutant is within the target's own tolerances of the clean bundle. Any other miss is a gap.
- Block named: of a caught mutant of one block, that the first line of verify has the block.
- Module named: of a caught mutant of one module, that this line has the module, or, if it carries
  no LoRA, one of the nearest that do (`edge_dit.reference.locate.Modules.beside`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planting import CLAIMS, Mutant, Site, relist, sites
from pydantic import ValidationError

from edge_dit.app.claims import false_claims
from edge_dit.app.verify import Reference, compared, measure_reference, verify_target
from edge_dit.contract.adapter import with_random_b
from edge_dit.contract.bank import Bank
from edge_dit.contract.bundle import ADAPTER, MANIFEST, Bundle, open_bundle
from edge_dit.contract.certificate import TargetResult, differences
from edge_dit.contract.integrity import content_faults
from edge_dit.contract.targets import TARGETS
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.planning.plan import Plan, model_of
from edge_dit.store.tensors import TensorFile, write_tensors
from edge_dit_runtime.measure import measure, patches, replayed
from edge_dit_runtime.probes import Probe, varied
from edge_dit_runtime.session import open_sampler, open_session
from worlds import World, make_world

FAMILIES = {
    "sana": "sana-1.5",
    "flux": "flux-dev",
    "sd3": "sd3.5-medium",
    "pixart": "pixart-sigma",
    "qwen_image": "qwen-image",
}
"""Family -> pipeline of `pipelines.PIPELINES`."""
ALL_TARGETS = ("onnx", "ort-training", "executorch")
STEPS = 20
SEED = 2
FRESH_DRAWS, FRESH_UPDATES, FRESH_PATCHES = 8, 20, 20


@dataclass(frozen=True)
class Verdict(Site):
    """What verify says of a mutant.

    Attributes:
        how: "compared", "refused", "claimed", "claimed with --plan" (only where verify is told the
            plan: how many steps and draws are meant no number shows) or "missed".
        line: the first line that verify gives.
        worst: of a miss, the largest share of a tolerance that is used at fresh points.
        named_block, named_module: None where the mutant has none.
    """

    how: str
    line: str
    worst: float | None
    named_block: bool | None
    named_module: bool | None

    @property
    def caught(self) -> bool:
        """Whether verify fails."""
        return self.how != "missed"

    @property
    def equivalent(self) -> bool:
        """Whether it is a miss within the target's tolerances."""
        return self.worst is not None and self.worst <= 1


# ---------------------------------------------------------------- which


def sample(mutants: Iterable[Mutant], each: int) -> list[Mutant]:
    """``each`` of every target and layout, of as many kinds as there are, the same every time."""
    cells: dict[tuple[str, ...], dict[str, list[Mutant]]] = defaultdict(lambda: defaultdict(list))
    for mutant in mutants:
        cells[mutant.family, mutant.target, mutant.layout][mutant.kind].append(mutant)
    chosen = []
    for cell, kinds in sorted(cells.items()):
        rng = random.Random(zlib.crc32("|".join(cell).encode()) + SEED)
        order = sorted(kinds)
        rng.shuffle(order)
        for kind in order:
            rng.shuffle(kinds[kind])
        turns = max(map(len, kinds.values()))
        ranked = [kinds[k][turn] for turn in range(turns) for k in order if turn < len(kinds[k])]
        chosen += ranked[:each]
    return chosen


# ---------------------------------------------------------------- names


def names_block(line: str, block: str) -> bool:
    """Whether a line of verify has a tensor of the block."""
    return bool(re.search(rf"(?<!\w){re.escape(block)}\.", line))


# ---------------------------------------------------------------- verify


class Judge:
    """Verify's comparison with the bundles of one world.

    Args:
        plan, bank, bundle: of the world; the bundle is clean.
        family: as it is reported.
    """

    def __init__(self, plan: Plan, bank: Path, bundle: Path, family: str) -> None:
        self.plan, self.family = plan, family
        self.clean, self.bank_folder = open_bundle(bundle), bank
        self.bank = Bank(bank, plan.identity())

    @cached_property
    def _subgraph(self) -> tuple[Any, Any]:
        from edge_dit.reference.eager import adapted_subgraph

        return adapted_subgraph(self.plan, model_of(self.plan))

    @cached_property
    def reference(self) -> Reference:
        """PyTorch's."""
        from edge_dit.reference.eager import lora_tensors

        subgraph, _ = self._subgraph
        fresh = lora_tensors(subgraph)
        return measure_reference(subgraph, fresh, self.plan, self.bank, STEPS)

    def mutants(self) -> list[Mutant]:
        """Every mutant of the bundle."""
        return sites(self.clean, self.family, self.bank[0])

    def verdict(self, mutant: Mutant) -> Verdict:
        """Plant a mutant in a copy, and ask verify."""
        with tempfile.TemporaryDirectory() as name:
            folder = self.copy(Path(name) / "bundle", mutant.target)
            mutant.plant(folder)
            relist(folder)
            assert (folder / MANIFEST).read_bytes() != (self.clean.folder / MANIFEST).read_bytes()
            how, line = self._ask(folder, mutant)
            worst = self.share_at_fresh_points(folder, mutant) if how == "missed" else None
        block = module = None
        if how != "missed" and mutant.block:
            block = names_block(line, mutant.block)
        if how != "missed" and mutant.module:
            blocks = [mutant.block] if mutant.block else list(self.reference.modules.calls)
            module = any(self._names(line, f"{name}.{mutant.module}") for name in blocks)
        facts = {k: v for k, v in vars(mutant).items() if k != "plant"}
        return Verdict(
            **facts,
            how=how,
            line=line,
            worst=worst,
            named_block=block,
            named_module=module,
        )

    def _names(self, line: str, module: str) -> bool:
        allowed = (module, *self.reference.modules.beside(module))
        return any(re.search(rf"(?<!\w){re.escape(name)}\b", line) for name in allowed)

    def clean_result(self, target: str, layout: str) -> TargetResult:
        """Of the clean bundle."""
        return self._compare(self.clean, target, layout)

    def copy(self, folder: Path, target: str) -> Path:
        """The clean bundle, as far as a target reads it."""
        if target != CLAIMS:
            shutil.copytree(self.clean.folder / target, folder / target)
        folder.mkdir(exist_ok=True)
        for name in (ADAPTER, MANIFEST):
            shutil.copy(self.clean.folder / name, folder)
        return folder

    def _ask(self, folder: Path, mutant: Mutant) -> tuple[str, str]:
        try:
            bundle = open_bundle(folder)
            if mutant.target == CLAIMS:
                if claims := self._claims(bundle):
                    return "claimed", claims[0]
                claims = self._claims(bundle, self.plan)
                return ("claimed with --plan", claims[0]) if claims else ("missed", "")
            assert content_faults(bundle, mutant.target, verify_hashes=True) == []
            result = self._compare(bundle, mutant.target, mutant.layout)
        except (BadInput, CheckFailed, ValidationError) as fault:
            return "refused", str(fault)
        if result.error:
            return "refused", result.error
        return ("compared", result.in_words()) if result.failed else ("missed", "")

    def _claims(self, bundle: Bundle, planned: Plan | None = None) -> list[str]:
        """As `edge_dit.app.verify.verify` works them out."""
        from edge_dit.reference.eager import adapted_subgraph

        plan = Plan.model_validate({**bundle.manifest.plan, "model": self.plan.model})
        subgraph, batch = adapted_subgraph(plan, model_of(plan))
        return false_claims(bundle, plan, subgraph, batch, planned)

    def _compare(self, bundle: Bundle, target: str, layout: str) -> TargetResult:
        """In this process; ExecuTorch, whose bad programs abort, in a child like verify."""
        reference = self.reference
        if target == "executorch":
            return verify_target(bundle, self.bank_folder, target, layout, reference)
        try:
            session = open_session(bundle, target, layout)
            points = replayed(reference.points)
            found = measure(session, self.bank, bundle.adapter(), STEPS, points)
            found |= patches(open_sampler(bundle, target), self.plan.shared())
        except BadInput:
            raise
        except Exception as error:  # of the runtime: in verify the child ends with it
            return TargetResult(reference.draws, error=str(error)[-300:])
        return compared(reference, found, target)

    def share_at_fresh_points(self, folder: Path, mutant: Mutant) -> float | None:
        """The largest share of a tolerance that tells mutant and clean bundle apart."""
        if mutant.target == CLAIMS:
            return None
        found = []
        for bundle in (self.clean.folder, folder):
            out = folder.parent / f"{len(found)}.safetensors"
            task = [bundle, self.bank_folder, mutant.target, mutant.layout, out]
            subprocess.run([sys.executable, __file__, "--fresh", *map(str, task)], check=True)
            found.append(TensorFile(out).read())
        rows = differences(found[0], found[1], TARGETS[mutant.target].tolerances)
        return max(row.relative / row.tolerance for row in rows)


def fresh_points(bundle: Bundle, bank: Bank, target: str, layout: str) -> dict[str, np.ndarray]:
    """What a target computes where verify does not look: losses and gradients of `FRESH_DRAWS`
    draws, states after `FRESH_UPDATES` updates, and `FRESH_PATCHES` patches.
    """
    session = open_session(bundle, target, layout)
    adapter, found = bundle.adapter(), {}
    rng = np.random.default_rng(77)
    for number in range(FRESH_DRAWS):
        session.load_adapter(with_random_b(adapter, float(rng.uniform(0.01, 0.1))))
        draw = varied(bank[int(rng.integers(len(bank)))], 100 + number)
        found[f"loss.{number}"] = np.array([session.backward(draw)])
        found |= {f"gradients.{number}.{n}": v.copy() for n, v in session.gradients().items()}
    for number in range(FRESH_UPDATES):
        spread = {
            "lr": float(10 ** rng.uniform(-4, 1)),
            "step": int(10 ** rng.uniform(0, 4)),
            "adapter": float(rng.uniform(0.01, 0.1)),
            "first": float(10 ** rng.uniform(-4, 0)),
            "second": float(10 ** rng.uniform(-4, 0)),
            "target": float(10 ** rng.uniform(0, 3)),
        }
        probe = Probe(str(number), "", **spread)
        session.load_state_dict(probe.state(adapter))
        session.lr = probe.lr
        session.step(probe.draw(bank[int(rng.integers(len(bank)))]))
        found |= {f"optimizer.{number}.{n}": v.copy() for n, v in session.state_dict().items()}
    sampler, side = open_sampler(bundle, target), bundle.manifest.plan["s_max"]
    for number in range(FRESH_PATCHES):
        height, width = side + rng.integers(0, 2 * side, 2)
        image = rng.uniform(-1, 1, (1, 3, height, width)).astype(np.float32)
        sigma, u, v = rng.uniform(0, 1, 3).astype(np.float32)
        found[f"patch.{number}"] = sampler(image, sigma[None], np.array([u, v]))
    return found


# ---------------------------------------------------------------- a run


def judge_of(world: World, family: str) -> Judge:
    """For a world of `worlds.make_world`."""
    return Judge(world.plan, world.bank, world.bundle, family)


def run(work: Path, families: Sequence[str], each: int) -> list[Verdict]:
    """Judge a sample of every family; verdicts go to ``work`` one by one, none is made twice."""
    path = work / "verdicts.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    made = {verdict.key: verdict for verdict in (Verdict(**json.loads(x)) for x in lines)}
    verdicts, started, new = [], time.monotonic(), 0
    for number, family in enumerate(families):
        judge = judge_of(make_world(work / family, FAMILIES[family], ALL_TARGETS), family)
        chosen = sample(judge.mutants(), each)
        for place, mutant in enumerate(chosen):
            if mutant.key not in made:
                made[mutant.key] = judge.verdict(mutant)
                with path.open("a") as file:
                    file.write(json.dumps(asdict(made[mutant.key])) + "\n")
                new += 1
            verdicts.append(made[mutant.key])
            left = (len(families) - number) * len(chosen) - place - 1
            eta = (time.monotonic() - started) / max(new, 1) * left
            verdict = verdicts[-1]
            print(
                f"{family} {place + 1}/{len(chosen)} eta {eta:.0f} s {verdict.how} {mutant.key}",
                flush=True,
            )
    return verdicts


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts, and every miss with its reason."""
    counted = [v for v in verdicts if not v.equivalent]
    blocks = [v.named_block for v in counted if v.named_block is not None]
    modules = [v.named_module for v in counted if v.named_module is not None]
    made: dict[str, Any] = {
        "planted": len(verdicts),
        "equivalent": len(verdicts) - len(counted),
        "caught": sum(v.caught for v in counted),
        "missed": sum(not v.caught for v in counted),
        "caught_share": sum(v.caught for v in counted) / len(counted),
        "with_a_block": len(blocks),
        "named_block": sum(blocks),
        "with_a_module": len(modules),
        "named_module": sum(modules),
        "how": dict(Counter(v.how for v in counted if v.caught)),
    }
    for by in ("family", "target", "layout", "kind"):
        groups: dict[str, list[Verdict]] = defaultdict(list)
        for v in verdicts:
            groups[getattr(v, by)].append(v)
        made[f"by_{by}"] = {
            name: {
                "planted": len(group),
                "caught": sum(v.caught for v in group),
                "equivalent": sum(v.equivalent for v in group),
            }
            for name, group in sorted(groups.items())
        }
    made["misses"] = [
        {
            "mutant": v.key,
            "reason": "within the tolerances at fresh points" if v.equivalent else "gap",
            "share_of_tolerance": v.worst,
        }
        for v in verdicts
        if not v.caught
    ]
    made["not_named"] = [
        {"mutant": v.key, "block": v.block, "module": v.module, "line": v.line[:200]}
        for v in counted
        if v.named_block is False or v.named_module is False
    ]
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--fresh", nargs=5, metavar=("BUNDLE", "BANK", "TARGET", "LAYOUT", "OUT"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--each", type=int, default=10, help="of every target and layout")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.fresh:
        bundle, bank, target, layout, out = asked.fresh
        tensors = fresh_points(open_bundle(Path(bundle)), Bank(Path(bank)), target, layout)
        write_tensors(Path(out), tensors)
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    found = summary(run(asked.work, asked.families, asked.each))
    text = json.dumps(found, indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
