"""jeat.py: the loss and its pieces, the attack, the negatives, the net; the smoke run and its claims against controls;
resume with the replay buffer; divergence; bad input."""
import json
import math
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

import conftest
import jeat
from conftest import ROOT, jeat_classifier, run_script, train_judge
from jeat import energy, jeat_loss, joint_energy
from samplers import (ReplayBuffer, accuracy, ascend, cross_entropy, fit_gaussians, joint_energy_score, log_p_x, sgld,
                      to_float, to_uint8)

TINY = ["--smoke", "--limit-train", "128", "--limit-test", "5", "--num-samples", "20", "--epochs", "2",
        "--sample-steps", "3", "--sgld-steps", "2", "--buffer-size", "40", "--device", "cpu"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    jeat.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture
def run(tiny, tmp_path):
    """A copy of a finished run of TINY."""
    return shutil.copytree(tiny, tmp_path / "run")


# ---------------------------------------------------------------- the method


def double_precision(seed=0, n=6):
    """A net, images and labels; the buffer's chains lie in float64 too."""
    torch.manual_seed(seed)
    f = jeat.make_model("small").double().train()
    f.forward = lambda x: f.net(2 * x - 1)
    buffer = ReplayBuffer(20, (3, 32, 32), reinit=0.5)
    buffer.x = buffer.x.double()
    return f, torch.rand(n, 3, 32, 32).double(), torch.arange(n), buffer


def test_energies():
    logits, y = torch.randn(5, 10).double(), torch.tensor([3, 0, 9, 9, 1])
    by_hand = [-math.log(sum(math.exp(v) for v in row)) for row in logits.tolist()]
    torch.testing.assert_close(energy(logits), torch.tensor(by_hand, dtype=torch.float64))
    assert joint_energy(logits, y).tolist() == [-logits[i, k].item() for i, k in enumerate(y)]
    torch.testing.assert_close(joint_energy(logits, y) - energy(logits), F.cross_entropy(logits, y, reduction="none"))


def gradients(loss, f):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(f.parameters()), retain_graph=True)])


def test_loss_telescopes_and_is_that_of_the_attack_and_the_chains_by_hand():
    f, x, y, buffer = double_precision()
    before, state = buffer.x.clone(), torch.get_rng_state()
    loss, (ce, e_adv, e_k) = jeat_loss(f, x, y, buffer, eps=0.05, step_size=0.03, sgld_steps=3)
    torch.testing.assert_close(loss, ce + e_adv - e_k)
    torch.testing.assert_close(gradients(loss, f), gradients(ce + e_adv - e_k, f))

    torch.set_rng_state(state)
    x_adv = (x + 0.05 * (2 * torch.rand(x.shape, dtype=torch.float64) - 1)).clamp(0, 1).requires_grad_()
    g, = torch.autograd.grad(-f(x_adv)[torch.arange(6), y].sum(), x_adv)  # of E(x, y)
    x_adv = (x + (x_adv.detach() + 0.03 * g.sign() - x).clamp(-0.05, 0.05)).clamp(0, 1)
    idx, noise, fresh = torch.randperm(20)[:6], torch.rand(6, 3, 32, 32), torch.rand(6) < 0.5
    assert 0 < fresh.sum() < 6
    x_k = torch.where(fresh.view(6, 1, 1, 1), noise, before[idx])
    for _ in range(3):
        x_k.requires_grad_()
        g, = torch.autograd.grad(f(x_k).logsumexp(1).sum(), x_k)
        x_k = x_k.detach() + 0.25 * g + 0.005 * torch.randn(x.shape, dtype=torch.float64)
    by_hand = joint_energy(f(x_adv), y).mean() - energy(f(x_k)).mean()  # x_adv, x_k: no gradient through them
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(gradients(loss, f), gradients(by_hand, f))
    torch.testing.assert_close(torch.stack([ce, e_adv, e_k]), torch.stack(
        [F.cross_entropy(f(x_adv), y), energy(f(x_adv)).mean(), energy(f(x_k)).mean()]))
    others = sorted({*range(20)} - {*idx.tolist()})
    torch.testing.assert_close(buffer.x[idx], x_k)  # written back
    assert torch.equal(buffer.x[others], before[others]) and not buffer.x.requires_grad


