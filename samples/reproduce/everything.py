"""Everything that README.md quotes, by one command; what is done is not repeated.

    python samples/reproduce/everything.py --work DIR

Stage by stage, each a command of its own that can be stopped and goes on; a stage that is finished
is skipped. In the end samples/reproduce/results, docs/results and edge_dit/budget/quality.json hold
what was measured, and DIR/seconds.json how long each stage took. The whole was not timed yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from edge_dit.progress import bar
from edge_dit.store.files import write_atomic, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODELS = ("tiny-sana", "tiny-flux")


def stages(work: Path) -> dict[str, list[str]]:
    """Name of a stage -> its command, after the interpreter."""
    runs, found = str(work / "ablations"), str(ROOT / "docs" / "results")

    def script(name: str, *words: str) -> list[str]:
        return [str(HERE / f"{name}.py"), *words]

    each = {
        f"{what} of {model}": command
        for model in MODELS
        for what, command in {
            "fairness": script(
                "fair", str(ROOT / "samples" / model), "-o", str(HERE / "results" / model)
            ),
            "ablations": script("run", "--work", runs, "--model", model),
        }.items()
    }
    return {
        **each,
        "tails": script("tails", runs, found),
        "int8": script("cheaper", "int8", runs, found),
        "half an optimizer": script("cheaper", "lean", runs, found),
        "diagnosis": script("diagnose", "--work", str(work / "diagnosis")),
        "priors": script("prior", str(work / "prior"), found),
        "masks": script("masks", str(work / "masks"), found),
        "gap": script("gap", "--subjects", "2", "--seeds", "1"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is finished")
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "seconds.json"
    seconds: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    planned = stages(work)
    with bar("stages", len(planned), len(seconds)) as advance:
        for name, command in planned.items():
            if name in seconds:
                continue
            begun = time.monotonic()
            subprocess.run([sys.executable, *command], check=True)
            seconds[name] = time.monotonic() - begun
            write_json(kept, seconds)
            advance(note=name)
    for model in MODELS:
        for file in sorted((work / "ablations" / model).iterdir()):
            if file.is_file():
                write_atomic(HERE / "results" / model / file.name, file.read_bytes())
    subprocess.run([sys.executable, str(HERE / "calibrate.py")], check=True)
    for name, took in seconds.items():
        print(f"{name}: {took / 60:.0f} min")


if __name__ == "__main__":
    main()
