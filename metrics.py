"""Inception Score (IS) and Frechet Inception Distance (FID) of CIFAR-10 samples, a JSON line per file.

    python metrics.py SAMPLES.npz ... [--data ./data] [--reference PATH] [--inception-weights PATH]

SAMPLES holds arr_0, uint8 [N, 32, 32, 3]. FID is taken against the 50,000 CIFAR-10 train images, whose
statistics are computed once and kept beside the data, or against an .npz with mu and sigma, or with images.

The semantics are those of the TensorFlow originals as torch-fidelity reproduces them:
- resize to 299 by TF1's bilinear rule (source = target * in / out: no half-pixel shift, no antialiasing),
  then (x - 128) / 128. pytorch-fid uses F.interpolate, whose grid is up to half a source pixel away;
- the network is TF's of 2015-12-05 in pytorch-fid's conversion. Unlike torchvision's Inception-v3 it has 1008
  classes, average pools that leave the padding out of the mean, a max pool in Mixed_7c, and no aux head;
- IS: softmax of all 1008 logits without bias, shuffle by RandomState(2020), 10 splits, population std;
- the network runs in true float32 (no TF32, no autocast), statistics and scores in float64."""
import argparse
import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.models import inception

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_HASH = "6726825d"  # the file's sha256 begins so
SPLITS = 10

avg_pool = partial(nn.functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(nn.functional.max_pool2d, kernel_size=3, stride=1, padding=1)


def resize_tf1(x, size=299):
    """TF1 bilinear (legacy, align_corners=False): float [B, C, H, W] -> [B, C, size, size], in x's range."""
    def weights(n):  # [size, n], rows sum to 1
        source = torch.arange(size, dtype=torch.float64, device=x.device) * n / size
        distance = source.clamp(max=n - 1)[:, None] - torch.arange(n, device=x.device)
        return (1 - distance.abs()).clamp(min=0).to(x.dtype)
    return weights(x.shape[2]) @ x @ weights(x.shape[3]).T


class InceptionA(inception.InceptionA):
    def _forward(self, x):
        a, b = self.branch5x5_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch5x5_2(a), self.branch3x3dbl_3(b), self.branch_pool(avg_pool(x))]


class InceptionC(inception.InceptionC):
    def _forward(self, x):
        a = self.branch7x7_2(self.branch7x7_1(x))
        b = self.branch7x7dbl_4(self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x))))
        return [self.branch1x1(x), self.branch7x7_3(a), self.branch7x7dbl_5(b), self.branch_pool(avg_pool(x))]


class InceptionE(inception.InceptionE):  # Mixed_7b and Mixed_7c differ in their pool, set below
    def _forward(self, x):
        a, b = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(a), self.branch3x3_2b(a),
                self.branch3x3dbl_3a(b), self.branch3x3dbl_3b(b), self.branch_pool(self.pool(x))]


class InceptionV3(inception.Inception3):
    """The FID Inception with random weights; torchvision's parameter names. To be used in eval mode."""

    def __init__(self):
        blocks = [inception.BasicConv2d, InceptionA, inception.InceptionB, InceptionC, inception.InceptionD,
                  InceptionE, inception.InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7b.pool, self.Mixed_7c.pool = avg_pool, max_pool

    def forward(self, x):
        """uint8 [B, 3, H, W], on any device -> pool3 [B, 2048] and logits [B, 1008] without bias, float32."""
        *blocks, _dropout, fc = self.children()  # torchvision registers them in the order of the forward pass
        x = (resize_tf1(x.to(fc.weight)) - 128) / 128
        pool3 = nn.Sequential(*blocks)(x).flatten(1)
        return pool3, pool3 @ fc.weight.T


def load_inception(path=None, device="cpu"):
    """The network with the FID weights, in eval mode; `.weights_hash` is the file's sha256, first 8 digits.
    Default: torch.hub's cached copy, downloaded where there is none, and checked. Another file: a warning.
    OSError where the file is absent or cannot be downloaded, ValueError where it is broken."""
    default = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)
    path = Path(path or default)
    if path == default and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _download("the Inception weights", "give --inception-weights PATH"):
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_HASH, sys.stderr.isatty())
    net = InceptionV3()
    net.weights_hash = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # old files lack BatchNorm's counters, which eval mode does not read
        counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
        net.load_state_dict(counters | state)
    except Exception as e:  # torch.load raises a dozen kinds
        raise ValueError(f"{path}: not a file of Inception weights ({_one_line(e)})") from e
    if net.weights_hash != WEIGHTS_HASH:
        if path == default:
            raise ValueError(f"{path}: damaged (its sha256 is wrong): delete it, to download it again")
        print(f"metrics.py: warning: {path}: not the FID weights: incomparable scores", file=sys.stderr)
    return net.eval().to(device)


