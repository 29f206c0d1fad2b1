"""Checkpoints that are not what they seem: found at `plan`, each with its file and what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
import tiny
from conftest import SAMPLES
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.models.components import LIMIT
from edge_dit.models.health import model_faults
from edge_dit.models.model import open_model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan

Tensors = dict[str, torch.Tensor]
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
T5 = "text_encoder_2/model.safetensors"
CLIP = "text_encoder/model.safetensors"
GET = "get the weights that were not quantised"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A whole FLUX pipeline: two encoders, two tokenizers, nothing wrong with it."""
    return pipelines.write_pipeline("flux-dev", tmp_path_factory.mktemp("stock") / "model")


@pytest.fixture
def copied(stock, tmp_path) -> Path:
    """A folder with a job, and its pipeline to spoil."""
    shutil.copytree(stock, tmp_path / "model")
    shutil.copytree(SAMPLES / "subject" / "train", tmp_path / "images")
    (tmp_path / "job.toml").write_text(tiny.JOB.replace("patch = 32", "patch = 32"))
    return tmp_path


def refusal(folder: Path) -> BadInput:
    """What planning the job of ``folder`` ends with; nothing may be written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(BadInput) as caught:
        make_plan(read_job(folder / "job.toml"))
    assert sorted(folder.rglob("*")) == before
    return caught.value


# ---------------------------------------------------------------- ways to spoil a folder


def rewritten(file: str, change: Callable[[Tensors], Tensors], **metadata: str):
    """Spoil a safetensors file by what ``change`` makes of its tensors."""

    def spoil(model: Path) -> None:
        tensors = change(load_file(model / file))
        save_file(tensors, model / file, metadata={"format": "pt"} | metadata)

    return spoil


def edited(file: str, **keys: object):
    """Change keys of a JSON file; Ellipsis removes one."""

    def spoil(model: Path) -> None:
        value = json.loads((model / file).read_text()) | keys
        kept = {key: inner for key, inner in value.items() if inner is not ...}
        (model / file).write_text(json.dumps(kept))

    return spoil


def replaced(file: str, content: bytes):
    """Put ``content`` in the place of a file."""

    def spoil(model: Path) -> None:
        (model / file).parent.mkdir(exist_ok=True)
        (model / file).write_bytes(content)

    return spoil


def each(*spoils: Callable[[Path], object]):
    def spoil(model: Path) -> None:
        for one in spoils:
            one(model)

    return spoil


def renamed(old: str, new: str):
    return lambda model: (model / old).rename(model / new)


def removed(name: str):
    def spoil(model: Path) -> None:
        path = model / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def linear(tensors: Tensors) -> str:
    """A weight of two dimensions within a block."""
    return next(k for k, v in sorted(tensors.items()) if v.ndim == 2 and ".0." in k)


def fp8_scaled(end: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for name, value in tensors.items():
            if value.ndim == 2 and name.endswith(".weight"):
                scale = value.abs().max().clamp(min=1e-9) / 448
                out[name] = (value / scale).to(torch.float8_e4m3fn)
                out[name.removesuffix(".weight") + end] = scale.reshape(1)
        return out

    return change


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, linear(tensors): tensors[linear(tensors)].to(dtype)}


def added(*ends: str, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    """Tensors beside a weight, named as it is with another end."""

    def change(tensors: Tensors) -> Tensors:
        base = linear(tensors).removesuffix(".weight")
        return {**tensors, **{base + end: torch.ones(3).to(dtype) for end in ends}}

    return change


def swapped(*ends: str) -> Callable[[Tensors], Tensors]:
    """A weight replaced by the tensors of a quantised format."""

    def change(tensors: Tensors) -> Tensors:
        changed = added(*ends, dtype=torch.int32)(tensors)
        del changed[linear(tensors)]
        return changed

    return change


def with_value(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        changed = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        changed[max(changed)].view(-1)[-1] = value
        return changed

    return change


def without_one(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != linear(tensors)}


def cut_one(tensors: Tensors) -> Tensors:
    return {**tensors, linear(tensors): tensors[linear(tensors)][:-1].contiguous()}


def as_bin(file: str, name: str):
    def spoil(model: Path) -> None:
        torch.save(load_file(model / file), (model / file).parent / name)
        (model / file).unlink()

    return spoil


def truncated(file: str, share: float):
    def spoil(model: Path) -> None:
        os.truncate(model / file, int((model / file).stat().st_size * share))

    return spoil


def sharded(model: Path) -> None:
    """The transformer in two shards with an index."""
    tensors = load_file(model / TRANSFORMER)
    (model / TRANSFORMER).unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        held = {name: tensors[name] for name in names}
        save_file(held, model / "transformer" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / f"{TRANSFORMER}.index.json").write_text(json.dumps(index))


def in_variant(name: str, parts: tuple[str, ...], keep: bool = False):
    """Weights in float16 under the names of a variant, as ``save_pretrained(variant=)`` does."""

    def spoil(model: Path) -> None:
        for part in parts:
            for file in (model / part).glob("*.safetensors"):
                half = {key: value.half() for key, value in load_file(file).items()}
                save_file(half, file.with_suffix(f".{name}.safetensors"), {"format": "pt"})
                if not keep:
                    file.unlink()

    return spoil


PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
SHARD = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = f"{TRANSFORMER}.index.json"

# what is done to the folder, part of where, of found, of the remedy
FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    # quantised: in each component, by each tool
    "fp8 scale_weight": (
        rewritten(TRANSFORMER, fp8_scaled(".scale_weight")), TRANSFORMER, "scale_weight", GET),
    "fp8 weight_scale in T5": (rewritten(T5, fp8_scaled(".weight_scale")), T5, "float8", GET),
    "fp8 scale_weight in CLIP": (rewritten(CLIP, fp8_scaled(".scale_weight")), CLIP, "float8", GET),
    "fp8 in the VAE": (rewritten(VAE, cast(torch.float8_e5m2)), VAE, "F8_E5M2", GET),
    "fp8 without scales": (
        rewritten(TRANSFORMER, cast(torch.float8_e4m3fn)), TRANSFORMER, "F8_E4M3", GET),
    "scaled_fp8 marker": (
        rewritten(TRANSFORMER, lambda t: {**t, "scaled_fp8": torch.ones(1)}),
        TRANSFORMER, "scaled_fp8", GET),
    "comfy_quant": (
        rewritten(TRANSFORMER, added(".comfy_quant", dtype=torch.uint8)),
        TRANSFORMER, "comfy_quant", GET),
    "bitsandbytes nf4 without configuration": (
        rewritten(TRANSFORMER, added(
            ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4")),
        TRANSFORMER, "bitsandbytes", GET),
    "bitsandbytes int8": (
        rewritten(T5, swapped(".weight", ".SCB")), T5, "bitsandbytes", GET),
    "int8 weights": (rewritten(TRANSFORMER, cast(torch.int8)), TRANSFORMER, "I8", GET),
    "uint8 weights in the VAE": (rewritten(VAE, cast(torch.uint8)), VAE, "U8", GET),
    "int32 weights in CLIP": (rewritten(CLIP, cast(torch.int32)), CLIP, "I32", GET),
    "GPTQ": (rewritten(T5, swapped(".qweight", ".qzeros", ".scales", ".g_idx")), T5, "GPTQ", GET),
    "SVDQuant": (
        rewritten(TRANSFORMER, swapped(".qweight", ".wscales", ".smooth_factor")),
        TRANSFORMER, "SVDQuant", GET),
    "quanto": (
        rewritten(TRANSFORMER, swapped(".weight._data", ".weight._scale")),
        TRANSFORMER, "quanto", GET),
    "MLX": (rewritten(T5, added(".scales", ".biases")), T5, "MLX", GET),
    "MLX by metadata": (rewritten(T5, lambda t: t, format="mlx"), T5, "'mlx'", "for torch"),
    "compressed-tensors": (
        rewritten(T5, swapped(".weight_packed", ".weight_shape")), T5, "compressed-tensors", GET),
    "quantization_config": (
        edited("transformer/config.json", quantization_config=BNB),
        "transformer/config.json", "bitsandbytes", GET),
    "quantization_config of an encoder": (
        edited("text_encoder_2/config.json", quantization_config={"quant_method": "fp8"}),
        "text_encoder_2/config.json", "fp8", GET),
    "quantization_config of the VAE": (
        edited("vae/config.json", quantization_config={"quant_method": "torchao"}),
        "vae/config.json", "torchao", GET),
    "quantization_config within": (
        edited("text_encoder/config.json", text_config={"quantization_config": BNB}),
        "text_encoder/config.json", "bitsandbytes", GET),
    "a quantiser's file": (
        replaced("text_encoder_2/quantize_config.json", b'{"bits": 4}'),
        "quantize_config.json", "GPTQ", GET),
    "GGUF": (
        each(removed(TRANSFORMER), replaced("transformer/flux-Q4_K.gguf", b"GGUF" + bytes(64))),
        "transformer", "GGUF", GET),
    # tensors that do not fit
    "an extra tensor": (
        rewritten(TRANSFORMER, lambda t: {**t, "more.weight": torch.ones(2)}),
        TRANSFORMER, "more.weight", "one and the same model"),
    "an extra tensor in the VAE": (
        rewritten(VAE, added(".scale")), VAE, "does not explain", "one and the same model"),
    "an extra tensor in T5": (
        rewritten(T5, added(".lora_A.weight")), T5, "lora_A", "one and the same model"),
    "a tensor that the index does not name": (
        each(sharded, rewritten(SHARD, lambda t: {**t, "more.weight": torch.ones(2)})),
        INDEX, "more.weight", "download"),
    "fewer layers than are stored": (
        edited("transformer/config.json", num_layers=1),
        TRANSFORMER, "does not explain", "one and the same model"),
    "more layers than are stored": (
        edited("transformer/config.json", num_layers=9), "transformer", "in no file", "download"),
    "a missing tensor": (rewritten(TRANSFORMER, without_one), "transformer", "in no file", "again"),
    "a missing tensor in T5": (rewritten(T5, without_one), "text_encoder_2", "in no file", "again"),
    "a missing tensor in CLIP": (rewritten(CLIP, without_one), "text_encoder", "in no file", "again"),
    "a missing tensor in the VAE": (rewritten(VAE, without_one), "vae", "in no file", "again"),
    "a wrong shape": (rewritten(TRANSFORMER, cut_one), TRANSFORMER, "of shape", "again"),
    "a wrong shape in T5": (rewritten(T5, cut_one), T5, "of shape", "again"),
    "a wrong shape in the VAE": (rewritten(VAE, cut_one), VAE, "of shape", "again"),
    # not finite
    "NaN": (rewritten(TRANSFORMER, with_value(float("nan"))), TRANSFORMER, "not finite", "again"),
    "infinity in bfloat16": (
        rewritten(TRANSFORMER, with_value(float("inf"), torch.bfloat16)),
        TRANSFORMER, "not finite", "again"),
    "-infinity in float16 in the VAE": (
        rewritten(VAE, with_value(float("-inf"), torch.float16)), VAE, "not finite", "again"),
    "NaN in T5": (rewritten(T5, with_value(float("nan"))), T5, "not finite", "again"),
    "NaN in float64 in CLIP": (
        rewritten(CLIP, with_value(float("nan"), torch.float64)), CLIP, "not finite", "again"),
    # half a download
    "git-lfs pointer": (replaced(TRANSFORMER, LFS), TRANSFORMER, "git-lfs", "git lfs pull"),
    "git-lfs pointer of an encoder": (replaced(T5, LFS), T5, "git-lfs", "git lfs pull"),
    "git-lfs pointer of a tokenizer": (
        replaced("tokenizer_2/tokenizer.json", LFS), "tokenizer_2/tokenizer.json",
        "git-lfs", "git lfs pull"),
    "git-lfs pointer of spiece.model": (
        replaced("tokenizer_2/spiece.model", LFS), "spiece.model", "git-lfs", "git lfs pull"),
    "git-lfs pointer of a configuration": (
        replaced("vae/config.json", LFS), "vae/config.json", "git-lfs", "git lfs pull"),
    "empty weights": (replaced(VAE, b""), VAE, "empty", "again"),
    "an empty configuration": (
        replaced("text_encoder/config.json", b""), "text_encoder/config.json", "empty", "again"),
    "an empty tokenizer": (
        replaced("tokenizer/tokenizer.json", b""), "tokenizer/tokenizer.json", "empty", "again"),
    "cut off": (truncated(T5, 0.7), T5, "damaged", "again"),
    "cut off within the header": (truncated(VAE, 0.001), VAE, "damaged", "again"),
    "zeros": (replaced(TRANSFORMER, bytes(4096)), TRANSFORMER, "damaged", "again"),
    "an error page": (
        replaced(T5, b"<!DOCTYPE html><html>404</html>"), T5, "damaged", "again"),
    "a header without end": (
        replaced(VAE, struct.pack("<Q", 2**62) + b"{}"), VAE, "damaged", "again"),
    "aria2": (
        replaced(f"{T5}.aria2", b"x"), "safetensors.aria2", "not downloaded to its end", "finish"),
    "incomplete": (
        renamed(TRANSFORMER, f"{TRANSFORMER}.incomplete"),
        "transformer", "not finished", "finish the download"),
    "a missing shard": (
        each(sharded, removed(SHARD)), "transformer", "00002-of-00002", "finish the download"),
    "a shard that is half there": (
        each(sharded, renamed(SHARD, f"{SHARD}.part")),
        "transformer", ".part", "finish the download"),
    "a broken link": (
        each(removed(VAE), lambda m: (m / VAE).symlink_to("../../blobs/gone")),
        VAE, "a link to ../../blobs/gone", "download"),
    "a folder in place of weights": (
        each(removed(VAE), lambda m: (m / VAE).mkdir()), VAE, "not a regular file", "again"),
    # weights in other formats
    "an encoder in .bin only": (
        as_bin(T5, "pytorch_model.bin"), "text_encoder_2", "pytorch_model.bin", "safetensors"),
    "a VAE in .bin only": (
        as_bin(VAE, "diffusion_pytorch_model.bin"),
        "vae", "diffusion_pytorch_model.bin", "safetensors"),
    "an encoder in flax only": (
        each(removed(CLIP), replaced("text_encoder/flax_model.msgpack", b"\x80")),
        "text_encoder", "flax_model.msgpack", "safetensors"),
    "weights under another name": (
        renamed(TRANSFORMER, "transformer/flux1-dev.safetensors"),
        "transformer", "flux1-dev.safetensors", "save_pretrained"),
    "only a variant": (
        in_variant("fp16", PARTS), "transformer", "of fp16", '[model] variant = "fp16"'),
    # folders
    "an empty folder": (
        each(removed("vae"), lambda m: (m / "vae").mkdir()), "vae", "empty folder", "again"),
    "a file in place of a folder": (
        each(removed("scheduler"), replaced("scheduler", b"x")), "scheduler", "a file", "again"),
    "a broken link in place of a folder": (
        each(removed("tokenizer"), lambda m: (m / "tokenizer").symlink_to("gone")),
        "tokenizer", "a link to gone", "again"),
    # configurations
    "a list": (replaced("transformer/config.json", b"[1]"), "config.json", "list", "again"),
    "a text": (replaced("vae/config.json", b'"x"'), "vae/config.json", "str", "again"),
    "NaN in a configuration": (
        edited("vae/config.json", scaling_factor=float("nan")),
        "vae/config.json", "NaN", "again"),
    "a scaling factor that is a text": (
        edited("vae/config.json", scaling_factor="0.36"),
        "vae/config.json", "scaling_factor", "again"),
    "a byte order mark": (
        lambda m: replaced("transformer/config.json", b"\xef\xbb\xbf" + (
            m / "transformer/config.json").read_bytes())(m),
        "transformer/config.json", "byte order mark", "again"),
    "UTF-16": (
        lambda m: replaced("vae/config.json", (
            m / "vae/config.json").read_text().encode("utf-16"))(m),
        "vae/config.json", "unreadable", "again"),
    "nested without end": (
        replaced("vae/config.json", b'{"a":' * 10000), "vae/config.json", "unreadable", "again"),
    "huge": (
        replaced("text_encoder/config.json", b" " * (LIMIT + 1)),
        "text_encoder/config.json", "larger than", "again"),
    "another class": (
        edited("transformer/config.json", _class_name="SD3Transformer2DModel"),
        "transformer/config.json", "SD3Transformer2DModel", "again"),
    "layers without end": (
        edited("transformer/config.json", num_layers=10**9),
        "transformer/config.json", "num_layers", "again"),
    "layers without end in T5": (
        edited("text_encoder_2/config.json", num_layers=10**9),
        "text_encoder_2/config.json", "num_layers", "again"),
    "layers that are a text": (
        edited("transformer/config.json", num_layers="2"),
        "transformer/config.json", "cannot build it", "again"),
    "no heads": (
        edited("text_encoder_2/config.json", num_heads=0, d_kv=0), "text_encoder_2", "", "again"),
    "a VAE of no channels": (
        edited("vae/config.json", block_out_channels=None),
        "vae/config.json", "cannot build it", "again"),
    "no scheduler configuration": (
        removed("scheduler/scheduler_config.json"), "scheduler", "empty", "again"),
    "a scheduler that is a list": (
        replaced("scheduler/scheduler_config.json", b"[]"),
        "scheduler_config.json", "list", "again"),
    "a scheduler of no steps": (
        edited("scheduler/scheduler_config.json", num_train_timesteps=None),
        "scheduler", "", "again"),
    # model_index.json
    "an index that is a list": (
        replaced("model_index.json", b"[]"), "model_index.json", "list", "again"),
    "a class that is a list": (
        edited("model_index.json", _class_name=["FluxPipeline"]),
        "model_index.json", "FluxPipeline", "diffusers"),
    "a component of an unexpected form": (
        edited("model_index.json", vae=["diffusers"]), "model_index.json", "vae", "again"),
    "a component without class": (
        edited("model_index.json", vae=["diffusers", None]), "model_index.json", "vae", "again"),
    "no VAE": (edited("model_index.json", vae=...), "model_index.json", "no vae", "again"),
    "a component of unknown class": (
        edited("model_index.json", text_encoder=["transformers", "NoSuchModel"]),
        "model_index.json", "NoSuchModel", "stock pipeline"),
    "a component of code of its own": (
        edited("model_index.json", text_encoder=["my_encoder", "MyModel"]),
        "model_index.json", "my_encoder", "stock pipeline"),
    # tokenizers
    "a tokenizer that is no JSON": (
        replaced("tokenizer/tokenizer.json", b"{"), "tokenizer/tokenizer.json", "", "again"),
    "a tokenizer of unexpected form": (
        replaced("tokenizer_2/tokenizer.json", b'{"version": "1.0", "model": {"type": "WordPiece"}}'),
        "tokenizer_2/tokenizer.json", "", "again"),
    "a tokenizer that is a list": (
        replaced("tokenizer/tokenizer.json", b"[]"), "tokenizer/tokenizer.json", "", "again"),
    "a tokenizer's configuration that is a list": (
        replaced("tokenizer/tokenizer_config.json", b"[]"), "tokenizer_config.json", "list", "again"),
    "a broken spiece.model": (
        each(removed("tokenizer_2/tokenizer.json"),
             replaced("tokenizer_2/spiece.model", b"\x0a\xff\xff\xff" + bytes(99))),
        "tokenizer_2/spiece.model", "", "again"),
    "a vocabulary without words": (
        each(removed("tokenizer/tokenizer.json"), replaced("tokenizer/vocab.json", b"{}"),
             replaced("tokenizer/merges.txt", b"#version: 0.2\n")),
        "tokenizer/vocab.json", "", "again"),
    "no vocabulary": (removed("tokenizer/tokenizer.json"), "tokenizer", "no vocabulary", "again"),
    "the tokenizer of a larger encoder": (
        edited("text_encoder/config.json", vocab_size=5), "text_encoder", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_found_at_plan(copied, name):
    spoil, where, found, remedy = FAULTS[name]
    spoil(copied / "model")
    fault = refusal(copied)
    faults = fault.faults if isinstance(fault, ManyFaults) else [fault]
    for one in faults:
        assert one.found
        assert one.expected
        assert one.remedy
    ours = [f for f in faults if where in f.where and found in f.found and remedy in f.remedy]
    assert ours, str(fault)
