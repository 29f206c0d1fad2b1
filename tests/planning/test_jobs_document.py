"""docs/jobs.md says what the schema says."""

import runpy
from pathlib import Path

from edge_dit.planning.job import Job

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_jobs_document_is_what_the_schema_renders():
    made = runpy.run_path(str(DOCS / "make_jobs.py"))["render"]()
    written = (DOCS / "jobs.md").read_text()
    assert written == made, "run: python docs/make_jobs.py"


def test_every_key_has_a_description():
    for name, section in Job.model_fields.items():
        for key, field in section.annotation.model_fields.items():
            assert field.description, f"{name}.{key}"
