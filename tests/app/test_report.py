"""The page about a plan: what it says, that it needs nothing but itself, and that it is sound."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from edge_dit.app import report
from edge_dit.app.report import (
    LETTERS,
    ROLES,
    SIGMAS,
    Expected,
    Limits,
    Page,
    memory_by_role,
    render,
    sample_patches,
    write_report,
)
from edge_dit.budget.footprint import Measured
from edge_dit.contract.adamw import AdamW
from edge_dit.errors import BadInput
from edge_dit.pictures.dataset import Captioned
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan
from edge_dit.planning.selection import Method, Selection

MIB = 2**20
VOID = {"meta", "link", "img"}
PLAN = Plan(
    family="sana",
    model=Path("folder/of/model"),
    model_name="model",
    model_hash="0" * 64,
    layers=5,
    head_skip=1,
    tail_skip=2,
    s_min=32,
    s_max=64,
    multiple=8,
    text_tokens=17,
    rank=6,
    alpha=12.0,
    lora_targets=["attn1.to_q", "attn2.to_v"],
    optimizer=AdamW(lr=0.003),
    steps=123,
    draws=45,
    seed=7,
    targets=["onnx"],
    layout="streamed",
    weights="int8",
)
SELECTION = Selection(
    model_hash="0" * 64,
    layers=5,
    method="generation",
    embedding="VAE latents",
    subjects=["toy", "owl"],
    steps=300,
    prompts=["a toy"],
    seeds=[1],
    draws=4,
    over="generated pictures",
    head=[0.0, 0.1, 0.15, 0.6, 0.7, 0.9],
    tail=[0.0, 0.2, 0.3, 0.4, 0.8, 0.9],
    seconds=120.0,
)


def images(*sizes: tuple[int, int]) -> list[Captioned]:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    return [
        Captioned(f"{n}.png", "0", ("a toy",), size, False, lambda n=n: made[n])
        for n, size in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(
        model="tiny",
        plan=PLAN,
        expected=[Expected("onnx:streamed:int8", 70 * MIB, 45 * MIB, 250 * MIB, 1.5)],
        budget=Limits(ram=200 * MIB),
        reasons=["given up for it: rank 16 -> 6", "1 GiB more would allow: rank 6 -> 16"],
        selection=SELECTION,
        memory=[
            ("full LoRA", dict(zip(ROLES, (9 * MIB, MIB, MIB, 20 * MIB, MIB), strict=True))),
            ("this plan", {"frozen weights": 3 * MIB, "activations": 5 * MIB}),
        ],
        measured=[
            Measured("sana-0.6b", 2, "executorch", 100e6, 109e6, 200e6, 190e6, 2.0, 1.5),
        ],
        machine="a small machine",
        samples=sample_patches(PLAN, images((64, 96))),
    )


class Reader(HTMLParser):
    """Checks that tags are balanced; keeps elements and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text = " ".join(f"{self.text} {data}".split())

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        """Attributes of the elements of a tag, and of a class if one is given."""
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and (not kind or kind in (attributes.get("class") or "").split())
        ]


@pytest.fixture(scope="module")
def read(page) -> Reader:
    return Reader(render(page))


# ---------------------------------------------------------------- the page as such


def test_needs_nothing_but_itself(page, read):
    html = render(page)
    assert not re.search(r"https?:|[\"'(]//|@import|url\(", html)
    assert not read.all("script")
    assert not read.all("iframe")
    links = [a[k] for _, a in read.elements for k in ("src", "href", "srcset", "data") if k in a]
    assert len(links) == 1 + 1 + len(SIGMAS)  # icon, image, patches
    assert all(link is not None and link.startswith("data:") for link in links)
    assert not [name for _, a in read.elements for name in a if name.startswith("on")]


def test_is_accessible(read):
    assert read.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in read.all(
        "meta"
    )
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert all(a.get("scope") for a in read.all("th"))
    pictures = read.all("svg")
    assert pictures
    assert all(
        a["role"] == "img" and a.keys() & {"aria-label", "aria-labelledby"} for a in pictures
    )
    assert all(a.get("alt") for a in read.all("img"))
    named = [a["id"] for _, a in read.elements if "id" in a]
    assert len(set(named)) == len(named)
    assert {a["aria-labelledby"] for _, a in read.elements if "aria-labelledby" in a} <= {*named}


