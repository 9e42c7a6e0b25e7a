"""cem_unsup.py: its scores against loops, loss and samplers by hand, the views, MaxEnt on a circle; what the smoke run
learns, beside its controls; its sets of samples, resume, wrong flags."""
import copy
import json
import math
import os
import sys
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
import samplers
from cem_unsup import batch_entropy, cem_loss, linear_probe, nt_xent
from conftest import DRAW, error, run_script
from samplers import accuracy, ascend, cross_entropy, entropy, eval_mode, fit_gaussians, info_nce

NAMES = {"maxent-uncond", "maxent-cond", "pgd-uncond", "pgd-cond"}
TINY = ["--smoke", "--limit", "20", "--batch-size", "8", "--num-samples", "20", "--epochs", "2", "--sample-steps", "2",
        "--attack-steps", "1", "--device", "cpu"]
TAU = cem_unsup.parse_args(["--smoke"]).temperature
close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)


@pytest.fixture
def few_images(monkeypatch):
    """Enough for TINY; drawing all takes seconds."""
    monkeypatch.setattr(samplers, "drawn_digits", lambda n, seed: DRAW(40, seed))


def encoder(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def points(n, seed):
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def raw(score, x):
    """grad of sum score, as ascend sees it."""
    return ascend(score, x, 1, 1.0, norm="none", clamp=None) - x


def small():
    torch.manual_seed(0)
    return cem_unsup.make_model("small-16").train()


def drawn_views(n, seed=0):
    torch.manual_seed(seed)
    x = DRAW(n, seed)[0] / 255
    return cem_unsup.augment(x), cem_unsup.augment(x)


# ---------------------------------------------------------------- scores against double loops


@pytest.mark.parametrize("tau", [0.5, 0.1])
@pytest.mark.parametrize("views, others", [("one", True), ("one", False), ("both", True)])
def test_info_nce_and_its_raw_gradient(views, others, tau):
    g, x, positive = encoder(), points(6, 1).requires_grad_(), points(6, 2) if views == "one" else None
    z, total = F.normalize(g(x), dim=1), 0
    z_prime = F.normalize(g(positive), dim=1).detach() if views == "one" else z.roll(3, 0)
    for i in range(6):
        f_positive = z[i] @ z_prime[i] / tau
        terms = [(z[i] @ z[j] / tau).exp() for j in range(6) if j != i]
        if views == "one":  # else the positive is among them
            terms += [f_positive.exp()] + [(z[i] @ z_prime[j] / tau).exp() for j in range(6) if others and j != i]
        total = total - f_positive + sum(terms).log()
    close(info_nce(g, positive, tau, others)(x).sum(), total)
    close(raw(info_nce(g, positive, tau, others), x), torch.autograd.grad(total, x)[0])


@pytest.mark.parametrize("tau", [0.5, 0.1])
def test_entropy_moves_each_sample_by_its_own_index(tau):
    """Self left out, the others stopped."""
    g, x, expected = encoder(), points(6, 1), []
    z = F.normalize(g(x), dim=1).detach()
    for i in range(6):
        x_i = x[i].clone().requires_grad_()
        z_i = g(x_i) / g(x_i).norm()
        value = -sum((z_i @ z[j] / tau).exp() for j in range(6) if j != i).log()
        close(entropy(g, tau)(x)[i], value)
        expected.append(torch.autograd.grad(value, x_i)[0])
    close(raw(entropy(g, tau), x), torch.stack(expected))
    with pytest.raises(ValueError, match="at least two"):
        entropy(g, tau)(x[:1])


@pytest.mark.parametrize("tau", [0.5, 0.07])
def test_nt_xent(tau):
    z1, z2, total = 3 * points(7, 1), points(7, 2), 0
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    for i in range(14):
        others = sum(math.exp(z[i] @ z[j] / tau) for j in range(14) if j != i)
        total -= math.log(math.exp(z[i] @ z[(i + 7) % 14] / tau) / others)
    close(nt_xent(z1, z2, tau).item(), total / 14)
    basis = torch.eye(8, dtype=torch.float64)  # identical views of eight orthogonal features; eight of four images
    close(nt_xent(basis, basis, tau).item(), math.log(math.exp(1 / tau) + 14) - 1 / tau)
    close(nt_xent(basis[:4], basis[4:], tau).item(), math.log(7))
    with pytest.raises(ValueError, match="same images"):
        nt_xent(basis[:5], basis[5:], tau)


def test_batch_entropy():
    close(batch_entropy(F.normalize(torch.ones(5, 3, dtype=torch.float64)), 0.5).item(), -2.0)  # all alike
    close(batch_entropy(torch.eye(4, dtype=torch.float64), 0.5).item(), math.log(4) - math.log(math.exp(2) + 3))


def gaps(x):
    a = torch.atan2(x[:, 1], x[:, 0]).sort().values
    return torch.diff(a, append=a[:1] + 2 * math.pi) * len(x) / (2 * math.pi)  # 1: even


@pytest.mark.parametrize("seed", range(2))
def test_on_a_circle_maxent_spreads_and_pgd_gathers(seed):
    g, tau, h = nn.Identity(), 0.5, []
    a = 2 * math.pi * torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.stack([a.cos(), a.sin()], 1)
    move = partial(ascend, x=x, steps=40, step_size=0.3, norm="none", clamp=None)
    spread = move(cem_unsup.SAMPLERS["maxent"](g, x, tau),
                  callback=lambda k, x_k, s: h.append(batch_entropy(F.normalize(x_k), tau)))
    assert (gaps(spread) - 1).abs().max() < 0.05 < (gaps(x) - 1).abs().max()
    assert (torch.stack(h).diff() > -1e-10).all() and h[-1] > h[0] + 0.01
    gathered = move(cem_unsup.SAMPLERS["pgd"](g, x, tau))
    assert batch_entropy(F.normalize(gathered), tau) < h[0] and gaps(gathered).max() >= 2


# ---------------------------------------------------------------- the loss, the samplers, the net


def length(v):
    return v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def moved(x, g_x, x_0, norm, step, eps):
    """A step along g_x by hand, projected."""
    if norm == "l2":
        d = x + step * g_x / length(g_x) - x_0
        d = d / (length(d) / eps).clamp(min=1)
    else:
        d = (x + step * g_x.sign() - x_0).clamp(-eps, eps)
    return (x_0 + d).clamp(0, 1).detach()


@pytest.mark.parametrize("norm, eps, step", [("l2", 1.0, 0.4), ("linf", 0.03, 0.02)])
@pytest.mark.parametrize("views", ["one", "both"])
def test_cem_loss_is_nt_xent_at_the_attacked_views(views, norm, eps, step):
    """Against the attack by hand: eval mode, random start, projected steps; then one train-mode forward of both."""
    g, (x, x_prime) = small(), drawn_views(8)
    by_hand = copy.deepcopy(g)
    torch.manual_seed(1)
    loss = cem_loss(g, x, x_prime, 0.2, views, steps=3, step_size=step, eps=eps, norm=norm)

    torch.manual_seed(1)
    x_0 = x if views == "one" else torch.cat([x, x_prime])
    if norm == "l2":
        radius, direction = torch.rand(len(x_0), 1, 1, 1), torch.randn(x_0.shape)
        x_hat = (x_0 + eps * radius * direction / length(direction)).clamp(0, 1)
    else:
        x_hat = (x_0 + eps * (2 * torch.rand(x_0.shape) - 1)).clamp(0, 1)
    for _ in range(3):
        x_hat.requires_grad_()
        z = by_hand.eval()(x_hat)
        s = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        positive = torch.arange(len(z)).roll(8)
        if views == "one":  # z' is held
            s, positive = torch.cat([s, z @ by_hand(x_prime).detach().T / 0.2], 1), torch.arange(8) + 8
        g_x, = torch.autograd.grad(F.cross_entropy(s, positive, reduction="sum"), x_hat)
        x_hat = moved(x_hat.detach(), g_x, x_0, norm, step, eps)
    z = by_hand.train()(torch.cat([x_hat, x_prime]) if views == "one" else x_hat)
    torch.testing.assert_close(loss, nt_xent(z[:8], z[8:], 0.2), rtol=0, atol=2e-3)
    torch.testing.assert_close(g.net[1].running_mean, by_hand.net[1].running_mean, rtol=0, atol=1e-4)
    assert g.training


def test_views_that_have_nothing_to_be_told_from_are_refused():
    """A single pair: its score is 0 and its gradient rounding, which a normalised step would follow."""
    for n in (2, 3):
        with pytest.raises(ValueError, match="two views of each"):
            info_nce(encoder(), None, 0.5)(points(n, 1))


@pytest.mark.parametrize("views", ["one", "both"])
def test_without_an_attack_it_is_contrastive_learning(views):
    """And under autocast every parameter learns nearly the same: z' is computed in the training's region, without a
    graph; in PyTorch before 2.11 (issue 112583) that cut the weights' gradients off."""
    g, (x, x_prime), gradients = small(), drawn_views(12), []
    z = g(torch.cat([x, x_prime]))
    assert torch.equal(cem_loss(g, x, x_prime, 0.5, views, steps=0, step_size=1, eps=1), nt_xent(z[:12], z[12:], 0.5))
    for amp in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = cem_loss(g, x, x_prime, 0.5, views, steps=1, step_size=0.1, eps=0.5)
        assert loss.dtype == torch.float32
        gradient = torch.autograd.grad(loss, list(g.parameters()))
        assert all(v.abs().sum() > 0 for v in gradient)
        gradients.append(torch.cat([v.flatten() for v in gradient]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.8


@pytest.mark.parametrize("sampler", ["maxent", "pgd"])
def test_sample_moves_equal_batches_up_the_score(sampler):
    """By hand, in batches of 4, 3 and 3; with their entropy before and after; in eval mode."""
    g, x_0, sizes = small(), [], []
    flags = ("--num-samples 10 --sample-batch-size 4 --sample-seed 3 --temperature 0.2 --sample-steps 2 "
             "--sample-step-size 0.8 --sample-eps 1.2 --device cpu")
    args = cem_unsup.parse_args(flags.split())

    def start(labels):
        sizes.append(labels.tolist())
        x_0.append(torch.rand(len(labels), 3, 32, 32))
        return x_0[-1]
    images, labels, entropies = cem_unsup.sample(g, sampler, start, args)
    assert g.training and sizes == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]] and labels.tolist() == [*range(10)]
    torch.manual_seed(3)
    close(x_0[0], torch.rand(4, 3, 32, 32))

    g.eval()
    expected, h = [], []
    for batch in x_0:
        x, anchor = batch, g(batch).detach()
        for _ in range(2):
            x.requires_grad_()
            z = g(x)
            f = (z @ z.detach().T if sampler == "maxent" else z @ z.T) / 0.2
            f = f.masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
            if sampler == "maxent":
                score = -f.logsumexp(1)
            else:
                positive = (z * anchor).sum(1, keepdim=True) / 0.2
                score = torch.cat([f, positive], 1).logsumexp(1) - positive.squeeze(1)
            x = moved(x.detach(), torch.autograd.grad(score.sum(), x)[0], batch.detach(), "l2", 0.8, 1.2)
        expected.append(x)
        h.append([batch_entropy(z, 0.2).item() for z in (anchor, g(x).detach())])
    assert (images - 255 * torch.cat(expected)).abs().max() < 1.5
    np.testing.assert_allclose(entropies, np.mean(h, 0), atol=5e-3)


@pytest.mark.parametrize("arch, parameters, width", [("resnet18", 11_958_336, 512), ("resnet50", 36_095_552, 2048)])
def test_cifar_resnet(arch, parameters, width):
    """CIFAR ResNets without their last layer, and ACL's projector of three."""
    with torch.device("meta"):
        g = cem_unsup.make_model(arch)
    assert sum(p.numel() for p in g.parameters()) == parameters
    layers = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(m).__name__ for m in g.projector] == [*layers, *layers, *layers[:2]]
    x = torch.rand(2, 3, 32, 32, device="meta")
    assert g.net.layer1(g.net.maxpool(g.net.conv1(x)))[0, 0].shape == (32, 32) and g.encode(x).shape == (2, width)


