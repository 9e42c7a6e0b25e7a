"""cem_sup.py: the loss, the net, the schedule; the smoke run and its claims against controls; and, for the part that
all four scripts share, resume, results and bad input."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cem_sup
import conftest
import metrics
from conftest import DRAW, ROOT, classifier, no_digits, run_script, train_judge
from samplers import accuracy, ascend, cross_entropy, fit_gaussians, to_float

TINY = ("--smoke --batch-size 128 --limit 256 --num-samples 20 --epochs 2 --sample-steps 3 --attack-steps 1 "
        "--device cpu").split()


def few(n, seed):
    """256 to train on and 20 to test on are enough here."""
    return DRAW({2000: 256, 250: 20}.get(n, n), seed)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(cem_sup, "draw", few)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cem_sup, "draw", few)
        cem_sup.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture
def run(tiny, tmp_path):
    """A copy of a finished run of TINY."""
    return shutil.copytree(tiny, tmp_path / "run")


def results_of(out):
    return json.loads((out / "results.json").read_text())


def samples_of(out, name):
    return np.load(out / f"samples_{name}.npz")["arr_0"]


# ---------------------------------------------------------------- the method


def test_at_loss_is_cross_entropy_at_the_attacked_point():
    """Against the attack written by hand: eval mode, random start, normalised and projected steps; then train mode."""
    torch.manual_seed(0)
    f, x, y = cem_sup.make_model("small-16"), torch.rand(8, 3, 32, 32), torch.arange(8)
    by_hand = copy.deepcopy(f)
    torch.manual_seed(1)
    loss = cem_sup.at_loss(f.train(), x, y, steps=3, step_size=0.4, eps=1.0, norm="l2")

    def length(v):
        return v.flatten(1).norm(dim=1).view(8, 1, 1, 1)
    torch.manual_seed(1)
    radius, direction = torch.rand(8, 1, 1, 1), torch.randn(8, 3, 32, 32)
    x_hat = (x + radius * direction / length(direction)).clamp(0, 1)
    for _ in range(3):
        x_hat.requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(by_hand.eval()(x_hat), y, reduction="sum"), x_hat)
        d = x_hat.detach() + 0.4 * g / length(g) - x
        x_hat = (x + d / length(d).clamp(min=1)).clamp(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(by_hand.train()(x_hat), y), rtol=1e-4, atol=1e-5)
    assert f.training and torch.allclose(f.net[1].running_mean, by_hand.net[1].running_mean)


def test_no_attack_steps_is_plain_training_and_labels_are_checked():
    torch.manual_seed(0)
    f, x, y = cem_sup.make_model("small-16").train(), torch.rand(10, 3, 32, 32), torch.arange(10)
    plain = partial(cem_sup.at_loss, f, x, steps=0, step_size=0.1, eps=1.0, norm="l2")
    torch.testing.assert_close(plain(y), F.cross_entropy(f(x), y))
    torch.testing.assert_close(plain(y.to(torch.uint8)), plain(y))
    for bad in (y - 1, y + 1, y - 100):  # -100 is what F.cross_entropy would leave out
        with pytest.raises(ValueError, match="labels"):
            plain(bad)


def test_linf_attack_moves_every_pixel():
    torch.manual_seed(0)
    f, seen = cem_sup.make_model("small-16"), []
    handle = f.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    x = 0.3 + 0.4 * torch.rand(4, 3, 32, 32)
    cem_sup.at_loss(f, x, torch.arange(4), steps=40, step_size=0.02, eps=0.1, norm="linf")
    handle.remove()
    moved = (seen[-1] - x).abs()
    assert moved.max() <= 0.1 + 1e-6 and (moved > 0.099).double().mean() > 0.5  # most end on the ball's faces


@pytest.mark.parametrize("name, own, others", [("ta", 1, -1), ("langevin", 0, 1), ("cs", 1, 0), ("rcs", 1, 1)])
def test_sample_ascends_its_row_of_the_table(name, own, others):
    """One raw step is step_size (own * grad f_y + others * sum_k p_k grad f_k), in eval mode; the classes in turn."""
    torch.manual_seed(0)
    f, starts, step = cem_sup.make_model("small-16"), 0.4 + 0.2 * torch.rand(12, 3, 32, 32), 10.0
    args = cem_sup.parse_args(["--num-samples", "12", "--sample-batch-size", "9", "--sample-steps", "1",
                               "--sample-step-size", str(step), "--sample-norm", "none", "--device", "cpu"])
    queue = list(starts.split([9, 3]))
    images, labels, moved = cem_sup.sample(f.train(), name, lambda y: queue.pop(0), args)
    assert labels.tolist() == [*range(10), 0, 1] and f.training and images.dtype == torch.uint8
    x = starts.clone().requires_grad_()
    logits = f.eval()(x)
    g = torch.stack([torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in range(10)], 1)
    p = logits.softmax(1)[:, :, None, None, None]
    expected = step * (own * g[torch.arange(12), labels] + others * (p * g).sum(1)).detach()
    assert moved == pytest.approx(expected.flatten(1).norm(dim=1).mean().item(), rel=1e-3)
    assert (to_float(images) - starts - expected).abs().max() <= 0.5 / 255 + 1e-4
    assert expected.abs().max() > 3 / 255  # more than rounding


def test_sample_passes_its_path_on(monkeypatch):
    seen = []
    monkeypatch.setattr(cem_sup, "ascend", lambda score, x, *a, **k: seen.append((a, k)) or x)
    f, start = cem_sup.make_model("small-16"), lambda y: torch.rand(len(y), 3, 32, 32)
    flags = "--num-samples 4 --sample-steps 7 --sample-step-size 0.3 --sample-eps 2 --sample-noise 0.1"
    cem_sup.sample(f, "cs", start, cem_sup.parse_args([*flags.split(), "--sample-norm", "linf"]))
    assert seen == [((7, 0.3), dict(eps=2.0, norm="linf", noise=0.1))]


@pytest.mark.parametrize("arch, parameters",
                         [("resnet18", 11_173_962), ("resnet50", 23_520_842), ("small-32", 310_410)])
def test_nets(arch, parameters):
    """Sizes of the CIFAR ResNets everyone uses; [0, 1] in, float32 logits out, deterministic in eval mode."""
    f = cem_sup.make_model(arch).eval()
    assert sum(p.numel() for p in f.parameters()) == parameters
    size = 32 if arch.startswith("small") else 8  # quicker
    x, sizes = torch.rand(2, 3, size, size), []
    mean, std = torch.tensor([.4914, .4822, .4465]), torch.tensor([.2023, .1994, .2010])
    inside = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    if arch.startswith("resnet"):  # stride 1, no pooling
        f.net.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:]))
    with torch.no_grad():
        logits = f(x)
        torch.testing.assert_close(logits, f.net(inside))
        assert logits.shape == (2, 10) and all(s == (size, size) for s in sizes)
        with torch.autocast("cpu", torch.bfloat16):
            assert f(x).dtype == torch.float32


def test_drawn_digits(monkeypatch):
    """Two colours and what lies between, in turn, light on dark or dark on light: no pixel tells the digits apart."""
    monkeypatch.undo()
    x, y = cem_sup.draw(400, 0)
    assert x.dtype == torch.uint8 and x.shape == (400, 3, 32, 32) and y.tolist() == list(range(10)) * 40
    assert torch.equal(x, cem_sup.draw(400, 0)[0]) and not torch.equal(x, cem_sup.draw(400, 1)[0])
    grey, corner = x.double().mean(1), x.double().mean(1)[:, 0, 0]
    ink = (grey - corner.view(-1, 1, 1)).abs().flatten(1) > 30
    assert ((ink.double().mean(1) > 0.05) & (ink.double().mean(1) < 0.6)).all()  # a figure, on paper
    assert abs((corner > 128).double().mean() - 0.5) < 0.1
    template = grey.view(40, 10, 1024).mean(0)
    match = (grey.flatten(1) - grey.flatten(1).mean(1, keepdim=True)) @ (template - template.mean(0)).T
    assert (match.argmax(1) == y).double().mean() < 0.4


def test_defaults():
    """METHODS' values: robustness' schedule, Santurkar's attack and sampling path."""
    wanted = dict(arch="resnet50", norm="l2", attack_eps=0.5, attack_steps=7, attack_step_size=0.1, epochs=150,
                  batch_size=128, lr=0.1, lr_drops=[1 / 3, 2 / 3], schedule="steps", sample_norm="l2", sample_steps=60,
                  sample_eps=30, sample_step_size=0.5, sample_noise=0, start="class", seed_split="train", seed=0,
                  num_samples=50000, sampler=["ta", "langevin", "cs", "rcs"], limit=50000)
    args = vars(cem_sup.parse_args([]))
    assert {k: args[k] for k in wanted} == wanted
    running = {"small", "epochs", "data", "out", "device", "amp", "test_images", "sampler", "start", "seed_split",
               "num_samples",
               "sample_steps", "sample_step_size", "sample_eps", "sample_norm", "sample_noise", "sample_batch_size"}
    assert args.keys() - set(args["training_names"]) == running | {"training_names"}


