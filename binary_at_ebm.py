"""AT-EBM: an energy-based model as one logit, learned by binary adversarial training.

Yin, Li, Rohde: Learning Energy-Based Models With Adversarial Training, ECCV 2022. D = sigmoid(f),
E = -f.

  training  max_D E_{x ~ p_data} log D(x) + E_{x ~ p_0} min_{x' in B(x, eps)} log(1 - D(x'))
            p_0: other images. At the optimum D = 1/2 on the support of p_data, D <= 1/2 off it
  attack    x' += a grad f / |grad f|, K steps; the data J steps the other way, with R1 on them
  gate      K = 0, 1, ..., 25: one more when the AUC of attacked data against attacked p_0, a mean
            over 100 updates, exceeds 0.8, or after five epochs
  sampling  the same ascent, from p_0's images or another class's (translation); E detects outliers

  python binary_at_ebm.py                 the paper's run, ResNet-50, with CIFAR-100 as p_0
  python binary_at_ebm.py --mode ood      the paper's detector of outliers: eps-balls, a fixed K
  python binary_at_ebm.py --classes 3 --p0 rest --translate-from 5 --out runs/cats    dogs to cats
  python binary_at_ebm.py --small         on a CPU: cars against the rest; trucks become cars
  python binary_at_ebm.py --smoke         drawn digits, no data: under a minute on two CPU cores
  python binary_at_ebm.py --attack-steps 0 --out runs/at_ebm-control    the control: p_0 as it is
                                          (the data move as ever)

Writes to --out: checkpoint.pt; log.jsonl, a line an epoch; for each sampler a set of samples,
samples_{ascent,translation}.{png,npz}, named by the sampling flags that are not at their defaults
(samples_ascent_steps-64.png); translation's png: each source, and beside it what it became.
results.json: the gate's K; 5, 25, 50, 75, 95 % quantiles of E of test data, p_0, attacked p_0;
AUROC of test data against each of --ood-sets, clean and worst case (l2 1.0); a row for each set of
samples. Where an outlier set is of p_0's source, seen_in_p0 is true and its AUROC no evidence
(null: unknown, as one of them is a file). IS and FID are against all ten classes, whatever
--classes. The same command resumes after the last finished epoch, makes what is not there yet, and
leaves the rest (a --smoke without --out begins afresh). More epochs make all in results.json void.

Sources: [official] the code of the paper, xuwangyin/AT-EBMs, with which the objective, recalled,
agrees; [our substitution]: CIFAR-100 for its p_0, 80M Tiny Images, which are withdrawn (a .npy of
your own is possible, if it fits into memory); [assumed] our reading; [ours] in none of them. Where
the official code differs: f is the first of ten logits; it drops an epoch's last batch; it begins
an epoch at each K; it never ends at the last K; its generation scripts also keep the checkpoint of
the best FID, of 10,000 samples; it goes through p_0 in order, where this file draws; in mode ood it
augments by AutoAugment and cutout, not by crop and flip, compares outliers with 1,024 test images,
not with all, and attacks them by APGD.
"""
import argparse
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import resnet18, resnet50
from torchvision.utils import save_image

from samplers import (HelpFormatter, Recorded, Refused, ascend, claimed, count, crop_flip,
                      flag_values, fraction, frozen, in_epoch, in_range, is_there, load_data,
                      load_images, logit, number, one_line, positive, progress, radius,
                      save_samples, say, say_how_long, seed, set_of_samples, to_float, to_uint8,
                      typed, worst_case, write)


# ================================================================ the method
def adversaries(f, x, x_0, K=25, J=5, step=0.1, eps=math.inf, eps_pos=math.inf, norm="l2"):
    """x_pos: data x [B, 3, 32, 32], J steps down the logit; x_neg: p_0's images x_0, K steps up."""
    with frozen(f):
        x_pos = ascend(logit(f, sign=-1), x, J, step, eps=eps_pos, norm=norm)
        x_neg = ascend(logit(f), x_0, K, step, eps=eps, norm=norm)
    return x_pos, x_neg


