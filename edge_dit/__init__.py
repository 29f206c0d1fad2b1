"""edge-dit: personalise Diffusion Transformers on the device their user owns.

    import edge_dit as ed
    import edge_dit_runtime as er

    job = ed.read_job("job.toml")
    plan = ed.plan(job, ram="3GiB")
    ed.precompute(plan, ed.read_pictures(job, plan), "bank")
    ed.export(plan, "bundle", ["onnx"])
    print(ed.verify("bundle", "bank").passed)     # compares it with PyTorch
    er.train("bundle", "bank", "run")             # this line needs no torch
    er.save_lora("run", "lora")                   # pipe.load_lora_weights("lora")

    app/        what the commands do
    select/     which blocks may be skipped
    budget/     what training takes, and what fits
    reference/  torch on the host: precompute, PyTorch's own training
    planning/   job and plan
    pictures/   images, crops, draws
    models/     Diffusion Transformers
    contract/   what host and device agree on
    store/      files on disk
    errors, text, progress: what all of them use

Two packages stand beside it: edge_dit_export writes bundles, edge_dit_runtime trains them.

Names are imported when they are first used: importing this package needs neither torch nor onnx,
and takes no time. docs/architecture.md walks through the folders.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_dit.app.api import export as export
    from edge_dit.app.api import plan as plan
    from edge_dit.app.api import precompute as precompute
    from edge_dit.app.api import read_job as read_job
    from edge_dit.app.api import read_pictures as read_pictures
    from edge_dit.app.api import verify as verify
    from edge_dit.contract.bank import Bank as Bank
    from edge_dit.contract.bundle import Bundle as Bundle
    from edge_dit.contract.bundle import open_bundle as open_bundle
    from edge_dit.contract.certificate import Certificate as Certificate
    from edge_dit.errors import BadInput as BadInput
    from edge_dit.errors import CheckFailed as CheckFailed
    from edge_dit.planning.job import Job as Job
    from edge_dit.planning.plan import Plan as Plan

__version__ = "0.1.0"

# Otherwise waiting threads spin, in torch and in this package's child processes, and take the
# processor from other work (docs/performance.md, "Beside other work"). It must be set before torch
# is imported. A value that the user set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Otherwise onnxruntime, from 1.29 on, reports its use to Microsoft and keeps files for that under
# ~/.cache/Microsoft. It must be set before onnxruntime is imported: its own switch,
# disable_telemetry_events(), comes after the first event.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "read_job": "app.api",
    "plan": "app.api",
    "read_pictures": "app.api",
    "precompute": "app.api",
    "export": "app.api",
    "verify": "app.api",
    "Job": "planning.job",
    "Plan": "planning.plan",
    "Bank": "contract.bank",
    "Bundle": "contract.bundle",
    "open_bundle": "contract.bundle",
    "Certificate": "contract.certificate",
    "BadInput": "errors",
    "CheckFailed": "errors",
}
"""Name of the API -> module that has it."""
__all__ = [
    "BadInput",
    "Bank",
    "Bundle",
    "Certificate",
    "CheckFailed",
    "Job",
    "Plan",
    "export",
    "open_bundle",
    "plan",
    "precompute",
    "read_job",
    "read_pictures",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
