"""CIFAR-10 samples judged by other classifiers: classifier scores, NEVER IS or FID.

    python tests/judge.py --data DIR SAMPLES.npz ... [--robust small-32|resnet18-half]
                          [--limit N] [--weights DIR] [--json]

prints a line per file; the word test in a file's place means the real test images. SAMPLES holds
arr_0, uint8 [N, 32, 32, 3] with N >= 10, and arr_1, labels [N], if made for classes.

By a net of cem_sup that was trained adversarially, its weights in .github/weights:

  share         of the samples that it puts into the class asked for
  distance      Frechet distance in its pooled features, those before the last layer, to the first
                20,000 train images; grows as N falls: compare at equal N, by the same judge
  counts        how many samples it puts into each class

Never judge a net by itself or by its own weights' other epochs, nor a net that began with them:
samples of the net in cem_sup_small-32.pt, and of nets that began with it, are judged by
resnet18-half, all others by small-32; their figures do not compare.

With --weights also by two public nets, trained without attack (test accuracy 0.93). They are fooled
by nets trained like them: where the eye and the first judge see noise, they see every class. DIR
holds resnet56-4bfd9763.th and resnet32-d509ac18.th (their sha256 stand below) of
https://github.com/akamaster/pytorch_resnet_cifar10/tree/master/pretrained_models

  acc56, acc32  share that ResNet-56 and ResNet-32 put into the class asked for
  cis           Inception Score's formula over the ten classes, in 1..10: p(y|x) is the mean of
                both nets', 5 splits
  cfd           as distance, in ResNet-56's 64 features
  diversity     mean distance of those features between two samples made for the same class
                (at most 1,000 of each), then over the classes that have two; 0: every class is
                one image, repeated

DIR of --data holds cifar-10-batches-py; the train images' statistics are kept beside it.
"""
import argparse
import hashlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cem_sup  # noqa: E402
import metrics  # noqa: E402
from samplers import in_range  # noqa: E402

ROBUST = {"small-32": "cem_sup_small-32.pt", "resnet18-half": "cem_sup_small.pt"}
SHA256 = {
    "resnet56-4bfd9763.th": "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
    "resnet32-d509ac18.th": "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
}


class Robust(nn.Module):
    """A net f of cem_sup, taken apart before its last layer."""

    def __init__(self, f):
        super().__init__()
        self.linear = f.net[-1]
        f.net[-1] = nn.Identity()
        self.pooled = f

    def forward(self, x):
        """uint8 [B, 3, 32, 32], on any device -> features [B, D] and logits [B, 10]."""
        features = self.pooled(x.to(self.linear.weight) / 255)
        return features, self.linear(features)


def load_robust(arch):
    """cem_sup's net with the repository's weights, in eval mode. OSError: they are not there."""
    path = ROOT / ".github" / "weights" / ROBUST[arch]
    f = cem_sup.make_model(arch)
    f.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net = Robust(f)
    net.weights_hash = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return net.eval()


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut that drops pixels and pads channels (option A)."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - channels_in) // 2  # on both sides

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        shortcut = x[:, :, ::self.stride, ::self.stride]
        return F.relu(h + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet(nn.Module):
    """He et al.'s CIFAR ResNet of 6n + 2 layers, under the names of the files' parameters."""

    def __init__(self, layers):
        super().__init__()
        n = (layers - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), *[Block(16, 16, 1) for _ in range(n - 1)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), *[Block(32, 32, 1) for _ in range(n - 1)])
        self.layer3 = nn.Sequential(Block(32, 64, 2), *[Block(64, 64, 1) for _ in range(n - 1)])
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        """uint8 [B, 3, 32, 32], on any device -> features [B, 64] and logits [B, 10]."""
        x = x.to(self.linear.weight) / 255
        mean = x.new_tensor([.485, .456, .406]).view(3, 1, 1)
        std = x.new_tensor([.229, .224, .225]).view(3, 1, 1)
        x = F.relu(self.bn1(self.conv1((x - mean) / std)))
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


def load_net(folder, name, layers):
    """The file's net in eval mode. OSError: absent; ValueError: not the public file."""
    content = Path(folder, name).read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{Path(folder, name)}: its sha256 is not the public file's")
    state = torch.load(Path(folder, name), map_location="cpu", weights_only=True)["state_dict"]
    net = ResNet(layers)
    net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    net.weights_hash = SHA256[name][:8]
    return net.eval()


def cifar10(data, train):
    try:
        return CIFAR10(data, train)
    except RuntimeError as e:
        raise OSError(f"no CIFAR-10 in --data {data}, or a damaged one") from e


def load_samples(path, data):
    """uint8 [N, 3, 32, 32] and int64 labels [N], or None where the file has none."""
    if path == "test":
        test = cifar10(data, train=False)
        return torch.from_numpy(test.data).permute(0, 3, 1, 2), torch.tensor(test.targets)
    arrays = metrics.read_npz(path, ["arr_0", "arr_1"], ["arr_0"])
    images = metrics.as_images(path, arrays["arr_0"])
    if "arr_1" not in arrays:
        return images, None
    labels = arrays["arr_1"]
    if labels.shape != (len(images),) or not np.isin(labels, np.arange(10)).all():
        raise ValueError(f"{path}: arr_1 must be {len(images)} labels in 0..9")
    return images, torch.from_numpy(labels.astype(np.int64))


