"""cem_unsup.py: its scores against loops, the attack, the views, MaxEnt on a circle; the smoke run and what it
claims against controls; resume; bad input."""
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn
from torchvision.transforms import RandomResizedCrop

import cem_unsup
import conftest
from cem_unsup import batch_entropy, linear_probe, nt_xent
from conftest import ROOT, run_script
from samplers import accuracy, ascend, cross_entropy, entropy, eval_mode, fit_gaussians, info_nce

NAMES = {"maxent-uncond", "maxent-cond", "pgd-uncond", "pgd-cond"}
TINY = ["--smoke", "--limit-train", "256", "--limit-test", "20", "--num-samples", "20", "--epochs", "2",
        "--sample-steps", "3", "--attack-steps", "1", "--device", "cpu"]
close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    cem_unsup.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture
def run(tiny, tmp_path):
    """A copy of a finished run of TINY."""
    return shutil.copytree(tiny, tmp_path / "run")


def encoder(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def points(n, seed):
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def raw(score, x):
    """grad of sum score, as ascend sees it."""
    return ascend(score, x, 1, 1.0, norm="none", clamp=None) - x


# ---------------------------------------------------------------- scores against double loops


def nce_by_loops(g, x, positive, tau, others):
    """Sum over i of InfoNCE; positive None: both views are in x."""
    z = [v / v.norm() for v in g(x)]
    n = len(z)
    z_prime = None if positive is None else [v / v.norm() for v in g(positive).detach()]
    total = 0
    for i in range(n):
        f = z[i] @ (z[(i + n // 2) % n] if z_prime is None else z_prime[i]) / tau
        terms = [f.exp()] if z_prime is not None else []
        for j in range(n):
            if j != i:
                terms.append((z[i] @ z[j] / tau).exp())
                if z_prime is not None and others:
                    terms.append((z[i] @ z_prime[j] / tau).exp())
        total = total - f + sum(terms).log()
    return total


@pytest.mark.parametrize("tau", [0.5, 0.1])
@pytest.mark.parametrize("views, others", [("one", True), ("one", False), ("both", True)])
def test_info_nce_and_its_raw_gradient(views, others, tau):
    g, x, positive = encoder(), points(6, 1).requires_grad_(), points(6, 2) if views == "one" else None
    score = info_nce(g, positive, tau, others)
    loop = nce_by_loops(g, x, positive, tau, others)
    close(score(x).sum(), loop)
    close(raw(score, x), torch.autograd.grad(loop, x)[0])


@pytest.mark.parametrize("tau", [0.5, 0.1])
def test_entropy_moves_each_sample_by_its_own_index(tau):
    """Self left out, the others stopped; and by finite differences of x_i's own term at fixed z_j."""
    g, x = encoder(), points(6, 1)
    z = F.normalize(g(x), dim=1).detach()
    expected = []
    for i in range(6):
        x_i = x[i].clone().requires_grad_()
        z_i = g(x_i) / g(x_i).norm()
        value = -sum((z_i @ z[j] / tau).exp() for j in range(6) if j != i).log()
        close(entropy(g, tau)(x)[i], value)
        expected.append(torch.autograd.grad(value, x_i)[0])
    close(raw(entropy(g, tau), x), torch.stack(expected))

    def own(x_i, i):
        return -(torch.cat([z[:i], z[i + 1:]]) @ F.normalize(g(x_i), dim=0) / tau).logsumexp(0)
    d = 1e-6 * torch.eye(6, dtype=torch.float64)
    numeric = torch.stack([torch.stack([own(x[i] + e, i) - own(x[i] - e, i) for e in d]) / 2e-6 for i in range(6)])
    torch.testing.assert_close(raw(entropy(g, tau), x), numeric, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="at least two"):
        entropy(g, tau)(x[:1])


def test_the_positive_is_computed_once_without_gradient_in_the_mode_at_hand():
    calls, g = [], nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
    g.register_forward_hook(lambda module, x, z: calls.append((module.training, torch.is_grad_enabled())))
    before = copy.deepcopy(g.state_dict())
    with eval_mode(g), torch.no_grad():
        score = info_nce(g, points(5, 1), 0.5)
        ascend(score, points(5, 2), 3, 0.1, clamp=None)
    assert calls == [(False, True)] * 4 and g.training  # with gradient, and detached: see the comment there
    z_prime = next(a for a in score.args if torch.is_tensor(a))
    assert not z_prime.requires_grad and z_prime.grad_fn is None
    close(z_prime.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert all(torch.equal(v, g.state_dict()[k]) for k, v in before.items())
    with pytest.raises(RuntimeError):
        info_nce(nn.Identity(), None, 0.5)(points(5, 1))  # two views of each image: an even number


@pytest.mark.parametrize("tau", [0.5, 0.07])
def test_nt_xent(tau):
    z1, z2 = 3 * points(7, 1), points(7, 2)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    rows = []
    for i in range(14):
        others = [math.exp(z[i] @ z[j] / tau) for j in range(14) if j != i]
        rows.append(-math.log(math.exp(z[i] @ z[(i + 7) % 14] / tau) / sum(others)))
    close(nt_xent(z1, z2, tau), torch.tensor(sum(rows) / 14, dtype=torch.float64))
    close(nt_xent(z1, z2, tau), nt_xent(5 * z1, z2, tau))
    basis = torch.eye(8, dtype=torch.float64)
    same = math.log(math.exp(1 / tau) + 14) - 1 / tau  # identical views of eight orthogonal features
    close(nt_xent(basis, basis, tau), torch.tensor(same, dtype=torch.float64))
    apart = math.log(7.0)  # eight orthogonal views of four images: every term is exp(0)
    close(nt_xent(basis[:4], basis[4:], tau), torch.tensor(apart, dtype=torch.float64))


# ---------------------------------------------------------------- the circle


def gaps(x):
    a = torch.atan2(x[:, 1], x[:, 0]).sort().values
    return torch.diff(a, append=a[:1] + 2 * math.pi) * len(x) / (2 * math.pi)  # 1: even


@pytest.mark.parametrize("seed", range(4))
def test_on_a_circle_maxent_spreads_and_pgd_gathers(seed):
    g, tau = nn.Identity(), 0.5
    a = 2 * math.pi * torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.stack([a.cos(), a.sin()], 1)
    h = []
    move = partial(ascend, x=x, steps=40, step_size=0.3, norm="none", clamp=None)
    spread = move(entropy(g, tau), callback=lambda k, x_k, s: h.append(batch_entropy(F.normalize(x_k), tau)))
    assert (gaps(spread) - 1).abs().max() < 0.05 < (gaps(x) - 1).abs().max()
    assert (torch.stack(h).diff() > -1e-10).all() and h[-1] > h[0] + 0.01
    gathered = move(info_nce(g, x, tau, other_positives=False))
    assert batch_entropy(F.normalize(gathered), tau) < h[0] and gaps(gathered).max() >= 2


def test_batch_entropy():
    """All alike: -1/tau; orthogonal: log N - log(exp(1/tau) + N - 1)."""
    tau = 0.5
    alike = F.normalize(torch.ones(5, 3, dtype=torch.float64))
    close(batch_entropy(alike, tau), torch.tensor(-2.0, dtype=torch.float64))
    h = math.log(4) - math.log(math.exp(2) + 3)
    close(batch_entropy(torch.eye(4, dtype=torch.float64), tau), torch.tensor(h, dtype=torch.float64))


# ---------------------------------------------------------------- the attack and the loss


def drawn_views(n=32, seed=0):
    torch.manual_seed(seed)
    return cem_unsup.augment((cem_unsup.draw(n, seed)[0] / 255).repeat(2, 1, 1, 1)).chunk(2)


def trained(out):
    g = cem_unsup.make_model("small")
    g.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    return g.eval()


@pytest.mark.parametrize("norm, eps, step", [("l2", 1.0, 0.4), ("linf", 0.03, 0.02)])
@pytest.mark.parametrize("views", ["one", "both"])
def test_cem_loss_is_nt_xent_at_the_attacked_views(views, norm, eps, step):
    """Against the attack written by hand: eval mode, random start, projected steps; then one train-mode forward."""
    torch.manual_seed(0)
    g, (x, x_prime) = cem_unsup.make_model("small").train(), drawn_views(8)
    by_hand = copy.deepcopy(g)
    torch.manual_seed(1)
    loss = cem_unsup.cem_loss(g, x, x_prime, 0.2, views, steps=3, step_size=step, eps=eps, norm=norm)

    def length(v):
        return v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.manual_seed(1)
    x_0 = x if views == "one" else torch.cat([x, x_prime])
    if norm == "l2":
        radius, direction = torch.rand(len(x_0), 1, 1, 1), torch.randn(x_0.shape)
        x_hat = (x_0 + eps * radius * direction / length(direction)).clamp(0, 1)
    else:
        x_hat = (x_0 + eps * (2 * torch.rand(x_0.shape) - 1)).clamp(0, 1)
    for _ in range(3):
        x_hat = x_hat.detach().requires_grad_()
        z = by_hand.eval()(x_hat)
        s = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        positive = torch.arange(len(z)).roll(8)
        if views == "one":  # z' is held
            s, positive = torch.cat([s, z @ by_hand(x_prime).detach().T / 0.2], 1), torch.arange(8) + 8
        g_x, = torch.autograd.grad(F.cross_entropy(s, positive, reduction="sum"), x_hat)
        if norm == "l2":
            d = x_hat.detach() + step * g_x / length(g_x) - x_0
            d = d / (length(d) / eps).clamp(min=1)
        else:
            d = (x_hat.detach() + step * g_x.sign() - x_0).clamp(-eps, eps)
        x_hat = (x_0 + d).clamp(0, 1)
    z = by_hand.train()(torch.cat([x_hat, x_prime]) if views == "one" else x_hat)
    torch.testing.assert_close(loss, nt_xent(z[:8], z[8:], 0.2), rtol=0, atol=2e-3)
    torch.testing.assert_close(g.net[1].running_mean, by_hand.net[1].running_mean, rtol=0, atol=1e-4)
    assert g.training


def test_no_attack_steps_is_plain_contrastive_learning():
    torch.manual_seed(0)
    g, (x, x_prime) = cem_unsup.make_model("small").train(), drawn_views(8)
    z = g(torch.cat([x, x_prime]))
    for views in ("one", "both"):
        assert torch.equal(cem_unsup.cem_loss(g, x, x_prime, views=views, steps=0), nt_xent(z[:8], z[8:], 0.5))


@pytest.mark.parametrize("norm, eps, step", [("l2", 0.5, 0.1), ("linf", 8 / 255, 2 / 255)])
@pytest.mark.parametrize("views", ["one", "both"])
def test_the_attack_ends_above_its_start(cem_unsup_smoke, views, norm, eps, step):
    for seed in range(5):
        g, (x, x_prime), losses = trained(cem_unsup_smoke.out), drawn_views(64, seed), []
        score, x_0 = (info_nce(g, x_prime, 0.5), x) if views == "one" else (
            info_nce(g, None, 0.5), torch.cat([x, x_prime]))
        x_hat = ascend(score, x_0, 7, step, eps=eps, norm=norm, random_start=True,
                       callback=lambda k, x_k, s: losses.append(s.mean()))
        assert score(x_hat).mean() > losses[0] and score(x_hat).mean() > score(x_0).mean()


@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_each_step_of_the_attack_rises_inside_the_ball(cem_unsup_smoke, alpha):
    g, losses = trained(cem_unsup_smoke.out), []
    for seed in range(5):
        x, x_prime = drawn_views(64, seed)
        ascend(info_nce(g, x_prime, 0.5), x, 8, alpha, callback=lambda k, x_k, s: losses.append(s.mean()))
    assert (torch.stack(losses).view(5, 8).diff() > 0).all()


@pytest.mark.parametrize("views", ["one", "both"])
def test_every_parameter_learns_under_autocast(views):
    """z' is computed in the training forward's autocast region. In older releases (PyTorch issue 112583) casts that
    were cached there under no_grad would cut the weights' gradients off."""
    torch.manual_seed(0)
    g, (x, x_prime) = cem_unsup.make_model("small").train(), drawn_views(32)
    gradients = []
    for amp in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = cem_unsup.cem_loss(g, x, x_prime, views=views, steps=2)
            assert loss.dtype == torch.float32
        g.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in g.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in g.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.8


def test_similarities_are_float32_under_autocast():
    z = F.normalize(torch.randn(8, 64), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = [info_nce(nn.Identity(), None, 0.1)(z), entropy(nn.Identity(), 0.1)(z)]
    for score, plain in zip(scores, (info_nce(nn.Identity(), None, 0.1)(z), entropy(nn.Identity(), 0.1)(z))):
        assert torch.equal(score, plain)


@pytest.mark.parametrize("arch, parameters, width", [("resnet18", 11_958_336, 512), ("resnet50", 36_095_552, 2048)])
def test_cifar_resnet(arch, parameters, width):
    """CIFAR ResNets without their last layer, and ACL's projector of three; [0, 1] in, unit sphere out."""
    g, x = cem_unsup.make_model(arch).eval(), torch.rand(2, 3, 32, 32, requires_grad=True)
    assert sum(p.numel() for p in g.parameters()) == parameters
    kinds = [type(m).__name__ for m in g.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    with torch.autocast("cpu", torch.bfloat16):
        assert g(x).dtype == g.encode(x).dtype == torch.float32
    assert g.encode(x).shape == g(x).shape == (2, width)
    torch.testing.assert_close(g(x).norm(dim=1), torch.ones(2))
    mean, std = torch.tensor([.4914, .4822, .4465]), torch.tensor([.2023, .1994, .2010])
    inside = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    torch.testing.assert_close(g.encode(x), g.net(inside))
    assert g.net.layer1(g.net.relu(g.net.bn1(g.net.conv1(inside)))).shape[2:] == (32, 32)  # stride 1, no pooling


def test_samplers_ascend_their_scores_in_eval_mode():
    g, x_0 = cem_unsup.make_model("small").train(), drawn_views(8)[0]
    before = copy.deepcopy(g.state_dict())
    arguments = dict(eps=0.8, norm="linf", noise=0.01)
    moved = {name: cem_unsup.sample(name, g, x_0, 0.2, 3, 0.5, **arguments, generator=torch.Generator().manual_seed(5))
             for name in cem_unsup.SAMPLERS}
    assert g.training and all(torch.equal(v, g.state_dict()[k]) for k, v in before.items())
    with eval_mode(g):
        for name, score in {"maxent": entropy(g, 0.2), "pgd": info_nce(g, x_0, 0.2, other_positives=False)}.items():
            generator = torch.Generator().manual_seed(5)
            assert torch.equal(moved[name], ascend(score, x_0, 3, 0.5, **arguments, generator=generator))


def test_linear_probe():
    """Separates what h separates linearly, in any unit; leaves the encoder as it was."""
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(10)

        def encode(self, x):
            return self.norm(1e-3 * x.flatten(1) + 7)
    torch.manual_seed(0)
    y = torch.arange(600) % 10
    g, x = Raw().train(), F.one_hot(y, 10).float().view(600, 10, 1, 1) + 0.1 * torch.randn(600, 10, 1, 1)
    before = copy.deepcopy(g.state_dict())
    probe = linear_probe(g, x[:400], y[:400])
    assert accuracy(probe, x[400:], y[400:]) == 1 and g.training
    assert all(torch.equal(v, g.state_dict()[k]) for k, v in before.items())


# ---------------------------------------------------------------- views


def pictures(n=40):
    """Noise, drawn images, and flat, black, white ones: where hue and saturation have corners."""
    torch.manual_seed(0)
    flat = torch.rand(n // 4, 3, 1, 1).expand(-1, -1, 32, 32).clone()
    flat[0], flat[1], flat[2] = 0, 1, 0.5
    return torch.cat([torch.rand(n // 2, 3, 32, 32), cem_unsup.draw(n // 4, 3)[0] / 255, flat])


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue"])
def test_colours_equal_torchvision(change):
    x = pictures()
    low, high = (-0.1, 0.1) if change == "hue" else (0.6, 1.4)
    amounts = torch.cat([torch.tensor([low, high]), low + (high - low) * torch.rand(len(x) - 2)])
    ours = cem_unsup.recolour(x, change, amounts.view(-1, 1, 1, 1))
    theirs = torch.stack([getattr(TF, f"adjust_{change}")(image, float(a)) for image, a in zip(x, amounts)])
    assert (ours - theirs).abs().max() < 0.2 / 255
    assert (ours - x).abs().max() > 10 / 255


def test_resized_crop_and_flip_equal_torchvision():
    x, boxes = pictures(), []
    for k in range(len(x)):
        h, w = torch.randint(1, 33, (2,)).tolist() if k else (32, 32)
        boxes.append((int(torch.randint(33 - h, ())), int(torch.randint(33 - w, ())), h, w))
    box, flip = torch.tensor(boxes).float(), torch.arange(len(x)) % 2 == 1
    ours = cem_unsup.resized_crop(x, box[:, :2], box[:, 2:], flip)
    theirs = torch.stack([TF.resized_crop(image, *b, (32, 32)) for image, b in zip(x, boxes)])
    theirs = torch.where(flip.view(-1, 1, 1, 1), TF.hflip(theirs), theirs)
    assert (ours - theirs).abs().max() < 0.2 / 255
    assert torch.equal(ours[0], x[0])  # the whole image, unflipped


def test_the_views_parameters_have_torchvisions_law(monkeypatch):
    """Area, ratio and place of the crop against RandomResizedCrop's own draws; shares of flip, jitter, gray."""
    seen = {}
    crop, recolour = cem_unsup.resized_crop, cem_unsup.recolour
    monkeypatch.setattr(cem_unsup, "resized_crop", lambda x, *p: seen.update(crop=p) or crop(x, *p))
    monkeypatch.setattr(cem_unsup, "recolour", lambda x, name, a: seen.update({name: a.flatten()}) or
                        seen.setdefault("order", []).append(name) or recolour(x, name, a))
    torch.manual_seed(0)
    n = 4000
    views = cem_unsup.augment(torch.rand(1, 3, 32, 32).expand(n, -1, -1, -1))
    assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6
    start, length, flip = seen["crop"]
    assert len(torch.cat([start, length, *(seen[k][:, None] for k in ("hue", "contrast"))], 1).unique(dim=0)) > 0.99 * n
    theirs = torch.tensor([RandomResizedCrop.get_params(views[0], (.1, 1), (3 / 4, 4 / 3)) for _ in range(n)]).float()
    (top, left), (h, w) = start.unbind(1), length.unbind(1)
    for ours, other in ((h, theirs[:, 2]), (w, theirs[:, 3]), (h * w, theirs[:, 2] * theirs[:, 3]),
                        (top, theirs[:, 0]), (left, theirs[:, 1]), (h / w, theirs[:, 2] / theirs[:, 3])):
        grid = torch.cat([ours, other]).unique()
        steps = [(t.sort().values[None] <= grid[:, None]).float().mean(1) for t in (ours, other)]
        assert (steps[0] - steps[1]).abs().max() < 1.95 * (2 / n) ** 0.5  # Kolmogorov-Smirnov, the 0.1 % level
    assert (start + length <= 32).all() and (start >= 0).all() and torch.equal(start, start.round())
    assert abs(flip.float().mean() - 0.5) < 0.03
    gray = (views.amax(1) - views.amin(1) < 1e-6).flatten(1).all(1)
    assert abs(gray.float().mean() - 0.2) < 0.03
    jittered = seen["hue"] != 0
    assert abs(jittered.float().mean() - 0.8) < 0.03
    for name, neutral, most in (("brightness", 1, .4), ("contrast", 1, .4), ("saturation", 1, .4), ("hue", 0, .1)):
        a = seen[name]
        assert torch.equal(a != neutral, jittered)  # all four or none
        u = (a[jittered] - neutral + most) / (2 * most)
        assert u.min() >= -1e-6 and u.max() <= 1 + 1e-6 and abs(u.mean() - 0.5) < 0.02 and u.std() > 0.27
    for _ in range(60):
        cem_unsup.augment(torch.rand(1, 3, 32, 32))
    orders = [tuple(seen["order"][i:i + 4]) for i in range(0, len(seen["order"]), 4)]
    assert len(set(orders)) > 12 and all(len(set(o)) == 4 for o in orders)


# ---------------------------------------------------------------- the smoke run and what it learns


def epochs_of(out):
    return [r for r in map(json.loads, open(out / "log.jsonl")) if r["event"] == "epoch"]


def test_smoke_writes_everything(cem_unsup_smoke):
    out = cem_unsup_smoke.out
    results = json.loads((out / "results.json").read_text())
    assert {"args", "versions", "device", "seconds", "accuracy", "samples"} <= set(results)
    assert set(results["samples"]) == NAMES
    seeds = {}
    for name, row in results["samples"].items():
        assert row["n"] == 100 and row["fid"] is None and "smoke" in row["reason"]
        z = np.load(out / f"samples_{name}.npz")
        assert z["arr_0"].shape == (100, 32, 32, 3) and z["arr_0"].dtype == np.uint8
        assert name.endswith("uncond") != ("arr_1" in z)  # only cond has classes
        assert Image.open(out / f"samples_{name}.png").size == (342, 342)
        before, after = row["entropy"]
        assert (after > before) == name.startswith("maxent")
        seeds.setdefault(name.split("-")[1], set()).add(before)
    assert all(len(s) == 1 for s in seeds.values())  # both samplers start from the same seeds
    epochs = epochs_of(out)
    assert [r["epoch"] for r in epochs] == list(range(1, 9))
    assert all(len(r["losses"]) == 2000 // 64 for r in epochs)  # the last, incomplete batch is left out
    losses = np.array([r["losses"] for r in epochs])
    assert losses[-1, -8:].mean() < losses[0, :8].mean() and np.allclose(losses.mean(1), [r["loss"] for r in epochs])
    for r in epochs:  # 0.8 epochs of warm-up, then a cosine
        t = (r["epoch"] - 0.5 / 31 - 0.8) / 7.2
        assert r["lr"] == pytest.approx(0.015 * (1 + math.cos(math.pi * t)) / 2)


def learning(g):
    """Every figure of the claim, of one encoder."""
    (x, y), (x_test, y_test) = cem_unsup.draw(2000, 0), (t[:500] for t in cem_unsup.draw(1000, 1))  # as --smoke
    torch.manual_seed(0)
    probe = linear_probe(g, x, y)
    figures = {"clean": accuracy(probe, x_test, y_test),
               "pgd l2 0.5": accuracy(probe, x_test, y_test, cross_entropy, steps=20, step_size=0.0625, eps=0.5)}
    x_0 = fit_gaussians(x).sample(100, torch.Generator().manual_seed(0))
    d = cem_unsup.sample("maxent", g, x_0, steps=30) - x_0
    figures["coarse"] = float(16 * F.avg_pool2d(d, 4).square().sum() / d.square().sum())  # of the move's energy
    return figures


def entropies(g, score, alpha):
    h, x_0 = [], fit_gaussians(cem_unsup.draw(2000, 0)[0]).sample(100, torch.Generator().manual_seed(0))
    with eval_mode(g):
        ascend(score(x_0), x_0, 11, alpha, callback=lambda k, x_k, s: h.append(batch_entropy(g(x_k).detach())))
    return torch.stack(h)  # before each of ten steps and after them


@pytest.mark.slow
def test_attacked_training_learns_what_the_twin_does_not(cem_unsup_smoke, cem_unsup_twin):
    """Bounds lie below the worst of five seeds: see README, "Smoke runs and their controls"."""
    attacked, twin = (learning(trained(run.out)) for run in (cem_unsup_smoke, cem_unsup_twin))
    print(json.dumps({"attacked": attacked, "twin": twin}))
    assert attacked["pgd l2 0.5"] >= 0.5 and attacked["pgd l2 0.5"] > twin["pgd l2 0.5"] + 0.15
    assert attacked["coarse"] >= 0.3 and attacked["coarse"] >= 2 * twin["coarse"]
    reported = json.loads((cem_unsup_smoke.out / "results.json").read_text())["accuracy"]
    assert abs(reported["pgd20"] - attacked["pgd l2 0.5"]) < 0.02 and abs(reported["clean"] - attacked["clean"]) < 0.02


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5])
def test_maxent_raises_the_batch_entropy_at_each_of_ten_steps(cem_unsup_smoke, alpha):
    g = trained(cem_unsup_smoke.out)
    assert (entropies(g, lambda x_0: entropy(g, 0.5), alpha).diff() > 0).all()


@pytest.mark.parametrize("alpha", [0.1, 0.25])
def test_pgd_lowers_the_batch_entropy_at_each_of_ten_steps(cem_unsup_smoke, alpha):
    g = trained(cem_unsup_smoke.out)
    assert (entropies(g, lambda x_0: info_nce(g, x_0, 0.5, other_positives=False), alpha).diff() < 0).all()


@pytest.mark.slow
def test_no_label_reaches_training(tmp_path, monkeypatch):
    flags = [*TINY, "--epochs", "1", "--sampler", "maxent", "--sample-steps", "0"]
    cem_unsup.main([*flags, "--out", str(tmp_path / "right")])
    draw = cem_unsup.draw
    monkeypatch.setattr(cem_unsup, "draw", lambda n, seed: (draw(n, seed)[0], (draw(n, seed)[1] * 7 + 3).flip(0) % 10))
    cem_unsup.main([*flags, "--out", str(tmp_path / "shuffled")])
    one, two = (torch.load(tmp_path / d / "checkpoint.pt", weights_only=True)["model"] for d in ("right", "shuffled"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    def samples(start):
        return [np.load(tmp_path / d / f"samples_maxent-{start}.npz")["arr_0"] for d in ("right", "shuffled")]
    assert not np.array_equal(*samples("cond"))  # the labels were others: the class-wise seeds show it
    assert np.array_equal(*samples("uncond"))


# ---------------------------------------------------------------- resume


def same_end(a, b):
    one, two = (torch.load(d / "checkpoint.pt", weights_only=True) for d in (a, b))
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (one, two)]
    return (one["epoch"] == two["epoch"] and torch.equal(one["rng"], two["rng"])
            and all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
            and all(map(torch.equal, *momentum))
            and all(np.array_equal(*(np.load(d / f"samples_{n}.npz")["arr_0"] for d in (a, b))) for n in NAMES)
            and len({(d / "results.json").read_text().split('"accuracy": {')[1].split("}")[0] for d in (a, b)}) == 1)


@pytest.mark.slow
def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    flags, out = [*TINY, "--epochs", "4"], tmp_path / "stopped"
    cem_unsup.main([*map(str, flags), "--out", str(tmp_path / "whole")])
    process = subprocess.Popen([sys.executable, str(ROOT / "cem_unsup.py"), *flags, "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] < 4
    cem_unsup.main([*map(str, flags), "--out", str(out)])
    assert same_end(tmp_path / "whole", out) and not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_what_is_done_is_not_done_again(run, capsys):
    out = run
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in out.glob("*") if p.suffix in (".pt", ".npz")}  # noqa: E731
    first = stamps()
    assert set(first) == {"checkpoint.pt", *(f"samples_{name}.npz" for name in NAMES)}
    cem_unsup.main([*TINY, "--out", str(out), "--start", "class"])  # a part of what is there
    assert stamps() == first
    cem_unsup.main([*TINY, "--out", str(out), "--sampler", "pgd", "--start", "class", "--sample-steps", "4"])
    assert {name for name, stamp in stamps().items() if stamp != first[name]} == {"samples_pgd-cond.npz"}
    capsys.readouterr()
    cem_unsup.main([*TINY, "--out", str(out), "--epochs", "3"])  # may grow
    assert "--epochs was 2" in capsys.readouterr().out
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 3
    cem_unsup.main(["--eval-only", "--out", str(out), "--device", "cpu", "--num-samples", "10", "--limit-test", "10",
                    "--sample-steps", "2"])
    assert np.load(out / "samples_maxent-uncond.npz")["arr_0"].shape == (10, 32, 32, 3)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 3


def test_defaults():
    """METHODS' values: ACL's schedule and temperature, supervised CEM's attack and sampling path."""
    wanted = dict(arch="resnet50", attack_views="one", norm="l2", attack_eps=0.5, attack_steps=7, attack_step_size=0.1,
                  temperature=0.5, epochs=1000, batch_size=512, lr=0.5, warmup_epochs=10, sample_norm="l2", start="all",
                  sample_steps=60, sample_step_size=0.5, sample_eps=30, sample_noise=0, sample_batch_size=512,
                  num_samples=50000, seed_split="train", sampler=["maxent", "pgd"])
    args = vars(cem_unsup.parse_args([]))
    assert {k: args[k] for k in wanted} == wanted
    assert batch_entropy.__defaults__ == (0.5,) and cem_unsup.cem_loss.__defaults__ == (0.5, "one", 7, 0.1, 0.5, "l2")
    assert cem_unsup.sample.__defaults__ == (0.5, 60, 0.5, 30.0, "l2", 0.0, None)


def test_training_passes_its_flags_views_and_whole_batches_on(tmp_path, monkeypatch):
    seen, rates, kept, step = [], [], [], torch.optim.SGD.step

    def record(g, x, x_prime, *numbers):
        seen.append((len(x), *numbers))
        assert g.training and x.shape == x_prime.shape and (x - x_prime).flatten(1).abs().amax(1).min() > 0.01
        assert len(kept) < 2 or kept[-2]() is None  # no graph outlives its step
        loss = g(x).square().sum()
        kept.append(weakref.ref(loss))
        return loss

    def record_step(self):
        rates.append([self.param_groups[0][k] for k in ("lr", "momentum", "weight_decay")])
        step(self)
    monkeypatch.setattr(cem_unsup, "cem_loss", record)
    monkeypatch.setattr(torch.optim.SGD, "step", record_step)
    cem_unsup.main([*TINY, "--limit-train", "100", "--batch-size", "32", "--sampler", "pgd", "--start", "pooled",
                    "--sample-steps", "0", "--out", str(tmp_path), "--attack-views", "both", "--norm", "linf",
                    "--temperature", "0.2", "--attack-steps", "4", "--attack-step-size", "0.03", "--attack-eps", "0.04",
                    "--epochs", "20", "--warmup-epochs", "2", "--lr", "0.6"])
    assert seen == [(32, 0.2, "both", 4, 0.03, 0.04, "linf")] * 60  # three batches an epoch: the fourth is incomplete
    t = (np.arange(54) + 0.5) / 54
    expected = [*(0.6 * np.array([1, 3, 5, 7, 9, 11]) / 12), *(0.3 * (1 + np.cos(np.pi * t)))]
    np.testing.assert_allclose(rates, [[lr, 0.9, 1e-4] for lr in expected])


def test_the_seeds_split_and_the_probes_images(tmp_path, monkeypatch):
    fitted, probe = [], cem_unsup.linear_probe
    monkeypatch.setattr(cem_unsup, "linear_probe", lambda g, x, y: fitted.append(len(x)) or probe(g, x, y))
    for split in ("train", "test"):
        cem_unsup.main([*TINY, "--out", str(tmp_path), "--sample-steps", "0", "--seed-split", split])
        (tmp_path / "samples_pgd-cond.npz").rename(tmp_path / f"{split}.npz")
    assert not np.array_equal(*(np.load(tmp_path / f"{split}.npz")["arr_0"] for split in ("train", "test")))
    assert fitted == [256]  # the training images, once


def test_batches_of_samples_are_equally_large(tmp_path, monkeypatch):
    """N decides how far the samples spread: no small batch is left over at the end."""
    sizes, sample = [], cem_unsup.sample
    monkeypatch.setattr(cem_unsup, "sample", lambda s, g, x_0, *a: sizes.append(len(x_0)) or sample(s, g, x_0, *a))
    cem_unsup.main([*TINY, "--epochs", "1", "--sampler", "pgd", "--start", "class", "--sample-batch-size", "9", "--out",
                    str(tmp_path)])
    assert sizes == [7, 7, 6]
    assert np.load(tmp_path / "samples_pgd-cond.npz")["arr_1"].tolist() == [*range(10)] * 2


# ---------------------------------------------------------------- bad input


error = partial(conftest.error, cem_unsup)


@pytest.mark.parametrize("flags, words", [
    (["--no-such-flag"], "--no-such-flag"), (["--arch", "vgg"], "vgg"), (["--attack-views", "none"], "none"),
    (["--temperature", "0"], "temperature"), (["--temperature", "-1"], "temperature"), (["--lr", "nan"], "lr"),
    (["--warmup-epochs", "-1"], "warmup"), (["--attack-eps", "inf"], "finite"), (["--sampler", "gan"], "gan"),
    (["--start", "noise"], "noise"), (["--batch-size", "1"], "at least two"), (["--num-samples", "1"], "at least two"),
    (["--num-samples", "5", "--sample-batch-size", "2"], "at least two"), (["--limit-train", "0"], "limit-train"),
    (["--sample-batch-size", "1"], "at least two"), (["--limit-train", "63"], "--limit-train"),
    (["--limit-train", "9", "--batch-size", "4"], "ten classes")])
def test_wrong_flags(flags, words, capsys, tmp_path):
    assert words in error(capsys, "--smoke", "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_training_flags_of_another_run_are_refused(run, capsys):
    """The rest of what can be wrong with --out is in a block, and tested with cem_sup."""
    assert "temperature was 0.5, is 0.2" in error(capsys, *TINY, "--out", run, "--temperature", 0.2)
    assert "attack_views was one, is both" in error(capsys, *TINY, "--out", run, "--attack-views", "both")


def test_divergence_stops_and_keeps_the_last_good_checkpoint(run, capsys, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(cem_unsup, "cem_loss", lambda g, x, *rest: g(x).sum() * float("nan"))
    assert "diverged" in error(capsys, *TINY, "--epochs", 3, "--out", run, code=1)
    assert (run / "checkpoint.pt").read_bytes() == before


# ---------------------------------------------------------------- real data, CUDA


@pytest.mark.data
def test_real_data(tmp_path):
    run_script("cem_unsup", "--data", os.environ["CIFAR10_ROOT"], "--out", tmp_path, "--arch", "small", "--epochs", 4,
               "--limit-train", 256, "--limit-test", 64, "--num-samples", 20, "--sample-steps", 3, "--device", "cpu",
               "--batch-size", 32, "--lr", 0.05, "--warmup-epochs", 0, "--attack-steps", 2)
    losses = np.concatenate([r["losses"] for r in epochs_of(tmp_path)])
    assert len(losses) == 32 and losses[-8:].mean() < losses[:8].mean()
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["samples"]) == NAMES and results["accuracy"]["pgd20"] <= results["accuracy"]["clean"]
    assert all("--inception-weights" in row["reason"] for row in results["samples"].values())


@pytest.mark.cuda
def test_smoke_on_cuda(tmp_path):
    run_script("cem_unsup", "--smoke", "--device", "cuda", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["args"]["amp"] and results["accuracy"]["pgd20"] > 0.5
    assert all((r["entropy"][1] > r["entropy"][0]) == n.startswith("maxent") for n, r in results["samples"].items())


@pytest.mark.cuda
def test_training_steps_do_not_synchronise():
    g, x = cem_unsup.make_model("small").cuda().train(), torch.rand(64, 3, 32, 32, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for views in ("one", "both"):
            with torch.autocast("cuda", torch.bfloat16):
                loss = cem_unsup.cem_loss(g, *cem_unsup.augment(x.repeat(2, 1, 1, 1)).chunk(2), views=views)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_cem_unsup.py SEED RUN TWIN: README's figures
    torch.manual_seed(int(sys.argv[1]))
    nets = {"untrained": cem_unsup.make_model("small").eval()} | {out: trained(Path(out)) for out in sys.argv[2:]}
    print(json.dumps({name: learning(g) for name, g in nets.items()}, indent=1))
