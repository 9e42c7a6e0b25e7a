"""Supervised CEM: adversarial training as maximum likelihood, and the samplers that follow.

Wang, Wang, Yang, Lin: A Unified Contrastive Energy-based Model for Understanding the Generative
Ability of Adversarial Training, ICLR 2022. p(x, y) = exp f(x, y) / Z, f the classifier's logits.

  training  min_theta E max_{|x_hat - x| <= eps} CE(x_hat, y)             adversarial training (AT)
  inner     x_hat += a [ grad log sum_k exp f(x_hat, k) - grad f(x_hat, y) ]      Langevin, biased
  outer     grad E log p(x, y) = E [ grad f(x, y) - grad f(x_hat, y) ]      consistency: not in AT
                               + E [ grad f(x_hat, y) - grad f(x_hat, y_hat) ]   contrastive: AT's
  sampling  ascend log p(y|x) (TA), log p(x) (Langevin), log p(x|y) (CS), f_y + LSE f (RCS)

  python cem_sup.py                            the paper's run: CIFAR-10 (downloaded), ResNet-50
  python cem_sup.py --arch resnet18 --epochs 30
  python cem_sup.py --smoke                    small, no data: 31 to 41 s on two CPU cores

Writes checkpoint.pt, log.jsonl, results.json, samples_{ta,langevin,cs,rcs}.{png,npz} to --out;
resumes. Sources of the defaults: [paper] the authors' slides; [robustness] MadryLab/robustness, on
which the paper builds; [Santurkar] Santurkar et al., NeurIPS 2019, code; [memory] of the paper: TA,
CS, RCS; [assumed] our reading.
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
from torchvision.models.resnet import BasicBlock, resnet18, resnet50

from samplers import (accuracy, ascend, cross_entropy, eval_mode, fit_gaussians, log_p_x, log_p_x_given_y,
                      log_p_y_given_x, reinforced, replace_files, save_samples, to_float, to_uint8)

# ================================================================ the method
def at_loss(f, x, y, steps=7, step_size=0.1, eps=0.5, norm="l2"):
    """max_{|x_hat - x| <= eps} CE(f(x_hat), y) of images x [B, 3, 32, 32] in [0, 1] and labels y [B]."""
    with eval_mode(f):  # inner maximisation: biased Langevin on log p(x), from a random point of the ball
        x_hat = ascend(cross_entropy(f, y), x, steps, step_size, eps=eps, norm=norm, random_start=True)
    return F.cross_entropy(f(x_hat), y)  # outer minimisation: along the likelihood's contrastive term


SAMPLERS = {"ta": log_p_y_given_x, "langevin": lambda f, y: log_p_x(f),
            "cs": log_p_x_given_y, "rcs": reinforced}


def sample(sampler, f, x_0, y, steps=60, step_size=0.5, eps=30.0, norm="l2", noise=0.0, generator=None):
    """Move seeds x_0 [B, 3, 32, 32] up the sampler's score. "langevin": the class is in x_0 [assumed]."""
    with eval_mode(f):
        return ascend(SAMPLERS[sampler](f, y), x_0, steps, step_size, eps=eps, norm=norm, noise=noise,
                      generator=generator)


def starts(kind, x, y, generator):
    """A function from labels [B] to seeds x_0 [B, 3, 32, 32]: Gaussians of images x, labels y, or noise."""
    if kind == "noise":
        return lambda labels: torch.rand(len(labels), *x.shape[1:], generator=generator, device=x.device)
    gaussians = fit_gaussians(x, y if kind == "class" else None)  # class-wise in [Santurkar]
    return lambda labels: gaussians.sample(labels if kind == "class" else len(labels), generator)