def seen(f, x, y, *args, **flags):
    """The loss, and the inputs of every forward, with the mode of each."""
    inputs = []
    handle = f.register_forward_hook(lambda net, x, logits: inputs.append((net.training, x[0].detach().clone())))
    loss = jeat_loss(f, x, y, *args, **flags)
    handle.remove()
    return loss, inputs


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 1.0)])
@pytest.mark.parametrize("score", [joint_energy_score, cross_entropy])
def test_attack_raises_its_energy_in_the_ball_and_the_box(score, norm, eps):
    f, x, y, _ = double_precision()
    (loss, pieces), inputs = seen(f, x, y, None, score, 3, eps / 2, eps, norm)
    assert [training for training, _ in inputs] == [False] * 3 + [True]
    x_adv, d = inputs[-1][1], (inputs[-1][1] - x).flatten(1)
    assert (score(f, y)(x_adv) > score(f, y)(x)).all()
    length = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
    assert (length <= eps + 1e-9).all() and (length > 0.5 * eps).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    torch.testing.assert_close(loss, F.cross_entropy(f(x_adv), y))  # PreJEAT; AT: no p(x)
    torch.testing.assert_close(torch.stack(pieces), torch.stack([loss, energy(f(x_adv)).mean()]))


def test_no_forward_is_wasted_and_no_steps_is_plain_training():
    """A attack steps, K chain steps, and one training forward each of x_adv and x_K: 2A + 2K + 6 with backwards."""
    f, x, y, buffer = double_precision()
    _, inputs = seen(f, x, y, buffer, steps=2, sgld_steps=3)
    assert [(training, len(x)) for training, x in inputs].count((True, 6)) == 2 and len(inputs) == 2 + 3 + 2
    assert f.training
    assert torch.equal(jeat_loss(f, x, y, steps=0)[0], F.cross_entropy(f(x), y))


def test_chains_are_not_clamped():
    f, x, y, buffer = double_precision()
    with torch.no_grad():
        f.net[-1].weight.mul_(300)
    jeat_loss(f, x, y, buffer)
    assert buffer.x.min() < -0.2 and buffer.x.max() > 1.2


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 4, 7])])
def test_samplers_descend_their_energy_unclamped(labels):
    f, x, _, _ = double_precision(n=3)
    f.train().register_forward_hook(lambda net, x, logits: modes.append(net.training))
    modes = []
    moved = jeat.sample(f, x, labels, steps=1, step_size=50.0, noise=0.0) - x
    assert modes == [False] and f.training
    x.requires_grad_()
    e = energy(f(x)) if labels is None else joint_energy(f(x), labels)
    torch.testing.assert_close(moved, -50 * torch.autograd.grad(e.sum(), x)[0])
    assert (x + moved).min() < 0 and (x + moved).max() > 1
    noise = jeat.sample(f, x.detach(), labels, steps=1, step_size=0.0) - x.detach()
    assert abs(noise.std().item() - 0.005) < 2e-4


@pytest.mark.parametrize("depth, width", [(28, 10), (10, 2)])
def test_wide_resnet(depth, width):
    """JEM's: no normalisation, biases everywhere, a block's stride on its second convolution; 2x - 1 inside."""
    f = jeat.make_model(f"wrn-{depth}-{width}").eval()
    blocks, c, parameters = (depth - 4) // 6, 16, 3 * 16 * 9 + 16
    for c_out in (16 * width, 32 * width, 64 * width):
        parameters += c * c_out + c_out  # the shortcut
        for _ in range(blocks):
            parameters += c * c_out * 9 + c_out * c_out * 9 + 2 * c_out
            c = c_out
    assert sum(p.numel() for p in f.parameters()) == parameters + c * 10 + 10
    kinds = {type(m).__name__ for m in f.modules()}
    assert kinds <= {"WideResNet", "Sequential", "Conv2d", "Block", "LeakyReLU", "AdaptiveAvgPool2d", "Flatten",
                     "Linear", "Identity"}
    strides = [(m.conv1.stride[0], m.conv2.stride[0]) for m in f.modules() if isinstance(m, jeat.Block)]
    rest = [(1, 1)] * (blocks - 1)
    assert strides == [(1, 1), *rest, (1, 2), *rest, (1, 2), *rest]
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(f(x), f.net(2 * x - 1))
    block, h = f.net[1], torch.randn(1, 16, 8, 8)
    by_hand = block.conv2(F.leaky_relu(block.conv1(F.leaky_relu(h, 0.2)), 0.2)) + block.shortcut(h)
    torch.testing.assert_close(block(h), by_hand)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x).dtype == torch.float32 and f(x).shape == (2, 10)


