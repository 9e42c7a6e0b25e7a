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


README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python ((?:cem_sup|cem_unsup|jeat|binary_at_ebm)\.py[^`#&|\n]*)", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readmes_commands_are_understood(command):
    script, *flags = shlex.split(command)
    importlib.import_module(script.removesuffix(".py")).parse_args(flags)


def test_the_trained_nets_are_those_of_the_table():
    table = (ROOT / ".github/weights/README.md").read_text()
    files = list((ROOT / ".github/weights").glob("*.pt"))
    assert files and all(path.stat().st_size < 4e6 for path in files)
    for path in files:
        assert f"`{path.name}`" in table and hashlib.sha256(path.read_bytes()).hexdigest() in table


@pytest.mark.slow
def test_the_readmes_snippet_draws_what_it_says(tmp_path, monkeypatch):
    """As it stands there, without data: the net that drew them calls them by the class asked for, the starts not."""
    (tmp_path / ".github").symlink_to(ROOT / ".github")
    monkeypatch.chdir(tmp_path)
    (snippet,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "colour_fields" in block]
    names = {}
    exec(snippet, names)
    x = load_images("samples.npz")
    y = np.load("samples.npz")["arr_1"]
    assert y.tolist() == list(range(10)) * 10 and (tmp_path / "samples.png").exists()
    assert accuracy(names["f"], x, names["y"]) > 0.95
    x_0 = cem_sup.starts("fields", x, None)(names["y"])
    assert accuracy(names["f"], x_0, names["y"]) < 0.2
