"""A bundle that says of itself what its plan does not say is caught, though both sides read it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from edge_dit.app.claims import false_claims
from edge_dit.app.verify import why_ended
from edge_dit.app.verify_words import explained, why_failed
from edge_dit.contract.adapter import read_adapter, with_random_b, write_adapter
from edge_dit.contract.bundle import ADAPTER, open_bundle, write_manifest
from edge_dit.contract.certificate import Certificate
from edge_dit.planning.plan import model_of
from edge_dit.reference.eager import adapted_subgraph
from edge_dit_runtime.measure import MARK


@pytest.fixture(scope="module")
def fresh(plan):
    """The plan's sub-graph with its fresh LoRA, and a draw of its shapes."""
    return adapted_subgraph(plan, model_of(plan))


def claims(bundle: Path, plan, fresh, planned=None) -> list[str]:
    subgraph, batch = fresh
    return false_claims(open_bundle(bundle), plan, subgraph, batch, planned)


def test_what_was_exported_claims_nothing_false(bundle, plan, fresh):
    assert claims(bundle, plan, fresh) == []
    assert claims(bundle, plan, fresh, plan) == []


def adapter_of(change):
    def plant(bundle: Path) -> None:
        tensors, rank, alpha = read_adapter(bundle / ADAPTER)
        write_adapter(bundle / ADAPTER, *change(dict(tensors), rank, alpha))

    return plant


def trained(tensors, rank, alpha):
    return with_random_b(tensors), rank, alpha


def zero(tensors, rank, alpha):
    return {name: np.zeros_like(value) for name, value in tensors.items()}, rank, alpha


def another_seed(tensors, rank, alpha):
    rng = np.random.default_rng(0)
    return (
        {name: rng.permuted(value.ravel()).reshape(value.shape) for name, value in tensors.items()},
        rank,
        alpha,
    )


def another_rank(tensors, rank, alpha):
    doubled = {
        name: np.concatenate([value, value], axis=0 if ".lora_A." in name else 1)
        for name, value in tensors.items()
    }
    return doubled, 2 * rank, alpha


def without_one(tensors, rank, alpha):
    first = next(iter(tensors)).replace("lora_B", "lora_A")
    for part in ("lora_A", "lora_B"):
        del tensors[first.replace("lora_A", part)]
    return tensors, rank, alpha


ADAPTERS = {
    "of a trained run": (trained, "is not the fresh LoRA of the plan's seed"),
    "all zero": (zero, "is not the fresh LoRA of the plan's seed"),
    "of another seed": (another_seed, "is not the fresh LoRA of the plan's seed"),
    "of another rank": (another_rank, "of shape"),
    "of another alpha": (lambda t, rank, alpha: (t, rank, 2 * alpha), "alpha"),
    "without a module": (without_one, "is missing"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_not_the_plans(bundle, plan, fresh, name):
    change, words = ADAPTERS[name]
    adapter_of(change)(bundle)
    found = claims(bundle, plan, fresh)
    assert found
    assert all(line.startswith(f"{ADAPTER}: ") and words in line for line in found[-1:]), found


def optimizer(**changes):
    return lambda manifest: {"optimizer": replace(manifest.optimizer, **changes)}


def shape_of(name: str):
    def change(manifest):
        tensors = [
            spec.model_copy(update={"shape": (*spec.shape[:-1], spec.shape[-1] + 1)})
            if spec.name == name
            else spec
            for spec in manifest.tensors
        ]
        return {"tensors": tensors}

    return change


def swapped(manifest):
    first, second, *rest = manifest.tensors
    return {"tensors": [second, first, *rest]}


def doubled(manifest):
    return {"tensors": [*manifest.tensors, manifest.tensors[0]]}


MANIFESTS = {
    "optimizer.lr": optimizer(lr=2e-3),
    "optimizer.beta1": optimizer(beta1=0.95),
    "optimizer.beta2": optimizer(beta2=0.99),
    "optimizer.eps": optimizer(eps=1e-8),
    "optimizer.loraplus_lr_ratio": optimizer(loraplus_lr_ratio=2.0),
    "optimizer.weight_decay": optimizer(weight_decay=0.0),
    "optimizer.max_grad_norm": optimizer(max_grad_norm=10.0),
    "tensors.entry": shape_of("entry"),
    "tensors.target": shape_of("target"),
    "another order, or a name twice": swapped,
    "tensors is": doubled,
    "plan_hash": lambda _: {"plan_hash": "0" * 64},
    "family": lambda _: {"family": "flux"},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_not_the_plans(bundle, plan, fresh, name):
    manifest = open_bundle(bundle).manifest
    write_manifest(bundle, manifest.model_copy(update=MANIFESTS[name](manifest)))
    (line, *_) = claims(bundle, plan, fresh)
    assert line.startswith("manifest: ")
    assert name in line


@pytest.mark.parametrize(
    "key", ["rank", "alpha", "seed", "steps", "draws", "weights", "targets", "lora_targets"]
)
def test_a_plan_that_is_not_the_users(bundle, plan, fresh, key):
    """Where the manifest's plan itself was changed, only the user's own can tell."""
    other = {
        "rank": plan.rank + 1,
        "alpha": 1.5,
        "seed": 99,
        "steps": 1,
        "draws": 1,
        "weights": "int8",
        "targets": ["executorch"],
        "lora_targets": ["attn1.to_k"],
    }
    mine = plan.model_copy(update={key: other[key]})
    assert any(f"plan.{key} is" in line for line in claims(bundle, plan, fresh, mine))


def test_the_prompt_and_the_path_are_nobodys_business(bundle, plan, fresh):
    mine = plan.model_copy(update={"asked": {"data.prompt": "mine"}, "model": None})
    assert claims(bundle, plan, fresh, mine) == []


def test_false_claims_fail_a_certificate_and_are_printed():
    right = Certificate("0", "torch", 20, {}, None)
    wrong = replace(right, false_claims=["manifest: optimizer.lr is 1, by the plan 2"])
    assert right.passed
    assert not wrong.passed
    assert "not what the plan says: manifest: optimizer.lr is 1" in why_failed(wrong)
    assert json.loads(json.dumps(wrong.as_json()))["passed"] is False
    assert asdict(wrong)["false_claims"]


def test_explain_says_what_was_tried_and_what_was_not():
    made = Certificate("0", "torch", 20, {}, None, varied=["lr: 1, 2"], exercised=["clipped: x"])
    text = "\n".join(explained(made))
    for words in ("varied:", "lr: 1, 2", "exercised", "clipped: x", "out of reach:", "forgery"):
        assert words in text


def test_a_childs_own_message_is_shown_whole():
    written = f"a warning\n{MARK}bank/draw 3: shape (2,)\n  expected: (3,)\n  remedy: again"
    assert why_ended(1, written) == (
        "the process ended with code 1: bank/draw 3: shape (2,)\n  expected: (3,)\n  remedy: again"
    )
    assert why_ended(-11, "") == "the process ended with code -11: no message"
    assert why_ended(1, "Traceback\nKeyError: 'x'\n") == (
        "the process ended with code 1: KeyError: 'x'"
    )
