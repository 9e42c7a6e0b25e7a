"""How fast the scripts are, beside plain loops.

    python tests/benchmark.py [--quick] [--device cuda|cpu] [--json PATH]

The scripts' own functions, as their train() and run() call them, beside loops that ascend the same scores in the
ordinary way: loss.backward() in each step, so the parameters' gradients too; float32 with PyTorch's default switches;
no channels_last; no random start. The two take turns, on random images and weights; times are medians. On CUDA the
settings are the scripts' defaults, on a CPU those of --small with smaller batches. Read the ratios: times are the
machine's. On a CPU that others use too, OMP_NUM_THREADS=1 gives steadier ones.
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
from samplers import (ReplayBuffer, crop_flip, cross_entropy, entropy, eval_mode, info_nce,  # noqa: E402
                      joint_energy_score, log_p_x, log_p_x_given_y, log_p_y_given_x, logit, project, steepest, to_float,
                      to_uint8)

# repeats; largest batch of training and sampling; images through Inception; images and width of features for FID, IS
SIZES = {
    "cuda": dict(repeats=5, batch=512, scored=4096, features=(50000, 2048)),
    "cuda quick": dict(repeats=2, batch=128, scored=1024, features=(50000, 2048)),
    "cpu": dict(repeats=3, batch=64, scored=16, features=(50000, 2048)),
    "cpu quick": dict(repeats=2, batch=4, scored=2, features=(5000, 256))}
HEAD = """
| measurement                      | batch | steps | images/s |   s/50k |   GiB | util | plain: /s |   GiB | ratio |
| -------------------------------- | ----: | ----: | -------: | ------: | ----: | ---: | --------: | ----: | ----: |
"""
ROW = ("| {name:32} | {batch:5} | {steps:5} | {images_per_s:8,.1f} | {s_per_50k:7,.0f} | {gib:5.2f} | {util:4.2f} |"
       " {plain_images_per_s:9,.1f} | {plain_gib:5.2f} | {ratio:5.2f} |")
NOTES = """
steps     of an image's attacks and chains, of 2 forwards' work each; a training pass costs 3, with R1 more
images/s  through a whole training step, or a whole chain; s/50k: seconds for 50,000, an epoch or a file of samples
GiB       CUDA memory at its peak, above what lay there before the call (weights, optimiser, data)
util      operations per second / those of the large product
plain     images/s and GiB of the plain loop; Inception's in TF32, the project's in true float32
ratio     plain time / the project's"""


# ================================================================ measuring
class Benchmark:
    def __init__(self, device, quick):
        self.device, self.cuda = device, device == "cuda"
        self.sizes = SIZES[f"{device} quick" if quick else device]
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
        before, begun = torch.cuda.memory_allocated(), time.perf_counter()
        call()
        self.synchronize()
        self.gib = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
        return time.perf_counter() - begun

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def compare(self, name, n, project, plain, forward, steps, passes):
        """Prints and keeps the row of two functions that handle n images a call. forward: operations of one image's
        forward; passes: what the project's does besides the steps, in forwards."""
        times, plain_times = [], []
        for _ in range(1 + self.sizes["repeats"]):
            with project_switches(), contextlib.redirect_stdout(io.StringIO()):  # sample() prints its progress
                times.append(self.seconds(project))
            gib = self.gib
            plain_times.append(self.seconds(plain))
        t, plain_t = statistics.median(times[1:]), statistics.median(plain_times[1:])  # the first warms up
        operations = (2 * steps + passes) * forward * n
        self.rows.append(dict(
            name=name, batch=n, steps=steps, images_per_s=n / t, s_per_50k=50000 * t / n, gib=gib,
            util=operations / t / self.operations_per_s, plain_images_per_s=n / plain_t, plain_gib=self.gib,
            ratio=plain_t / t))
        print(ROW.format(**self.rows[-1]), flush=True)


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


def make_optimizer(f):
    return torch.optim.SGD(f.parameters(), 1e-6, momentum=0.9)  # at this rate nothing diverges


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ================================================================ the four scripts
class Case:
    """A script's settings, its net as run() makes it, one for the plain loop, random images and labels."""

    def __init__(self, b, script):
        self.b, self.script, self.name = b, script, script.__name__
        self.args = args = script.parse_args(["--device", "cuda"] if b.cuda else ["--device", "cpu", "--small"])
        args.batch_size = min(args.batch_size, b.sizes["batch"])
        args.num_samples = args.sample_batch_size = min(args.sample_batch_size, b.sizes["batch"])
        self.f = script.make_model(args.arch).to(b.device, memory_format=torch.channels_last)
        self.f_plain = script.make_model(args.arch).to(b.device)
        self.x, self.x_0 = (torch.rand(n, 3, 32, 32, device=b.device) for n in (args.batch_size, args.num_samples))
        self.y, self.y_0 = (torch.arange(len(x), device=b.device) % 10 for x in (self.x, self.x_0))
        self.attack = dict(steps=args.attack_steps, step_size=args.attack_step_size, eps=args.attack_eps,
                           norm=args.norm)
        self.autocast = torch.autocast(b.device, torch.bfloat16, enabled=args.amp)
        self.forward = forward_operations(self.f, self.x)

    def training(self, loss, plain_loss, steps, passes):
        """The row of a training step; the losses are functions without arguments."""
        optimizer, plain_optimizer = make_optimizer(self.f), make_optimizer(self.f_plain)
        self.b.compare(f"{self.name} training, {self.args.arch}", len(self.x), lambda: update(optimizer, loss()),
                       lambda: update(plain_optimizer, plain_loss()), self.forward, steps, passes)

    def sampling(self, sampler, start, plain_score, clamp=True):
        """The row of the script's sample(), and of a plain chain up plain_score."""
        a = self.args

        def plain():
            with eval_mode(self.f_plain):
                plain_ascend(plain_score, self.x_0, a.sample_steps, a.sample_step_size, a.sample_eps, a.sample_norm,
                             a.sample_noise, clamp)
        self.b.compare(f"{self.name} sampling, {sampler}", len(self.x_0),
                       lambda: self.script.sample(self.f, sampler, start, a), plain, self.forward, a.sample_steps, 0)


