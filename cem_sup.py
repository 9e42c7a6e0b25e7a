"""Supervised CEM: adversarial training as maximum likelihood, and the samplers that follow from it.

Wang, Wang, Yang, Lin: A Unified Contrastive Energy-based Model for Understanding the Generative
Ability of Adversarial Training, ICLR 2022. p(x, y) = exp f(x, y) / Z, f the classifier's logits.

  training  min_theta E max_{|x_hat - x| <= eps} CE(x_hat, y)             adversarial training (AT)
  inner     x_hat += a grad_x [ log sum_k exp f(x_hat, k) - f(x_hat, y) ]: Langevin's step on
            log p(x), biased by the last term
  outer     grad_theta E log p(x, y) = E grad_theta [ f(x, y) - f(x_hat, y) ]         consistency
                                     + E grad_theta [ f(x_hat, y) - f(x_hat, y_hat) ] contrastive
            with y_hat ~ p(y|x_hat) the second is -grad_theta CE(x_hat, y): AT follows this term
            alone and drops the first
  sampling  ascend log p(y|x) (TA), log p(x) (Langevin), log p(x|y) (CS), f_y + LSE f (RCS)

  python cem_sup.py                       the paper's run: CIFAR-10 (downloaded), ResNet-50
  python cem_sup.py --small               CIFAR-10 on a CPU: a small net, a short schedule
  python cem_sup.py --smoke               drawn digits, no data: under a minute on two CPU cores
  python cem_sup.py --attack-steps 0 --out runs/cem_sup-twin     the control: no attack

Writes checkpoint.pt, log.jsonl, samples_{ta,langevin,cs,rcs}.{png,npz} (with another --start than
class: samples_cs-pooled and so on) and results.json to --out. The same command resumes after the
last finished epoch (a --smoke without --out begins afresh); a finished run samples again, with
other sampling flags too: results.json is then of the new samples.

Sources of the defaults: [slides] the paper's; [robustness] MadryLab/robustness, on which the paper
builds; [Santurkar] the code of Santurkar et al., NeurIPS 2019, and their released net; [assumed]
our reading; [ours] in none of them. TA's, CS's and RCS's objectives are recalled from the paper.
"""
import argparse
import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.models.resnet import BasicBlock, resnet18, resnet50

from samplers import (accuracy, ascend, crop_flip, cross_entropy, frozen, log_p_x,
                      log_p_x_given_y, log_p_y_given_x, reinforced, save_samples, starts, to_float,
                      to_uint8)


# ================================================================ the method
def at_loss(f, x, y, **attack):
    """max_{|x_hat - x| <= eps} CE(x_hat, y) of images x [B, 3, 32, 32] in [0, 1], labels y [B].
    attack: steps, step_size, eps, norm. A random start, and the last iterate [assumed; robustness:
    no random start, the best iterate]."""
    ce = cross_entropy(f, y)
    with frozen(f):  # inner: CE = LSE f - f_y; LSE f is log p(x) + const, -f_y the bias
        x_hat = ascend(ce, x, random_start=True, **attack)  # steps = 0: it returns x
    return ce(x_hat).mean()  # outer: minus the likelihood's contrastive term


SAMPLERS = {
    "ta": log_p_y_given_x,
    "langevin": lambda f, y: log_p_x(f),  # the class is in the start x_0, if anywhere [assumed]
    "cs": log_p_x_given_y,
    "rcs": reinforced,
}


def sample(f, sampler, start, args):
    """--num-samples images uint8 [N, 3, 32, 32], the classes in turn, their labels [N], and their
    mean l2 distance from the starts. start: a function from labels to x_0."""
    torch.manual_seed(args.seed)  # all samplers begin at the same points
    labels = torch.arange(args.num_samples, device=args.device) % 10
    images, moved = [], []
    for y in progress(labels.split(args.sample_batch_size), sampler):
        x_0 = start(y)
        with frozen(f), torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            x = ascend(SAMPLERS[sampler](f, y), x_0, args.sample_steps, args.sample_step_size,
                       eps=args.sample_eps, norm=args.sample_norm, noise=args.sample_noise)
        images.append(to_uint8(x))
        moved.append((x - x_0).flatten(1).norm(dim=1))
    return torch.cat(images), labels, torch.cat(moved).mean().item()


