"""How fast the scripts are, beside plain loops, and what makes them so.

    python tests/benchmark.py [--quick] [--device cuda|cpu] [--json PATH]

The scripts' own functions, as their train() and run() call them. Beside them loops that ascend the same scores in the
ordinary way: loss.backward() in each step, so the parameters' gradients too, through batch norms in eval mode, without
a random start. Precision, switches and memory format are the same. And the scripts' own without frozen (with eval_mode
in its place), and with --record. All take turns, on random images and weights; times are medians. On CUDA the settings
are the scripts' defaults, on a CPU those of --small with smaller batches. Read the ratios: times are the machine's. On
a CPU that others use too, OMP_NUM_THREADS=1 gives steady ones: one thread's own time.
"""
import argparse
import contextlib
import io
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import inception_v3

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import binary_at_ebm  # noqa: E402
import cem_sup  # noqa: E402
import cem_unsup  # noqa: E402
import jeat  # noqa: E402
import metrics  # noqa: E402
from samplers import (Recorded, ReplayBuffer, crop_flip, cross_entropy, entropy, eval_mode, info_nce,  # noqa: E402
                      joint_energy_score, log_p_x, log_p_x_given_y, log_p_y_given_x, logit, project, steepest, to_float,
                      to_uint8)

# rounds, the first of which warm up; largest batch of training and sampling; images through Inception; images and width
# of features for FID, IS
SIZES = {
    "cuda": dict(rounds=7, warmup=2, batch=512, scored=4096, features=(50000, 2048)),
    "cuda quick": dict(rounds=4, warmup=2, batch=128, scored=1024, features=(50000, 2048)),
    "cpu": dict(rounds=4, warmup=1, batch=64, scored=16, features=(50000, 2048)),
    "cpu quick": dict(rounds=4, warmup=1, batch=8, scored=2, features=(5000, 256))}
HEAD = """
| measurement                      | batch | steps | images/s |   s/50k |   GiB | util | ratio | frozen | record |
| -------------------------------- | ----: | ----: | -------: | ------: | ----: | ---: | ----: | -----: | -----: |
"""
ROW = ("| {name:32} | {batch:5} | {steps:5} | {images_per_s:8,.1f} | {s_per_50k:7,.0f} | {gib:5.2f} | {util:4.2f} |"
       " {plain:>5} | {eval_mode:>6} | {recorded:>6} |")
NOTES = """
steps     of an image's attacks and chains, of 2 forwards' work each; a training pass costs 3, with R1 more
images/s  through a whole training step, or a whole chain; s/50k: seconds for 50,000, an epoch or a file of samples
GiB       CUDA memory at its peak, above what lay there before the call (weights, optimiser, data)
util      operations per second / those of the large product
ratio     the plain loop's time / this one's; of Inception: torchvision's net, resized by PyTorch / ours
frozen    the time with eval_mode in the place of frozen / this one's
record    this one's / the time with --record, of a graph that is recorded already
"""


