"""Unsupervised CEM: adversarial contrastive learning as maximum likelihood; MaxEnt sampling.

Wang, Wang, Yang, Lin: A Unified Contrastive Energy-based Model for Understanding the Generative
Ability of Adversarial Training, ICLR 2022. p(x, x') = exp f(x, x') / Z with unit g and
f(x, x') = g(x).g(x') / t.

  training  min_theta E max_{|x_hat - x| <= eps} NCE(x_hat, x')   x, x': two views of an image
            NCE(x, x') = -log [ exp f(x, x') / sum_j exp f(x, x_j) ]    j: x', the other views
  MaxEnt    N samples move together to raise H = -1/N sum_i log 1/N sum_j exp f(x_i, x_j), each by
            its own index only, grad -log sum_{j != i} exp f(x_i, sg[x_j]), sg: held; so not quite
            grad H
  PGD       raises NCE(x_i, seed_i) among the samples, as the attack does: they attract each other

  python cem_unsup.py                          the headline: CIFAR-10 (downloaded), ResNet-50
  python cem_unsup.py --smoke                  small, no data: 35 to 42 s on two CPU cores

Writes checkpoint.pt, log.jsonl, results.json, samples_{maxent,pgd}-{uncond,cond}.{png,npz} to
--out; resumes. Sources: [paper] the slides: p(x, x'); [memory] training, MaxEnt; [ACL] Jiang et al.
2020, its basis: |g| = 1 and t; [AdvCL] Fan et al. 2021; [assumed] our reading: PGD, the same f in
sampling. Defaults say theirs.
"""
import argparse
import io
import json
import math
import shutil
import socket
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import resnet18, resnet50
from torchvision.transforms.functional import rgb_to_grayscale

from samplers import (accuracy, ascend, cross_entropy, entropy, eval_mode, fit_gaussians, info_nce,
                      replace_files, save_samples, to_float, to_uint8)

# ================================================================ the method
def nt_xent(z1, z2, temperature):
    """NT-Xent of two views z1, z2 [B, D] of any length: the attack's score, the mean over all 2B rows."""
    return info_nce(nn.Identity(), None, temperature)(torch.cat([z1, z2])).mean()


def cem_loss(g, x, x_prime, tau=0.5, views="one", steps=7, step_size=0.1, eps=0.5, norm="l2"):
    """max_{|x_hat - x| <= eps} NCE(x_hat, x') of two views x, x' [B, 3, 32, 32] in [0, 1] of the same images.
    views "both": x' is moved too, jointly [ACL, whose clean half and second batch norm are left out]."""
    if views == "both":
        x, x_prime = torch.cat([x, x_prime]), None
    with eval_mode(g):
        x_hat = ascend(info_nce(g, x_prime, tau), x, steps, step_size, eps=eps, norm=norm, random_start=True)
    both = x_hat if views == "both" else torch.cat([x_hat, x_prime])
    return nt_xent(*g(both).chunk(2), tau)  # one forward of both views: one set of batch statistics


SAMPLERS = {"maxent": lambda g, x_0, tau: entropy(g, tau),
            "pgd": lambda g, x_0, tau: info_nce(g, x_0, tau, other_positives=False)}
STARTS = {"uncond": "pooled", "cond": "class"}  # names [paper]; only the seeds differ [assumed]


def sample(sampler, g, x_0, tau=0.5, steps=60, step_size=0.5, eps=30.0, norm="l2", noise=0.0, generator=None):
    """Move a batch of seeds x_0 [N, 3, 32, 32] together up the sampler's score; no labels, data or views."""
    with eval_mode(g):
        return ascend(SAMPLERS[sampler](g, x_0, tau), x_0, steps, step_size, eps=eps, norm=norm, noise=noise,
                      generator=generator)


def batch_entropy(z, tau=0.5):
    """H of a batch from its z [N, D] on the unit sphere, self included."""
    return math.log(len(z)) - (z @ z.T / tau).logsumexp(1).mean()


