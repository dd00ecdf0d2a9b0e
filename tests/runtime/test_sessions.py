import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import Exported

from zsq.core import MissingExtra
from zsq.runtime import sessions
from zsq.runtime.sessions import NAMES, RuntimeFailure, Session, require


def images(count: int) -> np.ndarray:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()


@pytest.mark.parametrize("runtime", [name for name in NAMES if name != "openvino-bf16"])
def test_every_runtime_computes_the_float_network(exported: Exported, runtime: str):
    x = images(5)
    with Session(runtime, exported.float_file) as session:
        logits = session.logits(x, batch_size=2)
        assert session.seconds(x[:1]) > 0
        before = session.peak_memory()
        session.seconds(np.zeros((5000, 3, 8, 8), np.float32))
        assert session.peak_memory() > before
    import tiny

    with torch.no_grad():
        np.testing.assert_allclose(logits, tiny.cnn()(torch.from_numpy(x)).numpy(), atol=1e-4)


def test_a_file_that_cannot_be_loaded_is_told_in_a_sentence(tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(RuntimeFailure, match=f"{NAMES[runtime]} cannot load the file: .*"):
            Session(runtime, tmp_path / "bad.onnx")


def test_a_runtime_that_dies_is_told_in_a_sentence(exported: Exported):
    with Session("onnxruntime", exported.file) as session:
        os.kill(session._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeFailure, match="ONNX Runtime was killed by signal 9 on the file"):
            session.logits(images(1))


def test_a_missing_runtime_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch, exported: Exported):
    monkeypatch.setattr(sessions, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'zsq\[ort\]'"):
        Session("onnxruntime-unoptimised", exported.file)
    with pytest.raises(MissingExtra, match=r"pip install 'zsq\[onnx\]'"):
        require("onnx")
