"""JEAT: joint energy adversarial training, which raises log p(x_adv, y), and samples by SGLD.

Zhu et al.: Towards Understanding the Generative Capability of Adversarially Robust Classifiers,
ICCV 2021. With the classifier's logits f: E(x, y) = -f(x)[y], E(x) = -log sum_k exp f(x)[k].

  training  max_theta mean of log p(x_adv, y) = log p(y|x_adv) + log p(x_adv)
  attack    d += s sign grad E(x + d, y), |d|_inf <= eps, from a random d; x + d stays in [0, 1]
  negative  x_K: K steps x += .25 grad log sum_k exp f(x)[k] + .005 xi, chains of a replay buffer
  loss      L = CE(x_adv, y) + E(x_adv) - E(x_K) = E(x_adv, y) - E(x_K)       nothing of clean x
  sampling  SGLD from Gaussians or noise on log p(x|y) = f_y + const, from the buffer on log p(x)

  python jeat.py                          the full run, as we read it: CIFAR-10, WRN-28-10
  python jeat.py --method at --out runs/jeat-at    the paper's baseline, as we read it: PGD-10 on CE
  python jeat.py --method prejeat --out runs/prejeat     ours: CE at JEAT's x_adv, no log p(x)
  python jeat.py --small                  CIFAR-10 on a CPU: a small net, a short schedule
  python jeat.py --smoke                  drawn digits, no data: under a minute on two CPU cores

  Controls: what the attack does, and what the negatives do
  python jeat.py --attack-steps 0 --out runs/jeat-unattacked             negatives, no attack
  python jeat.py --method at --attack-steps 0 --out runs/jeat-plain      neither: cross-entropy
  JEM's noise of 0.015 on the train images is in all of them; --input-noise 0 leaves it out

Writes to --out: checkpoint.pt; log.jsonl, a line an epoch; for each sampler a set of samples,
samples_{gaussian,noise,buffer}.{png,npz}, named by the sampling flags that are not at their
defaults (samples_gaussian_start-pooled_steps-25.png); results.json, with the accuracy, the flatness
of the energy, and a row for each set with quantiles of E(x). The same command resumes after the
last finished epoch, draws what is not there yet, and leaves the rest (a --smoke without --out
begins afresh). More epochs make all in results.json void. log.jsonl holds the pieces of the
loss, means over the updates; E(x) of 250 clean train images as e_clean; and, every five epochs and
in the last one, the PGD-20 accuracy on those 250, because training can overfit to a one-step
attack. Chains are not clamped, the images in files are. JEM-like training diverges now and then:
the run stops there, at the latest at the epoch's end, and says how to go on.

Sources: [paper] the abstract, which is all of it that we had; [secondary] later works that restate
the paper: log p(x_adv, y), the attack, the loss, the sampling; [JEM] the code of Grathwohl et al.,
ICLR 2020, rescaled from [-1, 1] to [0, 1]; [assumed] our reading; [ours] in none of them.
Differences from JEM's code: 50,000 train images, not 45,000; the last, smaller batch is used; no
chain is twice in a batch; the warm-up begins at 1/1000 of the rate, not at 0; the noisy images are
clamped to [0, 1], where the attack's start must be; accuracy is of images without that noise, and
of the last checkpoint, not of the best; on CUDA, bfloat16 (--no-amp: float32).
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

from samplers import (HelpFormatter, Recorded, Refused, ReplayBuffer, accuracy, ascend,
                      at_least_float32, claimed, count, crop_flip, cross_entropy, eval_mode,
                      flag_values, fraction, in_epoch, is_there, joint_energy_score, load_data,
                      log_p_x, log_p_x_given_y, number, one_line, positive, progress, radius,
                      save_samples, say, say_how_long, seed, set_of_samples, sgld, starts, take,
                      to_float, to_uint8, typed, write)


# ================================================================ the method
def energy(logits):
    """E(x) = -log sum_k exp f(x)[k], [B], of logits f(x) [B, K]."""
    return -at_least_float32(logits).logsumexp(1)


def joint_energy(logits, y):
    """E(x, y) = -f(x)[y], [B], of logits f(x) [B, K] and labels y [B]; CE = E(x, y) - E(x)."""
    return -take(at_least_float32(logits), y)


# JEM's step 1 and noise 0.01 are for u = 2x - 1: x moves half as far, and grad_u = grad_x / 2
SGLD = dict(step_size=0.25, noise=0.005)


def jeat_loss(f, x, y, buffer=None, score=joint_energy_score, sgld_steps=20, norm="linf",
              **attack):
    """L = E(x_adv, y) - E(x_K) of images x [B, 3, 32, 32] in [0, 1] with labels y [B], and its
    pieces: the means of CE(x_adv, y), E(x_adv), E(x_K).

    buffer  a ReplayBuffer, whose chains move on here. None: the loss is CE(x_adv, y) alone, and
            its pieces CE and E(x_adv)
    score   what the attack raises: joint_energy_score for JEAT, and for PreJEAT, which has no
            buffer; cross_entropy for AT
    norm, steps, step_size, eps  of the attack, as `ascend` takes them
    """
    with eval_mode(f):  # raise E(x, y), for AT the cross-entropy, in the ball; steps = 0: x itself
        x_adv = ascend(score(f, y), x, norm=norm, random_start=True, **attack)
    logits = f(x_adv)
    e_xy, e_adv = joint_energy(logits, y).mean(), energy(logits).mean()
    ce = e_xy - e_adv
    if buffer is None:
        return ce, (ce, e_adv)
    x_0, idx = buffer.sample(len(x))
    with eval_mode(f):  # not clamped
        x_k = sgld(log_p_x(f), x_0, sgld_steps, **SGLD)
    buffer.update(idx, x_k)
    e_k = energy(f(x_k)).mean()
    return e_xy - e_k, (ce, e_adv, e_k)


SAMPLERS = {  # the scores; the starts are in `run`
    "gaussian": log_p_x_given_y,  # from --start
    "noise": log_p_x_given_y,  # from uniform noise
    "buffer": lambda f, y: log_p_x(f),  # from the chains of training, which have no class
}


def sample(f, sampler, start, args):
    """--num-samples images uint8 [N, 3, 32, 32], the classes in turn, their labels [N], and their
    energies E(x) [N] before the clamp. start: a function from the images' numbers to x_0."""
    torch.manual_seed(args.sample_seed)
    numbers = torch.arange(args.num_samples, device=args.device)

    def chain(x_0, y):
        with eval_mode(f), torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            # no clamp, as for the negatives in training
            return ascend(SAMPLERS[sampler](f, y), x_0, args.sample_steps, args.sample_step_size,
                          eps=args.sample_eps, norm=args.sample_norm, noise=args.sample_noise,
                          clamp=None)

    chain = Recorded(chain, args.record)
    images, energies = [], []
    for batch in progress(numbers.split(args.sample_batch_size), sampler):
        x = chain(start(batch), batch % 10)
        with eval_mode(f), torch.no_grad():
            energies.append(energy(f(x)))
        images.append(to_uint8(x))
    return torch.cat(images), numbers % 10, torch.cat(energies)


