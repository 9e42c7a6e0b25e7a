"""Unsupervised CEM: adversarial contrastive learning as maximum likelihood; MaxEnt sampling.

Wang, Wang, Yang, Lin: A Unified Contrastive Energy-based Model for Understanding the Generative
Ability of Adversarial Training, ICLR 2022. p(x, x') = exp f(x, x') / Z, f(x, x') = g(x).g(x') / t;
unit g and t are ACL's.

  training  min_theta E max_{|x_hat - x| <= eps} NCE(x_hat, x')       x, x': two views of an image
            NCE(x, x') = -log [ exp f(x, x') / sum_j exp f(x, x_j) ]      j: x', all other views
            NT-Xent, the loss here, is the mean of NCE(x, x') and NCE(x', x)
  MaxEnt    N samples move together to raise H = -1/N sum_i log 1/N sum_j exp f(x_i, x_j), each
            along grad -log sum_{j != i} exp f(x_i, sg[x_j]). sg: no gradient, so that the terms of
            others which contain x_i are dropped, and this is not quite grad H
  PGD       raises -f(x_i, x_i0) + log [ exp f(x_i, x_i0) + sum_{j != i} exp f(x_i, x_j) ], x_i0 the
            start: the attack on one view as a sampler [assumed]. x_i leaves its start and nears the
            other samples, where MaxEnt's samples repel each other

  python cem_unsup.py                     the full run: CIFAR-10 (downloaded), ResNet-50
  python cem_unsup.py --small             CIFAR-10 on a CPU: a small net, a short schedule
  python cem_unsup.py --smoke             drawn digits, no data: under a minute on two CPU cores
  python cem_unsup.py --attack-steps 0 --out runs/cem_unsup-control      the control: no attack
  python cem_unsup.py --attack-views one --norm l2 --attack-eps 0.5 --attack-steps 7 \\
      --attack-step-size 0.1 --out runs/one        the formula's attack, in supervised CEM's ball

Writes to --out: checkpoint.pt; log.jsonl, a line an epoch; for each sampler and start a set of
samples, samples_maxent-uncond.{png,npz} and so on, named also by the sampling flags that are not at
their defaults (samples_pgd-cond_steps-25.png); results.json: accuracy is a linear probe's, on the
features before the projector; each set has a row, entropy is its batches' H before and after. The
same command resumes after the last finished epoch, draws what is not there yet, and leaves the rest
(a --smoke without --out begins afresh). More epochs make all in results.json void. Only the
probe and class-wise starts use labels.

Sources of the defaults: [slides] the paper's; [memory] of its text: the loss, MaxEnt; [ACL] Jiang
et al., NeurIPS 2020, code, on which the paper builds; [DynACL] Luo et al., ICLR 2023, by CEM's
first authors among others, code; [AdvCL] Fan et al., NeurIPS 2021, code; [assumed] our reading;
[ours] in none. The formula moves one view; [ACL] and [DynACL] move both, in the linf ball, and so
does the default. Of [ACL] we leave out the loss of the clean views, half of its own, with batch
norms of their own; LARS; the bicubic crop; and the smaller last batch. Its random start may leave
[0, 1], ours may not.
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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, resnet18, resnet50
from torchvision.transforms.functional import rgb_to_grayscale

from samplers import (HelpFormatter, Recorded, Refused, accuracy, ascend, claimed, count,
                      cross_entropy, entropy, eval_mode, flag_values, fraction, frozen, in_epoch,
                      in_range, info_nce, is_there, load_data, number, one_line, positive,
                      progress, radius, save_samples, say, say_how_long, seed, set_of_samples,
                      starts, to_float, to_uint8, typed, write)


# ================================================================ the method
def nt_xent(z1, z2, temperature):
    """NT-Xent of two views z1, z2 [B, D], normalised here: NCE of each of the 2B against the rest.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"two views of the same images, not {list(z1.shape)}, {list(z2.shape)}")
    # the same score as the attack's, of embeddings; positive None: the views are rows i and i + B
    score = info_nce(g=nn.Identity(), positive=None, temperature=temperature)
    return score(torch.cat([z1, z2])).mean()