@contextlib.contextmanager
def _download(what, advice):
    """Ends a download that is silent for 10 s; turns every failure into one OSError that says what to do."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        yield
    except Exception as e:
        raise OSError(f"cannot download {what} ({_one_line(e)}): {advice}") from e
    finally:
        socket.setdefaulttimeout(before)


def _one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]


def inception_score(logits, splits=SPLITS, seed=2020):
    """exp(mean over x of KL(p(y|x) || p(y))) of logits [N, K] (Salimans et al., 2016), in [1, K]: mean and
    population std over `splits` parts of the shuffled rows. ValueError if N < splits."""
    n = len(logits)
    if n < splits:
        raise ValueError(f"the Inception Score in {splits} splits needs at least {splits} images, got {n}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n)).to(logits.device)
    log_p = logits[order].double().log_softmax(1)
    scores = []
    for i in range(splits):
        log_p_yx = log_p[i * n // splits:(i + 1) * n // splits]
        log_p_y = log_p_yx.logsumexp(0) - np.log(len(log_p_yx))  # finite where every p(y|x) underflows
        scores.append((log_p_yx.exp() * (log_p_yx - log_p_y)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def gaussian_statistics(features):
    """Mean [D] and covariance [D, D] of features [N, D] in float64. ValueError: N < 2, not finite."""
    x = features.double()
    if len(x) < 2 or not x.isfinite().all():
        raise ValueError(f"a covariance needs at least 2 rows, all finite; got {list(x.shape)}")
    return x.mean(0), torch.cov(x.T, correction=1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al., 2017) of tensors or arrays mu [D] and
    symmetric sigma [D, D], in float64 on mu1's device."""
    device = torch.as_tensor(mu1).device
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64, device=device)
                                for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2); eigenvalues below 0 are rounding
    trace = torch.linalg.eigvalsh(root1 @ sigma2 @ root1).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


