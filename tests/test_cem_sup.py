"""cem_sup.py: the loss, the net, the augmentation; the smoke run and its claims against controls; resume; bad input."""
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
import metrics
import conftest
from conftest import ROOT, classifier, run_script, train_judge
from samplers import accuracy, cross_entropy, fit_gaussians, to_float

TINY = ["--smoke", "--limit-train", "256", "--limit-test", "20", "--num-samples", "20", "--epochs", "2",
        "--sample-steps", "3", "--attack-steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    cem_sup.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture
def run(tiny, tmp_path):
    """A copy of a finished run of TINY."""
    return shutil.copytree(tiny, tmp_path / "run")


# ---------------------------------------------------------------- the method


def test_at_loss_is_cross_entropy_at_the_attacked_point():
    """Against the attack written by hand: eval mode, random start, normalised and projected steps; then train mode."""
    torch.manual_seed(0)
    f, x, y = cem_sup.make_model("small"), torch.rand(8, 3, 32, 32), torch.arange(8)
    by_hand = copy.deepcopy(f)
    torch.manual_seed(1)
    loss = cem_sup.at_loss(f.train(), x, y, steps=3, step_size=0.4, eps=1.0)

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


def test_no_attack_steps_is_plain_training():
    torch.manual_seed(0)
    f, x, y = cem_sup.make_model("small").train(), torch.rand(8, 3, 32, 32), torch.arange(8)
    assert torch.equal(cem_sup.at_loss(f, x, y, steps=0), F.cross_entropy(f(x), y))


def test_linf_attack_moves_every_pixel():
    torch.manual_seed(0)
    f, seen = cem_sup.make_model("small"), []
    handle = f.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    x = 0.3 + 0.4 * torch.rand(4, 3, 32, 32)
    cem_sup.at_loss(f, x, torch.arange(4), steps=40, step_size=0.02, eps=0.1, norm="linf")
    handle.remove()
    moved = (seen[-1] - x).abs()
    assert moved.max() <= 0.1 + 1e-6 and (moved > 0.099).double().mean() > 0.5  # most end on the ball's faces


@pytest.mark.parametrize("name, own, others", [("ta", 1, -1), ("langevin", 0, 1), ("cs", 1, 0), ("rcs", 1, 1)])
def test_samplers_ascend_their_row_of_the_table(name, own, others):
    """One raw step is step_size times own * grad f_y + others * sum_k p_k grad f_k, in eval mode."""
    torch.manual_seed(0)
    f, x, y = cem_sup.make_model("small").double(), torch.rand(3, 3, 32, 32).double(), torch.tensor([1, 4, 7])
    f.forward = lambda x: f.net((x - f.mean) / f.std)  # float64 throughout
    moved = cem_sup.sample(name, f.train(), x, y, steps=1, step_size=0.01, norm="none") - x
    x.requires_grad_()
    logits = f.eval()(x)
    g = torch.stack([torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in range(10)], 1)
    p = logits.softmax(1)[:, :, None, None, None]
    expected = own * g[torch.arange(3), y] + others * (p * g).sum(1)
    inside = ((x + 0.01 * expected) > 0) & ((x + 0.01 * expected) < 1)
    torch.testing.assert_close(moved[inside], 0.01 * expected[inside])
    assert inside.double().mean() > 0.9


def test_starts():
    """Class-wise and pooled Gaussians of the images given, or uniform noise."""
    y = torch.arange(400) % 2
    x = (0.4 + 0.2 * y.view(-1, 1, 1, 1) + 0.01 * torch.randn(400, 3, 4, 4)).clamp(0, 1)
    generator = torch.Generator().manual_seed(0)
    mean = {kind: cem_sup.starts(kind, x, y, generator)(torch.tensor([0, 1]).repeat(500)).mean((1, 2, 3))
            for kind in ("class", "pooled", "noise")}
    assert (mean["class"].view(500, 2).mean(0) - torch.tensor([0.4, 0.6])).abs().max() < 0.005
    assert (mean["pooled"].view(500, 2).mean(0) - 0.5).abs().max() < 0.02
    assert abs(mean["pooled"].std().item() - 0.1) < 0.01
    assert abs(mean["noise"].std().item() - (1 / 12 / 48) ** 0.5) < 0.005


@pytest.mark.parametrize("arch, parameters", [("resnet18", 11_173_962), ("resnet50", 23_520_842)])
def test_cifar_resnet(arch, parameters):
    """Sizes of the CIFAR ResNets everyone uses; [0, 1] in, float32 logits out, deterministic in eval mode."""
    f = cem_sup.make_model(arch).eval()
    assert sum(p.numel() for p in f.parameters()) == parameters
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x).dtype == torch.float32 and f(x).shape == (2, 10)
    assert torch.equal(f(x), f(x))
    f(x).sum().backward()
    assert x.grad.abs().sum() > 0
    mean, std = torch.tensor([.4914, .4822, .4465]), torch.tensor([.2023, .1994, .2010])
    inside = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    torch.testing.assert_close(f(x), f.net(inside))
    assert f.net.layer1(f.net.relu(f.net.bn1(f.net.conv1(inside)))).shape[2:] == (32, 32)  # stride 1, no pooling


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_flip_gives_crops_of_the_padded_image(mode):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8)
    padded = F.pad(x, (4,) * 4, mode=mode)
    where = [(i, j, flip) for i in range(9) for j in range(9) for flip in (0, 1)]
    crops = [padded[:, :, i:i + 8, j:j + 8].flip(3) if flip else padded[:, :, i:i + 8, j:j + 8] for i, j, flip in where]
    crops = torch.stack(crops, 1)  # all 162 of each image
    seen = []  # (row offset, column offset, flip) of both images in 600 calls
    for _ in range(600):
        found = (crops == cem_sup.crop_flip(x, mode=mode)[:, None]).flatten(2).all(2)
        seen += [where[row.nonzero()[0]] for row in found]
    if mode == "constant":  # (a reflected window can equal the flip of another)
        seen = np.array(seen).reshape(600, 6).T  # six numbers, each uniform, independent of each other
        for values in seen:
            share = np.bincount(values) / 600
            assert len(share) in (2, 9) and np.abs(share - 1 / len(share)).max() < 0.06
        assert np.abs(np.corrcoef(seen) - np.eye(6)).max() < 0.2


