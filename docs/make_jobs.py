"""Write docs/jobs.md, every key of a job file, from the schema that reads it.

python docs/make_jobs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_dit.planning.job import Job

DOCUMENT = Path(__file__).with_name("jobs.md")
EXAMPLE = Path(__file__).resolve().parents[1] / "samples" / "sana.toml"
SPECIAL = {
    ("plan", "ram"): 'size: `"3GiB"`, `"200 MiB"`, `"1.5GB"`',
    ("plan", "flash"): 'size: `"3GiB"`, `"200 MiB"`, `"1.5GB"`',
    ("plan", "step_time"): 'time: `"5s"`, `"800ms"`',
    ("plan", "inner_skips"): "list of [first, end)",
    ("model", "path"): "path or hub id",
    ("model", "config"): "path or hub id",
    ("model", "use_on"): "path or hub id",
    ("data", "images"): "path",
    ("data", "subjects"): "list of tables",
    ("data.subjects", "images"): "path",
    ("prior", "prompt"): "text, or list of text",
}
"""Types in words where the schema's own would not tell what to write."""
PLAIN = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}

INTRODUCTION = """# Job files

A job is one TOML file. It says which model is personalised, on which images, which blocks are
skipped, how it is trained and what is exported. Paths are relative to the file. An unknown key is
an error, and all errors of a file are reported together, each with its line.

This document is generated: `python docs/make_jobs.py` writes it from `edge_dit/planning/job.py`.

The job that the quickstart runs, `samples/sana.toml`:
"""
RELATIONS = """## Keys that depend on each other

- A budget (`ram`, `flash`, `step_time`, any of them) decides which blocks are skipped.
  `skip_ratio` and `inner_skips` may not stand beside it; `head_skip`, `tail_skip` and `tail` may,
  and are kept to. Patch and rank are then upper bounds. [docs/selection.md](selection.md) has the
  rest.
- `patch` is at most `resolution`.
- `head_skip` + `tail_skip` leave at least one block. Where no trailing block is skipped, `tail`
  changes nothing. ort-training cannot train with `tail = "fresh"`.
- Options of `edge-dit plan` (`--skip-ratio`, `--head-skip`, `--tail-skip`, `--ram`, ...) override
  the job's.
"""


def render() -> str:
    """The document's text."""
    schema = Job.model_json_schema()
    lines = [INTRODUCTION, "```toml", EXAMPLE.read_text().strip(), "```", ""]
    for name, part in schema["properties"].items():
        section = schema["$defs"][_reference(part)]
        lines += [f"## [{name}]", "", *_table(name, section)]
        for key, field in section["properties"].items():
            if "$ref" in (items := field.get("items", {})):
                below, of_items = f"{name}.{key}", schema["$defs"][_reference(items)]
                lines += [f"### [[{below}]]", "", *_table(below, of_items)]
    return "\n".join([*lines, RELATIONS])


def _table(name: str, section: dict[str, Any]) -> list[str]:
    """What a section is, and its keys."""
    required = section.get("required", [])
    about = " ".join(section["description"].partition(": ")[2].split())
    lines = [about[0].upper() + about[1:], ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        kind = SPECIAL.get((name, key)) or _kind(field)
        default = "**required**" if key in required else _default(field.get("default"))
        lines.append(f"| `{key}` | {kind} | {default} | {field['description']} |")
    return [*lines, ""]


def _reference(part: dict[str, Any]) -> str:
    reference = part.get("$ref") or part["allOf"][0]["$ref"]
    return reference.rpartition("/")[2]


def _kind(field: dict[str, Any]) -> str:
    """A field's type and bounds in words."""
    given = [one for one in field.get("anyOf", [field]) if one.get("type") != "null"]
    (one,) = given
    if "enum" in one:
        return " or ".join(f'`"{value}"`' for value in one["enum"])
    if one["type"] == "array":
        return f"list of {PLAIN[one['items']['type']]}"
    bounds = {**field, **one}
    words = [text.format(_number(bounds[key])) for key, text in BOUNDS.items() if key in bounds]
    return ", ".join([PLAIN[one["type"]], *words])


def _number(value: float) -> str:
    return "2^31" if value == 2**31 else f"{value:g}"


def _default(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:g}`"


if __name__ == "__main__":
    DOCUMENT.write_text(render())