def at_ebm_loss(f, x_pos, x_neg, r1=0.01):
    """BCE, the mean over all 2B logits, + r1 * R1 at x_pos -> loss, logits f_pos, f_neg [B, 1]."""
    x_pos = x_pos.detach().requires_grad_(r1 > 0)
    f_pos, f_neg = f(x_pos), f(x_neg)  # two forwards: R1 goes through the first only
    loss = 0.5 * (F.softplus(-f_pos).mean() + F.softplus(f_neg).mean())  # -log D, -log(1 - D)
    if r1 > 0:
        loss = loss + r1 * r1_penalty(f_pos, x_pos)
    return loss, f_pos.detach(), f_neg.detach()


def r1_penalty(logits, x):
    """R1 = 1/2 mean_b |grad_x f|^2 of logits f(x) [B, 1] at x [B, ...]; differentiable again."""
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return 0.5 * g.flatten(1).square().sum(1).mean()


class Gate:
    """K, raised by 1 up to `last` when a full window of AUCs has a mean above the threshold, or
    after `most` iterations, by default five epochs'; then the window is empty again [official]."""

    def __init__(self, K=0, last=25, threshold=0.8, window=100, most=7815):
        self.K, self.last = K, last
        self.threshold, self.window, self.most = threshold, window, most
        self.areas, self.iteration = deque(maxlen=window), 0

    def update(self, area):
        self.areas.append(area)
        self.iteration += 1
        passed = len(self.areas) == self.window and sum(self.areas) / self.window > self.threshold
        if self.K < self.last and (passed or self.iteration >= self.most):
            self.K, self.iteration = self.K + 1, 0
            self.areas.clear()

    def state_dict(self):
        return {"K": self.K, "areas": list(self.areas), "iteration": self.iteration}

    def load_state_dict(self, state):
        self.K, self.iteration = state["K"], state["iteration"]
        self.areas.extend(state["areas"])


def auc(positive, negative):
    """P(positive > negative) + P(equal) / 2 of two sets of scores, exact. Refused: an empty set, a
    NaN."""
    positive, negative = positive.flatten(), negative.flatten().sort().values
    if len(positive) * len(negative) == 0 or positive.isnan().any() or negative.isnan().any():
        raise Refused("auc: no scores, or scores that are NaN")
    below = torch.searchsorted(negative, positive).sum()
    not_above = torch.searchsorted(negative, positive, right=True).sum()
    return (below + not_above).double() / (2 * len(positive) * len(negative))


def sample(f, name, x, args):
    """Images x, uint8 [N, 3, 32, 32], moved up the logit, and their mean l2 distance from x."""
    torch.manual_seed(args.sample_seed)

    def chain(x_0):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp), frozen(f):
            return ascend(logit(f), x_0, args.sample_steps, args.sample_step_size,
                          eps=args.sample_eps, norm=args.sample_norm, noise=args.sample_noise)

    chain = Recorded(chain, args.record)
    images, moved = [], []
    for batch in progress(x.split(args.sample_batch_size), name):
        x_0 = to_float(batch)
        x_k = chain(x_0)
        images.append(to_uint8(x_k))
        moved.append((x_k - x_0).flatten(1).norm(dim=1))
    return torch.cat(images), torch.cat(moved).mean().item()


