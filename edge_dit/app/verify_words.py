"""A certificate for people: the table, why it failed, and what was tried (``--explain``)."""

from __future__ import annotations

from rich import box
from rich.table import Table

from edge_dit.contract.bundle import Bundle
from edge_dit.contract.certificate import UNROUNDED, BankResult, Certificate
from edge_dit.contract.targets import TARGETS
from edge_dit.planning.plan import Plan
from edge_dit_runtime.probes import ANYWHERE, PLACES, PROBES, SIZES, VARIATIONS

KINDS = ("loss", "gradients", "inputs", "trajectory", "adapter", "optimizer", "patch")
LOOP_KINDS = ("prompts", "collect", "paint")
"""What is compared, in the order of the table; of the loop's parts."""
OTHER = ("(loop)", UNROUNDED)
"""Ends of the titles of what does not round."""
OUT_OF_REACH = (
    "other machines and versions of the runtimes",
    "draws of the bank at which targets were not compared",
    "the quality of the plan: a wrong choice of blocks or of the patch passes",
    "eval_model.onnx of ort-training, which no session uses",
    "forgery: who can rewrite a bundle can rewrite its certificate",
)


def table(certificate: Certificate) -> Table:
    """The worst relative difference of each kind and target, and how many draws were left out."""
    limits: dict[str, list[str]] = {}
    for title in certificate.targets:
        tolerances = TARGETS[title.partition(" ")[0]].tolerances
        if title.partition(" ")[0] in certificate.drift and not title.endswith(OTHER):
            continue
        kinds = LOOP_KINDS if title.endswith("(loop)") else KINDS
        words = ", ".join(f"{kind} {tolerances[kind]:.0e}" for kind in kinds)
        limits.setdefault(words, []).append(title)
    lines = [_of_bank(certificate.bank)] if certificate.bank else []
    lines += [f"limits of {', '.join(names)}: {words}" for words, names in limits.items()]
    for name, drift in certificate.drift.items():
        lines.append(f"limits of {name} in int8: what rounding can move (docs/verify.md)")
        lines.append(f"int8 costs: {drift.in_words()}")
    shown = Table(
        "",
        *(title.replace(" ", "\n") for title in certificate.targets),
        title=f"compared with {certificate.reference}, {certificate.steps} steps",
        caption="\n".join(lines),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    results = certificate.targets.values()
    looped = any(title.endswith("(loop)") for title in certificate.targets)
    for kind in (*KINDS, *(LOOP_KINDS if looped else ())):
        worst = [result.worst.get(kind) for result in results]
        shown.add_row(kind, *(f"{row.relative:.1e}" if row else "-" for row in worst))
    shown.add_row("draws", *(str(len(result.draws.compared)) for result in results))
    shown.add_row("left out", *(str(len(result.draws.left_out)) for result in results))
    shown.add_row("verdict", *("passed" if result.passed else "FAILED" for result in results))
    return shown


def _of_bank(bank: BankResult) -> str:
    """One line: how far stored draws are from the same draws recomputed."""
    # Rows may have limits of their own: what counts is how much of it is used.
    worst = max(bank.tensors, key=lambda row: row.relative / row.tolerance, default=None)
    how = f", worst {worst.relative:.1e} of {worst.tolerance:.0e}" if worst else ""
    verdict = "passed" if bank.passed else "FAILED"
    return f"bank, {len(bank.draws)} draws recomputed: {verdict}{how}"


def why_failed(certificate: Certificate) -> str:
    """Lines for people: changed files, false claims, of each wrong draw of the bank the first
    tensor, and of each target that failed the tensor that says most of where the fault is.
    """
    lines = ["parity failed"]
    lines += [f"  not what was exported: {name}" for name in certificate.changed_files]
    lines += [f"  not what the plan says: {claim}" for claim in certificate.false_claims]
    if bank := certificate.bank:
        lines += [f"  the bank is not what the plan says: {claim}" for claim in bank.false_claims]
        first = {row.name.split(".")[1]: row for row in reversed(bank.failed)}
        lines += [f"  {row.in_words()}" for row in reversed(first.values())]
    for title, result in certificate.targets.items():
        if result.error:
            lines.append(f"  {title}: {result.error}")
        elif failed := result.failed:
            lines.append(f"  {title}: {result.in_words()} ({len(failed)} tensors failed)")
    return "\n".join(lines)


def varied_inputs(bundle: Bundle, plan: Plan, steps: int) -> list[str]:
    """Which inputs of the exported graphs had several values, a line each.

    Args:
        bundle: that is verified.
        plan: of the bundle.
        steps: of the trajectory.
    """
    names = ", ".join(bundle.manifest.names("batch"))
    rates = ", ".join(f"{probe.lr:g}" for probe in PROBES)
    updates = ", ".join(str(probe.step) for probe in PROBES)
    sizes = ", ".join(f"{plan.s_max + rows} x {plan.s_max + columns}" for rows, columns in SIZES)
    return [
        f"train step, each at {VARIATIONS} draws with all of them changed: {names}",
        "train step: every LoRA tensor (fresh, with a random B, along the trajectory, made up)",
        f"optimizer, lr: falling from {plan.optimizer.lr:g} over {steps} steps; {rates}",
        f"optimizer, updates done: 0 to {steps - 1}; {updates}",
        "optimizer: parameters, gradients and both moments of every LoRA tensor",
        f"patch sampler: images of {sizes} pixels; {len(PLACES) + ANYWHERE} noise levels and "
        "places in each, all borders, and those at which a side or position is about to be rounded",
    ]


def explained(certificate: Certificate) -> list[str]:
    """What was varied, exercised, recomputed, and what is out of reach, as lines for people."""
    bank = certificate.bank
    return [
        "varied:",
        *(f"  {line}" for line in certificate.varied),
        "exercised in the optimizer, from made-up states:",
        *(f"  {line}" for line in certificate.exercised),
        *(["of the bank, recomputed:"] if bank else []),
        *(f"  {line}" for line in (bank.recomputed if bank else [])),
        "out of reach:",
        *(f"  of the bank: {line}" for line in (bank.out_of_reach if bank else [])),
        *(f"  {line}" for line in OUT_OF_REACH),
    ]
