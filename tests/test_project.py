"""The layout that readers and copiers rely on: the part that all scripts share is identical, files stand alone."""
import ast
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from conftest import ROOT

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
    flags = "--epochs 1 --limit 130 --num-samples 20 --sample-steps 2 --device cpu"
    monkeypatch.setattr(sys, "argv", [name, "--smoke", *flags.split()])
    runpy.run_path(f"{name}.py", run_name="__main__")
    assert list((tmp_path / "runs" / f"{name}-smoke").glob("samples_*.png"))
    assert Path(sys.modules["samplers"].__file__).parent == tmp_path and "metrics" not in sys.modules
