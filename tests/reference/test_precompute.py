"""Precompute: what is stored is what the equations say, and the same job gives the same bytes."""

import numpy as np
import pytest
import torch

from edge_dit.contract import bank as banks
from edge_dit.contract.bank import Bank
from edge_dit.contract.noise import NOISE
from edge_dit.errors import BadInput
from edge_dit.models.families.family import State
from edge_dit.models.families.sana import FAMILY
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.plan import model_of
from edge_dit.reference.eager import adapted_subgraph
from edge_dit.reference.precompute import normal_of, precompute


@pytest.fixture(scope="module")
def images(road):
    job = read_job(road.job)
    return read_folder(job.data.images, job.data.prompt, road.plan.s_max)


def test_same_job_same_bytes_and_a_stopped_one_too(road, images, tmp_path):
    again = tmp_path / "again"
    precompute(road.plan, images, again)
    files = sorted(path.name for path in road.bank.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        assert (road.bank / name).read_bytes() == (again / name).read_bytes(), name
    banks.shard_path(again, 0).unlink()
    precompute(road.plan, images, again)
    name = banks.shard_path(again, 0).name
    assert (road.bank / name).read_bytes() == (again / name).read_bytes()


def test_a_draw_holds_what_the_equations_say(road, images):
    """Redone by hand with torch's own crop and resize, and the stock forward."""
    plan, bank = road.plan, Bank(road.bank)
    pipeline = load_pipeline(plan.model)
    for number in range(4):
        draw, stored = bank.index.draws[number], bank[number]
        crop, image = draw.crop, images[draw.image]
        cut = torch.from_numpy(image.pixels)[
            None, :, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side
        ]
        patch = torch.nn.functional.interpolate(
            cut, size=plan.s_min, mode="bilinear", antialias=True
        )
        with torch.no_grad():
            clean = pipeline.vae.encode(patch).latent * pipeline.vae.config.scaling_factor
        noise = normal_of(draw.seed, NOISE, tuple(clean.shape))
        np.testing.assert_allclose(stored["target"], noise - clean, atol=1e-4)
        noised = (1 - draw.sigma) * clean + draw.sigma * noise
        tokens = plan.text_tokens
        prompt = FAMILY.encode_prompts(pipeline, [image.caption], tokens)[0]
        with torch.no_grad():
            expected = pipeline.transformer(
                noised,
                **prompt,
                timestep=torch.tensor([draw.sigma * 1000]),
                return_dict=False,
            )[0]
            state = State(torch.from_numpy(stored["entry"]))
            cond = {k[5:]: torch.from_numpy(v) for k, v in stored.items() if k.startswith("cond.")}
            for block in list(FAMILY.blocks(pipeline.transformer).items())[1:3]:
                state = FAMILY.run_block(*block, state, cond, plan.grid)
            last = state.image + torch.from_numpy(stored["tail_residual"])
            found = FAMILY.head(pipeline.transformer, last, cond, plan.grid)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_other_images_do_not_continue_a_bank(road, images):
    with pytest.raises(BadInput, match="other images"):
        precompute(road.plan, images[:2], road.bank)


def test_captions_reach_their_draws(road):
    index = Bank(road.bank).index
    assert len(index.prompts) == 2
    by_image = {draw.image: index.prompts[draw.prompt] for draw in index.draws}
    assert by_image[1] == by_image[2] == "a sks toy"
    assert by_image[0] != "a sks toy"


def test_a_run_between_trained_blocks_has_a_residual_of_its_own(road, images, tmp_path):
    """Entry state, trained blocks and both residuals give the stock forward's prediction."""
    runs = {"head_skip": 0, "tail_skip": 0, "inner_skips": [(1, 3)]}
    plan = road.plan.model_copy(update={**runs, "draws": 2})
    precompute(plan, images, tmp_path / "bank")
    stored = Bank(tmp_path / "bank", plan.identity())[0]
    whole = Bank(road.bank)[0]
    assert stored["residual.1"].shape == stored["entry"].shape
    subgraph, blank = adapted_subgraph(plan, model_of(plan))
    assert blank.keys() == stored.keys()
    every = road.plan.model_copy(update={"head_skip": 0, "tail_skip": 0})
    unskipped, _ = adapted_subgraph(every, model_of(every))
    with torch.no_grad():
        found = subgraph.predict({name: torch.from_numpy(v) for name, v in stored.items()})
        expected = unskipped.predict({name: torch.from_numpy(v) for name, v in stored.items()})
    np.testing.assert_array_equal(stored["target"], whole["target"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
