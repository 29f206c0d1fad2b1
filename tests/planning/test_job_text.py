"""Job files as editors of all systems write them."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from edge_dit.errors import BadInput
from edge_dit.planning.job import read_job
from edge_dit.text import printable, utf8


@pytest.fixture
def place(tmp_path):
    for name in ("model", "images"):
        (tmp_path / name).mkdir()
    return tmp_path


def written(place: Path, data: bytes) -> Path:
    path = place / "job.toml"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + tiny.JOB.encode(),
        tiny.JOB.replace("\n", "\r\n").encode(),
        tiny.JOB.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + tiny.JOB.replace("\n", "\r\n").encode(),
    ],
    ids=["mark", "CRLF", "CR", "mark and CRLF"],
)
def test_a_mark_and_any_line_end_are_read(place, data):
    plain = read_job(written(place, tiny.JOB.encode()))
    assert read_job(written(place, data)) == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_other_encodings_say_save_as_utf8(place, encoding):
    with pytest.raises(BadInput) as fault:
        read_job(written(place, tiny.JOB.replace("a sks toy", "café").encode(encoding)))
    assert fault.value.remedy == "save it as UTF-8"
    assert str(place / "job.toml") in str(fault.value)


@pytest.mark.parametrize(
    "path", [r"C:\Users\me\pics", r"C:\new\temp", r"pics\toys", r"..\pics", r"\\server\share"]
)
def test_windows_paths_say_single_quotes_or_slash(place, path):
    text = tiny.JOB.replace('images = "images"', f'images = "{path}"')
    with pytest.raises(BadInput) as fault:
        read_job(written(place, text.encode()))
    assert "single quotes" in str(fault.value)
    assert "/" in fault.value.remedy or "/" in str(fault.value)


def test_typographic_quotes_are_named(place):
    text = tiny.JOB.replace('"images"', "\u201cimages\u201d")
    with pytest.raises(BadInput, match="straight ones"):
        read_job(written(place, text.encode()))


def test_a_tilde_is_the_users_folder(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USERPROFILE", str(place))
    text = tiny.JOB.replace('"images"', '"~/images"').replace('"model"', '"~/model"')
    job = read_job(written(place, text.encode()))
    assert (job.data.images, job.model.path) == (place / "images", place / "model")


def test_a_folder_whose_name_begins_with_a_tilde(place):
    (place / "~backup of nobody").mkdir()
    text = tiny.JOB.replace('"images"', '"~backup of nobody"')
    assert read_job(written(place, text.encode())).data.images == place / "~backup of nobody"


@pytest.mark.parametrize("path", ["", " ", "\\u0000", "a\\nb"])
def test_a_path_that_is_no_path(place, path):
    text = tiny.JOB.replace('"images"', f'"{path}"')
    with pytest.raises(BadInput, match=r"data\.images"):
        read_job(written(place, text.encode()))


def test_names_of_any_letters(place):
    name = "bílder ütf 写真"
    (place / name).mkdir()
    text = tiny.JOB.replace('"images"', f'"{name}"')
    assert read_job(written(place, text.encode())).data.images.name == name


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_refused(data):
    try:
        text = utf8(data)
    except ValueError:
        return
    assert "\r" not in text
    assert not text.startswith("\ufeff") or data.startswith(b"\xef\xbb\xbf" * 2)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=50))
def test_what_is_shown_can_be_shown(text):
    shown = printable(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    shown.encode("utf-8")  # no half of a surrogate pair
    assert printable(shown) == shown


def test_a_file_name_that_is_no_text_is_shown_escaped():
    assert printable(os.fsdecode(b"a\xff.png")) == "a\\udcff.png"
