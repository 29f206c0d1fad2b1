"""Prior draws: their target is what the base model predicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from edge_dit.app import api
from edge_dit.contract.bank import Bank
from edge_dit.contract.names import TARGET, WEIGHT
from edge_dit.contract.noise import NOISE
from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.dataset import read_folder, with_prior
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import model_of
from edge_dit.reference.eager import adapted_subgraph
from edge_dit.reference.evidence import examine, is_prior
from edge_dit.reference.precompute import normal_of, precompute
from edge_dit.store.tensors import TensorFile, write_tensors

PRIOR_KEYS = '[prior]\nprompt = ["a box", "a toy"]\nweight = 2.0\nshare = 0.5\n'
PRIOR = ("draws = 10", "draws = 9"), ("[plan]", PRIOR_KEYS + "[plan]")


@pytest.fixture(scope="module")
def made(workplace, tmp_path_factory):
    """A job with a prior, its pictures and its bank."""
    job = read_job(tiny.write_job(workplace, *PRIOR))
    plan = make_plan(job)
    folder = tmp_path_factory.mktemp("prior") / "bank"
    pictures = api.read_pictures(job, plan)
    precompute(plan, pictures, folder)
    return plan, pictures, folder


def priors(bank):
    return [n for n, draw in enumerate(bank.index.draws) if is_prior(bank.index, draw)]


def test_the_target_is_the_stock_models_prediction(made):
    plan, pictures, folder = made
    bank, pipeline, model = Bank(folder, plan.identity()), load_pipeline(plan.model), model_of(plan)
    family, objective = model.family, model.objective
    assert isinstance(objective, FlowMatching)
    assert len(priors(bank)) == 4
    for number in priors(bank):
        draw, stored = bank.index.draws[number], bank[number]
        own = read_folder_like(pictures, draw.image)
        assert bank.index.prompts[draw.prompt] in ("a box", "a toy")
        assert stored[WEIGHT].tolist() == [2.0]
        crop = draw.crop
        cut = own[None, :, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
        patch = torch.nn.functional.interpolate(
            torch.from_numpy(cut), size=plan.s_min, mode="bilinear", antialias=True
        )
        prompt = family.encode_prompts(
            pipeline, [bank.index.prompts[draw.prompt]], plan.text_tokens
        )[0]
        with torch.no_grad():
            clean = pipeline.vae.encode(patch).latent * pipeline.vae.config.scaling_factor
            noise = normal_of(draw.seed, NOISE, tuple(clean.shape))
            expected = pipeline.transformer(
                objective.noised(clean, noise, draw.sigma),
                **prompt,
                timestep=torch.tensor([draw.sigma * 1000]),
                return_dict=False,
            )[0]
        np.testing.assert_allclose(stored[TARGET], expected, atol=1e-4)


def read_folder_like(pictures, number):
    """The pixels of a prior draw: those of the subject's picture."""
    assert pictures[number].prior
    assert pictures[number].sha256 == pictures[number - len(pictures) // 2].sha256
    return pictures[number].pixels


@pytest.mark.parametrize("tail", ["stored", "through"])
def test_before_training_nothing_is_to_be_learned_of_them(made, tmp_path, tail):
    """With B = 0 the adapted model is the base model, so their loss and its gradient are zero."""
    plan, pictures, folder = made
    if tail != plan.tail:
        plan, folder = plan.model_copy(update={"tail": tail, "draws": 2}), tmp_path / "bank"
        precompute(plan, pictures, folder)
    bank = Bank(folder, plan.identity())
    subgraph, blank = adapted_subgraph(plan, model_of(plan))
    assert blank.keys() == bank[0].keys()
    losses = {}
    for number in range(len(bank)):
        batch = {name: torch.from_numpy(value) for name, value in bank[number].items()}
        losses[number] = float(subgraph(batch).detach())
    prior = priors(bank)
    assert max(losses[number] for number in prior) < 1e-9
    assert min(loss for number, loss in losses.items() if number not in prior) > 1e-2


@pytest.mark.parametrize("at_hand", [True, False])
def test_verify_recomputes_a_prior_target(made, tmp_path, at_hand):
    plan, pictures, folder = made
    model, shown = model_of(plan), pictures if at_hand else []
    result = examine(plan, model, Bank(folder), shown)
    assert result.passed
    number = priors(Bank(folder))[0]
    assert f"bank.draw {number}.{TARGET}" in {
        row.name.replace("entry to ", "") for row in result.tensors
    }
    other = tmp_path / "bank"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    shard = next(other.glob("shard-*"))
    file = TensorFile(shard)
    tensors = file.read()
    tensors[f"{number}.{TARGET}"] = 0.9 * tensors[f"{number}.{TARGET}"]
    write_tensors(shard, tensors, {"index": file.header.metadata["index"]})
    result = examine(plan, model, Bank(other), shown)
    failed = [row.name.replace("entry to ", "") for row in result.tensors if not row.passed]
    assert failed == [f"bank.draw {number}.{TARGET}"]


def test_an_index_that_hides_a_prior_is_found(made, tmp_path):
    from edge_dit.reference.index_claims import false_index

    plan, _, folder = made
    index = Bank(folder).index
    assert not false_index(plan, model_of(plan), index, {})
    plain = replace(index, images=[replace(image, prior=False) for image in index.images])
    (line,) = false_index(plan, model_of(plan), plain, {})
    assert "0 of 6 images are of prior draws" in line
    lighter = [replace(d, prompt=0) for d in index.draws]
    assert false_index(plan, model_of(plan), replace(index, draws=lighter), {})


def test_a_plan_without_a_prior_has_the_identity_of_before(road):
    """Of a plan that was made before there were priors and weights."""
    before = road.plan.model_dump(mode="json", exclude={"prior_share", "weighted"})
    assert type(road.plan).model_validate(before).identity() == road.plan.identity()
    other = road.plan.model_copy(update={"prior_share": 0.25})
    assert other.identity() != road.plan.identity()


def test_pictures_of_prior_draws_are_those_of_the_subject(workplace):
    pictures = read_folder(workplace / "images", "a sks toy", 64)
    both = with_prior(pictures, [" a toy ", "a toy"], 1.0)
    assert [p.prior for p in both] == [False] * 3 + [True] * 3
    assert both[3].captions == ("a toy",)


def test_fewer_pictures_than_prompts_are_refused(workplace):
    keys = PRIOR_KEYS + "images = 1\n"
    with pytest.raises(BadInput, match=r"prior\.images = 1 with 2 prompts"):
        read_job(tiny.write_job(workplace, ("[plan]", keys + "[plan]")))


def test_the_base_model_draws_the_priors_pictures_where_a_job_asks_for_some(
    workplace, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keys = PRIOR_KEYS + "images = 3\n"
    job = read_job(tiny.write_job(workplace, PRIOR[0], ("[plan]", keys + "[plan]")))
    plan = make_plan(job)
    pictures = api.read_pictures(job, plan)
    drawn = [picture for picture in pictures if picture.prior]
    assert [p.name for p in drawn] == ["prior-0.png", "prior-1.png", "prior-2.png"]
    assert [p.captions for p in drawn] == [("a box",), ("a toy",), ("a box",)]
    model, pipeline = model_of(plan), load_pipeline(plan.model)
    (wanted,) = model.family.sample(pipeline, "a toy", plan.s_max, [1])
    np.testing.assert_array_equal(drawn[1].load(), np.asarray(wanted.convert("RGB")))

    precompute(plan, pictures, tmp_path / "bank")
    bank = Bank(tmp_path / "bank", plan.identity())
    for number in priors(bank):
        draw = bank.index.draws[number]
        assert bank.index.prompts[draw.prompt] == pictures[draw.image].caption
    assert examine(plan, model, bank, pictures).passed

    (first, *rest) = sorted(path for path in (tmp_path / "cache").rglob("prior-*.png"))
    before, times = first.read_bytes(), [path.stat().st_mtime_ns for path in rest]
    first.unlink()
    again = [picture.sha256 for picture in api.read_pictures(job, plan)]
    assert again == [picture.sha256 for picture in pictures]
    assert first.read_bytes() == before
    assert [path.stat().st_mtime_ns for path in rest] == times
