"""SANA: hooks and replay equal the stock forward; gradients equal autograd on the stock model."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline

import tiny
from edge_dit.families import sana
from edge_dit.subgraph import TrainableSubgraph, add_lora, as_batch, lora_modules, lora_name

SPLITS = [(0, 0), (1, 1), (0, 2), (2, 0), (3, 0), (0, 3)]


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(1, 12)
    mask[:, -4:] = 0
    return (
        torch.randn(1, 4, *tiny.GRID, generator=generator),
        torch.tensor([321.0]),
        torch.randn(1, 12, 24, generator=generator),
        mask,
    )


def stock(model, latents, timestep, embeds, mask) -> torch.Tensor:
    return model(
        latents,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        timestep=timestep,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("split", SPLITS)
def test_replay_without_lora_equals_the_stock_forward(split):
    model = tiny.transformer()
    captured = sana.capture(model, *inputs(), *split)
    sub = TrainableSubgraph(model, "sana", *split, tiny.GRID)
    with torch.no_grad():
        expected = stock(model, *inputs())
        found = sub.predict(as_batch(captured, expected))
    assert torch.equal(captured.prediction, expected)
    if split[1] == 0:
        assert torch.equal(found, expected)  # nothing is approximated or rounded
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("head_skip", [0, 1, 3])
def test_gradients_equal_the_stock_models_when_no_tail_is_skipped(head_skip):
    model = tiny.transformer()
    add_lora(model, lora_modules(sana, range(head_skip, 4), tiny.TARGETS), 4, 8.0, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    captured = sana.capture(model, *inputs(), head_skip, 0)
    target = torch.ones_like(captured.prediction)
    loss = torch.nn.functional.mse_loss(stock(model, *inputs()), target)
    loss.backward()
    expected = {
        lora_name(name): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }
    sub = TrainableSubgraph(model, "sana", head_skip, 0, tiny.GRID)
    found = tiny.eager(sub, as_batch(captured, target))
    tiny.assert_close({f"grad.{name}": value for name, value in expected.items()}, found, 1e-5)
    assert len(expected) == 2 * len(tiny.TARGETS) * (4 - head_skip)


def test_only_middle_blocks_carry_lora():
    sub, _ = tiny.subgraph(head_skip=1, tail_skip=2)
    blocks = {name.split(".")[2] for name in sub.lora_parameters()}
    assert blocks == {"1"}


def test_cutting_padded_text_changes_nothing():
    model = tiny.transformer()
    latents, timestep, embeds, mask = inputs()
    with torch.no_grad():
        whole = stock(model, latents, timestep, embeds, mask)
        cut = stock(model, latents, timestep, embeds[:, :8], mask[:, :8])
    assert (whole - cut).abs().max() < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_are_the_schedulers(shift):
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    found = sana.sigmas({"shift": shift, "num_train_timesteps": 1000})
    torch.testing.assert_close(torch.from_numpy(found), euler.sigmas.flip(0))
    solver = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
    )
    solver.set_timesteps(1000)
    levels = sana.sigmas(solver.config)
    # All levels it can visit, but 1 itself, from which it keeps clear by a hair.
    torch.testing.assert_close(
        solver.sigmas[1:-1], torch.from_numpy(levels[:-1]).flip(0), atol=1e-3, rtol=0
    )


def test_prompts_are_encoded_as_the_pipeline_samples(workplace, monkeypatch):
    """What `SanaPipeline.__call__` passes to the transformer is what a bank is made with."""
    pipeline = SanaPipeline.from_pretrained(workplace / "model")
    seen = {}

    def spy(hidden_states, encoder_hidden_states, encoder_attention_mask, **rest):
        seen.update(embeds=encoder_hidden_states, mask=encoder_attention_mask)
        raise InterruptedError

    monkeypatch.setattr(pipeline.transformer, "forward", spy)
    with pytest.raises(InterruptedError):
        pipeline(
            "A sks toy ", height=64, width=64, use_resolution_binning=False, guidance_scale=1.0
        )
    embeds, mask = sana.encode_prompts(pipeline, ["A sks toy "])[0]
    assert torch.equal(seen["embeds"], embeds)
    assert torch.equal(seen["mask"], mask)
