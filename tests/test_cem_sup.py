"""cem_sup.py: the loss, the samplers, the nets, the schedule; the smoke run and its claims against controls."""
import copy
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cem_sup
from conftest import DRAW, classifier, error, no_digits, run_script, train_judge
from samplers import accuracy, ascend, cross_entropy, drawn_digits, fit_gaussians, langevin, starts, to_float


def results_of(out):
    return json.loads((out / "results.json").read_text())


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
                               "--sample-step-size", str(step), "--sample-norm", "none", "--sample-noise", "0",
                               "--device", "cpu"])
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


def test_langevin_has_a_step_of_its_own():
    """The gradient itself, with noise: samplers.langevin at a temperature of 5e-5; a flag changes it; names too."""
    f, start = cem_sup.make_model("small-16").eval(), lambda y: torch.full((len(y), 3, 32, 32), 0.5)
    args = cem_sup.parse_args("--num-samples 4 --sample-steps 3".split())
    images, *_ = cem_sup.sample(f, "langevin", start, cem_sup.with_own_step(args, "langevin"))
    torch.manual_seed(args.sample_seed)
    x = langevin(cem_sup.log_p_x(f), start(range(4)), 3, 0.25, temperature=5e-5)
    assert torch.equal(images, cem_sup.to_uint8(x)) and (x - 0.5).std() == pytest.approx(0.005 * 3 ** 0.5, rel=0.1)
    settings = {name: cem_sup.with_own_step(args, name) for name in cem_sup.SAMPLERS}
    assert {name: cem_sup.set_of_samples(of, name)[0] for name, of in settings.items()} == {
        name: f"{name}_num-samples-4_steps-3" for name in cem_sup.SAMPLERS}
    old = cem_sup.parse_args("--sample-norm l2 --sample-step-size 0.5 --sample-noise 0".split())
    name, flags = cem_sup.set_of_samples(cem_sup.with_own_step(old, "langevin"), "langevin")
    assert name == "langevin_step-size-0.5_norm-l2_noise-0.0" and flags["sample_norm"] == "l2"
    assert cem_sup.set_of_samples(cem_sup.with_own_step(old, "cs"), "cs")[0] == "cs"  # its own, though given
    shorter = cem_sup.parse_args(["--sample-step-size", "0.2"])  # a length, no factor of the gradient
    steps = [cem_sup.with_own_step(shorter, name).sample_step_size for name in ("cs", "langevin")]
    assert steps == [0.2, 0.25]


@pytest.mark.parametrize("step_size", [0.1, 0])
def test_a_step_size_that_langevin_alone_would_not_read_is_refused(step_size, capsys, tmp_path):
    line = error(cem_sup, capsys, "--smoke", "--out", tmp_path / "out", "--sampler", "langevin",
                          "--sample-step-size", step_size)
    assert "langevin reads --sample-step-size only together with --sample-norm" in line
    assert not (tmp_path / "out").exists()


def test_all_samplers_begin_at_the_same_points():
    """In each batch, whatever noise the chains before it had."""
    x, y = drawn_digits(40, 0)
    f, start = cem_sup.make_model("small-16"), starts("class", x, y)
    args = cem_sup.parse_args("--num-samples 30 --sample-batch-size 10 --sample-steps 1 --sample-step-size 0 "
                              "--sample-norm none --sample-noise 0.001".split())
    noisy, *_ = cem_sup.sample(f, "langevin", start, args)
    args.sample_noise = 0.0
    still, *_ = cem_sup.sample(f, "cs", start, args)
    assert (noisy.float() - still.float()).abs().max() <= 2  # of 255: five standard deviations, and rounding


@pytest.mark.parametrize("arch, parameters",
                         [("resnet18", 11_173_962), ("resnet50", 23_520_842), ("resnet18-half", 2_797_610),
                          ("small-32", 310_410)])
def test_nets(arch, parameters):
    """Sizes of the CIFAR ResNets everyone uses; [0, 1] in, float32 logits out, deterministic in eval mode."""
    f = cem_sup.make_model(arch).eval()
    assert sum(p.numel() for p in f.parameters()) == parameters
    size = 32 if arch.startswith("small") else 8  # quicker
    first_stage = f.net[3] if arch in ("small-32", "resnet18-half") else f.net.layer1
    x, sizes = torch.rand(2, 3, size, size), []
    mean, std = torch.tensor([.4914, .4822, .4465]), torch.tensor([.2023, .1994, .2010])
    inside = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    if arch.startswith("resnet"):  # stride 1, no pooling
        first_stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2:]))
    with torch.no_grad():
        logits = f(x)
        torch.testing.assert_close(logits, f.net(inside))
        assert logits.shape == (2, 10) and all(s == (size, size) for s in sizes)
        with torch.autocast("cpu", torch.bfloat16):
            assert f(x).dtype == torch.float32


