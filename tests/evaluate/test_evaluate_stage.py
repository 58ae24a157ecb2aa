"""The stage `evaluate` on tiny random models, through the command."""

import json
import sys

import numpy as np
import pytest

from nanohybrid.cli.main import main
from nanohybrid.data import TokenStore

FLAGS = [
    "--problems", "3", "--tasks", '["sums","parity"]', "--thinking-budgets", "[0,4]", "--max-tokens", "8",
    "--contexts", "[16,200]", "--decode-batch", "2", "--decode-rounds", "2",
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    TokenStore.from_documents((rng.integers(13, 269, 20), np.ones(20)) for _ in range(4)).write(
        tmp_path / "data" / "validation.safetensors"
    )
    return tmp_path / "data"


def test_evaluate_writes_summary_and_report_and_reuses_a_complete_run(
    checkpoint, dense_checkpoint, data, tmp_path, capsys
):
    command = ["evaluate", *FLAGS, "--data", str(data), "--out", str(tmp_path / "out"), "--json"]
    models = [f"hybrid={checkpoint}", f"dense={dense_checkpoint}"]
    assert main([*command, *models]) == 0
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert printed["accuracy"] == summary["accuracy"] and set(summary["accuracy"]) == {"hybrid", "dense"}
    assert [budget for budget, _ in summary["budget_curve"]["hybrid"]] == [0, 4] and "dense" not in summary[
        "budget_curve"
    ]
    assert [context for context, _ in summary["decode_ms"]["dense"]] == [16, 200]
    assert summary["models"]["dense"]["loss.validation"]["targets"] == 76
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure>") == 5 and "Wilson" in page and "not by a prefill" in page
    assert main([*command, *models]) == 0  # complete: nothing is done again
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["accuracy"]


def test_evaluate_refuses_duplicate_and_unknown_model_names(checkpoint, tmp_path, capsys):
    assert main(["evaluate", "--out", str(tmp_path / "out"), str(checkpoint), str(checkpoint)]) == 2
    assert "name them" in capsys.readouterr().err
    assert main(["evaluate", "--out", str(tmp_path / "out"), "--curve-models", '["x"]', str(checkpoint)]) == 2
    assert "not among" in capsys.readouterr().err


def test_evaluate_names_a_missing_extra_before_any_work(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", *FLAGS, "--out", str(tmp_path / "out"), str(checkpoint)]) == 2
    assert (
        "pip install 'nanohybrid[eval]'" in capsys.readouterr().err
        and not (tmp_path / "out.partial").exists()
    )


@pytest.mark.parametrize(
    "flag", ["--temperature=-1", "--top-p=7", "--thinking-grace=-1", "--held-out-tokens=-1"]
)
def test_evaluate_refuses_settings_out_of_range_and_leaves_nothing_behind(checkpoint, tmp_path, flag, capsys):
    assert main(["evaluate", *FLAGS, flag, "--out", str(tmp_path / "out"), str(checkpoint)]) == 2
    assert flag[2:].partition("=")[0].replace("-", "_") in capsys.readouterr().err and not any(
        path.name.startswith("out") for path in tmp_path.iterdir()
    )
