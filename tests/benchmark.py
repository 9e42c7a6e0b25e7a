"""How fast the scripts are, beside plain loops.

    python tests/benchmark.py [--quick] [--device cpu|cuda] [--json PATH]

A measurement has two rows. The first runs the scripts' own functions as their main() and train() do: attacks
with the images' gradient only, channels_last, on CUDA bfloat16 autocast, TF32, cudnn.benchmark. The second, a
plain loop, does the same in the ordinary way: loss.backward(), so the parameters' gradients too; float32 with
PyTorch's default switches; no channels_last; no augmentation, no random start, which favours it. The two take
turns, on random images and weights; a figure is the median of the repeats. Read the ratios: times are the
machine's. On a CPU that others use too, OMP_NUM_THREADS=1 gives steadier ones.
"""
import argparse
import json
import platform
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import binary_at_ebm  # noqa: E402
import cem_sup  # noqa: E402
import cem_unsup  # noqa: E402
import jeat  # noqa: E402
import metrics  # noqa: E402
from samplers import ReplayBuffer, ascend, cross_entropy, entropy, eval_mode, logit, to_float  # noqa: E402

# images, seeds: batches of training and sampling, on CUDA the scripts' own; attack, sample: steps measured;
# scored: images through Inception; features, logits: of FID and IS (in full 2048 and 50000)
SIZES = ("warm_up", "repeats", "images", "seeds", "attack", "sample", "scored", "features", "logits")
CUDA, CUDA_QUICK = (2, 10, 128, 500, 7, 60, 4096, 2048, 50000), (2, 5, 128, 500, 7, 10, 1024, 2048, 50000)
CPU, CPU_QUICK = (1, 3, 16, 16, 7, 4, 16, 1024, 5000), (1, 2, 4, 4, 2, 2, 4, 512, 5000)

COLUMNS = {"batch": "batch", "img*steps/s": "image_steps_per_s", "images/s": "images_per_s",
           "s/50k ": "seconds_per_50k", "GiB": "peak_gib", "util": "utilisation", "ratio": "ratio"}
NOTES = """
img*steps/s  images times steps of an attack or a sampler, a second; images/s: through all its steps
s/50k        seconds for an epoch's training steps, or for sampling or scoring 50,000 images. *: extrapolated
             linearly, from the batch or the N measured and from {attack} attack and {sample} sampling steps
GiB          CUDA memory at its peak, above what lay there before the call (weights, optimiser, data)
util         operations per second / the matmul rate. A step does 2 forwards' work, or 3 with the parameters'
             gradients; a training pass 3. Scoring is true float32, its plain loop what PyTorch's default is
ratio        images/s: the project's / the plain loop's"""

# ---------------------------------------------------------------- measuring


@contextmanager
def project_switches():
    """The switches that the scripts' main() sets; PyTorch's own again on exit."""
    matmul, conv, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn
    before = matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark
    matmul.fp32_precision = conv.fp32_precision = "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark = before


def measure(b, **loops):
    """{name: (median seconds of a call, GiB of CUDA memory at its peak)}; the loops take turns."""
    seconds, peak = {name: [] for name in loops}, dict.fromkeys(loops)
    for i in range(-b.warm_up, b.repeats):
        for name, loop in loops.items():
            with project_switches() if name == "project" else nullcontext():
                if b.cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start = time.perf_counter()
                loop()
                if b.cuda:
                    torch.cuda.synchronize()
                    peak[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
                if i >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), peak[name]) for name in loops}


def matmul_rate(b):
    """Operations per second of a large product: bfloat16 on CUDA, float32 on a CPU."""
    n, times, dtype = (8192, 20, torch.bfloat16) if b.cuda else (2048, 2, torch.float32)
    x = torch.randn(n, n, device=b.device, dtype=dtype)
    return 2 * n ** 3 * times / measure(b, matmul=lambda: [x @ x for _ in range(times)])["matmul"][0]


