"""Signatures of bundles: what a device refuses; and what bundles were made with.

Needs the extra: pip install "edge-dit[sign]".
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_dit.app.signing import sign
from edge_dit.app.verify import verify
from edge_dit.contract.bundle import open_bundle, write_manifest
from edge_dit.contract.certificate import PARITY, read_certificate, write_certificate
from edge_dit.contract.signature import (
    POLICY_VARIABLE,
    SIGNATURE,
    check_policy,
    check_signature,
)
from edge_dit.errors import BadInput
from edge_dit.store.files import sha256
from edge_dit_export.sbom import SBOM, installed_closure

pytest.importorskip("model_signing")
FILES = [
    "manifest.json",
    "adapter.safetensors",
    PARITY,
    SBOM,
    "onnx/train_step.onnx",
    "onnx/frozen.safetensors",
]


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, by the commands that a message recommends."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    make = ["openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", private]
    subprocess.run(make, check=True)
    show = ["openssl", "ec", "-in", private, "-pubout", "-out", public]
    subprocess.run(show, check=True, capture_output=True)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """A folder with the maker's keys and a stranger's."""
    folder = tmp_path_factory.mktemp("keys")
    pair(folder, "maker")
    pair(folder, "stranger")
    return folder


@pytest.fixture(scope="module")
def signed(made: Path, keys: Path, tmp_path_factory) -> Path:
    """A folder with a verified and signed bundle, not to be changed."""
    folder = tmp_path_factory.mktemp("signed") / "bundle"
    shutil.copytree(made / "bundle", folder)
    assert verify(folder, made / "bank", steps=2).passed
    sign(open_bundle(folder), keys / "maker.pem")
    return folder


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "bundle"))


def refusal(bundle: Path, *public: Path) -> str:
    with pytest.raises(BadInput) as caught:
        check_signature(open_bundle(bundle), public)
    return str(caught.value)


def test_a_signed_bundle_is_accepted_wherever_it_lies(copy, keys):
    moved = copy.rename(copy.with_name("elsewhere"))
    check_signature(open_bundle(moved), [keys / "stranger.pub", keys / "maker.pub"])


def test_the_statement_carries_the_certificate_and_no_path(signed):
    import base64

    envelope = json.loads((signed / SIGNATURE).read_text())["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    listed = {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}
    assert listed[PARITY] == sha256(signed / PARITY)
    assert listed["manifest.json"] == sha256(signed / "manifest.json")
    there = {p.relative_to(signed).as_posix() for p in signed.rglob("*") if p.is_file()}
    assert listed.keys() == there - {SIGNATURE}
    assert str(signed.parent) not in json.dumps(statement)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused(copy, keys, name):
    """Also in parity.json and sbom.cdx.json; the manifest keeps its own digest right."""
    path = copy / name
    if name == "manifest.json":
        opened = open_bundle(copy)
        write_manifest(copy, opened.manifest.model_copy(update={"version": 2}))
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    message = refusal(copy, keys / "maker.pub")
    assert message.startswith(f"{copy}: changed since it was signed: {name}\n")
    assert message.count("remedy:") == 1


def test_a_flipped_bit_of_the_signature_is_refused(copy, keys):
    path = copy / SIGNATURE
    envelope = json.loads(path.read_text())
    (entry,) = envelope["dsseEnvelope"]["signatures"]
    entry["sig"] = entry["sig"][:20] + ("A" if entry["sig"][20] != "A" else "B") + entry["sig"][21:]
    path.write_text(json.dumps(envelope))
    assert refusal(copy, keys / "maker.pub").startswith(f"{path}: damaged, or made with another")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"dsseEnvelope": 3}', "\0"])
def test_a_file_that_is_no_signature_is_refused(copy, keys, text):
    (copy / SIGNATURE).write_text(text)
    assert "damaged, or made with another key" in refusal(copy, keys / "maker.pub")


def test_a_stripped_signature_is_refused(copy, keys):
    (copy / SIGNATURE).unlink()
    assert refusal(copy, keys / "maker.pub").startswith(f"{copy}: not signed")


def test_another_key_is_refused(copy, keys):
    message = refusal(copy, keys / "stranger.pub")
    assert message.startswith(f"{copy / SIGNATURE}: damaged, or made with another key")


@pytest.mark.parametrize("name", ["onnx/more.onnx", "onnx/.hidden", ".gitignore"])
def test_an_added_file_is_refused(copy, keys, name):
    (copy / name).write_text("x")
    assert f"changed since it was signed: {name}\n" in refusal(copy, keys / "maker.pub")


def test_a_missing_file_is_refused(copy, keys):
    (copy / PARITY).unlink()
    assert f"changed since it was signed: {PARITY}\n" in refusal(copy, keys / "maker.pub")


@pytest.mark.parametrize("content", ["", "no key", None])
def test_what_is_no_key_is_refused(copy, tmp_path, content):
    if content is not None:
        (tmp_path / "key").write_text(content)
    assert "no public key" in refusal(copy, tmp_path / "key")
    with pytest.raises(BadInput, match="no private key"):
        sign(open_bundle(copy), tmp_path / "key")
    assert (copy / SIGNATURE).is_file(), "a signature stays until there is a new one"


def test_only_what_passed_verify_is_signed(copy, keys):
    (copy / PARITY).unlink()
    with pytest.raises(BadInput, match="no parity certificate"):
        sign(open_bundle(copy), keys / "maker.pem")


def test_verify_leaves_the_certificate_of_a_signed_bundle(copy, made, keys, capsys):
    (copy / "onnx" / "note").write_text("x")
    assert not verify(copy, made / "bank", steps=1).passed
    assert "is signed: the certificate in it stays" in capsys.readouterr().err
    (copy / "onnx" / "note").unlink()
    check_signature(open_bundle(copy), [keys / "maker.pub"])


# ---------------------------------------------------------------- policies


def policy(folder: Path, **content) -> Path:
    path = folder / "policy.json"
    path.write_text(json.dumps(content))
    return path


def versioned(bundle: Path, version: int, key: Path) -> Path:
    """The bundle as its maker signs another version of it."""
    opened = open_bundle(bundle)
    certificate = read_certificate(opened)
    assert certificate is not None
    newer = write_manifest(bundle, opened.manifest.model_copy(update={"version": version}))
    digest = newer.manifest_sha256
    write_certificate(
        newer, certificate.__class__(**{**vars(certificate), "manifest_sha256": digest})
    )
    sign(newer, key)
    return bundle


def test_an_older_version_is_refused(copy, keys):
    file = policy(keys, keys=["maker.pub"], minimum_version=2)
    with pytest.raises(BadInput) as caught:
        check_policy(open_bundle(copy), file)
    expected = f"{copy}: version 1\n  expected: 2 or newer, as {file} says"
    assert str(caught.value).startswith(expected)
    check_policy(open_bundle(versioned(copy, 2, keys / "maker.pem")), file)


def test_a_device_goes_back_to_no_version_that_it_left(copy, signed, keys):
    file = policy(keys, keys=["maker.pub"], keep_newest=True)
    check_policy(open_bundle(signed), file)
    check_policy(open_bundle(versioned(copy, 7, keys / "maker.pem")), file)
    assert json.loads(file.read_text())["minimum_version"] == 7
    with pytest.raises(BadInput, match="7 or newer"):
        check_policy(open_bundle(signed), file)


@pytest.mark.parametrize("content", [{}, {"keys": []}, {"keys": ["a"], "other": 1}])
def test_a_policy_that_is_none_is_refused(copy, tmp_path, content):
    with pytest.raises(BadInput, match=r"policy\.json"):
        check_policy(open_bundle(copy), policy(tmp_path, **content))


@pytest.mark.parametrize("way", ["flag", "policy", "variable"])
def test_train_refuses_an_unsigned_bundle(bundle, bank, keys, tmp_path, run, monkeypatch, way):
    file = policy(keys, keys=["maker.pub"])
    flags = {"flag": ["--require-signature", keys / "maker.pub"], "policy": ["--policy", file]}
    if way == "variable":
        monkeypatch.setenv(POLICY_VARIABLE, str(file))
    folder = tmp_path / "run"
    code, _, err = run("train", bundle, "--bank", bank, "-o", folder, *flags.get(way, []))
    assert code == 2
    assert "not signed: no model.sig" in err
    assert not folder.exists()


def test_train_takes_a_signed_bundle(signed, bank, keys, tmp_path, run):
    trusted = ["--require-signature", keys / "maker.pub"]
    folder = tmp_path / "run"
    code, _, err = run("train", signed, "--bank", bank, "-o", folder, "--steps", 1, *trusted)
    assert code == 0, err


def test_the_command_line_signs_and_checks(copy, keys, run):
    (copy / SIGNATURE).unlink()
    code, _, err = run("sign", copy, "--key", keys / "maker.pem")
    assert code == 0, err
    code, out, _ = run("verify", copy, "--key", keys / "maker.pub", "--json")
    assert code == 0
    assert json.loads(out)["parity_sha256"] == sha256(copy / PARITY)
    code, _, err = run("verify", copy, "--key", keys / "stranger.pub")
    assert code == 2
    assert "another key" in err
    code, _, err = run("verify", copy)
    assert "neither --bank nor --key" in err


# ---------------------------------------------------------------- what a bundle was made with


def test_the_bill_of_materials_is_valid_and_has_packages_and_model(signed, plan):
    from cyclonedx.model.bom import Bom

    raw = json.loads((signed / SBOM).read_text())
    Bom.from_json(raw)  # type: ignore[attr-defined]
    components = {component["name"]: component for component in raw["components"]}
    assert components["torch"]["version"] == plan_tools(signed)["torch"]
    assert components["onnx"]["purl"] == f"pkg:pypi/onnx@{plan_tools(signed)['onnx']}"
    model = components[plan.model_name]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": plan.model_hash}]


def plan_tools(bundle: Path) -> dict[str, str]:
    return open_bundle(bundle).manifest.tools


def test_the_bill_of_materials_is_the_same_each_time(plan, tmp_path):
    from edge_dit_export.sbom import write_sbom

    for name in ("one", "two"):
        write_sbom(tmp_path / name, plan, ["edge-dit", "onnx"])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_packages_require_is_followed_to_the_end():
    needs = installed_closure(["edge-dit", "onnx"])
    assert "diffusers" in needs["edge-dit"], "what every export needs is in the extra host"
    assert "numpy" in needs["onnx"]
    assert all(name in needs for required in needs.values() for name in required)
    assert "pytest" not in needs