# ================================================================ settings
def parse_args(argv=None):
    training = argparse.ArgumentParser(add_help=False)
    add = training.add_argument_group("training; a checkpoint belongs to these").add_argument
    add("--method", default="jeat", choices=("jeat", "prejeat", "at"),
        help="jeat [secondary]; prejeat: our definition, CE at JEAT's x_adv, no log p(x); at: the "
             "paper's baseline, as we read it, CE at its own adversary; both without negatives and "
             "buffer")
    add("--arch", default="wrn-28-10", choices=("wrn-28-10", "wrn-16-8", "wrn-16-4", "wrn-16-2",
                                                "wrn-10-2", "small-24"),
        help="wrn-D-W: depth, width [JEM]; small-W: three convolutions, of W, 2 W, 4 W channels")
    add("--batch-size", type=positive, default=64, help="images [JEM]")
    add("--lr", type=number, default=1e-4, help="learning rate [JEM]")
    add("--lr-drops", type=fraction, default=[0.8, 0.9], nargs="*",
        help="x 0.3 at these fractions of --epochs [JEM]")
    add("--norm", default="linf", choices=("linf", "l2"),
        help="of ball and step [secondary]; l2 needs another --attack-eps")
    add("--attack-eps", type=number, default=8 / 255, help="radius, pixels in [0, 1] [assumed]")
    add("--attack-steps", type=count, default=1,
        help="[secondary]; at: 10 [assumed]; 0: no attack, a control, see above")
    add("--attack-step-size", type=number,
        help="pixels in [0, 1]; None: --attack-eps [secondary], at: a quarter of it [assumed]")
    add("--input-noise", type=number, default=0.015,
        help="standard deviation, on train images in [0, 1] [JEM]")
    add("--sgld-steps", type=positive, default=20, help="K of the negatives [JEM]")
    add("--buffer-size", type=positive, default=10000, help="chains, at least a batch [JEM]")
    add("--seed", type=seed, default=0, help="of weights, data order, attacks and chains")
    add("--limit", type=positive, default=50000, help="at most so many images of each set")
    add("--smoke", action="store_true", help="all of it, small, on drawn digits: no downloads")

    sampling = argparse.ArgumentParser(add_help=False)
    add = sampling.add_argument_group("sampling; a set of samples belongs to these").add_argument
    add("--start", default="class", metavar="KIND",
        help="where the sampler gaussian begins. class: a Gaussian of each [secondary]; pooled: "
             "one of all [ours]; fields: random colours [ours]; cifar100, svhn or a .npy: images "
             "[ours]")
    add("--start-split", default="train", choices=("train", "test"),
        help="the Gaussians' images [ours, so that no test image enters]")
    add("--num-samples", type=positive, default=50000, help="of each sampler [assumed]")
    add("--sample-seed", type=seed, default=0, help="of starts and noise: another set of samples")
    add("--sample-steps", type=count, default=100, help="[assumed]")
    add("--sample-step-size", type=number, default=SGLD["step_size"],
        help="of the raw gradient [JEM]")
    add("--sample-eps", type=radius, default=math.inf, help="radius around the start [secondary]")
    add("--sample-norm", default="none", choices=("none", "l2", "linf"),
        help="none: the raw gradient [secondary]")
    add("--sample-noise", type=number, default=SGLD["noise"],
        help="standard deviation per step [JEM]")
    add("--sample-batch-size", type=positive, default=500, help="images moved together")

    running = argparse.ArgumentParser(add_help=False)
    add = running.add_argument_group("running; these may change").add_argument
    add("--small", action="store_true", help="other defaults, for CIFAR-10 on a CPU")
    add("--epochs", type=positive, default=200, help="[JEM]")
    add("--data", type=os.path.expanduser, default="./data",
        help="folder of cifar-10-batches-py, downloaded if absent")
    add("--out", type=os.path.expanduser, default="runs/jeat", help="folder of the run")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where it runs")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16; None: on CUDA")
    add("--record", default=False, action=argparse.BooleanOptionalAction,
        help="an update, and a chain, as one CUDA graph [ours]; not yet tried on a GPU")
    add("--test-images", type=positive, default=10000, help="at most so many, for the accuracy")
    add("--sampler", default=list(SAMPLERS), choices=SAMPLERS, nargs="+", metavar="NAME",
        help="buffer: of --method jeat only")

    no_buffer = dict(sampler=["gaussian", "noise"])
    # small and smoke: [ours]
    small = dict(
        # sgld_steps stays 20: 5 or 6 (at lr 3e-4 to 1e-3) and 8 (at lr 1e-4) diverged
        out="runs/jeat-small", arch="small-24", epochs=10, limit=20000, buffer_size=1000,
        test_images=1000, num_samples=500)
    smoke = dict(
        out="runs/jeat-smoke", arch="small-24", epochs=5, batch_size=32, lr=3e-3,
        lr_drops=[0.5, 0.8], sgld_steps=4, buffer_size=300, sample_steps=40, num_samples=100)
    # (flags, defaults): where the flags are as on the left, the defaults on the right hold; later
    # pairs win
    args = read_flags((training, sampling, running), argv, [
        ({"method": "prejeat"}, no_buffer), ({"method": "at"}, no_buffer | dict(attack_steps=10)),
        ({"small": True}, small), ({"smoke": True}, smoke)])
    if args.attack_step_size is None:
        args.attack_step_size = args.attack_eps / (4 if args.method == "at" else 1)
    return args