def measure_cem_sup(b):
    case = Case(b, cem_sup)
    ce = cross_entropy(case.f_plain, case.y)

    def loss():
        with case.autocast:
            return cem_sup.at_loss(case.f, crop_flip(case.x), case.y, **case.attack)

    def plain_loss():
        with eval_mode(case.f_plain):
            x_hat = plain_ascend(ce, crop_flip(case.x), **case.attack)
        return ce(x_hat).mean()

    case.training(loss, plain_loss, case.args.attack_steps, passes=3)
    case.sampling("ta", lambda labels: case.x_0, log_p_y_given_x(case.f_plain, case.y_0))


def measure_cem_unsup(b):
    case = Case(b, cem_unsup)
    tau = case.args.temperature
    nce = info_nce(case.f_plain, None, tau)

    def loss():
        x, x_prime = cem_unsup.augment(case.x), cem_unsup.augment(case.x)
        with case.autocast:
            return cem_unsup.cem_loss(case.f, x, x_prime, tau, "both", **case.attack)

    def plain_loss():
        pair = torch.cat([cem_unsup.augment(case.x), cem_unsup.augment(case.x)])
        with eval_mode(case.f_plain):
            pair = plain_ascend(nce, pair, **case.attack)
        return nce(pair).mean()

    case.training(loss, plain_loss, 2 * case.args.attack_steps, passes=6)  # two views
    case.sampling("maxent", lambda labels: case.x_0, entropy(case.f_plain, tau))


def measure_jeat(b):
    case = Case(b, jeat)
    f_plain, K = case.f_plain, case.args.sgld_steps
    buffer = ReplayBuffer(case.args.buffer_size, (3, 32, 32), device=b.device)
    e_xy, minus_e_x = joint_energy_score(f_plain, case.y), log_p_x(f_plain)

    def loss():
        with case.autocast:
            return jeat.jeat_loss(case.f, crop_flip(case.x), case.y, buffer, sgld_steps=K, **case.attack)[0]

    def plain_loss():
        x_adv = plain_ascend(e_xy, crop_flip(case.x), **case.attack)
        x_0, idx = buffer.sample(len(case.x))
        x_k = plain_ascend(minus_e_x, x_0, K, step_size=0.25, norm="none", noise=0.005, clamp=False)
        buffer.update(idx, x_k)
        return e_xy(x_adv).mean() + minus_e_x(x_k).mean()

    case.training(loss, plain_loss, case.args.attack_steps + K, passes=6)
    case.sampling("gaussian", lambda labels: case.x_0, log_p_x_given_y(f_plain, case.y_0), clamp=False)


def measure_binary_at_ebm(b):
    case = Case(b, binary_at_ebm)
    f, f_plain, args = case.f, case.f_plain, case.args
    K, J, step, norm = args.attack_steps, args.positive_steps, args.attack_step_size, args.norm
    eps, eps_pos = args.attack_eps, args.positive_eps

    def loss():  # at the last K
        x, x_0 = crop_flip(case.x), crop_flip(case.x)
        with case.autocast:
            x_pos, x_neg = binary_at_ebm.adversaries(f, x, x_0, K, J, step, step, eps, eps_pos, norm)
        return binary_at_ebm.at_ebm_loss(f, x_pos, x_neg)[0]

    def plain_loss():
        x_pos = plain_ascend(logit(f_plain, sign=-1), crop_flip(case.x), J, step, eps_pos, norm)
        x_neg = plain_ascend(logit(f_plain), crop_flip(case.x), K, step, eps, norm)
        return binary_at_ebm.at_ebm_loss(f_plain, x_pos, x_neg)[0]

    case.training(loss, plain_loss, K + J, passes=9.3)
    case.sampling("ascent", to_uint8(case.x_0), logit(f_plain))


# ================================================================ metrics
def measure_inception(b):
    net = metrics.InceptionV3().to(b.device).eval()
    plain_net = inception_v3(weights=None, init_weights=False).to(b.device).eval()
    images = torch.randint(256, (b.sizes["scored"], 3, 32, 32), dtype=torch.uint8, device=b.device)

    @torch.no_grad()
    def plain():
        for x in images.split(metrics.BATCH_SIZE):
            plain_net(2 * F.interpolate(to_float(x), size=(299, 299), mode="bilinear") - 1)

    b.compare("metrics, Inception", len(images), lambda: metrics.extract_features(images, net), plain,
              forward_operations(net, images), steps=0, passes=1)


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