def test_defaults_of_the_methods():
    """JEAT takes one step of eps, AT ten of eps / 4: PGD-10 of 2/255 at 8/255."""
    for method, steps, share in (("jeat", 1, 1), ("prejeat", 1, 1), ("at", 10, 0.25)):
        for flags, eps in (([], 8 / 255), (["--attack-eps", "0.1"], 0.1), (["--smoke"], 24 / 255)):
            args = jeat.parse_args(["--method", method, *flags])
            assert (args.attack_steps, args.attack_eps, args.attack_step_size) == (steps, eps, share * eps)
    args = jeat.parse_args(["--method", "at", "--attack-steps", "7", "--attack-step-size", "0.01"])
    assert (args.attack_steps, args.attack_step_size) == (7, 0.01)
    wanted = dict(method="jeat", norm="linf", arch="wrn-28-10", epochs=200, batch_size=64, lr=1e-4, lr_drops=[0.8, 0.9],
                  sgld_steps=20, buffer_size=10000, sample_norm="none", sample_eps=math.inf, sample_step_size=0.25,
                  sample_noise=0.005, sample_steps=100, start="class", seed_split="train", num_samples=50000)
    args = vars(jeat.parse_args([]))
    assert {k: args[k] for k in wanted} == wanted and ReplayBuffer(2, (1,)).reinit == 0.05


# ---------------------------------------------------------------- the smoke run and what it learns


def epochs_of(out):
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if r["event"] == "epoch"]


def results_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_smoke_writes_everything(jeat_smoke):
    out = jeat_smoke.out
    results = results_of(out)
    assert {"args", "versions", "device", "seconds", "accuracy", "samples", "energy"} <= set(results)
    assert set(results["samples"]) == {"gaussian", "noise", "buffer"}
    for name, row in results["samples"].items():
        assert row["n"] == 100 and row["fid"] is None and "smoke" in row["reason"] and len(row["e_x"]) == 5
        z = np.load(out / f"samples_{name}.npz")
        assert z["arr_0"].shape == (100, 32, 32, 3) and z["arr_0"].dtype == np.uint8
        assert Image.open(out / f"samples_{name}.png").size == (342, 342)
        assert ("arr_1" in z) == (name != "buffer")  # whose chains have no class
    assert np.load(out / "samples_noise.npz")["arr_1"].tolist() == list(range(10)) * 10
    epochs = epochs_of(out)
    assert [r["epoch"] for r in epochs] == list(range(1, 7)) and epochs[-1]["ce"] < 0.5 * epochs[0]["ce"]
    for r in epochs:
        assert abs(r["ce"] + r["e_adv"] - r["e_k"] - r["loss"]) < 1e-3 and {"e_clean", "lr"} <= set(r)
    assert [r["epoch"] for r in epochs if "pgd20_train" in r] == [5] and epochs[4]["pgd20_train"] > 0.25
    f = jeat_classifier(out)
    x, y = [t[:500] for t in jeat.draw(1000, 1)]
    assert results["accuracy"]["clean"] == accuracy(f, x, y)
    attack = dict(steps=20, step_size=6 / 255, eps=24 / 255, norm="linf")
    assert abs(results["accuracy"]["pgd20"] - accuracy(f, x, y, cross_entropy, **attack)) <= 0.01
    x, y = [t[:250] for t in jeat.draw(2000, 0)]
    with torch.no_grad():
        assert abs(epochs[-1]["e_clean"] - energy(f(to_float(x))).mean().item()) < 1e-3


