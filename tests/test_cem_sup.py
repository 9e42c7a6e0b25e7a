"""cem_sup.py: the loss, the net, the augmentation; the smoke run and its claims against controls; resume; bad input."""
import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cem_sup
from conftest import ROOT, classifier, run_script
from samplers import accuracy, cross_entropy, fit_gaussians, to_float

TINY = ["--smoke", "--limit-train", "256", "--limit-test", "50", "--num-samples", "20", "--epochs", "2",
        "--sample-steps", "3", "--attack-steps", "1", "--device", "cpu"]

# ---------------------------------------------------------------- the method


def arguments(*flags):
    return cem_sup.parse_args(["--smoke", *map(str, flags)])


def test_at_loss_is_cross_entropy_at_the_attacked_point():
    """Against the attack written by hand: eval mode, random start, normalised and projected steps; then train mode."""
    torch.manual_seed(0)
    f, x, y = cem_sup.make_model("small"), torch.rand(8, 3, 32, 32), torch.arange(8)
    by_hand = copy.deepcopy(f)
    torch.manual_seed(1)
    loss = cem_sup.at_loss(f.train(), x, y, arguments("--attack-eps", 1, "--attack-step-size", 0.4))

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
    loss = cem_sup.at_loss(f, x, y, arguments("--attack-steps", 0))
    assert torch.equal(loss, F.cross_entropy(f(x), y))


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
    seen = np.zeros((9, 9, 2))
    for _ in range(600):
        for k, out in enumerate(cem_sup.crop_flip(x, mode=mode)):
            found = [(i, j, flip) for i in range(9) for j in range(9) for flip in (0, 1)
                     if out[0, 0, 0] == padded[k, 0, i, j + 7 * flip]
                     and torch.equal(out.flip(2) if flip else out, padded[k, :, i:i + 8, j:j + 8])]
            if found:
                seen[found[0]] += 1
    assert seen.sum() == 1200
    if mode == "constant":  # (a reflected window can equal the flip of another)
        for axes in ((1, 2), (0, 2), (0, 1)):  # row offset, column offset, flip: each uniform
            share = seen.sum(axes) / seen.sum()
            assert np.abs(share - 1 / len(share)).max() < 0.05


def test_drawn_classes():
    x, y = cem_sup.draw(200, 0)
    again, other = cem_sup.draw(200, 0)[0], cem_sup.draw(200, 1)[0]
    assert x.dtype == torch.uint8 and x.shape == (200, 3, 32, 32) and y.tolist() == list(range(10)) * 20
    assert torch.equal(x, again) and not torch.equal(x, other)


# ---------------------------------------------------------------- the smoke run and what it learns


def test_smoke_writes_everything(cem_sup_smoke):
    out = cem_sup_smoke.out
    results = json.loads((out / "results.json").read_text())
    assert {"args", "versions", "device", "seconds", "accuracy", "samples"} <= set(results)
    assert set(results["samples"]) == {"ta", "langevin", "cs", "rcs"}
    for name, row in results["samples"].items():
        assert row["n"] == 200 and row["fid"] is None and "smoke" in row["reason"]
        z = np.load(out / f"samples_{name}.npz")
        assert z["arr_0"].shape == (200, 32, 32, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].tolist() == list(range(10)) * 20
        assert Image.open(out / f"samples_{name}.png").size == (342, 342)  # a row per class
    epochs = [r for r in map(json.loads, open(out / "log.jsonl")) if r["event"] == "epoch"]
    assert [r["epoch"] for r in epochs] == list(range(1, 13))
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert [round(r["lr"], 6) for r in epochs] == [0.1] * 9 + [0.01] * 2 + [0.001]  # drops at 0.7 and 0.9 of 12
    f, (x, y) = classifier(out), cem_sup.draw(1000, 1)
    assert results["accuracy"]["clean"] == accuracy(f, x[:500], y[:500])


def recognised(judge, name, f, x_0, labels):
    """Share of a sampler's images (of the seeds themselves for None) that the judge puts into the class asked for."""
    x = x_0 if name is None else cem_sup.sample(name, f, x_0, labels, arguments())
    return accuracy(judge, x, labels)


def learning(judge, run, twin):
    """Every figure of the claim, for a run and its unattacked twin, from the same seeds."""
    x, y = cem_sup.draw(2000, 0)
    labels, generator = torch.arange(400) % 10, torch.Generator().manual_seed(0)
    pooled = fit_gaussians(x).sample(400, generator=generator)
    per_class = fit_gaussians(x, y).sample(labels, generator=generator)
    figures = {"pooled seeds": recognised(judge, None, None, pooled, labels),
               "class seeds": recognised(judge, None, None, per_class, labels)}
    for who, f in {"attacked": classifier(run), "twin": classifier(twin)}.items():
        x_test, y_test = cem_sup.draw(500, 1)
        figures[f"{who} clean"] = accuracy(f, x_test, y_test)
        figures[f"{who} pgd20"] = accuracy(f, x_test, y_test, cross_entropy, steps=20, step_size=0.25, eps=2.0)
        for name in ("ta", "cs"):
            figures[f"{who} {name} pooled"] = recognised(judge, name, f, pooled, labels)
        figures[f"{who} rcs class"] = recognised(judge, "rcs", f, per_class, labels)
    return figures


