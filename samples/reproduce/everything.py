"""Everything that README.md quotes, by one command; what is done is not repeated.

    python samples/reproduce/everything.py --work DIR

Stage by stage, each a command of its own that can be stopped and goes on; a stage that is finished
is skipped. What a stage measured is in samples/reproduce/results or docs/results when it ends; in
the end edge_dit/budget/quality.json and the tables of the documents are made of it.
DIR/seconds.json has how long each round of stages took, in all attempts; it is beside the results
when all are done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from arms import MODELS

from edge_dit.progress import bar
from edge_dit.store.files import write_atomic, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORES = 2


def stages(work: Path) -> list[dict[str, list[str]]]:
    """Rounds of stages: name of a stage -> its command, after the interpreter.

    As many stages of a round run side by side as there are cores; one that takes all is alone.
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
        {
            **{f"priors of {model}": script("prior", priors, found, model) for model in MODELS},
            "masks": script("masks", str(work / "masks"), found),
            "memory": script("memory"),
        },
        {"priors": script("prior", priors, found)},
    ]


class Record:
    """How long each round took, in all its attempts, and which stages are done: DIR/seconds.json.

    Args:
        file: of the record.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, Lock()
        kept = json.loads(file.read_text()) if file.exists() else {"seconds": {}, "done": []}
        self.seconds: dict[str, float] = kept["seconds"]
        self.done: list[str] = kept["done"]

    @contextmanager
    def timing(self, together: str) -> Iterator[None]:
        """A context in which a round runs."""
        begun = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - begun
            self.seconds[together] = self.seconds.get(together, 0.0) + took
            self._write()

    def perform(self, stage: str, command: list[str]) -> None:
        """Run a stage to its end."""
        subprocess.run([sys.executable, *command], check=True)
        with self._lock:
            self.done.append(stage)
            self._write()

    def _write(self) -> None:
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
            with record.timing(" and ".join(together)), ThreadPoolExecutor(CORES) as pool:
                made = pool.map(record.perform, missing, missing.values())
                for name, _ in zip(missing, made, strict=True):
                    advance(note=name)
            take(work)
    for script in ("calibrate", "pages"):
        subprocess.run([sys.executable, str(HERE / f"{script}.py")], check=True)
    write_json(HERE / "results" / "seconds.json", record.seconds)
    for name, seconds in record.seconds.items():
        print(f"{name}: {seconds / 60:.0f} min")
    print(f"all: {sum(record.seconds.values()) / 60:.0f} min")


if __name__ == "__main__":
    main()