@pytest.mark.slow
def test_flatness_figures(jeat_smoke):
    """Against the definitions: E(x, y) and its quantiles at the images themselves, and one radius in one direction."""
    found, f = results_of(jeat_smoke.out)["energy"]["flatness"], jeat_classifier(jeat_smoke.out)
    x, y = [t[:100] for t in jeat.draw(1000, 1)]
    x = to_float(x)
    with torch.no_grad():
        assert abs(found["e_xy"][0] - joint_energy(f(x), y).mean().item()) < 1e-3 and found["change"][0] == 0
        by_hand = np.quantile(energy(f(x)), [.05, .25, .5, .75, .95])
        np.testing.assert_allclose(found["e_x"]["clean"], by_hand, atol=1e-3)
        u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).flatten(1)
        u = (u / u.norm(dim=1, keepdim=True)).view(x.shape)
        change = (joint_energy(f(x + 4 * u), y) - joint_energy(f(x), y)).abs().mean().item()
        assert abs(found["change"][found["radii"].index(4)] - change) < 1e-3
    assert found["e_x"]["sgld"][2] < found["e_x"]["clean"][2] and found["drift"] > 1


def test_flatness_attacks_and_samples_the_images():
    """Under PGD-20 at the training radius, and after 200 steps of SGLD up log p(x), both by hand."""
    torch.manual_seed(0)
    f, x, y = jeat.make_model("small"), torch.rand(8, 3, 32, 32), torch.arange(8)
    for m in f.modules():  # livelier than at the start
        if isinstance(m, torch.nn.Conv2d):
            m.weight.data.mul_(2)
    args = jeat.parse_args(["--smoke", "--seed", "3", "--attack-eps", "0.2"])
    found, q = jeat.flatness(f, x, y, args), [.05, .25, .5, .75, .95]
    x_adv = ascend(cross_entropy(f, y), x, 20, 0.05, eps=0.2, norm="linf")
    generator = torch.Generator().manual_seed(3)
    torch.randn(x.shape, generator=generator)  # the directions
    x_k = sgld(log_p_x(f), x, 200, 0.25, 0.005, generator=generator)
    with torch.no_grad():
        e = {"clean": energy(f(x)), "pgd20": energy(f(x_adv)), "sgld": energy(f(x_k))}
    assert len({round(v.median().item(), 4) for v in e.values()}) == 3
    for name, v in e.items():
        np.testing.assert_allclose(found["e_x"][name], np.quantile(v, q), atol=1e-4)
    assert found["drift"] == pytest.approx((x_k - x).flatten(1).norm(dim=1).mean().item(), rel=1e-4)


def learning(judge, run, twin, raw=True):
    """Every figure of the claim, for a run and its unattacked twin, from the same seeds."""
    x, y = jeat.draw(2000, 0)
    labels = torch.arange(200) % 10
    pooled = fit_gaussians(x).sample(200, generator=torch.Generator().manual_seed(0))
    figures = {"seeds": accuracy(judge, pooled, labels)}
    for who, out in {"jeat": run, "twin": twin}.items():
        f, results = jeat_classifier(out), results_of(out)
        figures[f"{who} clean"] = results["accuracy"]["clean"]
        x_test, y_test = [t[:500] for t in jeat.draw(1000, 1)]
        figures[f"{who} pgd20"] = accuracy(f, x_test, y_test, cross_entropy, steps=20, step_size=4 / 255, eps=16 / 255,
                                           norm="linf")
        figures[f"{who} drift"] = results["energy"]["flatness"]["drift"]
        figures[f"{who} change at 2"] = results["energy"]["flatness"]["change"][4]
        e_x = results["energy"]["flatness"]["e_x"]
        figures[f"{who} E(after SGLD) - E(data), medians"] = e_x["sgld"][2] - e_x["clean"][2]
        x_k = jeat.sample(f, pooled, labels, 60, 0.5, norm="l2", noise=0.0)
        figures[f"{who} l2"] = accuracy(judge, to_uint8(x_k), labels)
        if raw:
            x_k = jeat.sample(f, pooled, labels, generator=torch.Generator().manual_seed(1))
            figures[f"{who} raw"] = accuracy(judge, to_uint8(x_k), labels)
    last, buffer = epochs_of(run)[-1], torch.load(run / "checkpoint.pt", weights_only=True)["buffer"]["x"]
    f, x = jeat_classifier(run), to_float(x[:500])
    with torch.no_grad():
        figures["E(data) - E(buffer), end"] = (energy(f(x)).mean() - energy(f(buffer)).mean()).item()
        figures["E(data) - E(noise), end"] = (energy(f(x)).mean() - energy(f(torch.rand(200, 3, 32, 32))).mean()).item()
    figures["E(x_adv) - E(x_K), last epoch"] = last["e_adv"] - last["e_k"]
    return figures