def forward_flops(f, x):
    """Operations (two per multiply-add) of one forward of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        f(x[:1])
    return counter.get_total_flops()


def compare(b, name, n, project, plain=None, *, forward=None, steps=0, whole=None, passes=0, batch=None):
    """The rows of the project's function and, beside it, of a plain loop; both handle n images a call.

    forward: operations of one image's forward; steps: of attacks and samplers in a call; whole: of the whole
    chain, if a call is a part of one; passes: a call's other work, in forwards.
    """
    print(f"measuring {name}", file=sys.stderr, flush=True)
    rows = []
    for loop, (seconds, peak) in measure(b, project=project, **{"plain": plain} if plain else {}).items():
        chain = seconds * whole / steps if whole else seconds
        rows.append(dict(name=name, loop=loop, seconds_per_50k=50000 * chain / n, extrapolated=n != 50000,
                         peak_gib=peak, image_steps_per_s=n * steps / seconds if whole else None))
        if forward:
            flops = ((2 if loop == "project" else 3) * steps + passes) * forward * n
            rows[-1].update(batch=batch or n, images_per_s=n / chain,
                            utilisation=flops / seconds / b.matmul_rate)
    if plain:
        rows[0]["ratio"] = rows[1]["seconds_per_50k"] / rows[0]["seconds_per_50k"]
    return rows


# ---------------------------------------------------------------- cem_sup


def plain_steps(loss, x, steps, step_size, eps):
    """Normalised l2 steps up `loss`, a function of x, in the ordinary way."""
    x_hat = x
    for _ in range(steps):
        x_hat = x_hat.detach().requires_grad_()
        loss(x_hat).backward()  # accumulates the parameters' gradients as well
        with torch.no_grad():
            g = x_hat.grad / x_hat.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            d = x_hat + step_size * g - x
            d = d * (eps / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
            x_hat = (x + d).clamp(0, 1)
    return x_hat.detach()


def cem_sup_rows(b, arch):
    """Attack, training step and sampling with the script's defaults."""
    args = cem_sup.parse_args(["--device", b.device, "--arch", arch])
    f = cem_sup.make_model(arch).to(b.device, memory_format=torch.channels_last)
    f_plain = cem_sup.make_model(arch).to(b.device)
    sgd = partial(torch.optim.SGD, lr=args.lr, momentum=0.9, weight_decay=5e-4)
    optimizer, optimizer_plain = sgd(f.parameters()), sgd(f_plain.parameters())
    images = torch.randint(256, (b.images, 3, 32, 32), dtype=torch.uint8, device=b.device)
    x, x_0 = to_float(images), torch.rand(b.seeds, 3, 32, 32, device=b.device)
    y, y_0 = (torch.arange(n, device=b.device) % 10 for n in (b.images, b.seeds))
    K, whole, args.sample_steps = args.attack_steps, args.sample_steps, b.sample
    step_size, eps = args.attack_step_size, args.attack_eps
    sampling = args.sample_step_size, args.sample_eps

    def autocast():
        return torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp)

    def attack():
        with autocast(), eval_mode(f):
            ascend(cross_entropy(f, y), x, b.attack, step_size, eps=eps, random_start=True)

    def train():  # the body of cem_sup.train
        f.train()
        x = cem_sup.crop_flip(to_float(images))
        with autocast():
            loss = cem_sup.at_loss(f, x, y, K, step_size, eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def train_plain():
        f_plain.eval()
        x_hat = plain_steps(lambda x: F.cross_entropy(f_plain(x), y), x, K, step_size, eps)
        f_plain.train()
        loss = F.cross_entropy(f_plain(x_hat), y)
        optimizer_plain.zero_grad()
        loss.backward()
        optimizer_plain.step()

    def sample():
        with autocast():
            cem_sup.sample("ta", f, x_0, y_0, args.sample_steps, *sampling)

    def attack_plain():
        f_plain.eval()
        plain_steps(lambda x: F.cross_entropy(f_plain(x), y), x, b.attack, step_size, eps)

    def sample_plain():
        f_plain.eval()
        plain_steps(lambda x: -F.cross_entropy(f_plain(x), y_0), x_0, b.sample, *sampling)

    forward = forward_flops(f.eval(), x)
    return [*compare(b, f"cem_sup attack PGD-{K}, {arch}", b.images, attack, attack_plain,
                     forward=forward, steps=b.attack, whole=K),
            *compare(b, f"cem_sup training PGD-{K}, {arch}", b.images, train, train_plain,
                     forward=forward, steps=K, passes=3),
            *compare(b, f"cem_sup sampling TA-{whole}, {arch}", b.seeds, sample, sample_plain,
                     forward=forward, steps=b.sample, whole=whole)]


# ---------------------------------------------------------------- cem_unsup


def plain_nt_xent(z, tau):
    """Of 2B rows, as it is usually written: cross-entropy of the similarities with the diagonal masked."""
    s = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -1e9)
    return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def cem_unsup_rows(b, arch):
    """Training step, a MaxEnt chain, and that chain's similarities alone, at the script's own N."""
    args = cem_unsup.parse_args(["--device", b.device, "--arch", arch])
    g = cem_unsup.make_model(arch).to(b.device, memory_format=torch.channels_last)
    g_plain = cem_unsup.make_model(arch).to(b.device)
    sgd = partial(torch.optim.SGD, lr=args.lr, momentum=0.9, weight_decay=1e-4)
    optimizer, optimizer_plain = sgd(g.parameters()), sgd(g_plain.parameters())
    n, N = (args.batch_size, args.sample_batch_size) if b.cuda else (b.images, b.seeds)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=b.device)
    x, x_0 = to_float(images), torch.rand(N, 3, 32, 32, device=b.device)
    K, whole, tau = args.attack_steps, args.sample_steps, args.temperature
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)

    def train():  # the body of cem_unsup.train
        g.train()
        views = cem_unsup.augment(to_float(images).repeat(2, 1, 1, 1)).chunk(2)
        with autocast():
            loss = cem_unsup.cem_loss(g, *views, tau, "one", K, args.attack_step_size, args.attack_eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def train_plain():
        g_plain.eval()
        z_prime = g_plain(x).detach()
        x_hat = plain_steps(lambda x_hat: plain_nt_xent(torch.cat([g_plain(x_hat), z_prime]), tau), x, K,
                            args.attack_step_size, args.attack_eps)
        g_plain.train()
        loss = plain_nt_xent(g_plain(torch.cat([x_hat, x])), tau)
        optimizer_plain.zero_grad()
        loss.backward()
        optimizer_plain.step()

    def maxent():
        with autocast():
            cem_unsup.sample("maxent", g, x_0, tau, b.sample)

    def maxent_loss(x):
        z = g_plain(x)
        s = (z @ z.detach().T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -1e9)
        return -s.logsumexp(1).sum()

    def maxent_plain():
        g_plain.eval()
        plain_steps(maxent_loss, x_0, b.sample, args.sample_step_size, args.sample_eps)

    z = torch.randn(args.sample_batch_size, 512, device=b.device)
    forward = forward_flops(g.eval(), x)
    return [*compare(b, f"cem_unsup training PGD-{K}, {arch}", n, train, train_plain,
                     forward=forward, steps=K, passes=7),
            *compare(b, f"cem_unsup sampling MaxEnt-{whole}, {arch}", N, maxent, maxent_plain,
                     forward=forward, steps=b.sample, whole=whole),
            *compare(b, f"  similarities alone, N = {len(z)}", len(z),
                     lambda: ascend(entropy(torch.nn.Identity(), tau), z, b.sample, 0.5, clamp=None),
                     steps=b.sample, whole=whole)]


# ---------------------------------------------------------------- jeat


def jeat_rows(b, arch):
    """Training step (one attack step, K of SGLD) and an SGLD chain of the sampler, at the script's own sizes."""
    args = jeat.parse_args(["--device", b.device, "--arch", arch])
    f = jeat.make_model(arch).to(b.device, memory_format=torch.channels_last)
    f_plain = jeat.make_model(arch).to(b.device)
    optimizer = torch.optim.Adam(f.parameters(), args.lr)
    optimizer_plain = torch.optim.Adam(f_plain.parameters(), args.lr)
    n = args.batch_size if b.cuda else b.images
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=b.device)
    x, x_0 = to_float(images), torch.rand(b.seeds, 3, 32, 32, device=b.device)
    y, y_0 = (torch.arange(m, device=b.device) % 10 for m in (n, b.seeds))
    K, whole, eps = args.sgld_steps, args.sample_steps, args.attack_eps
    buffer = ReplayBuffer(max(n, args.buffer_size if b.cuda else n), (3, 32, 32), device=b.device)
    chains = torch.rand(len(buffer.x), 3, 32, 32, device=b.device)
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=args.amp)

    def train():  # the body of jeat.train
        f.train()
        x = jeat.crop_flip(to_float(images), mode="reflect")
        x = (x + 0.015 * torch.randn_like(x)).clamp(0, 1)
        with autocast():
            loss, _ = jeat.jeat_loss(f, x, y, buffer, sgld_steps=K)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def plain_sgld(energy, x, steps):
        for _ in range(steps):
            x = x.detach().requires_grad_()
            energy(x).sum().backward()  # accumulates the parameters' gradients as well
            x = x - 0.25 * x.grad + 0.005 * torch.randn_like(x)
        return x.detach()

    def e_xy(x, y):
        return jeat.joint_energy(f_plain(x), y)

    def train_plain():
        x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).requires_grad_()
        e_xy(x_adv, y).sum().backward()
        x_adv = (x + (x_adv.detach() + eps * x_adv.grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
        idx = torch.randperm(len(chains))[:n]
        fresh = (torch.rand(n) < 0.05).to(x.device).view(-1, 1, 1, 1)
        x_k = torch.where(fresh, torch.rand_like(x), chains[idx])
        chains[idx] = x_k = plain_sgld(lambda x: jeat.energy(f_plain(x)), x_k, K)
        logits = f_plain(x_adv)
        loss = F.cross_entropy(logits, y) + jeat.energy(logits).mean() - jeat.energy(f_plain(x_k)).mean()
        optimizer_plain.zero_grad()
        loss.backward()
        optimizer_plain.step()

    def sample():
        with autocast():
            jeat.sample(f, x_0, y_0, b.sample)

    def sample_plain():
        plain_sgld(lambda x: e_xy(x, y_0), x_0, b.sample)

    forward = forward_flops(f.eval(), x)
    return [*compare(b, f"jeat training, K = {K}, {arch}", n, train, train_plain, forward=forward,
                     steps=1 + K, passes=6),
            *compare(b, f"jeat sampling SGLD-{whole}, {arch}", b.seeds, sample, sample_plain,
                     forward=forward, steps=b.sample, whole=whole)]


# ---------------------------------------------------------------- binary_at_ebm


def binary_at_ebm_rows(b, arch):
    """A training iteration at the last K, and a chain, with the script's defaults."""
    args = binary_at_ebm.parse_args(["--device", b.device, "--arch", arch])
    f = binary_at_ebm.make_model(arch).to(b.device, memory_format=torch.channels_last)
    f_plain = binary_at_ebm.make_model(arch).to(b.device)
    adam = partial(torch.optim.Adam, lr=args.lr, betas=(0.0, 0.99))
    optimizer, optimizer_plain = adam(f.parameters()), adam(f_plain.parameters())
    n = args.batch_size if b.cuda else b.images
    images, others = torch.randint(256, (2, n, 3, 32, 32), dtype=torch.uint8, device=b.device)
    x, x_0, seeds = to_float(images), to_float(others), torch.rand(b.seeds, 3, 32, 32, device=b.device)
    whole, step_size = args.sample_steps, args.attack_step_size
    # on a CPU K = 25 would take minutes: as many steps as the other rows' attacks, a fifth of them down
    K, J = (args.max_steps, args.positive_steps) if b.cuda else (b.attack, 1)

    def autocast():
        return torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp)

    def train():  # the body of binary_at_ebm.train
        x, x_0 = (binary_at_ebm.crop_flip(to_float(i)) for i in (images, others))
        with autocast():
            x_pos, x_neg = binary_at_ebm.adversaries(f, x, x_0, K, J, step_size, step_size)
        loss, f_pos, f_neg = binary_at_ebm.at_ebm_loss(f, x_pos, x_neg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        torch.stack([loss.detach(), binary_at_ebm.auc(f_pos, f_neg)]).tolist()

    def train_plain():
        x_neg = plain_steps(lambda x: f_plain(x).sum(), x_0, K, step_size, 1e9)
        x_pos = plain_steps(lambda x: -f_plain(x).sum(), x, J, step_size, 1e9).requires_grad_()
        f_pos, f_neg = f_plain(x_pos), f_plain(x_neg)
        g, = torch.autograd.grad(f_pos.sum(), x_pos, create_graph=True)
        labels = torch.cat([torch.ones_like(f_pos), torch.zeros_like(f_neg)])
        loss = F.binary_cross_entropy_with_logits(torch.cat([f_pos, f_neg]), labels)
        loss = loss + 0.01 * 0.5 * g.flatten(1).square().sum(1).mean()
        optimizer_plain.zero_grad()
        loss.backward()
        optimizer_plain.step()

    def sample():
        with autocast():
            ascend(logit(f), seeds, b.sample, args.sample_step_size)

    def sample_plain():
        plain_steps(lambda x: f_plain(x).sum(), seeds, b.sample, args.sample_step_size, 1e9)

    forward = forward_flops(f, x)
    return [*compare(b, f"binary_at_ebm iteration K = {K}, J = {J}, {arch}", n, train, train_plain,
                     forward=forward, steps=K + J, passes=9.3),
            *compare(b, f"binary_at_ebm sampling {whole}, {arch}", b.seeds, sample, sample_plain,
                     forward=forward, steps=b.sample, whole=whole)]


# ---------------------------------------------------------------- metrics


def metrics_rows(b):
    """Inception's features beside torchvision's net; then what is done once for a file of samples."""
    net, batch = metrics.InceptionV3().to(b.device).eval(), min(b.scored, 128)
    other = torchvision.models.inception_v3(weights=None, init_weights=False).to(b.device).eval()
    images = torch.randint(256, (b.scored, 3, 32, 32), dtype=torch.uint8, device=b.device)

    @torch.no_grad()
    def plain():
        for x in images.split(batch):
            other(2 * F.interpolate(x.float() / 255, size=(299, 299), mode="bilinear") - 1)

    a = torch.randn(2, b.features, b.features, dtype=torch.float64, device=b.device)
    mu, sigma, logits = a[:, 0], a @ a.mT / b.features, torch.randn(b.logits, 1008, device=b.device)
    return [*compare(b, "metrics Inception", b.scored, lambda: metrics.extract_features(images, net, batch),
                     plain, forward=forward_flops(net, images), passes=1, batch=batch),
            *compare(b, f"frechet_distance, {b.features} x {b.features}", 50000,
                     lambda: metrics.frechet_distance(mu[0], sigma[0], mu[1], sigma[1])),
            *compare(b, f"inception_score, N = {b.logits}", b.logits,
                     lambda: metrics.inception_score(logits))]


# ---------------------------------------------------------------- the table


def show(rows):
    """A Markdown table; "-" where a column says nothing of a row."""
    def figure(row, key):
        v = row.get(key)
        text = "-" if v is None else str(v) if isinstance(v, int) else f"{v:,.{2 if v < 100 else 0}f}"
        return text if key != "seconds_per_50k" else text + " *"[row["extrapolated"]]
    cells = [[row["name"] if row["loop"] == "project" else "  plain loop",
              *(figure(row, key) for key in COLUMNS.values())] for row in rows]
    table = [["measurement", *COLUMNS], ["---", *["--:"] * len(COLUMNS)], *cells]
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, *figures in table:
        print("|", " | ".join([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]), "|")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, steps, images: about a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cuda-graphs", action="store_true", help="the project's steps from CUDA graphs")
    parser.add_argument("--json", metavar="PATH", help="write rows, versions and device there as well")
    args = parser.parse_args(argv)
    cuda, start = args.device == "cuda", time.perf_counter()
    full, quick = (CUDA, CUDA_QUICK) if cuda else (CPU, CPU_QUICK)
    sizes = dict(zip(SIZES, quick if args.quick else full))
    b = SimpleNamespace(device=args.device, cuda=cuda, **sizes)
    ascend.cuda_graphs = args.cuda_graphs
    torch.manual_seed(0)
    b.matmul_rate = matmul_rate(b)
    resnets, wrn = ("resnet18", "resnet50")[:1 + cuda], ("wrn-28-10" if cuda else "wrn-10-2",)
    tasks = {cem_sup_rows: resnets, cem_unsup_rows: resnets, jeat_rows: wrn, binary_at_ebm_rows: resnets[-1:]}
    rows = [row for measure_rows, archs in tasks.items() for arch in archs for row in measure_rows(b, arch)]
    rows += metrics_rows(b)
    about = dict(device=torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
                 threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__,
                 torchvision=torchvision.__version__, seconds=round(time.perf_counter() - start, 1),
                 tflops=round(b.matmul_rate / 1e12, 4), matmul="bfloat16" if cuda else "float32",
                 cuda_graphs=ascend.cuda_graphs)
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "sizes": sizes, "rows": rows}, indent=1))
    print("Device {device}, {threads} threads, torch {torch}; a large {matmul} product: {tflops} TFLOP/s; "
          "measured in {seconds} s\n".format(**about))
    show(rows)
    print(NOTES.format(**sizes))


if __name__ == "__main__":
    main()
