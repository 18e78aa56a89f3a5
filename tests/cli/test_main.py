"""The command `simqat`: what it prints, and its status."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import KEY, observed

import simqat_jax as sq
from simqat_jax.cli.main import main
from simqat_jax.targets import verify as verification

X = np.asarray(jax.random.normal(KEY, (6, 8, 8, 1)))
Z = np.asarray(jax.random.normal(jax.random.key(1), (6, 5)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, z):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2))) + nn.Dense(10)(z)


class Cumulative(Net):
    @nn.compact
    def __call__(self, x, z):
        return jnp.cumsum(super().__call__(x, z), 1)


class OfBytes(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.astype(jnp.float32) / 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Integer models, their files, and data."""
    path = tmp_path_factory.mktemp("cli")
    qmodel, variables, _ = observed(Net(), X, Z, config=sq.SimQATConfig(weight_bits=4))
    for backend, export in (("tflite", sq.export_tflite), ("onnx", sq.export_onnx)):
        model = sq.convert(qmodel, variables, X, Z, backend=backend)
        model.save(path / f"{backend}.integer")
        labels = sq.TensorMetadata(labels=[f"kind {k}" for k in range(10)])
        about = sq.FileMetadata(name="Of both inputs", tensors={"output": labels})
        export(model, path / f"net.{backend}", metadata=about)
    sq.analyze(qmodel, variables, [(X, Z)], progress=False).save(path / "analysis.json")
    qmodel, variables, _ = observed(Cumulative(), X, Z)
    sq.export_tflite(sq.convert(qmodel, variables, X, Z), path / "other.tflite")
    x = np.ones((1, 3), np.uint8)
    qmodel, variables, _ = observed(OfBytes(), x)
    sq.export_tflite(sq.convert(qmodel, variables, x), path / "bytes.tflite")
    np.save(path / "x.npy", X)
    np.save(path / "z.npy", Z)
    np.savez(path / "ordered.npz", X, Z)
    np.savez(path / "named.npz", **{"input/1": Z, "input/0": X})
    np.savez(path / "strange.npz", a=X, b=Z)
    return path


