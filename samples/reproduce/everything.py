"""Everything that README.md quotes, by one command; what is done is not repeated.

    python samples/reproduce/everything.py --work DIR

Stage by stage, each a command of its own that can be stopped and goes on; a stage that is finished
is skipped. In the end samples/reproduce/results, docs/results, edge_dit/budget/quality.json and the
tables of the documents hold what was measured, and DIR/seconds.json how long each stage took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def perform(command: list[str]) -> float:
    """Run a stage; its seconds."""
    begun = time.monotonic()
    subprocess.run([sys.executable, *command], check=True)
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is finished")
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "seconds.json"
    seconds: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    rounds = stages(work)
    with bar("stages", sum(map(len, rounds)), len(seconds)) as advance:
        for together in rounds:
            missing = {name: words for name, words in together.items() if name not in seconds}
            with ThreadPoolExecutor(max(1, len(missing))) as pool:
                for name, took in zip(missing, pool.map(perform, missing.values()), strict=True):
                    seconds[name] = took
                    write_json(kept, seconds)
                    advance(note=name)
    for model in MODELS:
        for file in sorted((work / "ablations" / model).iterdir()):
            if file.is_file():
                write_atomic(HERE / "results" / model / file.name, file.read_bytes())
    diagnosis = work / "diagnosis" / MODELS[0] / "diagnosis.json"
    write_atomic(HERE / "results" / MODELS[0] / diagnosis.name, diagnosis.read_bytes())
    for script in ("calibrate", "pages"):
        subprocess.run([sys.executable, str(HERE / f"{script}.py")], check=True)
    for name, took in seconds.items():
        print(f"{name}: {took / 60:.0f} min")
    rounds_took = sum(max(seconds[name] for name in together) for together in rounds)
    print(f"all: {rounds_took / 60:.0f} min")


if __name__ == "__main__":
    main()