# ================================================================ model
class Encoder(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] to z [B, D] on the unit sphere; encode(x): h [B, D], not projected."""

    def __init__(self, net, width):
        super().__init__()
        layers = [(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(3)]
        self.net, self.projector = net, nn.Sequential(*sum(layers, ())[:-1])  # [ACL]
        pixels = torch.tensor([[.4914, .4822, .4465], [.2023, .1994, .2010]])  # [assumed; ACL: ImageNet's]
        self.register_buffer("pixels", pixels.view(2, 3, 1, 1), persistent=False)

    def encode(self, x):
        return self.net((x - self.pixels[0]) / self.pixels[1]).float()

    def forward(self, x):
        return F.normalize(self.projector(self.encode(x)).float(), dim=1)


def make_model(arch="resnet50"):
    """An Encoder: resnet50 or resnet18 [paper], with a 3x3 stem of stride 1, no max-pool and torchvision's
    initialisation [ACL], or "small", the smoke run's. README: loading a checkpoint."""
    if arch == "small":
        layers = [m for i, o, k in ((3, 32, 4), (32, 64, 3), (64, 128, 3))  # a 3x3 stem leaves a grid
                  for m in (nn.Conv2d(i, o, k, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
        return Encoder(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 128)
    net, width = (resnet18(), 512) if arch == "resnet18" else (resnet50(), 2048)
    net.conv1, net.maxpool, net.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    return Encoder(net, width)


# ================================================================ views: torchvision's operations, in batch
def augment(x):
    """A random view of each x [B, 3, S, S] in [0, 1] [ACL]: a crop of .1 to 1 of the area, resized; flip; at
    p = .8 colour jitter; at p = .2 gray. Parameters per sample, the jitter's order per batch [assumed]."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(len(x), *shape, device=x.device)
    size, wide, each = x.shape[-1], math.log(4 / 3), torch.arange(len(x), device=x.device)
    area, ratio = uniform(.1, 1, 10, 1), uniform(-wide, wide, 10, 1).exp()  # ten tries
    sides = (size * torch.cat([area / ratio, area * ratio], 2).sqrt()).round()  # [B, 10, 2]: height, width
    length = sides[each, (sides.amax(2) <= size).int().argmax(1)].clamp(max=size)  # the first that fits
    start = (uniform(0, 1, 2) * (size - length + 1)).floor().minimum(size - length)
    x, jittered = resized_crop(x, start, length, uniform(0, 1) < .5), uniform(0, 1, 1, 1, 1) < .8
    jitter = ("brightness", 1, .4), ("contrast", 1, .4), ("saturation", 1, .4), ("hue", 0, .1)
    for change, neutral, most in [jitter[i] for i in torch.randperm(4).tolist()]:  # on the CPU: no wait
        x = recolour(x, change, neutral + jittered * uniform(-most, most, 1, 1, 1))
    return torch.where(uniform(0, 1, 1, 1, 1) < .2, rgb_to_grayscale(x), x)


def resized_crop(x, start, length, flip):
    """The box (start, length [B, 2]: rows, columns) of each x [B, C, S, S], resized to S, flipped where flip
    [B]: products with two matrices. Bilinear, and nothing beyond the box is read [assumed; ACL: bicubic]."""
    i, start, length = torch.arange(x.shape[-1], device=x.device), start[..., None], length[..., None]
    source = start + ((i + .5) * length / len(i) - .5).clamp(min=0).minimum(length - 1)  # [B, 2, S]
    rows, columns = (1 - (source[..., None] - i).abs()).clamp(min=0).split(1, 1)  # [B, 1, S, S]
    return rows @ x @ torch.where(flip.view(-1, 1, 1, 1), columns.flip(2), columns).mT


def recolour(x, change, amount):
    """torchvision's adjust_CHANGE of brightness, contrast, saturation or hue, with an amount [B, 1, 1, 1]."""
    if change != "hue":
        gray = rgb_to_grayscale(x)
        other = {"brightness": 0, "contrast": gray.mean((1, 2, 3), True), "saturation": gray}[change]
        return (other + amount * (x - other)).clamp(0, 1)
    (r, g, b), value, chroma = x.split(1, 1), x.amax(1, True), x.amax(1, True) - x.amin(1, True)
    sixth = torch.where(value == r, g - b, torch.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    n = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (n + sixth / chroma.clamp(min=1e-9) + 6 * amount) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


# ================================================================ its own arguments
SMOKE = dict(arch="small", epochs=8, batch_size=64, lr=0.015, attack_eps=2.0, attack_steps=3, limit_test=500,
             attack_step_size=1.0, sample_steps=30, num_samples=100, sample_batch_size=100)


def parse_args(argv):
    own = [("training", "--temperature", dict(REAL, help="t of f = g.g' / t, in sampling too; %(default)s")),
           ("training", "--warmup-epochs", dict(REAL, help="<= --epochs / 10; then a cosine; %(default)s")),
           ("attack", "--attack-views", dict(choices=("one", "both"), help="that move; %(default)s"))]
    args = parse_common(
        argv, ("resnet18", "resnet50", "small"), SAMPLERS, ("all", *STARTS.values()), SMOKE, own,
        arch="resnet50", attack_views="one",  # [paper]; the formula's [ACL: both]
        norm="l2", attack_eps=0.5, attack_steps=7, attack_step_size=0.1,  # [assumed: as supervised CEM]
        temperature=0.5, epochs=1000, batch_size=512, lr=0.5, warmup_epochs=10.0,  # [ACL; lr: AdvCL]
        sample_norm="l2", sample_steps=60, sample_step_size=0.5, sample_eps=30.0, sample_noise=0.0,
        start="all", num_samples=50000, sample_batch_size=512)  # [assumed]
    smallest = args.num_samples // math.ceil(args.num_samples / args.sample_batch_size)
    if math.isinf(args.attack_eps) or args.temperature == 0 or min(args.batch_size, smallest) < 2:
        fail("--attack-eps must be finite, --temperature > 0, and each batch of at least two images")
    return args


# ================================================================ train, sample, evaluate
def train(g, x_train, args, state):
    """Train g in place, from `state` (what its checkpoint holds) to --epochs."""
    optimizer = torch.optim.SGD(g.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)  # [AdvCL]
    restore(args, state, g, optimizer)
    n = len(x_train) // args.batch_size * args.batch_size  # no smaller batch [assumed]
    first, begun = state["epoch"], time.time()
    warmup = min(args.warmup_epochs, args.epochs / 10)
    for epoch in range(first, args.epochs):
        g.train()
        start, losses, order = time.time(), [], torch.randperm(len(x_train), device=x_train.device)
        for i, batch in enumerate(order[:n].split(args.batch_size)):
            t = epoch + (i + .5) * args.batch_size / n  # linear to --lr, then a cosine to zero
            cosine = .5 + .5 * math.cos(math.pi * (t - warmup) / (args.epochs - warmup))
            optimizer.param_groups[0]["lr"] = lr = args.lr * (t / warmup if t < warmup else cosine)
            x, x_prime = augment(to_float(x_train[batch]).repeat(2, 1, 1, 1)).chunk(2)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                loss = cem_loss(g, x, x_prime, args.temperature, args.attack_views, args.attack_steps,
                                args.attack_step_size, args.attack_eps, args.norm)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if i % (50 if x.is_cuda else 1) == 0 or (i + 1) * len(x) == n:  # the only synchronisation
                mean = torch.stack(losses).mean().item()
                check_loss(args, mean)
                progress("training", begun, (args.epochs - first) * n, (epoch - first) * n + (i + 1) * len(x),
                         f", epoch {epoch + 1}/{args.epochs}, loss {mean:.4f}")
        losses = [round(v, 5) for v in torch.stack(losses).tolist()]
        end_epoch(args, state, g, optimizer, start, n, loss=mean, lr=lr, losses=losses)


def linear_probe(g, x, y):
    """A classifier f of h = g.encode(x): logistic regression on uint8 images x, labels y [assumed: Adam]."""
    with eval_mode(g), torch.no_grad():
        h = torch.cat([g.encode(to_float(b)) for b in x.split(500)])
    f = nn.Sequential(nn.BatchNorm1d(h.shape[1], affine=False, momentum=None), nn.Linear(h.shape[1], 10))
    optimizer = torch.optim.Adam(f.to(h.device).parameters(), 0.01, weight_decay=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(f(h), y).backward()
        optimizer.step()
    f.eval().g, f.forward = g, lambda x: f[1](f[0](g.encode(x)))
    return f


def write_samples(name, g, x, y, args, generator):
    """--num-samples images from seeds fitted to x, y -> n and the batches' mean entropy before and after."""
    (sampler, start), begun, images, entropies = name.split("-"), time.time(), [], []
    gaussians = fit_gaussians(x, y if start == "cond" else None)
    generator.manual_seed(args.seed)
    labels = torch.arange(args.num_samples) % 10
    for batch in labels.tensor_split(math.ceil(len(labels) / args.sample_batch_size)):
        x_0 = gaussians.sample(batch if start == "cond" else len(batch), generator)  # in float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
            x_k = sample(sampler, g, x_0, args.temperature, args.sample_steps, args.sample_step_size,
                         args.sample_eps, args.sample_norm, args.sample_noise, generator)
        with eval_mode(g), torch.no_grad():
            entropies += [batch_entropy(g(x), args.temperature) for x in (x_0, x_k)]
        images.append(to_uint8(x_k))
        progress(f"sampling, {name}", begun, len(labels), sum(map(len, images)))
    save_samples(Path(args.out) / f"samples_{name}", torch.cat(images), labels if start == "cond" else None)
    before, after = torch.stack(entropies).view(-1, 2).mean(0).tolist()
    return {"n": len(labels), "entropy": [before, after]}


def run(args):
    state = open_out(args)
    x_train, y_train, x_test, y_test = load_data(args, args.device)
    split = (x_test, y_test) if args.seed_split == "test" else (x_train, y_train)
    if len(x_train) < args.batch_size or args.start != "pooled" and len(split[1].unique()) < 10:
        fail("a larger --limit-train or --limit-test: --batch-size images, and all ten classes for the seeds")
    torch.manual_seed(args.seed)
    g = make_model(args.arch).to(args.device, memory_format=torch.channels_last)
    train(g, x_train, args, state)  # without labels
    results = state["results"]

    # linear probe, clean and under PGD-20 through it: from the clean image, last iterate, the usual radius
    probe, eps = cache(lambda: linear_probe(g, x_train, y_train)), {"l2": 0.5, "linf": 8 / 255}[args.norm]
    pgd20 = dict(score=cross_entropy, steps=20, step_size=2.5 * eps / 20, eps=eps, norm=args.norm)
    for name, attack in {"clean": {}, "pgd20": pgd20}.items():
        show = partial(progress, f"linear probe, {name}", time.time(), len(x_test))
        once(args, results, "accuracy", name, ["limit_test"],
             lambda: accuracy(probe(), x_test, y_test, progress=show, **attack))

    names = [f"{s}-{start}" for s in args.sampler for start in STARTS if args.start in ("all", STARTS[start])]
    flags, generator = [flag for flag in SAMPLING_FLAGS if flag != "start"], torch.Generator(args.device)
    for name in names:  # a name holds the start
        once(args, results, "samples", name, flags, lambda: write_samples(name, g, *split, args, generator))
    score_samples(args, results, names)
    print(f"{args.out}/results.json: accuracy {results['accuracy']}")


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