def test_drawn_classes():
    x, y = cem_sup.draw(200, 0)
    again, other = cem_sup.draw(200, 0)[0], cem_sup.draw(200, 1)[0]
    assert x.dtype == torch.uint8 and x.shape == (200, 3, 32, 32) and y.tolist() == list(range(10)) * 20
    assert torch.equal(x, again) and not torch.equal(x, other)
    coarse = F.avg_pool2d(x[:10].float().mean(1), 16).flatten(1).round()  # README's figures rest on these very images
    golden = [[97, 97, 98, 98], [82, 81, 82, 98], [116, 137, 136, 141], [85, 48, 50, 25], [139, 139, 22, 22],
              [85, 100, 86, 100], [113, 112, 93, 93], [99, 100, 99, 100], [96, 100, 97, 94], [56, 57, 61, 61]]
    assert (coarse - torch.tensor(golden)).abs().max() <= 1


def test_defaults():
    """METHODS' values: robustness' schedule, Santurkar's attack and sampling path."""
    wanted = dict(arch="resnet50", norm="l2", attack_eps=0.5, attack_steps=7, attack_step_size=0.1, epochs=150,
                  batch_size=128, lr=0.1, lr_drops=[1 / 3, 2 / 3], sample_norm="l2", sample_steps=60, sample_eps=30,
                  sample_step_size=0.5, sample_noise=0, start="class", seed_split="train", num_samples=50000, seed=0,
                  sampler=["ta", "langevin", "cs", "rcs"], cuda_graphs=False)
    args = vars(cem_sup.parse_args([]))
    assert {k: args[k] for k in wanted} == wanted
    assert cem_sup.at_loss.__defaults__ == (7, 0.1, 0.5, "l2")
    assert cem_sup.sample.__defaults__ == (60, 0.5, 30.0, "l2", 0.0, None)


