"""Whatever a folder holds is a picture, a caption that is used, hidden, or listed with a reason."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_dit.errors import BadInput, ManyFaults
from edge_dit.pictures.dataset import LISTED, survey
from edge_dit.pictures.folder import list_folder
from test_layout import BLOCK


def picture(path, colour="teal", size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def reasons(folder, recursive=False):
    return {entry.name: entry.reason for entry in survey(folder, recursive).left_out}


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "a.PNG",
        "a.jpg",
        "a.JPEG",
        "a.jpe",
        "a.webp",
        "a.bmp",
        "a.dib",
        "a.tif",
        "a.TIFF",
        "a.gif",
        "a.avif",
    ],
)
def test_endings_that_are_read_in_any_case(tmp_path, name):
    picture(tmp_path / name)
    assert survey(tmp_path).listing.pictures == [name]


@pytest.mark.parametrize("name", ["a.jfif", "a.JFIF", "a.apng", "a.mpo"])
def test_other_endings_of_known_formats(tmp_path, name):
    kind = ".png" if name == "a.apng" else ".jpg"
    picture(tmp_path / f"b{kind}").rename(tmp_path / name)
    assert survey(tmp_path).listing.pictures == [name]


def test_what_is_left_out_is_named_with_its_reason(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "10_sks toy" / "b.png")
    picture(tmp_path / "more" / "deep" / "c.png")
    (tmp_path / "notes").mkdir()
    os.symlink("gone.png", tmp_path / "g.png")
    os.symlink("h.png", tmp_path / "h.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("orphan.txt", "a.png.txt", "x.psd", "y.CR2", "z.mp4", "w.zip", "README", "b.json"):
        (tmp_path / name).write_text("a toy")
    (tmp_path / ".c.png.icloud").write_text("")
    assert reasons(tmp_path) == {
        "10_sks toy": "a sub-folder with 1 picture; [data] recursive = true reads it, each once: "
        "repeats are not applied",
        "more": "a sub-folder with 1 picture; [data] recursive = true reads it",
        "notes": "a sub-folder without pictures",
        "g.png": "a broken link, to gone.png",
        "h.png": "a broken link, to h.png",
        "pipe.png": "not a file, but a pipe, a socket or a device",
        "orphan.txt": "a caption, but no picture is named orphan",
        "a.png.txt": "a caption, but named a.png + its ending: leave .png etc. out",
        "x.psd": ".psd is no kind of picture that edge-dit reads: save it as PNG",
        "y.CR2": "a camera's raw file: save it as PNG or JPEG",
        "z.mp4": "a video: save the frames you want as PNG",
        "w.zip": "an archive: unpack it",
        "README": "its name has no ending; if it is a picture, add that of its format",
        "b.json": "captions are read from .txt, .caption, metadata.jsonl and metadata.csv",
        ".c.png.icloud": "not downloaded from iCloud yet",
    }


def test_what_systems_put_there_is_no_picture(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "._a.png")
    picture(tmp_path / ".hidden" / "b.png")
    picture(tmp_path / "@eaDir" / "a.png" / "thumb.jpg")
    picture(tmp_path / "__MACOSX" / "a.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "Icon\r"):
        (tmp_path / name).write_bytes(b"\0")
    found = survey(tmp_path, recursive=True)
    assert found.listing.pictures == ["a.png"]
    assert found.left_out == []


def test_sub_folders_where_asked_for(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a" / "z.png")
    picture(tmp_path / "3_toy" / "c.png")
    (tmp_path / "a" / "z.txt").write_text("a red toy")
    (tmp_path / "a" / "odd.psd").write_text("")
    os.symlink("..", tmp_path / "a" / "up")
    found = survey(tmp_path, recursive=True)
    assert found.listing.pictures == ["3_toy/c.png", "a/z.png", "b.png"]
    assert found.prompts("a toy") == ["a toy", "a red toy", "a toy"]
    assert reasons(tmp_path, True) == {
        "a/odd.psd": ".psd is no kind of picture that edge-dit reads: save it as PNG",
        "a/up": "leads to a folder that is read already",
    }
    assert [note.name for note in found.notes] == ["3_toy"]


def test_a_sub_folder_that_may_not_be_read(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "shut" / "b.png")
    real = os.listdir

    def listdir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("edge_dit.pictures.folder.os.listdir", listdir)
    assert reasons(tmp_path, True) == {"shut": "cannot be read (Permission denied)"}


@pytest.mark.parametrize("name", [b"a\nb.png", b"caf\xe9.png", b"a\x1b[31m.png"])
def test_names_that_cannot_be_written_are_refused_escaped(tmp_path, name):
    inside = os.fsencode(tmp_path) + b"/"
    os.rename(picture(tmp_path / "a.png"), inside + name)
    with pytest.raises(BadInput, match="control characters, or not UTF-8") as caught:
        survey(tmp_path)
    assert str(caught.value).encode().count(b"\n") == 1
    os.rename(inside + name, inside + name + b".psd")
    assert str(list_folder(tmp_path).left_out).encode().isascii()


def test_names_of_everyday(tmp_path):
    for name in (
        "Screenshot 3.04.12\u202fPM.png",
        "дом.png",
        "👩\u200d🚀.png",
        "a b'c.png",
        "..png",
    ):
        picture(tmp_path / "x.png").rename(tmp_path / name)
    assert len(survey(tmp_path).listing.pictures) == 4  # "..png" is hidden


def test_a_folder_without_pictures_says_what_is_there(tmp_path):
    picture(tmp_path / "train" / "a.png")
    with pytest.raises(BadInput, match=r"(?s)no image in it \(left out: train.*recursive = true"):
        survey(tmp_path)


def test_long_lists_are_cut_for_people_alone(tmp_path):
    picture(tmp_path / "a.png")
    for number in range(40):
        (tmp_path / f"{number:02}.psd").write_text("")
    found = survey(tmp_path)
    lines = [line for line in found.in_words() if line.startswith("left out")]
    assert len(lines) == LISTED + 1
    assert "and 30 more (30 .psd is no kind" in lines[-1]
    assert len(found.as_json()["left_out"]) == 40
    for number in range(100):
        (tmp_path / f"bad{number:02}.png").write_bytes(b"no")
    with pytest.raises(ManyFaults) as caught:
        survey(tmp_path)
    assert len(caught.value.faults) == 100
    assert str(caught.value).endswith("and 70 more faults")


def test_heic_without_its_extra_is_left_out_by_name(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (tmp_path / "phone.txt").write_text("a toy")
    code = BLOCK.format(blocked=("pillow_heif",)) + (
        "from pathlib import Path\n"
        "from edge_dit.pictures.dataset import survey\n"
        f"for entry in survey(Path({str(tmp_path)!r})).left_out: print(entry.name, entry.reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        'phone.HEIC .heic is read by pillow-heif: pip install "edge-dit[heic]"',
        "phone.txt a caption, but its picture is left out",
    ]


def test_a_heic_that_is_named_jpg_names_the_extra(tmp_path):
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    code = BLOCK.format(blocked=("pillow_heif",)) + (
        "from pathlib import Path\n"
        "from edge_dit.pictures.dataset import survey\n"
        f"try: survey(Path({str(tmp_path)!r}))\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "phone.jpg: a HEIC picture, and pillow-heif is not installed" in done.stdout
    assert 'pip install "edge-dit[heic]"' in done.stdout


NAMES = st.text(st.sampled_from("aAé.1 _"), min_size=1, max_size=4).filter(
    lambda name: name.strip(". ") == name
)
ENDINGS = st.sampled_from(
    [".png", ".PNG", ".gif", ".txt", ".caption", ".psd", "", ".jsonl", ".mp4", ".db"]
)


@given(entries=st.lists(st.tuples(st.booleans(), NAMES, ENDINGS), max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_entry_is_accounted_for(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("any")
    picture(folder / "first.png")
    for is_folder, stem, ending in entries:
        path = folder / f"{stem}{ending}"
        if path.exists():
            continue
        if is_folder:
            path.mkdir()
        elif ending.lower() in (".png", ".gif"):
            Image.new("L", (8, 8)).save(path)
        else:
            path.write_text("a toy")
    found = survey(folder)
    entries_read = [*found.listing.pictures, *found.captions.used]
    left = [entry.name for entry in found.left_out]
    assert sorted([*entries_read, *left]) == sorted(os.listdir(folder))
