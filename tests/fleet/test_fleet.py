"""Fleets by Flower. Needs the extra, which asks for older packages than others here: .ci/run has an
environment for it.

    pip install "edge-dit[onnx,ort,flower,test]"
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bundles
from edge_dit.contract.bundle import open_bundle
from edge_dit.errors import BadInput
from edge_dit.store.tensors import TensorFile
from edge_dit_runtime.fleet.averaging import FIXED, PRODUCT, A, B, received, sent
from edge_dit_runtime.fleet.client import Order, Place, configured, learn

SIMULATED = Path(__file__).with_name("simulated.py")


def place(road) -> Place:
    return Place(road.bundle, bank=road.bank, target="onnx")


@pytest.mark.parametrize("how", [FIXED, PRODUCT])
def test_a_device_learns_and_sends_what_is_averaged(road, how):
    base = open_bundle(road.bundle).adapter()
    learned = learn(place(road), sent(base, how), Order(1, 4, 3, how))
    assert learned.arrays.keys() == sent(base, how).keys()
    assert any(value.any() for value in learned.arrays.values()), "B was zero"
    assert np.isfinite(learned.loss)
    again = learn(place(road), sent(base, how), Order(1, 4, 3, how))
    for name, value in learned.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], value)


@pytest.mark.parametrize("keys", [{"accumulate": 2}, {"ema": 0.9}])
def test_a_plan_that_smooths_is_refused(road, tmp_path, keys):
    bundle = bundles.with_plan(road.bundle, tmp_path / "bundle", **keys)
    with pytest.raises(BadInput, match="accumulate or ema"):
        learn(Place(bundle, bank=road.bank, target="onnx"), {}, Order(1, 4, 3, FIXED))


def test_the_learning_rate_takes_its_course_over_all_rounds(road, tmp_path):
    """The same draws, in the last round and in one of the first."""

    def change(bundle, rounds):
        base = open_bundle(bundle).adapter()
        at = Place(bundle, bank=road.bank, target="onnx")
        arrays = learn(at, sent(base, FIXED), Order(2, rounds, 3, FIXED)).arrays
        return sum(float(np.abs(value - base[name]).sum()) for name, value in arrays.items())

    even, falling = (
        bundles.with_plan(road.bundle, tmp_path / name, schedule=name)
        for name in ("constant", "linear")
    )
    assert change(even, 2) == change(even, 200)
    assert change(falling, 2) < 0.7 * change(falling, 200)


def test_with_a_fixed_a_device_trains_b_alone(road):
    """What B learned with the A of the bundle is all that a device learned."""
    base = open_bundle(road.bundle).adapter()
    learned = learn(place(road), sent(base, FIXED), Order(1, 4, 2, FIXED))
    assert all(name.endswith(B) for name in learned.arrays)
    back = received(learned.arrays, base, FIXED)
    for name, value in base.items():
        if name.endswith(A):
            np.testing.assert_array_equal(back[name], value)


def test_a_device_needs_a_bundle_and_either_pictures_or_a_bank(road):
    with pytest.raises(BadInput, match="neither images nor bank"):
        Place(road.bundle).draws()
    with pytest.raises(BadInput, match="images and bank"):
        Place(road.bundle, Path("images"), road.bank).draws()
    with pytest.raises(BadInput, match="expected: bundle"):
        configured({"images": "photos"})
    assert configured({"bundle": "b", "bank": "d"}) == Place(Path("b"), bank=Path("d"))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "noise"), [(FIXED, 0), (PRODUCT, 0), (FIXED, 1)])
def test_eight_devices_learn_together_in_the_simulation_engine(road, tmp_path, how, noise):
    pytest.importorskip("flwr")
    asked = [road.bundle, road.bank, tmp_path, how, 4, 3, noise]
    command = [sys.executable, SIMULATED, *asked]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "outcome.json").read_text())
    assert len(told["losses"]) == 4
    assert told["seen"] == [0, 1, 2, 3, 4]
    adapter = TensorFile(tmp_path / "adapter.safetensors").read()
    if noise:
        # RDP of 4 Gaussian releases with multiplier 1, as dp-accounting says for delta 1e-3.
        assert 4 < told["epsilon"] < 12
        return
    assert told["epsilon"] is None
    # All devices have one bank, so each learns what this one does. Its mean is rounded as Flower's:
    # where a gradient is next to nothing, Adam's first steps take the sign of what was rounded.
    base = open_bundle(road.bundle).adapter()
    mean = sent(base, how)
    for number in range(1, 5):
        parts = [learn(place(road), mean, Order(number, 4, 3, how)).arrays] * 8
        mean = {name: sum(part[name] * np.float32(1 / 8) for part in parts) for name in mean}
    found, wanted = sent(adapter, PRODUCT), sent(received(mean, base, how), PRODUCT)
    assert found.keys() == wanted.keys()
    for name, product in wanted.items():
        np.testing.assert_allclose(found[name], product, atol=1e-5 * abs(product).max())


# ---------------------------------------------------------------- processes

APP = """
[project]
name = "fleet"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "edge-dit"

[tool.flwr.app.components]
serverapp = "fleet_server:app"
clientapp = "fleet_client:app"
"""
CLIENT = """
from edge_dit_runtime.fleet.client import client_app

app = client_app()
"""
SERVER = """
from pathlib import Path

from edge_dit_runtime.fleet.server import Rounds, server_app

app = server_app(Path({bundle!r}), Rounds(devices=2, rounds=2, steps=2), Path({out!r}))
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.slow
def test_a_server_and_two_devices_are_processes_of_their_own(road, tmp_path):
    pytest.importorskip("flwr")
    port, *nodes = free_ports(3)
    app, home, out = tmp_path / "app", tmp_path / "home", tmp_path / "lora"
    for folder in (app, home):
        folder.mkdir()
    (app / "pyproject.toml").write_text(APP)
    (app / "fleet_client.py").write_text(CLIENT)
    (app / "fleet_server.py").write_text(SERVER.format(bundle=str(road.bundle), out=str(out)))
    link = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
    (home / "config.toml").write_text(link + "insecure = true\n")
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    config = f'bundle="{road.bundle}" bank="{road.bank}" target="onnx"'
    server = ["flower-superlink", "--insecure", "--port", port]
    device = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
    device += ["--node-config", config, "--port"]
    commands = [server, *([*device, node] for node in nodes)]
    log, told = (tmp_path / "log").open("w"), (tmp_path / "told").open("w")
    running = [
        subprocess.Popen(
            [str(tools / command[0]), *map(str, command[1:])],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )
        for command in commands
    ]  # fmt: skip
    asked = False
    try:
        until = time.monotonic() + 600
        while not (out / "pytorch_lora_weights.safetensors").is_file():
            assert time.monotonic() < until, (tmp_path / "log").read_text()[-4000:]
            assert all(process.poll() is None for process in running), (
                tmp_path / "log"
            ).read_text()
            if not asked:  # until the server listens
                command = [str(tools / "flwr"), "run", str(app), "here"]
                asked = not subprocess.call(command, env=environment, stdout=told, stderr=told)
            time.sleep(1)
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        told.close()
    tensors = TensorFile(out / "pytorch_lora_weights.safetensors").read()
    assert any(value.any() for name, value in tensors.items() if name.endswith(B))
