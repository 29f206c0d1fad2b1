"""Captions: where they are looked for, in which encodings, and what two of them mean."""

import codecs
import csv
import io
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_dit.errors import BadInput
from edge_dit.pictures.captions import LONGEST, clean
from edge_dit.pictures.dataset import survey


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 12)).save(tmp_path / name)
    return tmp_path


def prompts(folder, prompt="default", recursive=False):
    return survey(folder, recursive).prompts(prompt)


# ---------------------------------------------------------------- beside the picture


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "A.txt"])
def test_a_file_of_the_pictures_stem(folder, name):
    (folder / name).write_text(" a red toy\n")
    assert prompts(folder) == ["a red toy", "default"]
    assert survey(folder).captions.used == [name]


def test_pictures_of_one_stem_share_a_caption(folder):
    Image.new("RGB", (16, 12)).save(folder / "a.jpg")
    (folder / "a.txt").write_text("a red toy")
    assert prompts(folder) == ["a red toy", "a red toy", "default"]


def test_the_stem_in_its_own_case_goes_first(folder):
    Image.new("RGB", (16, 12)).save(folder / "A.png")
    (folder / "a.txt").write_text("small")
    (folder / "A.txt").write_text("large")
    assert prompts(folder) == ["large", "small", "default"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_and_captions_are_compared_composed(folder, forms):
    picture, caption = (unicodedata.normalize(form, "café") for form in forms)
    Image.new("RGB", (16, 12)).save(folder / f"{picture}.png")
    (folder / f"{caption}.txt").write_text(unicodedata.normalize("NFD", "a café"))
    assert prompts(folder)[-1] == unicodedata.normalize("NFC", "a café")
    (folder / f"{caption}.txt").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"{caption}.png", "text": "x"}))
    assert prompts(folder)[-1] == "x"


def test_the_fallback_is_said(folder):
    (folder / "a.txt").write_text("a red toy")
    found = survey(folder)
    assert found.uncaptioned == ["b.png"]
    assert found.in_words()[:2] == [
        "2 pictures, 1 with a caption of their own",
        "1 without take [data] prompt: b.png",
    ]
    with pytest.raises(BadInput, match=r"b\.png: no caption"):
        found.prompts(" \u200b")


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (codecs.BOM_UTF8 + b"a toy", "a toy"),
        (b"a toy\r\n", "a toy"),
        (b"a toy\r\nin snow\r\n", "a toy\nin snow"),
        (b"a toy\rin snow\r", "a toy\nin snow"),
        ("\u200b a toy\u200b\u00a0\ufeff\n".encode(), "a toy"),
        ("a 👩\u200d🚀 toy".encode(), "a 👩\u200d🚀 toy"),
        ("خانه\u200cها".encode(), "خانه\u200cها"),
        (b"\x00"[:0] + b"a\ttoy\x0c", "a\ttoy"),
    ],
)
def test_marks_and_line_ends_are_no_part_of_a_caption(folder, data, caption):
    (folder / "a.txt").write_bytes(data)
    assert prompts(folder)[0] == caption


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a café toy".encode("cp1252"), "byte 0xe9 at 5: not UTF-8, perhaps cp1252"),
        ("“a” toy".encode("cp1252"), "not UTF-8, perhaps cp1252"),
        ("a toy".encode("utf-16"), "UTF-16, by its byte order mark"),
        (codecs.BOM_UTF16_BE + "a toy".encode("utf-16-be"), "UTF-16, by its byte order mark"),
        ("a toy".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a toy".encode("utf-16-be"), "UTF-16 without a byte order mark"),
        ("a toy".encode("utf-32"), "UTF-32, by its byte order mark"),
        (b"a toy\0 and more of it", "a NUL byte at 5"),
        (rb"{\rtf1\ansi a toy}", "rich text"),
    ],
)
def test_other_encodings_say_what_to_do(folder, data, words):
    (folder / "a.txt").write_bytes(data)
    with pytest.raises(BadInput, match=f"(?s)a.txt: .*{words}.*save it as UTF-8"):
        survey(folder)