def test_attacked_training_learns_to_sample(cem_sup_smoke, cem_sup_twin, judge):
    """Bounds lie below the worst of five seeds: see README, "Smoke runs and their controls"."""
    figures = learning(judge, cem_sup_smoke.out, cem_sup_twin.out)
    print(json.dumps(figures))
    x, y = cem_sup.draw(1000, 1)
    assert accuracy(judge, x, y) > 0.98  # the judge knows the classes
    assert figures["pooled seeds"] < 0.2
    assert figures["attacked ta pooled"] >= 0.8 and figures["attacked cs pooled"] >= 0.8
    assert figures["twin cs pooled"] < figures["attacked cs pooled"] - 0.05
    assert figures["twin pgd20"] < figures["attacked pgd20"] - 0.25


# ---------------------------------------------------------------- resume


def same_end(a, b):
    one, two = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (a, b))
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (one, two)]
    return (one["epoch"] == two["epoch"] and torch.equal(one["rng"], two["rng"])
            and all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
            and all(map(torch.equal, *momentum))
            and all((a / f"samples_{n}.npz").read_bytes()[100:] == (b / f"samples_{n}.npz").read_bytes()[100:]
                    or np.array_equal(np.load(a / f"samples_{n}.npz")["arr_0"],
                                      np.load(b / f"samples_{n}.npz")["arr_0"]) for n in cem_sup.SAMPLERS))


def start_and_stop(out, flags, sign, when):
    process = subprocess.Popen([sys.executable, str(ROOT / "cem_sup.py"), *flags, "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not when() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(sign)
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.slow
def test_killed_and_interrupted_runs_end_where_an_uninterrupted_one_does(tmp_path):
    flags = [*TINY, "--epochs", "4", "--limit-train", "512"]
    run_script("cem_sup", *flags, "--out", tmp_path / "whole")
    out = tmp_path / "stopped"
    code, _ = start_and_stop(out, flags, signal.SIGKILL, lambda: (out / "checkpoint.pt").exists())
    assert code == -signal.SIGKILL
    epoch = torch.load(out / "checkpoint.pt", weights_only=True)["epoch"]
    code, err = start_and_stop(out, flags, signal.SIGINT, lambda: (out / "checkpoint.pt").exists() and torch.load(
        out / "checkpoint.pt", weights_only=True)["epoch"] > epoch)
    assert code == 130 and err.strip().startswith("cem_sup.py: error: interrupted") and "Traceback" not in err
    run_script("cem_sup", *flags, "--out", out)
    assert same_end(tmp_path / "whole", out)
    assert not list(out.glob("*.tmp"))


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    out = tmp_path / "run"
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in out.glob("*") if p.suffix in (".pt", ".npz")}  # noqa: E731
    cem_sup.main([*TINY, "--out", str(out)])
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
    cem_sup.main(["--eval-only", "--out", str(out), "--device", "cpu", "--num-samples", "10", "--limit-test", "20"])
    assert np.load(out / "samples_ta.npz")["arr_0"].shape == (10, 32, 32, 3)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 3


# ---------------------------------------------------------------- bad input


def error(capsys, *flags, code=2):
    """The one line on standard error with which cem_sup.py ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cem_sup.main(list(map(str, flags)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == code and len(lines) == 1 and lines[0].startswith("cem_sup.py: error: ")
    return lines[0]


@pytest.mark.parametrize("flags, words", [
    (["--no-such-flag"], "--no-such-flag"), (["--epoch", "3"], "--epoch"), (["--arch", "vgg"], "vgg"),
    (["--batch-size", "0"], "must be > 0"), (["--num-samples", "-1"], "must be > 0"), (["--lr", "nan"], "must be"),
    (["--attack-steps", "-1"], "must be >= 0"), (["--attack-eps", "-0.5"], "must be >= 0"), (["--epochs", "x"], "int"),
    (["--attack-eps", "inf"], "finite"), (["--sample-noise", "-1"], "must be >= 0"), (["--sampler", "gan"], "gan"),
    (["--device", "cuda:99"], "cuda:99"), (["--limit-train", "0"], "must be > 0"), (["--norm", "l1"], "l1")])
def test_wrong_flags(flags, words, capsys, tmp_path):
    assert words in error(capsys, "--smoke", "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


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


def test_unusable_out(tmp_path, capsys):
    cem_sup.main([*TINY, "--out", str(tmp_path / "run")])
    good, out = tmp_path / "run", tmp_path / "copy"

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
    torch.save(argparse.Namespace(epoch=1), checkpoint)  # a pickle is not loaded
    assert "damaged or foreign" in error(capsys, *TINY, "--out", out)
    copy()
    (out / "results.json").write_text("{")
    assert "results.json" in error(capsys, *TINY, "--out", out)
    assert "no checkpoint" in error(capsys, "--eval-only", "--out", tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    error(capsys, *TINY, "--out", tmp_path / "file" / "below")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    cem_sup.main([*TINY, "--out", str(tmp_path)])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(cem_sup, "at_loss", lambda f, x, y, args: f(x).sum() * float("nan"))
    assert "diverged" in error(capsys, *TINY, "--epochs", 3, "--out", tmp_path, code=1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes(b"old")

    def full(path, data):
        open(path, "wb").write(bytes(data[:2]))
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError):
        cem_sup.write_whole(tmp_path / "checkpoint.pt", b"new")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"old"


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


def test_to_float_and_the_ready_images_agree():
    assert torch.equal(to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1]))