@pytest.mark.slow
def test_jeat_learns_a_flat_energy_that_samples(jeat_smoke, jeat_twin, judge):
    """Bounds lie below the worst of five seeds: see README, "Smoke runs and their controls"."""
    figures = learning(judge, jeat_smoke.out, jeat_twin.out, raw=False)
    print(json.dumps(figures))
    assert figures["seeds"] < 0.2
    assert figures["twin pgd20"] < figures["jeat pgd20"] - 0.1
    assert abs(figures["E(x_adv) - E(x_K), last epoch"]) < 1.5
    assert abs(figures["E(data) - E(buffer), end"]) < 0.15 * abs(figures["E(data) - E(noise), end"])
    assert figures["jeat drift"] < 0.5 * figures["twin drift"]
    assert figures["jeat change at 2"] < 0.5 * figures["twin change at 2"]
    assert figures["jeat l2"] >= 0.6 and figures["jeat l2"] > figures["twin l2"] + 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["prejeat", "at"])
def test_the_other_methods_run_and_report(method, tmp_path):
    jeat.main(["--smoke", "--method", method, "--epochs", "1", "--attack-steps", "2", "--sample-steps", "3",
               "--limit-test", "20", "--out", str(tmp_path)])
    results, (epoch,) = results_of(tmp_path), epochs_of(tmp_path)
    assert set(results["samples"]) == {"gaussian", "noise"} and results["accuracy"]["clean"] > 0.15
    assert epoch["loss"] == epoch["ce"] and "e_k" not in epoch and epoch["e_adv"] < 0
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"] == {}
    assert set(results["energy"]["flatness"]["e_x"]) == {"clean", "pgd20", "sgld"}


# ---------------------------------------------------------------- training, starts


@pytest.mark.slow
def test_each_method_trains_on_its_own_loss(tmp_path, monkeypatch):
    calls = []

    def loss(f, x, y, buffer, score, *flags):
        calls.append((buffer is not None, score, flags, x.min().item() >= 0 and x.max().item() <= 1))
        return jeat_loss(f, x, y, buffer, score, *flags)
    monkeypatch.setattr(jeat, "jeat_loss", loss)
    monkeypatch.setattr(jeat, "flatness", lambda *args: {})  # 200 steps
    for method, negatives, score, step in (("jeat", True, joint_energy_score, 1), ("at", False, cross_entropy, 0.25),
                                           ("prejeat", False, joint_energy_score, 1)):
        calls.clear()
        jeat.main([*TINY, "--method", method, "--attack-steps", "1", "--out", str(tmp_path / method), "--epochs", "1",
                   "--sampler", "noise"])
        eps = 24 / 255
        assert calls == [(negatives, score, (1, step * eps, eps, "linf", 2), True)] * 4