def test_presets_are_defaults_only():
    smoke = cem_sup.parse_args(["--smoke", "--epochs", "3"])
    assert smoke.epochs == 3 and smoke.arch == "small-16" and smoke.out == "runs/cem_sup-smoke"
    small = cem_sup.parse_args(["--attack-steps", "0", "--small", "--out", "a"])
    assert small.attack_steps == 0 and small.arch == "small-32" and small.out == "a" and small.lr == 0.2


def test_schedules():
    rate = lambda flags, t: cem_sup.learning_rate(cem_sup.parse_args(flags.split()), t)  # noqa: E731
    steps = [rate("--lr 0.2", t) for t in (0, 49 / 150, 50 / 150, 99 / 150, 100 / 150, 149 / 150)]
    np.testing.assert_allclose(steps, [0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    cycle = [rate("--lr 0.2 --schedule cycle", t) for t in (0, 0.15, 0.3, 0.65, 1)]
    np.testing.assert_allclose(cycle, [0, 0.1, 0.2, 0.1, 0], atol=1e-12)


def test_optimiser_and_logged_loss(tmp_path, monkeypatch):
    """SGD as in robustness, its rate at each update; the log's loss is the mean over an epoch's batches."""
    seen, losses, at_loss = [], [], cem_sup.at_loss

    class SGD(torch.optim.SGD):
        def step(self):
            seen.append([self.param_groups[0][k] for k in ("lr", "momentum", "weight_decay", "nesterov")])
            super().step()

    def spy(*args, **attack):
        losses.append(at_loss(*args, **attack))
        assert attack == dict(steps=1, step_size=2.0, eps=2.0, norm="l2")
        return losses[-1]
    monkeypatch.setattr(torch.optim, "SGD", SGD)
    monkeypatch.setattr(cem_sup, "at_loss", spy)
    cem_sup.main([*TINY, "--out", str(tmp_path), "--schedule", "steps", "--lr-drops", "0.25", "0.5", "--sampler", "cs"])
    np.testing.assert_allclose(seen, [[lr, 0.9, 5e-4, False] for lr in (0.1, 0.01, 0.001, 0.001)])  # two an epoch
    logged = [json.loads(line)["loss"] for line in open(tmp_path / "log.jsonl")]
    np.testing.assert_allclose(logged, torch.stack(losses).detach().view(2, 2).mean(1), rtol=1e-5)


def test_pgd20(run, monkeypatch):
    calls = []
    monkeypatch.setattr(cem_sup, "accuracy", lambda f, x, y, *score, **attack: calls.append((*score, attack)) or 0.5)
    cem_sup.main([*TINY, "--out", str(run), "--sampler", "ta"])
    assert calls == [({},), (cross_entropy, dict(steps=20, step_size=2.5 * 2 / 20, eps=2.0, norm="l2"))]
    assert results_of(run)["accuracy"] == {"n": 20, "clean": 0.5, "pgd20": 0.5}


# ---------------------------------------------------------------- the smoke run and what it learns


@pytest.mark.slow
def test_smoke_writes_everything(cem_sup_smoke):
    out = cem_sup_smoke.out
    assert cem_sup_smoke.stdout.startswith(f"{out}: begins; small-16 on c")  # or on the GPU
    results = results_of(out)
    assert {"args", "versions", "device", "seconds", "accuracy", "samples"} == set(results)
    assert set(results["samples"]) == {"ta", "langevin", "cs", "rcs"} and results["args"]["sample_eps"] == 30
    for name, row in results["samples"].items():
        assert row["n"] == 20 and row["fid"] is None and "digits" in row["reason"] and 1 < row["moved"] < 15
        z = np.load(out / f"samples_{name}.npz")
        assert z["arr_0"].shape == (20, 32, 32, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].tolist() == list(range(10)) * 2
        assert Image.open(out / f"samples_{name}.png").size == (70, 342)  # a row per class
    epochs = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [r["epoch"] for r in epochs] == list(range(1, results["args"]["epochs"] + 1))
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]


def recognised(judge, name, f, x_0, labels):
    """Share of a sampler's images (of the seeds themselves for None) that the judge puts into the class asked for."""
    x = x_0 if name is None else ascend(cem_sup.SAMPLERS[name](f, labels), x_0, 30, 0.5, eps=30.0)
    return accuracy(judge, x, labels)


def learning(judge, run, twin, n=400, wanted=None):
    """Every figure of the claim, or those wanted, for a run and its unattacked twin, from the same seeds."""
    x, y = cem_sup.draw(2000, 0)
    labels, generator = torch.arange(n) % 10, torch.Generator().manual_seed(0)
    pooled = fit_gaussians(x).sample(labels, generator)
    per_class = fit_gaussians(x, y).sample(labels, generator)
    figures = {"pooled seeds": partial(recognised, judge, None, None, pooled, labels),
               "class seeds": partial(recognised, judge, None, None, per_class, labels)}
    attack = dict(score=cross_entropy, steps=20, step_size=0.25, eps=2.0)
    for who, f in {"attacked": classifier(run), "twin": classifier(twin)}.items():
        figures[f"{who} clean"] = partial(accuracy, f, *cem_sup.draw(500, 1))
        figures[f"{who} pgd20"] = partial(accuracy, f, *cem_sup.draw(500, 1), **attack)
        for name in ("ta", "cs"):
            figures[f"{who} {name} pooled"] = partial(recognised, judge, name, f, pooled, labels)
        figures[f"{who} rcs class"] = partial(recognised, judge, "rcs", f, per_class, labels)
    return {name: figure() for name, figure in figures.items() if name in (wanted or figures)}


@pytest.mark.slow
def test_attacked_training_learns_to_sample(cem_sup_smoke, cem_sup_twin, judge, monkeypatch):
    """After half of README's training ("Smoke runs and their controls"), where five seeds are."""
    monkeypatch.undo()
    figures = learning(judge, cem_sup_smoke.out, cem_sup_twin.out, 100, [
        "pooled seeds", "attacked ta pooled", "twin ta pooled", "attacked cs pooled", "twin cs pooled"])
    for who, run in {"attacked": cem_sup_smoke, "twin": cem_sup_twin}.items():
        figures[f"{who} pgd20"] = results_of(run.out)["accuracy"]["pgd20"]
    print(json.dumps(figures))
    assert figures["pooled seeds"] < 0.2
    assert figures["attacked ta pooled"] >= 0.5 and figures["attacked cs pooled"] >= 0.45
    for name in ("ta pooled", "cs pooled", "pgd20"):
        assert figures[f"twin {name}"] < figures[f"attacked {name}"] - 0.15


@pytest.mark.slow
def test_the_judge_knows_digits_and_what_is_none(judge):
    x, y = cem_sup.draw(500, 1)
    assert accuracy(judge, x, y) > 0.98
    torch.manual_seed(0)
    for none in (no_digits(to_float(x))[0], torch.rand(100, 3, 32, 32)):
        with torch.no_grad():
            assert (judge(none).argmax(1) == 10).double().mean() > 0.9


# ---------------------------------------------------------------- resume


def same_end(a, b):
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (one, two)]
    return (one["epoch"] == two["epoch"] and torch.equal(one["rng"], two["rng"])
            and all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
            and all(map(torch.equal, *momentum)) and results_of(a)["accuracy"] == results_of(b)["accuracy"]
            and all(np.array_equal(samples_of(a, n), samples_of(b, n)) for n in cem_sup.SAMPLERS))


