"""Inception Score (IS) and Frechet Inception Distance (FID) of CIFAR-10 samples.

    python metrics.py SAMPLES.npz ... [--data ./data] [--reference PATH]
                      [--inception-weights PATH] [--device cuda|cpu] [--batch-size 128]

prints a line of JSON per file. SAMPLES holds arr_0, uint8 [N, 32, 32, 3]; nothing else in it is
read. FID is taken against the 50,000 CIFAR-10 train images, whose statistics are computed once and
kept beside the data, or against --reference: an .npz with mu and sigma, or with images arr_0.

The semantics are those of the TensorFlow originals as torch-fidelity reproduces them:
- resize to 299 by TF1's bilinear rule (source = target * in / out: no half-pixel shift, no
  antialiasing), then (x - 128) / 128. pytorch-fid uses F.interpolate, whose grid is up to half a
  source pixel away;
- the network is TF's of 2015-12-05 in pytorch-fid's conversion. Unlike torchvision's Inception-v3
  it has 1008 classes, average pools that leave the padding out of the mean, a max pool in
  Mixed_7c, and no auxiliary head;
- IS: softmax of all 1008 logits, the last layer's bias left out, shuffle by RandomState(2020), 10
  splits, and the population std over them;
- the network runs in true float32 (no TF32, no bfloat16), statistics and scores in float64.

torch-fidelity's own tests, against which this can be checked with the weights at hand: IS of
CIFAR-10 train 11.2368 +- 0.0951; FID 10.3233 between 5,000 train and 5,000 test images, each
np.random.RandomState(2020).choice(len(set), 5000, replace=False); IS of that train subset, in
ascending index order before the shuffle, 10.7505 +- 0.5779.
"""
import argparse
import contextlib
import hashlib
import json
import os
import socket
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from torchvision.models import inception

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_HASH = "6726825d"  # the file's sha256 begins so
SPLITS = 10
BATCH_SIZE = 128
TOO_FEW = "no more images than features: a singular covariance, and too high a FID"
ROUNDING = 1e-4  # a foreign sigma, made in float32, may be off by this share of its largest value


class Refused(ValueError):
    """A file, folder or data set that the user gave cannot be used, or has no finite score."""