def test_drawn_digits():
    """Two colours and what lies between, in turn, light on dark or dark on light: no pixel tells the digits apart."""
    x, y = drawn_digits(400, 0)
    assert x.dtype == torch.uint8 and x.shape == (400, 3, 32, 32) and y.tolist() == list(range(10)) * 40
    assert torch.equal(x, drawn_digits(400, 0)[0]) and not torch.equal(x, drawn_digits(400, 1)[0])
    grey, corner = x.double().mean(1), x.double().mean(1)[:, 0, 0]
    ink = (grey - corner.view(-1, 1, 1)).abs().flatten(1) > 30
    assert ((ink.double().mean(1) > 0.05) & (ink.double().mean(1) < 0.6)).all()  # a figure, on paper
    assert abs((corner > 128).double().mean() - 0.5) < 0.1
    template = grey.view(40, 10, 1024).mean(0)
    match = (grey.flatten(1) - grey.flatten(1).mean(1, keepdim=True)) @ (template - template.mean(0)).T
    assert (match.argmax(1) == y).double().mean() < 0.4


def test_defaults():
    """robustness' schedule, Santurkar's attack and sampling path; each flag in its group."""
    wanted = dict(arch="resnet50", norm="l2", attack_eps=0.5, attack_steps=7, attack_step_size=0.1, epochs=150,
                  batch_size=128, lr=0.1, lr_drops=[1 / 3, 2 / 3], schedule="steps", sample_norm="l2", sample_steps=60,
                  sample_eps=30, sample_step_size=0.5, sample_noise=0, start="class", start_split="train", seed=0,
                  num_samples=50000, sampler=["ta", "langevin", "cs", "rcs"], limit=50000, sample_seed=0)
    args = cem_sup.parse_args([])
    values = vars(cem_sup.with_own_step(args, "cs"))
    assert {k: values[k] for k in wanted} == wanted
    assert set(args.sampling) == {"start", "start_split", "num_samples", "sample_seed", "sample_steps", "sample_noise",
                                  "sample_step_size", "sample_eps", "sample_norm", "sample_batch_size"}
    assert set(args.training) == {"arch", "batch_size", "lr", "schedule", "lr_drops", "norm", "attack_eps", "seed",
                                  "attack_steps", "attack_step_size", "limit", "smoke"}


def test_presets_are_defaults_only():
    smoke = cem_sup.parse_args(["--smoke", "--epochs", "3"])
    assert smoke.epochs == 3 and smoke.arch == "small-16" and smoke.out == "runs/cem_sup-smoke"
    small = cem_sup.parse_args(["--attack-steps", "0", "--small", "--out", "a"])
    assert small.attack_steps == 0 and small.arch == "resnet18-half" and small.out == "a" and small.lr == 0.2


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
    flags = "--smoke --batch-size 128 --limit 256 --num-samples 20 --epochs 2 --test-images 10 --sample-steps 1"
    cem_sup.main([*flags.split(), "--out", str(tmp_path), *"--schedule steps --lr-drops 0.25 0.5 --sampler cs".split()])
    np.testing.assert_allclose(seen, [[lr, 0.9, 5e-4, False] for lr in (0.1, 0.01, 0.001, 0.001)])  # two an epoch
    logged = [json.loads(line)["loss"] for line in open(tmp_path / "log.jsonl")]
    np.testing.assert_allclose(logged, torch.stack(losses).detach().view(2, 2).mean(1), rtol=1e-5)


def test_pgd20(monkeypatch):
    calls = []
    monkeypatch.setattr(cem_sup, "accuracy", lambda f, x, y, *score, **attack: calls.append((*score, attack)) or 0.5)
    figures = cem_sup.evaluate(None, range(20), range(20), cem_sup.parse_args(["--smoke"]))
    assert calls == [({},), (cross_entropy, dict(steps=20, step_size=2.5 * 2 / 20, eps=2.0, norm="l2"))]
    assert figures == {"n": 20, "clean": 0.5, "pgd20": 0.5}


# ---------------------------------------------------------------- the smoke run and what it learns


