"""AT-EBM: an energy-based model as one logit, learned by binary adversarial training.

Yin, Li, Rohde: Learning Energy-Based Models With Adversarial Training, ECCV 2022. D = sigmoid(f),
E = -f.

  training  max_D E_{x ~ p_data} log D(x) + E_{x ~ p_0} min_{x' in B(x, eps)} log(1 - D(x'))
            p_0: other images. At the optimum D = 1/2 on the support of p_data, D <= 1/2 off it
  attack    x' += a grad f / |grad f|, K steps; the data J steps the other way, with R1 on them
  gate      K = 0, 1, ..., 25: on once attacked data and attacked p_0 are told apart (AUC)
  sampling  the same ascent, from p_0's images or another class's (translation); E detects outliers

  python binary_at_ebm.py                      CIFAR-10, p_0 = CIFAR-100, both downloaded
  python binary_at_ebm.py --mode ood           eps-balls, a fixed K: for the detection of outliers
  python binary_at_ebm.py --classes 3 --p0 rest --translate-from 5             dogs become cats
  python binary_at_ebm.py --smoke              small, no data: 25 to 35 s on two CPU cores

Writes checkpoint.pt, log.jsonl, results.json, samples_{ascent,translation}.{png,npz} to --out;
resumes. Defaults: [official] xuwangyin/AT-EBMs, whose p_0, 80M Tiny Images, is withdrawn:
CIFAR-100 is [our substitution]; [assumed] our reading.
"""
import argparse
import io
import json
import math
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import resnet18, resnet50

from samplers import ascend, logit, replace_files, save_samples, to_float, to_uint8, worst_case

# ================================================================ the method
def adversaries(f, x, x_0, K=25, J=5, step=0.1, step_pos=0.1, eps=math.inf, eps_pos=math.inf, norm="l2"):
    """x_pos: data x [B, 3, 32, 32] moved J steps down the logit; x_neg: p_0's images x_0, K steps up."""
    x_pos = ascend(logit(f, sign=-1), x, J, step_pos, eps=eps_pos, norm=norm)
    x_neg = ascend(logit(f), x_0, K, step, eps=eps, norm=norm)
    return x_pos, x_neg


def r1_penalty(logits, x):
    """R1 = 1/2 mean_b |grad_x f|^2 of logits f(x) [B, 1] at x [B, ...]; can be differentiated again."""
    g, = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return 0.5 * g.flatten(1).square().sum(1).mean()


def at_ebm_loss(f, x_pos, x_neg, r1=0.01):
    """BCE, the mean over all 2B logits, + r1 * R1 at x_pos -> loss, and the logits f_pos, f_neg [B, 1]."""
    x_pos = x_pos.detach().requires_grad_(r1 > 0)
    f_pos, f_neg = f(x_pos), f(x_neg)  # two forwards: R1 goes through the first only
    loss = 0.5 * (F.softplus(-f_pos).mean() + F.softplus(f_neg).mean())  # -log D(x_pos), -log(1 - D(x_neg))
    if r1 > 0:
        loss = loss + r1 * r1_penalty(f_pos, x_pos)
    return loss, f_pos.detach(), f_neg.detach()


def auc(positive, negative):
    """P(positive > negative) + P(equal) / 2 of two sets of scores: exact, float64, on their device."""
    positive, negative = positive.flatten(), negative.flatten().sort().values
    below, not_above = (torch.searchsorted(negative, positive, right=right).sum() for right in (False, True))
    return (below + not_above).double() / (2 * len(positive) * len(negative))


def gate(stage, area, last=25, threshold=0.8, window=100, most=7815):
    """The stage {K, window, iteration} after an iteration of AUC `area`: on to K + 1 and an empty window when
    a full window's mean exceeds the threshold, or after `most` iterations; K stays at `last` [official]."""
    areas, iteration = [*stage["window"], area][-window:], stage["iteration"] + 1
    passed = len(areas) == window and sum(areas) / window > threshold
    if stage["K"] < last and (passed or iteration >= most):
        return {"K": stage["K"] + 1, "window": [], "iteration": 0}
    return {"K": stage["K"], "window": areas, "iteration": iteration}