def cem_loss(g, x, x_prime, tau, views="both", **attack):
    """NT-Xent of two views x, x' [B, 3, 32, 32] in [0, 1] of each image, after the attack. views:
    "both" are moved, to raise NT-Xent; or "one", to raise NCE(x_hat, x'). attack: steps, step_size,
    eps, norm."""
    if x.shape != x_prime.shape:
        raise ValueError(f"two views of each image, not {list(x.shape)}, {list(x_prime.shape)}")
    if views not in ("both", "one"):
        raise ValueError(f'views must be "both" or "one", not {views!r}')
    with frozen(g):
        if views == "both":
            pair = torch.cat([x, x_prime])
            pair = ascend(info_nce(g, None, tau), pair, random_start=True, **attack)
        else:
            x_hat = ascend(info_nce(g, x_prime, tau), x, random_start=True, **attack)
            pair = torch.cat([x_hat, x_prime])
    z, z_prime = g(pair).chunk(2)  # one forward: one set of batch statistics
    return nt_xent(z, z_prime, tau)


SAMPLERS = {
    "maxent": lambda g, x_0, tau: entropy(g, tau),  # [memory]
    # the positive is the sample's start, the negatives are the other samples [assumed]
    "pgd": lambda g, x_0, tau: info_nce(g, x_0, tau, other_positives=False),
}
# what a file's name calls its --start; uncond and cond are the slides' words
SUFFIXES = {"pooled": "uncond", "class": "cond", "fields": "fields"}


def sample(g, sampler, start, args):
    """--num-samples images uint8 [N, 3, 32, 32], the labels [N] of their starts, and the batches'
    mean entropy before and after. start: a function from labels to x_0."""
    torch.manual_seed(args.sample_seed)  # all samplers begin at the same points
    labels = torch.arange(args.num_samples, device=args.device) % 10
    tau = args.temperature

    def chain(x_0):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp), frozen(g):
            return ascend(SAMPLERS[sampler](g, x_0, tau), x_0, args.sample_steps,
                          args.sample_step_size, eps=args.sample_eps, norm=args.sample_norm,
                          noise=args.sample_noise)

    chain = Recorded(chain, args.record)
    images, entropies = [], []
    n_batches = math.ceil(len(labels) / args.sample_batch_size)  # equal ones: H depends on N
    for y in progress(labels.tensor_split(n_batches), sampler):
        x_0 = start(y)
        x = chain(x_0)
        with eval_mode(g), torch.no_grad():
            before, after = batch_entropy(g(x_0), tau), batch_entropy(g(x), tau)
        images.append(to_uint8(x))
        entropies.append(torch.stack([before, after]))
    return torch.cat(images), labels, torch.stack(entropies).mean(0).tolist()


def batch_entropy(z, tau):
    """H of a batch from its z [N, D] on the unit sphere, self included."""
    return math.log(len(z)) - (z @ z.T / tau).logsumexp(1).mean()


