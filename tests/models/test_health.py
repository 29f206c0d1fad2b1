"""Checkpoints that are not what they seem: found at `plan`, each with its file and what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
import tiny
from edge_dit.errors import BadInput, ManyFaults
from edge_dit.models.components import LIMIT
from edge_dit.models.health import model_faults
from edge_dit.models.model import open_model
from edge_dit.models.pipeline import load_pipeline
from edge_dit.pictures.dataset import read_folder
from edge_dit.planning.job import read_job
from edge_dit.planning.make import make_plan
from edge_dit.planning.plan import Plan, model_of
from edge_dit.reference.precompute import precompute

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
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
    (tmp_path / "job.toml").write_text(tiny.JOB)
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
    "a missing tensor in CLIP": (
        rewritten(CLIP, without_one), "text_encoder", "in no file", "again"),
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
    "git-lfs pointer": (replaced(TRANSFORMER, LFS), TRANSFORMER, "Git LFS", "git lfs pull"),
    "git-lfs pointer of an encoder": (replaced(T5, LFS), T5, "Git LFS", "git lfs pull"),
    "git-lfs pointer of a tokenizer": (
        replaced("tokenizer_2/tokenizer.json", LFS), "tokenizer_2/tokenizer.json",
        "Git LFS", "git lfs pull"),
    "git-lfs pointer of spiece.model": (
        replaced("tokenizer_2/spiece.model", LFS), "spiece.model", "Git LFS", "git lfs pull"),
    "git-lfs pointer of a configuration": (
        replaced("vae/config.json", LFS), "vae/config.json", "Git LFS", "git lfs pull"),
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
    "shards without their index": (
        each(sharded, removed(INDEX)), "transformer", "without their index", "index.json"),
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
    "a scaling factor of null": (
        edited("vae/config.json", scaling_factor=None),
        "vae/config.json", "scaling_factor", "again"),
    "a shift that is a text": (
        edited("vae/config.json", shift_factor="x"), "vae/config.json", "shift_factor", "again"),
    "a generation_config that is a list": (
        replaced("text_encoder_2/generation_config.json", b"[]"),
        "generation_config.json", "list", "again"),
    "weights of the original layout": (
        rewritten(TRANSFORMER, lambda t: {f"model.diffusion_model.{k}": v for k, v in t.items()}),
        TRANSFORMER, "does not explain", "one and the same model"),
    "a pipe": (
        each(removed(VAE), lambda m: os.mkfifo(m / VAE)), VAE, "not a regular file", "again"),
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
        "transformer/config.json", "num_layers =", "again"),
    "layers without end in the VAE": (
        edited("vae/config.json", layers_per_block=[2, 10**9]),
        "vae/config.json", "layers_per_block", "again"),
    "a list without end": (
        edited("vae/config.json", block_out_channels=[8] * 10**5),
        "vae/config.json", "block_out_channels", "again"),
    "no heads": (
        edited("text_encoder_2/config.json", num_heads=0, d_kv=0), "text_encoder_2", "", "again"),
    "a VAE of no channels": (
        edited("vae/config.json", block_out_channels=None),
        "vae/config.json", "block_out_channels = null", "again"),
    "no scheduler configuration": (
        removed("scheduler/scheduler_config.json"), "scheduler", "empty", "again"),
    "a scheduler that is a list": (
        replaced("scheduler/scheduler_config.json", b"[]"),
        "scheduler_config.json", "list", "again"),
    "a scheduler of no steps": (
        edited("scheduler/scheduler_config.json", num_train_timesteps=None),
        "scheduler", "", "again"),
    "noise levels without end": (
        edited("scheduler/scheduler_config.json", num_train_timesteps=10**13),
        "scheduler_config.json", "num_train_timesteps", "again"),
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
        replaced("tokenizer_2/tokenizer.json", b'{"model": {"type": "WordPiece"}}'),
        "tokenizer_2/tokenizer.json", "", "again"),
    "a tokenizer that is a list": (
        replaced("tokenizer/tokenizer.json", b"[]"), "tokenizer/tokenizer.json", "", "again"),
    "a tokenizer's configuration that is a list": (
        replaced("tokenizer/tokenizer_config.json", b"[]"),
        "tokenizer_config.json", "list", "again"),
    "a broken spiece.model": (
        each(removed("tokenizer_2/tokenizer.json"),
             replaced("tokenizer_2/spiece.model", b"\x0a\xff\xff\xff" + bytes(99))),
        "tokenizer_2/spiece.model", "", "again"),
    "a vocabulary without words": (
        each(removed("tokenizer/tokenizer.json"), replaced("tokenizer/vocab.json", b"{}"),
             replaced("tokenizer/merges.txt", b"#version: 0.2\n")),
        "tokenizer/vocab.json", "", "again"),
    "no length of texts": (
        edited("tokenizer_2/tokenizer_config.json", model_max_length="long"),
        "tokenizer_2", "", "again"),
    "a negative length of texts": (
        edited("tokenizer/tokenizer_config.json", model_max_length=-1),
        "tokenizer_config.json", "model_max_length", "again"),
    "no token for padding": (
        edited("tokenizer/tokenizer_config.json", pad_token=None),
        "tokenizer", "", "again"),
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


def test_all_faults_of_all_components_come_together(copied):
    for name in ("fp8 scale_weight", "git-lfs pointer of a tokenizer", "NaN in T5", "a text"):
        FAULTS[name][0](copied / "model")
    fault = refusal(copied)
    assert isinstance(fault, ManyFaults)
    where = sorted(Path(one.where).relative_to(copied / "model").as_posix() for one in fault.faults)
    assert where == [T5, "tokenizer_2/tokenizer.json", TRANSFORMER, "vae/config.json"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(copied):
    (copied / "model" / VAE).chmod(0)
    fault = refusal(copied)
    assert fault.where == str(copied / "model" / VAE)
    assert "chmod" in fault.remedy


@pytest.mark.parametrize(
    ("file", "key", "value", "found"),
    [
        ("transformer/config.json", "axes_dims_rope", [1], "axes_dims_rope = [1]"),
        ("text_encoder/config.json", "hidden_act", "no such", "cannot load it"),
        ("vae/config.json", "_class_name", "AutoencoderDC", "AutoencoderDC"),
        ("vae/config.json", "_class_name", ["AutoencoderKL"], "AutoencoderKL"),
        ("vae/config.json", "act_fn", "no such", "cannot build it"),
        ("scheduler/scheduler_config.json", "prediction_type", [], ""),
        ("model_index.json", "text_encoder_2", [None, None], "no text_encoder_2"),
        ("model_index.json", "transformer", ["diffusers", "SD3Transformer2DModel"], "class 'Flux"),
        ("model_index.json", "quantization_config", BNB, "quantised"),
    ],
)
def test_configurations_that_contradict_what_is_there(copied, file, key, value, found):
    edited(file, **{key: value})(copied / "model")
    fault = refusal(copied)
    assert found in str(fault)
    assert fault.remedy or isinstance(fault, ManyFaults)


def test_an_encoder_of_another_width(copied, tmp_path):
    """Whole and healthy, but of another model: torch would fail in the middle of precompute."""
    model = copied / "model"
    shutil.rmtree(model / "text_encoder")
    encoder = pipelines._clip(pipelines.CLIPTextModel, pipelines.clip_tokenizer(), 8, 8)
    encoder.save_pretrained(model / "text_encoder")
    fault = refusal(copied)
    assert fault.where == str(model / "transformer" / "config.json")
    assert "pooled_projection_dim" in fault.found
    assert "text_encoder" in fault.expected


# ---------------------------------------------------------------- what people really have


@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_every_family_is_healthy(name, tmp_path):
    folder = pipelines.write_pipeline(name, tmp_path / "model")
    assert not model_faults(folder)


@pytest.mark.parametrize("name", ["tiny-sana", "tiny-flux"])
def test_samples_are_healthy(name):
    assert not model_faults(SAMPLES / name)


def halved(dtype: torch.dtype, every: int = 1):
    def change(tensors: Tensors) -> Tensors:
        kept = enumerate(tensors.items())
        return {name: value.to(dtype) if n % every == 0 else value for n, (name, value) in kept}

    return change


HEALTHY: dict[str, Callable[[Path], object]] = {
    "bfloat16": each(*(rewritten(f, halved(torch.bfloat16)) for f in (TRANSFORMER, VAE, T5, CLIP))),
    "float16": each(*(rewritten(f, halved(torch.float16)) for f in (TRANSFORMER, VAE, T5, CLIP))),
    "float64": each(*(rewritten(f, halved(torch.float64)) for f in (TRANSFORMER, VAE, T5, CLIP))),
    "mixed": each(*(rewritten(f, halved(torch.bfloat16, 2)) for f in (TRANSFORMER, VAE, T5, CLIP))),
    "shards": sharded,
    "position_ids of old versions": rewritten(
        CLIP, lambda t: {**t, "text_model.embeddings.position_ids": torch.arange(20)[None]}
    ),
    "an encoder that is cut from a whole CLIP": rewritten(
        CLIP,
        lambda t: {
            **t,
            "logit_scale": torch.ones(()),
            "text_projection.weight": torch.ones(2, 2),
            "vision_model.post_layernorm.weight": torch.ones(2),
        },
    ),
    "an encoder that is cut from a whole T5": rewritten(
        T5,
        lambda t: {**t, "lm_head.weight": torch.ones(2, 2), "decoder.final.weight": torch.ones(2)},
    ),
    "T5 with its embedding twice": rewritten(
        T5, lambda t: {**t, "encoder.embed_tokens.weight": t["shared.weight"].clone()}
    ),
    "attention of the VAE under its old names": rewritten(
        VAE,
        lambda t: {
            name.replace("to_q", "query")
            .replace("to_k", "key")
            .replace("to_v", "value")
            .replace("to_out.0", "proj_attn"): value
            for name, value in t.items()
        },
    ),
    "null quantization_config": edited("transformer/config.json", quantization_config=None),
    "no metadata": lambda m: save_file(load_file(m / VAE), m / VAE),
    "a safety checker that is not loaded": edited(
        "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]
    ),
    "what a stopped download left beside the file": replaced(f"{T5}.incomplete", b"x"),
    "files that are not loaded": each(
        replaced("README.md", b"x"),
        replaced("flux-Q4.gguf", b"GGUF"),
        replaced("transformer/diffusion_pytorch_model.bin", b"x"),
        replaced("vae/diffusion_pytorch_model.fp16.safetensors", b"x"),
        replaced("text_encoder/LICENSE", b""),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_people_really_have_is_not_refused(stock, tmp_path, name):
    folder = shutil.copytree(stock, tmp_path / "model")
    HEALTHY[name](folder)
    assert not model_faults(folder), name
    load_pipeline(folder)
    open_model(folder).checkpoint().model([0])


def test_a_hub_cache_of_links(stock, tmp_path):
    """As huggingface_hub stores a snapshot: every file a link to a blob named by its hash."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in sorted(stock.rglob("*")) if p.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(stock)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert not model_faults(snapshot)
    assert open_model(snapshot).hash == open_model(stock).hash
    load_pipeline(snapshot)


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize("parts", [PARTS, ("transformer",), ("vae", "text_encoder")])
def test_a_variant_is_used_where_a_component_has_it(stock, tmp_path, parts):
    folder = shutil.copytree(stock, tmp_path / "model")
    in_variant("fp16", parts)(folder)
    (folder / "text_encoder" / "LICENSE").write_text("")  # diffusers 0.42 fails at its name
    assert any("[model] variant" in fault.remedy for fault in model_faults(folder))
    assert not model_faults(folder, "fp16")
    model = open_model(folder, "fp16")
    found = model.checkpoint().model([0]).state_dict()["x_embedder.weight"]
    stored = load_file(stock / TRANSFORMER)["x_embedder.weight"]
    halves = "transformer" in parts
    assert torch.equal(found, stored.half().float() if halves else stored)
    loaded = load_pipeline(folder, variant="fp16")
    assert torch.equal(loaded.transformer.state_dict()["x_embedder.weight"], found)


