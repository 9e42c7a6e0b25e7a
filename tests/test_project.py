"""The layout that readers and copiers rely on: repeated blocks are identical, files stand alone and stay readable."""
import ast
import importlib
import json
import re
import runpy
import shutil
import sys
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from samplers import ReplayBuffer

SCRIPTS = [p for p in ("cem_sup", "cem_unsup", "jeat", "binary_at_ebm") if (ROOT / f"{p}.py").exists()]
BLOCKS = ["drawn data", "loader", "crop_flip", "log", "checkpoint", "flags", "main"]


def blocks(source):
    """The marked blocks of a script by name; the last one ends with the file."""
    parts = re.split(r"^# =+ block: (.*)$", source, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_repeated_blocks_are_identical(name):
    mine, first = (blocks((ROOT / f"{n}.py").read_text()) for n in (name, "cem_sup"))
    wanted = [b for b in BLOCKS if not (name == "cem_unsup" and b == "crop_flip")]  # which makes its own views
    assert list(mine) == wanted
    for block in wanted:
        assert mine[block] == first[block], f"{name}.py differs from cem_sup.py in the block {block!r}"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]), ids=lambda p: p.name)
def test_files_can_be_read(path):
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) <= (120 if path.parent.name == "tests" else 110)
    most = {"samplers": 380, "metrics": 330, "binary_at_ebm": 536}
    assert len(lines) <= most.get(path.stem, 500 if path.stem in SCRIPTS else 10_000)
    if path.stem in SCRIPTS:  # what a reader of the method reads
        assert ["block: drawn data" in line for line in lines].index(True) <= 320


@pytest.mark.parametrize("name", [*SCRIPTS, "samplers", "metrics"])
def test_scripts_import_only_samplers_and_metrics(name):
    """Of the project; of the packages only the four that requirements.txt brings in for use."""
    allowed = {"torch", "torchvision", "numpy", *sys.stdlib_module_names}
    allowed |= {"samplers", "metrics"} if name in SCRIPTS else set()
    tree = ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
    found = {a.name.split(".")[0] for n in tree if isinstance(n, ast.Import) for a in n.names}
    tree = ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
    found |= {n.module.split(".")[0] for n in tree if isinstance(n, ast.ImportFrom)}
    assert found <= allowed


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_and_samplers_alone_train_and_sample(name, tmp_path, monkeypatch):
    """Run as a command's file, where the project's other files are not to be found."""
    for file in (f"{name}.py", "samplers.py"):
        shutil.copy(ROOT / file, tmp_path)
    elsewhere = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    monkeypatch.chdir(tmp_path)
    for module in {*SCRIPTS, "samplers", "metrics"} & sys.modules.keys():
        monkeypatch.delitem(sys.modules, module)
    flags = "--epochs 1 --limit-train 128 --limit-test 20 --num-samples 20 --sample-steps 2 --device cpu"
    monkeypatch.setattr(sys, "argv", [name, "--smoke", *flags.split()])
    runpy.run_path(f"{name}.py", run_name="__main__")
    assert list((tmp_path / "runs" / f"{name}-smoke").glob("samples_*.png"))
    assert Path(sys.modules["samplers"].__file__).parent == tmp_path and "metrics" not in sys.modules


DIGESTS = {"cem_sup": 2163931673, "cem_unsup": 3633468786, "jeat": 664651426, "binary_at_ebm": 1904634923}


@pytest.mark.parametrize("name, digest", DIGESTS.items())
def test_the_smoke_settings_are_those_of_the_readmes_tables(name, digest):
    """Whoever changes one measures README's tables again, five seeds, and then writes the new digest here."""
    settings = repr(sorted(importlib.import_module(name).SMOKE.items()))
    assert zlib.crc32(settings.encode()) == digest, settings


LOSSES = {"cem_sup": "at_loss", "cem_unsup": "cem_loss", "jeat": "jeat_loss", "binary_at_ebm": "at_ebm_loss"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_logged_loss_is_the_mean_over_the_epoch(name, tmp_path, monkeypatch):
    """Over the images, for a last batch that is smaller; cem_unsup leaves it out; AT-EBM's is over the iterations.
    On a GPU it is read at the first batch, every fifty, and at the last; AT-EBM's gate needs it each time. No graph
    outlives its step by more than one."""
    script, seen, shown, graphs = importlib.import_module(name), [], [], []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(script, "progress", lambda what, begun, total, done, text: shown.append((done, total)))
    method = getattr(script, LOSSES[name])

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            ctx.alive = set()
            graphs.append(weakref.ref(ctx.alive))
            return loss.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    def spy(f, *args):
        assert all(graph() is None for graph in graphs[:-1])
        loss, *others = value if isinstance(value := method(f, *args), tuple) else (value,)
        seen.append(loss.item())
        return (Step.apply(loss), *others) if others else Step.apply(loss)
    monkeypatch.setattr(script, LOSSES[name], spy)
    args = script.parse_args(["--smoke", "--out", str(tmp_path), "--epochs", "2", "--batch-size", "16",
                              "--device", "cpu"])
    (x, y), f = script.draw(56, 0), script.make_model("small")
    begin = {"epoch": 1, "seconds": 0.0}  # of two
    inputs = {"cem_sup": (f, x, y), "cem_unsup": (f, x), "jeat": (f, ReplayBuffer(16, (3, 32, 32)), x, y),
              "binary_at_ebm": (f, x, x.flip(0))}
    script.train(*inputs[name], args, begin)
    weights = {"cem_unsup": [1, 1, 1], "binary_at_ebm": [1, 1, 1, 1]}.get(name, [16, 16, 16, 8])
    n = 48 if name == "cem_unsup" else 56
    assert shown == [(done, n) for done in ([16, 32, 48, 56] if name == "binary_at_ebm" else [16, n])]
    (epoch,) = [r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if r["event"] == "epoch"]
    assert epoch["loss"] == pytest.approx(np.average(seen, weights=weights), rel=1e-4) and len(set(seen)) == len(seen)
