"""Runs of the scripts and the judge, shared by the tests of a session. The judge and the unattacked twins live here:
they are controls of the claims, no part of the methods."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait for a busy core sleep

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

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


def smoke(name, out, *flags):
    """A finished smoke run: its folder, its output and, for cem_sup, its classifier."""
    return SimpleNamespace(out=out, stdout=run_script(name, "--smoke", "--out", out, *flags).stdout)


def classifier(out):
    f = cem_sup.make_model("small")
    f.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    return f.eval()


@pytest.fixture(scope="session")
def cem_sup_smoke(tmp_path_factory):
    return smoke("cem_sup", tmp_path_factory.mktemp("cem_sup") / "run")


@pytest.fixture(scope="session")
def cem_sup_twin(tmp_path_factory):
    """The unattacked twin: the same net, data and updates, without the attack; of its samples only a few."""
    return smoke("cem_sup", tmp_path_factory.mktemp("cem_sup") / "twin", "--attack-steps", 0, "--sampler", "ta",
                 "--sample-steps", 0, "--limit-test", 50)


def train_judge(seed=100, epochs=8):
    """A classifier of the drawn classes on other draws: no attack, but noise, contrast, brightness and blur, so that
    it neither calls noise a class nor mistakes saturated samples."""
    torch.manual_seed(seed)
    f, (x, y) = cem_sup.make_model("small").train(), cem_sup.draw(4000, seed)
    optimizer = torch.optim.SGD(f.parameters(), 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * 63)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            b, u = to_float(x[batch]), torch.rand(5, len(batch), 1, 1, 1)
            mean = b.mean((1, 2, 3), keepdim=True)
            b = mean + (b - mean) * (0.4 + 1.6 * u[0]) + 0.3 * (u[1] - 0.5)
            b = torch.where(u[2] < 0.3, F.avg_pool2d(F.pad(b, (1,) * 4, mode="replicate"), 3, 1), b)
            b = (b + 0.2 * u[3] * torch.randn_like(b)).clamp(0, 1)
            loss = F.cross_entropy(f(b), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return f.eval()


@pytest.fixture(scope="session")
def judge():
    return train_judge()


@pytest.fixture(scope="session")
def cem_unsup_smoke(tmp_path_factory):
    return smoke("cem_unsup", tmp_path_factory.mktemp("cem_unsup") / "run")


@pytest.fixture(scope="session")
def cem_unsup_twin(tmp_path_factory):
    """The same net, data and updates, without the attack; of its samples only a few: the tests draw their own."""
    return smoke("cem_unsup", tmp_path_factory.mktemp("cem_unsup") / "twin", "--attack-steps", 0,
                 "--sampler", "maxent", "--start", "pooled", "--sample-steps", 0, "--limit-test", 50)


@pytest.fixture(scope="session")
def binary_at_ebm_smoke(tmp_path_factory):
    return smoke("binary_at_ebm", tmp_path_factory.mktemp("binary_at_ebm") / "run")


@pytest.fixture(scope="session")
def binary_at_ebm_control(tmp_path_factory):
    """The same net, data and updates at K = 0: p_0's images as they are; of its samples only a few."""
    return smoke("binary_at_ebm", tmp_path_factory.mktemp("binary_at_ebm") / "control", "--attack-steps", 0,
                 "--sampler", "ascent", "--num-samples", 10, "--ood-sets")


def jeat_classifier(out):
    import jeat
    f = jeat.make_model("small")
    f.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    return f.eval()


@pytest.fixture(scope="session")
def jeat_smoke(tmp_path_factory):
    return smoke("jeat", tmp_path_factory.mktemp("jeat") / "run")


@pytest.fixture(scope="session")
def jeat_twin(tmp_path_factory):
    """The unattacked twin: the same net, data and updates, without attack and p(x); of its samples only a few."""
    return smoke("jeat", tmp_path_factory.mktemp("jeat") / "twin", "--method", "at", "--attack-steps", 0,
                 "--sampler", "noise", "--sample-steps", 0)