# ================================================================ model
class Block(nn.Module):
    """The stride is the second convolution's [JEM]."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 1, 1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, stride, 1)
        self.shortcut = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        h = self.conv1(F.leaky_relu(x, 0.2))
        return self.conv2(F.leaky_relu(h, 0.2)) + self.shortcut(x)


class Classifier(nn.Module):
    """Images in [0, 1], [B, 3, 32, 32], to float32 logits [B, 10]; 2x - 1 is inside. No
    normalisation layers, LeakyReLU 0.2, biases, PyTorch's initialisation [JEM]."""

    def __init__(self, features, width):
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        h = at_least_float32(self.features(2 * x - 1))
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has 8 bits for an energy
            return self.head(h)


def make_model(arch="wrn-28-10"):
    """A Classifier: wrn-D-W, a wide ResNet of depth D = 6 n + 4 and width W [JEM]; or small-W
    [ours], three convolutions, whose last map is not averaged: it learns much faster so."""
    if arch.startswith("small"):
        w = int(arch.removeprefix("small-"))
        return Classifier(nn.Sequential(
            nn.Conv2d(3, w, 6, 4, 1), nn.LeakyReLU(0.2),  # windows overlap, or samples show a grid
            nn.Conv2d(w, 2 * w, 3, 1, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten()), width=64 * w)
    depth, w = map(int, arch.removeprefix("wrn-").split("-"))
    layers = [nn.Conv2d(3, 16, 3, 1, 1)]
    c_in = 16
    for c_out, stride in ((16 * w, 1), (32 * w, 2), (64 * w, 2)):
        for i in range((depth - 4) // 6):
            layers.append(Block(c_in, c_out, stride if i == 0 else 1))
            c_in = c_out
    layers += [nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Classifier(nn.Sequential(*layers), width=64 * w)


# ================================================================ train and evaluate
def learning_rate(args, epoch, i, updates):
    """The rate at update i of an epoch's `updates`: a linear warm-up over the first 1000 [JEM], or
    over the first tenth of the training if that is less [ours]; x 0.3 at --lr-drops."""
    warmup = min(1000, args.epochs * updates / 10)
    drops = sum(epoch >= drop * args.epochs for drop in args.lr_drops)
    return args.lr * 0.3 ** drops * min(1, (epoch * updates + i + 1) / warmup)


def train(f, buffer, x_train, y_train, args):
    """Train f in place, and the buffer (None: no negatives), from the last checkpoint up to
    --epochs."""
    optimizer = torch.optim.Adam(f.parameters(), args.lr)  # [JEM]
    # prejeat is jeat without a buffer
    score = cross_entropy if args.method == "at" else joint_energy_score
    attack = dict(steps=args.attack_steps, step_size=args.attack_step_size, eps=args.attack_eps,
                  norm=args.norm)
    parameters = list(f.parameters())

    def values_and_gradients(x, y):  # the buffer's chains move on in it
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            loss, pieces = jeat_loss(f, x, y, buffer, score, args.sgld_steps, **attack)
        values = torch.stack([loss, *pieces]).detach()
        return values, *torch.autograd.grad(loss, parameters)

    values_and_gradients = Recorded(values_and_gradients, args.record)
    parts = dict(model=f, optimizer=optimizer)
    if buffer is not None:
        parts["buffer"] = buffer
    done = resume(args, **parts)
    for epoch in range(done, args.epochs):
        with in_epoch(epoch):
            figures = train_epoch(f, values_and_gradients, optimizer, x_train, y_train, epoch, args)
            log(args, epoch=epoch + 1, **figures)
            save_checkpoint(args, epoch + 1, **parts)


def train_epoch(f, values_and_gradients, optimizer, x_train, y_train, epoch, args):
    """One pass over the images -> its figures. Refused: it diverged."""
    f.train()
    values = []
    batches = torch.randperm(len(x_train), device=args.device).split(args.batch_size)
    for i, batch in enumerate(progress(batches, f"epoch {epoch + 1}/{args.epochs}")):
        lr = learning_rate(args, epoch, i, len(batches))
        optimizer.param_groups[0]["lr"] = lr
        x, y = to_float(x_train[batch]), y_train[batch]
        if not args.smoke:  # digits have a direction
            x = crop_flip(x, mode="reflect")  # [JEM]
        x = (x + args.input_noise * torch.randn_like(x)).clamp(0, 1)  # clamp [assumed]
        value, *gradients = values_and_gradients(x, y)
        for parameter, gradient in zip(f.parameters(), gradients):
            parameter.grad = gradient
        optimizer.step()
        values.append(value.clone())  # the next recorded update overwrites it
    values = torch.stack(values)

    x, y = to_float(x_train[:250]), y_train[:250]
    with eval_mode(f), torch.no_grad():
        e_clean = energy(f(x)).mean()
    largest = torch.cat([values.flatten(), e_clean[None]]).abs().max().item()
    if not largest <= 1e8:  # or NaN; JEM's limit, there of L before each update
        raise Refused(f"a loss or an energy of size {largest:.3g}")
    names = ("loss", "ce", "e_adv", "e_k")[:values.shape[1]]  # no e_k without a buffer
    figures = dict(zip(names, values.mean(0).tolist()))
    figures["e_clean"] = e_clean.item()
    if (epoch + 1) % 5 == 0 or epoch + 1 == args.epochs:
        figures["pgd20_train"] = accuracy(f, x, y, cross_entropy, **pgd20(args))
    return {**figures, "lr": lr}


def pgd20(args):
    """PGD-20 from the clean image, steps of eps / 4, so 2/255 at 8/255; the last iterate [assumed].
    """
    eps = args.attack_eps
    return dict(steps=20, step_size=eps / 4, eps=eps, norm=args.norm)


@torch.no_grad()
def flatness(f, x, y, args):
    """The energy around images x [N, 3, 32, 32] in [0, 1] with labels y [N], as means over them.

    e_xy, change  E(x + r u, y) at l2 radii r along one random direction u each, not clamped, and
                  its absolute change
    drift         l2 distance that 200 free steps of training's SGLD go (their noise alone: 3.9)
    e_x           quantiles of E(x): of the images, under PGD-20, after those steps
    """
    torch.manual_seed(args.seed)
    radii = [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    u = F.normalize(torch.randn_like(x).flatten(1)).view_as(x)
    with eval_mode(f):
        e_xy = torch.stack([joint_energy(f(x + r * u), y) for r in radii])  # [R, N]
        x_adv = ascend(cross_entropy(f, y), x, **pgd20(args))
        x_k = sgld(log_p_x(f), x, 200, **SGLD)
        e_x = {"clean": energy(f(x)), "pgd20": energy(f(x_adv)), "sgld": energy(f(x_k))}
    return {"n": len(x), "radii": radii, "e_xy": e_xy.mean(1).tolist(),
            "change": (e_xy - e_xy[0]).abs().mean(1).tolist(),
            "drift": (x_k - x).flatten(1).norm(dim=1).mean().item(),
            "e_x": {name: quantiles(e) for name, e in e_x.items()}}


def quantiles(e):
    return e.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=e.device)).tolist()


def evaluate(f, x, y, args):
    """Accuracy of images x, uint8 [N, 3, 32, 32], labels y [N], clean and under PGD-20."""
    return {"n": len(x), "clean": accuracy(f, x, y),
            "pgd20": accuracy(f, x, y, cross_entropy, **pgd20(args))}


def run(args):
    if args.method != "jeat" and "buffer" in args.sampler:
        raise Refused(f"--sampler buffer: --method {args.method} has no replay buffer")
    if args.method == "jeat" and args.buffer_size < args.batch_size:
        raise Refused(f"--buffer-size {args.buffer_size} is below --batch-size")
    x_train, y_train, x_test, y_test = load_data(args)
    split = (x_test, y_test) if args.start_split == "test" else (x_train, y_train)
    draw_start = None
    if "gaussian" in args.sampler:
        draw_start = starts(args.start, *split, root=None if args.smoke else args.data)
    torch.manual_seed(args.seed)
    f = make_model(args.arch).to(args.device, memory_format=torch.channels_last)
    buffer = None
    forwards = 2 * args.attack_steps + 3  # a step of attack or chain costs 2, an update 3
    if args.method == "jeat":
        buffer = ReplayBuffer(args.buffer_size, (3, 32, 32), device=args.device)
        forwards += 2 * args.sgld_steps + 3
    say_how_long(args, f, forwards * len(x_train))
    train(f, buffer, x_train, y_train, args)

    results = load_results(args)
    x_test, y_test = x_test[:args.test_images], y_test[:args.test_images]
    if results.get("accuracy", {"n": 0})["n"] < len(x_test):
        say(f"accuracy of {len(x_test)} test images, clean and under PGD-20 ...")
        results["accuracy"] = evaluate(f, x_test, y_test, args)
        save_results(args, results)
    say(f"accuracy: {results['accuracy']}")
    start = {
        "gaussian": lambda i: draw_start(i % 10),
        "noise": lambda i: torch.rand(len(i), 3, 32, 32, device=i.device),
        "buffer": lambda i: buffer.x[i % len(buffer.x)],  # its chains in turn
    }
    names = []
    for sampler in args.sampler:
        unused = ("start", "start_split")
        if sampler == "gaussian":  # the split is that of the Gaussians' images
            unused = () if args.start in ("class", "pooled") else ("start_split",)
        name, made_with = set_of_samples(args, sampler, *unused)
        if not is_there(args, results, name, made_with):
            images, labels, energies = sample(f, sampler, start[sampler], args)
            row = {"n": len(images), "e_x": quantiles(energies), "flags": made_with}
            if sampler == "buffer":
                labels = None
                # where they are fewer than n, each is continued several times
                row["chains"] = min(len(images), len(buffer.x))
            save_samples(f"{args.out}/samples_{name}", images, labels)
            results["samples"][name] = row
            save_results(args, results)
        names.append(name)
    x, y = to_float(x_test[:100]), y_test[:100]
    if results.get("flatness", {"n": 0})["n"] < len(x):
        say(f"flatness of the energy around {len(x)} test images ...")
        results["flatness"] = flatness(f, x, y, args)
        save_results(args, results)
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