# ================================================================ settings
def parse_args(argv=None):
    training = argparse.ArgumentParser(add_help=False)
    add = training.add_argument_group("training; a checkpoint belongs to these").add_argument
    add("--mode", default="generation", choices=("generation", "ood"),
        help="ood: other defaults, SGD in place of Adam, no R1, a fixed K [official]")
    add("--arch", default="resnet50", choices=("resnet50", "resnet18", "small-32"),
        help="[official]; small-W: three convolutions, of W, 2 W and 4 W channels")
    add("--classes", type=in_range(int, 0, 9), default=list(range(10)), nargs="+", metavar="0..9",
        help="of p_data [official]")
    add("--p0", default="cifar100", metavar="SET",
        help="cifar100 [our substitution]; svhn; noise; rest: all but --classes; a .npy "
             "[N, 32, 32, 3]")
    add("--batch-size", type=positive, default=32, help="images of each side [official]")
    add("--lr", type=number, default=5e-4, help="learning rate [official]")
    add("--norm", default="l2", choices=("l2", "linf"), help="of balls and steps [official]")
    add("--attack-eps", type=radius, default=math.inf, help="on p_0, pixels in [0, 1] [official]")
    add("--attack-steps", type=count, default=25, help="K at the end [official]; 0: the control")
    add("--attack-step-size", type=number, default=0.1, help="on both sides [official]")
    add("--positive-eps", type=radius, default=math.inf, help="on p_data [official]")
    add("--positive-steps", type=count, default=5, help="J, in the control too [official]")
    add("--auc-threshold", type=fraction, default=0.8, help="of the gate [official]")
    add("--auc-window", type=positive, default=100, help="iterations [official]")
    add("--epochs-per-step", type=positive, default=5,
        help="at most, at each K but the last [official]")
    add("--seed", type=seed, default=0, help="of weights and data order [official]")
    add("--limit", type=positive, default=50000, help="at most so many images of CIFAR-10's sets")
    add("--smoke", action="store_true", help="all of it, small, on drawn digits: no downloads")

    sampling = argparse.ArgumentParser(add_help=False)
    add = sampling.add_argument_group("sampling; a set of samples belongs to these").add_argument
    add("--translate-from", type=in_range(int, 0, 9), metavar="0..9", help="its test images")
    add("--num-samples", type=positive, default=50000, help="of each sampler [official]")
    add("--sample-seed", type=seed, default=0, help="of p_0's order and noise: another set")
    add("--sample-steps", type=count, default=32, help="[official]")
    add("--sample-step-size", type=number, default=0.2, help="[official]")
    add("--sample-eps", type=radius, default=math.inf, help="radius around the start [official]")
    add("--sample-norm", default="l2", choices=("l2", "linf", "none"),
        help="of ball and steps [official]; none: the raw gradient")
    add("--sample-noise", type=number, default=0.0, help="standard deviation per step [official]")
    add("--sample-batch-size", type=positive, default=500, help="images moved together")

    running = argparse.ArgumentParser(add_help=False)
    add = running.add_argument_group("running; these may change").add_argument
    add("--small", action="store_true", help="other defaults, for CIFAR-10 on a CPU")
    add("--epochs", type=positive, default=200,
        help="of the data [assumed; mode ood: by the released checkpoint's name, for the code "
             "itself never ends]")
    add("--data", type=os.path.expanduser, default="./data",
        help="folder of cifar-10-batches-py, downloaded if absent")
    add("--out", type=os.path.expanduser, default="runs/binary_at_ebm", help="folder of the run")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where it runs")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="bfloat16 in attacks and samplers; None: on CUDA")
    add("--record", default=False, action=argparse.BooleanOptionalAction,
        help="an update, and a chain, as one CUDA graph [ours]; not yet tried on a GPU")
    add("--sampler", default=["ascent", "translation"], choices=("ascent", "translation"),
        nargs="+", help="ascent: from p_0; translation: from --translate-from")
    add("--ood-sets", default=["svhn", "cifar100", "noise"], nargs="*", metavar="SET",
        help="svhn, cifar100 (test images; cifar100-train: train), noise, rest; a .npy [official: "
             "also ImageNet-32]")
    add("--ood-images", type=positive, default=1024, help="of each set [official]")
    add("--ood-steps", type=positive, default=100, help="of their attack [official]")

    ood = dict(
        out="runs/binary_at_ebm-ood", lr=0.1, batch_size=128, epochs=100, attack_eps=0.5,
        attack_steps=20, positive_eps=0.25, positive_steps=10)
    # small and smoke: [ours]
    small = dict(
        out="runs/binary_at_ebm-small", arch="small-32", classes=[1], p0="rest", translate_from=9,
        epochs=24, batch_size=64, lr=1e-3, attack_steps=5, attack_step_size=0.3, positive_steps=2,
        auc_window=50, epochs_per_step=3, num_samples=1000, ood_sets=["rest", "noise"],
        ood_images=200, ood_steps=20)
    small_ood = dict(
        out="runs/binary_at_ebm-small-ood", lr=0.05, attack_steps=5, attack_step_size=0.2,
        positive_steps=3)
    smoke = dict(
        out="runs/binary_at_ebm-smoke", arch="small-32", classes=[7], p0="rest", translate_from=1,
        epochs=32, lr=3e-3, attack_steps=8, attack_step_size=0.5, positive_steps=1,
        positive_eps=0.25, auc_threshold=0.75, auc_window=10, epochs_per_step=10, num_samples=100,
        ood_sets=["noise", "rest"], ood_images=50, ood_steps=5)
    smoke_ood = dict(
        out="runs/binary_at_ebm-smoke-ood", epochs=20, lr=0.05, attack_steps=5, attack_eps=2.0,
        positive_eps=0.5)
    # (flags, defaults): where the flags are as on the left, the defaults on the right hold; later
    # pairs win
    return read_flags((training, sampling, running), argv, [
        ({"mode": "ood"}, ood),
        ({"small": True}, small), ({"small": True, "mode": "ood"}, small_ood),
        ({"smoke": True}, smoke), ({"smoke": True, "mode": "ood"}, smoke_ood)])


