"""ONNX Runtime is opened so that it adds exactly."""

import platform
from pathlib import Path

import onnxruntime
import pytest
from models import converted
from zoo import CASES

import simqat_jax as sq
from simqat_jax.targets.onnx import runtime, target


def test_saturating_sums_are_found_where_the_processor_has_no_vnni():
    if platform.machine() != "x86_64":
        assert not runtime.onnxruntime_saturates()
        return
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("the processor's instructions are read from /proc/cpuinfo, which is not here")
    vnni = {"avx512_vnni", "avx_vnni"} & set(Path("/proc/cpuinfo").read_text().split())
    assert runtime.onnxruntime_saturates() == (not vnni)


@pytest.mark.parametrize("saturates", [False, True])
def test_the_exact_option_is_set_where_sums_saturate(saturates, tmp_path, monkeypatch):
    sq.export_onnx(
        converted(CASES["residual"], sq.SimQATConfig(backend="onnx")), tmp_path / "m.onnx"
    )
    entries = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, *entry):
            entries.append(entry)
            super().add_session_config_entry(*entry)

    monkeypatch.setattr(target, "onnxruntime_saturates", lambda: saturates)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    sq.open_file(tmp_path / "m.onnx", isolated=False)
    assert (("session.x64quantprecision", "1") in entries) == saturates