# ================================================================ model
class Classifier(nn.Module):
    """Images in [0, 1], [B, 3, 32, 32], to float32 logits [B, 10]; the normalisation is inside."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        mean, std = [.4914, .4822, .4465], [.2023, .1994, .2010]  # [robustness]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x):
        return self.net((x - self.mean) / self.std).float()


def make_model(arch="resnet50"):
    """A Classifier: resnet50 [paper] or resnet18, with a 3x3 stem of stride 1, no max-pool [robustness], and
    torchvision's initialisation [assumed]; or "small", the smoke run's. README: loading a checkpoint."""
    if arch == "small":
        def stage(c_in, c_out, stride):
            down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            return BasicBlock(c_in, c_out, stride, down)
        stem = nn.Conv2d(3, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()  # 3x3 leaves a grid
        return Classifier(nn.Sequential(*stem, stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2),
                                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))
    net = {"resnet18": resnet18, "resnet50": resnet50}[arch](num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    return Classifier(net)


# ================================================================ its own arguments
SMOKE = dict(arch="small", epochs=12, lr_drops=[0.7, 0.9], attack_eps=3.0, attack_steps=2,
             attack_step_size=2.5, sample_steps=30, num_samples=100, limit_test=300)


def parse_args(argv):
    own = [("training", "--lr-drops", dict(REAL, nargs="*", help="--lr x 0.1 at these fractions of --epochs; "
                                           "default: 1/3 2/3"))]
    args = parse_common(
        argv, ("resnet18", "resnet50", "small"), SAMPLERS, ("class", "pooled", "noise"), SMOKE, own,
        arch="resnet50",  # [paper]
        # [assumed: Santurkar's released model], as the random start; its radius is uniform [assumed]
        norm="l2", attack_eps=0.5, attack_steps=7, attack_step_size=0.1,
        epochs=150, batch_size=128, lr=0.1, lr_drops=[1 / 3, 2 / 3],  # [robustness]
        sample_norm="l2", sample_steps=60, sample_step_size=0.5, sample_eps=30.0,  # [Santurkar]
        sample_noise=0.0, start="class",  # [Santurkar]
        num_samples=50000, sample_batch_size=500)  # [assumed]
    if math.isinf(args.attack_eps):
        fail("--attack-eps must be finite, for the random start and for PGD-20")
    return args


# ================================================================ train, sample, evaluate
def train(f, x_train, y_train, args, state):
    """Train f in place, from `state` (what its checkpoint holds) to --epochs."""
    optimizer = torch.optim.SGD(f.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)  # [robustness]
    restore(args, state, f, optimizer)
    n, first, begun = len(x_train), state["epoch"], time.time()
    for epoch in range(first, args.epochs):
        f.train()
        lr = args.lr * 0.1 ** sum(epoch >= drop * args.epochs for drop in args.lr_drops)
        optimizer.param_groups[0]["lr"] = lr
        start, total, seen = time.time(), torch.zeros((), device=x_train.device), 0
        for i, batch in enumerate(torch.randperm(n, device=x_train.device).split(args.batch_size)):
            x, y = to_float(x_train[batch]), y_train[batch]
            x = x if args.smoke else crop_flip(x)  # [assumed]; the drawn bars have a direction
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                loss = at_loss(f, x, y, args.attack_steps, args.attack_step_size, args.attack_eps, args.norm)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, seen = total + loss.detach() * len(batch), seen + len(batch)
            if i % (50 if x.is_cuda else 1) == 0 or seen == n:  # the only synchronisation
                mean = total.item() / seen
                check_loss(args, mean)
                progress("training", begun, (args.epochs - first) * n, (epoch - first) * n + seen,
                         f", epoch {epoch + 1}/{args.epochs}, loss {mean:.4f}")
        end_epoch(args, state, f, optimizer, start, n, loss=mean, lr=lr)


def write_samples(name, f, start, args, generator):
    """--num-samples images of a sampler, the classes in turn; every sampler starts from the same seeds."""
    generator.manual_seed(args.seed)
    labels, images, begun = torch.arange(args.num_samples, device=generator.device) % 10, [], time.time()
    for y in labels.split(args.sample_batch_size):
        x_0 = start(y)  # in float32
        with torch.autocast(y.device.type, torch.bfloat16, enabled=args.amp):
            x = sample(name, f, x_0, y, args.sample_steps, args.sample_step_size, args.sample_eps,
                       args.sample_norm, args.sample_noise, generator)
        images.append(to_uint8(x))
        progress(f"sampling, {name}", begun, len(labels), sum(map(len, images)))
    save_samples(Path(args.out) / f"samples_{name}", torch.cat(images), labels)
    return {"n": len(labels)}


def run(args):
    state = open_out(args)
    device = torch.device(args.device)
    x_train, y_train, x_test, y_test = load_data(args, device)
    split = (x_test, y_test) if args.seed_split == "test" else (x_train, y_train)
    if args.start == "class" and len(split[1].unique()) < 10:
        fail("--start class needs all ten classes: a larger --limit-train or --limit-test")
    torch.manual_seed(args.seed)
    f = make_model(args.arch).to(device, memory_format=torch.channels_last)
    train(f, x_train, y_train, args, state)
    results = state["results"]

    eps = args.attack_eps  # PGD-20: from the clean image [robustness], the last iterate [assumed]
    pgd20 = dict(score=cross_entropy, steps=20, step_size=2.5 * eps / 20, eps=eps, norm=args.norm)
    for name, attack in {"clean": {}, "pgd20": pgd20}.items():
        show = partial(progress, f"accuracy, {name}", time.time(), len(x_test))
        once(args, results, "accuracy", name, ["limit_test"],
             lambda: accuracy(f, x_test, y_test, progress=show, **attack))

    generator = torch.Generator(device)
    start = starts(args.start, *split, generator)
    for name in args.sampler:
        once(args, results, "samples", name, SAMPLING_FLAGS,
             lambda: write_samples(name, f, start, args, generator))
    score_samples(args, results, args.sampler)
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
