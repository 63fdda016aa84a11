"""Bad input ends with one line about its field, before weights are loaded or a service is sought.

The last part, weights that hold NaN, can only be seen once they are loaded.
"""

import http.server
import json
import pathlib
import re
import shutil
import socket
import struct
import threading
from concurrent import futures

import grpc
import ml_collections
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_service import Script, scripted

from sage_grpo_jax.config import builder, schema
from sage_grpo_jax.parallel import mesh as mesh_lib
from sage_grpo_jax.training import input_checks

PROMPT_FILES = {
    "empty.txt": (b"", "no prompts"),
    "blank line.txt": (b"a red disk\n\na blue disk\n", "line 2: the prompt is empty"),
    "control.txt": (b"a red disk\na \x07 disk\n", r"line 2: .* control character '\\x07'"),
    "latin.txt": (b"a red disk\nune \xe9toile\n", "line 2: byte 0xe9 is not UTF-8"),
    "deep.jsonl": (b'{"prompt": "a"}\n' + b"[" * 100_000, "line 2: bad JSON: .*recursion"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "line 2: bad JSON"),
    "list.jsonl": (b"[1]\n", "line 1: list; each line must be a JSON object"),
    "twice.jsonl": (
        b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n',
        "line 2: id 'x' was used in line 1",
    ),
    "number.jsonl": (b'{"prompt": 3}\n', "line 1: prompt is 3; it must be a string"),
    "no prompt.csv": (b"text\nhello\n", "line 1: columns"),
    "comma.csv": (b"prompt\na red, big disk\n", "line 2: more fields"),
    "prompts.doc": (b"a red disk\n", "file type '.doc'; allowed: .txt, .csv, .jsonl"),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files(refused, tmp_path, name):
    data, expected = PROMPT_FILES[name]
    (tmp_path / name).write_bytes(data)
    message = refused({"data.train_prompts": str(tmp_path / name)})
    assert message.startswith("config.data.train_prompts: ")
    assert str(tmp_path / name) in message
    assert re.search(expected, message), message


def test_prompts_that_are_not_there(refused, tmp_path):
    assert "no file is named; allowed: a .txt" in refused({"data.train_prompts": ""})
    assert "nowhere.txt" in refused({"data.eval_prompts": str(tmp_path / "nowhere.txt")})
    assert "allowed: a prompts file" in refused({"data.train_prompts": "moving_shapes:tests"})
    assert "nowhere.txt" in refused({"data.test_prompts": str(tmp_path / "nowhere.txt")})
    assert "at most the" in refused({"eval.num_prompts": 10**6})


def _read_safetensors(path: pathlib.Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write_safetensors(path: pathlib.Path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _missing(path):
    header, body = _read_safetensors(path)
    gone = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    start = header.pop(gone)["data_offsets"][0]
    _write_safetensors(path, header, body[:start])
    return gone


def _extra(path):
    header, body = _read_safetensors(path)
    span = [len(body), len(body) + 8]
    header["extra.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": span}
    _write_safetensors(path, header, body + bytes(8))
    return "extra.weight"


def _misshapen(path):
    header, body = _read_safetensors(path)
    name = next(n for n in header if n != "__metadata__" and len(header[n]["shape"]) > 1)
    header[name]["shape"] = [*header[name]["shape"][::-1], 1]
    _write_safetensors(path, header, body)
    return name


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def _no_header(path):
    path.write_bytes(b"\xff" * 64)
    return path.name


@pytest.fixture
def copied(tiny_networks, tmp_path) -> pathlib.Path:
    """Networks that a test may spoil."""
    shutil.copytree(tiny_networks, tmp_path / "networks")
    return tmp_path / "networks"


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("spoil", [_missing, _extra, _misshapen, _truncated, _no_header])
@pytest.mark.parametrize("field", ["transformer", "vae"])
def test_weights_that_do_not_fit(refused, copied, spoil, field):
    name = spoil(_weights_file(copied / field))
    message = refused({f"model.{field}": str(copied / field)})
    assert message.startswith(f"config.model.{field}: ")
    assert name in message


def test_folders_without_the_right_network(refused, copied, tmp_path):
    assert "got ''" in refused({"model.transformer": ""})
    message = refused({"model.transformer": str(copied / "vae")})
    assert "holds a HunyuanVideo-1.5 VAE; allowed: transformers" in message
    _weights_file(copied / "vae").unlink()
    assert refused({"model.vae": str(copied / "vae")}).startswith("config.model.vae: ")


def test_weights_with_nan_are_named_once_they_are_loaded(runs, copied, tmp_path):
    path = _weights_file(copied / "transformer")
    header, body = _read_safetensors(path)
    name = "proj_out.bias" if "proj_out.bias" in header else next(iter(header))
    start = header[name]["data_offsets"][0]
    spoilt = body[:start] + struct.pack("<f", float("nan")) + body[start + 4 :]
    _write_safetensors(path, header, spoilt)
    with pytest.raises(ValueError, match=rf"^config.model.transformer: .*{name} .*NaN"):
        runs.train(tmp_path / "run", **{"model.transformer": str(copied / "transformer")})
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_parameters_with_nan_are_named_whatever_read_them():
    good, bad = np.ones(3, np.float32), np.array([1.0, np.inf], np.float32)
    input_checks.require_finite({"a": {"b": good}})
    with pytest.raises(ValueError, match=r"^c/d hold NaN or infinity"):
        input_checks.require_finite({"a": good, "c": {"d": bad, "e": good}})
    names = [f"p{i}" for i in range(7)]
    with pytest.raises(ValueError, match=r"^p0, p1, p2, p3, p4 and 2 more hold NaN"):
        input_checks.require_finite(dict.fromkeys(names, bad))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((3, 1, 1), "multiplies to 3, but there are"),
        ((0, 1, 1), "at least 1"),
        ((-1, -1, 1), "at most one of them -1"),
    ],
)
def test_meshes_that_the_devices_do_not_make(make_config, sizes, expected):
    names = ("mesh.data", "mesh.fsdp", "mesh.context")
    config = make_config(dict(zip(names, sizes, strict=True)))
    with pytest.raises(ValueError, match=rf"^config.mesh: .*{expected}"):
        input_checks.make_mesh(config)


def test_a_batch_that_the_mesh_does_not_divide(runs, monkeypatch, tmp_path):
    mesh = mesh_lib.make_mesh(8, 1, 1)
    monkeypatch.setattr(input_checks, "make_mesh", lambda config: mesh)
    with pytest.raises(ValueError, match=r"^config.loss.micro_batch: got 2; allowed: a multiple"):
        runs.train(tmp_path)


@pytest.mark.parametrize(
    "address", ["localhost", "http://h:1", "h:0", "h:65536", "h:x", ":1", "a b:1", "::1:1", "h:1/x"]
)
def test_addresses_of_another_form(make_config, address):
    with pytest.raises(ValueError, match=r"^config.rewards.address: got ") as error:
        make_config({"rewards.spawn": False, "rewards.address": address})
    assert repr(address) in str(error.value)


@pytest.mark.parametrize("address", ["localhost:50051", "[::1]:1", "10.0.0.1:65535", "pod-0.ns:80"])
def test_addresses_that_are_allowed(make_config, address):
    make_config({"rewards.spawn": False, "rewards.address": address})


class _Silent(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass


def _wrong_service(kind: str):
    """(address, end) of something that is not a reward service."""
    if kind == "nothing":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{free.getsockname()[1]}", lambda: None
    if kind == "http":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_port}", server.shutdown
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return f"127.0.0.1:{port}", lambda: server.stop(None).wait()


@pytest.mark.parametrize("kind", ["nothing", "http", "another gRPC service"])
def test_addresses_where_no_reward_service_answers(runs, tmp_path, kind):
    address, end = _wrong_service(kind)
    config = runs.config(
        **{
            "rewards.spawn": False,
            "rewards.address": address,
            "rewards.timeout_seconds": 0.5,
            "rewards.budget_seconds": 1.0,
        }
    )
    try:
        with (
            pytest.raises(ValueError, match=r"^config.rewards.address: got ") as error,
            runs.open_scorer(config, tmp_path),
        ):
            pass
    finally:
        end()
    assert address in str(error.value)
    assert "\n" not in str(error.value)
    assert "allowed: HOST:PORT of a running" in str(error.value)


# --- properties of the validation ---

FIELDS = {}


def _collect(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            _collect(value, f"{prefix}{name}.")
        else:
            FIELDS[f"{prefix}{name}"] = value


_collect(schema.default_config().to_dict())
VALUES = st.one_of(
    st.integers(-(2**1100), 2**1100),
    st.integers(-3, 20),
    st.floats(),
    st.floats(-2, 3),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(["precise", "ode", "cps", "muon", "dual", "none", "first_k", "q,k", "h:1"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["kind", "eta", "x"]), st.floats(0, 1), max_size=2),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, min_size=1, max_size=2))
def test_any_config_is_taken_or_refused_with_field_and_value(changes):
    values = schema.default_config().to_dict()
    for path, value in changes.items():
        *groups, name = path.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[name] = value
    try:
        config = builder.from_config_dict(ml_collections.ConfigDict(values))
    except ValueError as error:
        text = str(error)
        assert text.startswith("config."), text
        named = [p for p in changes if p.rpartition(".")[2] in text or p.rpartition(".")[0] in text]
        assert named, (text, changes)
    else:
        assert isinstance(config, schema.Config)
        for path, value in changes.items():
            if path == "rollout.eta":
                continue  # eta_match may have replaced it
            found = config
            for part in path.split("."):
                found = getattr(found, part)
            assert found == value


def test_the_service_of_these_tests_is_one_that_a_run_accepts(runs, tmp_path):
    with scripted(Script()) as address:
        config = runs.config(**{"rewards.spawn": False, "rewards.address": address})
        with runs.open_scorer(config, tmp_path) as client:
            assert client.fingerprint == "model-a"