# ================================================================ the scores
def inception_score(logits, splits=SPLITS, seed=2020):
    """exp(mean over x of KL(p(y|x) || p(y))) of logits [N, K] (Salimans et al., 2016), in [1, K].

    Returns mean and population std over `splits` parts of the shuffled rows. ValueError: splits not
    in 1 ... N, or logits whose log-probabilities are not finite.
    """
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"the IS in {splits} splits needs at least {splits} images, got {n}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n))
    log_p = logits.double().log_softmax(1)[order.to(logits.device)]
    check_finite(log_p, "log-probabilities")
    scores = []
    for i in range(splits):
        log_p_yx = log_p[i * n // splits:(i + 1) * n // splits]
        # the mean over x of p(y|x), in logarithms, for p(y|x) may underflow
        log_p_y = log_p_yx.logsumexp(0) - np.log(len(log_p_yx))
        kl = (log_p_yx.exp() * (log_p_yx - log_p_y)).sum(1)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def gaussian_statistics(features):
    """Mean [D] and covariance [D, D] (ddof 1) of features [N, D], in float64 on their device.

    ValueError: N < 2, or features that are not finite.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {len(features)}")
    x = features.double()
    check_finite(x, "features")
    covariance = torch.cov(x.T, correction=1)
    return x.mean(0), covariance.view(x.shape[1], x.shape[1])  # of one feature it is a scalar


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al., 2017), a float.

    Tensors or arrays mu [D], sigma [D, D]; computed in float64 on the CPU, the same for every
    device. ValueError: not finite, of the wrong shape, or sigma not a covariance.
    """
    mu1, sigma1 = as_gaussian(mu1, sigma1)
    mu2, sigma2 = as_gaussian(mu2, sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"the two are of {len(mu1)} and {len(mu2)} features")
    # With S = R R^T and M = R1^T R2, the nonzero eigenvalues of S1 S2 are those of M M^T, the
    # squared singular values of M. So tr (S1 S2)^(1/2) is the sum of M's singular values.
    root1 = covariance_root(sigma1)
    root2 = covariance_root(sigma2)
    trace = torch.linalg.svdvals(root1.T @ root2).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    if not distance.isfinite():
        raise Refused("the distance of the two overflows")
    return distance.item()


def covariance_root(sigma):
    """R [D, r] with R R^T = sigma, float64 [D, D] symmetric of rank r. ValueError: an eigenvalue
    that is negative by more than rounding."""
    values, vectors = torch.linalg.eigh(sigma)  # ascending
    largest = values.abs().max()
    if values[0] < -ROUNDING * largest:
        raise ValueError(f"sigma is no covariance: it has the eigenvalue {values[0]:.2g}")
    # Eigenvalues that are only rounding are dropped: the root would turn 1e-16 into 1e-8.
    threshold = len(sigma) * torch.finfo(torch.float64).eps * largest
    kept = values > threshold
    return vectors[:, kept] @ values[kept].sqrt().diag()  # V sqrt(Lambda)


def as_gaussian(mu, sigma):
    """mu [D] and sigma [D, D], tensors or arrays of reals, in float64, sigma made symmetric.

    ValueError: of the wrong shape or type, not finite, or sigma not symmetric up to rounding.
    """
    mu = as_float64(mu)
    sigma = as_float64(sigma)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or len(mu) == 0:
        shapes = f"{list(mu.shape)} and {list(sigma.shape)}"
        raise ValueError(f"mu and sigma must be of shapes [D] and [D, D], are {shapes}")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError("mu and sigma must be finite")
    asymmetry = (sigma - sigma.T).abs().max()
    largest = sigma.abs().max()
    if asymmetry > ROUNDING * largest:
        raise ValueError(f"sigma must be symmetric: off by {asymmetry:.2g} of {largest:.2g}")
    return mu, (sigma + sigma.T) / 2


def as_float64(a):
    """A tensor or array of reals as a float64 tensor on the CPU."""
    a = a.numpy(force=True) if isinstance(a, torch.Tensor) else np.asarray(a)
    if a.dtype.kind not in "fiu":
        raise ValueError(f"mu and sigma must be real numbers, are {a.dtype}")
    return torch.tensor(a.astype(np.float64))  # big-endian and long double arrays too


def check_finite(rows, what):
    bad = int((~rows.isfinite().all(1)).sum())
    if bad > 0:
        raise Refused(f"the {what} of {bad} of {len(rows)} images are not finite")


# ================================================================ the network
def resize_tf1(x, size=299):
    """TF1's bilinear resize: float [B, C, H, W] -> [B, C, size, size], in x's range and dtype."""
    rows = tf1_weights(x.shape[2], size, x.device).to(x.dtype)
    columns = tf1_weights(x.shape[3], size, x.device).to(x.dtype)
    return rows @ x @ columns.T


def tf1_weights(n, size, device):
    """[size, n], float64: row i interpolates between the neighbours of i * n / size among n."""
    source = torch.arange(size, dtype=torch.float64, device=device) * n / size
    source = source.clamp(max=n - 1)  # beyond the last pixel, that pixel
    distance = (source[:, None] - torch.arange(n, device=device)).abs()
    return (1 - distance).clamp(min=0)  # linear, zero from a distance of one pixel on


def avg_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(inception.InceptionA):
    def _forward(self, x):
        a = self.branch5x5_2(self.branch5x5_1(x))
        b = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), a, b, self.branch_pool(avg_pool(x))]


class InceptionC(inception.InceptionC):
    def _forward(self, x):
        a = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        b = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        b = self.branch7x7dbl_5(self.branch7x7dbl_4(b))
        return [self.branch1x1(x), a, b, self.branch_pool(avg_pool(x))]


class InceptionE(inception.InceptionE):
    pool = staticmethod(avg_pool)  # Mixed_7c has max_pool instead

    def _forward(self, x):
        a = self.branch3x3_1(x)
        b = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x), self.branch3x3_2a(a), self.branch3x3_2b(a),
                self.branch3x3dbl_3a(b), self.branch3x3dbl_3b(b), self.branch_pool(self.pool(x))]


class InceptionV3(inception.Inception3):
    """The FID Inception in float32, random weights, torchvision's parameter names; for eval()."""

    def __init__(self):
        blocks = [inception.BasicConv2d, InceptionA, inception.InceptionB, InceptionC,
                  inception.InceptionD, InceptionE, inception.InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=blocks,
                         init_weights=False)
        self.Mixed_7c.pool = max_pool
        self.float()  # whatever torch's default dtype is

    def forward(self, x):
        """uint8 [B, 3, H, W] on any device -> pool3 [B, 2048], logits [B, 1008] without bias."""
        x = x.to(self.fc.weight)  # its device and dtype
        x = (resize_tf1(x) - 128) / 128
        # the children in the order of use: stem, Mixed_5b ... 7c, average pool; last dropout and fc
        for block in list(self.children())[:-2]:
            x = block(x)
        pool3 = x.flatten(1)
        return pool3, pool3 @ self.fc.weight.T


