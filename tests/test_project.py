"""The layout that readers and copiers rely on: the part that all scripts share is identical, files stand alone."""
import ast
import hashlib
import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cem_sup
from conftest import ROOT
from samplers import accuracy, load_images

SCRIPTS = ["cem_sup", "cem_unsup", "jeat", "binary_at_ebm"]
HEADING = "# ================================================================ the same in all four scripts\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_part_that_all_scripts_share_is_identical(name):
    mine, first = ((ROOT / f"{n}.py").read_text().split(HEADING) for n in (name, "cem_sup"))
    assert len(mine) == len(first) == 2 and mine[1] == first[1]


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]), ids=lambda p: p.name)
def test_lines_fit_on_a_screen(path):
    assert max(map(len, path.read_text().splitlines())) <= (120 if path.parent.name == "tests" else 100)


@pytest.mark.parametrize("name", [*SCRIPTS, "samplers", "metrics"])
def test_scripts_import_only_samplers_and_metrics(name):
    """Of the project; of the packages only those that requirements.txt brings in for use."""
    allowed = {"torch", "torchvision", "numpy", "PIL", *sys.stdlib_module_names}
    if name in SCRIPTS:
        allowed |= {"samplers", "metrics"}
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found <= allowed


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("preset", ["small", "smoke"])
def test_help_shows_the_presets_defaults(name, preset, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        script.main([f"--{preset}", "--help"])
    shown, args = capsys.readouterr().out, script.parse_args([f"--{preset}"])
    assert end.value.code == 0 and args.out == f"runs/{name}-{preset}"
    for flag in ("out", "epochs", "lr", "arch", "attack_steps"):
        default = re.search(rf"^  --{flag.replace('_', '-')} [\s\S]*?\(default:\s+(\S+)\)", shown, re.MULTILINE)
        assert default[1] == str(getattr(args, flag))


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
    flags = "--epochs 1 --limit 130 --num-samples 20 --sample-steps 2 --device cpu "
    flags += "--ood-images 10" if name == "binary_at_ebm" else "--test-images 10"
    monkeypatch.setattr(sys, "argv", [name, "--smoke", *flags.split()])
    runpy.run_path(f"{name}.py", run_name="__main__")
    assert list((tmp_path / "runs" / f"{name}-smoke").glob("samples_*.png"))
    assert Path(sys.modules["samplers"].__file__).parent == tmp_path and "metrics" not in sys.modules


README, RESULTS = (ROOT / "README.md").read_text(), (ROOT / ".github/RESULTS.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"python ((?:cem_sup|cem_unsup|jeat|binary_at_ebm)\.py[^`#&|\n]*)", README + RESULTS)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_the_pages_commands_are_understood(command):
    script, *flags = shlex.split(command)
    importlib.import_module(script.removesuffix(".py")).parse_args(flags)


def test_links_between_the_pages_lead_somewhere():
    headings = [line.lstrip("# ").lower() for line in RESULTS.splitlines() if line.startswith("#")]
    anchors = {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"RESULTS\.md#([\w-]+)", README)) <= anchors
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    pictures += [f".github/{path}" for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", RESULTS)]
    assert pictures and all((ROOT / path).exists() for path in pictures)


def test_the_trained_nets_are_those_of_the_table():
    table = (ROOT / ".github/weights/README.md").read_text()
    files = list((ROOT / ".github/weights").glob("*.pt"))
    assert files and all(path.stat().st_size < 6e6 for path in files)
    for path in files:
        assert f"`{path.name}`" in table and hashlib.sha256(path.read_bytes()).hexdigest() in table


def test_the_first_picture_is_short_to_load():
    assert 10_000 < (ROOT / ".github/figures/chains.gif").stat().st_size <= 1_000_000


@pytest.mark.slow
def test_the_readmes_snippet_draws_what_it_says(tmp_path, monkeypatch):
    """As it stands there, without data: another net, which was trained with the attack as well, sees the class asked
    for in most images and not in the starts."""
    (tmp_path / ".github").symlink_to(ROOT / ".github")
    monkeypatch.chdir(tmp_path)
    (snippet,) = [block for block in PYTHON if "cem_sup_small.pt" in block]
    names = {}
    exec(snippet, names)
    x = load_images("samples.npz")
    y = np.load("samples.npz")["arr_1"]
    assert y.tolist() == list(range(10)) * 10 and (tmp_path / "samples.png").exists()
    judge = cem_sup.make_model("small-32")
    judge.load_state_dict(torch.load(".github/weights/cem_sup_small-32.pt", weights_only=True))
    assert accuracy(judge, x, names["y"]) > 0.8
    assert accuracy(judge, cem_sup.starts("fields", x, None)(names["y"]), names["y"]) < 0.25
    with Image.open("chains.gif") as chains:
        assert chains.n_frames == 26 and chains.size == (342, 342)


def test_the_readmes_snippet_takes_a_classifier_of_ones_own(tmp_path, monkeypatch):
    """None of ours: [0, 1] in, logits out. Its logit of the class asked for rises along each chain."""
    monkeypatch.chdir(tmp_path)
    (snippet,) = [block for block in PYTHON if "my_classifier" in block]
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                         nn.Dropout(), nn.Linear(128, 10))
    names = {"my_classifier": mine}
    exec(snippet, names)
    with torch.no_grad():
        rise = (mine(names["x"]) - mine(names["x_0"]))[torch.arange(40), names["y"]]
    assert rise.min() > 0 and np.load("samples.npz")["arr_0"].shape == (40, 32, 32, 3)
    with Image.open("chains.gif") as chains:
        assert chains.n_frames == 26
