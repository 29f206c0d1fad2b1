"""The command line: options in, calls of `edge_dit.app`, words or JSON out.

Heavy parts are imported by the command that needs them, so `--help` is instant.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from edge_dit import __version__
from edge_dit.errors import BadInput, CheckFailed
from edge_dit.store.remote import mirrored, named
from edge_dit.text import printable

app = typer.Typer(
    name="edge-dit",
    help="Personalise Diffusion Transformers on the device their user owns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# typer carries its own copy of click in newer releases and exports only this child of its errors.
UsageError: Any = typer.BadParameter.__base__

MOVED = {
    ("plan", "--config"): "edge-dit cost CONFIG",
    ("plan", "--patch"): "edge-dit cost CONFIG --patch PIXELS, or [train] patch in the job",
    ("plan", "--rank"): "edge-dit cost CONFIG --rank RANK, or [train] rank in the job",
    ("plan", "--select"): "edge-dit select JOB --method METHOD, then edge-dit plan JOB",
    ("plan", "--subjects"): "edge-dit select JOB --subjects DIR",
    ("plan", "--embedding"): "edge-dit select JOB --embedding FOLDER",
    ("train", "--layout"): "edge-dit train ... --target onnx:LAYOUT",
}
"""(command, flag) -> where the flag went."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
JobFile = Annotated[Path, typer.Argument(help="job.toml, see samples/sana.toml.")]
PlanFile = Annotated[Path, typer.Option("--plan", help="plan.json, made by edge-dit plan.")]
Bundle = Annotated[Path, typer.Argument(help="Bundle folder, made by edge-dit export.")]
LoopBundle = Annotated[
    Path, typer.Argument(help="Bundle folder, made by edge-dit export with [export] loop = true.")
]
Caption = Annotated[
    str | None, typer.Option(help="Caption of pictures that have none; default the job's.")
]
Recursive = Annotated[bool, typer.Option("--recursive", help="Read sub-folders too.")]
Ram = Annotated[str | None, typer.Option(help="Budget of memory, e.g. 3GiB: the best that fits.")]
Flash = Annotated[
    str | None, typer.Option(help="Budget of storage for bundle and bank, e.g. 2GiB.")
]
StepTime = Annotated[str | None, typer.Option(help="Longest training step, e.g. 5s.")]
Profile = Annotated[Path | None, typer.Option(help="Device profile (JSON); default this machine.")]
SkipRatio = Annotated[float | None, typer.Option(help="Share of blocks to skip, in [0, 1).")]
HeadSkip = Annotated[int | None, typer.Option(min=0, help="Leading blocks to skip (n).")]
TailSkip = Annotated[int | None, typer.Option(min=0, help="Trailing blocks to skip (m).")]
OneTarget = Annotated[
    str | None,
    typer.Option("--target", help="onnx, ort-training, executorch; or a layout, onnx:streamed."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="onnx, ort-training or executorch; may be repeated."),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="On a Ray cluster: host:port, ray://host:port or auto; default one on this machine.",
    ),
]
AnyMemory = Annotated[
    bool, typer.Option("--any-memory", help="Train even if less memory is free than is expected.")
]
TargetsOrLayouts = Annotated[
    list[str] | None,
    typer.Option("--target", help="A target, or a layout (onnx:streamed); may be repeated."),
]


def report(as_json: bool, facts: dict[str, Any], *lines: str) -> None:
    """Print ``facts`` as JSON, or the lines for people."""
    if as_json:
        print(named(json.dumps(facts)))
        return
    for line in lines:
        out.print(printable(named(line)), markup=False)