def start_and_stop(out, flags, sign, when):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored, by heirs too
    process = subprocess.Popen([sys.executable, str(ROOT / "cem_sup.py"), *flags, "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not when() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(sign)
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.slow
def test_killed_and_interrupted_runs_end_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(cem_sup, "draw", DRAW)  # what the processes draw
    flags, out = [*TINY, "--epochs", "4", "--test-images", "20"], tmp_path / "stopped"
    cem_sup.main([*flags, "--out", str(tmp_path / "whole")])
    code, _ = start_and_stop(out, flags, signal.SIGKILL, lambda: (out / "checkpoint.pt").exists())
    assert code == -signal.SIGKILL
    epoch = torch.load(out / "checkpoint.pt", weights_only=True)["epoch"]
    assert epoch < 4
    saved = (out / "checkpoint.pt").stat().st_mtime_ns
    code, err = start_and_stop(out, flags, signal.SIGINT, lambda: (out / "checkpoint.pt").stat().st_mtime_ns > saved)
    assert code == 130 and err.strip().startswith("cem_sup.py: error: interrupted") and "Traceback" not in err
    cem_sup.main([*flags, "--out", str(out)])
    assert same_end(tmp_path / "whole", out)


def test_a_finished_run_samples_again_and_may_grow(run, capsys):
    weights = (run / "checkpoint.pt").read_bytes()
    cem_sup.main([*TINY, "--out", str(run), "--sampler", "cs", "--sample-steps", "4", "--num-samples", "10"])
    assert (run / "checkpoint.pt").read_bytes() == weights
    assert samples_of(run, "cs").shape[0] == 10 and samples_of(run, "ta").shape[0] == 20
    assert set(results_of(run)["samples"]) == {"cs"} and results_of(run)["args"]["sample_steps"] == 4
    capsys.readouterr()
    cem_sup.main([*TINY, "--out", str(run), "--epochs", "3", "--sampler", "cs"])
    assert "--epochs was 2" in capsys.readouterr().out
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] == 3


def test_every_sampler_starts_from_the_same_seeds(run):
    """Those that --start names, as the files do; langevin's images have a class from class-wise starts alone."""
    before = samples_of(run, "ta")
    still = [*TINY, "--out", str(run), "--sample-steps", "0"]
    cem_sup.main([*still, "--start", "fields"])
    fields = [samples_of(run, f"{n}-fields") for n in cem_sup.SAMPLERS]
    assert all(np.array_equal(fields[0], images) for images in fields)
    assert all(row["moved"] == 0 for row in results_of(run)["samples"].values())
    assert np.array_equal(samples_of(run, "ta"), before)  # other starts, other files
    names = ("langevin", "cs", "langevin-fields", "cs-fields")
    assert ["arr_1" in np.load(run / f"samples_{n}.npz") for n in names] == [True, True, False, True]
    cem_sup.main([*still, "--sampler", "rcs", "cs"])
    cem_sup.main([*still, "--seed-split", "test", "--sampler", "cs"])
    assert not np.array_equal(samples_of(run, "cs"), samples_of(run, "rcs"))  # other starts


def test_infinite_radii_are_strict_json(run):
    cem_sup.main([*TINY, "--out", str(run), "--sampler", "ta", "--sample-eps", "inf"])
    text = (run / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["args"]["sample_eps"] == "inf"


def test_scores_or_the_reason(tmp_path, monkeypatch, capsys):
    calls = []

    def score(paths, data, device):
        calls.append((paths, data, device))
        if data == "broken":
            raise OSError("no\nweights")
        return [{"file": p, "n": 20, "is_mean": 2.0, "is_std": 0.1, "fid": 50.0} for p in paths]
    monkeypatch.setattr(metrics, "score", score)
    args = cem_sup.parse_args(["--out", "o", "--data", "d"])
    rows = {"cs": {"n": 20, "moved": 1.0}, "ta": {"n": 20, "moved": 2.0}}
    args.device = "cpu"
    assert cem_sup.scored(args, rows)["cs"]["fid"] is None and not calls
    assert "python metrics.py o/samples_cs.npz o/samples_ta.npz" in capsys.readouterr().out
    args.device = "cuda"
    scored = cem_sup.scored(args, rows)
    assert calls == [(["o/samples_cs.npz", "o/samples_ta.npz"], "d", "cuda")]
    assert scored["ta"]["fid"] == 50.0 and scored["ta"]["moved"] == 2.0 and scored["ta"]["reason"] is None
    args.data = "broken"
    assert cem_sup.scored(args, rows)["ta"] == {"n": 20, "moved": 2.0, "is_mean": None, "is_std": None, "fid": None,
                                                "reason": "no weights"}


# ---------------------------------------------------------------- bad input


error = partial(conftest.error, cem_sup)


@pytest.mark.parametrize("flags, words", [
    ("--no-such-flag", "--no-such-flag"), ("--epoch 3", "--epoch"), ("--arch vgg", "vgg"),
    ("--batch-size 0", "not in 1"), ("--lr nan", "not in"), ("--attack-steps -1", "not in"),
    ("--attack-eps inf", "not in"), ("--epochs x", "int"), ("--lr-drops 50 100", "50 is not in 0 ... 1"),
    ("--sampler gan", "gan"), ("--device tpu", "tpu"), ("--norm l1", "l1"), ("--limit 5", "ten classes"),
    (f"--seed {2 ** 65}", "not in"), ("--sample-step-size inf", "not in"),
    ("--start no.npy", "no.npy")])
def test_wrong_flags(flags, words, capsys, tmp_path):
    assert words in error(capsys, "--smoke", "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_data_and_no_network(tmp_path):
    nowhere = {k: "http://127.0.0.1:9" for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = run_script("cem_sup", "--data", tmp_path / "data", "--out", tmp_path / "out", env=nowhere, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and not (tmp_path / "out").exists()
    assert "--data" in lines[0] and "--smoke" in lines[0]


def test_unusable_out(run, tmp_path, capsys):
    assert "attack_eps was 2.0, is 1.0" in error(capsys, *TINY, "--out", run, "--attack-eps", 1)
    assert "cannot be fewer" in error(capsys, *TINY, "--out", run, "--epochs", 1)
    checkpoint = run / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)

    class Pickle:
        def __reduce__(self):
            return Path.touch, (tmp_path / "loaded",)
    broken = {**state, "model": {"a": torch.zeros(1)}}
    other_script = {**state, "flags": {**state["flags"], "script": "jeat"}}
    for content, words in ((state, ""), ({"state_dict": {}}, "damaged or foreign"), (Pickle(), "damaged or foreign"),
                           (broken, "damaged or foreign"), (other_script, "script was jeat")):
        torch.save(content, checkpoint)
        if words:
            before = checkpoint.read_bytes()
            assert words in error(capsys, *TINY, "--out", run) and checkpoint.read_bytes() == before
    assert not (tmp_path / "loaded").exists()
    checkpoint.write_bytes(b"PK half")
    assert "damaged or foreign" in error(capsys, *TINY, "--out", run)
    (tmp_path / "file").write_text("")
    error(capsys, *TINY, "--out", tmp_path / "file" / "below")


def test_a_bare_smoke_run_begins_afresh(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/cem_sup-smoke")
    cem_sup.main([*TINY, "--seed", "5", "--sampler", "ta", "--epochs", "1"])
    assert "runs/cem_sup-smoke: begins" in capsys.readouterr().out


def test_divergence_stops_and_keeps_the_last_good_checkpoint(run, capsys, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()

    def last_step_breaks(f, x, y, **attack):  # a finite loss whose gradient is not
        return (f(x) ** 2 * 0).sum().sqrt()
    at_loss = cem_sup.at_loss
    for loss in (last_step_breaks, lambda *args, **attack: at_loss(*args, **attack) * float("nan")):
        monkeypatch.setattr(cem_sup, "at_loss", loss)
        line = error(capsys, *TINY, "--epochs", 3, "--out", run)
        assert "diverged" in line or "NaN" in line
        assert (run / "checkpoint.pt").read_bytes() == before


def test_out_of_memory_and_broken_samples_are_one_line(run, capsys, monkeypatch):
    def full(f, sampler, start, args):
        raise failure
    for failure in (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"), MemoryError("numpy"),
                    RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with monkeypatch.context() as patch:
            patch.setattr(cem_sup, "sample", full)
            assert "--sample-batch-size" in error(capsys, *TINY, "--out", run)
    failure = RuntimeError("an illegal memory access")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="illegal"):
        patch.setattr(cem_sup, "sample", full)
        cem_sup.main([*TINY, "--out", str(run)])
    nan = lambda f, y: lambda x: f(x)[:, 0] * float("nan")  # noqa: E731
    monkeypatch.setitem(cem_sup.SAMPLERS, "cs", nan)
    assert "20 of 20 samples" in error(capsys, *TINY, "--out", run, "--sampler", "cs")
    assert "not both" in error(capsys, *TINY, "--small", "--out", run)


# ---------------------------------------------------------------- real data, CUDA


@pytest.mark.data
def test_real_data(tmp_path):
    run_script("cem_sup", "--small", "--data", os.environ["CIFAR10_ROOT"], "--out", tmp_path, "--arch", "small-16",
               "--epochs", 3, "--limit", 256, "--num-samples", 20, "--sample-steps", 3, "--device", "cpu",
               "--batch-size", 32, "--lr", 0.05)
    epochs = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    results = results_of(tmp_path)
    assert results["accuracy"]["pgd20"] <= results["accuracy"]["clean"]


@pytest.mark.cuda
def test_smoke_on_cuda(tmp_path):
    run_script("cem_sup", "--smoke", "--device", "cuda", "--out", tmp_path)
    assert results_of(tmp_path)["args"]["amp"] and results_of(tmp_path)["accuracy"]["pgd20"] > 0.4


@pytest.mark.cuda
def test_bf16_attack_is_as_strong_as_float32(cem_sup_smoke):
    f, (x, y) = classifier(cem_sup_smoke.out).cuda(), (t.cuda() for t in cem_sup.draw(2000, 7))
    attack = dict(steps=20, step_size=0.25, eps=2.0)
    plain = accuracy(f, x, y, cross_entropy, **attack)
    with torch.autocast("cuda", torch.bfloat16):
        fast = accuracy(f.to(memory_format=torch.channels_last), x, y, cross_entropy, **attack)
    assert abs(plain - fast) <= 0.01


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_cem_sup.py RUN TWIN: the figures of README's table
    print(json.dumps(learning(train_judge(), *map(Path, sys.argv[1:3])), indent=1))