def test_escapes_every_name(page):
    evil = '<script>alert("1")</script>'
    sample = replace(page.samples[0], name=evil)
    odd = Page(
        model=evil,
        plan=PLAN.model_copy(
            update={"lora_targets": [evil], "targets": [evil], "layout": evil, "weights": evil}
        ),
        expected=[replace(page.expected[0], execution=evil)],
        reasons=[evil],
        selection=SELECTION.model_copy(
            update={"subjects": [evil], "embedding": evil, "over": evil}
        ),
        memory=[(evil, {"LoRA": 1})],
        memory_note=evil,
        measured=[replace(page.measured[0], case=evil, execution=evil)],
        machine=evil,
        samples=[sample],
    )
    html = render(odd)
    assert "<script" not in html
    read = Reader(html)
    assert f"Plan for {evil}" in read.text
    assert read.text.count(evil) >= 15


def test_says_what_is_missing():
    read = Reader(render(Page("tiny", PLAN)))
    assert "edge-dit select JOB --method generation" in read.text
    assert "edge-dit bench" in read.text
    assert "No image was given" in read.text
    assert "Memory was not counted" in read.text
    assert not read.all("svg")


def test_is_written_whole_or_not_at_all(page, tmp_path, monkeypatch):
    path = tmp_path / "new" / "plan.html"
    write_report(path, page)
    assert path.read_text(encoding="utf-8") == render(page)
    assert [p.name for p in path.parent.iterdir()] == ["plan.html"]

    written = []
    monkeypatch.setattr(report, "write_atomic", lambda *given: written.append(given))
    write_report(path, page)
    assert written == [(path, render(page))]


def test_a_page_that_cannot_be_written(page, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write_report(tmp_path / "file" / "plan.html", page)


# ---------------------------------------------------------------- what it says


def test_tells_the_plan(read):
    for words in (
        "Of 5 blocks, 2 will be trained: numbers 1..2.",
        "Trained blocks 2 of 5: 1..2",
        "Skipped at the head, n 1 of 5: 0",
        "Skipped at the tail, m 2 of 5: 3..4",
        "32 of 64 pixels, 16 image tokens",
        "17 tokens",
        "rank 6, alpha 12",
        "123 steps, learning rate 0.003, seed 7",
        "45 draws, float32",
        "Target onnx",
        "Layout streamed",
        "Frozen weights int8",
        "attn1.to_q , attn2.to_v",
        "onnx:streamed:int8 115 MiB 70 MiB 45 MiB 250 MiB 1.5 s",
        "budget 200 MiB any any",
        "given up for it: rank 16 -> 6",
        "1 GiB more would allow: rank 6 -> 16",
    ):
        assert words in read.text, words


def test_without_a_budget_there_is_no_line_for_it(page):
    assert not Reader(render(replace(page, budget=Limits()))).all("tfoot")


def test_strip_shows_every_block():
    plan = PLAN.model_copy(update={"layers": 9, "inner_skips": [(3, 5)]})
    read = Reader(render(Page("tiny", plan)))
    kinds = [a["class"] for a in read.all("li") if a.get("class") in report.NAMES]
    expected = ["head", *["trained"] * 2, *["inner"] * 2, *["trained"] * 2, *["tail"] * 2]
    assert kinds == expected
    assert "skipped, between: 3..4" in read.text


def test_heat_map_has_every_split_and_marks_the_best(page, read):
    layers = SELECTION.layers
    assert len(read.all("rect", "cell")) == layers * (layers + 1) // 2
    assert len(read.all("circle", "best")) == layers - 1
    assert len(read.all("rect", "own")) == 1
    best = {(int(n), int(m)) for n, m in re.findall(r"n = (\d+), m = (\d+): \S+, best", read.text)}
    assert best == {SELECTION.best(skipped) for skipped in range(1, layers)}
    assert "n = 1, m = 2: 0.4, this plan" in read.text
    assert "n = 2, m = 1: 0.35, best of its k" in read.text
    assert "300 steps to each of 2 subjects (toy, owl)" in read.text
    assert "4 generated pictures" in read.text
    assert "VAE latents" in read.text


@pytest.mark.parametrize("scale", [0.0, 1e-6, -1.0, 1e6])
def test_heat_map_of_any_scale(page, scale):
    scaled = {end: [scale * v for v in getattr(SELECTION, end)] for end in ("head", "tail")}
    read = Reader(render(replace(page, selection=SELECTION.model_copy(update=scaled))))
    shades = [float(a["fill-opacity"] or "nan") for a in read.all("rect", "cell")]
    assert all(0 < shade <= 1 for shade in shades)
    assert max(shades) == (1.0 if scale else min(shades))


def test_heat_map_of_a_deep_model(page):
    deep = SELECTION.model_copy(
        update={
            "layers": 57,
            "head": np.linspace(0, 1, 58).tolist(),
            "tail": np.linspace(0, 2, 58).tolist(),
            "method": "loss-frozen",
            "embedding": "",
        }
    )
    plan = PLAN.model_copy(update={"layers": 57})
    read = Reader(render(replace(page, selection=deep, plan=plan)))
    assert len(read.all("rect", "cell")) == 57 * 58 // 2
    assert not read.all("text", "number")
    assert "without their LoRA" in read.text


def test_every_method_of_selecting_is_explained():
    assert set(report.METHODS) == set(get_args(Method))


def test_bars_are_to_scale(read):
    longest = [a for a in read.all("rect") if (a.get("class") or "").startswith("role-")]
    lengths = [float((a["width"] or "").rstrip("%")) for a in longest]
    assert lengths == pytest.approx([100 * part / 32 for part in (9, 1, 1, 20, 1, 3, 5)], abs=1e-3)
    assert sum(lengths[:5]) == pytest.approx(100, abs=0.01)
    assert "this plan 3 MiB 0 MiB 0 MiB 5 MiB 0 MiB 8 MiB" in read.text


def test_roles_differ_without_colour():
    assert len(set(LETTERS)) == len(LETTERS) == len(ROLES)


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"full: roles \['caches'\], expected some of"):
        render(Page("tiny", PLAN, memory=[("full", {"caches": 1})]))