# ================================================================ settings
def parse_args(argv=None):
    training = argparse.ArgumentParser(add_help=False)
    add = training.add_argument_group("training; a checkpoint belongs to these").add_argument
    add("--arch", default="resnet50", choices=("resnet50", "resnet18", "resnet18-half", "small-32",
                                                "small-16"),
        help="[slides]; resnet18-half: half its channels; small-W: three stages, of W, 2 W and 4 W "
             "channels")
    add("--batch-size", type=positive, default=128, help="images [robustness]")
    add("--lr", type=number, default=0.1, help="learning rate [robustness]")
    add("--schedule", default="steps", choices=("steps", "cycle"),
        help="steps: x 0.1 at --lr-drops [robustness]; cycle: from 0 up to --lr at 30 %% and down "
             "to 0 at the end [ours]")
    add("--lr-drops", type=fraction, default=[1 / 3, 2 / 3], nargs="*",
        help="fractions of --epochs [robustness]")
    add("--norm", default="l2", choices=("l2", "linf"),
        help="of ball and step [assumed: Santurkar]; linf needs another --attack-eps and step size")
    add("--attack-eps", type=number, default=0.5,
        help="radius, pixels in [0, 1] [assumed: Santurkar]")
    add("--attack-steps", type=count, default=7,
        help="0: no attack, no random start either, the control [assumed: Santurkar]")
    add("--attack-step-size", type=number, default=0.1,
        help="pixels in [0, 1] [assumed: Santurkar]")
    add("--seed", type=count, default=0, help="of weights, data order, attacks and samples")
    add("--limit", type=positive, default=50000, help="at most so many images of each set")
    add("--smoke", action="store_true", help="all of it, small, on drawn digits: no downloads")

    running = argparse.ArgumentParser(add_help=False)
    add = running.add_argument_group("running; these may change").add_argument
    add("--small", action="store_true", help="other defaults, for CIFAR-10 on a CPU")
    add("--epochs", type=positive, default=150, help="[robustness]")
    add("--data", default="./data", help="folder of cifar-10-batches-py, downloaded if absent")
    add("--out", default="runs/cem_sup", help="folder of the run")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where it runs")
    add("--amp", default=None, action=argparse.BooleanOptionalAction,
        help="bfloat16; None: on CUDA")
    add("--test-images", type=positive, default=10000, help="at most so many, for the accuracy")
    add("--sampler", default=list(SAMPLERS), choices=SAMPLERS, nargs="+", metavar="NAME",
        help="[slides]")
    add("--start", default="class", metavar="KIND",
        help="class: a Gaussian of each [Santurkar]; pooled: one of all; fields: random colours "
             "[ours]; cifar100, svhn or a .npy: images [ours]")
    add("--seed-split", default="train", choices=("train", "test"),
        help="the Gaussians' images [ours, so that no test image enters; Santurkar: test]")
    add("--num-samples", type=positive, default=50000, help="of each sampler [assumed]")
    add("--sample-steps", type=count, default=60, help="[Santurkar]")
    add("--sample-step-size", type=number, default=0.5, help="pixels in [0, 1] [Santurkar]")
    add("--sample-eps", type=radius, default=30.0, help="radius around the start [Santurkar]")
    add("--sample-norm", default="l2", choices=("l2", "linf", "none"),
        help="of ball and step [Santurkar]; none: the raw gradient, in an l2 ball")
    add("--sample-noise", type=number, default=0.0, help="standard deviation per step [Santurkar]")
    add("--sample-batch-size", type=positive, default=500, help="images moved together")
    small = dict(
        out="runs/cem_sup-small", arch="resnet18-half", epochs=16, lr=0.2, schedule="cycle",
        attack_steps=2, attack_step_size=0.3, test_images=1000, num_samples=1000)
    smoke = dict(
        out="runs/cem_sup-smoke", arch="small-16", epochs=9, batch_size=32, schedule="cycle",
        attack_eps=2.0, attack_steps=1, attack_step_size=2.0, sample_steps=30, num_samples=100)
    # pairs: where all flags of the left are given, the defaults of the right
    return read_flags(training, running, argv, [({"small": True}, small), ({"smoke": True}, smoke)])


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
    """A Classifier: ResNet with a 3x3 stem of stride 1, no max-pool [robustness], and torchvision's
    initialisation [assumed; robustness keeps PyTorch's]; or small-W."""
    if arch.startswith("small"):
        w = int(arch.removeprefix("small-"))
        return Classifier(nn.Sequential(
            # 4x4, for a 3x3 of stride 2 covers pixels unevenly, and samples show a grid
            nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            stage(w, w, 1), stage(w, 2 * w, 2), stage(2 * w, 4 * w, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)))
    if arch == "resnet18-half":  # torchvision's have no width
        return Classifier(nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32)),
            nn.Sequential(stage(32, 64, 2), BasicBlock(64, 64)),
            nn.Sequential(stage(64, 128, 2), BasicBlock(128, 128)),
            nn.Sequential(stage(128, 256, 2), BasicBlock(256, 256)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)))
    net = {"resnet18": resnet18, "resnet50": resnet50}[arch](num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return Classifier(net)


def stage(c_in, c_out, stride):
    shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
    return BasicBlock(c_in, c_out, stride, nn.Sequential(*shortcut))


# ================================================================ train and evaluate
def learning_rate(args, t):
    """At the fraction t of the training."""
    if args.schedule == "cycle":
        return args.lr * min(t / 0.3, (1 - t) / 0.7)
    return args.lr * 0.1 ** sum(t >= drop for drop in args.lr_drops)


def train(f, x_train, y_train, args):
    """Train f in place, from the last checkpoint up to --epochs."""
    optimizer = torch.optim.SGD(f.parameters(), args.lr, momentum=0.9,
                                weight_decay=5e-4)  # [robustness], both
    attack = dict(steps=args.attack_steps, step_size=args.attack_step_size, eps=args.attack_eps,
                  norm=args.norm)
    done = resume(args, model=f, optimizer=optimizer)
    for epoch in range(done, args.epochs):
        f.train()
        losses = []
        batches = torch.randperm(len(x_train), device=args.device).split(args.batch_size)
        for i, batch in enumerate(progress(batches, f"epoch {epoch + 1}/{args.epochs}")):
            lr = learning_rate(args, (epoch + i / len(batches)) / args.epochs)
            optimizer.param_groups[0]["lr"] = lr
            x, y = to_float(x_train[batch]), y_train[batch]
            if not args.smoke:  # digits have a direction
                x = crop_flip(x)  # [assumed; robustness adds colour jitter and a 2-degree rotation]
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                loss = at_loss(f, x, y, **attack)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # stays on the device: nothing waits for it
        log(args, epoch=epoch + 1, loss=torch.stack(losses).mean().item(), lr=lr)
        save_checkpoint(args, epoch + 1, model=f, optimizer=optimizer)


def run(args):
    x_train, y_train, x_test, y_test = load_data(args)
    split = (x_test, y_test) if args.seed_split == "test" else (x_train, y_train)
    start = starts(args.start, *split, root=args.data)
    torch.manual_seed(args.seed)
    f = make_model(args.arch).to(args.device, memory_format=torch.channels_last)
    train(f, x_train, y_train, args)

    x_test, y_test = x_test[:args.test_images], y_test[:args.test_images]
    print(f"accuracy of {len(x_test)} test images, clean and under PGD-20 ...")
    # PGD-20: from the clean image, steps of 2.5 eps / 20 [robustness], the last iterate [assumed]
    eps = args.attack_eps
    pgd20 = dict(steps=20, step_size=2.5 * eps / 20, eps=eps, norm=args.norm)
    robustness = {"n": len(x_test), "clean": accuracy(f, x_test, y_test),
                  "pgd20": accuracy(f, x_test, y_test, cross_entropy, **pgd20)}
    print(robustness)
    samples = {}
    for sampler in args.sampler:
        name = sampler
        if args.start != "class":
            name = f"{sampler}-{Path(args.start).stem}"
        images, labels, moved = sample(f, sampler, start, args)
        if sampler == "langevin" and args.start != "class":
            labels = None  # neither its start nor its score knows a class
        save_samples(f"{args.out}/samples_{name}", images, labels)
        samples[name] = {"n": len(images), "moved": moved}
    return {"accuracy": robustness, "samples": scored(args, samples)}


# ================================================================ the same in all four scripts
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


def draw(n, seed):
    """n drawn images, uint8 [n, 3, 32, 32], of the digits in turn, and their labels [n]."""
    random, images = np.random.default_rng(seed), []
    for i in range(n):
        light, dark = random.integers(128, 256, 3), random.integers(0, 100, 3)
        # light on dark or dark on light, so that no single pixel tells the digits apart
        paper, ink = random.permutation([light, dark]).tolist()
        image = Image.new("RGB", (32, 32), tuple(paper))
        font, centre = ImageFont.load_default(random.integers(24, 34)), random.integers(12, 21, 2)
        ImageDraw.Draw(image).text(tuple(centre.tolist()), str(i % 10), tuple(ink), font,
                                   anchor="mm", stroke_width=1)
        images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.arange(n) % 10


def load_data(args):
    """x_train, y_train, x_test, y_test on the device: uint8 [N, 3, 32, 32] and int64 [N]."""
    if args.smoke:
        tensors = [*draw(2000, seed=0), *draw(250, seed=1)]
    else:
        tensors = []
        for train in (True, False):
            try:
                images = CIFAR10(args.data, train, download=True)
            except Exception as e:  # no network, a damaged file: torchvision raises a dozen kinds
                raise OSError(f"no whole cifar-10-batches-py in --data {args.data}, and no "
                              f"download ({e}); --smoke needs no data") from e
            tensors.append(torch.tensor(images.data).permute(0, 3, 1, 2))
            tensors.append(torch.tensor(images.targets))
    return [t[:args.limit].contiguous().to(args.device) for t in tensors]


def progress(batches, what):
    """Yield the batches, and print how far it is, how fast, and how long it will still take."""
    begun, done, total = time.time(), 0, sum(map(len, batches))
    for batch in batches:
        yield batch
        done += len(batch)
        rate = done / (time.time() - begun)
        line = f"{what}: {done}/{total} images, {rate:.0f}/s, {(total - done) / rate:.0f} s left"
        if done == total:
            print(line, flush=True)
        elif sys.stdout.isatty():  # there it rewrites itself
            print(line, end="\x1b[K\r", flush=True)


def log(args, **figures):
    """Print an epoch's figures, and add them to log.jsonl. ValueError: one is not finite."""
    if not all(math.isfinite(value) for value in figures.values()):
        raise ValueError(f"training diverged: {figures}; {args.out} keeps its last checkpoint")
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    with open(f"{args.out}/log.jsonl", "a") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **figures}) + "\n")


