"""Draws of pictures with masks: what is stored, what their loss is, what verify makes of them."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from edge_dit.app import api
from edge_dit.contract.bank import Bank
from edge_dit.contract.names import TARGET, WEIGHT, WEIGHT_MASK
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import model_of
from edge_dit.reference.eager import adapted_subgraph
from edge_dit.reference.evidence import examine
from edge_dit.reference.precompute import precompute


@pytest.fixture(scope="module")
def made(workplace, tmp_path_factory):
    """A job of three pictures, one of them with a mask, its pictures and its bank."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "model").symlink_to(workplace / "model")
    shutil.copytree(workplace / "images", folder / "images")
    first = sorted((folder / "images").glob("*.png"))[0]
    with Image.open(first) as picture:
        mask = np.zeros((picture.height, picture.width), np.uint8)
    mask[:, : mask.shape[1] // 2] = 255
    Image.fromarray(mask).save(first.with_suffix(".mask.png"))
    weights = ("[plan]", "weight = 0.5\n[plan]")
    job = read_job(tiny.write_job(folder, ("draws = 10", "draws = 6"), weights))
    plan = make_plan(job)
    pictures = api.read_pictures(job, plan)
    precompute(plan, pictures, folder / "bank")
    return plan, pictures, folder / "bank"


def test_a_draw_stores_the_mask_of_its_patch(made):
    plan, pictures, folder = made
    bank = Bank(folder, plan.identity())
    assert plan.masked
    for number, draw in enumerate(bank.index.draws):
        stored = bank[number][WEIGHT_MASK]
        assert WEIGHT not in bank[number]
        assert stored.shape == (1, 1, *bank[number][TARGET].shape[2:])
        if draw.image:
            assert (stored == 0.5).all()
            continue
        crop = draw.crop
        cut = torch.from_numpy(pictures[0].mask())[
            None, None, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side
        ]
        patch = torch.nn.functional.interpolate(
            cut, size=plan.s_min, mode="bilinear", antialias=True
        )
        wanted = torch.nn.functional.avg_pool2d(patch, plan.multiple)
        np.testing.assert_allclose(stored, 0.5 * wanted, atol=1e-5)


def test_the_loss_counts_what_the_mask_keeps(made):
    plan, _, folder = made
    bank = Bank(folder, plan.identity())
    subgraph, blank = adapted_subgraph(plan, model_of(plan))
    assert blank.keys() == bank[0].keys()
    batch = {name: torch.from_numpy(value) for name, value in bank[0].items()}
    with torch.no_grad():
        off = (subgraph.predict(batch) - batch[TARGET]).square()
        wanted = (off * batch[WEIGHT_MASK]).sum() / off.numel()
        np.testing.assert_allclose(subgraph(batch), wanted, rtol=1e-5)
        other = dict(batch)
        other[TARGET] = torch.where(batch[WEIGHT_MASK] > 0, batch[TARGET], torch.tensor(9.0))
        np.testing.assert_allclose(subgraph(other), wanted, rtol=1e-5)


def test_verify_recomputes_masks_where_they_are_at_hand(made):
    plan, pictures, folder = made
    model, bank = model_of(plan), Bank(folder)
    result = examine(plan, model, bank, pictures)
    assert result.passed
    assert f"bank.draw 0.{WEIGHT_MASK}" in {row.name for row in result.tensors}
    bare = [replace(picture, mask=None, mask_sha256="") for picture in pictures]
    result = examine(plan, model, bank, bare)
    assert result.passed
    assert f"bank.draw 0.{WEIGHT_MASK}" not in {row.name for row in result.tensors}
    assert any(line.startswith("the masks of draws 0") for line in result.out_of_reach)
    painted = [
        replace(p, mask=lambda p=p: 1 - p.mask()) if p.mask is not None else p for p in pictures
    ]
    failed = [row.name for row in examine(plan, model, bank, painted).tensors if not row.passed]
    assert f"bank.draw 0.{WEIGHT_MASK}" in failed


def test_a_plan_without_masks_has_the_batch_of_before(road):
    subgraph, blank = adapted_subgraph(road.plan, model_of(road.plan))
    assert not {WEIGHT, WEIGHT_MASK} & blank.keys()
    assert subgraph is not None