def test_a_variant_in_shards(stock, tmp_path):
    """An index of a variant: its name ends in .index.fp16.json, its shards begin with .fp16-."""
    folder = shutil.copytree(stock, tmp_path / "model")
    for part in ("transformer", "text_encoder_2"):
        component = getattr(load_pipeline(stock), part).half()
        shutil.rmtree(folder / part)
        component.save_pretrained(folder / part, variant="fp16", max_shard_size="20KB")
        assert list((folder / part).glob("*.fp16-00002-of-*.safetensors"))
        assert list((folder / part).glob("*.index.fp16.json"))
    assert [fault.remedy for fault in model_faults(folder)] == ['[model] variant = "fp16"'] * 2
    assert not model_faults(folder, "fp16")
    open_model(folder, "fp16").checkpoint()
    load_pipeline(folder, variant="fp16")


def test_every_stage_takes_the_variant_of_the_job(copied):
    """Its weights are the only ones; the plan names it."""
    in_variant("fp16", PARTS)(copied / "model")
    for caption in (copied / "images").glob("*.txt"):
        caption.unlink()  # they are longer than the small tokenizer's limit
    job = (copied / "job.toml").read_text()
    job = job.replace('path = "model"', 'path = "model"\nvariant = "fp16"')
    (copied / "job.toml").write_text(re.sub("lora_targets.*", "", job))
    plan = make_plan(read_job(copied / "job.toml"))
    assert plan.model_variant == "fp16"
    stored = Plan.model_validate_json(plan.model_dump_json())
    assert model_of(stored).variant == "fp16"
    images = read_folder(copied / "images", "a sks toy", plan.s_max)
    precompute(plan, images, copied / "bank")