# ================================================================ model
class Energy(nn.Module):
    """Images in [0, 1], [B, 3, 32, 32], to the float32 logit f = -E [B, 1]; the normalisation is
    inside."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        mean, std = [.4914, .4822, .4465], [.2023, .1994, .2010]  # [official]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode=True):
        """Always eval mode, so that a batch norm is an affine gamma x + beta [official]."""
        return super().train(False)

    def forward(self, x):
        return self.net((x - self.mean) / self.std).float()


def make_model(arch="resnet50"):
    """An Energy: ResNet with a 3x3 stem of stride 1, no max-pool; or small-W, three convolutions.
    PyTorch's default initialisation [official]."""
    if arch.startswith("small"):
        w = int(arch.removeprefix("small-"))
        return Energy(nn.Sequential(
            # 4x4 first, for a 3x3 of stride 2 covers pixels unevenly, and samples show a grid
            nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 1)))
    net = {"resnet18": resnet18, "resnet50": resnet50}[arch](num_classes=1)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for m in net.modules():  # torchvision's own starts with logits a thousand times larger
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.reset_parameters()
    return Energy(net)


# ================================================================ train and evaluate
def train(f, x_train, p_0, args):
    """Train f in place, from the last checkpoint up to --epochs -> the gate's K."""
    if args.mode == "generation":  # the settings of both branches: [official]
        optimizer = torch.optim.Adam(f.parameters(), args.lr, betas=(0.0, 0.99))
        r1, first_K = 0.01, 0
    else:
        optimizer = torch.optim.SGD(f.parameters(), args.lr, momentum=0.9, nesterov=True)
        r1, first_K = 0.0, args.attack_steps  # the gate's last K: it stays there
    most = args.epochs_per_step * math.ceil(len(x_train) / args.batch_size)
    gate = Gate(first_K, args.attack_steps, args.auc_threshold, args.auc_window, most)
    attack = dict(J=args.positive_steps, step=args.attack_step_size, eps=args.attack_eps,
                  eps_pos=args.positive_eps, norm=args.norm)
    parameters = list(f.parameters())

    def loss_and_gradients(x, x_0, K):
        # bfloat16 for the attacks only: R1 needs float32 at the positives, and negatives in
        # another precision than theirs would be a cue for D
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            x_pos, x_neg = adversaries(f, x, x_0, K, **attack)
        loss, f_pos, f_neg = at_ebm_loss(f, x_pos, x_neg, r1)
        gradients = torch.autograd.grad(loss, parameters)
        # R1's double backward leaves gradients in another memory format than their parameters';
        # an optimizer's fast path needs the same
        gradients = [torch.empty_like(p).copy_(g) for p, g in zip(parameters, gradients)]
        return loss.detach(), f_pos, f_neg, *gradients

    loss_and_gradients = Recorded(loss_and_gradients, args.record)
    done = resume(args, model=f, optimizer=optimizer, gate=gate)
    for epoch in range(done, args.epochs):
        with in_epoch(epoch):
            losses, areas = [], []
            batches = torch.randperm(len(x_train), device=args.device).split(args.batch_size)
            for batch in progress(batches, f"epoch {epoch + 1}/{args.epochs}, K {gate.K}"):
                K, x = gate.K, to_float(x_train[batch])
                x_0 = to_float(p_0[torch.randint(len(p_0), batch.shape, device=args.device)])
                if not args.smoke:  # digits have a direction
                    x, x_0 = crop_flip(x), crop_flip(x_0)  # [official; mode ood: ours]
                loss, f_pos, f_neg, *gradients = loss_and_gradients(x, x_0, K=K)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                optimizer.step()
                losses.append(loss.clone())  # the next recorded update overwrites it
                areas.append(auc(f_pos, f_neg).item())
                gate.update(areas[-1])
            log(args, epoch=epoch + 1, K=K, loss=torch.stack(losses).mean().item(),
                auc=sum(areas) / len(areas), e_data=-scores(f, x_train[:250]).mean().item())
            save_checkpoint(args, epoch + 1, model=f, optimizer=optimizer, gate=gate)
    return gate.K


