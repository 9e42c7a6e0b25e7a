"""CIFAR-10 samples judged by two public classifiers: classifier scores, NEVER IS or FID.

    python tests/judge.py --data DIR --weights DIR SAMPLES.npz ... [--json]

prints a line per file; the word test in a file's place means the 10,000 real test images. SAMPLES
holds arr_0, uint8 [N, 32, 32, 3] with N >= 10, and arr_1, labels [N], if made for classes.

  acc56, acc32  share that ResNet-56 and ResNet-32 put into the class asked for. Noise-like samples
                can fool one net, seldom both: so quote both
  cis           Inception Score's formula over the ten classes, in 1..10: p(y|x) is the mean of
                both nets', 5 splits
  cfd           Frechet distance in ResNet-56's 64 pooled features to the first 20,000 train images
  diversity     mean distance of those features between two samples made for the same class
                (at most 1,000 of each), then over the classes; 0: a class is one image
  hit, counts   how many classes ResNet-56 sees, and how many samples in each

The nets were trained without attack (test accuracy 0.93). DIR of --data holds cifar-10-batches-py,
DIR of --weights resnet56-4bfd9763.th and resnet32-d509ac18.th (their sha256 stand below) of
https://github.com/akamaster/pytorch_resnet_cifar10/tree/master/pretrained_models
"""
import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import metrics  # noqa: E402

SHA256 = {
    "resnet56-4bfd9763.th": "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
    "resnet32-d509ac18.th": "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
}


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


def train_statistics(net56, data):
    """mu [64], sigma [64, 64] of the first 20,000 train images; kept, as a CPU needs minutes."""
    kept = Path(tempfile.gettempdir(), "judge-cifar10-train-20000-resnet56-4bfd9763.npz")
    if kept.exists():
        arrays = metrics.read_npz(kept, ["mu", "sigma"])
        return arrays["mu"], arrays["sigma"]
    images = torch.from_numpy(cifar10(data, train=True).data[:20000]).permute(0, 3, 1, 2)
    features, _ = metrics.extract_features(images, net56, label="CIFAR-10 train")
    mu, sigma = metrics.gaussian_statistics(features.cpu())
    unfinished = kept.with_suffix(f".{os.getpid()}.npz")
    np.savez(unfinished, mu=mu.numpy(), sigma=sigma.numpy())
    os.replace(unfinished, kept)
    return mu, sigma


def judge(images, labels, net56, net32, reference):
    """The docstring's figures, of uint8 [N, 3, 32, 32] and labels [N] or None, as a dict.

    reference: mu [64] and sigma [64, 64].
    """
    features, logits56 = metrics.extract_features(images, net56, label="ResNet-56")
    _, logits32 = metrics.extract_features(images, net32, label="ResNet-32")
    features, logits56, logits32 = features.cpu(), logits56.cpu(), logits32.cpu()
    counts = logits56.argmax(1).bincount(minlength=10)
    figures = {
        "n": len(images), "cis": classifier_score(logits56, logits32),
        "cfd": metrics.frechet_distance(*metrics.gaussian_statistics(features), *reference),
        "hit": int((counts > 0).sum()), "counts": counts.tolist()}
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


COLUMNS = ["n", "acc56", "acc32", "cis", "cfd", "diversity", "hit"]


def table_row(figures):
    cells = []
    for column in COLUMNS:
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
    parser.add_argument("samples", nargs="+", metavar="SAMPLES")
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--weights", required=True, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of a table")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        samples = [load_samples(path, args.data) for path in args.samples]
        net56 = load_net(args.weights, "resnet56-4bfd9763.th", 56).to(device)
        net32 = load_net(args.weights, "resnet32-d509ac18.th", 32).to(device)
        reference = train_statistics(net56, args.data)
        if not args.json:
            print("".join(f"{name:>10}" for name in COLUMNS) + "  file  (counts)")
        for path, (images, labels) in zip(args.samples, samples):
            figures = {"file": path}
            figures.update(judge(images, labels, net56, net32, reference))
            print(json.dumps(figures) if args.json else table_row(figures), flush=True)
    except (OSError, ValueError) as e:
        parser.exit(2, f"judge.py: error: {e}\n")


if __name__ == "__main__":
    main()
