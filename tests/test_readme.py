# SPDX-License-Identifier: Apache-2.0
"""The figures of the README are those of the committed rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.harness import shares

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
CLAIMS = [  # study, claim, decimals of the README
    *(("ntk_width", *claim) for claim in (("ratio", 2), ("slope", 3), ("means", 1), ("accuracy", 1), ("lazier", 2))),
    ("ntk_width", "regime", 3),
    ("batch_size", "gap", 2),
    ("batch_size", "equal_updates", 1),
    ("batch_size", "equal_ratio", 1),
    ("sharpness", "lambda", 2),
    ("sharpness", "equal_loss", 1),
    ("optimizers", "full_batch", 1),
    ("optimizers", "adam", 1),
    ("double_descent", "mlp_gain", 2),
    ("double_descent", "mlp_no_peak", 1),
    ("double_descent", "mlp_noise_peak", 1),
    ("lottery_ticket", "kept_10", 1),
    ("lottery_ticket", "cnn_init", 1),
    ("lottery_ticket", "lenet_init", 2),
]
BESIDE = {"equal_updates", "equal_ratio", "equal_loss", "mlp_no_peak", "mlp_noise_peak"}  # in another claim's control


def committed(study: str) -> dict[str, dict]:
    record = json.loads((ROOT / "experiments" / "results" / study / "verdicts.json").read_text())
    return {claim["id"]: claim for claim in record["claims"]}


def rows(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


@pytest.mark.parametrize(("study", "claim", "decimals"), CLAIMS)
def test_verdicts(study: str, claim: str, decimals: int) -> None:
    found = committed(study)[claim]
    value, low, high = (f"{found['measured'][key]:.{decimals}f}".replace("-", "−") for key in ("value", "low", "high"))
    shown = f"[{low}, {high}]" + ("" if claim in BESIDE else ", n=")
    line = next(line for line in README.splitlines() if shown in line)
    assert re.search(rf"(?<![\d.]){value}( %| points)? \[{re.escape(low)}", line)
    if claim not in BESIDE:
        assert f"| {found['verdict']} |" in line
        survives = line.split("|")[5].replace("*", "").split(":")[0].split(",")[0].strip()
        assert survives == found["survives"] or (survives, found["survives"]) == ("–", "not tested")


def test_count_of_claims() -> None:
    studies = [path.parent.name for path in (ROOT / "experiments" / "results").glob("*/verdicts.json")]
    assert f"Six studies, {sum(len(committed(study)) for study in studies)} claims" in README and len(studies) == 6


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_every_python_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_norms_benchmark() -> None:
    first = {row["case"]: row for row in reversed(rows("norms-1-thread.json"))}  # of several peers the first
    shown = [row for case, row in first.items() if "recorder" not in case]
    lines = [line for line in README.splitlines() if line.count("|") == 6 and "×**" in line]
    assert len(lines) == 7
    for line in lines:
        assert any(f"**{row['ratio']:.0f}×**" in line or f"**{row['ratio']:.2f}×**" in line for row in shown), line
    recorder = next(row for case, row in first.items() if "recorder" in case)
    assert f"{100 / recorder['ratio']:.2f} % of the step" in README


def test_training_benchmark() -> None:
    fused = [row["wall_ratio"] for row in rows("training-2-threads.json") if "fused" in row["peer"]]
    assert "| plain loop / curvlab | " + " | ".join(f"{ratio:.2f}" for ratio in fused) + " |" in README


def test_curvature_benchmark() -> None:
    measured = shares(rows("hvp-1-thread.json"))
    what = {
        "Hessian, one": "Hessian, one vector",
        "Hessian, eight": "Hessian, eight vectors",
        "GGN, one": "GGN, one vector",
        "trace, 32": "trace, 32 probes",
        "density, 2": "density, 2 x 50 steps",
        "five top": "five top eigenpairs",
        "the same 50": "the same 50 training steps later, warm",
    }
    for start, case in what.items():
        line = next(line for line in README.splitlines() if line.startswith(f"| {start}"))
        shown = [cell.strip() for cell in line.split("|")[2:5]]
        for subject, cell in zip(("MLP", "CNN", "ResNet-20"), shown, strict=True):
            found = [s["share"] for s in measured if s["case"].startswith(f"{subject}, N") and s["case"].endswith(case)]
            assert cell == (f"{found[0]:.2f}" if found else ""), (line, subject)


def test_sparse_benchmark() -> None:
    faster = {s["case"]: f"{1 / s['share']:.2f}×" for s in shares(rows("sparse-1-thread.json"))}
    zeros = (80, 90, 95, 98)
    for layer in ("64 → 64 @32²", "64 → 128 @16²", "128 → 256 @8²"):
        for mask, shown in (("uniform", layer), ("pruned", f"{layer}, mask of a pruned network")):
            cells = [faster[f"{layer}, {share} % zeros, {mask}"] for share in zeros]
            assert f"| {shown} | " + " | ".join(cells) + " |" in README
    cells = [faster[f"linear 4096 → 256, {share} % zeros, uniform"] for share in zeros]
    assert "| linear 4096 → 256 | " + " | ".join(cells) + " |" in README
    lab = {row["case"]: f"{row['ratio']:.2f}×" for row in rows("sparse-1-thread.json") if row["peer"] == "sparselab"}
    cells = [lab[f"linear 4096 → 256, {share} % zeros, uniform"] for share in zeros]
    assert "| the same, over sparselab | " + " | ".join(cells) + " |" in README
    sweep = [s["share"] for s in shares(rows("sparse-1-thread.json")) if s["case"].startswith("auto, 4096")]
    assert f"take {min(sweep):.1f} to {max(sweep):.1f} times a dense layer's time" in README
    two = shares(rows("sparse-2-threads.json"))
    linear = [1 / s["share"] for s in two if s["case"].startswith("linear")]
    assert f"{min(linear):.1f}× to\n{max(linear):.1f}×" in README
    for share in two:
        if not share["case"].startswith("linear"):  # "keep these ratios"
            assert abs(share["share"] * float(faster[share["case"]][:-1]) - 1) < 0.1
    for name, kind in (("layer-wise masks", "uniform"), ("one global threshold", "global")):
        step = "training step, CNN(32)+BN, batch 128"
        cells = [faster[f"{step}, {kind} masks, {kept} % kept"] for kept in (10, 5)]
        assert f"| CNN(32)+BN, {name} | | " + " | ".join(cells) + " | |" in README