def train_statistics(net, data):
    """mu [D], sigma [D, D] of net's features of the first 20,000 train images. Kept in the folder
    data, for a CPU needs minutes; one that is damaged, or cannot be kept, costs only those."""
    kept = Path(data, f"cifar10-train-20000-{net.weights_hash}.npz")
    if kept.exists():
        try:
            return read_statistics(kept, net.linear.in_features)
        except ValueError as e:
            print(f"judge.py: {e}: computed anew", file=sys.stderr)
    images = torch.from_numpy(cifar10(data, train=True).data[:20000]).permute(0, 3, 1, 2)
    features, _ = metrics.extract_features(images, net, label="CIFAR-10 train")
    mu, sigma = metrics.gaussian_statistics(features.cpu())
    unfinished = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, mu=mu.numpy(), sigma=sigma.numpy())
        os.replace(unfinished, kept)
    except OSError as e:
        print(f"judge.py: {kept} is not kept: {e}", file=sys.stderr)
        with suppress(OSError):
            unfinished.unlink()
    return mu, sigma


def read_statistics(path, d):
    """mu [d], sigma [d, d]. ValueError: not readable, of another shape, or not finite."""
    arrays = metrics.read_npz(path, ["mu", "sigma"])
    try:
        mu, sigma = metrics.as_gaussian(arrays["mu"], arrays["sigma"])
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    if len(mu) != d:
        raise ValueError(f"{path}: of {len(mu)} features, not {d}")
    return mu, sigma


def judge(images, labels, net, reference):
    """The robust judge's figures of uint8 [N, 3, 32, 32] and labels [N] or None, as a dict.

    reference: mu [D] and sigma [D, D]. Without labels no share.
    """
    features, logits = metrics.extract_features(images, net, label="robust judge")
    seen = logits.argmax(1).cpu()
    figures = {
        "distance": metrics.frechet_distance(*metrics.gaussian_statistics(features), *reference),
        "counts": seen.bincount(minlength=10).tolist()}
    if labels is not None:
        figures["share"] = (seen == labels).double().mean().item()
    return figures


def judge_by_public_nets(images, labels, net56, net32, reference):
    """The figures of --weights, likewise; reference: mu [64] and sigma [64, 64]."""
    features, logits56 = metrics.extract_features(images, net56, label="ResNet-56")
    _, logits32 = metrics.extract_features(images, net32, label="ResNet-32")
    features, logits56, logits32 = features.cpu(), logits56.cpu(), logits32.cpu()
    figures = {
        "cis": classifier_score(logits56, logits32),
        "cfd": metrics.frechet_distance(*metrics.gaussian_statistics(features), *reference)}
    if labels is not None:
        figures["acc56"] = (logits56.argmax(1) == labels).double().mean().item()
        figures["acc32"] = (logits32.argmax(1) == labels).double().mean().item()
        figures["diversity"] = diversity(features, labels)
    return figures


def classifier_score(logits56, logits32, splits=5):
    """exp(mean KL(p(y|x) || p(y))), the mean over splits; p is the mean of both nets' [N, 10]."""
    log_p = torch.stack([logits56, logits32]).double().log_softmax(2)
    log_p = log_p.logsumexp(0)  # up to a constant, which inception_score takes out
    order = torch.randperm(len(log_p), generator=torch.Generator().manual_seed(0))
    parts = log_p[order].tensor_split(splits)
    return float(np.mean([metrics.inception_score(part, splits=1)[0] for part in parts]))


def diversity(features, labels, most=1000):
    """Mean distance of two samples with the same label, over the classes; None: no such two."""
    means = []
    for label in labels.unique():
        distances = torch.pdist(features[labels == label][:most].double())
        if len(distances) > 0:
            means.append(distances.mean().item())
    return float(np.mean(means)) if means else None


def table_row(figures, columns):
    cells = []
    for column in columns:
        value = figures.get(column)
        if value is None:
            value = "-"
        elif isinstance(value, float):
            value = f"{value:.3f}"
        cells.append(f"{value:>10}")
    counts = " ".join(str(count) for count in figures["counts"])
    return f"{''.join(cells)}  {figures['file']}  ({counts})"


def main(argv=None):
    parser = argparse.ArgumentParser("judge.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"judge.py: error: {message}\n")
    add = parser.add_argument
    add("samples", nargs="+", metavar="SAMPLES")
    add("--data", required=True, metavar="DIR")
    add("--robust", default="small-32", choices=ROBUST, help="the judge (default: small-32)")
    add("--limit", type=in_range(int, 10), metavar="N", help="only the first N of each file")
    add("--weights", metavar="DIR", help="two public nets judge, too")
    add("--json", action="store_true", help="lines of JSON instead of a table")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = ["n", "share", "distance"]
    try:
        samples = [load_samples(path, args.data) for path in args.samples]
        robust = load_robust(args.robust).to(device)
        if args.weights is not None:
            columns += ["acc56", "acc32", "cis", "cfd", "diversity"]
            net56 = load_net(args.weights, "resnet56-4bfd9763.th", 56).to(device)
            net32 = load_net(args.weights, "resnet32-d509ac18.th", 32).to(device)
            reference56 = train_statistics(net56, args.data)
        reference = train_statistics(robust, args.data)
        if not args.json:
            heads = "".join(f"{column:>10}" for column in columns)
            print(f"{heads}  file  (counts by {args.robust})")
        for path, (images, labels) in zip(args.samples, samples):
            images = images[:args.limit]
            if labels is not None:
                labels = labels[:args.limit]
            figures = {"file": path, "robust": args.robust, "n": len(images)}
            figures.update(judge(images, labels, robust, reference))
            if args.weights is not None:
                figures.update(judge_by_public_nets(images, labels, net56, net32, reference56))
            print(json.dumps(figures) if args.json else table_row(figures, columns), flush=True)
    except (OSError, ValueError) as e:
        parser.error(e)


if __name__ == "__main__":
    main()