def save_checkpoint(args, epoch, **parts):
    """Replace --out's checkpoint by the state of the parts, unless the model has diverged."""
    state = {name: part.state_dict() for name, part in parts.items()}
    if not all(t.isfinite().all() for t in state["model"].values()):
        raise ValueError(f"training diverged; {args.out} keeps its last checkpoint")
    state["epoch"], state["epochs"], state["flags"] = epoch, args.epochs, training_flags(args)
    state["rng"] = torch.get_rng_state()
    state["cuda_rng"] = torch.cuda.get_rng_state() if args.device == "cuda" else None
    torch.save(state, f"{args.out}/checkpoint.tmp")
    os.replace(f"{args.out}/checkpoint.tmp", f"{args.out}/checkpoint.pt")


def resume(args, **parts):
    """Put the parts and the random numbers where --out's checkpoint left them -> epochs done."""
    path = Path(args.out, "checkpoint.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        print(f"{args.out}: begins; {args.arch} on {args.device}")
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        done, planned, theirs = state["epoch"], state["epochs"], state["flags"]
    except Exception as e:  # torch.load raises a dozen kinds
        raise ValueError(f"{path} is damaged or foreign ({type(e).__name__})") from e
    mine = training_flags(args)
    other = [f"{flag} was {theirs.get(flag)}, is {mine.get(flag)}" for flag in {**theirs, **mine}
             if theirs.get(flag) != mine.get(flag)]
    if other:
        raise ValueError(f"{path} is of another training ({', '.join(other)}): name another --out")
    if args.epochs < done:
        raise ValueError(f"{path}: {done} epochs are done, --epochs cannot be fewer")
    if args.epochs != planned:
        print(f"--epochs was {planned}, is {args.epochs} from here on, and so are its schedules")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        if args.device == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
    except (KeyError, RuntimeError) as e:
        raise ValueError(f"{path} is damaged or foreign ({type(e).__name__})") from e
    print(f"{args.out}: {done} of {args.epochs} epochs are done")
    return done


def training_flags(args):
    flags = {name: getattr(args, name) for name in args.training_names}
    return {"script": Path(__file__).stem, **flags}


def scored(args, samples):
    """The rows {name: dict} of samples with IS and FID, or with null and the reason."""
    files = [f"{args.out}/samples_{name}.npz" for name in samples]
    scores = [{"is_mean": None, "is_std": None, "fid": None} for _ in files]
    reason = None
    if args.smoke:
        reason = "IS and FID are not for digits"
    elif args.device == "cpu":
        reason = f"hours on a CPU: python metrics.py {' '.join(files)} --data {args.data}"
    else:
        try:
            import metrics
            scores = metrics.score(files, args.data, device=args.device)
        except (ImportError, OSError, ValueError, RuntimeError) as e:  # no weights; out of memory
            reason = " ".join(str(e).split())
    if reason is not None:
        print(f"no IS and FID ({reason})")
    return {name: {**samples[name], **row, "reason": reason} for name, row in zip(samples, scores)}


def in_range(kind, low, high=math.inf):
    """A type for argparse: a number of the kind in low ... high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} ... {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse: "invalid int value"
    return parse


count = in_range(int, 0, 2 ** 63 - 1)
positive = in_range(int, 1, 2 ** 63 - 1)
number = in_range(float, 0, sys.float_info.max)  # finite
radius = in_range(float, 0)
fraction = in_range(float, 0, 1)


def read_flags(training, running, argv, presets):
    """The arguments. presets: pairs (flags, defaults); where all the flags are as given there, the
    defaults take the place of the parser's. Later pairs win over earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, parents=[training, running],
                                     formatter_class=HelpFormatter, allow_abbrev=False,
                                     add_help=False)
    parser.error = stop
    given = vars(parser.parse_known_args(argv)[0])
    if given["smoke"] and given["small"]:
        parser.error("--smoke or --small, not both")
    for flags, defaults in presets:
        if all(given[flag] == value for flag, value in flags.items()):
            parser.set_defaults(**defaults)
    parser.add_argument("-h", "--help", action="help", help="shows the presets' defaults, too")
    args = parser.parse_args(argv)  # again, with the presets' defaults; what is given wins
    if args.amp is None:
        args.amp = args.device == "cuda"
    args.training_names = list(vars(training.parse_args([])))  # a checkpoint belongs to these
    return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the docstring as it is."""


def stop(message, code=2):
    """One line on stderr, and the end."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def main(argv=None):
    args, begun = parse_args(argv), time.time()
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    socket.setdefaulttimeout(10)  # a silent download ends
    if args.smoke and args.out == f"runs/{Path(__file__).stem}-smoke":  # begun afresh each time
        shutil.rmtree(args.out, ignore_errors=True)
    try:
        figures = run(args)
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        flags = {k: "inf" if v == math.inf else v for k, v in vars(args).items()}  # strict JSON
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        results = {"args": flags, "versions": versions, "device": device,
                   "seconds": time.time() - begun, **figures}
        text = json.dumps(results, indent=2, allow_nan=False)
        Path(args.out, "results.json").write_text(text)
    except KeyboardInterrupt:
        stop("interrupted; the same command resumes after the last epoch (--smoke: only with an "
             "--out of its own)", code=130)
    except (OSError, ValueError) as e:
        stop(e)
    except (MemoryError, RuntimeError) as e:  # torch raises RuntimeErrors
        words = "out of memory", "allocate memory"
        if isinstance(e, RuntimeError) and not any(word in str(e) for word in words):
            raise
        stop(f"out of memory: try a smaller --batch-size or --sample-batch-size ({e})")


if __name__ == "__main__":
    main()