def test_learning_rate_noise_and_crops(tmp_path, monkeypatch):
    """Adam with JEM's betas, no decay; warm-up over a tenth; drops; input noise; reflected crops, not in smoke."""
    seen, inputs, crops, watched = [], [], [], []

    class Adam(torch.optim.Adam):
        def step(self):
            seen.append([self.param_groups[0][k] for k in ("lr", "betas", "weight_decay")])
            super().step()

    def loss(f, x, y, *flags):
        inputs.append((x, y))
        return jeat_loss(f, x, y, *flags)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(jeat, "jeat_loss", loss)
    monkeypatch.setattr(jeat, "crop_flip", lambda x, **flags: crops.append(flags) or x)
    monkeypatch.setattr(jeat, "accuracy", lambda f, x, y, **attack: watched.append((len(x), attack)) or 0.5)
    out = ["--out", str(tmp_path), "--method", "at", "--attack-steps", "0"]
    args = jeat.parse_args([*TINY, *out, "--epochs", "10", "--lr-drops", "0.5", "0.7", "1"])
    f, x, y = jeat.make_model("small"), torch.full((96, 3, 32, 32), 128, dtype=torch.uint8), torch.zeros(96).long()
    jeat.train(f, None, x, y, args, {"epoch": 0, "seconds": 0.0})
    attack = {"score": cross_entropy, "steps": 20, "step_size": 6 / 255, "eps": 24 / 255, "norm": "linf"}
    assert watched == [(96, attack)] * 2 and [r["epoch"] for r in epochs_of(tmp_path) if "pgd20_train" in r] == [5, 10]
    assert not crops and all(abs((x - 128 / 255).std().item() - 0.015) < 5e-4 for x, _ in inputs)
    rates = [5e-3 * r for r in [1 / 3, 2 / 3] + [1] * 13 + [0.3] * 6 + [0.09] * 9]  # three updates an epoch
    np.testing.assert_allclose([lr for lr, _, _ in seen], rates)
    assert all(rest == [(0.9, 0.999), 0] for _, *rest in seen)
    args.smoke, args.epochs = False, 1
    jeat.train(f, None, x, y, args, {"epoch": 0, "seconds": 0.0})
    assert crops == [{"mode": "reflect"}] * 3


@pytest.mark.slow
def test_starts(run):
    """--sample-steps 0 leaves them: Gaussians of a class or of all, noise, the chains in turn."""
    def images(name, *flags):
        jeat.main([*TINY, "--out", str(run), "--num-samples", "50", "--sample-steps", "0", *flags])
        z = np.load(run / f"samples_{name}.npz")
        return torch.from_numpy(z["arr_0"]).permute(0, 3, 1, 2)
    noise = images("noise").double()
    assert abs(noise.mean() - 127.5) < 2 and abs(noise.std() - 255 / 12 ** 0.5) < 2
    chains = torch.load(run / "checkpoint.pt", weights_only=True)["buffer"]["x"]
    assert torch.equal(images("buffer"), to_uint8(chains[torch.arange(50) % 40]))
    x, y = [t[:128] for t in jeat.draw(2000, 0)]
    generator = torch.Generator().manual_seed(0)
    for flags, start in (([], lambda: fit_gaussians(x, y).sample(torch.arange(50) % 10, generator)),
                         (["--start", "pooled"], lambda: fit_gaussians(x).sample(50, generator))):
        written = images("gaussian", *flags)
        assert torch.equal(written, to_uint8(start())), flags
        generator.manual_seed(0)
    assert not torch.equal(written, images("gaussian", "--start", "pooled", "--seed-split", "test"))