def test_predictions_beside_measurements(read):
    assert "each in a fresh process on a small machine" in read.text
    row = "sana-0.6b 2 executorch 104 MiB 95.4 MiB +9.0% 181 MiB 191 MiB -5.0% 1.5 s 2 s -25.0%"
    assert row in read.text


def test_a_measurement_of_nothing(page):
    row = replace(page.measured[0], file=0.0)
    assert "181 MiB 0 MiB –" in Reader(render(replace(page, measured=[row]))).text


# ---------------------------------------------------------------- what it is made from


def test_patches_are_the_samplers():
    found = sample_patches(PLAN, images((64, 96), (80, 64), (64, 64)))
    assert [s.name for s in found] == ["0.png", "1.png"]
    assert [s.whole.shape for s in found] == [(64, 96, 3), (80, 64, 3)]
    for sample in found:
        assert [p.sigma for p in sample.patches] == list(SIGMAS)
        for patch in sample.patches:
            side = PLAN.crop_rule.side(patch.sigma)
            assert patch.crop.side == side
            assert patch.pixels.shape == (PLAN.s_min, PLAN.s_min, 3)
            assert patch.pixels.dtype == np.uint8
        assert len({(p.crop.top, p.crop.left) for p in sample.patches}) > 1


def test_a_patch_of_the_smallest_side_is_the_crop_itself():
    (sample,) = sample_patches(PLAN, images((64, 96)), sigmas=[0.0])
    (patch,) = sample.patches
    crop = patch.crop
    inside = sample.whole[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    np.testing.assert_array_equal(patch.pixels, inside)


def test_patches_follow_from_the_seed():
    def crops(seed):
        plan = PLAN.model_copy(update={"seed": seed})
        return [patch.crop for patch in sample_patches(plan, images((64, 96)))[0].patches]

    assert crops(1) == crops(1)
    assert crops(1) != crops(2)


def test_page_shows_crops_where_they_are(page, read):
    crops = [patch.crop for patch in page.samples[0].patches]
    drawn = [
        tuple(int(a[key] or -1) for key in ("y", "x", "width", "height"))
        for a in read.all("rect", "over")
    ]
    assert drawn == [(c.top, c.left, c.side, c.side) for c in crops]
    for number, crop in enumerate(crops, 1):
        assert f"{number}: σ {SIGMAS[number - 1]:.3g}, crop {crop.side} px" in read.text


def test_memory_of_a_plan_by_role(workplace):
    from edge_dit.budget.cost import cost_of_plan

    plan = make_plan(read_job(workplace / "job.toml"))
    bars = memory_by_role(plan)
    costs = cost_of_plan(plan)
    assert [title for title, _ in bars] == [
        f"full LoRA, {plan.s_max} px",
        *(f"paper: {k}% skipped, {plan.s_min} px" for k in (30, 40, 50)),
        "this plan",
    ]
    for (_, by_role), cost in ((bars[0], costs["full LoRA"]), (bars[-1], costs["this plan"])):
        assert set(by_role) == set(ROLES)
        assert sum(by_role.values()) == cost.total_bytes + cost.bank_bytes
    totals = [sum(by_role.values()) for _, by_role in bars]
    assert totals[0] == max(totals)
    assert totals[1] >= totals[2] >= totals[3]


def test_needs_the_host_extra(page, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BadInput, match=r"edge-dit\[host\]"):
        render(page)