# ================================================================ measuring
class Benchmark:
    def __init__(self, device, quick):
        self.device, self.cuda = device, device == "cuda"
        self.sizes = SIZES[f"{device} quick" if quick else device]
        # the processor's time, of which other programs take nothing, where one thread does it all
        self.clock = time.perf_counter if self.cuda or torch.get_num_threads() > 1 else time.process_time
        n, dtype = (8192, torch.bfloat16) if self.cuda else (1024, torch.float32)
        x = torch.randn(n, n, device=device, dtype=dtype)
        self.product = f"{n} x {n}, {dtype}"
        self.operations_per_s = 2 * n ** 3 / min(self.seconds(lambda: x @ x) for _ in range(20))
        self.rows = []

    def seconds(self, call):
        """Of a call. self.gib is then its peak of CUDA memory; 0 on a CPU."""
        self.synchronize()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        before, begun = torch.cuda.memory_allocated(), self.clock()
        call()
        self.synchronize()
        self.gib = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
        return self.clock() - begun

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def compare(self, name, n, ways, forward, steps, passes):
        """Prints and keeps the row of calls that handle n images each: ways["project"], and others that do the same.
        forward: operations of one image's forward; passes: what the project's does besides the steps, in forwards."""
        times = {way: [] for way in ways}
        for _ in range(self.sizes["rounds"]):
            for way, call in ways.items():
                with project_switches(), contextlib.redirect_stdout(io.StringIO()):  # sample() prints its progress
                    times[way].append(self.seconds(call))
                if way == "project":
                    gib = self.gib
        t = {way: statistics.median(seconds[self.sizes["warmup"]:]) for way, seconds in times.items()}
        ratios = {way: t[way] / t["project"] for way in ("plain", "eval_mode") if way in t}
        if "recorded" in t:
            ratios["recorded"] = t["project"] / t["recorded"]
        row = dict(name=name, batch=n, steps=steps, images_per_s=n / t["project"], s_per_50k=50000 * t["project"] / n,
                   gib=gib, util=(2 * steps + passes) * forward * n / t["project"] / self.operations_per_s)
        self.rows.append({**row, **ratios})
        shown = {way: f"{ratios[way]:.2f}" if way in ratios else "" for way in ("plain", "eval_mode", "recorded")}
        print(ROW.format(**row, **shown), flush=True)


@contextlib.contextmanager
def project_switches():
    """The switches that the scripts' main() sets; PyTorch's own again on exit."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark
    matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = before


def forward_operations(net, x):
    """Operations (two per multiply-add) of one forward of one image, in eval mode."""
    with FlopCounterMode(display=False) as counter, eval_mode(net), torch.no_grad():
        net(x[:1])
    return counter.get_total_flops()


def plain_ascend(score, x_0, steps, step_size, eps=math.inf, norm="l2", noise=0.0, clamp=True):
    """samplers.ascend with the gradient taken in the ordinary way."""
    x = x_0
    for _ in range(steps):
        x = x.detach().requires_grad_()
        score(x).sum().backward()  # accumulates the parameters' gradients as well
        x = x.detach() + step_size * steepest(x.grad, norm)
        if noise > 0:
            x = x + noise * torch.randn_like(x)
        x = project(x, x_0, eps, norm)
        if clamp:
            x = x.clamp(0, 1)
    return x


def sgd(f):
    return torch.optim.SGD(f.parameters(), 1e-6, momentum=0.9)  # at this rate nothing diverges


# ================================================================ the four scripts
class Case:
    """A script's settings, its net as run() makes it, one for the plain loop, random images and labels."""

    def __init__(self, b, script):
        self.b, self.script, self.name = b, script, script.__name__
        self.args = args = script.parse_args(["--device", "cuda"] if b.cuda else ["--device", "cpu", "--small"])
        args.batch_size = min(args.batch_size, b.sizes["batch"])
        args.num_samples = args.sample_batch_size = min(args.sample_batch_size, b.sizes["batch"])
        self.f, self.f_plain = (script.make_model(args.arch).to(b.device, memory_format=torch.channels_last)
                                for _ in range(2))
        self.x, self.x_0 = (torch.rand(n, 3, 32, 32, device=b.device) for n in (args.batch_size, args.num_samples))
        self.y, self.y_0 = (torch.arange(len(x), device=b.device) % 10 for x in (self.x, self.x_0))
        self.attack = dict(steps=args.attack_steps, step_size=args.attack_step_size, eps=args.attack_eps,
                           norm=args.norm)
        self.forward = forward_operations(self.f, self.x)

    def autocast(self):
        return torch.autocast(self.b.device, torch.bfloat16, enabled=self.args.amp)

    def compare(self, name, n, project, plain, recorded, steps, passes):
        """The row. project, plain, recorded: calls."""
        def thawed():
            with mock.patch.object(self.script, "frozen", eval_mode):
                project()

        ways = dict(project=project, plain=plain)
        if hasattr(self.script, "frozen"):  # jeat's nets have no norms
            ways["eval_mode"] = thawed
        if self.b.cuda:
            ways["recorded"] = recorded
        self.b.compare(f"{self.name} {name}", n, ways, self.forward, steps, passes)

    def training(self, inputs, loss, plain_loss, steps, passes):
        """The row of an update. inputs() are the tensors of a batch, of which the losses are functions."""
        parameters, optimizer, plain_optimizer = list(self.f.parameters()), sgd(self.f), sgd(self.f_plain)

        def loss_and_gradients(*tensors):
            value = loss(*tensors)
            return value.detach(), *torch.autograd.grad(value, parameters)

        def update(loss_and_gradients):
            _, *gradients = loss_and_gradients(*inputs())
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            optimizer.step()

        def plain():
            plain_optimizer.zero_grad()
            plain_loss(*inputs()).backward()
            plain_optimizer.step()

        recorded = Recorded(loss_and_gradients, warmup=1)
        self.compare(f"training, {self.args.arch}", len(self.x), lambda: update(loss_and_gradients), plain,
                     lambda: update(recorded), steps, passes)

    def sampling(self, sampler, start, plain_score, clamp=True):
        """The row of the script's sample(), and of a plain chain up plain_score."""
        a, kept = self.args, {}

        def sample():
            self.script.sample(self.f, sampler, start, a)

        def plain():
            with eval_mode(self.f_plain), self.autocast():
                plain_ascend(plain_score, self.x_0, a.sample_steps, a.sample_step_size, a.sample_eps, a.sample_norm,
                             a.sample_noise, clamp)

        def recorded():  # one chain's graph for all of its calls, as for all batches of a run
            def keep(fn, on):
                return kept.setdefault("chain", Recorded(fn, warmup=1))
            with mock.patch.object(self.script, "Recorded", keep):
                sample()

        self.compare(f"sampling, {sampler}", len(self.x_0), sample, plain, recorded, a.sample_steps, 0)