def load_inception(path=None, device="cpu"):
    """The network with the FID weights, in eval mode; `.weights_hash`: 8 digits of their sha256.

    Default: torch.hub's cached copy, downloaded where there is none, and checked. A path to a file
    with another hash only warns. OSError: no such file, or no download. Refused: damaged.
    """
    default = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)
    if path is None:
        path = default
        if not default.exists():
            default.parent.mkdir(parents=True, exist_ok=True)
            with download_errors("the Inception weights", "give --inception-weights PATH"):
                torch.hub.download_url_to_file(WEIGHTS_URL, str(default), WEIGHTS_HASH,
                                               progress=on_a_terminal())
    path = Path(path)
    weights_hash = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    if path == default and weights_hash != WEIGHTS_HASH:
        raise Refused(f"{path} is damaged (its sha256 is wrong): delete it")
    net = InceptionV3()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # torch raises a dozen kinds, with pages of advice
        raise Refused(f"{path}: not a file of the FID Inception's weights, or damaged") from e
    if weights_hash != WEIGHTS_HASH:
        warn(f"{path}: not the FID weights: incomparable scores")
    net.weights_hash = weights_hash
    return net.eval().to(device)


# ================================================================ images to scores
def evaluate(images_uint8, reference, extract=None, batch_size=BATCH_SIZE, label=None):
    """IS and FID of images uint8 [N, 3, H, W], N >= 10, against reference (mu [D], sigma [D, D]).

    extract maps a uint8 batch [B, 3, H, W] to features [B, D] and logits [B, K]; default:
    Inception on the images' device. Returns a dict: n, is_mean, is_std, fid and, where N <= D, a
    warning. With a label, progress is shown. ValueError: not uint8, too few images, extract in
    training mode, its output or the reference not finite.
    """
    if extract is None:
        extract = load_inception(device=images_uint8.device)
    features, logits = extract_features(images_uint8, extract, batch_size, label)
    is_mean, is_std = inception_score(logits)
    fid = frechet_distance(*gaussian_statistics(features), *reference)
    result = {"n": len(features), "is_mean": is_mean, "is_std": is_std, "fid": fid}
    if len(features) <= features.shape[1]:
        result["warning"] = TOO_FEW
    return result