@pytest.mark.parametrize(
    "text",
    ["", " \n", "\ufeff", "\u200b\u200d", "\u2060\u00ad", "\x07\x1b", "\u3164\u2800", "\u0301"],
)
def test_what_prints_nothing_is_empty(folder, text):
    (folder / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=r"a\.txt: empty caption"):
        survey(folder)


def test_a_large_file_is_not_read_as_a_caption(folder):
    with (folder / "a.txt").open("wb") as file:
        file.truncate(2**34)  # 16 GiB that take no room
    with pytest.raises(BadInput, match=f"more than {LONGEST // 1024} KiB"):
        survey(folder)


def test_captions_of_several_lines_are_kept_and_said(folder):
    (folder / "a.txt").write_text("a red toy\na toy, red")
    assert prompts(folder)[0] == "a red toy\na toy, red"
    assert (
        "1 captions of several lines: each is one prompt, lines kept" in survey(folder).in_words()
    )


@given(text=st.text())
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


# ---------------------------------------------------------------- tables


def jsonl(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "METADATA.JSONL"])
def test_metadata_jsonl(folder, column, name):
    row = {"file_name": "./b.png", column: "a\u2028toy", "score": 3}
    (folder / name).write_text("\ufeff" + jsonl(row) + "\r\n\r\n", encoding="utf-8")
    assert prompts(folder) == ["default", "a\u2028toy"]
    assert survey(folder).captions.used == [name]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_metadata_csv(folder, mark):
    text = mark + 'file_name,text\r\na.png,"a toy, ""red"",\r\nin snow"\r\n\r\nb.png, a toy\r\n'
    (folder / "metadata.csv").write_bytes(text.encode())
    assert prompts(folder) == ['a toy, "red",\nin snow', "a toy"]


def test_tables_in_sub_folders_and_names_in_them(folder):
    row = {"file_name": r"sub\c.png", "text": "from above"}
    (folder / "metadata.jsonl").write_text(jsonl(row))
    assert prompts(folder, recursive=True) == ["default", "default", "from above"]
    with pytest.raises(
        BadInput, match=r"(?s)jsonl:1: no picture.*sub-folder with 1 picture.*recur"
    ):
        survey(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "sub" / "metadata.csv").write_text("file_name,text\nc.png,beside it\n")
    assert prompts(folder, recursive=True) == ["default", "default", "beside it"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file', "jsonl:2: not JSON"),
        ('{"file_name": "a.png", "file_name": "b.png"}', "jsonl:1: not JSON .a key stands twice"),
        ("[1]", "jsonl:1: not a JSON object"),
        ("[" * 5000, "jsonl:1: not JSON"),
        ('{"text": "x"}', "jsonl:1: no file_name"),
        ('{"file_name": 3, "text": "x"}', "jsonl:1: no file_name"),
        ('{"file_name": "z.png", "text": "x"}', "jsonl:1: no picture 'z.png'"),
        ('{"file_name": "A.png", "text": "x"}', "(?s)jsonl:1: no picture.*did you mean a.png"),
        ('{"file_name": "d.psd", "text": "x"}', "(?s)no picture.*left out: .psd is no kind"),
        ('{"file_name": "../a.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "/a.png", "text": "x"}', "leads out of the folder"),
        (r'{"file_name": "C:\\a.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "a.png", "text": ""}', "jsonl:1: empty caption"),
        ('{"file_name": "a.png", "text": null}', "a caption that is no text"),
        ('{"file_name": "a.png", "text": ["x"]}', "a caption that is no text"),
        (r'{"file_name": "a.png", "text": "\ud800"}', "a caption that is no text"),
        (r'{"file_name": "a.png", "text": "a\u0000b"}', "a caption that is no text"),
        ('{"file_name": "a.png", "text": "x", "caption": "y"}', "text 'x', caption 'y'"),
    ],
)
def test_faults_of_a_table_have_their_line(folder, text, words):
    (folder / "d.psd").write_text("")
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(BadInput, match=words):
        survey(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "csv:1: columns ''"),
        ("file_name;text\na.png;x", "(?s)csv:1: columns 'file_name;text'.*separated by commas"),
        ("file_name,text,text\na.png,x,y", "csv:1: columns"),
        ("file_name,text\na.png,a toy, red", "(?s)csv:2: 3 cells.*in quotes"),
        ("file_name,text\na.png", "csv:2: 1 cells"),
        ('file_name,text\na.png,"x', "csv:2: not CSV"),
        ("file_name,text\na.png,", "csv:2: empty caption"),
    ],
)
def test_faults_of_a_csv_have_their_line(folder, text, words):
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(BadInput, match=words):
        survey(folder)