def measure_cem_sup(b):
    case = Case(b, cem_sup)
    case.args = cem_sup.with_own_step(case.args, "ta")

    def inputs():
        return crop_flip(case.x), case.y

    def loss(x, y):
        with case.autocast():
            return cem_sup.at_loss(case.f, x, y, **case.attack)

    def plain_loss(x, y):
        ce = cross_entropy(case.f_plain, y)
        with case.autocast():
            with eval_mode(case.f_plain):
                x_hat = plain_ascend(ce, x, **case.attack)
            return ce(x_hat).mean()

    case.training(inputs, loss, plain_loss, case.args.attack_steps, passes=3)
    case.sampling("ta", lambda labels: case.x_0, log_p_y_given_x(case.f_plain, case.y_0))


def measure_cem_unsup(b):
    case = Case(b, cem_unsup)
    tau = case.args.temperature
    nce = info_nce(case.f_plain, None, tau)

    def inputs():
        return cem_unsup.augment(case.x), cem_unsup.augment(case.x)

    def loss(x, x_prime):
        with case.autocast():
            return cem_unsup.cem_loss(case.f, x, x_prime, tau, "both", **case.attack)

    def plain_loss(x, x_prime):
        with case.autocast():
            with eval_mode(case.f_plain):
                pair = plain_ascend(nce, torch.cat([x, x_prime]), **case.attack)
            return nce(pair).mean()

    case.training(inputs, loss, plain_loss, 2 * case.args.attack_steps, passes=6)  # two views
    case.sampling("maxent", lambda labels: case.x_0, entropy(case.f_plain, tau))


def measure_jeat(b):
    case = Case(b, jeat)
    f_plain, K = case.f_plain, case.args.sgld_steps
    buffer = ReplayBuffer(case.args.buffer_size, (3, 32, 32), device=b.device)
    minus_e_x = log_p_x(f_plain)

    def inputs():
        return crop_flip(case.x), case.y

    def loss(x, y):
        with case.autocast():
            return jeat.jeat_loss(case.f, x, y, buffer, sgld_steps=K, **case.attack)[0]

    def plain_loss(x, y):
        e_xy = joint_energy_score(f_plain, y)
        with case.autocast():
            x_adv = plain_ascend(e_xy, x, **case.attack)
            x_0, idx = buffer.sample(len(x))
            x_k = plain_ascend(minus_e_x, x_0, K, step_size=0.25, norm="none", noise=0.005, clamp=False)
            buffer.update(idx, x_k)
            return e_xy(x_adv).mean() + minus_e_x(x_k).mean()

    case.training(inputs, loss, plain_loss, case.args.attack_steps + K, passes=6)
    case.sampling("gaussian", lambda labels: case.x_0, log_p_x_given_y(f_plain, case.y_0), clamp=False)