def test_a_variant_that_is_not_there(stock, tmp_path):
    folder = shutil.copytree(stock, tmp_path / "model")
    in_variant("bf16", PARTS, keep=True)(folder)
    assert not model_faults(folder)
    assert not model_faults(folder, "bf16")
    (fault,) = model_faults(folder, "fp16")
    assert "'fp16'" in fault.found
    assert fault.expected == "one of bf16"


# ---------------------------------------------------------------- the hash


@pytest.fixture(scope="module")
def written_out(stock, tmp_path_factory) -> Path:
    """The pipeline with weights of a variant, shards, and tokenizer files of older versions."""
    folder = shutil.copytree(stock, tmp_path_factory.mktemp("hash") / "model")
    in_variant("fp16", ("vae", "text_encoder"), keep=True)(folder)
    sharded(folder)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / "tokenizer" / name).write_text("{}")
    (folder / "tokenizer_2" / "spiece.model").write_text("x")
    (folder / "tokenizer_2" / "tokenizer.model").write_text("x")
    return folder


def changes(folder: Path, name: str, variant: str | None = None) -> bool:
    """Whether the hash changes with the content of one file."""
    path, before = folder / name, open_model(folder, variant).hash
    held = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((held or b"{}") + b" ")
    try:
        return open_model(folder, variant).hash != before
    finally:
        path.unlink() if held is None else path.write_bytes(held)


