"""JEAT: joint energy adversarial training, which raises log p(x_adv, y), and sampling.

Zhu et al.: Towards Understanding the Generative Capability of Adversarially Robust Classifiers,
ICCV 2021. With the logits f: E(x, y) = -f(x)[y], E(x) = -log sum_k exp f(x)[k].

  attack    x_adv = clamp(x + d), |d| <= eps: from a random d, d += eps sign grad E(x + d, y)
  negative  x_K: SGLD x += a grad log sum_k exp f(x)[k] + s xi, K steps from a replay buffer
  training  L = CE(x_adv, y) + E(x_adv) - E(x_K) = E(x_adv, y) - E(x_K)     nothing of clean x
  sampling  SGLD down E(x, y) from a class's Gaussian or from noise, down E(x) from the buffer

  python jeat.py                               the paper's run: CIFAR-10 (downloaded), WRN-28-10
  python jeat.py --smoke                       small, no data: 37 to 41 s on two CPU cores

Writes checkpoint.pt, log.jsonl, results.json, samples_{gaussian,noise,buffer}.{png,npz} to --out;
resumes. Defaults: [paper] the abstract; [secondary] works that restate the paper; [JEM] the code of
Grathwohl et al., ICLR 2020, rescaled from [-1, 1] to [0, 1]; [assumed] our reading.
"""
import argparse
import io
import json
import math
import shutil
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from samplers import (ReplayBuffer, accuracy, ascend, cross_entropy, eval_mode, fit_gaussians,
                      joint_energy_score, log_p_x, log_p_x_given_y, replace_files, save_samples, sgld,
                      steepest, to_float, to_uint8)

# ================================================================ the method
def energy(logits):
    """E(x) = -log sum_k exp f(x)[k], [B], from logits f(x) [B, 10]."""
    return -logits.logsumexp(1)


def joint_energy(logits, y):
    """E(x, y) = -f(x)[y], [B], from logits f(x) [B, 10] and labels y [B]; CE(x, y) = E(x, y) - E(x)."""
    return -logits.gather(1, y[:, None]).squeeze(1)


def jeat_loss(f, x, y, buffer=None, score=joint_energy_score, steps=1, step_size=8 / 255, eps=8 / 255,
              norm="linf", sgld_steps=20):
    """E(x_adv, y) - E(x_K), a mean over images x [B, 3, 32, 32] in [0, 1] with labels y [B] -> (loss, pieces:
    CE, E(x_adv), E(x_K)). The ReplayBuffer's chains move on here. buffer None: (CE, (CE, E(x_adv))), with
    this score PreJEAT (our definition: its text was not at hand), with score=cross_entropy AT."""
    with eval_mode(f):
        x_adv = ascend(score(f, y), x, steps, step_size, eps=eps, norm=norm, random_start=True)  # in the box
    logits = f(x_adv)
    ce, e_adv = F.cross_entropy(logits, y), energy(logits).mean()
    if buffer is None:
        return ce, (ce, e_adv)
    x_0, idx = buffer.sample(len(x))
    with eval_mode(f):  # unclamped; the constants are JEM's 1 and 0.01 in [-1, 1]
        x_k = sgld(log_p_x(f), x_0, sgld_steps, step_size=0.25, noise=0.005)
    buffer.update(idx, x_k)
    e_k = energy(f(x_k)).mean()
    return joint_energy(logits, y).mean() - e_k, (ce, e_adv, e_k)  # = CE + E(x_adv) - E(x_K)


def sample(f, x_0, y=None, steps=100, step_size=0.25, eps=math.inf, norm="none", noise=0.005, generator=None):
    """SGLD from x_0 [B, 3, 32, 32] up log p(x|y), or up log p(x) for y None; unclamped, as in training."""
    score = log_p_x(f) if y is None else log_p_x_given_y(f, y)
    with eval_mode(f):
        return ascend(score, x_0, steps, step_size, eps=eps, norm=norm, noise=noise, clamp=None,
                      generator=generator)


# ================================================================ model
class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, 1, 1), nn.Conv2d(c_out, c_out, 3, stride, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride) if stride > 1 or c_in != c_out else nn.Identity()

    def forward(self, x):
        return self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2)) + self.shortcut(x)