# ---------------------------------------------------------------- the smoke run and what it learns


@pytest.mark.slow
def test_smoke_writes_everything(cem_sup_smoke):
    out = cem_sup_smoke.out
    assert cem_sup_smoke.stdout.startswith(f"{out}: 0 of 12 epochs are done; small on c")  # or on the GPU
    results = json.loads((out / "results.json").read_text())
    assert {"args", "versions", "device", "seconds", "accuracy", "samples"} <= set(results)
    assert set(results["samples"]) == {"ta", "langevin", "cs", "rcs"}
    for name, row in results["samples"].items():
        assert row["n"] == 100 and row["fid"] is None and "smoke" in row["reason"]
        z = np.load(out / f"samples_{name}.npz")
        assert z["arr_0"].shape == (100, 32, 32, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].tolist() == list(range(10)) * 10
        assert Image.open(out / f"samples_{name}.png").size == (342, 342)  # a row per class
    epochs = [r for r in map(json.loads, open(out / "log.jsonl")) if r["event"] == "epoch"]
    assert [r["epoch"] for r in epochs] == list(range(1, 13))
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert [round(r["lr"], 6) for r in epochs] == [0.1] * 9 + [0.01] * 2 + [0.001]  # drops at 0.7 and 0.9 of 12
    f, (x, y) = classifier(out), [t[:300] for t in cem_sup.draw(1000, 1)]
    assert results["accuracy"]["clean"] == accuracy(f, x, y)
    pgd20 = accuracy(f, x, y, cross_entropy, steps=20, step_size=2.5 * 3 / 20, eps=3.0)  # README's protocol
    assert abs(results["accuracy"]["pgd20"] - pgd20) <= 0.01
    x_0 = cem_sup.starts("class", *cem_sup.draw(2000, 0), torch.Generator().manual_seed(0))(torch.arange(100) % 10)
    moved = cem_sup.sample("cs", f, x_0, torch.arange(100) % 10, steps=30)
    written = to_float(torch.from_numpy(np.load(out / "samples_cs.npz")["arr_0"])).permute(0, 3, 1, 2)
    assert (moved - written).abs().mean() < 0.02


def recognised(judge, name, f, x_0, labels):
    """Share of a sampler's images (of the seeds themselves for None) that the judge puts into the class asked for."""
    x = x_0 if name is None else cem_sup.sample(name, f, x_0, labels, steps=30)
    return accuracy(judge, x, labels)


def learning(judge, run, twin, n=400, wanted=None):
    """Every figure of the claim, or those wanted, for a run and its unattacked twin, from the same seeds."""
    x, y = cem_sup.draw(2000, 0)
    labels, generator = torch.arange(n) % 10, torch.Generator().manual_seed(0)
    pooled = fit_gaussians(x).sample(n, generator=generator)
    per_class = fit_gaussians(x, y).sample(labels, generator=generator)
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
def test_attacked_training_learns_to_sample(cem_sup_smoke, cem_sup_twin, judge):
    """Bounds lie below the worst of five seeds: see README, "Smoke runs and their controls"."""
    figures = learning(judge, cem_sup_smoke.out, cem_sup_twin.out, 200, [
        "pooled seeds", "attacked ta pooled", "attacked cs pooled", "twin cs pooled", "attacked pgd20", "twin pgd20"])
    print(json.dumps(figures))
    x, y = cem_sup.draw(1000, 1)
    assert accuracy(judge, x, y) > 0.98  # the judge knows the classes
    assert figures["pooled seeds"] < 0.2
    assert figures["attacked ta pooled"] >= 0.8 and figures["attacked cs pooled"] >= 0.8
    assert figures["twin cs pooled"] < figures["attacked cs pooled"] - 0.1
    assert figures["twin pgd20"] < figures["attacked pgd20"] - 0.25