SETS = ("cifar100", "svhn", "noise", "rest")  # or a file


def load_set(name, args, rest, train=False):
    """The train or test images of a set, uint8 [N, 3, 32, 32]. rest: those outside --classes."""
    if name == "rest":
        if len(rest) == 0:
            raise Refused("rest is empty, --classes are all ten")
        return rest
    if name == "noise":
        generator = torch.Generator().manual_seed(2 * args.seed + int(train))  # one for each split
        size = (50000 if train else 10000, 3, 32, 32)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8).to(args.device)
    return load_images(name, None if args.smoke else args.data, train).to(args.device)


def load_all(args):
    """x_train of p_data, p_0, x_data and x_rest (test images of --classes and of the others), and
    the images to translate, or None; all uint8 [N, 3, 32, 32]. Refused: flags that ask for what is
    not there."""
    if "translation" in args.sampler and args.translate_from in args.classes:
        raise Refused(f"--translate-from {args.translate_from} is one of --classes; --sampler "
                      "ascent goes without")
    if args.translate_from is None and set(args.sampler) == {"translation"}:
        raise Refused("--sampler translation needs --translate-from")
    for name in args.ood_sets:  # here, so that a slip is seen before the training
        known = name in SETS or name in ("cifar100-train", "svhn-train")
        if not known and not Path(name).exists():
            raise Refused(f"--ood-sets {name}: no such file; others: {', '.join(SETS)}")
    x_train, y_train, x_test, y_test = load_data(args)
    own = torch.tensor(args.classes, device=args.device)
    own_train, own_test = torch.isin(y_train, own), torch.isin(y_test, own)
    try:
        p_0 = load_set(args.p0, args, x_train[~own_train], train=True)
    except Refused as e:
        raise Refused(f"--p0: {e}; it may be cifar100, svhn, noise, a .npy, or, with fewer "
                      "--classes, rest") from e
    sources = None
    if args.translate_from is not None:
        sources = x_test[y_test == args.translate_from][:args.num_samples]
    x_data = x_test[own_test]
    if not own_train.any() or len(x_data) == 0 or (sources is not None and len(sources) == 0):
        raise Refused("--limit leaves no images of --classes or of --translate-from")
    return x_train[own_train], p_0, x_data, x_test[~own_test], sources