class WideResNet(nn.Module):
    """Images [B, 3, 32, 32] in [0, 1] to float32 logits [B, 10]; 2x - 1 is inside. JEM's: no normalisation,
    LeakyReLU 0.2, a block's stride on its second convolution, biases, PyTorch's initialisation."""

    def __init__(self, depth, width, stem):
        super().__init__()
        n = (depth - 4) // 6  # blocks a stage
        c = [16] + [16 * width * 2 ** (i // n) for i in range(3 * n)]
        blocks = [Block(c[i], c[i + 1], 2 if i in (n, 2 * n) else 1) for i in range(3 * n)]
        head = nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c[-1], 10)
        self.net = nn.Sequential(stem, *blocks, *head)

    def forward(self, x):
        h = self.net[:-1](2 * x - 1).float()
        with torch.autocast(x.device.type, enabled=False):  # else energies would be rounded to 8 bits
            return self.net[-1](h)


def make_model(arch="wrn-28-10"):
    """A WideResNet: wrn-D-W, D = 6n + 4 [JEM: 28-10]; or "small", the smoke run's: 10-1, coarser."""
    if arch == "small":
        return WideResNet(10, 1, nn.Conv2d(3, 16, 6, 4, 1))  # windows overlap, or samples show a grid
    return WideResNet(*map(int, arch.split("-")[1:]), nn.Conv2d(3, 16, 3, 1, 1))


# ================================================================ its own arguments
SAMPLERS = "gaussian", "noise", "buffer"
SMOKE = dict(arch="small", epochs=6, batch_size=32, lr=5e-3, attack_eps=24 / 255, sgld_steps=4,
             buffer_size=300, sample_steps=60, num_samples=100, limit_test=500)


def parse_args(argv):
    archs = "wrn-28-10", "wrn-28-4", "wrn-16-8", "wrn-16-4", "wrn-16-2", "wrn-10-2", "wrn-10-1", "small"
    own = [("training", "--method", dict(choices=("jeat", "prejeat", "at"), help="prejeat: CE at jeat's x_adv"
                                         " of one step of eps; at: CE, 10 of eps / 4; %(default)s")),
           ("training", "--lr-drops", dict(REAL, nargs="*", help="--lr x 0.3 at these fractions of --epochs; "
                                           "default: 0.8 0.9")),
           ("training", "--sgld-steps", dict(COUNT, help="of the negative x_K; %(default)s")),
           ("training", "--buffer-size", dict(COUNT, help="chains, at least --batch-size; %(default)s"))]
    args = parse_common(
        argv, archs, SAMPLERS, ("class", "pooled"), SMOKE, own,
        method="jeat", norm="linf",  # [secondary], and one step of eps, set below
        arch="wrn-28-10", epochs=200, batch_size=64, lr=1e-4, lr_drops=[0.8, 0.9],  # [JEM]
        sgld_steps=20, buffer_size=10000,  # [JEM]
        attack_eps=8 / 255,  # [assumed]
        sample_norm="none", sample_eps=math.inf, sample_step_size=0.25, sample_noise=0.005,  # [JEM]
        sample_steps=100, start="class", num_samples=50000, sample_batch_size=500)  # [assumed]
    if math.isinf(args.attack_eps) or not all(0 <= drop <= 1 for drop in args.lr_drops):
        fail("--attack-eps must be finite, and --lr-drops in 0..1")
    if args.method == "jeat" and args.buffer_size < args.batch_size:
        fail(f"--buffer-size {args.buffer_size} must be at least --batch-size, {args.batch_size}")
    steps, share = (10, 1 / 4) if args.method == "at" else (1, 1)  # at: PGD-10 of 2/255 at 8/255 [assumed]
    default = {"attack_steps": steps, "attack_step_size": args.attack_eps * share}
    vars(args).update({flag: value for flag, value in default.items() if vars(args)[flag] is None})
    return args


# ================================================================ train, sample, evaluate
def train(f, buffer, x_train, y_train, args, state):
    """Train f in place, and the buffer, from `state` (what the checkpoint holds) to --epochs."""
    optimizer = torch.optim.Adam(f.parameters(), args.lr)  # [JEM], as warm-up, x 0.3, crops and noise below
    restore(args, state, f, optimizer)
    if buffer and "buffer" in state:
        buffer.load_state_dict(state["buffer"])
    n, first, begun, updates = len(x_train), state["epoch"], time.time(), -(-len(x_train) // args.batch_size)
    x_fixed, y_fixed, warmup = to_float(x_train[:250]), y_train[:250], min(1000, args.epochs * updates / 10)
    score = cross_entropy if args.method == "at" else joint_energy_score
    for epoch in range(first, args.epochs):
        f.train()
        start, total, seen, peak = time.time(), 0, 0, torch.zeros((), device=x_train.device)
        for i, batch in enumerate(torch.randperm(n, device=x_train.device).split(args.batch_size)):
            lr = args.lr * 0.3 ** sum(epoch >= drop * args.epochs for drop in args.lr_drops)
            optimizer.param_groups[0]["lr"] = lr = lr * min(1, (epoch * updates + i + 1) / warmup)
            x, y = to_float(x_train[batch]), y_train[batch]
            x = x if args.smoke else crop_flip(x, mode="reflect")  # the drawn bars have a direction
            x = (x + 0.015 * torch.randn_like(x)).clamp(0, 1)  # the clamp [assumed]: the attack's box
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                loss, pieces = jeat_loss(f, x, y, buffer, score, args.attack_steps, args.attack_step_size,
                                         args.attack_eps, args.norm, args.sgld_steps)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            values = torch.stack([loss, *pieces]).detach()
            total, seen = total + values * len(batch), seen + len(batch)
            peak = torch.maximum(peak, values.abs().amax())  # energies can run away together, too; keeps NaN
            if i % (50 if x.is_cuda else 1) == 0 or seen == n:  # the only synchronisation
                check_loss(args, peak.item())
                means = dict(zip(("loss", "ce", "e_adv", "e_k"), (total / seen).tolist()))
                progress("training", begun, (args.epochs - first) * n, (epoch - first) * n + seen,
                         f", epoch {epoch + 1}/{args.epochs}, loss {means['loss']:.4f}")
        with torch.no_grad():
            means["e_clean"] = energy(f(x_fixed)).mean().item()
        if (epoch + 1) % 5 == 0:  # a one-step attack can overfit, catastrophically
            means["pgd20_train"] = accuracy(f, x_fixed, y_fixed, score=cross_entropy, **pgd20(args))
        state["buffer"] = buffer.state_dict() if buffer else {}
        end_epoch(args, state, f, optimizer, start, n, **means, lr=lr)


def pgd20(args):
    """PGD-20 from the clean image, 2/255 a step at 8/255; the last iterate [assumed]."""
    return dict(steps=20, step_size=args.attack_eps / 4, eps=args.attack_eps, norm=args.norm)


def quantiles(e):
    return e.quantile(torch.tensor([.05, .25, .5, .75, .95], device=e.device)).tolist()


@torch.no_grad()
def flatness(f, x, y, args):
    """The energy around images x [N, 3, 32, 32] in [0, 1], labels y: E(x + r u, y), unclamped, along a random
    unit u; drift, the mean l2 distance of 200 free SGLD steps; .05 .25 .5 .75 .95 quantiles of E(x)."""
    generator, radii = torch.Generator(x.device).manual_seed(args.seed), [0, .25, .5, 1, 2, 4, 8, 16]
    u = steepest(torch.randn(x.shape, generator=generator, device=x.device), "l2")
    with eval_mode(f):
        e = torch.stack([joint_energy(f(x + r * u), y) for r in radii])  # [R, N]
        ends = {"clean": x, "pgd20": ascend(cross_entropy(f, y), x, **pgd20(args)),
                "sgld": sample(f, x, steps=200, generator=generator)}
        return {"radii": radii, "e_xy": e.mean(1).tolist(), "change": (e - e[0]).abs().mean(1).tolist(),
                "drift": (ends["sgld"] - x).flatten(1).norm(dim=1).mean().item(),
                "e_x": {name: quantiles(energy(f(x))) for name, x in ends.items()}}


def write_samples(name, f, x, y, buffer, args):
    """--num-samples images of a sampler: class i mod 10 is wanted of image i, none from the buffer's chains;
    the Gaussians are of images x, labels y."""
    generator = torch.Generator(x.device).manual_seed(args.seed)
    gaussians = fit_gaussians(x, y if args.start == "class" else None) if name == "gaussian" else None
    start = {"gaussian": lambda i: gaussians.sample(i % 10 if args.start == "class" else len(i), generator),
             "noise": lambda i: torch.rand(len(i), *x.shape[1:], generator=generator, device=x.device),
             "buffer": lambda i: buffer.x[i % len(buffer.x)]}[name]
    numbers, images, energies, begun = torch.arange(args.num_samples, device=x.device), [], [], time.time()
    labels = None if name == "buffer" else numbers % 10
    for i in numbers.split(args.sample_batch_size):
        x_0, y = start(i), None if labels is None else labels[i]  # x_0 in float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp), torch.no_grad():
            x_k = sample(f, x_0, y, args.sample_steps, args.sample_step_size, args.sample_eps,
                         args.sample_norm, args.sample_noise, generator)
            energies.append(energy(f(x_k)))
        images.append(to_uint8(x_k))
        progress(f"sampling, {name}", begun, len(numbers), sum(map(len, images)))
    save_samples(Path(args.out) / f"samples_{name}", torch.cat(images), labels)
    return {"n": len(numbers), "e_x": quantiles(torch.cat(energies))}


def run(args):
    state = open_out(args)
    names = [name for name in args.sampler if name != "buffer" or args.method == "jeat"]
    if not names:
        fail(f"--sampler buffer needs --method jeat: {args.method} has no replay buffer")
    x_train, y_train, x_test, y_test = load_data(args, device := torch.device(args.device))
    split = (x_test, y_test) if args.seed_split == "test" else (x_train, y_train)
    if "gaussian" in names and args.start == "class" and len(split[1].unique()) < 10:
        fail("--start class needs all ten classes: a larger --limit-train or --limit-test")
    torch.manual_seed(args.seed)
    f = make_model(args.arch).to(device, memory_format=torch.channels_last)
    buffer = ReplayBuffer(args.buffer_size, (3, 32, 32), device=device) if args.method == "jeat" else None
    train(f, buffer, x_train, y_train, args, state)
    results = state["results"]

    for name, attack in {"clean": {}, "pgd20": {"score": cross_entropy, **pgd20(args)}}.items():
        show = partial(progress, f"accuracy, {name}", time.time(), len(x_test))
        once(args, results, "accuracy", name, ["limit_test"],
             lambda: accuracy(f, x_test, y_test, progress=show, **attack))
    once(args, results, "energy", "flatness", ["limit_test"],
         lambda: flatness(f, to_float(x_test[:100]), y_test[:100], args))
    for name in names:
        once(args, results, "samples", name, SAMPLING_FLAGS,
             lambda: write_samples(name, f, *split, buffer, args))
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