def extract_features(images, extract, batch_size=BATCH_SIZE, label=None):
    """Features [N, D] and logits [N, K] of uint8 images [N, 3, H, W], on extract's device.

    Without gradients and in true float32, whatever the caller's settings. 50,000 images: 0.6 GB.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    if isinstance(extract, nn.Module) and any(m.training for m in extract.modules()):
        raise ValueError("extract, or a part of it, is in training mode: call its eval() first")
    batches = images.split(batch_size)
    if label is not None:
        batches = progress(batches, label)
    all_features, all_logits = [], []
    with true_float32(), torch.inference_mode():
        for batch in batches:
            features, logits = extract(batch)
            if not len(features) == len(logits) == len(batch):
                raise ValueError(f"extract gave {len(features)} features, {len(logits)} logits for "
                                 f"{len(batch)} images")
            all_features.append(features)
            all_logits.append(logits)
    return torch.cat(all_features), torch.cat(all_logits)


@contextlib.contextmanager
def true_float32():
    """Full float32: no TF32, no bfloat16 products, no autocast, float32 as the default dtype.

    torch has an old and a new family of switches (docs: notes/cuda, "TensorFloat-32"). Reading an
    old one raises where the new ones contradict it, so both families are set here, alike. Setting
    an old one changes new ones, so that on exit the old are restored first, the new ones last.
    """
    backends = torch.backends
    switches = [backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn,
                backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv,
                backends.mkldnn.rnn]
    # A switch left at "none" reads as its parent's value. Parents come first here, and each is set
    # to "none" once read: so every switch shows its own value, to which it is restored.
    before = []
    for switch in switches:
        before.append(switch.fp32_precision)
        switch.fp32_precision = "none"
    matmul = torch.get_float32_matmul_precision()
    try:
        cudnn = backends.cudnn.allow_tf32
    except RuntimeError:  # it contradicts the new ones, which, all at "none", say no TF32
        cudnn = True
    dtype = torch.get_default_dtype()
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for switch in switches:
            switch.fp32_precision = "ieee"
        torch.set_default_dtype(torch.float32)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        backends.cudnn.allow_tf32 = cudnn
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision
        torch.set_default_dtype(dtype)


def progress(batches, label):
    """Yield the batches and say on stderr how far it is, how fast, and how long it will take.

    On a terminal the line rewrites itself; elsewhere there is one every 30 s and at the end.
    """
    total = sum(len(batch) for batch in batches)
    begun = said = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.monotonic()
        rate = done / max(now - begun, 1e-3)  # a coarse clock may stand still
        left = (total - done) / rate
        line = f"{label}: {done:,}/{total:,} images, {rate:,.0f}/s, {left:,.0f} s left"
        if on_a_terminal():
            say(f"\r{line}\x1b[K", end="" if done < total else "\n")
        elif done == total or now - said > 30:
            say(line)
            said = now


# ================================================================ files
def score(paths, data="./data", reference=None, weights=None, device="cpu", batch_size=BATCH_SIZE):
    """Yield, for each .npz in paths as soon as it is scored, evaluate's dict with `file` and
    `weights`, the hash of the Inception weights. reference and weights: paths, or None for the
    defaults.

    OSError, Refused: something is absent, damaged or of no use; the text is one line.
    """
    samples = [load_images(path) for path in paths]  # all are checked before anything takes time
    net = load_inception(weights, device)
    statistics = load_reference(reference, net, data, batch_size)
    for path, images in zip(paths, samples):
        result = evaluate(images, statistics, net, batch_size, str(path))
        yield {"file": str(path), **result, "weights": net.weights_hash}


def load_images(path):
    """uint8 [N, 3, 32, 32] from arr_0, uint8 [N, 32, 32, 3] with N >= 10, of an .npz file."""
    return as_images(path, read_npz(path, ["arr_0"])["arr_0"])


def as_images(path, x):
    """The array x as a tensor uint8 [N, 3, 32, 32]. Refused names the file."""
    if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or len(x) < SPLITS:
        wanted = f"uint8 [N, 32, 32, 3] with N >= {SPLITS}"
        raise Refused(f"{path}: arr_0 must be {wanted}, is {x.dtype} {list(x.shape)}")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def load_reference(path, net, data, batch_size=BATCH_SIZE):
    """mu [2048] and sigma [2048, 2048] of the .npz at path, which holds them or images, or of
    CIFAR-10's train set."""
    if path is None:
        return cifar10_statistics(net, data, batch_size)
    arrays = read_npz(path, ["mu", "sigma"], ["arr_0"])
    if "mu" in arrays:
        return as_statistics(path, arrays)
    images = as_images(path, arrays["arr_0"])
    features, _ = extract_features(images, net, batch_size, "reference")
    if len(features) <= features.shape[1]:
        warn(f"{path}: {TOO_FEW}")
    return gaussian_statistics(features)


def cifar10_statistics(net, data, batch_size=BATCH_SIZE):
    """mu and sigma of the 50,000 train images, kept in the folder data under net.weights_hash."""
    cache = Path(data, f"cifar10-train-inception-{net.weights_hash}.npz")
    if cache.exists():
        try:
            return as_statistics(cache, read_npz(cache, ["mu", "sigma"]))
        except Refused as e:
            raise Refused(f"{e}: delete this file, it will be computed again") from e
    images = cifar10_train(data)
    features, _ = extract_features(images, net, batch_size, "CIFAR-10 train")
    mu, sigma = gaussian_statistics(features)
    unfinished = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, mu=mu.numpy(force=True), sigma=sigma.numpy(force=True))
        os.replace(unfinished, cache)
    except OSError as e:  # a read-only or full folder must not cost the result
        warn(f"the reference was not kept ({one_line(e)})")
    finally:
        unfinished.unlink(missing_ok=True)
    return mu, sigma


def cifar10_train(data):
    """The train images, uint8 [50000, 3, 32, 32], downloaded where the folder is absent. An
    incomplete or damaged folder is refused, and stays."""
    folder = Path(data, CIFAR10.base_folder)
    if not folder.exists():
        advice = f"put {CIFAR10.base_folder} into --data, or give --reference"
        with download_errors("CIFAR-10", advice):
            CIFAR10(data, download=True)
    files = [*CIFAR10.train_list, *CIFAR10.test_list]
    files.append((CIFAR10.meta["filename"], CIFAR10.meta["md5"]))
    bad = [name for name, md5 in files if not check_integrity(folder / name, md5)]
    if bad:
        raise Refused(f"{', '.join(bad)} in {folder}: missing or damaged: delete the folder")
    return torch.from_numpy(CIFAR10(data).data).permute(0, 3, 1, 2).contiguous()


