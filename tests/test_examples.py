"""Every script in ``examples/`` runs, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
SAYS = {
    "audit_in_ci.py": "every loop over frames re-rolls",
    "cnn_lstm.py": "largest difference",
    "compile_and_train.py": "gradients: largest difference",
    "deploy_inductor.py": "largest difference",
    "deploy_onnx.py": "largest difference",
    "deploy_openvino.py": "largest difference",
    "deploy_tensorrt.py": "layers",
    "deploy_torch_tensorrt.py": "pip install 'fxtemporal[tensorrt]'",
    "conv3d_network.py": "largest difference",
    "diffusers_pipeline.py": "",
    "finetune.py": "as deployed",
    "train_then_deploy.py": "largest difference",
}

ARGUMENTS = {
    "conv3d_network.py": ["--size", "32"],
    "finetune.py": ["--epochs", "1", "--clips", "64"],
    "deploy_inductor.py": ["--quick"],
    "deploy_onnx.py": ["--quick"],
    "deploy_openvino.py": ["--quick"],
    "stream_with_ray.py": ["--clips", "32"],
}


def test_there_are_examples() -> None:
    assert set(SAYS) <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert SAYS.get(name, "") in done.stdout
