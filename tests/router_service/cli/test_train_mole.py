"""`train mole`: what it hands to the cluster, and errors as one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router_service.cli import app, train_mole

SPEC = {"base": "b", "gate": "mola", "data": "/shared/d.jsonl", "seed": 3}


def test_a_job_is_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, handed = tmp_path / "c.yaml", []
    config.write_text(json.dumps(SPEC))
    monkeypatch.setattr(train_mole, "run_as_job", lambda command, **rest: handed.append((command, rest)))
    arguments = ["--config", str(config), "--gate", "mixlora", "--out", str(tmp_path / "m"), "--submit", "--no-wait"]
    done = CliRunner().invoke(app, ["train", "mole", *arguments, "--no-resume"], catch_exceptions=False)
    assert done.exit_code == 0
    ((command, rest),) = handed
    own: list[Any] = ["--config", str(config), "--gate", "mixlora", "--out", str(tmp_path / "m"), "--seed", "3"]
    assert command == [sys.executable, "-m", "router_service", "train", "mole", *own, "--no-resume"]
    assert rest == {"out_folder": tmp_path / "m", "address": None, "working_dir": None, "wait": False}


def test_an_error_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(SPEC | {"stepps": 5}))
    command = [sys.executable, "-m", "router_service", "train", "mole", "--config", str(config), "--out", "o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "stepps: Extra inputs are not permitted" in done.stderr
