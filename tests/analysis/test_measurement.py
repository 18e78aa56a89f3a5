"""Measurements are checked, joined by name, and kept in files."""

import pytest

import simqat_jax as sq
from simqat_jax.analysis.measurement import merged, read_measurements, write_measurements

FLOAT = sq.Measurement(name="float", accuracy=0.97, nbytes=1000)
FILE = sq.Measurement(name="net.tflite", nbytes=300, p50_ms=0.5, p99_ms=1.0)


def test_one_for_each_name():
    tried = sq.Measurement(name="net.tflite", accuracy=0.96, p50_ms=0.4)
    assert merged([FILE, FLOAT, tried]) == (
        sq.Measurement(name="net.tflite", accuracy=0.96, nbytes=300, p50_ms=0.4, p99_ms=1.0),
        FLOAT,
    )


def test_files(tmp_path):
    path = tmp_path / "m.json"
    write_measurements([FLOAT, FILE], path)
    assert read_measurements(path) == (FLOAT, FILE)
    path.write_text('[{"name": "float", "accuracy": 0.97, "nbytes": 1000}]')
    assert read_measurements(path) == (FLOAT,)
    for text, message in (
        ("[", "no JSON"),
        ('[{"accuracy": 1}]', r"m.json\[0\] must be an object with name"),
        ('[{"name": "x", "accuracy": 97}]', "Measurement.accuracy must be a number, a share"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_measurements(path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_measurements(tmp_path / "none")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": 1}, TypeError, "name must be a string"),
        ({"name": ""}, ValueError, "which model"),
        ({"accuracy": 97.5}, ValueError, "97.5 % is 0.975"),
        ({"accuracy": True}, TypeError, "accuracy"),
        ({"nbytes": -1}, ValueError, "nbytes must be a number, 0 or more"),
        ({"p50_ms": "fast"}, TypeError, "p50_ms"),
        ({"p99_ms": float("nan")}, ValueError, "p99_ms"),
        ({"p99_ms": float("inf")}, ValueError, "p99_ms"),
    ],
)
def test_what_is_none(fields, error, message):
    with pytest.raises(error, match=message):
        sq.Measurement(**{"name": "x", **fields})
