"""Every format of every family, read by the rule of its readers and by those that are installed:
diffusers' own converters and PEFT. Each module's weight must change by alpha / rank * B A.
"""

import ast
import json
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.numpy import load_file

from edge_dit.app.describe import look
from edge_dit.contract.adapter import (
    PEFT_CONFIG,
    loading_hint,
    read_adapter,
    read_lora,
    read_peft,
    write_adapter,
    write_adapter_folder,
)
from edge_dit.contract.adapter_formats import FORMATS, NAMES, exported, format_of
from edge_dit.errors import BadInput
from edge_dit.models.families import FAMILIES, family_of
from edge_dit.models.pipeline import load_pipeline
from edge_dit.models.subgraph import can_carry_lora
from variants import VARIANTS, transformer

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
RANK, ALPHA = 3, 7.5
"""Their quotient is no power of two: a scale left out, or applied twice, shows in every value."""
EVERYWHERE = [
    (variant, form) for variant, (family, _) in VARIANTS.items() for form in FORMATS[family]
]
IDS = [f"{variant}-{form.name}" for variant, form in EVERYWHERE]


def random_lora(shapes, rank=RANK):
    """LoRA tensors by diffusers name for weights of these shapes, by module."""
    rng = np.random.default_rng(0)
    tensors = {}
    for module, (out, inside, *ones) in shapes.items():
        for part, shape in (("A", (rank, inside, *ones)), ("B", (out, rank, *ones))):
            name = f"transformer.{module}.lora_{part}.weight"
            tensors[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    return tensors


def shapes_of(variant, model=None):
    """Weights of all modules in blocks that can carry LoRA, those of text_output too."""
    model = transformer(variant) if model is None else model
    return {
        f"{block}.{name}": tuple(module.weight.shape)
        for block, inner in family_of(VARIANTS[variant][0]).blocks(model).items()
        for name, module in inner.named_modules()
        if can_carry_lora(module)
    }


def product(a, b):
    return b.reshape(len(b), -1).astype(np.float64) @ a.reshape(len(a), -1).astype(np.float64)


def changes(tensors, scale, parts=("lora_A", "lora_B"), prefix="transformer."):
    """Module -> scale(module, rank) * B A."""
    found = {}
    for name, a in tensors.items():
        module, _, part = name.rpartition(f".{parts[0]}.")
        if part == "weight":
            delta = product(a, tensors[f"{module}.{parts[1]}.weight"])
            found[module.removeprefix(prefix)] = scale(module, len(a)) * delta
    return found


def trained(tensors, rank=RANK, alpha=ALPHA):
    return changes(tensors, lambda *_: alpha / rank)


def same(found, expected):
    """Within the rounding of float32."""
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        largest = np.abs(delta).max()
        assert largest > 0, module
        np.testing.assert_allclose(
            np.asarray(found[module]).reshape(delta.shape), delta, atol=2e-6 * largest, rtol=0
        )


def by_alpha_tensor(file, **names):
    """The rule of ComfyUI (weight_adapter/lora.py) and kohya: alpha / rank, 1 without .alpha."""

    def scale(module, rank):
        alpha = file.get(f"{module}.alpha")
        return 1.0 if alpha is None else alpha.item() / rank

    return changes(file, scale, **names)


def written(folder, variant_or_shapes, form, alpha=ALPHA):
    """Tensors as trained, and the file of one format."""
    shapes = variant_or_shapes
    tensors = random_lora(shapes if isinstance(shapes, dict) else shapes_of(shapes))
    write_adapter_folder(folder, tensors, RANK, alpha, "model", form)
    return tensors, load_file(folder / form.file)


def test_every_family_has_formats_and_its_pipelines_own_first():
    assert FORMATS.keys() == FAMILIES.keys()
    for family, pipelines in FAMILIES.items():
        stock = all(hasattr(getattr(diffusers, p), "load_lora_weights") for p in pipelines)
        assert FORMATS[family][0].name == ("diffusers" if stock else "peft")
        assert any(form.name == "diffusers" for form in FORMATS[family]) == stock


# ---------------------------------------------------------------- by rule


@pytest.mark.parametrize(("variant", "form"), EVERYWHERE, ids=IDS)
def test_every_module_changes_as_trained(variant, form, tmp_path):
    tensors, file = written(tmp_path / "lora", variant, form)
    expected = trained(tensors)
    if form.blocks is not None:
        found = by_alpha_tensor(file, parts=form.parts, prefix=form.prefix)
        assert sum((d**2).sum() for d in found.values()) == pytest.approx(
            sum((d**2).sum() for d in expected.values())
        )  # which module each is: by diffusers' converters, below
        return
    found = by_alpha_tensor(file, parts=form.parts, prefix=form.prefix)
    same(found, {name.replace(".", form.dot): delta for name, delta in expected.items()})
    alphas = [name for name in file if name.endswith(".alpha")]
    assert len(alphas) == (len(expected) if form.name in ("comfyui", "kohya") else 0)
    assert all(file[name].shape == () and file[name].dtype == np.float32 for name in alphas)


@pytest.mark.parametrize("variant", [v for v, (f, _) in VARIANTS.items() if f != "pixart"])
def test_the_default_file_by_three_rules(variant, tmp_path):
    """A reader of the header, one of .alpha tensors, and one of neither."""
    form = FORMATS[VARIANTS[variant][0]][0]
    tensors, file = written(tmp_path / "lora", variant, form)
    expected = trained(tensors)
    with safe_open(tmp_path / "lora" / form.file, "np") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    same(changes(file, lambda _, rank: config["transformer.lora_alpha"] / rank), expected)
    same(by_alpha_tensor(file), expected)
    same(changes(file, lambda *_: 1.0), expected)
    assert config["transformer.r"] == RANK


@given(rank=st.integers(1, 64), alpha=st.floats(1e-3, 1e4))
@settings(max_examples=50, deadline=None)
def test_any_rank_and_alpha(rank, alpha):
    tensors = random_lora({"transformer_blocks.0.attn.to_q": (6, 5)}, rank)
    (expected,) = trained(tensors, rank, alpha).values()
    for form in {form.name: form for form in FORMATS["qwen_image"]}.values():
        file = exported(form, tensors, rank, alpha)
        (found,) = by_alpha_tensor(file, parts=form.parts).values()
        same({"to_q": found}, {"to_q": expected})


def test_alpha_that_is_the_rank_changes_no_bit(tmp_path):
    tensors, file = written(tmp_path / "lora", "sana", FORMATS["sana"][0], alpha=float(RANK))
    assert all(file[name].tobytes() == value.tobytes() for name, value in tensors.items())


# ---------------------------------------------------------------- by the readers that are installed


def read_by(pipeline_class, folder, form):
    """Module -> change of weight, as the pipeline class itself reads the file."""
    class_, keywords = getattr(diffusers, pipeline_class), {"return_lora_metadata": True}
    if pipeline_class in ("FluxPipeline", "ChromaPipeline"):
        keywords["return_alphas"] = True
    state, *alphas, metadata = class_.lora_state_dict(folder, weight_name=form.file, **keywords)
    alphas = alphas[0] if alphas else None
    rank = next(len(v) for k, v in state.items() if "lora_A" in k)
    state = {k: v.float().numpy() for k, v in state.items()}

    def scale(module, own_rank):
        if metadata:
            return metadata["transformer.lora_alpha"] / rank
        return (alphas or {}).get(f"{module}.alpha", torch.tensor(own_rank)).item() / own_rank

    return changes(state, scale)


@pytest.mark.parametrize(
    ("pipeline_class", "variant", "name"),
    [
        ("FluxPipeline", "flux-dev", "comfyui"),
        ("QwenImagePipeline", "qwen-image", "comfyui"),
        ("QwenImagePipeline", "qwen-image", "kohya"),
        ("Flux2KleinPipeline", "flux2-klein", "comfyui"),
        ("Flux2KleinPipeline", "flux2-klein", "diffusers"),
        ("ChromaPipeline", "chroma", "comfyui"),
        ("StableDiffusion3Pipeline", "sd3.5-medium", "diffusers"),
        ("SanaPipeline", "sana", "diffusers"),
    ],
)
def test_diffusers_reads_it(pipeline_class, variant, name, tmp_path):
    form = format_of(VARIANTS[variant][0], name)
    tensors, _ = written(tmp_path / "lora", variant, form)
    same(read_by(pipeline_class, tmp_path / "lora", form), trained(tensors))


WIDTH = 3072
"""FLUX's, which diffusers' converter takes for granted."""
SINGLE = {
    "attn.to_q": (WIDTH, WIDTH),
    "attn.to_k": (WIDTH, WIDTH),
    "attn.to_v": (WIDTH, WIDTH),
    "proj_mlp": (4 * WIDTH, WIDTH),
    "proj_out": (WIDTH, 5 * WIDTH),
    "norm.linear": (3 * WIDTH, WIDTH),
}


@pytest.mark.parametrize(
    "modules",
    [
        list(SINGLE),
        ["attn.to_q", "attn.to_k", "attn.to_v"],
        ["attn.to_k"],
        ["proj_mlp"],
        ["attn.to_v", "proj_mlp"],
    ],
    ids="+".join,
)
def test_diffusers_reads_kohyas_single_blocks(modules, tmp_path):
    form = format_of("flux", "kohya")
    shapes = {f"single_transformer_blocks.37.{name}": SINGLE[name] for name in modules}
    rows = slice(None, None, 97)  # of 12288 x 3072: enough, and quick
    tensors, _ = written(tmp_path / "lora", shapes, form)
    found, expected = read_by("FluxPipeline", tmp_path / "lora", form), trained(tensors)
    same({m: found[m][rows] for m in expected}, {m: d[rows] for m, d in expected.items()})
    assert all(not found[m].any() for m in found.keys() - expected.keys())


def test_diffusers_reads_kohyas_double_blocks(tmp_path):
    form = format_of("flux", "kohya")
    shapes = {k: s for k, s in shapes_of("flux-dev").items() if k.startswith("transformer_blocks")}
    tensors, file = written(tmp_path / "lora", shapes, form)
    same(read_by("FluxPipeline", tmp_path / "lora", form), trained(tensors))
    assert len(file["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]) == 3 * RANK
    assert file["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 3 * RANK


class Published(dict):
    """A published checkpoint whose weights are a kohya file's changes; others are zero."""

    def __init__(self, layers, dual, changed):
        width = {"context_embedder.weight": torch.zeros(32, 1)}
        names = {f"joint_blocks.{n}.x_block.attn2." for n in dual} | {f"joint_blocks.{layers - 1}."}
        super().__init__({**width, **dict.fromkeys(names)})
        self.changed = changed

    def pop(self, key):
        """The change of a weight, by kohya's name for it (lora_sd3.py, create_modules)."""
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        return self.changed.pop(name, torch.zeros(6, 1)) if key.endswith(".weight") else zeros()


def zeros():
    return torch.zeros(6)


@pytest.mark.parametrize("variant", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
@pytest.mark.parametrize("without", [(), ("attn.add_q_proj", "attn.to_k")], ids=["all", "some"])
def test_kohyas_names_are_those_of_the_published_sd3(variant, without, tmp_path):
    """Read back through diffusers' converter of published checkpoints, the last block too, whose
    norm has scale and shift the other way round.
    """
    form = format_of("sd3", "kohya")
    shapes = {k: s for k, s in shapes_of(variant).items() if not k.endswith(without or "-")}
    tensors, file = written(tmp_path / "lora", shapes, form)
    found = by_alpha_tensor(file, parts=form.parts, prefix="")
    published = Published(
        4,
        VARIANTS[variant][1].get("dual_attention_layers", ()),
        {name: torch.from_numpy(delta) for name, delta in found.items()},
    )
    read = convert_sd3_transformer_checkpoint_to_diffusers(published)
    assert not published.changed  # every name of ours is one of the model's
    expected = trained(tensors)
    assert "transformer_blocks.3.norm1_context.linear" in expected
    same({name: read[f"{name}.weight"].numpy() for name in expected}, expected)


def deltas(model):
    """Module -> what PEFT adds to its weight."""
    return {
        name: layer.get_delta_weight(layer.active_adapters[0]).detach().numpy()
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


@pytest.mark.parametrize(
    "variant", ["sana", "flux-dev", "sd3.5-medium", "pixart-sigma", "qwen-image"]
)
def test_peft_loads_it(variant, tmp_path):
    model = transformer(variant)
    tensors = random_lora(shapes_of(variant, model))
    for form in FORMATS[VARIANTS[variant][0]]:
        if form.name in ("diffusers", "peft"):
            folder = tmp_path / form.name
            write_adapter_folder(folder, tensors, RANK, ALPHA, "model", form)
            peft = folder / "peft" if form.name == "diffusers" else folder
            loaded = PeftModel.from_pretrained(transformer(variant), peft).get_base_model()
            expected = trained(tensors)
            same(flat(deltas(loaded)), expected)


def flat(found):
    return {name: delta.reshape(len(delta), -1) for name, delta in found.items()}


@pytest.mark.parametrize("name", ["diffusers", "comfyui"])
def test_the_stock_flux_pipeline_loads_it(name, tmp_path):
    pipeline = load_pipeline(SAMPLES / "tiny-flux")
    form = format_of("flux", name)
    tensors = random_lora(shapes_of("flux-dev", pipeline.transformer))
    write_adapter_folder(tmp_path / "lora", tensors, RANK, ALPHA, "model", form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=form.file)
    same(flat(deltas(pipeline.transformer)), trained(tensors))


def test_the_stock_sana_pipeline_loads_it_by_the_printed_line(tmp_path):
    pipeline = load_pipeline(SAMPLES / "tiny-sana")
    tensors = random_lora(shapes_of("sana", pipeline.transformer))
    folder = tmp_path / "a 'toy' \\ \"köpfchen\"\n{}"
    write_adapter_folder(folder, tensors, RANK, ALPHA, "model")
    exec(loading_hint(folder, format_of("sana")), {"pipe": pipeline})
    same(flat(deltas(pipeline.transformer)), trained(tensors))


# ---------------------------------------------------------------- what stays as it was


def test_our_own_files_stay_as_trained(tmp_path):
    tensors = random_lora({"transformer_blocks.0.attn.to_q": (6, 5)})
    write_adapter(tmp_path / "adapter.safetensors", tensors, RANK, ALPHA)
    found, rank, alpha = read_adapter(tmp_path / "adapter.safetensors")
    assert (rank, alpha) == (RANK, ALPHA)
    assert all(found[name].tobytes() == value.tobytes() for name, value in tensors.items())
    described = read_lora(tmp_path / "adapter.safetensors")
    assert (described.rank, described.alpha, described.format) == (RANK, ALPHA, "")


@pytest.mark.parametrize(
    ("family", "form"), [(f, form) for f, fs in FORMATS.items() for form in fs]
)
def test_inspect_says_what_it_was_trained_with(family, form, tmp_path):
    attention = "attn1" if family in ("sana", "pixart") else "attn"
    written(tmp_path / "lora", {f"transformer_blocks.0.{attention}.to_q": (6, 6)}, form)
    for path in (tmp_path / "lora", tmp_path / "lora" / form.file):
        facts, lines = look(path)
        assert (facts["rank"], facts["alpha"], facts["format"]) == (RANK, ALPHA, form.name)
        assert lines[1].endswith(f"format {form.name}; its B holds alpha / rank, 2.5")


def test_a_peft_folder_whose_files_disagree(tmp_path):
    written(tmp_path, {"transformer_blocks.0.attn1.to_q": (6, 6)}, format_of("pixart"))
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({**config, "lora_alpha": ALPHA}))
    with pytest.raises(BadInput, match=r"adapter_config.json says rank 3, alpha 7\.5"):
        read_peft(tmp_path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["kohya", "comfyui"])
def test_a_family_that_a_tool_does_not_know(name):
    with pytest.raises(BadInput, match=r"(?s)family sana.*expected: one of diffusers, peft$"):
        format_of("sana", name)


@pytest.mark.parametrize(
    ("family", "name", "found"),
    [
        ("pixart", "diffusers", r"family pixart.*one of peft, comfyui$"),
        ("pixart", "kohya", r"family pixart.*one of peft, comfyui$"),
        ("flux", "a1111", r"no format 'a1111'.*one of diffusers, peft, comfyui, kohya$"),
        ("flux", "", r"no format ''.*one of diffusers"),
        ("flux", "Kohya", r"no format 'Kohya'"),
    ],
)
def test_a_format_that_is_none(family, name, found):
    with pytest.raises(BadInput, match=f"(?s)^--format: .*{found}"):
        format_of(family, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_alpha_beyond_float32(name, tmp_path):
    tensors = random_lora({"transformer_blocks.0.attn.to_q": (6, 6)})
    for alpha in (1e40, float("inf"), float("nan")):
        with pytest.raises(BadInput, match=r"alpha / rank \* B is not finite"):
            write_adapter_folder(
                tmp_path / "lora", tensors, RANK, alpha, "", format_of("flux", name)
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alpha", [0.0, -4.0, 1e-30, 1e30])
def test_an_unusual_alpha(alpha, tmp_path):
    """An alpha of 0 must not get into a file: kohya's programs take it for the rank."""
    tensors = random_lora({"transformer_blocks.0.attn.to_q": (6, 6)})
    for form in FORMATS["qwen_image"]:
        file = exported(form, tensors, RANK, alpha)
        (found,) = by_alpha_tensor(file, parts=form.parts).values()
        (expected,) = trained(tensors, alpha=alpha).values()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("module", ["transformer_blocks.0.attn.to_gate", "proj_out", "controlnet"])
def test_a_module_without_a_name(module, tmp_path):
    tensors = random_lora({module: (6, 6), "transformer_blocks.0.attn.to_q": (6, 6)})
    for family in ("flux", "sd3"):
        with pytest.raises(BadInput, match=f"LoRA on {module}, for which this format has no name"):
            write_adapter_folder(
                tmp_path / "lora", tensors, RANK, ALPHA, "", format_of(family, "kohya")
            )
    assert not list(tmp_path.iterdir())


def test_lora_that_is_not_whole():
    tensors = random_lora({"transformer_blocks.0.attn.to_q": (6, 6)})
    name = next(iter(tensors))
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        {**tensors, name: tensors[name][:2]},
    ):
        with pytest.raises(
            BadInput, match=r"to_q: lora_A of shape .*\n  expected: both, of rank 3"
        ):
            exported(format_of("flux"), wrong, RANK, ALPHA)


def test_one_format_does_not_replace_another(tmp_path):
    folder, shapes = tmp_path / "lora", {"transformer_blocks.0.attn.to_q": (6, 6)}
    for form in FORMATS["flux"]:
        written(folder / form.name, shapes, form)
        written(folder / form.name, shapes, form)  # its own kind does
        for other in FORMATS["flux"]:
            if other != form:
                with pytest.raises(BadInput, match="already there"):
                    written(folder / form.name, shapes, other)
    (tmp_path / "file").write_text("dear")
    with pytest.raises(BadInput, match="already there"):
        written(tmp_path / "file", shapes, FORMATS["flux"][0])
    assert (tmp_path / "file").read_text() == "dear"


# ---------------------------------------------------------------- hints


@pytest.mark.parametrize(
    "name",
    ["lora", "it's", 'a "b"', "back\\slash", "new\nline", "köpfchen", "{folder}", "%s", "\t"],
)
def test_a_hint_is_valid_python_for_any_path(name, tmp_path):
    folder = tmp_path / name
    for form in (format_of("flux"), format_of("pixart")):
        tree = ast.parse(loading_hint(folder, form))
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert constants == [str(folder)]
        assert "\n" not in loading_hint(folder, form)


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart", "qwen_image"])
def test_a_hint_for_an_app_says_which_file_goes_where(family, tmp_path):
    for form in FORMATS[family]:
        if form.alpha:
            hint = loading_hint(tmp_path / "lo'ra", form)
            assert repr(str(tmp_path / "lo'ra" / form.file)) in hint
            assert ("ComfyUI/models/loras" in hint) == (form.name == "comfyui")
            assert ("kohya-ss/" in hint) == (form.name == "kohya")