def sayer(as_json: bool) -> Any:
    """Prints a line or a table; beside JSON on standard error."""

    def say(what: Any) -> None:
        shown = printable(named(what)) if isinstance(what, str) else what
        (err if as_json else out).print(shown, markup=False)

    return say


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command (--debug may stand anywhere; `main` takes it out)."""


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    report(as_json, {"version": __version__}, __version__)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, and what each target still needs."""
    from edge_dit.app.doctor import examine, in_words

    facts = examine()
    report(as_json, facts, *in_words(facts))


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where everything goes.")] = Path(
        "out"
    ),
    target: OneTarget = None,
    job: Annotated[Path | None, typer.Option("--job", help="Another job file.")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Train the job's other targets too, and full LoRA in torch."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """The whole road on the shipped sample, with pictures before and after."""
    from edge_dit.app.quickstart import quickstart as run
    from edge_dit.app.quickstart import samples_folder
    from edge_dit.contract.targets import variant_of

    if target:
        variant_of(target)
    facts = run(job or samples_folder() / "sana.toml", folder, target, sayer(as_json), compare)
    if as_json:
        print(json.dumps({"out": str(folder), **facts}))


@app.command()
def run(
    jobs: Annotated[list[Path], typer.Argument(help="job.toml; of several each gets a folder.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where everything goes.")],
    target: OneTarget = None,
    any_memory: AnyMemory = False,
    ray: Cluster = None,
    as_json: Json = False,
) -> None:
    """Plan, precompute, export, verify, train, write the adapter. Goes on where it stopped."""
    from edge_dit.app.many import Asked, run_many
    from edge_dit.app.run import run as walk
    from edge_dit.cluster.pool import asked
    from edge_dit.contract.targets import variant_of

    if target:
        variant_of(target)
    say = sayer(as_json)
    with asked(ray) as pool:
        if len(jobs) == 1:
            road = walk(jobs[0], folder, target, say, any_memory, pool)
            facts = {"lora": str(road.lora(target or road.plan.targets[0]))}
        else:
            roads = [
                Asked(job.resolve(), folder.resolve() / job.stem, target, any_memory)
                for job in jobs
            ]
            facts = {"loras": [str(lora) for lora in run_many(roads, say, pool)]}
    if as_json:
        print(json.dumps({"out": str(folder), **facts}))


@app.command()
def plan(
    job: JobFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path(
        "plan.json"
    ),
    skip_ratio: SkipRatio = None,
    head_skip: HeadSkip = None,
    tail_skip: TailSkip = None,
    ram: Ram = None,
    flash: Flash = None,
    step_time: StepTime = None,
    target: TargetsOrLayouts = None,
    profile: Profile = None,
    page: Annotated[
        Path | None, typer.Option("--report", help="Also write the plan as a page, plan.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose which blocks to train, at which sizes, and say what that takes."""
    from edge_dit.app import planner
    from edge_dit.app.describe import plan_in_words
    from edge_dit.budget.cost import cost_of_plan, table
    from edge_dit.budget.footprint import read_profile
    from edge_dit.planning.job import read_job
    from edge_dit.planning.plan import write_plan
    from edge_dit.planning.split import SplitRequest

    limits = planner.read_limits(ram, flash, step_time)
    device = read_profile(profile) if profile else None
    read, asked = read_job(job), SplitRequest(skip_ratio, head_skip, tail_skip)
    planned = planner.plan_job(read, asked, limits=limits, targets=target or [], profile=device)
    made = planned.plan
    columns = cost_of_plan(made)
    if page is not None:
        planner.report_on(read, planned, page)
    write_plan(made, output)
    facts = {
        **made.model_dump(mode="json"),
        "cost": {k: vars(v) for k, v in columns.items()},
        "footprints": {k: vars(v) for k, v in planned.footprints.items()},
        "reasons": planned.in_words(),
        "warnings": planned.doubts,
        "pictures": planned.pictures[0].as_json(),
        "subjects": [found.as_json() for found in planned.pictures[1:]],
    }
    written = f"written to {output}" + (f" and {page}" if page else "")
    report(as_json, facts, *plan_in_words(made), *table(columns), *planned.in_words(), written)


@app.command()
def cost(
    config: Annotated[str, typer.Argument(help="A public checkpoint: flux.1-dev, sana-0.6b, ...")],
    skip_ratio: SkipRatio = None,
    head_skip: HeadSkip = None,
    tail_skip: TailSkip = None,
    ram: Ram = None,
    flash: Flash = None,
    step_time: StepTime = None,
    target: TargetsOrLayouts = None,
    profile: Profile = None,
    patch: Annotated[
        int | None, typer.Option(min=1, help="Side of a patch (s_min), pixels.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 16,
    as_json: Json = False,
) -> None:
    """What a public checkpoint would take, or the best that fits a budget; no weights needed."""
    from edge_dit.app.planner import read_limits
    from edge_dit.app.public_plan import PublicRequest, best_within, cost_of
    from edge_dit.budget.footprint import read_profile
    from edge_dit.planning.split import SplitRequest

    limits = read_limits(ram, flash, step_time)
    split = SplitRequest(skip_ratio, head_skip, tail_skip)
    request = PublicRequest(config, split, patch, rank, target or [])
    if limits is None:
        facts, lines = cost_of(request)
    else:
        device = read_profile(profile) if profile else None
        facts, lines = best_within(request, limits, device)
    report(as_json, facts, *lines)


@app.command()
def select(
    job: JobFile,
    method: Annotated[
        str, typer.Option(help="loss, or the paper's generation, which draws pictures.")
    ] = "loss",
    subjects: Annotated[
        Path | None, typer.Option(help="Folder with a folder of images a subject.")
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(help="Of generation: DINO or CLIP, folder or hub id.")
    ] = None,
    ray: Cluster = None,
    as_json: Json = False,
) -> None:
    """Measure which blocks may be skipped; later plans of the model follow it. Long; resumes."""
    from edge_dit.app.planner import select as measure
    from edge_dit.cluster.pool import asked
    from edge_dit.planning.job import read_job

    with asked(ray) as pool:
        path = measure(read_job(job), method, subjects, embedding, pool)
    report(as_json, {"selection": str(path)}, f"{path}: plans of this model follow it now")


@app.command()
def precompute(
    job: JobFile,
    plan_file: PlanFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bank goes.")],
    ray: Cluster = None,
    prior: Annotated[
        bool,
        typer.Option("--prior", help="The prior's draws alone, of nobody's pictures, to ship."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Store the entry state and tail residual of every draw. Goes on where it stopped."""
    from edge_dit.app import api
    from edge_dit.app.describe import bank_in_words
    from edge_dit.cluster.pool import asked
    from edge_dit.planning.make import plan_of

    read = api.read_job(job)
    made = plan_of(read, plan_file)
    with asked(ray) as pool:
        pictures = api.read_prior(read, made) if prior else api.read_pictures(read, made)
        index = api.precompute(made, pictures, output, pool=pool).index
    facts = {"draws": len(index.draws), "images": len(index.images), "prompts": index.prompts}
    report(as_json, facts, *bank_in_words(output))


@app.command()
def export(
    job: JobFile,
    plan_file: PlanFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bundle goes.")],
    target: Targets = None,
    loop: Annotated[
        bool,
        typer.Option("--loop", help="Also what the device makes draws and pictures with."),
    ] = False,
    version: Annotated[
        int,
        typer.Option("--bundle-version", min=1, help="Count up: devices may refuse older ones."),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Write the trainable sub-graph and the patch sampler for every target."""
    from edge_dit.app import api
    from edge_dit.app.describe import bundle_in_words
    from edge_dit.errors import raise_any
    from edge_dit.planning.make import plan_of
    from edge_dit.planning.plan import LOOP_TARGET, loop_faults
    from edge_dit.progress import warn

    read = api.read_job(job)
    planned = plan_of(read, plan_file)
    planned = planned.model_copy(update={"loop": planned.loop or loop})
    raise_any("export", loop_faults(loop, target or planned.targets, planned.surroundings))
    if planned.loop and LOOP_TARGET not in (target or planned.targets):
        warn(f"the loop's parts are in target {LOOP_TARGET} alone, which is not written")
    bundle = api.export(planned, output, target, job=read, version=version)
    manifest = bundle.manifest
    facts = {"targets": manifest.targets, "bytes": sum(file.bytes for file in manifest.files)}
    report(as_json, facts, *bundle_in_words(bundle))


@app.command()
def sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option("--key", help="Private key (PEM) on curve P-256, say.")],
    as_json: Json = False,
) -> None:
    """Sign a verified bundle, its certificate with it, by OpenSSF's model-signing."""
    from edge_dit.app import signing
    from edge_dit.contract.bundle import open_bundle

    path = signing.sign(open_bundle(bundle), key)
    report(as_json, {"signature": str(path)}, f"{path}: edge-dit verify {bundle} --key PUBLIC_KEY")


@app.command()
def verify(
    bundle: Bundle,
    bank: Annotated[
        Path | None, typer.Option("--bank", help="Bank, to compare every target with PyTorch.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="Public key (PEM), to check the signature first.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Length of the training trajectory.")] = 20,
    target: Targets = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the bundle's model; default where it was last planned for."),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="plan.json that the bundle should be of.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the bank's pictures: compare stored draws with them too."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what was varied, exercised, and out of reach.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every target with PyTorch, exit code 1 when one fails; or check the signature."""
    from edge_dit.app import api
    from edge_dit.app.signing import check_signed, signed_in_words
    from edge_dit.app.verify_words import explained, table, why_failed
    from edge_dit.contract.bundle import open_bundle
    from edge_dit.contract.targets import check_targets
    from edge_dit.planning.plan import read_plan

    check_targets(target)
    opened = open_bundle(bundle)
    for name in target or []:
        opened.facts(name)
    if key:
        signed = check_signed(opened, key)
        if not (as_json and bank):
            report(as_json, signed, *signed_in_words(opened, signed))
    if bank is None:
        if key is None:
            raise BadInput("verify", found="neither --bank nor --key", expected="one of them")
        return
    planned = read_plan(plan_file) if plan_file else None
    certificate = api.verify(
        bundle, bank, steps=steps, targets=target, model=model, planned=planned, images=images
    )
    if as_json:
        print(json.dumps(certificate.as_json()))
    else:
        out.print(table(certificate))
        for line in explained(certificate) if explain else []:
            out.print(line, markup=False)
    if not certificate.passed:
        raise CheckFailed(why_failed(certificate))


@app.command()
def collect(
    bundle: LoopBundle,
    images: Annotated[Path, typer.Option(help="Folder of pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the bank goes.")],
    prompt: Caption = None,
    recursive: Recursive = False,
    prior: Annotated[
        Path | None,
        typer.Option(help="A prior's bank, made by precompute --prior."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bank of pictures on the device, without torch. Goes on where it stopped."""
    import edge_dit_runtime as er
    from edge_dit.app.describe import bank_in_words

    index = er.collect(bundle, images, output, prompt=prompt, recursive=recursive, prior=prior)
    facts = {"draws": len(index.draws), "images": len(index.images), "prompts": index.prompts}
    report(as_json, facts, *bank_in_words(output))


@app.command()
def paint(
    bundle: LoopBundle,
    prompts: Annotated[list[str], typer.Argument(help="Prompts that were encoded at export.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture, .png or .jpg.")
    ] = Path("picture.png"),
    run: Annotated[
        Path | None, typer.Option("--run", help="Run folder whose adapter is used; default none.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Of the noise; may be repeated; default 0.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Another negative prompt that was encoded at export.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of a sheet of several pictures.")] = "",
    as_json: Json = False,
) -> None:
    """Paint a picture on the device, without torch; of several prompts or seeds a sheet."""
    import edge_dit_runtime as er

    seeds = seed or [0]
    if min(seeds) < 0:
        raise BadInput("--seed", found=str(min(seeds)), expected="0 or more")
    path = er.paint(bundle, prompts, output, run=run, seeds=seeds, negative=negative, title=title)
    painted = len(set(prompts)) * len(seeds)
    report(as_json, {"picture": str(path)}, f"{path}: {painted} painted")


@app.command()
def train(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the run goes.")],
    bank: Annotated[
        Path | None, typer.Option("--bank", help="Bank, made by edge-dit precompute or collect.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures instead of a bank; draws are made just in time."),
    ] = None,
    prompt: Caption = None,
    recursive: Recursive = False,
    target: OneTarget = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the plan's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    any_memory: AnyMemory = False,
    verify_hashes: Annotated[
        bool, typer.Option(help="Hash every file of the bundle, also those known unchanged.")
    ] = False,
    signer: Annotated[
        Path | None,
        typer.Option("--require-signature", help="Public key (PEM) whose owner must have signed."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Which bundles this device accepts (JSON).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a bundle over its bank, or over pictures. Ctrl-C stops it with a checkpoint."""
    import edge_dit_runtime as er
    from edge_dit.contract.bundle import open_bundle
    from edge_dit.contract.integrity import check_bundle
    from edge_dit.contract.signature import check_policy, check_signature
    from edge_dit.contract.targets import variant_of

    name = variant_of(target).target if target else None
    if signer:
        check_signature(open_bundle(bundle), [signer])
    if policy:
        check_policy(open_bundle(bundle), policy)
    if verify_hashes:
        opened = open_bundle(bundle)
        for each in [name] if name else opened.manifest.targets:
            check_bundle(opened, each, verify_hashes=True)
    check_draws(bank, images, prompt, recursive)
    draws = bank or er.live(bundle, images or Path(), prompt=prompt, recursive=recursive)
    done = er.train(
        bundle,
        draws,
        output,
        target=target,
        steps=steps,
        resume=resume,
        any_memory=any_memory,
    )
    report_run(output, done, as_json)
    if done.done < done.steps:
        raise typer.Exit(130)


def report_run(folder: Path, run: Any, as_json: bool) -> None:
    """Say how far `train` came, and where its page is."""
    from edge_dit_runtime.page.run_page import PAGE

    page, far = folder / PAGE, f"{run.done} of {run.steps} steps on {run.target}"
    stopped = "" if run.done == run.steps else "; stopped early, --resume continues"
    facts = {"done": run.done, "steps": run.steps, "target": run.target, "page": str(page)}
    report(as_json, facts, f"{folder}: {far}{stopped}", f"its page: {page}")


def check_draws(bank: Path | None, images: Path | None, prompt: str | None, more: bool) -> None:
    """Raise `BadInput` unless `train` is given either a bank, or pictures with their options."""
    if (bank is None) == (images is None):
        raise BadInput(
            "train",
            found="neither --bank nor --images" if bank is None else "--bank and --images",
            expected="one of them",
        )
    if bank and (prompt is not None or more):
        raise BadInput(
            "--recursive" if more else "--prompt",
            found="--bank beside it",
            expected="--images: a bank has its pictures and prompts already",
        )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, made by edge-dit train or run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write a page, compare.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put runs side by side: losses, gradients, settings that differ, previews."""
    from edge_dit.store.files import write_atomic
    from edge_dit_runtime.page.compare import as_json as facts_of
    from edge_dit_runtime.page.compare import in_words, page, read_runs

    read = read_runs(runs)
    facts, lines = facts_of(read), in_words(read)
    if output is not None:
        write_atomic(output, page(read))
        facts, lines = {**facts, "page": str(output)}, [*lines, f"written to {output}"]
    report(as_json, facts, *lines)


@app.command()
def adapter(
    run: Annotated[Path, typer.Argument(help="Run folder, made by edge-dit train.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the LoRA goes.")],
    form: Annotated[
        str | None,
        typer.Option("--format", help="diffusers, peft, comfyui or kohya; default the pipeline's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the trained LoRA as a folder for pipe.load_lora_weights, with a PEFT copy in peft/; for
    a pipeline that has no load_lora_weights as a PEFT folder; or in the format of another reader.
    """
    import edge_dit_runtime as er
    from edge_dit.contract.adapter import loading_hint
    from edge_dit.contract.adapter_formats import format_of
    from edge_dit_runtime.run_folder import RunFolder

    path = er.save_lora(run, output, form)
    tensors, read = RunFolder(run).adapter()
    chosen = format_of(read.family, form)
    hint = loading_hint(output, chosen)
    facts = {
        "path": str(path),
        "format": chosen.name,
        "tensors": len(tensors),
        "steps": read.done,
        "load": hint,
    }
    unfinished = "" if read.done == read.steps else f" (unfinished: {read.done} of {read.steps})"
    words = f"{output}: {len(tensors)} LoRA tensors as {chosen.name}{unfinished}"
    report(as_json, facts, words, f"load it: {hint}")


@app.command()
def bench(
    config: Annotated[str, typer.Option(help="A public configuration.")] = "sana-0.6b",
    trained: Annotated[str, typer.Option(help="Trained blocks; 4+4 for FLUX.")] = "14",
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens of a patch.")] = 256,
    text: Annotated[int | None, typer.Option(min=1, help="Text tokens; default all.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after two others.")] = 5,
    target: Annotated[
        list[str] | None,
        typer.Option(help="onnx, onnx:streamed, onnx:streamed:int8, ...; may be repeated."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="eager-bf16, compile, ...: torch to compare with; default all."),
    ] = None,
    full_lora: Annotated[bool, typer.Option(help="Full LoRA at full resolution too.")] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Time operators too.")] = False,
    memory: Annotated[
        str | None, typer.Option(help="Train within 512MiB, say, with no page in memory before.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Collect, train, paint instead.")] = False,
    tail: Annotated[str, typer.Option(help="With --loop: stored, fresh or through.")] = "stored",
    work: Annotated[
        Path, typer.Option(help="Folder for the random model and the bundles; used again.")
    ] = Path("bench"),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write all numbers and the machine, as JSON."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory on random weights, against torch in the same run."""
    from dataclasses import asdict

    from edge_dit.app.bench import bench as plain
    from edge_dit.app.bench import loop as looped
    from edge_dit.app.bench.model import Case, blocks_of
    from edge_dit.app.planner import read_size
    from edge_dit.contract.targets import variant_of
    from edge_dit.models.public_configs import public_config
    from edge_dit.store.files import write_json

    if loop and (profile or baseline or memory):
        raise BadInput("--loop", found="--profile, --baseline or --memory beside it")
    variants = [variant_of(name) for name in target or []]
    text = text or public_config(config).text_tokens
    case = Case(config, blocks_of(trained), tokens, text, rank, steps, full_lora)
    say = sayer(as_json=True)
    if loop:
        measured = looped.bench_loop(case, variants, tail, work, say)
        lines = looped.in_words(measured.rows)
    else:
        most = None if memory is None else read_size("--memory", memory)
        asked = plain.Asked(variants or plain.DEFAULT_VARIANTS, baseline, profile, most)
        measured = plain.bench(case, asked, work, say)
        lines = plain.in_words(measured)
    facts = asdict(measured)
    report(as_json, facts, *lines)
    if output:  # last: a path that cannot be written costs no measurement
        write_json(output, facts)


@app.command()
def serve(
    bundle: Bundle,
    bank: Annotated[
        Path | None, typer.Option("--bank", help="Bank; default: pictures, on the page.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="To listen on; 0 for any free one.")
    ] = 8765,
) -> None:
    """Serve a page that trains the bundle in a browser, to this machine alone. Ctrl-C ends it."""
    from edge_dit.app.serve import server

    with server(bundle, bank, port) as serving:
        host, used = serving.server_address[:2]
        print(f"http://{host!s}:{used}/", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            return


@app.command()
def init(
    images: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    model: Annotated[str, typer.Option(help="Folder, file or hub id of the model.")],
    subject: Annotated[str, typer.Option(help='What they show: "a sks toy".')],
    output: Annotated[Path, typer.Option("-o", help="The job file.")] = Path("job.toml"),
    ram: Ram = None,
    as_json: Json = False,
) -> None:
    """Write a first job for pictures and a model, and say what was chosen and why."""
    from edge_dit.planning.recipes import first_job
    from edge_dit.store.files import write_atomic

    if output.exists():
        raise BadInput(output, found="a file is there already", remedy="choose another -o")
    made = first_job(images, model, subject, ram, output.parent)
    write_atomic(output, made.text)
    facts = {"job": str(output), "reasons": made.reasons}
    report(as_json, facts, *made.reasons, f"written to {output}: edge-dit run {output} -o out/")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A plan, bank, bundle, run, LoRA or pictures.")],
    as_json: Json = False,
) -> None:
    """Say in words what a plan, bank, bundle, run or folder of pictures is."""
    from edge_dit.app.describe import look

    facts, lines = look(path)
    report(as_json, facts, *lines)


def moved(error: Any) -> BadInput | None:
    """Where a flag went that the command no longer has."""
    context = getattr(error, "ctx", None)
    command, flag = context.info_name if context else "", str(getattr(error, "option_name", ""))
    if (command, flag) not in MOVED:
        return None
    where = f"edge-dit {command} {flag}"
    return BadInput(where, found="this flag has moved", remedy=MOVED[command, flag])


ADDRESS = re.compile(r"auto|local|ray://.+|[\w.\-]+:\d+")
"""Of a Ray cluster."""


def with_address(arguments: list[str]) -> list[str]:
    """The arguments, ``--ray`` with its default where no address follows: typer knows no option
    whose value may be left out.
    """
    filled = []
    for number, argument in enumerate(arguments):
        after = arguments[number + 1] if number + 1 < len(arguments) else ""
        alone = argument == "--ray" and not ADDRESS.fullmatch(after)
        filled.append("--ray=local" if alone else argument)
    return filled


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    arguments = with_address([a for a in sys.argv[1:] if a != "--debug"])
    debug = "--debug" in sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):  # a console of another encoding ends no run
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with mirrored(arguments) as local:
            code = app(args=local, prog_name="edge-dit", standalone_mode=False)
        sys.exit(code or 0)
    except (BadInput, CheckFailed, OSError) as error:
        if debug:
            traceback.print_exc()
        err.print(printable(named(f"edge-dit: {error}")), style="red", markup=False)
        sys.exit(1 if isinstance(error, CheckFailed) else 2)
    except UsageError as error:
        if answer := moved(error):
            err.print(f"edge-dit: {answer}", style="red", markup=False)
        else:
            error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted; the same command continues where it can")
        sys.exit(130)
