"""Everything that README.md quotes, by one command; what is done is not repeated.

    python samples/reproduce/everything.py --work DIR

Stage by stage, each a command of its own that can be stopped and goes on; a stage that is finished
is skipped. What a stage measured is in samples/reproduce/results or docs/results when it ends; in
the end edge_dit/budget/quality.json and the tables of the documents are made of it.
DIR/seconds.json has how long each stage took; a seconds.json beside the results, made when all are
done, how long those that run side by side did.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from edge_dit.progress import bar
from edge_dit.store.files import write_atomic, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODELS = ("tiny-sana", "tiny-flux")


def stages(work: Path) -> list[dict[str, list[str]]]:
    """Rounds of stages, which run side by side: name of a stage -> its command, after the
    interpreter. A stage that takes both cores is alone.
    """
    runs, priors, found = (str(work / "ablations"), str(work / "prior"), str(ROOT / "docs/results"))

    def script(name: str, *words: str) -> list[str]:
        return [str(HERE / f"{name}.py"), *words]

    def fairness(model: str) -> list[str]:
        return script("fair", str(ROOT / "samples" / model), "-o", str(HERE / "results" / model))

    return [
        {f"fairness of {model}": fairness(model) for model in MODELS},
        *(
            {f"ablations of {model}": script("run", "--work", runs, "--model", model)}
            for model in MODELS
        ),
        {"diagnosis": script("diagnose", "--work", str(work / "diagnosis"))},
        {f"priors of {model}": script("prior", priors, found, model) for model in MODELS},
        {
            "masks": script("masks", str(work / "masks"), found),
            "gap": script("gap", "--subjects", "2", "--seeds", "1"),
        },
        {"priors": script("prior", priors, found), "memory": script("memory")},
    ]


class Record:
    """How long each stage took, in all its attempts, and which are done: DIR/seconds.json.

    Args:
        file: of the record.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, Lock()
        kept = json.loads(file.read_text()) if file.exists() else {"seconds": {}, "done": []}
        self.seconds: dict[str, float] = kept["seconds"]
        self.done: list[str] = kept["done"]

    def perform(self, stage: str, command: list[str]) -> None:
        """Run a stage to its end."""
        begun, done = time.monotonic(), False
        try:
            subprocess.run([sys.executable, *command], check=True)
            done = True
        finally:
            with self._lock:
                took = time.monotonic() - begun
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took
                self.done += [stage] if done else []
                write_json(self.file, {"seconds": self.seconds, "done": self.done})


def take(work: Path) -> None:
    """Copy what stages that left it in ``work`` measured to `HERE`/results."""
    for model in MODELS:
        files = [*(work / "ablations" / model).glob("*.*")]
        files += (work / "diagnosis" / model).glob("*.json")
        for file in files:
            write_atomic(HERE / "results" / model / file.name, file.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is finished")
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    record, rounds = Record(work / "seconds.json"), stages(work)
    with bar("stages", sum(map(len, rounds)), len(record.done)) as advance:
        for together in rounds:
            missing = {name: words for name, words in together.items() if name not in record.done}
            with ThreadPoolExecutor(max(1, len(missing))) as pool:
                made = pool.map(record.perform, missing, missing.values())
                for name, _ in zip(missing, made, strict=True):
                    advance(note=name)
            take(work)
    for script in ("calibrate", "pages"):
        subprocess.run([sys.executable, str(HERE / f"{script}.py")], check=True)
    took = {
        " and ".join(together): max(record.seconds[name] for name in together)
        for together in rounds
    }
    write_json(HERE / "results" / "seconds.json", took)
    for name, seconds in took.items():
        print(f"{name}: {seconds / 60:.0f} min")
    print(f"all: {sum(took.values()) / 60:.0f} min")


if __name__ == "__main__":
    main()