def scores(f, x):
    """f of images x [N, 3, 32, 32], uint8 or float, as [N]."""
    with torch.no_grad():
        return torch.cat([f(to_float(batch)).squeeze(1) for batch in x.split(256)])


def energies(f, x):
    """The 5, 25, 50, 75 and 95 % quantiles of E(x)."""
    shares = torch.tensor([.05, .25, .5, .75, .95], device=x.device)
    return (-scores(f, x)).quantile(shares).tolist()


def detect(f, x_data, x, images=1024, steps=100, eps=1.0):
    """AUROC of f, test data x_data against `images` of x: as they are, and attacked to raise f, the
    worst of five starts in the l2 ball [official; there by APGD]."""
    x = to_float(x[torch.randperm(len(x), device=x.device)[:images]])
    worst = []
    for batch in progress(x.split(256), "outliers"):
        with frozen(f):
            _, f_best = worst_case(logit(f), batch, steps, 2.5 * eps / steps, eps=eps, restarts=5)
        worst.append(f_best)
    f_data, f_x = scores(f, x_data), scores(f, x)
    f_worst = torch.cat(worst).maximum(f_x)  # above f_x already, but for rounding
    return {"n": len(x), "auroc": auc(f_data, f_x).item(),
            "auroc_worst": auc(f_data, f_worst).item(), "eps": eps, "steps": steps}


def in_p0(name, p0):
    """Whether an outlier set is of p_0's source; None: not known, for a file may hold anything."""
    name, p0 = name.removesuffix("-train"), p0.removesuffix("-train")
    if name == p0:
        return True
    return False if name in SETS and p0 in SETS else None


def run(args):
    x_train, p_0, x_data, x_rest, sources = load_all(args)
    torch.manual_seed(args.seed)
    f = make_model(args.arch).to(args.device, memory_format=torch.channels_last)
    # a step costs 2 forwards, an update of both sides with R1 9.3, as counted for the ResNet-50
    forwards = 2 * args.attack_steps + 2 * args.positive_steps + 9.3
    say_how_long(args, f, forwards * len(x_train))
    K = train(f, x_train, p_0, args)

    results = load_results(args)
    results["K"] = K
    torch.manual_seed(args.sample_seed)
    p_0 = p_0[torch.randperm(len(p_0), device=args.device)]
    if "energy" not in results:
        x_0 = to_float(p_0[:250])  # attacked as in training, here in float32
        with frozen(f):
            x_k = ascend(logit(f), x_0, K, args.attack_step_size, eps=args.attack_eps,
                         norm=args.norm)
        results["energy"] = {"data": energies(f, x_data), "p0": energies(f, x_0),
                             "p0_attacked": energies(f, x_k)}
        save_results(args, results)
    say(f"energies: {results['energy']}")

    outliers = results.setdefault("ood", {})
    for name in args.ood_sets:
        key = name
        if (args.ood_images, args.ood_steps) != (args.defaults["ood_images"],
                                                 args.defaults["ood_steps"]):
            key = f"{name}, {args.ood_images} images, {args.ood_steps} steps"
        if "auroc" not in outliers.get(key, {}):
            try:
                x = load_set(name, args, x_rest)
            except Refused as e:
                outliers[key] = {"skipped": str(e)}
            else:
                torch.manual_seed(args.seed)
                outliers[key] = detect(f, x_data, x, args.ood_images, args.ood_steps)
                outliers[key]["seen_in_p0"] = in_p0(name, args.p0)
            save_results(args, results)
        say(f"outliers, {key}: {outliers[key]}")

    turns = torch.arange(args.num_samples, device=args.device) % len(p_0)
    starts = {"ascent": p_0[turns], "translation": sources}
    names = []
    for sampler in args.sampler:
        if starts[sampler] is None:
            say("no --translate-from: no translation")
            continue
        unused = ("translate_from",) if sampler == "ascent" else ()
        name, made_with = set_of_samples(args, sampler, *unused)
        if sampler == "translation" and len(sources) < args.num_samples:
            say(f"{name}: --num-samples {args.num_samples}, but there are {len(sources)} test "
                "images to translate: of so few, FID is biased")
        if sampler == "ascent" and len(p_0) < args.num_samples and args.sample_noise == 0:
            say(f"{name}: --num-samples {args.num_samples}, but there are {len(p_0)} images of "
                "p_0: the samples repeat")
        if not is_there(args, results, name, made_with):
            images, moved = sample(f, sampler, starts[sampler], args)
            path = f"{args.out}/samples_{name}"
            save_samples(path, images)
            if sampler == "translation":  # its picture: each source, and beside it what it became
                pairs = torch.stack([sources, images], 1)[:50].flatten(0, 1)
                save_image(to_float(pairs), f"{path}.png", nrow=10, pad_value=1.0)
            results["samples"][name] = {"n": len(images), "moved": moved,
                                        "energy": energies(f, images), "flags": made_with}
            save_results(args, results)
        names.append(name)
    add_is_and_fid(args, results, names)