# ================================================================ settings
def parse_args(argv=None):
    training = argparse.ArgumentParser(add_help=False)
    add = training.add_argument_group("training; a checkpoint belongs to these").add_argument
    add("--arch", default="resnet50", choices=("resnet50", "resnet18", "small-32", "small-16"),
        help="[slides: both ResNets]; small-W: three stages, of W, 2 W and 4 W channels")
    add("--temperature", type=in_range(float, 1e-3, 1e3), default=0.5,
        help="t [ACL], in sampling too [assumed]")
    add("--batch-size", type=in_range(int, 2), default=512, help="images [ACL]")
    add("--lr", type=number, default=0.5, help="learning rate [AdvCL]")
    add("--warmup-epochs", type=number, default=10.0,
        help="of linear growth up to --lr, then a cosine down to 0 [ACL]; --epochs / 10 at most "
             "[ours]")
    add("--crop-area", type=in_range(float, 0.01, 1), default=0.1,
        help="share of the image that a view shows, at least [ACL]")
    add("--jitter", type=fraction, default=0.5,
        help="J: brightness, contrast and saturation change by up to 0.8 J, hue by 0.2 J; 0.5: "
             "ACL's 0.4 and 0.1 [ACL]; 1: SimCLR's on ImageNet")
    add("--gray", type=fraction, default=0.2, help="share of the views that are gray [ACL]")
    add("--attack-views", default="both", choices=("both", "one"),
        help="the views that are moved [ACL, DynACL; the formula: one]")
    add("--norm", default="linf", choices=("l2", "linf"),
        help="of ball and step [ACL, DynACL]; another one needs another --attack-eps and step size")
    add("--attack-eps", type=number, default=8 / 255, help="radius, pixels in [0, 1] [ACL, DynACL]")
    add("--attack-steps", type=count, default=5,
        help="[ACL, DynACL]; 0: the control, without a random start either")
    add("--attack-step-size", type=number, default=2 / 255, help="[ACL, DynACL]")
    add("--seed", type=seed, default=0, help="of weights, data order and attacks")
    add("--limit", type=positive, default=50000, help="at most so many images of each set")
    add("--smoke", action="store_true", help="all of it, small, on drawn digits: no downloads")

    sampling = argparse.ArgumentParser(add_help=False)
    add = sampling.add_argument_group("sampling; a set of samples belongs to these").add_argument
    add("--start", default=["pooled", "class"], choices=SUFFIXES, nargs="+", metavar="KIND",
        help="pooled: one Gaussian of all, uncond; class: one of each class, cond [assumed]; "
             "fields: random colours [ours]")
    add("--start-split", default="train", choices=("train", "test"),
        help="the Gaussians' images [ours, so that no test image enters; Santurkar et al.: test]")
    add("--num-samples", type=in_range(int, 2), default=50000,
        help="of each sampler and start [assumed]")
    add("--sample-seed", type=seed, default=0, help="of starts and noise: another set of samples")
    add("--sample-steps", type=count, default=60, help="[assumed, as all below]")
    add("--sample-step-size", type=number, default=0.5, help="pixels in [0, 1]")
    add("--sample-eps", type=radius, default=30.0, help="radius around the start; inf: none")
    add("--sample-norm", default="l2", choices=("l2", "linf", "none"), help="none: raw gradient")
    add("--sample-noise", type=number, default=0.0, help="standard deviation per step")
    add("--sample-batch-size", type=in_range(int, 3), default=512,
        help="N, samples that move together, at most: the batches are as equal as can be, and 2 "
             "could leave one alone")

    running = argparse.ArgumentParser(add_help=False)
    add = running.add_argument_group("running; these may change").add_argument
    add("--small", action="store_true", help="other defaults, for CIFAR-10 on a CPU")
    add("--epochs", type=positive, default=1000, help="[ACL]")
    add("--data", type=os.path.expanduser, default="./data",
        help="folder of cifar-10-batches-py, downloaded if absent")
    add("--out", type=os.path.expanduser, default="runs/cem_unsup", help="folder of the run")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where it runs")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16; None: on CUDA")
    add("--record", default=False, action=argparse.BooleanOptionalAction,
        help="an update, and a chain, as one CUDA graph [ours]; not yet tried on a GPU")
    add("--test-images", type=positive, default=10000, help="at most so many, for the accuracy")
    add("--sampler", default=list(SAMPLERS), choices=SAMPLERS, nargs="+", metavar="NAME",
        help="maxent [memory]; pgd [assumed]")
    # small and smoke: [ours]
    small = dict(
        out="runs/cem_unsup-small", arch="small-32", epochs=5, batch_size=256, lr=0.3,
        norm="l2", attack_eps=1.0, attack_steps=2, attack_step_size=0.6, test_images=1000,
        num_samples=512)
    smoke = dict(
        out="runs/cem_unsup-smoke", arch="small-16", epochs=5, batch_size=64, lr=0.03,
        crop_area=0.4, jitter=1.0, gray=0.5, norm="l2", attack_eps=1.0,
        attack_steps=1, attack_step_size=1.25, sample_steps=30, num_samples=100)
    # (flags, defaults): where the flags are as on the left, the defaults on the right hold
    return read_flags((training, sampling, running), argv,
                      [({"small": True}, small), ({"smoke": True}, smoke)])