def test_a_table_without_captions_is_left_out(folder):
    (folder / "metadata.jsonl").write_text(jsonl({"file_name": "a.png", "label": 3}))
    (entry,) = [e for e in survey(folder).left_out if e.name == "metadata.jsonl"]
    assert entry.reason == "no caption in it: no column text, caption or prompt"


def test_a_table_in_another_encoding(folder):
    (folder / "metadata.csv").write_bytes("file_name,text\na.png,café".encode("cp1252"))
    with pytest.raises(BadInput, match=r"(?s)metadata\.csv: byte 0xe9.*save it as UTF-8"):
        survey(folder)


# ---------------------------------------------------------------- two captions of one picture


def test_captions_that_agree_are_one(folder):
    (folder / "a.txt").write_text("a toy\n")
    (folder / "a.caption").write_bytes(b"\xef\xbb\xbfa toy")
    row = {"file_name": "a.png", "text": "a toy "}
    (folder / "metadata.jsonl").write_text(jsonl(row, row))
    assert prompts(folder)[0] == "a toy"


@pytest.mark.parametrize("other", ["a.caption", "a.TXT", "metadata.jsonl"])
def test_captions_that_differ_are_a_fault_that_names_both(folder, other):
    (folder / "a.txt").write_text("a toy")
    text = jsonl({"file_name": "a.png", "text": "a car"}) if other[0] == "m" else "a car"
    (folder / other).write_text(text)
    with pytest.raises(BadInput, match=r"a\.png: ") as caught:
        survey(folder)
    for words in ("a.txt", other, "'a toy'", "'a car'"):
        assert words in str(caught.value)


def test_two_lines_that_differ(folder):
    rows = [{"file_name": "a.png", "text": text} for text in ("a toy", "a car")]
    (folder / "metadata.jsonl").write_text(jsonl(*rows))
    with pytest.raises(BadInput, match=r"metadata\.jsonl:1 says 'a toy', metadata\.jsonl:2 says"):
        survey(folder)


# ---------------------------------------------------------------- anything at all


@given(data=st.binary(max_size=80) | st.text(max_size=40).map(str.encode))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("name", ["a.txt", "a.caption", "metadata.jsonl", "metadata.csv"])
def test_any_bytes_give_captions_or_a_message(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("any")
    Image.new("L", (8, 8)).save(folder / "a.png")
    (folder / name).write_bytes(data)
    try:
        (caption,) = prompts(folder)
    except BadInput:
        return
    assert caption == clean(caption)
    caption.encode()


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"file_name": st.sampled_from(["a.png", "b.png", "", "../a.png"])},
            optional={"text": st.text(max_size=8) | st.none(), "caption": st.text(max_size=3)},
        ),
        max_size=4,
    ),
    as_csv=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_rows_give_captions_or_a_message(tmp_path_factory, rows, as_csv):
    folder = tmp_path_factory.mktemp("any")
    Image.new("L", (8, 8)).save(folder / "a.png")
    if as_csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["file_name", "text", "caption"])
        writer.writeheader()
        writer.writerows(rows)
        (folder / "metadata.csv").write_bytes(text.getvalue().encode("utf-8", "replace"))
    else:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        (caption,) = prompts(folder)
    except BadInput:
        return
    given_texts = [clean(v or "") for row in rows for k, v in row.items() if k != "file_name"]
    assert caption == "default" or caption in given_texts
