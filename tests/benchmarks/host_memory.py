"""What the host needs to plan, precompute and export a large checkpoint.

    python tests/benchmarks/host_memory.py sana-1.6b|flux|klein --work DIR

Writes a pipeline whose transformer has a public configuration's blocks (FLUX: 3 double and 4
single ones, klein: 2 and 4), random weights, sharded, and float32: more than 6 GB, klein 4.6 GB.
Then runs each command in a process of its own and prints the peak of its resident memory beside
the promise: 1.3 x (largest block, or trained blocks) + 1 GB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pipelines
from edge_dit.app.bench.model import random_weights
from edge_dit.models.families import family_of
from edge_dit.models.public_configs import CONFIGS
from edge_dit.planning.plan import read_plan
from edge_dit.store.files import write_json

SMALL = {"caption_channels": 24, "joint_attention_dim": 24, "pooled_projection_dim": 12}
"""Widths of the small text encoders of `pipelines`."""
CASES = {
    "sana-1.6b": ("sana", {"in_channels": 4, "out_channels": 4}, 4),
    "flux": ("flux-dev", {"in_channels": 16, "num_layers": 3, "num_single_layers": 4}, 8),
    "klein": ("flux2-klein", {"in_channels": 16, "num_layers": 2, "num_single_layers": 4}, 8),
}
"""Name -> small pipeline, what its transformer's configuration has besides the public one's, and
pixels per token.
"""
PUBLIC = {"flux": "flux.1-dev", "klein": "flux.2-klein-4b"}
"""Name -> public configuration, where it is not the name itself."""


def write(name: str, folder: Path) -> None:
    """The pipeline, an image and a job."""
    small, changes, multiple = CASES[name]
    public = CONFIGS[PUBLIC.get(name, name)]
    family = family_of(public.family)
    pipelines.write_pipeline(small, folder / "model")
    for file in (folder / "model" / "transformer").glob("*"):
        file.unlink()
    known = {key: value for key, value in SMALL.items() if key in public.config}
    config = {"_class_name": family.transformer, **public.config, **known, **changes}
    write_json(folder / "model" / "transformer" / "config.json", config)
    random_weights(family, config, folder / "model" / "transformer")
    (folder / "images").mkdir(exist_ok=True)
    side = 16 * multiple
    Image.effect_noise((side, side), 80).convert("RGB").save(folder / "images" / "noise.png")
    (folder / "job.toml").write_text(
        f"""
[model]
path = "model"
[data]
images = "images"
prompt = "noise"
[train]
resolution = {side}
patch = {side}
draws = 8
[export]
targets = ["onnx", "ort-training"]
"""
    )


def run(folder: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak resident memory, GB, of an edge-dit command."""
    command = [sys.executable, "-c", "from edge_dit.cli import main; main()", *arguments]
    started = time.monotonic()
    child = subprocess.Popen(command, cwd=folder)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{arguments[0]} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    folder: Path = options.work
    if not (folder / "job.toml").is_file():
        write(options.case, folder)
    shards = list((folder / "model" / "transformer").glob("*.safetensors"))
    blocks = sorted(file.stat().st_size / 1e9 for file in shards)
    print(f"checkpoint {sum(blocks):.2f} GB, largest block {blocks[-1]:.2f} GB")
    seconds, peak = run(folder, "plan", "job.toml")
    print(f"plan        {seconds:5.0f} s, peak {peak:.2f} GB")
    seconds, peak = run(folder, "precompute", "job.toml", "--plan", "plan.json", "-o", "bank")
    print(f"precompute  {seconds:5.0f} s, peak {peak:.2f} GB of {1.3 * blocks[-1] + 1:.2f} GB")
    plan = read_plan(folder / "plan.json")
    order = sorted(shards)[1 + plan.head_skip : 1 + plan.layers - plan.tail_skip]
    trained = sum(file.stat().st_size / 1e9 for file in order)
    for target in ("onnx", "ort-training"):
        more = ["--target", target, "-o", f"bundle-{target}"]
        seconds, peak = run(folder, "export", "job.toml", "--plan", "plan.json", *more)
        limit = 1.3 * trained + 1
        print(f"export {target}, {len(plan.trained)} blocks of {trained:.2f} GB together:")
        print(f"            {seconds:5.0f} s, peak {peak:.2f} GB of {limit:.2f} GB")


if __name__ == "__main__":
    main()