@pytest.mark.slow
def test_smoke_writes_everything(cem_sup_smoke):
    out = cem_sup_smoke.out
    assert cem_sup_smoke.stdout.startswith(f"{out}: begins; small-16 on c")  # or on the GPU
    results = results_of(out)
    assert set(results) == {"checkpoint", "epochs", "training", "versions", "accuracy", "samples"}
    assert set(results["samples"]) == {f"{name}_num-samples-20" for name in ("ta", "langevin", "cs", "rcs")}
    for name, row in results["samples"].items():
        assert row["flags"]["sample_eps"] == 30 and row["flags"]["sample_steps"] == 30
        assert row["n"] == 20 and row["fid"] is None and "digits" in row["reason"] and 0.5 < row["moved"] < 15
        z = np.load(out / f"samples_{name}.npz")
        assert z["arr_0"].shape == (20, 32, 32, 3) and z["arr_0"].dtype == np.uint8
        assert z["arr_1"].tolist() == list(range(10)) * 2
        assert Image.open(out / f"samples_{name}.png").size == (70, 342)  # a row per class
    epochs = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [r["epoch"] for r in epochs] == list(range(1, results["epochs"] + 1))
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]


def recognised(judge, name, f, x_0, labels):
    """Share of a sampler's images (of the starts themselves for None) that the judge puts into the class asked for."""
    x = x_0 if name is None else ascend(cem_sup.SAMPLERS[name](f, labels), x_0, 30, 0.5, eps=30.0)
    return accuracy(judge, x, labels)


def learning(judge, run, control, n=400, wanted=None):
    """Every figure of the claim, or those wanted, for a run and its control, from the same starts."""
    x, y = DRAW(2000, 0)
    labels, generator = torch.arange(n) % 10, torch.Generator().manual_seed(0)
    pooled = fit_gaussians(x).sample(labels, generator)
    per_class = fit_gaussians(x, y).sample(labels, generator)
    figures = {"pooled starts": partial(recognised, judge, None, None, pooled, labels),
               "class starts": partial(recognised, judge, None, None, per_class, labels)}
    attack = dict(score=cross_entropy, steps=20, step_size=0.25, eps=2.0)
    for who, f in {"attacked": classifier(run), "control": classifier(control)}.items():
        figures[f"{who} clean"] = partial(accuracy, f, *DRAW(500, 1))
        figures[f"{who} pgd20"] = partial(accuracy, f, *DRAW(500, 1), **attack)
        for name in ("ta", "cs"):
            figures[f"{who} {name} pooled"] = partial(recognised, judge, name, f, pooled, labels)
        figures[f"{who} rcs class"] = partial(recognised, judge, "rcs", f, per_class, labels)
    return {name: figure() for name, figure in figures.items() if name in (wanted or figures)}


@pytest.mark.slow
def test_attacked_training_learns_to_sample(cem_sup_smoke, cem_sup_control, judge):
    """After half of the training that RESULTS.md's table is of, where five seeds are."""
    figures = learning(judge, cem_sup_smoke.out, cem_sup_control.out, 100, [
        "pooled starts", "attacked ta pooled", "control ta pooled", "attacked cs pooled", "control cs pooled"])
    for who, run in {"attacked": cem_sup_smoke, "control": cem_sup_control}.items():
        figures[f"{who} pgd20"] = results_of(run.out)["accuracy"]["pgd20"]
    print(json.dumps(figures))
    assert figures["pooled starts"] < 0.2
    assert figures["attacked ta pooled"] >= 0.5 and figures["attacked cs pooled"] >= 0.45
    for name in ("ta pooled", "cs pooled", "pgd20"):
        assert figures[f"control {name}"] < figures[f"attacked {name}"] - 0.15


@pytest.mark.slow
def test_the_judge_knows_digits_and_what_is_none(judge):
    x, y = DRAW(500, 1)
    assert accuracy(judge, x, y) > 0.98
    torch.manual_seed(0)
    for none in (no_digits(to_float(x))[0], torch.rand(100, 3, 32, 32)):
        with torch.no_grad():
            assert (judge(none).argmax(1) == 10).double().mean() > 0.9


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
    assert results_of(tmp_path)["accuracy"]["pgd20"] > 0.4


@pytest.mark.cuda
def test_bf16_attack_is_as_strong_as_float32(cem_sup_smoke):
    f, (x, y) = classifier(cem_sup_smoke.out).cuda(), (t.cuda() for t in DRAW(2000, 7))
    attack = dict(steps=20, step_size=0.25, eps=2.0)
    plain = accuracy(f, x, y, cross_entropy, **attack)
    with torch.autocast("cuda", torch.bfloat16):
        fast = accuracy(f.to(memory_format=torch.channels_last), x, y, cross_entropy, **attack)
    assert abs(plain - fast) <= 0.01


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_cem_sup.py RUN CONTROL: the figures of RESULTS.md's table
    print(json.dumps(learning(train_judge(), *map(Path, sys.argv[1:3])), indent=1))
