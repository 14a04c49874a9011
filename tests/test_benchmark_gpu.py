"The GPU benchmark must run where nobody sees it first, so its small form runs here, on the CPU."

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=300, cwd=cwd
    )


def test_tiny_ends_with_its_table(tmp_path, gpu):
    done = run("--tiny", "--out", "out.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    header, rule, *rows = done.stdout.rstrip("\n").splitlines()[-6:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    assert cells[0] == gpu.COLUMNS and set(rule) <= set("|- ")
    found = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    assert [(r["precision"], r["layout"], r["compiled"]) for r in found] == [
        ("fp32", "nchw", "no"),
        ("bf16", "nchw", "no"),
        ("bf16", "nhwc", "no"),
        ("bf16", "nhwc", "aot_eager"),
    ]
    assert all(float(r["images/s"]) > 0 and r["peak MiB"] == "–" for r in found)
    assert found[0]["ratio"] == "1.00"
    with (tmp_path / "out.csv").open() as file:
        kept = list(csv.DictReader(file))
    searched = [line for line in kept if line["case"].startswith(gpu.SUPERNET)]
    networks = [line for line in kept if line["case"].startswith(("test_vit ", "cdnet "))]
    assert len(networks) == len(gpu.network_cases(tiny=True)) == 4
    assert all(float(line["value"]) > 0 and "stride" not in line["case"] for line in networks)
    trained = [line for line in kept if line["case"].startswith("osnet x0.25 ")]
    assert next(line["ratio"] for line in trained) == "1.000" and len(trained) == 3
    assert list(kept[0]) == gpu.RESULTS
    assert len(kept) - len(searched) - len(networks) - len(trained) == 4
    assert len(searched) == len(gpu.supernet_cases(tiny=True)) == 11
    assert all(float(line["value"]) > 0 for line in searched)
    assert done.stdout.count("| supernet ") == 11
    assert all(line["date"] and line["device"] and line["torch"] for line in kept)


def test_it_imports_no_more_than_a_bare_machine_has():
    extra = ["pandas", "matplotlib", "seaborn", "papermill", "nbdev", "yaml", "IPython"]
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print([m for m in {extra} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_gpu_it_says_what_to_type(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "no CUDA device is visible" in done.stderr and "--tiny" in done.stderr


def test_all_rows_are_there_and_the_costly_ones_run_last(gpu):
    rows = gpu.cases(tiny=False)
    assert len(rows) == len(set(rows)) == 20
    assert {(c.height, c.width, c.stride) for c in rows} == {
        (h, 128, s) for h in (256, 384) for s in (1, 2)
    }
    order = gpu.in_running_order(rows)
    assert [c.compiled for c in order] == ["no"] * 16 + ["inductor"] * 4
    assert [c.stride for c in order[16:]] == [1, 1, 2, 2]


def test_transformers_and_a_searched_network_are_there(gpu):
    rows = gpu.network_cases(tiny=False)
    assert len(rows) == len(set(rows)) == 9 and {(c.height, c.width) for c in rows} == {(256, 128)}
    assert {c.model for c in rows} == {"vit_small_patch16_224", "vit_base_patch16_224", "cdnet"}
    assert [c.model for c in rows if c.plain] == list(dict.fromkeys(c.model for c in rows))
    with torch.device("meta"):
        nets = {c.model: gpu.build_net(c) for c in rows if c.plain}
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert sizes["cdnet"] < 3e6 < 21e6 < sizes["vit_small_patch16_224"] < 23e6
    assert 85e6 < sizes["vit_base_patch16_224"] < 88e6


def test_the_networks_of_bench_train_are_there(gpu):
    rows = gpu.trained_cases(tiny=False)
    assert len(rows) == len(set(rows)) == 12 and {c.model for c in rows} == set(gpu.TRAINED)
    variants = {(c.precision, c.layout, c.compiled) for c in rows}
    assert len(variants) == 4 and ("bf16", "nhwc", "inductor") in variants
    with torch.device("meta"):
        nets = {c.model: gpu.build_net(c) for c in rows if c.plain}
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    assert sizes["osnet x0.25"] < sizes["small_cnn"] < sizes["resnet18"] < 12e6


def test_the_supernet_is_there_at_every_level(gpu):
    rows = gpu.supernet_cases(tiny=False)
    assert len(rows) == len(set(rows)) == 12
    assert {(c.height, c.width) for c in rows} == {(384, 128)}
    levels = ["plain", "lean", "cell", "node", "edge"]
    assert [c.model for c in rows[:5]] == [f"supernet {level}" for level in levels]
    assert [c.compiled for c in gpu.in_running_order(rows)][-1] == "inductor"


def test_a_missing_package_is_a_result(gpu, monkeypatch):
    def measure(case, **how):
        raise ModuleNotFoundError("No module named 'pandas'", name="pandas")

    monkeypatch.setattr(gpu, "measure", measure)
    result = gpu.attempt(gpu.supernet_cases(tiny=True)[0], device="cpu")
    assert result.note == "needs the package pandas"


HOW = {"p": 4, "k": 2, "warmup": 0, "steps": 2, "limit": 1.0}


def test_no_memory_is_a_result_and_a_bug_is_not(gpu, monkeypatch, tmp_path):
    rows = gpu.cases(tiny=True)

    def measure(case, **how):
        if case.precision == "fp32":
            return gpu.Result(images_per_s=100.0, peak_mib=50.0)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu, "measure", measure)
    results = gpu.run_all(rows, 60, "cpu", **HOW)
    lines = gpu.table_lines(rows, results)
    assert "| 100 " in lines[2] and all("out of memory" in line for line in lines[3:])
    gpu.write_out(tmp_path / "out.json", gpu.provenance("cpu"), rows, results)
    kept = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["ratio"] for row in kept] == [1.0, None, None, None]

    def broken(case, **how):
        raise RuntimeError("a bug")

    monkeypatch.setattr(gpu, "measure", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        gpu.run_all(rows, 60, "cpu", **HOW)


def test_an_empty_budget_skips_every_row_by_name(gpu):
    rows = gpu.cases(tiny=True)
    results = gpu.run_all(rows, 0, "cpu", **HOW)
    assert all(result.note.startswith("skipped") for result in results.values())
    assert len(gpu.table_lines(rows, results)) == 2 + len(rows)


def test_the_alarm_stops_a_row_that_never_ends(gpu, monkeypatch):
    def endless(case, **how):
        while True:
            torch.ones(1)

    monkeypatch.setattr(gpu, "measure", endless)
    results = gpu.run_all(gpu.cases(tiny=True)[:1], 1.5, "cpu", **HOW)
    assert [result.note for result in results.values()] == ["stopped: time is up"]
