"""An opened model says what its folder says, and reads what it is asked for."""

import shutil

import pytest

from edge_dit.contract.objective import FlowMatching
from edge_dit.errors import BadInput
from edge_dit.models.families.sana import FAMILY
from edge_dit.models.model import open_model


def test_a_folder_opened(workplace):
    model = open_model(workplace / "model")
    assert (model.family, model.folder) == (FAMILY, workplace / "model")
    assert (model.layers, model.multiple) == (4, 8)
    assert isinstance(model.objective, FlowMatching)
    assert {parameter.device.type for parameter in model.meta().parameters()} == {"meta"}
    assert model.checkpoint().names == FAMILY.block_names(model.config)


def test_only_what_is_asked_for_is_read(workplace, tmp_path):
    """A folder without autoencoder and scheduler opens; asking for theirs names the file."""
    shutil.copytree(
        workplace / "model", tmp_path / "model", ignore=shutil.ignore_patterns("vae", "scheduler")
    )
    model = open_model(tmp_path / "model")
    assert model.layers == 4
    assert len(model.hash) == 64
    with pytest.raises(BadInput, match=r"vae.config\.json"):
        _ = model.multiple
    with pytest.raises(BadInput, match=r"scheduler_config\.json"):
        _ = model.objective


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "tokenizer", "text_encoder"])
def test_the_hash_is_of_every_part_that_shapes_a_bank(workplace, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(workplace / "model", folder)
    before = open_model(folder).hash
    assert before == open_model(workplace / "model").hash
    file = min((folder / part).glob("*.json"))
    file.write_text(file.read_text() + "\n")
    assert open_model(folder).hash != before