# ---------------------------------------------------------------- resume


def same_end(a, b):
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (one, two)]
    samples = [[np.load(out / f"samples_{n}.npz")["arr_0"] for n in cem_sup.SAMPLERS] for out in (a, b)]
    accuracies = [json.loads((out / "results.json").read_text())["accuracy"] for out in (a, b)]
    return (one["epoch"] == two["epoch"] and torch.equal(one["rng"], two["rng"])
            and all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
            and all(map(torch.equal, *momentum)) and all(map(np.array_equal, *samples))
            and accuracies[0] == accuracies[1])


def start_and_stop(out, flags, sign, when):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored, by heirs too
    process = subprocess.Popen([sys.executable, str(ROOT / "cem_sup.py"), *flags, "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not when() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.slow
def test_killed_and_interrupted_runs_end_where_an_uninterrupted_one_does(tmp_path):
    flags = [*TINY, "--epochs", "6"]
    cem_sup.main([*map(str, flags), "--out", str(tmp_path / "whole")])
    out = tmp_path / "stopped"
    code, _ = start_and_stop(out, flags, signal.SIGKILL, lambda: (out / "checkpoint.pt").exists())
    assert code == -signal.SIGKILL
    epoch = torch.load(out / "checkpoint.pt", weights_only=True)["epoch"]
    assert epoch < 6
    code, err = start_and_stop(out, flags, signal.SIGINT, lambda: (out / "checkpoint.pt").exists() and torch.load(
        out / "checkpoint.pt", weights_only=True)["epoch"] > epoch)
    assert code == 130 and err.strip().startswith("cem_sup.py: error: interrupted") and "Traceback" not in err
    cem_sup.main([*map(str, flags), "--out", str(out)])
    assert same_end(tmp_path / "whole", out)
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_what_is_done_is_not_done_again(run, capsys):
    out = run
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in out.glob("*") if p.suffix in (".pt", ".npz")}  # noqa: E731
    first = stamps()
    cem_sup.main([*TINY, "--out", str(out)])
    assert stamps() == first
    cem_sup.main([*TINY, "--out", str(out), "--sampler", "cs", "rcs", "--sample-steps", "4"])  # sampling flags are free
    changed = {name for name, stamp in stamps().items() if stamp != first[name]}
    assert changed == {"samples_cs.npz", "samples_rcs.npz"}
    capsys.readouterr()
    cem_sup.main([*TINY, "--out", str(out), "--epochs", "3"])  # may grow
    assert "--epochs was 2" in capsys.readouterr().out
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 3 and "accuracy clean" in json.loads((out / "results.json").read_text())["done"]
    capsys.readouterr()
    cem_sup.main(["--eval-only", "--out", str(out), "--device", "cpu", "--num-samples", "10", "--limit-test", "10",
                  "--attack-eps", "1"])
    said, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert np.load(out / "samples_ta.npz")["arr_0"].shape == (10, 32, 32, 3)
    assert "attack_eps was 3.0, is 1.0" in said and "accuracy clean: already" not in said  # of other images
    flags = ("attack_eps", "limit_train", "batch_size", "limit_test")
    assert [results["args"][k] for k in flags] == [3.0, 256, 128, 10]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 3


def test_pgd20_is_that_of_the_readme(run, monkeypatch):
    calls = []
    monkeypatch.setattr(cem_sup, "accuracy", lambda f, x, y, progress, **attack: calls.append(attack) or 0.5)
    cem_sup.main([*TINY, "--out", str(run), "--limit-test", "10", "--sampler", "ta"])
    assert calls == [{}, dict(score=cross_entropy, steps=20, step_size=2.5 * 3 / 20, eps=3.0, norm="l2")]


@pytest.mark.slow
def test_results_belong_to_their_training(run, capsys):
    """Without its checkpoint a run is trained again: nothing of the old results stays."""
    (run / "checkpoint.pt").unlink()
    capsys.readouterr()
    cem_sup.main([*TINY, "--out", str(run), "--seed", "5", "--sampler", "cs"])
    assert "already" not in capsys.readouterr().out
    assert set(json.loads((run / "results.json").read_text())["samples"]) == {"cs"}


@pytest.mark.slow
def test_an_interrupted_phase_is_done_again(tmp_path, monkeypatch):
    """A stop between a sampler's file and its row in results.json must not leave the row of the file before."""
    flags = [*TINY, "--out", str(tmp_path), "--sampler", "cs"]
    cem_sup.main(flags)
    before = np.load(tmp_path / "samples_cs.npz")["arr_0"]
    log = cem_sup.log

    def stop(args, results=None, **fields):
        if fields["event"] == "samples cs":
            raise OSError("stopped")
        log(args, results, **fields)
    monkeypatch.setattr(cem_sup, "log", stop)
    with pytest.raises(SystemExit):
        cem_sup.main([*flags, "--sample-steps", "9"])
    assert not np.array_equal(np.load(tmp_path / "samples_cs.npz")["arr_0"], before)
    monkeypatch.setattr(cem_sup, "log", log)
    cem_sup.main([*flags, "--sampler", "ta"])
    assert set(json.loads((tmp_path / "results.json").read_text())["samples"]) == {"ta"}
    cem_sup.main(flags)
    assert np.array_equal(np.load(tmp_path / "samples_cs.npz")["arr_0"], before)
    (tmp_path / "samples_cs.npz").unlink()
    cem_sup.main(flags)
    assert np.array_equal(np.load(tmp_path / "samples_cs.npz")["arr_0"], before)


def test_a_stop_beside_the_new_checkpoint_leaves_no_old_results(run, monkeypatch):
    """results.json of epoch 2, then a stop right after the checkpoint of epoch 3 has replaced that of epoch 2."""
    flags, replace = [*TINY, "--out", str(run), "--sampler", "cs"], cem_sup.replace_files

    def stop(files):
        replace(files)
        raise OSError("stopped")
    old = (run / "results.json").read_bytes()
    monkeypatch.setattr(cem_sup, "replace_files", stop)
    with pytest.raises(SystemExit):
        cem_sup.main([*flags, "--epochs", "3"])
    assert (run / "results.json").read_bytes() == old
    monkeypatch.setattr(cem_sup, "replace_files", replace)
    monkeypatch.setattr(cem_sup, "accuracy", lambda *a, **k: 0.25)  # evaluated again
    cem_sup.main([*flags, "--epochs", "3"])
    results = json.loads((run / "results.json").read_text())
    assert results["accuracy"] == {"clean": 0.25, "pgd20": 0.25} and results["epoch"] == 3


def test_scores_are_written_skipped_redone_and_null_with_a_reason(tmp_path, monkeypatch):
    calls, flags = [], [*TINY, "--out", str(tmp_path), "--sampler", "cs", "rcs"]

    def row(name):
        return json.loads((tmp_path / "results.json").read_text())["samples"][name]

    def score(paths, data, reference, weights, device):
        calls.append((len(paths), weights, device))
        if weights == "absent.pth":
            raise OSError("no such file")
        return [{"file": p, "n": 20, "is_mean": 2.0, "is_std": 0.1, "fid": 50.0} for p in paths]
    monkeypatch.setattr(metrics, "score", score)
    cem_sup.main(flags)
    assert row("cs")["fid"] is None and "smoke" in row("cs")["reason"] and not calls

    def scored(weights):  # as a run on real images would
        args = cem_sup.parse_args([*flags, *(["--inception-weights", weights] if weights else [])])
        args.smoke = False
        results = json.loads((tmp_path / "results.json").read_text())
        cem_sup.score_samples(args, results, args.sampler)
    scored(None)
    assert "--inception-weights" in row("cs")["reason"] and not calls
    rows = {"a.npz": {}}
    metrics.score_rows(rows, "data", device="cuda")  # there without being told to
    assert calls.pop() == (1, None, "cuda") and rows["a.npz"]["fid"] == 50.0
    scored("absent.pth")
    assert len(calls) == 1 and row("rcs")["fid"] is None and "no such file" in row("rcs")["reason"]
    scored("a.pth")
    assert calls[1:] == [(2, "a.pth", "cpu")] and row("rcs")["fid"] == 50.0 and row("rcs")["reason"] is None
    scored("b.pth")
    assert len(calls) == 2  # what is scored stays


def test_learning_rate_and_weight_decay(tmp_path, monkeypatch):
    seen = []

    class SGD(torch.optim.SGD):
        def step(self):
            seen.append([self.param_groups[0][k] for k in ("lr", "momentum", "weight_decay")])
            super().step()
    monkeypatch.setattr(torch.optim, "SGD", SGD)
    cem_sup.main([*TINY, "--out", str(tmp_path), "--epochs", "4", "--lr-drops", "0.5", "0.75", "--sampler", "cs"])
    rates = [0.1] * 4 + [0.01] * 2 + [0.001] * 2  # two updates an epoch
    np.testing.assert_allclose(seen, [[lr, 0.9, 5e-4] for lr in rates])


def test_every_sampler_starts_from_the_same_seeds(run):
    cem_sup.main([*TINY, "--out", str(run), "--sample-steps", "0", "--start", "noise"])
    images = [np.load(run / f"samples_{n}.npz")["arr_0"] for n in cem_sup.SAMPLERS]
    assert all(np.array_equal(images[0], i) for i in images) and abs(images[0].mean() - 127.5) < 2
    cem_sup.main([*TINY, "--out", str(run), "--sample-steps", "0", "--seed-split", "test"])
    test_split = np.load(run / "samples_ta.npz")["arr_0"]
    cem_sup.main([*TINY, "--out", str(run), "--sample-steps", "0", "--seed-split", "test", "--limit-test", "100"])
    assert not np.array_equal(test_split, np.load(run / "samples_ta.npz")["arr_0"])  # other Gaussians


# ---------------------------------------------------------------- bad input


error = partial(conftest.error, cem_sup)


@pytest.mark.parametrize("flags, words", [
    (["--no-such-flag"], "--no-such-flag"), (["--epoch", "3"], "--epoch"), (["--arch", "vgg"], "vgg"),
    (["--batch-size", "0"], "must be > 0"), (["--num-samples", "-1"], "must be > 0"), (["--lr", "nan"], "must be"),
    (["--attack-steps", "-1"], "must be >= 0"), (["--attack-eps", "-0.5"], "must be >= 0"), (["--epochs", "x"], "int"),
    (["--attack-eps", "inf"], "finite"), (["--sample-noise", "-1"], "must be >= 0"), (["--sampler", "gan"], "gan"),
    (["--device", "cuda:99"], "cuda:99"), (["--limit-train", "5"], "ten classes"), (["--seed", str(2 ** 65)], "finite"),
    (["--sample-step-size", "inf"], "finite"), (["--limit-train", "0"], "must be > 0"), (["--norm", "l1"], "l1")])
def test_wrong_flags(flags, words, capsys, tmp_path):
    assert words in error(capsys, "--smoke", "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_data_and_no_network(tmp_path):
    nowhere = {k: "http://127.0.0.1:9" for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = run_script("cem_sup", "--data", tmp_path / "data", "--out", tmp_path / "out", env=nowhere, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and not (tmp_path / "out").exists()
    assert "--data" in lines[0] and "--smoke" in lines[0]


def test_broken_data(tmp_path, capsys):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"broken")
    assert "damaged" in error(capsys, "--data", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unusable_out(tiny, tmp_path, capsys, monkeypatch):
    good, out = tiny, tmp_path / "copy"

    def copy():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(good, out)
        return out / "checkpoint.pt"
    assert "attack_eps was 3.0, is 2.0" in error(capsys, *TINY, "--out", copy().parent, "--attack-eps", 2)
    assert "2 epochs" in error(capsys, *TINY, "--out", out, "--epochs", 1)
    checkpoint = copy()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    before = checkpoint.read_bytes()
    assert "damaged or foreign" in error(capsys, *TINY, "--out", out)
    assert checkpoint.read_bytes() == before
    torch.save({"state_dict": {}}, checkpoint)
    assert "damaged or foreign" in error(capsys, *TINY, "--out", out)
    torch.save({**torch.load(good / "checkpoint.pt", weights_only=True), "script": "jeat"}, checkpoint)
    assert "jeat.py" in error(capsys, *TINY, "--out", out)

    class Pickle:
        def __reduce__(self):
            return Path.touch, (tmp_path / "loaded",)
    torch.save(Pickle(), checkpoint)
    assert "damaged or foreign" in error(capsys, *TINY, "--out", out) and not (tmp_path / "loaded").exists()
    copy()
    (out / "results.json").write_text("{")
    assert "results.json" in error(capsys, *TINY, "--out", out)
    assert "--eval-only: no" in error(capsys, "--eval-only", "--out", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, "runs/cem_sup-smoke")
    cem_sup.main([*TINY, "--seed", "5"])  # a bare --smoke starts afresh, but for --eval-only
    cem_sup.main(["--smoke", "--eval-only", "--num-samples", "10", "--sample-steps", "1", "--limit-test", "10"])
    (tmp_path / "file").write_text("")
    error(capsys, *TINY, "--out", tmp_path / "file" / "below")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(run, tmp_path, capsys, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()
    for factor in (float("nan"), 1e9):
        monkeypatch.setattr(cem_sup, "at_loss", lambda f, x, y, *attack: factor * (f(x) * 0 + 1).sum())
        assert "diverged" in error(capsys, *TINY, "--epochs", 3, "--out", run, code=1)
        assert (run / "checkpoint.pt").read_bytes() == before

    def last_step_breaks(f, x, y, *attack):  # a finite loss whose gradient is not
        return (f(x) ** 2 * 0).sum().sqrt()
    monkeypatch.setattr(cem_sup, "at_loss", last_step_breaks)
    assert "diverged" in error(capsys, *TINY, "--epochs", 3, "--batch-size", 256, "--out", tmp_path / "one", code=1)
    assert not (tmp_path / "one" / "checkpoint.pt").exists()


# ---------------------------------------------------------------- real data, CUDA


@pytest.mark.data
def test_real_data(tmp_path):
    run_script("cem_sup", "--data", os.environ["CIFAR10_ROOT"], "--out", tmp_path, "--arch", "small", "--epochs", 3,
               "--limit-train", 256, "--limit-test", 64, "--num-samples", 20, "--sample-steps", 3, "--device", "cpu",
               "--batch-size", 32, "--lr", 0.05)
    epochs = [r for r in map(json.loads, open(tmp_path / "log.jsonl")) if r["event"] == "epoch"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"]["pgd20"] <= results["accuracy"]["clean"]
    assert "--inception-weights" in results["samples"]["rcs"]["reason"]


@pytest.mark.cuda
def test_smoke_on_cuda(tmp_path):
    run_script("cem_sup", "--smoke", "--device", "cuda", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["args"]["amp"] and results["accuracy"]["pgd20"] > 0.7


@pytest.mark.cuda
def test_bf16_attack_is_as_strong_as_float32(cem_sup_smoke):
    f, (x, y) = classifier(cem_sup_smoke.out).cuda(), (t.cuda() for t in cem_sup.draw(2000, 7))
    attack = dict(steps=20, step_size=0.375, eps=3.0)
    plain = accuracy(f, x, y, cross_entropy, **attack)
    with torch.autocast("cuda", torch.bfloat16):
        fast = accuracy(f.to(memory_format=torch.channels_last), x, y, cross_entropy, **attack)
    assert abs(plain - fast) <= 0.01


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_cem_sup.py RUN TWIN: the figures of README's table
    print(json.dumps(learning(train_judge(), *map(Path, sys.argv[1:3])), indent=1))