# ================================================================ model
class Encoder(nn.Module):
    """Images in [0, 1], [B, 3, 32, 32], to float32 z [B, D] on the unit sphere; encode(x): h [B, D]
    before the projector. The normalisation is inside."""

    def __init__(self, net, width):
        super().__init__()
        self.net = net
        self.projector = nn.Sequential(  # [ACL]
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))
        mean, std = [.4914, .4822, .4465], [.2023, .1994, .2010]  # [assumed; ACL: ImageNet's]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def encode(self, x):
        return self.net((x - self.mean) / self.std).float()

    def forward(self, x):
        return F.normalize(self.projector(self.encode(x)).float(), dim=1)


def make_model(arch="resnet50"):
    """An Encoder: ResNet with a 3x3 stem of stride 1, no max-pool [ACL]; or small-W of cem_sup."""
    if arch.startswith("small"):
        w = int(arch.removeprefix("small-"))
        return Encoder(nn.Sequential(
            # 4x4, for a 3x3 of stride 2 covers pixels unevenly, and samples show a grid
            nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            block(w, w, 1), block(w, 2 * w, 2), block(2 * w, 4 * w, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten()), width=4 * w)
    net = {"resnet18": resnet18, "resnet50": resnet50}[arch]()
    width = net.fc.in_features
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    net.maxpool = net.fc = nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # torchvision's
    return Encoder(net, width)


def block(c_in, c_out, stride):
    """A BasicBlock with a 1x1 convolution as its shortcut, whatever its stride and widths."""
    shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
    return BasicBlock(c_in, c_out, stride, nn.Sequential(*shortcut))


class LinearProbe(nn.Module):
    """A linear classifier of h = g.encode(x), standardised: images to logits [B, 10]."""

    def __init__(self, g, width):
        super().__init__()
        self.g = g
        self.head = nn.Sequential(  # momentum None: the mean of all batches seen
            nn.BatchNorm1d(width, affine=False, momentum=None), nn.Linear(width, 10))

    def forward(self, x):
        return self.head(self.g.encode(x))


# ================================================================ views: torchvision's, in batch
def augment(x, crop_area=0.1, jitter=0.5, gray=0.2, flip=True):
    """A random view of each x [B, 3, S, S] in [0, 1] [ACL]: a crop, resized; flip; at p = .8 colour
    jitter; gray. Parameters per image; the jitter's order per batch [assumed]."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, device=x.device)

    if x.shape[2] != x.shape[3]:
        raise ValueError(f"augment: images must be square, not {list(x.shape[2:])}")
    x = resized_crop(x, *random_boxes(len(x), x.shape[-1], crop_area, x.device))
    if flip:
        x = torch.where(uniform(0, 1) < 0.5, x.flip(3), x)
    strength = torch.where(uniform(0, 1) < 0.8, jitter, 0.0)  # 0: this image keeps its colours
    for i in torch.randperm(4).tolist():
        if i < 3:
            change = (brightness, contrast, saturation)[i]
            x = change(x, 1 + strength * uniform(-0.8, 0.8))
        else:
            x = hue(x, strength * uniform(-0.2, 0.2))
    return torch.where(uniform(0, 1) < gray, rgb_to_grayscale(x), x)


def random_boxes(n, size, least_area, device):
    """start, length [n, 2] (rows, columns) of RandomResizedCrop's boxes: of least_area to 1 of the
    area, the ratio of the sides in 3/4 to 4/3; the first of ten tries that fits."""
    u, v = torch.rand(2, n, 10, device=device)
    area = size ** 2 * (least_area + (1 - least_area) * u)
    ratio = (4 / 3) ** (2 * v - 1)  # log-uniform
    tries = torch.stack([area / ratio, area * ratio], 2).sqrt().round()  # [n, 10, 2]
    fits = tries.amax(2) <= size
    first = fits.int().argmax(1)  # the first True
    length = tries[torch.arange(n, device=device), first]
    length = torch.where(fits.any(1, keepdim=True), length, size)  # torchvision's: the whole image
    room = size - length
    start = (torch.rand(n, 2, device=device) * (room + 1)).floor().minimum(room)
    return start, length


def resized_crop(x, start, length):
    """The boxes start, length [B, 2] (rows, columns) of x [B, C, S, S], resized to S; bilinear, and
    nothing beyond the box is read [assumed; ACL: bicubic]."""
    new = old = torch.arange(x.shape[-1], device=x.device)  # rows or columns: as many as before

    def weights(begin, count):  # [B] each -> [B, 1, new, old]: an old pixel's share of a new one
        in_box = (new + 0.5) * count[:, None] / len(new) - 0.5
        source = begin[:, None] + in_box.clamp(min=0).minimum(count[:, None] - 1)
        distance = (source[:, :, None] - old).abs()  # [B, new, old]
        return (1 - distance).clamp(min=0)[:, None]

    rows = weights(start[:, 0], length[:, 0])
    columns = weights(start[:, 1], length[:, 1])
    return rows @ x @ columns.mT


def brightness(x, factor):
    """adjust_brightness of x [B, 3, S, S] by factors [B, 1, 1, 1]; so with the next three."""
    return (factor * x).clamp(0, 1)


def contrast(x, factor):
    mean = rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
    return (mean + factor * (x - mean)).clamp(0, 1)


def saturation(x, factor):
    gray = rgb_to_grayscale(x)
    return (gray + factor * (x - gray)).clamp(0, 1)


def hue(x, turn):
    """Through HSV: hue, in sixths of the circle, is turned by 6 * turn."""
    r, g, b = x.split(1, 1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    c = chroma.clamp(min=1e-9)
    sixths = torch.where(value == g, (b - r) / c + 2, (r - g) / c + 4)
    sixths = torch.where(value == r, (g - b) / c, sixths)
    # back to RGB: V - C clamp(min(k, 4 - k), 0, 1), k = (n + 6 H) mod 6, n = 5, 3, 1 for r, g, b
    n = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (n + sixths + 6 * turn) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


# ================================================================ train and evaluate
def learning_rate(args, t):
    """After t epochs: linear up to --lr, then a cosine down to 0."""
    warmup = min(args.warmup_epochs, args.epochs / 10)
    if t < warmup:
        return args.lr * t / warmup
    return args.lr * (1 + math.cos(math.pi * (t - warmup) / (args.epochs - warmup))) / 2


def train(g, x_train, args):
    """Train g in place, without labels, from the last checkpoint up to --epochs."""
    optimizer = torch.optim.SGD(g.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)  # [AdvCL]
    attack = dict(steps=args.attack_steps, step_size=args.attack_step_size, eps=args.attack_eps,
                  norm=args.norm)
    views = dict(crop_area=args.crop_area, jitter=args.jitter, gray=args.gray,
                 flip=not args.smoke)  # digits have a direction
    whole = len(x_train) // args.batch_size * args.batch_size  # a smaller last batch is left out
    parameters = list(g.parameters())

    def loss_and_gradients(x, x_prime):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            loss = cem_loss(g, x, x_prime, args.temperature, args.attack_views, **attack)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    loss_and_gradients = Recorded(loss_and_gradients, args.record)
    done = resume(args, model=g, optimizer=optimizer)
    for epoch in range(done, args.epochs):
        with in_epoch(epoch):
            g.train()
            losses = []
            order = torch.randperm(len(x_train), device=args.device)
            batches = order[:whole].split(args.batch_size)
            for i, batch in enumerate(progress(batches, f"epoch {epoch + 1}/{args.epochs}")):
                lr = learning_rate(args, epoch + (i + 0.5) / len(batches))
                optimizer.param_groups[0]["lr"] = lr
                images = to_float(x_train[batch])
                x, x_prime = augment(images, **views), augment(images, **views)
                loss, *gradients = loss_and_gradients(x, x_prime)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                optimizer.step()
                losses.append(loss.clone())  # the next recorded update overwrites it
            log(args, epoch=epoch + 1, loss=torch.stack(losses).mean().item(), lr=lr)
            save_checkpoint(args, epoch + 1, model=g, optimizer=optimizer)


def linear_probe(g, x, y):
    """A LinearProbe fitted to uint8 images x, labels y: logistic regression; g stays as it is
    [assumed: 300 steps of Adam on all of them]."""
    with eval_mode(g), torch.no_grad():
        h = torch.cat([g.encode(to_float(batch)) for batch in x.split(500)])
    probe = LinearProbe(g, h.shape[1]).to(h.device)
    optimizer = torch.optim.Adam(probe.head.parameters(), 0.01, weight_decay=1e-3)
    ce = cross_entropy(probe.head, y)
    for _ in range(300):
        optimizer.zero_grad()
        ce(h).mean().backward()
        optimizer.step()
    probe.head.eval()
    return probe


def evaluate(g, probe_data, x, y, args):
    """Accuracy of images x, uint8 [N, 3, 32, 32], labels y [N], by a linear probe fitted to
    probe_data, clean and under PGD-20 through the probe."""
    probe = linear_probe(g, *probe_data)
    eps = {"l2": 0.5, "linf": 8 / 255}[args.norm]  # the usual radius, whatever the training's
    pgd20 = dict(steps=20, step_size=2.5 * eps / 20, eps=eps, norm=args.norm)
    return {"n": len(x), "eps": eps, "clean": accuracy(probe, x, y),
            "pgd20": accuracy(probe, x, y, cross_entropy, **pgd20)}


def run(args):
    x_train, y_train, x_test, y_test = load_data(args)
    if len(x_train) < args.batch_size:
        raise Refused(f"--batch-size {args.batch_size}: there are only {len(x_train)} train images")
    split = (x_test, y_test) if args.start_split == "test" else (x_train, y_train)
    # here, so that a class without images is seen before the training
    start = {kind: starts(kind, *split) for kind in args.start}
    torch.manual_seed(args.seed)
    g = make_model(args.arch).to(args.device, memory_format=torch.channels_last)
    K = args.attack_steps
    # of one view: an attack step costs 2, an update 3. The update is of two views, the attack of
    # both, or of one, for which x' is embedded once
    forwards = 4 * K + 6 if args.attack_views == "both" else 2 * K + 7
    say_how_long(args, g, forwards * len(x_train))
    train(g, x_train, args)

    results = load_results(args)
    x_test, y_test = x_test[:args.test_images], y_test[:args.test_images]
    if results.get("accuracy", {"n": 0})["n"] < len(x_test):
        say(f"accuracy of {len(x_test)} test images by a linear probe, clean and under PGD-20 ...")
        results["accuracy"] = evaluate(g, (x_train, y_train), x_test, y_test, args)
        save_results(args, results)
    say(f"accuracy: {results['accuracy']}")
    names = []
    for sampler in args.sampler:
        for kind in args.start:
            # the name says the start; the split is that of the Gaussians' images
            unused = ("start", "start_split") if kind == "fields" else ("start",)
            name, made_with = set_of_samples(args, f"{sampler}-{SUFFIXES[kind]}", *unused)
            made_with = {"start": kind, **made_with}
            if not is_there(args, results, name, made_with):
                images, labels, entropies = sample(g, sampler, start[kind], args)
                if kind != "class":
                    labels = None
                save_samples(f"{args.out}/samples_{name}", images, labels)
                results["samples"][name] = {"n": len(images), "entropy": entropies,
                                            "flags": made_with}
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
