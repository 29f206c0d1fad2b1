"""What a console cannot show is escaped; it ends no command."""

import os
import subprocess
import sys

import pytest

from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import write_plan

ENCODINGS = ["ascii", "cp1252", "cp437", "utf-8"]
NAME = "写真 ünd \N{DOG FACE}"


def command(encoding, *arguments):
    return subprocess.run(
        [sys.executable, "-c", "from edge_dit.cli import main; main()", *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_message_with_any_letters(tmp_path, encoding):
    done = command(encoding, "inspect", str(tmp_path / NAME / "plan.json"))
    text = done.stderr.decode(encoding)
    assert done.returncode == 2
    assert "Traceback" not in text
    assert (NAME if encoding == "utf-8" else r"\u5199\u771f") in text


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_plan_of_a_model_with_any_letters(workplace, tmp_path, encoding):
    plan = make_plan(read_job(workplace / "job.toml"))
    write_plan(plan.model_copy(update={"model_name": NAME}), tmp_path / "plan.json")
    done = command(encoding, "inspect", str(tmp_path / "plan.json"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (NAME if encoding == "utf-8" else r"\u5199\u771f") in done.stdout.decode(encoding)


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["doctor"], ["version"]])
def test_help_and_tables(arguments):
    done = command("ascii", *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("ascii").strip()


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"no-text-\xff", r"no-text-\udcff"),
        (b"clear\x1b[2J\x07screen", r"clear\x1b[2J\x07screen"),
        ("right to left \u202e".encode(), r"right to left \u202e"),
    ],
)
def test_a_file_name_moves_no_cursor(tmp_path, name, shown):
    done = command("utf-8", "inspect", os.path.join(os.fsencode(tmp_path), name))
    assert done.returncode == 2
    assert shown in done.stderr.decode()
    assert b"\x1b" not in done.stderr