# ================================================================ the same in all four scripts
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


def log(args, epoch, **figures):
    """Print an epoch's figures; line `epoch` of log.jsonl holds them. Refused: one is not finite.
    """
    if not all(math.isfinite(value) for value in figures.values()):
        raise Refused(f"{figures}")
    figures = {"epoch": epoch, **figures}
    say("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    path, now = Path(args.out, "log.jsonl"), time.strftime("%Y-%m-%dT%H:%M:%S")
    # a run killed between an epoch's line and its checkpoint has this line already
    lines = path.read_text().splitlines()[:epoch - 1] if path.exists() else []
    write(path, "\n".join([*lines, json.dumps({"time": now, **figures}), ""]).encode())


def save_checkpoint(args, epoch, **parts):
    """Replace --out's checkpoint by the state of the parts. Refused: a weight is not finite."""
    state = {name: part.state_dict() for name, part in parts.items()}
    if not all(t.isfinite().all() for t in state["model"].values()):
        raise Refused("its weights are not finite")
    state["epoch"], state["epochs"] = epoch, args.epochs
    state["flags"] = flag_values(args, args.training)
    state["rng"] = torch.get_rng_state()
    state["cuda_rng"] = torch.cuda.get_rng_state() if args.device == "cuda" else None
    content = io.BytesIO()
    torch.save(state, content)
    write(Path(args.out, "checkpoint.pt"), content.getbuffer())


def resume(args, **parts):
    """Put the parts and the random numbers where --out's checkpoint left them -> epochs done."""
    path = Path(args.out, "checkpoint.pt")
    if not path.exists():
        say(f"{args.out}: begins; {args.arch} on {args.device}")
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        done, planned, theirs = state["epoch"], state["epochs"], state["flags"]
    except OSError:  # it says itself what is wrong
        raise
    except Exception as e:  # torch.load raises a dozen kinds
        raise Refused(f"{path} cannot be used ({type(e).__name__}): it is damaged or no "
                      "checkpoint; delete it, or name another --out") from e
    mine = flag_values(args, args.training)
    other = [f"{typed(flag)} was {theirs.get(flag)}, is {mine.get(flag)}"
             for flag in {**theirs, **mine} if theirs.get(flag) != mine.get(flag)]
    if other:
        raise Refused(f"{path} is of another training ({', '.join(other)}): name another --out")
    if args.epochs < done:
        raise Refused(f"{path}: {done} epochs are done, --epochs cannot be fewer")
    if args.epochs != planned:
        say(f"--epochs was {planned}: the schedules now run to {args.epochs}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    if args.device == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    say(f"{args.out}: {done} of {args.epochs} epochs are done")
    return done


def load_results(args):
    """What results.json holds of the present checkpoint; nothing, where it is of an earlier one."""
    checkpoint = hashlib.sha256(Path(args.out, "checkpoint.pt").read_bytes()).hexdigest()
    path = Path(args.out, "results.json")
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as e:
        raise Refused(f"{path} is damaged ({e}): delete it") from e
    if results.get("checkpoint") != checkpoint:
        results = {"checkpoint": checkpoint, "epochs": args.epochs, "samples": {}}
        results["training"] = flag_values(args, args.training)
        results["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__}
    return results


def save_results(args, results):
    text = json.dumps(results, indent=2, allow_nan=False)
    write(Path(args.out, "results.json"), text.encode())


def add_is_and_fid(args, results, names):
    """To the rows of these sets of samples; null, and the reason, where there are none."""
    missing = []
    for name in names:
        row, file = results["samples"][name], f"{args.out}/samples_{name}.npz"
        if row.get("fid") is None:
            row.update(is_mean=None, is_std=None, fid=None, reason="they take hours on a CPU")
            if args.smoke:
                row["reason"] = "they are not for digits"
            elif args.device == "cuda":
                try:
                    from metrics import score
                    row.update(next(score([file], args.data, device="cuda")), reason=None)
                except (ImportError, OSError, ValueError, RuntimeError) as e:  # weights, memory
                    row["reason"] = one_line(e)
        save_results(args, results)
        shown = {key: value for key, value in row.items() if key != "flags"}
        say(f"{name}: {shown}")
        if row["fid"] is None:
            missing.append(file)
    if missing and not args.smoke:
        say(f"IS and FID: python metrics.py {shlex.join(missing)} --data {shlex.quote(args.data)}")


def read_flags(groups, argv, presets):
    """The arguments of three parsers, training, sampling and running. presets: pairs (flags,
    defaults); where all the flags are as given there, the defaults take the place of the parsers'.
    Later pairs win over earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, parents=groups, allow_abbrev=False,
                                     formatter_class=HelpFormatter, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS,
                        help="with the defaults of the presets that are given")
    parser.error = stop
    training, sampling, running = [vars(group.parse_args([])) for group in groups]
    defaults = {**training, **sampling, **running}
    nothing = argparse.Namespace(**dict.fromkeys(defaults, None))
    given = {k: v for k, v in vars(parser.parse_args(argv, nothing)).items() if v is not None}
    for wanted, others in presets:
        if all(given.get(flag, defaults[flag]) == value for flag, value in wanted.items()):
            defaults.update(others)
    if "help" in given:
        parser.set_defaults(**defaults)
        parser.print_help()
        sys.exit(0)
    if "smoke" in given and "small" in given:
        parser.error("--smoke or --small, not both")
    # another norm measures other lengths: their defaults mean nothing in it
    lengths = [flag for flag in training if flag.endswith(("_eps", "_step_size"))
               and defaults[flag] not in (None, math.inf)]
    for norm, measured in (("norm", lengths), ("sample_norm", ["sample_step_size"])):
        missing = [typed(flag) for flag in measured if flag not in given]
        if given.get(norm, defaults[norm]) != defaults[norm] and missing:
            parser.error(f"{typed(norm)} {given[norm]} needs {' and '.join(missing)}: the default "
                         "may be of another norm")
    args = argparse.Namespace(**{**defaults, **given})
    args.training, args.sampling, args.defaults = list(training), list(sampling), defaults
    args.afresh = args.smoke and "out" not in given
    if args.amp is None:
        args.amp = args.device == "cuda"
    return args


def stop(message, code=2):
    """One line on stderr, and the end."""
    say(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", stderr=True)
    sys.exit(code)


def main(argv=None):
    args, benchmark = parse_args(argv), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with claimed(args.out, args.afresh):
            run(args)
    except KeyboardInterrupt:
        stop("interrupted; " + ("--smoke begins afresh, unless --out is given" if args.afresh else
                                "the same command goes on after the last epoch"), code=130)
    except (Refused, OSError) as e:
        stop(e)
    except (MemoryError, torch.OutOfMemoryError) as e:
        stop(f"out of memory: try a smaller --batch-size or --sample-batch-size ({e})")
    finally:
        torch.backends.cudnn.benchmark = benchmark


if __name__ == "__main__":
    main()