def measure_binary_at_ebm(b):
    case = Case(b, binary_at_ebm)
    f, f_plain, args = case.f, case.f_plain, case.args
    K, J, step, norm = args.attack_steps, args.positive_steps, args.attack_step_size, args.norm
    eps, eps_pos = args.attack_eps, args.positive_eps

    def inputs():
        return crop_flip(case.x), crop_flip(case.x)

    def loss(x, x_0):  # at the last K
        with case.autocast():
            x_pos, x_neg = binary_at_ebm.adversaries(f, x, x_0, K, J, step, eps, eps_pos, norm)
        return binary_at_ebm.at_ebm_loss(f, x_pos, x_neg)[0]

    def plain_loss(x, x_0):
        with case.autocast():
            x_pos = plain_ascend(logit(f_plain, sign=-1), x, J, step, eps_pos, norm)
            x_neg = plain_ascend(logit(f_plain), x_0, K, step, eps, norm)
        return binary_at_ebm.at_ebm_loss(f_plain, x_pos, x_neg)[0]

    case.training(inputs, loss, plain_loss, K + J, passes=9.3)
    case.sampling("ascent", to_uint8(case.x_0), logit(f_plain))


# ================================================================ metrics
def measure_inception(b):
    net = metrics.InceptionV3().to(b.device).eval()
    plain_net = inception_v3(weights=None, init_weights=False).to(b.device).eval()
    images = torch.randint(256, (b.sizes["scored"], 3, 32, 32), dtype=torch.uint8, device=b.device)

    @torch.no_grad()
    def plain():
        with metrics.true_float32():
            for x in images.split(metrics.BATCH_SIZE):
                plain_net(2 * F.interpolate(to_float(x), size=(299, 299), mode="bilinear") - 1)

    ways = dict(project=lambda: metrics.extract_features(images, net), plain=plain)
    b.compare("metrics, Inception", len(images), ways, forward_operations(net, images), steps=0, passes=1)


def measure_scores(b):
    """Seconds of FID and of IS, from features and logits."""
    n, width = b.sizes["features"]
    features, logits = torch.randn(n, width, device=b.device), torch.randn(n, 1008, device=b.device)
    reference = torch.zeros(width), torch.eye(width)
    fid = b.seconds(lambda: metrics.frechet_distance(*metrics.gaussian_statistics(features), *reference))
    inception_score = b.seconds(lambda: metrics.inception_score(logits))
    print(f"\nFID of {n:,} images with {width} features: {fid:.2f} s; their IS: {inception_score:.2f} s")
    return {"fid_s": fid, "is_s": inception_score}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer repeats")
    parser.add_argument("--device", choices=cem_sup.DEVICES, default=cem_sup.DEVICES[0])
    parser.add_argument("--json", metavar="PATH", help="write the figures, versions and device there as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    b = Benchmark(args.device, args.quick)
    about = {"device": torch.cuda.get_device_name() if b.cuda else platform.machine(), "torch": torch.__version__,
             "threads": torch.get_num_threads(), "product": b.product, "tflops": b.operations_per_s / 1e12}
    print("{device}, {threads} threads, torch {torch}; a product {product}: {tflops:.3g} TFLOP/s".format(**about))
    print(HEAD, end="")
    for measure in (measure_cem_sup, measure_cem_unsup, measure_jeat, measure_binary_at_ebm, measure_inception):
        measure(b)
    scores = measure_scores(b)
    print(NOTES)
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "sizes": b.sizes, "rows": b.rows, **scores}, indent=1))


if __name__ == "__main__":
    main()