def as_statistics(path, arrays):
    """Checked mu [2048] and sigma [2048, 2048], float64 tensors. Refused names the file."""
    try:
        mu, sigma = as_gaussian(arrays["mu"], arrays["sigma"])
        covariance_root(sigma)  # raises here, not after the features of the first file
    except ValueError as e:
        raise Refused(f"{path}: {e}") from e
    if len(mu) != 2048:
        raise Refused(f"{path}: mu and sigma must be of 2048 features, are of {len(mu)}")
    return mu, sigma


def read_npz(path, *choices):
    """{name: array} of the first choice, a list of names, of which the .npz holds all."""
    with open(path, "rb") as file:
        begins = file.read(16)
        if not zipfile.is_zipfile(file):
            raise Refused(f"{path}: not an .npz file, or a part of one: it begins with {begins}")
    try:
        with np.load(path, allow_pickle=False) as npz:
            for names in choices:
                if all(name in npz.files for name in names):
                    return {name: npz[name] for name in names}
            found = npz.files
    except Exception as e:  # numpy and zipfile raise a dozen kinds
        raise Refused(f"{path}: not a readable .npz file ({one_line(e)})") from e
    wanted = ", or ".join(" and ".join(names) for names in choices)
    raise Refused(f"{path}: must hold {wanted}; holds {', '.join(found[:9]) or 'nothing'}")


@contextlib.contextmanager
def download_errors(what, advice):
    """Around a download: 10 s of silence end it, every failure is an OSError with the advice."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        yield
    except Exception as e:
        raise OSError(f"cannot download {what} ({one_line(e)}): {advice}") from e
    finally:
        socket.setdefaulttimeout(before)


def on_a_terminal():
    """Whether stderr is a terminal; it may be None, closed, or any object that takes text."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def say(text, end="\n"):
    """Text to stderr, letters that it lacks escaped; none, a closed or a full one costs nothing."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding) + end)
        sys.stderr.flush()


def warn(message):
    say(f"metrics.py: warning: {message}")


def stop(message, code=2):
    say(f"metrics.py: {message}")
    sys.exit(code)


def put_out(line):
    """To stdout at once; to stderr, and the end, where stdout is None, full or closed."""
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError) as e:
        say(line, end="")
        stop(f"error: stdout took no result ({e})")


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]


# ================================================================ the command
def main(argv=None):
    parser = argparse.ArgumentParser("metrics.py", description="IS and FID of CIFAR-10 samples.",
                                     allow_abbrev=False)
    parser.error = lambda message: stop(f"error: {message}")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add = parser.add_argument
    add("samples", nargs="+", metavar="SAMPLES", help=".npz with arr_0, uint8 [N, 32, 32, 3]")
    path = os.path.expanduser
    add("--data", type=path, default="./data",
        help="folder of cifar-10-batches-py, downloaded if absent")
    add("--reference", type=path,
        help=".npz with mu and sigma, or with arr_0 (default: CIFAR-10 train)")
    add("--inception-weights", type=path, help="(default: torch.hub's cache, downloaded if absent)")
    add("--device", choices=devices, default=devices[0], help="(default: %(default)s)")
    add("--batch-size", type=int, default=BATCH_SIZE, help="(default: %(default)s images)")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, is {args.batch_size}")
    try:
        for result in score(args.samples, args.data, args.reference, args.inception_weights,
                            args.device, args.batch_size):
            if "warning" in result:
                warn(f"{result['file']}: {result['warning']}")
            put_out(json.dumps(result) + "\n")
    except (OSError, Refused) as e:
        stop(f"error: {e}")
    except (MemoryError, RuntimeError) as e:  # torch raises RuntimeErrors
        words = "out of memory", "allocate memory", "ALLOC_FAILED"
        if isinstance(e, RuntimeError) and not any(word in str(e) for word in words):
            raise
        stop(f"error: out of memory ({one_line(e)}): try a smaller --batch-size")
    except KeyboardInterrupt:
        stop("interrupted", 130)


if __name__ == "__main__":
    main()