@pytest.mark.slow
def test_samples_are_those_of_the_energies(run):
    """The file's images are SGLD's, clamped: down E(x, y) for the class wanted, down E(x) from the buffer."""
    jeat.main([*TINY, "--out", str(run), "--sample-steps", "20", "--sample-noise", "0"])
    f = jeat_classifier(run).to(memory_format=torch.channels_last)
    chains = torch.load(run / "checkpoint.pt", weights_only=True)["buffer"]["x"][:20]
    y, noise = torch.arange(20) % 10, torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, x_0, labels in (("buffer", chains, None), ("noise", noise, y)):
        x_k = jeat.sample(f, x_0, labels, 20, noise=0.0)
        written = torch.from_numpy(np.load(run / f"samples_{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        assert (written.int() - to_uint8(x_k).int()).abs().max() <= 1
        with torch.no_grad():
            by_hand = np.quantile(energy(f(x_k)), [.05, .25, .5, .75, .95])
        np.testing.assert_allclose(results_of(run)["samples"][name]["e_x"], by_hand, atol=1e-3)
    jeat.main([*TINY, "--out", str(run), "--sampler", "noise", "--sample-steps", "4", "--sample-noise", "0",
               "--sample-norm", "l2", "--sample-step-size", "0.7", "--sample-eps", "1.5"])
    x_k = jeat.sample(f, noise, y, 4, step_size=0.7, eps=1.5, norm="l2", noise=0.0)
    written = torch.from_numpy(np.load(run / "samples_noise.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert (written.int() - to_uint8(x_k).int()).abs().max() <= 1
    assert (x_k - noise).flatten(1).norm(dim=1).max() < 1.5 + 1e-4


# ---------------------------------------------------------------- resume


def same_end(a, b):
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    moments = [[s[k] for s in c["optimizer"]["state"].values() for k in ("exp_avg", "exp_avg_sq")] for c in (one, two)]
    samples = [[np.load(out / f"samples_{n}.npz")["arr_0"] for n in jeat.SAMPLERS] for out in (a, b)]
    figures = [{k: results_of(out)[k] for k in ("accuracy", "energy")} for out in (a, b)]
    return (one["epoch"] == two["epoch"] and torch.equal(one["rng"], two["rng"])
            and all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
            and torch.equal(one["buffer"]["x"], two["buffer"]["x"])
            and all(map(torch.equal, *moments)) and all(map(np.array_equal, *samples)) and figures[0] == figures[1])


@pytest.mark.slow
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    flags = [*TINY, "--epochs", "6"]
    jeat.main([*map(str, flags), "--out", str(tmp_path / "whole")])
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "jeat.py"), *flags, "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] < 6
    jeat.main([*map(str, flags), "--out", str(out)])
    assert same_end(tmp_path / "whole", out)
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_what_is_done_is_not_done_again(run, capsys):
    out = run
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in out.glob("*") if p.suffix in (".pt", ".npz")}  # noqa: E731
    first, results = stamps(), results_of(out)
    jeat.main([*TINY, "--out", str(out)])
    assert stamps() == first and results_of(out)["seconds"] == results["seconds"]
    jeat.main([*TINY, "--out", str(out), "--sampler", "noise", "buffer", "--sample-steps", "4"])  # may change freely
    changed = {name for name, stamp in stamps().items() if stamp != first[name]}
    assert changed == {"samples_noise.npz", "samples_buffer.npz"}
    capsys.readouterr()
    jeat.main([*TINY, "--out", str(out), "--epochs", "3"])  # may grow
    assert "--epochs was 2" in capsys.readouterr().out and results_of(out)["energy"] != results["energy"]
    chains = torch.load(out / "checkpoint.pt", weights_only=True)["buffer"]["x"]
    jeat.main(["--eval-only", "--out", str(out), "--device", "cpu", "--num-samples", "10", "--limit-test", "5",
               "--sample-steps", "0"])
    written = np.load(out / "samples_buffer.npz")["arr_0"]  # of the checkpoint's chains
    assert np.array_equal(written, to_uint8(chains[:10]).permute(0, 2, 3, 1))
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 3


# ---------------------------------------------------------------- divergence, bad input


error = partial(conftest.error, jeat)


@pytest.mark.slow
def test_divergence_stops_and_keeps_the_last_good_checkpoint(run, tmp_path, capsys, monkeypatch):
    """A loss or an energy that is not finite or beyond 1e8; both energies together, where the loss stays small."""
    flags = [*TINY, "--sampler", "noise", "--sample-steps", 1]
    before = (run / "checkpoint.pt").read_bytes()
    for loss, e_adv, e_k in ((math.nan, 0, 0), (-1e9, -1e9, 0), (1.0, -1e9, -1e9), (1.0, 0, math.inf)):
        pieces = [torch.tensor(float(v)) for v in (1, e_adv, e_k)]
        monkeypatch.setattr(jeat, "jeat_loss", lambda f, x, y, *flags: ((f(x) * 0).sum() + loss, pieces))
        line = error(capsys, *flags, "--epochs", 3, "--out", run, code=1)
        assert "diverged" in line and "last good checkpoint" in line and "smaller --lr" in line
        assert (run / "checkpoint.pt").read_bytes() == before
    calls = []

    def the_last_explodes(f, x, y, *flags):  # by far too little for the epoch's mean
        calls.append(x)
        values = [1.0, 1.0, 1e9, 1e9] if len(calls) == 30 else [1.0] * 4
        return (f(x) * 0).sum() + values[0], [torch.tensor(v) for v in values[1:]]
    monkeypatch.setattr(jeat, "jeat_loss", the_last_explodes)
    args = ["--epochs", 1, "--batch-size", 4, "--limit-train", 120, "--buffer-size", 40]
    assert "diverged" in error(capsys, *flags, *args, "--out", tmp_path / "late", code=1)
    assert len(calls) == 30 and not (tmp_path / "late" / "checkpoint.pt").exists()
    monkeypatch.undo()
    jeat.main([*map(str, flags), "--epochs", "3", "--out", str(run)])  # from which one goes on
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] == 3


def test_divergence_of_its_own_accord(tmp_path, capsys):
    assert "diverged" in error(capsys, *TINY, "--lr", 1e6, "--out", tmp_path, "--epochs", 4, code=1)


@pytest.mark.parametrize("flags, words", [
    (["--no-such-flag"], "--no-such-flag"), (["--epoch", "3"], "--epoch"), (["--arch", "wrn-11-2"], "wrn-11-2"),
    (["--batch-size", "0"], "must be > 0"), (["--num-samples", "-1"], "must be > 0"), (["--lr", "nan"], "must be"),
    (["--attack-steps", "-1"], "must be >= 0"), (["--attack-eps", "-0.5"], "must be >= 0"), (["--epochs", "x"], "int"),
    (["--attack-eps", "inf"], "finite"), (["--sample-noise", "-1"], "must be >= 0"), (["--sampler", "ta"], "ta"),
    (["--device", "cuda:99"], "cuda:99"), (["--limit-train", "5"], "ten classes"), (["--method", "trades"], "trades"),
    (["--buffer-size", "31"], "--buffer-size"), (["--sgld-steps", "-1"], "must be >= 0"), (["--norm", "l1"], "l1"),
    (["--method", "at", "--sampler", "buffer"], "replay buffer"), (["--start", "noise"], "noise")])
def test_wrong_flags(flags, words, capsys, tmp_path):
    assert words in error(capsys, "--smoke", "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_training_flags_of_another_run_are_refused(run, capsys):
    """The rest of what can be wrong with --out is in a block, and tested with cem_sup."""
    for more, words in ((["--method", "at"], "method was jeat, is at"), (["--sgld-steps", 3], "sgld_steps was 2"),
                        (["--buffer-size", 50], "buffer_size was 40"), (["--attack-eps", 0.1], "attack_eps was")):
        assert words in error(capsys, *TINY, *more, "--out", run)


# ---------------------------------------------------------------- real data, CUDA


@pytest.mark.data
def test_real_data(tmp_path):
    run_script("jeat", "--data", os.environ["CIFAR10_ROOT"], "--out", tmp_path, "--arch", "small", "--epochs", 5,
               "--limit-train", 256, "--limit-test", 64, "--num-samples", 20, "--sample-steps", 3, "--device", "cpu",
               "--batch-size", 32, "--lr", 0.0005, "--buffer-size", 100, "--sgld-steps", 5)
    epochs, results = epochs_of(tmp_path), results_of(tmp_path)
    assert epochs[-1]["ce"] < epochs[0]["ce"]
    assert results["accuracy"]["pgd20"] <= results["accuracy"]["clean"]
    assert "--inception-weights" in results["samples"]["buffer"]["reason"]


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["jeat", "prejeat", "at"])
def test_smoke_on_cuda(method, tmp_path):
    run_script("jeat", "--smoke", "--method", method, "--device", "cuda", "--out", tmp_path)
    results = results_of(tmp_path)
    assert results["args"]["amp"] and results["accuracy"]["pgd20"] > 0.3


@pytest.mark.cuda
def test_no_synchronisation_in_a_training_step():
    f = jeat.make_model("small").cuda().to(memory_format=torch.channels_last)
    x, y = torch.rand(32, 3, 32, 32, device="cuda"), torch.arange(32, device="cuda") % 10
    buffer = ReplayBuffer(100, (3, 32, 32), device="cuda")
    jeat_loss(f, x, y, buffer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss, pieces = jeat_loss(f, x, y, buffer)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert buffer.x.dtype == loss.dtype == pieces[2].dtype == torch.float32


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_jeat.py RUN TWIN: the figures of README's table
    print(json.dumps(learning(train_judge(), *map(Path, sys.argv[1:3])), indent=1))