@contextlib.contextmanager
def _exact(extract):
    """True float32 (no TF32, no autocast) and no gradients; everything as it was on exit."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    precision, autocast = (conv.fp32_precision, matmul.fp32_precision), partial(torch.autocast, enabled=False)
    if getattr(extract, "training", False):
        raise ValueError("extract is in training mode: call its eval() first")
    try:
        conv.fp32_precision = matmul.fp32_precision = "ieee"
        with torch.inference_mode(), autocast("cpu"), autocast("cuda"):
            yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = precision


def extract_features(images, extract, batch_size=128, label=None):
    """Features [N, D] and logits [N, K] of uint8 images [N, 3, H, W], on extract's device (50,000: 0.6 GB).
    With a label, progress goes to stderr. ValueError if the images are not uint8."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    outputs, n, started, tty = [], len(images), time.monotonic(), sys.stderr.isatty()
    with _exact(extract):
        for start in range(0, n, batch_size):
            outputs.append(extract(images[start:start + batch_size]))
            done = min(start + batch_size, n)  # shown at each step on a terminal, else ten times
            if label and (tty or 10 * done // n > 10 * start // n):
                rate = done / (time.monotonic() - started)
                line = f"{label}: {done:,}/{n:,} images, {rate:,.0f}/s, {(n - done) / rate:,.0f} s left"
                print(f"\r{line}\x1b[K" if tty else line, end="" if tty and done < n else "\n",
                      file=sys.stderr, flush=True)
    return tuple(map(torch.cat, zip(*outputs)))


def evaluate(images_uint8, reference, extract=None, batch_size=128, label=None):
    """IS and FID of uint8 images [N, 3, H, W] against reference (mu, sigma): n, is_mean, is_std, fid and,
    below 2,048 images, a warning. extract, in eval mode, maps a uint8 batch to (features, logits), without
    TF32 and autocast, both restored on exit. Default: Inception on the images' device."""
    extract = extract or load_inception(device=images_uint8.device)
    features, logits = extract_features(images_uint8, extract, batch_size, label)
    mean, std = inception_score(logits)
    fid = frechet_distance(*gaussian_statistics(features), *reference)
    n, warning = len(features), {"warning": "fewer than 2,048 images: singular covariance, biased FID"}
    return {"n": n, "is_mean": mean, "is_std": std, "fid": fid} | (warning if n < 2048 else {})


def _read_npz(path, *names):
    """Those of the named arrays that the .npz holds."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays}
    except Exception as e:  # numpy and zipfile raise a dozen kinds
        raise ValueError(f"{path}: not a readable .npz file ({_one_line(e)})") from e


def load_samples(path):
    """Images uint8 [N, 3, 32, 32] from arr_0; the array arr_1 of labels, or None. ValueError if the file is
    absent, broken or pickled, or the images are of another type or shape or fewer than IS has splits."""
    arrays = _read_npz(path, "arr_0", "arr_1")
    if "arr_0" not in arrays:
        raise ValueError(f"{path}: holds no array arr_0")
    x = arrays["arr_0"]
    if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or len(x) < SPLITS:
        raise ValueError(f"{path}: arr_0 must be uint8 [N, 32, 32, 3], N >= {SPLITS}; is {x.dtype} {x.shape}")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), arrays.get("arr_1")


def _statistics(path, arrays):
    mu, sigma = (arrays.get(name, np.empty(0)) for name in ("mu", "sigma"))
    if not (mu.shape == (2048,) and sigma.shape == (2048, 2048) and mu.dtype.kind == sigma.dtype.kind == "f"
            and np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T)):
        raise ValueError(f"{path}: must hold mu [2048] and a symmetric sigma [2048, 2048], finite floats")
    return torch.from_numpy(mu).double(), torch.from_numpy(sigma).double()


def _cifar10_train(data):
    """All train images, uint8 [50000, 3, 32, 32]; downloaded if absent, never over a damaged copy."""
    folder = Path(data, CIFAR10.base_folder)
    if not folder.exists():
        with _download("CIFAR-10", f"put {CIFAR10.base_folder} into --data, or give --reference PATH"):
            CIFAR10(data, download=True)
    try:
        images = CIFAR10(data).data
    except Exception as e:
        raise ValueError(f"{folder} is damaged ({_one_line(e)}): delete it, or name another --data") from e
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def reference_statistics(extract, weights_hash, data="./data", reference=None, batch_size=128):
    """(mu, sigma), float64, of `reference`, an .npz with them or with images, else of the 50,000 CIFAR-10
    train images through extract, kept in `data` under weights_hash. OSError, ValueError: missing, broken."""
    if reference is not None:
        arrays = _read_npz(reference, "mu", "sigma")
        if arrays:
            return _statistics(reference, arrays)
        images, _ = load_samples(reference)
        return gaussian_statistics(extract_features(images, extract, batch_size, "reference")[0])
    cache = Path(data, f"cifar10-train-inception-{weights_hash}.npz")
    if cache.exists():
        try:
            return _statistics(cache, _read_npz(cache, "mu", "sigma"))
        except ValueError as e:
            raise ValueError(f"{e}: delete this file, it will be computed again") from e
    images = _cifar10_train(data)
    mu, sigma = gaussian_statistics(extract_features(images, extract, batch_size, "CIFAR-10 train")[0])
    temporary = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, mu=mu.numpy(force=True), sigma=sigma.numpy(force=True))
        os.replace(temporary, cache)
    except OSError as e:  # a read-only folder must not cost the result
        print(f"metrics.py: warning: the reference was not kept ({_one_line(e)})", file=sys.stderr)
    return mu, sigma


def score(paths, data="./data", reference=None, weights=None, device="cpu", batch_size=128):
    """evaluate's dict, `file` and the hash of `weights` per file. OSError, ValueError: missing or broken."""
    samples = {str(path): load_samples(path)[0] for path in paths}
    net = load_inception(weights, device)
    statistics = reference_statistics(net, net.weights_hash, data, reference, batch_size)
    return [{"file": path, **evaluate(images, statistics, net, batch_size, path), "weights": net.weights_hash}
            for path, images in samples.items()]


def score_rows(rows, data, weights=None, device="cpu", never=False):
    """IS and FID into the rows {path of an .npz: dict} that lack them, or null with the reason, printed."""
    rows = {path: row for path, row in rows.items() if row.get("fid") is None}
    why = "never with --smoke" if never else "on a CPU only with --inception-weights PATH"
    scores = [dict.fromkeys(["is_mean", "is_std", "fid"])] * len(rows)
    try:
        if rows and not never and (weights or device != "cpu"):
            scores, why = score(rows, data, None, weights, device), None
    except (OSError, ValueError, torch.OutOfMemoryError) as e:
        why = str(e)
    if rows:
        later = f"no IS and FID ({why}); later: python metrics.py {' '.join(rows)} --data {data}"
        print(later if why else "\n".join(map(json.dumps, scores)))
    for row, values in zip(rows.values(), scores):
        row |= {**values, "reason": why}


def main(argv=None):
    parser = argparse.ArgumentParser("metrics.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"metrics.py: error: {message}\n")
    add = parser.add_argument
    add("samples", nargs="+", metavar="SAMPLES", help=".npz with arr_0, uint8 [N, 32, 32, 3]")
    add("--data", default="./data", help="CIFAR-10's folder; downloaded if absent (default: %(default)s)")
    add("--reference", help=".npz with mu and sigma, or with images (default: CIFAR-10 train)")
    add("--inception-weights", help="default: torch.hub's cache, downloaded if absent")
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] * torch.cuda.is_available()
    add("--device", choices=("cpu", *cuda), default=(*cuda, "cpu")[0], help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        for result in score(args.samples, args.data, args.reference, args.inception_weights, args.device):
            if "warning" in result:
                print(f"metrics.py: warning: {result['file']}: {result['warning']}", file=sys.stderr)
            print(json.dumps(result))
    except (OSError, ValueError) as e:
        parser.error(e)
    except KeyboardInterrupt:
        parser.exit(130, "metrics.py: interrupted\n")


if __name__ == "__main__":
    main()
