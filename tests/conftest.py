"""Runs of the scripts and the judge, shared by the tests of a session. The judge and the unattacked twins live here:
they are controls of the claims, no part of the methods."""
import importlib
import io
import multiprocessing
import os
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one core for the tests, one for the smoke runs

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import cem_sup  # noqa: E402
from samplers import to_float  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("data") and "CIFAR10_ROOT" not in os.environ:
        pytest.skip("needs the real CIFAR-10: set CIFAR10_ROOT")


def run_script(name, *flags, cwd=ROOT, env=None, check=True):
    """`python NAME.py FLAGS`, as a user would; its standard output and error as text."""
    command = [sys.executable, "-W", "error", str(Path(cwd) / f"{name}.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def error(script, capsys, *flags, code=2):
    """The one line on standard error with which script.main(flags) ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script.main(list(map(str, flags)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == code and len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: error: ")
    return lines[0]


def classifier(out):
    f = cem_sup.make_model("small-16")
    f.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    return f.eval()


def no_digits(images):
    """Of each image [B, 3, 32, 32] one that shows no digit, in its colours: its 8 x 8 blocks shuffled; its spectrum
    with other phases; stripes, bent. And the stripes alone, in -1 ... 1 [B, 1, 32, 32]."""
    n, mean = len(images), images.mean((2, 3), keepdim=True)
    blocks = images.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)  # 16 of them
    order = torch.rand(16, n).argsort(0)
    blocks = blocks[order, torch.arange(n)].unflatten(0, (4, 4))
    shuffled = blocks.permute(2, 3, 0, 4, 1, 5).reshape(images.shape)
    phases = torch.fft.rfft2(torch.randn(n, 1, 32, 32)).sgn()
    texture = torch.fft.irfft2(torch.fft.rfft2(images - mean).abs() * phases, s=(32, 32))
    texture = mean + texture * (1 + 4 * torch.rand(n, 1, 1, 1))
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij")
    angle, frequency, bend = torch.rand(3, n, 1, 1, 1)
    bend = 4 * bend * F.interpolate(torch.randn(n, 1, 4, 4), size=(32, 32), mode="bicubic")
    along = rows * (torch.pi * angle).sin() + columns * (torch.pi * angle).cos()
    stripes = ((6 + 30 * frequency) * along + bend).sin()
    kind = torch.randint(3, (n, 1, 1, 1))
    striped = mean + 0.4 * stripes * torch.randn(n, 3, 1, 1)
    return torch.where(kind == 0, shuffled, torch.where(kind == 1, texture, striped)).clamp(0, 1), stripes


def train_judge(seed=100, epochs=8):
    """A classifier of the drawn classes, and an eleventh for images that show no digit, on other draws: no attack, but
    noise, contrast, brightness, blur and stripes. Without the eleventh, any texture has to be a digit, and those of
    unattacked nets are taken for the digit asked for."""
    torch.manual_seed(seed)
    f, (x, y) = cem_sup.make_model("small-16").train(), cem_sup.draw(4000, seed)
    f.net[-1] = nn.Linear(f.net[-1].in_features, 11)
    optimizer = torch.optim.SGD(f.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * 63)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            b, u = to_float(x[batch]), torch.rand(6, len(batch), 1, 1, 1)
            none, stripes = no_digits(b)
            is_none = u[0] < 0.3
            b = torch.where(is_none, none, b + 0.3 * u[1] * stripes * torch.randn(len(b), 3, 1, 1))
            labels = torch.where(is_none.flatten(), 10, y[batch])
            mean = b.mean((1, 2, 3), keepdim=True)
            b = mean + (b - mean) * (0.4 + 1.6 * u[2]) + 0.3 * (u[3] - 0.5)
            b = torch.where(u[4] < 0.3, F.avg_pool2d(F.pad(b, (1,) * 4, mode="replicate"), 3, 1), b)
            b = (b + 0.2 * u[5] * torch.randn_like(b)).clamp(0, 1)
            loss = F.cross_entropy(f(b), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return f.eval()


@pytest.fixture(scope="session")
def judge():
    return train_judge(epochs=4)


# Smoke runs with few samples and, but for jeat, half of the training that README's tables are of. Twins and the
# control: the same net, data and updates without the attack.
SMOKES = {
    "cem_sup_smoke": "cem_sup --epochs 5 --test-images 100",
    "cem_sup_twin": "cem_sup --epochs 5 --test-images 100 --attack-steps 0 --sampler ta --sample-steps 0",
    "cem_unsup_smoke": "cem_unsup --epochs 3",
    "cem_unsup_twin": "cem_unsup --epochs 3 --attack-steps 0 --sampler maxent --start pooled --sample-steps 0",
    "jeat_smoke": "jeat --seed 1 --test-images 60",
    "jeat_twin": "jeat --seed 1 --test-images 60 --method at --attack-steps 0 --sampler noise --sample-steps 0",
    "binary_at_ebm_smoke": "binary_at_ebm --epochs 16",
    "binary_at_ebm_control": "binary_at_ebm --epochs 16 --attack-steps 0 --sampler ascent --ood-sets"}
DRAW = cache(cem_sup.draw)


def smoke(command, out):
    """A finished smoke run: its folder and its standard output."""
    name, *flags = command.split()
    script, stdout = importlib.import_module(name), io.StringIO()
    script.draw = DRAW
    with redirect_stdout(stdout), warnings.catch_warnings():
        warnings.simplefilter("error")
        script.main([*flags, "--smoke", "--num-samples", "20", "--out", str(out)])
    return SimpleNamespace(out=out, stdout=stdout.getvalue())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests that wait for smoke runs are slow, and come last: meanwhile these go on beside the others."""
    for item in items:
        if not SMOKES.keys().isdisjoint(item.fixturenames):
            item.add_marker("slow")
    items.sort(key=lambda item: not SMOKES.keys().isdisjoint(item.fixturenames))


@pytest.fixture(scope="session", autouse=True)
def smoke_runs(request, tmp_path_factory):
    """The smoke runs that the session's tests need, by name: futures of a second process, which does one at a time."""
    needed = dict.fromkeys(n for item in request.session.items for n in item.fixturenames if n in SMOKES)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    yield {name: pool.submit(smoke, SMOKES[name], tmp_path_factory.mktemp(name) / "run") for name in needed}
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.terminate()


def finished(name):
    return pytest.fixture(scope="session", name=name)(lambda smoke_runs: smoke_runs[name].result())


for _name in SMOKES:
    globals()[_name] = finished(_name)