@pytest.fixture
def simqat(folder, monkeypatch, capsys):
    """Run the command in the folder; return its status and what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")

    def run(text, command=main):
        status = command(text.split())
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("tflite.integer", ["Conv_0 ", "4 bits", "0 of them in float; ", "rounding as in tflite"]),
        (
            "net.tflite",
            ["Of both inputs", "CONV_2D", "int4 (10, 4)", "int8 (10, 5)", "FULLY_CONNECTED"],
        ),
        (
            "net.onnx",
            ["Of both inputs", "Conv ", "uint8", "int8 (4, 10)", "0 of them on real numbers"],
        ),
        ("other.tflite", ["CUMSUM", "float32", "cumsum"]),
    ],
)
def test_inspect(simqat, folder, file, parts):
    status, out, err = simqat(f"inspect {file}")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    shown = out.replace("…", "")
    assert all(part[:9] in shown for part in parts), out
    if file.startswith(("net", "other")):
        assert f"{(folder / file).stat().st_size:,} bytes" in out
    _, details, _ = simqat(f"inspect {file} --details")
    assert details != out and all(name in details for name in ("Conv_0", "Dense_1"))
    if file.startswith("net"):
        assert "kind 9" not in out and "\n  9 kind 9\n" in details
        assert details.startswith("Of both inputs") and "10 labels" in " ".join(details.split())
        assert "output (any, 10)\n  float32, inside " in details


def test_operators_whose_results_have_no_name_are_called_as_they_are(simqat):
    status, out, _ = simqat("inspect bytes.tflite")
    assert status == 0 and "\ncast  " in out and "float: cast, div," in out


@pytest.mark.parametrize("data", ["x.npy z.npy", "ordered.npz", "named.npz"])
@pytest.mark.parametrize("command", ["simqat", "simqat-verify"])
def test_verify_several_inputs(simqat, command, data):
    main_ = main if command == "simqat" else verification.main
    verb = "verify " if command == "simqat" else ""
    status, out, _ = simqat(f"{verb}tflite.integer net.tflite --data {data}", main_)
    assert status == 0 and "0 of 60 codes differ (6 examples)" in out


def test_verify_finds_what_differs(simqat, folder):
    qmodel, variables, _ = observed(Net(), 2 * X, Z, config=sq.SimQATConfig(weight_bits=4))
    sq.export_tflite(sq.convert(qmodel, variables, X, Z), folder / "wrong.tflite")
    status, out, _ = simqat("verify tflite.integer wrong.tflite --data ordered.npz")
    assert status == 1 and "codes differ" in out


def test_bench(simqat):
    status, out, _ = simqat("bench net.tflite --against net.onnx --calls 5 --batch 2 --threads 1")
    assert status == 0
    titles, first, second, foot = out.splitlines()
    assert "p50 ms" in titles and "p99 ms" in titles
    assert first.startswith("net.tflite  LiteRT") and second.startswith("net.onnx    ONNX Runtime")
    assert second.split()[-2] == "1.00"  # what is compared with
    assert foot == "5 calls of 2 examples on 1 threads, of random inputs."


def test_bench_for_a_report(simqat, folder):
    status, out, _ = simqat("bench net.tflite --calls 5 --json bench.json")
    (row,) = json.loads((folder / "bench.json").read_text())
    assert status == 0 and row["nbytes"] == (folder / "net.tflite").stat().st_size
    assert row["name"] == "net.tflite" and f"{row['p50_ms']:.3f}" in out
    assert 0 < row["p50_ms"] <= row["p99_ms"] and f"{row['p99_ms']:.3f}" in out


def test_report(simqat, folder):
    rows = [{"name": "float", "accuracy": 0.5}, {"name": "net.tflite", "accuracy": 0.25}]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "size.json").write_text('[{"name": "net.tflite", "nbytes": 4321}]')
    status, out, err = simqat("report analysis.json -o page.html --measured rows.json size.json")
    assert (status, out, err) == (0, "page.html\n", "")
    page = (folder / "page.html").read_text()
    assert "Why accuracy moved" in page and "Conv_0/kernel" in page
    assert page.index("50.00 %") < page.index("-25.00 points") < page.index("4,321 bytes")
    options = "-o b.html --title Mine --pngs figures --overlay net.tflite"
    status, out, _ = simqat(f"report analysis.json {options}")
    overlays = ("sqnr", "sensitivity", "weight_bits", "activation_bits")
    written = ["b.html", "figures", *(f"net.{name}.json" for name in overlays)]
    assert status == 0 and out.split() == written
    assert all((folder / name).exists() for name in written)
    assert "<h1>Mine</h1>" in (folder / "b.html").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("inspect nothing.tflite", "no file at nothing.tflite"),
        ("inspect x.npy", "no integer model"),
        ("verify tflite.integer --data x.npy z.npy", "behind the model"),
        ("verify tflite.integer net.tflite --data x.npy", "takes 2 inputs (input/0, input/1)"),
        ("verify tflite.integer net.tflite --data strange.npz", "Name the arrays as the inputs"),
        ("verify tflite.integer net.tflite --data net.onnx", "no *.npy or *.npz"),
        ("verify tflite.integer net.tflite --data none.npy", "no file at none.npy"),
        ("bench tflite.integer", "neither *.onnx nor *.tflite"),
        ("bench net.tflite --calls 0", "calls must be a whole number, 1 or more"),
        ("bench net.tflite --threads many", "--threads"),
        ("verify tflite.integer net.tflite", "--data"),
        ("convert", "convert"),
        ("", "inspect, verify, bench, report"),
        ("report none.json", "no file at none.json"),
        ("report x.npy", "x.npy is no JSON"),
        ("report analysis.json -o none/page.html", "no directory none"),
        ("report analysis.json -o net.onnx", "net.onnx is not what this writes: export_onnx"),
        ("report analysis.json --measured none.json", "no file at none.json"),
        ("report analysis.json --measured analysis.json", "analysis.json must be a list"),
        ("report analysis.json --overlay x.npy", "neither *.onnx nor *.tflite"),
    ],
)
def test_errors_are_one_line_and_status_2(simqat, text, reason):
    status, out, err = simqat(text)
    assert (status, out) == (2, "")
    assert err.startswith("simqat: ") and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_damaged_files(simqat, folder, suffix):
    (folder / f"bad.{suffix}").write_bytes((folder / f"net.{suffix}").read_bytes()[:300])
    for verb in ("inspect", "bench"):
        status, _, err = simqat(f"{verb} bad.{suffix}")
        assert status == 2 and err.count("\n") == 1 and f"bad.{suffix}" in err


def test_bench_looks_for_the_folder_of_its_file_first(simqat, folder):
    status, out, err = simqat("bench net.tflite --json nowhere/found.json")
    assert (status, out) == (2, "") and "there is no folder nowhere; make it" in err
    (folder / "nowhere").mkdir()
    assert simqat("bench net.tflite --calls 2 --json nowhere/found.json")[0] == 0


def test_a_reader_that_has_enough(folder):
    command = [sys.executable, "-m", "simqat_jax.cli", "inspect", "net.onnx"]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        command, cwd=folder, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("content", [b"", b"x" * 1000])
def test_what_protobuf_reads_as_an_empty_message(simqat, folder, content):
    (folder / "junk.onnx").write_bytes(content)
    status, _, err = simqat("inspect junk.onnx")
    assert status == 2 and err.count("\n") == 1 and "junk.onnx is no ONNX file" in err


def test_the_alias_says_what_is_missing_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        verification.main(["tflite.integer"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "--data" in err


def test_the_alias_says_what_it_could_not_check(simqat):
    status, _, err = simqat("tflite.integer net.tflite --data x.npy", verification.main)
    assert status == 2 and err.startswith("simqat-verify: could not check: the model takes 2")


def test_help_and_a_missing_extra(simqat, monkeypatch):
    status, out, _ = simqat("--help")
    assert status == 0 and "inspect" in out and "bench" in out
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, _, err = simqat("inspect net.tflite")
    assert status == 2 and "pip install 'simqat-jax[cli]'" in err


def test_as_a_process(folder):
    command = [sys.executable, "-m", "simqat_jax.cli", "inspect", str(folder / "nothing")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stderr.startswith("simqat: no file at")
