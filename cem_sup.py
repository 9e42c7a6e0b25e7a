"""Supervised CEM: adversarial training as maximum likelihood, and the samplers that follow from it.

Wang, Wang, Yang, Lin: A Unified Contrastive Energy-based Model for Understanding the Generative
Ability of Adversarial Training, ICLR 2022. p(x, y) = exp f(x, y) / Z, f the classifier's logits.

  training  min_theta E max_{|x_hat - x| <= eps} CE(x_hat, y)             adversarial training (AT)
  inner     x_hat += a grad_x [ log sum_k exp f(x_hat, k) - f(x_hat, y) ]: Langevin's gradient of
            log p(x), without its noise, biased by the last term
  outer     grad_theta E log p(x, y) = E grad_theta [ f(x, y) - f(x_hat, y) ]         consistency
                                     + E grad_theta [ f(x_hat, y) - f(x_hat, y_hat) ] contrastive
            over (x_hat, y_hat) ~ p. As y_hat ~ p(y|x_hat), the second is -grad_theta CE(x_hat, y):
            AT follows this term alone, its own x_hat in the place of p's, and drops the first
  sampling  ascend log p(y|x) (TA), log p(x) (Langevin), log p(x|y) (CS), f_y + LSE f (RCS)

  python cem_sup.py                       the paper's run: CIFAR-10 (downloaded), ResNet-50
  python cem_sup.py --small               CIFAR-10 on a CPU: a ResNet-18 of half width
  python cem_sup.py --smoke               drawn digits, no data: under a minute on two CPU cores
  python cem_sup.py --attack-steps 0 --out runs/cem_sup-control     the control: no attack

Writes to --out: checkpoint.pt; log.jsonl, a line an epoch; for each sampler a set of samples,
samples_cs.{png,npz} and so on, named by the sampling flags that are not at their defaults
(samples_cs_start-pooled_steps-25.png); results.json, with a row for each set and the accuracy. The
same command resumes after the last finished epoch, draws what is not there yet, and leaves the rest
(a --smoke without --out begins afresh). More epochs make all in results.json void. Langevin takes
JEM's step, .25 grad log p(x) + .005 xi: the slides' noise, sqrt(2 a) xi, would be .7 at a = .25 and
drown an image in [0, 1]. Its number of steps, ball and box are the other samplers' [ours].

Sources of the defaults: [slides] the authors' talk on the paper; [robustness] MadryLab/robustness,
on which the paper builds; [Santurkar] the code of Santurkar et al., NeurIPS 2019, and their
released net; [JEM] the code of Grathwohl et al., ICLR 2020, rescaled from [-1, 1] to [0, 1];
[assumed] our reading; [ours] in none of them. TA's, CS's and RCS's objectives are recalled from the
paper.
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
from torch import nn
from torchvision.models.resnet import BasicBlock, resnet18, resnet50

from samplers import (HelpFormatter, Recorded, Refused, accuracy, ascend, claimed, count,
                      crop_flip, cross_entropy, flag_values, fraction, frozen, in_epoch, is_there,
                      load_data, log_p_x, log_p_x_given_y, log_p_y_given_x, number, one_line,
                      positive, progress, radius, reinforced, save_samples, say, say_how_long,
                      seed, set_of_samples, starts, to_float, to_uint8, typed, write)


# ================================================================ the method
def at_loss(f, x, y, **attack):
    """max_{|x_hat - x| <= eps} CE(x_hat, y) of images x [B, 3, 32, 32] in [0, 1], labels y [B].
    attack: steps, step_size, eps, norm. A random start, and the last iterate [assumed; robustness:
    no random start, the best iterate]."""
    ce = cross_entropy(f, y)
    with frozen(f):  # inner: CE = LSE f - f_y; LSE f is log p(x) + const, -f_y the bias
        x_hat = ascend(ce, x, random_start=True, **attack)  # steps = 0: it returns x
    return ce(x_hat).mean()  # outer: its gradient is minus the contrastive term


SAMPLERS = {
    "ta": log_p_y_given_x,
    "langevin": lambda f, y: log_p_x(f),  # the class is in the start x_0, if anywhere [assumed]
    "cs": log_p_x_given_y,
    "rcs": reinforced,
}
# a sampler's step, where no flag says otherwise
STEP = dict(sample_step_size=0.5, sample_norm="l2", sample_noise=0.0)  # [Santurkar]
LANGEVIN_STEP = dict(sample_step_size=0.25, sample_norm="none", sample_noise=0.005)  # [JEM]


def sample(f, sampler, start, args):
    """--num-samples images uint8 [N, 3, 32, 32], the classes in turn, their labels [N], and their
    mean l2 distance from the starts. start: a function from labels to x_0."""
    torch.manual_seed(args.sample_seed)
    labels = torch.arange(args.num_samples, device=args.device) % 10

    def chain(x_0, y):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp), frozen(f):
            return ascend(SAMPLERS[sampler](f, y), x_0, args.sample_steps, args.sample_step_size,
                          eps=args.sample_eps, norm=args.sample_norm, noise=args.sample_noise)

    chain = Recorded(chain, args.record)
    images, moved = [], []
    batches = labels.split(args.sample_batch_size)
    x_0s = [start(y) for y in batches]  # before any noise, so that all samplers have the same
    for y, x_0 in zip(progress(batches, sampler), x_0s):
        x = chain(x_0, y)
        images.append(to_uint8(x))
        moved.append((x - x_0).flatten(1).norm(dim=1))
    return torch.cat(images), labels, torch.cat(moved).mean().item()


# ================================================================ settings
def parse_args(argv=None):
    training = argparse.ArgumentParser(add_help=False)
    add = training.add_argument_group("training; a checkpoint belongs to these").add_argument
    add("--arch", default="resnet50", choices=("resnet50", "resnet18", "resnet18-half", "small-32",
                                                "small-16"),
        help="resnet50 [slides]; resnet18-half: half its channels; small-W: three blocks, of W, "
             "2 W and 4 W channels")
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
        help="radius, of images in [0, 1] [assumed: Santurkar]")
    add("--attack-steps", type=count, default=7,
        help="0: no attack, no random start either, the control [assumed: Santurkar]")
    add("--attack-step-size", type=number, default=0.1,
        help="for images in [0, 1] [assumed: Santurkar]")
    add("--seed", type=seed, default=0, help="of weights, data order and attacks")
    add("--limit", type=positive, default=50000, help="at most so many images of each set")
    add("--smoke", action="store_true", help="all of it, small, on drawn digits: no downloads")

    sampling = argparse.ArgumentParser(add_help=False)
    add = sampling.add_argument_group("sampling; a set of samples belongs to these").add_argument
    add("--start", default="class", metavar="KIND",
        help="class: a Gaussian of each [Santurkar]; pooled: one of all [ours]; fields: random "
             "colours [ours]; cifar100, svhn or a .npy: images [ours]")
    add("--start-split", default="train", choices=("train", "test"),
        help="the Gaussians' images [ours, so that no test image enters; Santurkar: test]")
    add("--num-samples", type=positive, default=50000, help="of each sampler [assumed]")
    add("--sample-seed", type=seed, default=0, help="of starts and noise: another set of samples")
    add("--sample-steps", type=count, default=60, help="[Santurkar]")
    add("--sample-step-size", type=number,
        help="l2 length, of images in [0, 1]; None: 0.5 [Santurkar]. langevin: 0.25 times the "
             "gradient [JEM], unless --sample-norm is given as well")
    add("--sample-eps", type=radius, default=30.0,
        help="radius around the start; 60 x 0.5 does not reach beyond it [Santurkar]; inf: none")
    add("--sample-norm", choices=("l2", "linf", "none"),
        help="of ball and step; none: the gradient itself, in an l2 ball; None: l2 [Santurkar], "
             "langevin none [JEM]")
    add("--sample-noise", type=number,
        help="standard deviation per step; None: 0 [Santurkar], langevin 0.005 [JEM]")
    add("--sample-batch-size", type=positive, default=500, help="images moved together")

    running = argparse.ArgumentParser(add_help=False)
    add = running.add_argument_group("running; these may change").add_argument
    add("--small", action="store_true", help="other defaults, for CIFAR-10 on a CPU")
    add("--epochs", type=positive, default=150, help="[robustness]")
    add("--data", type=os.path.expanduser, default="./data",
        help="folder of cifar-10-batches-py, downloaded if absent")
    add("--out", type=os.path.expanduser, default="runs/cem_sup", help="folder of the run")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where it runs")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16; None: on CUDA")
    add("--record", default=False, action=argparse.BooleanOptionalAction,
        help="an update, and a chain, as one CUDA graph [ours]; not yet tried on a GPU")
    add("--test-images", type=positive, default=10000, help="at most so many, for the accuracy")
    add("--sampler", default=list(SAMPLERS), choices=SAMPLERS, nargs="+", metavar="NAME",
        help="[slides]")
    # small and smoke: [ours]
    small = dict(
        out="runs/cem_sup-small", arch="resnet18-half", epochs=12, lr=0.2, schedule="cycle",
        attack_steps=2, attack_step_size=0.3, test_images=1000, num_samples=1000)
    smoke = dict(
        out="runs/cem_sup-smoke", arch="small-16", epochs=9, batch_size=32, schedule="cycle",
        attack_eps=2.0, attack_steps=1, attack_step_size=2.0, sample_steps=30, num_samples=100)
    # (flags, defaults): where the flags are as on the left, the defaults on the right hold
    return read_flags((training, sampling, running), argv,
                      [({"small": True}, small), ({"smoke": True}, smoke)])


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
    initialisation [assumed; robustness keeps PyTorch's]; or, with PyTorch's, a ResNet-18 of half
    the width, or small-W [ours]."""
    if arch.startswith("small"):
        w = int(arch.removeprefix("small-"))
        return Classifier(nn.Sequential(
            # 4x4, for a 3x3 of stride 2 covers pixels unevenly, and samples show a grid
            nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            block(w, w, 1), block(w, 2 * w, 2), block(2 * w, 4 * w, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)))
    if arch == "resnet18-half":  # torchvision's BasicBlock refuses another width
        return Classifier(nn.Sequential(
            nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 32)),
            nn.Sequential(block(32, 64, 2), BasicBlock(64, 64)),
            nn.Sequential(block(64, 128, 2), BasicBlock(128, 128)),
            nn.Sequential(block(128, 256, 2), BasicBlock(256, 256)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)))
    net = {"resnet18": resnet18, "resnet50": resnet50}[arch](num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return Classifier(net)


def block(c_in, c_out, stride):
    """A BasicBlock with a 1x1 convolution as its shortcut, whatever its stride and widths."""
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
    parameters = list(f.parameters())

    def loss_and_gradients(x, y):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            loss = at_loss(f, x, y, **attack)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    loss_and_gradients = Recorded(loss_and_gradients, args.record)
    done = resume(args, model=f, optimizer=optimizer)
    for epoch in range(done, args.epochs):
        with in_epoch(epoch):
            f.train()
            losses = []
            batches = torch.randperm(len(x_train), device=args.device).split(args.batch_size)
            for i, batch in enumerate(progress(batches, f"epoch {epoch + 1}/{args.epochs}")):
                lr = learning_rate(args, (epoch + i / len(batches)) / args.epochs)
                optimizer.param_groups[0]["lr"] = lr
                x, y = to_float(x_train[batch]), y_train[batch]
                if not args.smoke:  # digits have a direction
                    # [assumed; robustness adds colour jitter and a 2-degree rotation]
                    x = crop_flip(x)
                loss, *gradients = loss_and_gradients(x, y)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                optimizer.step()
                losses.append(loss.clone())  # the next recorded update overwrites it
            log(args, epoch=epoch + 1, loss=torch.stack(losses).mean().item(), lr=lr)
            save_checkpoint(args, epoch + 1, model=f, optimizer=optimizer)


def evaluate(f, x, y, args):
    """Accuracy of images x, uint8 [N, 3, 32, 32], labels y [N], clean and under PGD-20: from the
    clean image, steps of 2.5 eps / 20 [robustness], the last iterate [assumed]."""
    eps = args.attack_eps
    pgd20 = dict(steps=20, step_size=2.5 * eps / 20, eps=eps, norm=args.norm)
    return {"n": len(x), "clean": accuracy(f, x, y),
            "pgd20": accuracy(f, x, y, cross_entropy, **pgd20)}


def with_own_step(args, sampler):
    """args for this sampler, with its own step where no flag says otherwise. The own step counts as
    a default, so that the set's name does not mention it."""
    own = LANGEVIN_STEP if sampler == "langevin" else STEP
    settings = argparse.Namespace(**vars(args))
    settings.defaults = {**args.defaults, **own}
    if args.sample_norm is None and sampler == "langevin":
        settings.sample_step_size = None  # one that is given is a length, for the other samplers
    for flag, value in own.items():
        if getattr(settings, flag) is None:
            setattr(settings, flag, value)
    return settings


def run(args):
    x_train, y_train, x_test, y_test = load_data(args)
    split = (x_test, y_test) if args.start_split == "test" else (x_train, y_train)
    # here, so that a wrong --start is seen before the training
    start = starts(args.start, *split, root=None if args.smoke else args.data)
    given = args.sample_step_size
    if args.sampler == ["langevin"] and args.sample_norm is None and given is not None:
        raise Refused("langevin reads --sample-step-size only together with --sample-norm: none "
                      "(a factor of the gradient) or l2 (a length)")
    torch.manual_seed(args.seed)
    f = make_model(args.arch).to(args.device, memory_format=torch.channels_last)
    # an attack step costs 2 forwards, for it takes the gradient of x only; an update 3
    say_how_long(args, f, forwards=(2 * args.attack_steps + 3) * len(x_train))
    train(f, x_train, y_train, args)

    results = load_results(args)
    x_test, y_test = x_test[:args.test_images], y_test[:args.test_images]
    if results.get("accuracy", {"n": 0})["n"] < len(x_test):
        say(f"accuracy of {len(x_test)} test images, clean and under PGD-20 ...")
        results["accuracy"] = evaluate(f, x_test, y_test, args)
        save_results(args, results)
    say(f"accuracy: {results['accuracy']}")
    names = []
    for sampler in args.sampler:
        settings = with_own_step(args, sampler)
        # the split is that of the Gaussians' images
        unused = () if args.start in ("class", "pooled") else ("start_split",)
        name, made_with = set_of_samples(settings, sampler, *unused)
        if not is_there(args, results, name, made_with):
            images, labels, moved = sample(f, sampler, start, settings)
            if sampler == "langevin" and args.start != "class":
                labels = None  # neither its start nor its score knows a class
            save_samples(f"{args.out}/samples_{name}", images, labels)
            results["samples"][name] = {"n": len(images), "moved": moved, "flags": made_with}
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