def test_the_encoder_takes_pixels_and_returns_the_sphere():
    g, x = small().eval(), torch.rand(3, 3, 32, 32)
    inside = TF.normalize(x, [.4914, .4822, .4465], [.2023, .1994, .2010])
    torch.testing.assert_close(g.encode(x), g.net(inside))
    torch.testing.assert_close(g(x), F.normalize(g.projector(g.net(inside)), dim=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert g(x).dtype == g.encode(x).dtype == torch.float32
    torch.testing.assert_close(g(x).norm(dim=1), torch.ones(3))


def test_linear_probe():
    """Separates what h separates linearly, in any unit; leaves the encoder as it was; refuses wrong labels."""
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(10)

        def encode(self, x):
            return self.norm(1e-3 * x.flatten(1) + 7)
    torch.manual_seed(0)
    y = torch.arange(600) % 10
    g, x = Raw().train(), F.one_hot(y, 10).float().view(600, 10, 1, 1) + 0.1 * torch.randn(600, 10, 1, 1)
    x = (x / 4 + 0.3).clamp(0, 1)
    before = copy.deepcopy(g.state_dict())
    probe = linear_probe(g, x[:400], y[:400])
    assert accuracy(probe, x[400:], y[400:]) == 1 and g.training and not probe.head.training
    assert all(torch.equal(v, g.state_dict()[k]) for k, v in before.items())
    with pytest.raises(ValueError, match="labels"):
        linear_probe(g, x, y - 1)


# ---------------------------------------------------------------- views


def pictures(n=40):
    """Noise, drawn images, and flat, black, white ones: where hue and saturation have corners."""
    torch.manual_seed(0)
    flat = torch.rand(n // 4, 3, 1, 1).expand(-1, -1, 32, 32).clone()
    flat[0], flat[1], flat[2] = 0, 1, 0.5
    return torch.cat([torch.rand(n // 2, 3, 32, 32), DRAW(n // 4, 3)[0] / 255, flat])


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue"])
def test_colours_equal_torchvision(change):
    x = pictures()
    low, high = (-0.5, 0.5) if change == "hue" else (0.6, 1.4)
    amounts = torch.cat([torch.tensor([low, high]), low + (high - low) * torch.rand(len(x) - 2)])
    ours = getattr(cem_unsup, change)(x, amounts.view(-1, 1, 1, 1))
    theirs = torch.stack([getattr(TF, f"adjust_{change}")(image, float(a)) for image, a in zip(x, amounts)])
    assert (ours - theirs).abs().max() < 0.2 / 255 and (ours - x).abs().max() > 10 / 255


def test_resized_crop_equals_torchvision():
    x, boxes = pictures(), [(0, 0, 32, 32)]
    for _ in range(len(x) - 1):
        h, w = torch.randint(1, 33, (2,)).tolist()
        boxes.append((int(torch.randint(33 - h, ())), int(torch.randint(33 - w, ())), h, w))
    box = torch.tensor(boxes).float()
    ours = cem_unsup.resized_crop(x, box[:, :2], box[:, 2:])
    theirs = torch.stack([TF.resized_crop(image, *b, (32, 32)) for image, b in zip(x, boxes)])
    assert (ours - theirs).abs().max() < 0.2 / 255 and torch.equal(ours[0], x[0])
    views = cem_unsup.augment(x)
    assert views.min() >= 0 and views.max() <= 1  # exactly: attacks refuse what is outside


@pytest.mark.parametrize("area", [0.1, 0.5])
def test_the_boxes_have_torchvisions_law(area):
    torch.manual_seed(0)
    n = 4000
    start, size = cem_unsup.random_boxes(n, 32, area, "cpu")
    box = torch.empty(3, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(box, (area, 1), (3 / 4, 4 / 3)) for _ in range(n)]).float()
    ours = torch.cat([start, size], 1)
    assert (start + size <= 32).all() and (start >= 0).all() and torch.equal(ours, ours.round())
    for figure in (lambda b: b, lambda b: b[:, 2:3] * b[:, 3:], lambda b: b[:, 2:3] / b[:, 3:]):
        for mine, other in zip(figure(ours).T, figure(theirs).T):
            grid = torch.cat([mine, other]).unique()
            steps = [torch.searchsorted(t.sort().values, grid, right=True) / n for t in (mine, other)]
            assert (steps[0] - steps[1]).abs().max() < 1.95 * (2 / n) ** 0.5  # Kolmogorov-Smirnov, the 0.1 % level


def test_the_shares_and_strengths_of_flip_jitter_and_gray(monkeypatch):
    """Left half darker than the right: a flip shows through every change of colour."""
    seen, order, n, images = {}, [], 4000, torch.rand(1, 3, 4, 4)
    images[..., :2] /= 4

    def record(name, change):
        def recorded(x, amount):
            order.append(name)
            seen[name] = amount.flatten()
            return change(x, amount)
        return recorded
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(cem_unsup, name, record(name, getattr(cem_unsup, name)))
    whole = torch.zeros(n, 2), torch.full((n, 2), 4.0)
    monkeypatch.setattr(cem_unsup, "random_boxes", lambda n, *rest: tuple(b[:n] for b in whole))
    torch.manual_seed(0)
    views = cem_unsup.augment(images.expand(n, -1, -1, -1))
    flipped = views[..., :2].mean((1, 2, 3)) > views[..., 2:].mean((1, 2, 3))
    gray = (views.amax(1) - views.amin(1) < 1e-6).flatten(1).all(1)
    jittered = seen["hue"] != 0
    for share, wanted in ((flipped, 0.5), (gray, 0.2), (jittered, 0.8)):
        assert abs(share.float().mean() - wanted) < 0.03
    views = cem_unsup.augment(images.expand(n, -1, -1, -1), jitter=0.25, gray=0, flip=False)
    assert not (views.amax(1) - views.amin(1) < 1e-6).flatten(1).all(1).any()
    assert (views[..., :2].mean((1, 2, 3)) < views[..., 2:].mean((1, 2, 3))).all()
    jittered = seen["hue"] != 0
    for name, neutral, most in (("brightness", 1, .2), ("contrast", 1, .2), ("saturation", 1, .2), ("hue", 0, .05)):
        assert torch.equal(seen[name] != neutral, jittered)  # all four or none
        u = (seen[name][jittered] - neutral + most) / (2 * most)
        assert u.min() >= -1e-5 and u.max() <= 1 + 1e-5 and abs(u.mean() - 0.5) < 0.02 and u.std() > 0.27
    for _ in range(60):
        cem_unsup.augment(images)
    orders = [tuple(order[i:i + 4]) for i in range(0, len(order), 4)]
    assert len(set(orders)) > 12 and all(len(set(four)) == 4 for four in orders)


# ---------------------------------------------------------------- what the smoke run learns


def trained(out):
    g = cem_unsup.make_model("small-16")
    g.load_state_dict(torch.load(Path(out, "checkpoint.pt"), weights_only=True)["model"])
    return g.eval()


def pooled_starts():
    return fit_gaussians(DRAW(2000, 0)[0]).sample(torch.arange(100), torch.Generator().manual_seed(0))


def learning(g):
    """Every figure of the claim, of one encoder."""
    (x, y), (x_test, y_test) = DRAW(2000, 0), DRAW(250, 1)  # as --smoke
    torch.manual_seed(0)
    probe = linear_probe(g, x, y)
    return {"clean": accuracy(probe, x_test, y_test),
            "pgd20": accuracy(probe, x_test, y_test, cross_entropy, steps=20, step_size=0.0625, eps=0.5),
            "coarse": coarse(g)}


def coarse(g):
    """Share of the energy of MaxEnt's move that 4 x 4 averaging leaves."""
    x_0 = pooled_starts()
    with eval_mode(g):
        d = ascend(entropy(g, TAU), x_0, 30, 0.5) - x_0
    return float(16 * F.avg_pool2d(d, 4).square().sum() / d.square().sum())


@pytest.mark.slow
def test_smoke_writes_everything(cem_unsup_smoke):
    out = cem_unsup_smoke.out
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"checkpoint", "epochs", "training", "versions", "accuracy", "samples"}
    assert set(results["samples"]) == {f"{name}_num-samples-20" for name in NAMES} and results["accuracy"]["n"] == 250
    before = {}
    for name, row in results["samples"].items():
        sampler, start = name.split("_")[0].split("-")
        assert row["n"] == 20 and row["fid"] is None and "digits" in row["reason"]
        z = np.load(out / f"samples_{name}.npz")
        assert z["arr_0"].shape == (20, 32, 32, 3) and z["arr_0"].dtype == np.uint8
        assert ("arr_1" in z) == (start == "cond")  # only these have classes
        assert Image.open(out / f"samples_{name}.png").size == ((70, 342) if start == "cond" else (342, 70))
        assert (row["entropy"][1] > row["entropy"][0]) == (sampler == "maxent")
        before.setdefault(start, set()).add(row["entropy"][0])
    assert all(len(s) == 1 for s in before.values())  # both samplers start from the same points
    losses = [json.loads(line)["loss"] for line in open(out / "log.jsonl")]
    assert len(losses) == results["epochs"] and losses[-1] < losses[0]


@pytest.mark.slow
def test_attacked_training_learns_what_its_controls_do_not(cem_unsup_smoke, cem_unsup_control):
    """After half of the training that RESULTS.md's table is of, where five seeds are."""
    reported, control = (json.loads((run.out / "results.json").read_text())["accuracy"]
                         for run in (cem_unsup_smoke, cem_unsup_control))
    control["coarse"] = coarse(trained(cem_unsup_control.out))
    attacked, untrained = learning(trained(cem_unsup_smoke.out)), learning(small().eval())
    print(json.dumps({"attacked": attacked, "control": control, "untrained": untrained}))
    assert attacked["pgd20"] > max(control["pgd20"], untrained["pgd20"]) + 0.04
    assert attacked["coarse"] >= 0.35 and attacked["coarse"] >= 1.5 * max(control["coarse"], untrained["coarse"])
    assert all(abs(reported[name] - attacked[name]) < 0.04 for name in ("clean", "pgd20"))


@pytest.mark.slow
@pytest.mark.parametrize("views", ["one", "both"])
def test_the_attack_ends_above_its_start(cem_unsup_smoke, views):
    for seed in range(3):
        g, (x, x_prime), losses = trained(cem_unsup_smoke.out), drawn_views(64, seed), []
        x_0, positive = (x, x_prime) if views == "one" else (torch.cat([x, x_prime]), None)
        score = info_nce(g, positive, TAU)
        x_hat = ascend(score, x_0, 5, 0.2, eps=0.5, random_start=True,
                       callback=lambda k, x_k, s: losses.append(s.mean()))
        assert score(x_hat).mean() > max(losses[0], score(x_0).mean())


@pytest.mark.slow
@pytest.mark.parametrize("sampler, alphas, sign", [("maxent", (0.1, 0.5), 1), ("pgd", (0.1, 0.25), -1)])
def test_each_of_ten_steps_moves_the_batch_entropy(cem_unsup_smoke, sampler, alphas, sign):
    """MaxEnt up (on any net: this tests the sampler), PGD down (on attacked nets)."""
    g, x_0 = trained(cem_unsup_smoke.out), pooled_starts()
    for alpha in alphas:
        h = []
        ascend(cem_unsup.SAMPLERS[sampler](g, x_0, TAU), x_0, 11, alpha,
               callback=lambda k, x_k, s: h.append(batch_entropy(g(x_k).detach(), TAU)))
        assert (sign * torch.stack(h).diff() > 0).all()


# ---------------------------------------------------------------- the run


def finished(out, *flags):
    """cem_unsup.main with TINY and the flags -> its results, and the files of the folder."""
    cem_unsup.main([*TINY, "--out", str(out), *flags])
    return json.loads((out / "results.json").read_text()), {path.name: path.read_bytes() for path in out.iterdir()}


def images(out, name):
    return np.load(out / f"samples_{name}.npz")["arr_0"]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(few_images, tmp_path, capsys, monkeypatch):
    """The views' random numbers and the momentum, too."""
    whole, stopped, save = tmp_path / "whole", tmp_path / "stopped", cem_unsup.save_checkpoint
    finished(whole)

    def interrupt(args, epoch, **parts):
        save(args, epoch, **parts)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(cem_unsup, "save_checkpoint", interrupt)
        error(cem_unsup, capsys, *TINY, "--out", stopped, code=130)
    torch.manual_seed(99)
    rows = finished(stopped)[0]["samples"]
    for part in ("model", "optimizer", "rng"):
        one, two = (torch.load(out / "checkpoint.pt", weights_only=True)[part] for out in (whole, stopped))
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert all(np.array_equal(images(whole, name), images(stopped, name)) for name in rows)


def test_a_set_of_samples_for_each_sampler_and_start(few_images, tmp_path, monkeypatch):
    """A second sampling leaves the first as it is. Without steps: the starts, the same ones of both samplers."""
    first, files = finished(tmp_path)
    results, later = finished(tmp_path, "--start", "fields", "class", "pooled", "--sample-steps", "0")
    # the split is the Gaussians'
    again, _ = finished(tmp_path, "--start", "fields", "--start-split", "test", "--sample-steps", "0")
    assert again["samples"].keys() == results["samples"].keys()
    added = {f"{sampler}-{name}_num-samples-20_steps-0": kind for sampler in ("maxent", "pgd")
             for name, kind in (("uncond", "pooled"), ("cond", "class"), ("fields", "fields"))}
    assert results["samples"].keys() == first["samples"].keys() | added.keys() and len(first["samples"]) == 4
    assert all(results["samples"][name] == row for name, row in first["samples"].items())
    assert all(later[name] == content for name, content in files.items() if name != "results.json")
    for name, kind in added.items():
        assert results["samples"][name]["flags"]["start"] == kind
        assert np.array_equal(images(tmp_path, name), images(tmp_path, name.replace("maxent", "pgd")))
    finished(tmp_path, "--start", "class", "--sampler", "pgd", "--start-split", "test", "--sample-steps", "0")
    one, two = (images(tmp_path, f"pgd-cond_{split}num-samples-20_steps-0") for split in ("", "start-split-test_"))
    assert not np.array_equal(one, two)
    for name in ("sample", "evaluate"):
        monkeypatch.setattr(cem_unsup, name, None)  # nothing is made again
    assert finished(tmp_path)[0]["samples"].items() > results["samples"].items()


def test_training_passes_on_its_flags_and_two_views_of_whole_batches(few_images, tmp_path, monkeypatch):
    seen, rates, step = [], [], torch.optim.SGD.step

    def record(g, x, x_prime, *numbers, **attack):
        seen.append((len(x), *numbers, attack))
        assert g.training and x.shape == x_prime.shape and (x - x_prime).flatten(1).abs().amax(1).min() > 0.01
        return g(x).square().sum()

    def record_step(self):
        rates.append([self.param_groups[0][k] for k in ("lr", "momentum", "weight_decay")])
        step(self)
    monkeypatch.setattr(cem_unsup, "cem_loss", record)
    monkeypatch.setattr(torch.optim.SGD, "step", record_step)
    args = cem_unsup.parse_args([
        *TINY, "--limit", "40", "--batch-size", "16", "--out", str(tmp_path), "--attack-views", "one", "--norm", "linf",
        "--temperature", "0.2", "--attack-steps", "4", "--attack-step-size", "0.03", "--attack-eps", "0.04",
        "--epochs", "10", "--warmup-epochs", "2", "--lr", "0.6"])
    cem_unsup.train(small(), samplers.load_data(args)[0], args)
    attack = dict(steps=4, step_size=0.03, eps=0.04, norm="linf")
    assert seen == [(16, 0.2, "one", attack)] * 20  # two batches an epoch: the third is incomplete
    t = (np.arange(18) + 0.5) / 18
    expected = [0.6 / 4, 0.6 * 3 / 4, *(0.3 * (1 + np.cos(np.pi * t)))]  # warm for a tenth of the epochs at most
    np.testing.assert_allclose(rates, [[lr, 0.9, 1e-4] for lr in expected])
    long = cem_unsup.parse_args(["--lr", "1", "--epochs", "200"])
    assert [cem_unsup.learning_rate(long, t) for t in (5, 10, 105)] == pytest.approx([0.5, 1, 0.5])


@pytest.mark.parametrize("flags, words", [
    ("--attack-views none", "none"), ("--start noise", "noise"), ("--temperature 0", "temperature"),
    ("--crop-area 0", "crop"), ("--jitter 1.5", "jitter"), ("--batch-size 1", "batch-size"),
    ("--sample-batch-size 2", "sample-batch"), ("--batch-size 21", "--batch-size 21"),
    ("--limit 9 --batch-size 4", "ten classes")])
def test_wrong_flags(flags, words, few_images, capsys, tmp_path):
    assert words in error(cem_unsup, capsys, *TINY, "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.data
def test_real_data(tmp_path):
    run_script("cem_unsup", "--small", "--data", os.environ["CIFAR10_ROOT"], "--out", tmp_path, "--epochs", 2,
               "--arch", "small-16", "--limit", 256, "--batch-size", 32, "--num-samples", 20, "--sample-steps", 3)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["samples"]) == 4 and results["accuracy"]["pgd20"] <= results["accuracy"]["clean"]


@pytest.mark.cuda
def test_smoke_on_cuda(tmp_path):
    run_script("cem_unsup", "--smoke", "--device", "cuda", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"]["pgd20"] > 0.15
    assert all((r["entropy"][1] > r["entropy"][0]) == n.startswith("maxent") for n, r in results["samples"].items())


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_cem_unsup.py RUN CONTROL: RESULTS.md's figures
    nets = {"untrained": small().eval(), **{out: trained(out) for out in sys.argv[1:]}}
    print(json.dumps({name: learning(g) for name, g in nets.items()}, indent=1))