def test_the_hash_is_of_every_file_that_is_loaded(written_out):
    for name in [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/added_tokens.json",
        "tokenizer/special_tokens_map.json",
        "tokenizer_2/spiece.model",
        "tokenizer_2/tokenizer.model",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "transformer/config.json",
        "vae/config.json",
        INDEX,
        SHARD,
        VAE,
        CLIP,
        T5,
    ]:
        assert (written_out / name).exists()
        assert changes(written_out, name), name


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "flux1-dev.safetensors",
        "tokenizer/README.md",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/model.onnx",
        "transformer/.cache/x.json",
        "transformer/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/README.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/flax_model.msgpack",
        "text_encoder_onnx/config.json",
        "text_encoder_3/config.json",
        "safety_checker/model.safetensors",
        "selection.json",
    ],
)
def test_the_hash_is_of_nothing_else(written_out, name):
    assert not changes(written_out, name)


def test_the_hash_of_a_variant_is_of_its_files(written_out):
    fp16 = "vae/diffusion_pytorch_model.fp16.safetensors"
    assert changes(written_out, fp16, "fp16")
    assert not changes(written_out, VAE, "fp16")
    assert changes(written_out, T5, "fp16")  # there is no other


def test_the_hash_is_of_bin_weights_where_there_are_no_others(stock, tmp_path):
    folder = shutil.copytree(stock, tmp_path / "model")
    as_bin(T5, "pytorch_model.bin")(folder)
    assert changes(folder, "text_encoder_2/pytorch_model.bin")


# ---------------------------------------------------------------- loading


class Panic(BaseException):
    """As the tokenizers' Rust code raises it: no Exception."""


@pytest.mark.parametrize("error", [ZeroDivisionError, struct.error, AttributeError, Panic])
def test_whatever_a_library_raises_names_the_component(stock, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error("from within")

    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", fail)
    with pytest.raises(BadInput, match="from within") as caught:
        load_pipeline(stock)
    assert caught.value.where == str(stock / "text_encoder_2")
    assert error.__name__ in caught.value.found


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_not_the_files_fault_passes(stock, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", fail)
    with pytest.raises(error):
        load_pipeline(stock)


def test_a_pickle_is_never_loaded(stock, tmp_path):
    folder = shutil.copytree(stock, tmp_path / "model")
    as_bin(VAE, "diffusion_pytorch_model.bin")(folder)
    with pytest.raises(BadInput, match=r"diffusion_pytorch_model\.bin"):
        load_pipeline(folder)


def test_a_float8_checkpoint_is_refused_without_a_plan_too(stock, tmp_path):
    folder = shutil.copytree(stock, tmp_path / "model")
    FAULTS["fp8 scale_weight"][0](folder)
    with pytest.raises(BadInput, match="scale_weight"):
        open_model(folder).checkpoint()
    with pytest.raises(BadInput, match="scale_weight"):
        load_pipeline(folder)