# ================================================================ model
class Energy(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] to the float32 logit f = -E [B, 1]; the normalisation is inside."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        pixels = torch.tensor([[.4914, .4822, .4465], [.2023, .1994, .2010]])  # [official]
        self.register_buffer("pixels", pixels.view(2, 3, 1, 1), persistent=False)
        self.train()

    def train(self, mode=True):  # never: its batch norms are affines gamma x + beta [official]
        return super().train(False)

    def forward(self, x):
        return self.net((x - self.pixels[0]) / self.pixels[1]).float()


def make_model(arch="resnet50"):
    """An Energy: resnet50 or resnet18, with a 3x3 stem of stride 1, no max-pool and PyTorch's default
    initialisation [official]; or "small", the smoke run's. README: loading a checkpoint."""
    if arch == "small":
        layers = [m for i, o, k in ((3, 32, 4), (32, 64, 3), (64, 128, 3))  # a 3x3 stem leaves a grid
                  for m in (nn.Conv2d(i, o, k, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
        return Energy(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1)))
    net = {"resnet18": resnet18, "resnet50": resnet50}[arch](num_classes=1)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for m in net.modules():  # torchvision's own starts with logits a thousand times larger
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.reset_parameters()
    return Energy(net)


# ================================================================ its own arguments
SAMPLERS, OOD_FLAGS, INF = ("ascent", "translation"), ("limit_test", "ood_images", "ood_steps"), math.inf
SMOKE = dict(arch="small", classes=[2], p0="rest", translate_from=3, epochs=(40, 20), lr=(2e-3, 0.05),
             max_steps=8, epochs_per_step=10, auc_window=20, attack_steps=(None, 5), attack_step_size=0.5,
             attack_eps=(INF, 2.0), positive_steps=1, positive_eps=(INF, 0.5), num_samples=100,
             limit_test=500, ood_sets=["noise", "svhn", "rest"], ood_images=100, ood_steps=5)


def parse_args(argv):
    label = {"type": int, "choices": range(10), "metavar": "0..9"}
    own = [("data", "--classes", dict(label, nargs="+", help="of p_data; default: all")),
           ("data", "--p0", dict(metavar="SET", help="cifar100, noise, rest (all but --classes), or a "
                                 ".npy, uint8 [N, 32, 32, 3]; %(default)s")),
           ("training", "--mode", dict(choices=("generation", "ood"), help="(a, b): in each; %(default)s")),
           ("training", "--max-steps", dict(COUNT, help="the gate's last K, to the end; %(default)s")),
           ("training", "--auc-threshold", dict(REAL, help="of the gate; %(default)s")),
           ("training", "--auc-window", dict(COUNT, help="iterations, of the gate; %(default)s")),
           ("training", "--epochs-per-step", dict(COUNT, help="at most, at each K < N; %(default)s")),
           ("attack", "--positive-steps", dict(COUNT, help="J, on p_data, in the control too; %(default)s")),
           ("attack", "--positive-eps", dict(REAL, help="radius, on p_data, or inf; %(default)s")),
           ("sampling", "--translate-from", dict(label, help="start from this class's test images, too")),
           ("evaluation", "--ood-sets", dict(nargs="*", metavar="SET", help="as --p0, or svhn; %(default)s")),
           ("evaluation", "--ood-images", dict(COUNT, help="of each set; %(default)s")),
           ("evaluation", "--ood-steps", dict(COUNT, help="of 2.5 eps / N, five times; %(default)s"))]
    POSITIVE_FLAGS.extend(("auc_window", "ood_images", "ood_steps"))
    args = parse_common(
        argv, ("resnet18", "resnet50", "small"), SAMPLERS, ("p0",), SMOKE, own,
        mode="generation", arch="resnet50", lr=(5e-4, 0.1), batch_size=(32, 128),  # to p0: [official]
        max_steps=25, auc_threshold=0.8, auc_window=100, epochs_per_step=5, norm="l2", attack_step_size=0.1,
        attack_steps=(None, 20), attack_eps=(INF, 0.5), positive_steps=(5, 10), positive_eps=(INF, 0.25),
        start="p0", sample_norm="l2", sample_steps=32, sample_step_size=0.2, sample_eps=INF, sample_noise=0.0,
        ood_images=1024, ood_eps=1.0, ood_steps=100,
        epochs=(200, 100), num_samples=50000, sample_batch_size=500,  # [assumed, but for the 100]
        p0="cifar100", ood_sets=["svhn", "cifar100", "noise"])  # [our substitution]; there ImageNet-32 too
    vars(args).update({k: v[args.mode == "ood"] for k, v in vars(args).items() if isinstance(v, tuple)})
    FREE_FLAGS.update(("translate_from", "ood_sets", "ood_eps", *OOD_FLAGS))
    if args.translate_from is None and len(args.sampler) == 2:
        print("no --translate-from: no translation")
        args.sampler = ["ascent"]
    return args


def load_set(name, args, rest, train=False):
    """uint8 [N, 3, 32, 32]: the train or test images of a set, or a .npy's. Any exception: not to be had."""
    if name == "noise":
        g = torch.Generator().manual_seed(args.seed + train)
        return torch.randint(256, (50000 if train else 10000, 3, 32, 32), generator=g, dtype=torch.uint8)
    if name == "rest":
        x = rest.permute(0, 2, 3, 1).numpy(force=True)
    elif args.smoke and name in ("cifar100", "svhn"):
        raise ValueError("--smoke downloads nothing")
    elif name == "cifar100":
        x = torchvision.datasets.CIFAR100(args.data, train, download=True).data
    elif name == "svhn":
        split = "train" if train else "test"
        x = torchvision.datasets.SVHN(args.data, split, download=True).data.transpose(0, 2, 3, 1)
    else:
        x = np.load(name)
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or len(x) == 0:
        raise ValueError("no images" if name == "rest" else "not uint8 [N, 32, 32, 3]")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


# ================================================================ train, sample, evaluate
def train(f, x_train, p_0, args, state):
    """Train f in place, from `state` (what the checkpoint holds, with the gate's stage) to --epochs."""
    if args.mode == "generation":  # [official], both
        optimizer, r1 = torch.optim.Adam(f.parameters(), args.lr, betas=(0.0, 0.99)), 0.01
    else:
        optimizer, r1 = torch.optim.SGD(f.parameters(), args.lr, momentum=0.9, nesterov=True), 0.0
    restore(args, state, f, optimizer)
    K, last = (0, args.max_steps) if args.attack_steps is None else [args.attack_steps] * 2
    stage = state.setdefault("stage", {"K": K, "window": [], "iteration": 0})
    n, first, begun = len(x_train), state["epoch"], time.time()
    most = args.epochs_per_step * math.ceil(n / args.batch_size)
    for epoch in range(first, args.epochs):
        start, figures = time.time(), []
        for batch in torch.randperm(n, device=p_0.device).split(args.batch_size):
            x = to_float(x_train[batch])
            x_0 = to_float(p_0[torch.randint(len(p_0), (len(batch),), device=p_0.device)])
            if not args.smoke:  # the drawn bars have a direction
                x, x_0 = crop_flip(x), crop_flip(x_0)  # [official; mode ood: in place of AutoAugment, cutout]
            # autocast for the attacks only: different precision on the two sides would be a cue for D
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                x_pos, x_neg = adversaries(
                    f, x, x_0, stage["K"], args.positive_steps, args.attack_step_size, args.attack_step_size,
                    args.attack_eps, args.positive_eps, args.norm)
            loss, f_pos, f_neg = at_ebm_loss(f, x_pos, x_neg, r1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            value, area = torch.stack([loss.detach(), auc(f_pos, f_neg)]).tolist()  # the only synchronisation
            check_loss(args, value)
            stage = gate(stage, area, last, args.auc_threshold, args.auc_window, most)
            figures.append((value, area))
            done = (epoch - first) * n + min(len(figures) * args.batch_size, n)
            progress("training", begun, (args.epochs - first) * n, done,
                     f", epoch {epoch + 1}/{args.epochs}, K {stage['K']}, loss {value:.3f}, AUC {area:.2f}")
        state["stage"], (loss, area) = stage, np.mean(figures, 0).tolist()
        end_epoch(args, state, f, optimizer, start, n, K=stage["K"], loss=loss, auc=area)


def scores(f, x):
    """f of images x [N, 3, 32, 32], uint8 or float, as [N]."""
    with torch.no_grad():
        return torch.cat([f(to_float(b)).squeeze(1) for b in x.split(500)])


def quantiles(f, x):
    """The 5, 25, 50, 75 and 95 % quantiles of the energy of images x."""
    return (-scores(f, x)).quantile(torch.tensor([.05, .25, .5, .75, .95], device=x.device)).tolist()


def write_samples(name, f, x_0, args):
    """Images x_0, uint8 [N, 3, 32, 32], moved up the logit."""
    torch.manual_seed(args.seed)
    images, begun, path = [], time.time(), f"{args.out}/samples_{name}"
    for x in x_0.split(args.sample_batch_size):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
            x = ascend(logit(f), to_float(x), args.sample_steps, args.sample_step_size, eps=args.sample_eps,
                       norm=args.sample_norm, noise=args.sample_noise)
        images.append(to_uint8(x))
        progress(f"sampling, {name}", begun, len(x_0), sum(map(len, images)))
    save_samples(path, images := torch.cat(images))
    if name == "translation":  # its picture: each source, and beside it what it became
        pairs = to_float(torch.stack([x_0, images], 1)[:50].flatten(0, 1))
        torchvision.utils.save_image(pairs, f"{path}.png", nrow=10, pad_value=1.0)
    return {"n": len(images), "energy": quantiles(f, images)}


def detect(name, f, x_data, x, args):
    """AUROC of the logit, of test data x_data against images x: clean, and attacked to raise their logits."""
    torch.manual_seed(args.seed)
    x = to_float(x[torch.randperm(len(x))[:args.ood_images].to(x.device)].to(x_data.device))
    worst, begun, step_size = [], time.time(), 2.5 * args.ood_eps / args.ood_steps  # ours: there APGD
    for b in x.split(256):
        worst.append(worst_case(logit(f), b, args.ood_steps, step_size, eps=args.ood_eps, restarts=5)[1])
        progress(f"outliers, {name}", begun, len(x), sum(map(len, worst)))
    f_data, clean = scores(f, x_data), scores(f, x)
    worst = torch.cat(worst).maximum(clean)  # the last digits depend on the batch
    return {"n": len(x), "auroc": auc(f_data, clean).item(), "auroc_worst": auc(f_data, worst).item(),
            "eps": args.ood_eps, "steps": args.ood_steps, "seen_in_p0": Path(name) == Path(args.p0)}


def run(args):
    state = open_out(args)
    x_train, y_train, x_test, y_test = load_data(args, args.device)
    own = torch.tensor(args.classes or list(range(10)), device=args.device)
    source = x_test[y_test == args.translate_from][:args.num_samples]
    train_in, test_in = torch.isin(y_train, own), torch.isin(y_test, own)
    if "translation" in args.sampler and (len(source) == 0 or args.translate_from in own):
        fail("a translation needs --translate-from, --classes without it, or a larger --limit-test")
    try:
        p_0 = load_set(args.p0, args, x_train[~train_in], train=True).to(args.device)
    except Exception as e:
        fail(f"--p0 {args.p0}: {e}; others: cifar100, noise, rest, a .npy")
    if min(train_in.sum(), test_in.sum()) == 0:
        fail("no images of --classes: a larger --limit-train or --limit-test")
    torch.manual_seed(args.seed)
    f = make_model(args.arch).to(args.device, memory_format=torch.channels_last)
    train(f, x_train[train_in], p_0, args, state)
    results, K, x_test, rest = state["results"], state["stage"]["K"], x_test[test_in], x_test[~test_in]

    order = torch.randperm(len(p_0), generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    x_0 = to_float(p_0[order[:250]])  # attacked with training's K, here in float32
    x_k = ascend(logit(f), x_0, K, args.attack_step_size, eps=args.attack_eps, norm=args.norm)
    energies = {"data": x_test, "p0": x_0, "p0_attacked": x_k}
    results |= {"K": K, "energy": {name: quantiles(f, x) for name, x in energies.items()}}
    ascent = p_0[order.repeat(-(-args.num_samples // len(order)))[:args.num_samples]]
    for name in args.sampler:
        once(args, results, "samples", name, [*SAMPLING_FLAGS, *["translate_from"] * (name == "translation")],
             lambda: write_samples(name, f, {"ascent": ascent, "translation": source}[name], args))
    for name in args.ood_sets:
        try:
            x = load_set(name, args, rest)
        except Exception as e:
            print(f"--ood-sets {name}: skipped, {e}")
            results.setdefault("ood", {}).setdefault(name, {"skipped": str(e)})
        else:
            once(args, results, "ood", name, OOD_FLAGS, lambda: detect(name, f, x_test, x, args))
    score_samples(args, results, args.sampler)
    print(f"{args.out}/results.json: K {K}, ood {results.get('ood')}")


# ================================================================ block: drawn data
# From here to the end the four scripts are the same, block by block, so that each can be copied alone.
def draw(n, seed):
    """n drawn images uint8 [n, 3, 32, 32] and labels [n], in turn: disc, circles, X, plus, horizon, bars in
    three directions, checkerboard, two dots. Place, size, hue, background and noise vary."""
    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=g)
    g, y, axis = torch.Generator().manual_seed(seed), torch.arange(n) % 10, torch.linspace(-1, 1, 32)
    u, v, s = axis - uniform(-.25, .25), axis[:, None] - uniform(-.25, .25), uniform(.5, .7)
    r, a, b, k, p = (u * u + v * v).sqrt(), u.abs(), v.abs(), uniform(7, 10), uniform(0, 6.3)
    end, bars, rungs = 1.2 * s - torch.maximum(a, b), torch.sin(k * u + p), torch.sin(k * v + p)
    figures = [s - r, torch.sin(1.3 * k * r), torch.minimum(.2 - (a - b).abs(), end),
               torch.minimum(.17 - torch.minimum(a, b), end), v, bars, rungs,
               torch.sin(.7 * k * (u + v) + p), bars * rungs, .27 - ((a - .4) ** 2 + v * v).sqrt()]
    mask = torch.stack([f.expand(n, 1, 32, 32) for f in figures])[y, torch.arange(n)].mul(16).sigmoid()
    hue = .5 + .5 * torch.cos(2 * math.pi * (uniform(0, 1) + torch.tensor([0, 1 / 3, 2 / 3]).view(3, 1, 1)))
    figure, ground, swap = .25 + .75 * hue, uniform(0, .3, 3), uniform(0, 1) < .5  # else pixels tell
    figure, ground = torch.where(swap, ground, figure), torch.where(swap, figure, ground)
    return to_uint8(ground + (figure - ground) * mask + .03 * torch.randn(n, 3, 32, 32, generator=g)), y


# ================================================================ block: loader
def load_data(args, device):
    """x_train, y_train, x_test, y_test on the device: uint8 [N, 3, 32, 32], int64 [N]; --smoke: drawn."""
    sets, there = [draw(2000, seed=0), draw(1000, seed=1)], Path(args.data, "cifar-10-batches-py").exists()
    try:
        for i in range(0 if args.smoke else 2):
            d = torchvision.datasets.CIFAR10(args.data, train=i == 0, download=not there)
            sets[i] = torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(d.targets)
    except Exception as e:  # torchvision: RuntimeError for a wrong checksum, any error of the connection
        what = "a damaged cifar-10-batches-py, to be deleted," if there else "no CIFAR-10 and no download"
        fail(f"--data {args.data}: {what} ({e}); name another folder, or try --smoke, which needs no data")
    return [t[:n].to(device) for pair, n in zip(sets, (args.limit_train, args.limit_test)) for t in pair]


# ================================================================ block: crop_flip
def crop_flip(x, pad=4, mode="constant"):
    """Random crop of the padded image and random flip, for each sample of float x [B, C, S, S]."""
    offsets = torch.randint(2 * pad + 1, (2, len(x), 1), device=x.device)
    rows, columns = offsets + torch.arange(x.shape[-1], device=x.device)  # [B, S] each
    columns = torch.where(torch.rand(len(x), 1, device=x.device) < 0.5, columns.flip(1), columns)
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    return F.pad(x, (pad,) * 4, mode=mode)[sample, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


# ================================================================ block: log
def progress(what, start, total, done, text=""):
    """One line that rewrites itself on a terminal; elsewhere a line every ten seconds and at the end."""
    now, terminal = time.time(), sys.stdout.isatty()
    if done == total or now - getattr(progress, "shown", 0) > (0.2 if terminal else 10):
        progress.shown, rate = now, done / max(now - start, 1e-9)
        line = f"{what}: {done}/{total} images, {rate:.0f} images/s, ETA {(total - done) / rate:.0f} s{text}"
        print("\r\033[K" * terminal + line, end="\n" * (done == total or not terminal), flush=True)


def log(args, results=None, **fields):
    """A line of log.jsonl, for each epoch and event; results.json, where there are results."""
    with open(Path(args.out) / "log.jsonl", "a") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **fields}) + "\n")
    if results:
        results |= {"versions": {"python": sys.version.split()[0], "torch": torch.__version__},
                    "device": torch.cuda.get_device_name(args.device) if "cuda" in args.device else "cpu",
                    "args": {k: "inf" if v == math.inf else v for k, v in vars(args).items()}}  # strict JSON
        replace_files({f"{args.out}/results.json": json.dumps(results, indent=2).encode()})


def once(args, results, section, name, flags, work):
    """results[section][name] = work(), unless results.json has it for the same flags."""
    begun, phase, made_with = time.time(), f"{section} {name}", {k: str(vars(args)[k]) for k in flags}
    there = section != "samples" or Path(f"{args.out}/samples_{name}.npz").exists()
    if results["done"].get(phase) == made_with and there:
        return print(f"{phase}: already in {args.out}")
    results["done"].pop(phase, None), results.setdefault(section, {}).pop(name, None)
    log(args, results, event=f"{phase} begins")  # a kill from here on leaves no row of other samples
    results[section][name] = work()
    results["done"][phase], results["seconds"][name] = made_with, time.time() - begun
    log(args, results, event=phase, seconds=time.time() - begun)


def score_samples(args, results, names):
    """IS and FID into the rows of the samples that lack them, or null with the reason."""
    rows = {f"{args.out}/samples_{name}.npz": results["samples"][name] for name in names}
    try:
        from metrics import score_rows
        score_rows(rows, args.data, args.inception_weights, args.device, never=args.smoke)
    except ImportError as e:
        print(f"no IS and FID: {e}")
        results["samples"] |= {k: {"fid": None, "reason": str(e)} | results["samples"][k] for k in names}
    log(args, results, event="scores")


# ================================================================ block: checkpoint
def open_out(args):
    """The state in --out: of its checkpoint, checked against args, and of results.json; or a beginning."""
    if args.smoke and not (args.out or args.eval_only):
        shutil.rmtree(f"runs/{NAME}-smoke", ignore_errors=True)
    args.out = args.out or f"runs/{NAME}" + "-smoke" * args.smoke
    path, results = Path(args.out) / "checkpoint.pt", Path(args.out) / "results.json"
    if not path.exists():
        return fail(f"--eval-only: no {path}") if args.eval_only else {"epoch": 0, "seconds": 0.0}
    try:
        state = torch.load(read := path, map_location="cpu", weights_only=True)
        epoch, theirs, mine = state["epoch"], state["args"], vars(args)
        if state["script"] != NAME:
            raise ValueError(f"of {state['script']}.py")
        old = json.loads(results.read_text()) if (read := results).exists() else {}
        state["results"] = old if old.get("epoch") == epoch else state["results"]
    except Exception as e:
        fail(f"{read} is damaged or foreign ({repr(e)[:60]}): move it away or name another --out")
    other = "".join(f"; {k} was {theirs.get(k)}, is {mine.get(k)}" for k in sorted(theirs.keys() | mine)
                    if k not in FREE_FLAGS and mine.get(k) != theirs.get(k))
    if args.eval_only:
        print(f"--eval-only takes the training's flags from the checkpoint{other}")
        mine.update({k: v for k, v in theirs.items() if k not in FREE_FLAGS}, epochs=epoch)
    elif other or args.epochs < epoch:
        fail(f"{path}: {epoch} epochs are done. --epochs may grow, all else needs another --out{other}")
    elif args.epochs != theirs["epochs"]:
        print(f"--epochs was {theirs['epochs']}: one long run ends elsewhere if the schedule depends on it")
    return state


def restore(args, state, model, optimizer):
    """Make --out; put the state into model, optimiser and random numbers."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    log(args, event="start", epoch=state["epoch"])
    print(f"{args.out}: {state['epoch']} of {args.epochs} epochs are done; {args.arch} on {args.device}")
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state.get("cuda_rng") is not None and "cuda" in args.device:
            torch.cuda.set_rng_state(state["cuda_rng"], args.device)


def end_epoch(args, state, model, optimizer, begun, n, **figures):
    """Log the epoch; write the state to checkpoint.pt, plain dicts that load with weights_only=True."""
    check_loss(args, sum(p.detach().sum() for p in model.parameters()).item() * 0)  # NaN of a weight
    took = time.time() - begun
    state |= dict(epoch=state["epoch"] + 1, seconds=state["seconds"] + took, script=NAME, args=vars(args),
                  rng=torch.get_rng_state(), model=model.state_dict(), optimizer=optimizer.state_dict(),
                  cuda_rng=torch.cuda.get_rng_state(args.device) if "cuda" in args.device else None)
    state["results"] = {"epoch": state["epoch"], "seconds": {"train": state["seconds"]}, "accuracy": {},
                        "samples": {}, "done": {}}
    torch.save(state, buffer := io.BytesIO())
    log(args, event="epoch", epoch=state["epoch"], **figures, seconds=took, images_per_s=n / took)
    replace_files({f"{args.out}/checkpoint.pt": buffer.getbuffer()})
    Path(args.out, "results.json").unlink(missing_ok=True)  # of another checkpoint


def check_loss(args, loss):
    """Stop at a loss that is not finite or explodes, before it reaches a checkpoint."""
    if not abs(loss) < 1e8:
        fail(f"training diverged (loss {loss}). {args.out} keeps the last good checkpoint, if there was one: "
             "--eval-only samples from it; a smaller --lr or another --seed needs another --out", code=1)


# ================================================================ block: flags
NAME = Path(__file__).stem
SAMPLING_FLAGS = ("num_samples", "start", "seed_split", "sample_norm", "sample_steps", "sample_step_size",
                  "sample_eps", "sample_noise", "sample_batch_size", "limit_test", "amp", "cuda_graphs")
FREE_FLAGS = {*SAMPLING_FLAGS, *"sampler inception_weights eval_only epochs data out device".split()}
POSITIVE_FLAGS = "epochs batch_size limit_train limit_test num_samples sample_batch_size".split()
COUNT, REAL = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}


def parse_common(argv, archs, samplers, starts, smoke, own, **defaults):
    """The arguments: flags that mean the same in all scripts, and a script's own (group, flag, options)."""
    parser = argparse.ArgumentParser(f"{NAME}.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    titles = "data", "model", "training", "attack", "sampling", "evaluation"
    groups = {title: parser.add_argument_group(title).add_argument for title in titles}
    data, model, training, attack, sampling, evaluation = groups.values()
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] * torch.cuda.is_available()
    data("--data", default="./data", help="folder of cifar-10-batches-py, else downloaded; %(default)s")
    data("--out", help=f"folder of the run; runs/{NAME}, with --smoke runs/{NAME}-smoke, begun afresh")
    data("--limit-train", **COUNT, help="only the first N training images")
    data("--limit-test", **COUNT, help="only the first N test images")
    data("--smoke", action="store_true", help="the whole pipeline, small, on drawn classes, no downloads")
    model("--arch", choices=archs, help="%(default)s")
    model("--device", choices=("cpu", *cuda), default=(*cuda, "cpu")[0], help="%(default)s")
    model("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 in the net only; default: on CUDA")
    model("--cuda-graphs", action="store_true", help="replayed steps, for small batches; unmeasured")
    training("--epochs", **COUNT, help="passes over the data; may grow in the same --out; %(default)s")
    training("--batch-size", **COUNT, help="images; %(default)s")
    training("--lr", **REAL, help="learning rate; %(default)s")
    training("--seed", **COUNT, default=0, help="of weights, data order, attacks and sampling; %(default)s")
    attack("--norm", choices=("l2", "linf"), help="of ball and step; %(default)s")
    attack("--attack-eps", **REAL, help="radius, for pixels in [0, 1]; %(default)s")
    attack("--attack-steps", **COUNT, help="0: no attack, the control; %(default)s")
    attack("--attack-step-size", **REAL, help="for pixels in [0, 1]; %(default)s")
    sampling("--sampler", nargs="+", choices=("all", *samplers), default=["all"], help="default: all")
    sampling("--start", choices=starts, help="Gaussian per class, one pooled, uniform noise; %(default)s")
    sampling("--seed-split", choices=("train", "test"), default="train", help="of the Gaussians; %(default)s")
    sampling("--num-samples", **COUNT, help="images per sampler; %(default)s")
    sampling("--sample-norm", choices=("l2", "linf", "none"), help="none: the raw gradient; %(default)s")
    sampling("--sample-steps", **COUNT, help="%(default)s")
    sampling("--sample-step-size", **REAL, help="for pixels in [0, 1]; %(default)s")
    sampling("--sample-eps", **REAL, help="radius of the ball around the seed, or inf; %(default)s")
    sampling("--sample-noise", **REAL, help="standard deviation, per step and pixel; %(default)s")
    sampling("--sample-batch-size", **COUNT, help="images moved together; %(default)s")
    evaluation("--eval-only", action="store_true", help="no training; its flags as in --out's checkpoint")
    evaluation("--inception-weights", metavar="PATH", help="for IS, FID; default: downloaded, on CUDA only")
    for group, flag, options in own:
        groups[group](flag, **options)
    parser.set_defaults(**defaults | (smoke if "--smoke" in (sys.argv if argv is None else argv) else {}))
    args = parser.parse_args(argv)
    args.amp = "cuda" in args.device if args.amp is None else args.amp
    args.sampler = [s for s in samplers if s in args.sampler or "all" in args.sampler]
    for flag, v in vars(args).items():
        low, high = flag in POSITIVE_FLAGS, math.inf if flag.endswith("_eps") else 2 ** 63 - 1024
        numbers = [n for n in (v if isinstance(v, list) else [v]) if type(n) in (int, float)]
        if not all(low <= n <= high for n in numbers):
            fail(f"--{flag.replace('_', '-')} must be {'> 0' if low else '>= 0'} and finite, not {v}")
    return args


# ================================================================ block: main
def fail(message, code=2):
    """One line on stderr, and the end."""
    print(f"{NAME}.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark, ascend.cuda_graphs = True, args.cuda_graphs
    socket.setdefaulttimeout(10)  # a silent download ends
    try:
        run(args)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command with --out {args.out} goes on after the last epoch", code=130)
    except (OSError, torch.OutOfMemoryError) as e:  # --out not writable, disk full; a smaller --batch-size
        fail(e, code=2 if isinstance(e, OSError) else 1)


if __name__ == "__main__":
    main()
