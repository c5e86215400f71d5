"""`train router_r1`: what it hands to the cluster, and errors as one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from router_service.cli import app, train_router_r1

SPEC = {"policy": "Qwen/Qwen2.5-3B-Instruct", "out": "policies/x", "seed": 3, "cost_weight": 0.6}


def test_a_job_is_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, handed = tmp_path / "c.yaml", []
    config.write_text(yaml.safe_dump(SPEC))
    monkeypatch.setattr(train_router_r1, "run_as_job", lambda command, **rest: handed.append((command, rest)))
    arguments = ["--config", str(config), "--seed", "4", "--submit", "--no-wait", "--no-resume"]
    done = CliRunner().invoke(app, ["train", "router_r1", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    ((command, rest),) = handed
    out = tmp_path / "policies" / "x"
    own: list[Any] = ["--config", str(config), "--policy", SPEC["policy"], "--out", str(out)]
    own += ["--seed", "4", "--cost-weight", "0.6", "--no-resume"]
    assert command == [sys.executable, "-m", "router_service", "train", "router_r1", *own]
    assert rest == {"out_folder": out, "address": None, "working_dir": None, "wait": False}


def test_an_error_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(SPEC | {"stepps": 5}))
    command = [sys.executable, "-m", "router_service", "train", "router_r1", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "stepps: Extra inputs are not permitted" in done.stderr
