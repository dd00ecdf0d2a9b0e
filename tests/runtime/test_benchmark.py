import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from exported import Exported

from zsq.cli import main
from zsq.core import CheckpointError, RecipeError
from zsq.runtime import benchmark as module
from zsq.runtime.benchmark import benchmark


class Scripted:
    """A session whose passes take the seconds that are written down."""

    def __init__(self, *seconds: float) -> None:
        self._left = list(seconds)

    def seconds(self, images: np.ndarray, at_least: float) -> float:
        return self._left.pop(0)


def test_a_ratio_is_the_median_over_rounds_by_hand():
    # One round to warm up, then int 1, 2, 4 ms beside float 3, 4, 20 ms: ratios 3, 2, 5.
    low, exact = Scripted(9, 0.001, 0.002, 0.004), Scripted(9, 0.003, 0.004, 0.020)
    found = module._timing("onnxruntime", np.zeros((8, 1)), [low, exact], rounds=3, at_least=0)
    assert found.ratio == 3
    assert found.milliseconds == 2
    assert found.float_milliseconds == 4
    assert found.images_per_second == pytest.approx(8 / 0.002)
    assert found.bfloat16_milliseconds is None


def test_both_runtimes_are_measured_at_both_batches(exported: Exported):
    found = benchmark(exported.file, exported.float_file, rounds=1, at_least=0)
    assert [(each.runtime, each.batch) for each in found.timings] == [
        ("onnxruntime", 1),
        ("onnxruntime", 8),
        ("openvino", 1),
        ("openvino", 8),
    ]
    assert all(each.milliseconds > 0 for each in found.timings)
    assert all(each.ratio == pytest.approx(each.float_milliseconds / each.milliseconds) for each in found.timings)
    assert [each.runtime for each in found.memory] == ["onnxruntime", "openvino"]
    assert all(each.bytes > 10**7 for each in found.memory)
    assert found.bytes == exported.file.stat().st_size
    assert found.float_bytes == exported.float_file.stat().st_size


def test_the_command_takes_a_run_or_a_float_file(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "benchmark", partial(benchmark, rounds=1, at_least=0))
    assert main(["benchmark", str(exported.file), "--run", str(exported.run)]) == 0
    shown = capsys.readouterr().out
    assert f"{exported.file.stat().st_size:,} bytes, the float file " in shown
    assert "threads: 1; medians of interleaved runs" in shown
    assert shown.count("ONNX Runtime") == 3
    assert main(["benchmark", str(exported.file), "--float", str(exported.float_file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["threads"] == 1
    assert len(facts["timings"]) == 4


def test_bad_input_is_refused_in_a_line(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.onnx").write_text("hello")
    words = ["benchmark", str(exported.file)]
    for more, says in {
        (): "give either --float FLOATFILE or --run RUN",
        ("--float", str(tmp_path / "text.onnx")): "is no complete ONNX file",
        ("--float", "none.onnx"): "cannot be read (No such file or directory)",
        ("--run", str(tmp_path)): "holds no finished run",
        ("--threads", "0"): "greater than or equal to 1",
    }.items():
        assert main([*words, *more]) == 2
        line = capsys.readouterr().err
        assert says in line
        assert line.count("\n") == 1
    assert main(["benchmark", "none.onnx", "--float", str(exported.float_file)]) == 2
    assert "no file none.onnx" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"is none of .onnx, .xml"):
        benchmark(tmp_path / "file.pt2", exported.float_file)
    with pytest.raises(RecipeError, match="must be at least 1"):
        benchmark(exported.file, exported.float_file, rounds=0)
