"""metrics.py on random weights and closed forms: no number here is an IS or an FID of anything."""
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import socket
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torchvision.models import inception_v3

import metrics


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


class Toy(torch.nn.Module):
    """In the network's place: 2,048 pixels are the features, 7 others the logits."""
    weights_hash = "0123abcd"

    def forward(self, x):
        x = x.flatten(1).double()
        return x[:, :2048], x[:, -7:] / 50


def small(x):  # few features, for a quick eigh
    features, logits = Toy()(x)
    return features[:, :16], logits


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def raised(e):
    raise e


# ---- resize ----

def tf1_loop(x, size):
    h, w = x.shape
    y = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            a, b = i * h / size, j * w / size
            top, left = int(a), int(b)
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            da, db = a - top, b - left
            y[i, j] = ((1 - da) * ((1 - db) * x[top, left] + db * x[top, right])
                       + da * ((1 - db) * x[bottom, left] + db * x[bottom, right]))
    return y


@pytest.mark.parametrize("h, w, size", [(32, 32, 299), (7, 12, 20), (12, 7, 5), (9, 9, 9)])
def test_resize_is_tf1_bilinear(h, w, size):
    x = 255 * torch.rand(1, 1, h, w, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(0))
    y = metrics.resize_tf1(x, size)
    np.testing.assert_allclose(y[0, 0], tf1_loop(x[0, 0].numpy(), size), atol=1e-10)
    np.testing.assert_allclose(metrics.resize_tf1(x.float(), size), y, atol=2e-4)  # float32, of 255
    if h == w == 32:  # the control: PyTorch's own
        other = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        assert (other - y).abs().max() > 10


# ---- the network ----

@pytest.fixture(scope="module")
def net():
    """Random in every tensor, activations of order 1, so that each detail reaches the output."""
    g = torch.Generator().manual_seed(0)
    net = metrics.InceptionV3()
    for name, p in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if p.ndim == 4:
            p.normal_(0, (2 / p[0].numel()) ** 0.5, generator=g)
        elif name.endswith(("running_var", "bn.weight")):
            p.uniform_(0.5, 1.5, generator=g)
        elif p.ndim == 1:
            p.normal_(0, 0.3, generator=g)
        else:
            p.normal_(0, 0.05, generator=g)
    return net.eval()


@pytest.fixture(scope="module")
def weights(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), path)
    return path


def functional_inception(p, x):
    """The FID Inception once more, from the TF graph's description: uint8 -> pool3, logits."""
    def conv(x, name, stride=1, pad="VALID"):
        w = p[f"{name}.conv.weight"]
        pad = (w.shape[2] // 2, w.shape[3] // 2) if pad == "SAME" else 0
        bn = [p[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, w, None, stride, pad), *bn, eps=1e-3).clamp(min=0)

    def chain(x, block, *names):
        for name in names:
            x = conv(x, f"{block}.{name}", pad="SAME")
        return x

    def numbered(x, block, name, last):
        return chain(x, block, *[f"{name}_{i}" for i in range(1, last + 1)])

    def mean3(x):  # the mean over those of 3 x 3 that lie inside
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    def max3(x):
        return F.max_pool2d(x, 3, 1, 1)

    def a(x, n):
        return torch.cat([chain(x, n, "branch1x1"), numbered(x, n, "branch5x5", 2),
                          numbered(x, n, "branch3x3dbl", 3), chain(mean3(x), n, "branch_pool")], 1)

    def c(x, n):
        return torch.cat([chain(x, n, "branch1x1"), numbered(x, n, "branch7x7", 3),
                          numbered(x, n, "branch7x7dbl", 5), chain(mean3(x), n, "branch_pool")], 1)

    def e(x, n, pool):
        u, v = chain(x, n, "branch3x3_1"), numbered(x, n, "branch3x3dbl", 2)
        return torch.cat([chain(x, n, "branch1x1"),
                          chain(u, n, "branch3x3_2a"), chain(u, n, "branch3x3_2b"),
                          chain(v, n, "branch3x3dbl_3a"), chain(v, n, "branch3x3dbl_3b"),
                          chain(pool(x), n, "branch_pool")], 1)

    x = np.stack([[tf1_loop(plane, 299) for plane in image] for image in x.double().numpy()])
    x = torch.from_numpy(x).float() / 128 - 1
    x = conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", pad="SAME"), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    x = a(a(a(x, "Mixed_5b"), "Mixed_5c"), "Mixed_5d")
    n = "Mixed_6a"
    x = torch.cat([conv(x, f"{n}.branch3x3", 2),
                   conv(numbered(x, n, "branch3x3dbl", 2), f"{n}.branch3x3dbl_3", 2),
                   F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(x, n)
    n = "Mixed_7a"
    x = torch.cat([conv(chain(x, n, "branch3x3_1"), f"{n}.branch3x3_2", 2),
                   conv(numbered(x, n, "branch7x7x3", 3), f"{n}.branch7x7x3_4", 2),
                   F.max_pool2d(x, 3, 2)], 1)
    pool3 = e(e(x, "Mixed_7b", mean3), "Mixed_7c", max3).mean((2, 3))
    return pool3, F.linear(pool3, p["fc.weight"])


def test_inception_equals_an_independent_forward(net):
    x, p = images(1), net.state_dict()
    with torch.inference_mode():
        pool3, logits = net(x)
        expected, expected_logits = functional_inception(p, x)
    assert pool3.shape == (1, 2048) and logits.shape == (1, 1008) and pool3.dtype == torch.float32
    assert pool3.std() > 0.1 and logits.std() > 0.1  # the comparison says something
    torch.testing.assert_close(pool3, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-3)
    assert (F.linear(pool3, p["fc.weight"], p["fc.bias"]) - logits).abs().max() > 0.1


def test_inception_has_the_published_keys_and_shapes(net):
    ours = {k: v.shape for k, v in net.state_dict().items()}
    theirs = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    assert ours == {k: v.shape for k, v in theirs.state_dict().items()}
    # 27,161,264 of Inception-v3 - auxiliary 3,326,696 - fc 2,049,000: its trunk
    assert sum(p.numel() for p in net.parameters()) == 21_785_568 + 2048 * 1008 + 1008
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def test_load_inception(net, weights, capsys, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {  # as before PyTorch 0.4.1
        k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")})
    loaded = metrics.load_inception(weights)
    assert not loaded.training and "not the FID weights" in capsys.readouterr().err
    for ours, theirs in zip(loaded.state_dict().values(), net.state_dict().values()):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(metrics, "WEIGHTS_HASH", loaded.weights_hash)
    metrics.load_inception(weights)
    assert capsys.readouterr().err == ""


class Malice:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["MALICE"],)


@pytest.mark.parametrize("state", [[1], {"fc.bias": torch.zeros(1008)}, {"fc.bias": Malice()}, "<!DOCTYPE html>"],
                         ids=["list", "incomplete", "malicious", "page"])
def test_foreign_weights_are_refused(tmp_path, monkeypatch, capsys, state):
    monkeypatch.setenv("MALICE", str(tmp_path / "touched"))
    if isinstance(state, str):
        (tmp_path / "weights.pth").write_text(state)
    else:
        torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(metrics.Refused, match=r"weights\.pth: not a file of the FID Inception's weights, or damaged$"):
        metrics.load_inception(tmp_path / "weights.pth")
    assert capsys.readouterr().err == "" and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("damage", ["half", "page", "zeros", "another net"])
def test_a_damaged_download_is_to_be_deleted(weights, tmp_path, monkeypatch, damage):
    cached = tmp_path / "checkpoints" / Path(metrics.WEIGHTS_URL).name
    cached.parent.mkdir()
    good = weights.read_bytes()
    cached.write_bytes({"half": good[:len(good) // 2], "page": b"<!DOCTYPE html>",
                        "zeros": bytes(1000), "another net": good}[damage])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(metrics.Refused, match=f"{cached} is damaged.*delete it"):
        metrics.load_inception()


def test_downloads_are_checked_and_end(tmp_path, monkeypatch):
    def offline(*args):
        assert socket.getdefaulttimeout() == 10
        raise urllib.error.URLError("no network")

    def download(url, path, hash_prefix, progress):
        assert url.endswith("6726825d.pth") and hash_prefix == "6726825d"
        offline()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(metrics.CIFAR10, "download", offline)
    before = socket.getdefaulttimeout()
    with pytest.raises(OSError, match="cannot download.*--inception-weights"):
        metrics.load_inception()
    with pytest.raises(OSError, match="cannot download.*--data"):
        metrics.cifar10_train(tmp_path)
    assert socket.getdefaulttimeout() == before


def test_cifar10_says_which_file_is_missing_or_damaged(tmp_path, monkeypatch):
    """A set in small: two images for training, one for testing."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def made(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()
    batches = [{"data": np.full((n, 3072), n, np.uint8), "labels": [0] * n} for n in (1, 2)]
    monkeypatch.setattr(metrics.CIFAR10, "train_list", [made("data_batch_1", batches[1])])
    monkeypatch.setattr(metrics.CIFAR10, "test_list", [made("test_batch", batches[0])])
    name, md5 = made("batches.meta", {"label_names": ["plane"]})
    monkeypatch.setattr(metrics.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    assert torch.equal(metrics.cifar10_train(tmp_path), torch.full((2, 3, 32, 32), 2, dtype=torch.uint8))
    (folder / "batches.meta").unlink()
    with pytest.raises(metrics.Refused, match=f"^batches.meta in {folder}: missing or damaged: delete the folder$"):
        metrics.cifar10_train(tmp_path)
    (folder / "data_batch_1").write_bytes(b"half a file")
    with pytest.raises(metrics.Refused, match="^data_batch_1, batches.meta in "):
        metrics.cifar10_train(tmp_path)


# ---- Frechet distance ----

def covariance(d, rank, rng):
    """sigma = a^T a and a [rank, d]: the trace of (S1 S2)^(1/2) is the nuclear norm of a1 a2^T."""
    a = rng.standard_normal((rank, d)) / rank ** 0.5
    return a.T @ a, a


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 12))
    s1, s2 = rng.uniform(0.1, 3, (2, 12))
    expected = ((mu1 - mu2) ** 2 + (s1 - s2) ** 2).sum()  # of standard deviations s1, s2
    q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    for q in (np.eye(12), q):  # and the same in another basis
        fid = metrics.frechet_distance(q @ mu1, (q * s1 ** 2) @ q.T, q @ mu2, (q * s2 ** 2) @ q.T)
        assert fid == pytest.approx(expected)
    sigma1, sigma2 = covariance(12, 30, rng)[0], covariance(12, 30, rng)[0]
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert metrics.frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("rank1, rank2", [(5, 7), (1, 30), (20, 40), (5, 5)])
@pytest.mark.parametrize("scale", [1, 1e-12])
def test_frechet_is_exact_below_full_rank_in_both_orders(rank1, rank2, scale):
    rng = np.random.default_rng(2)
    zero = np.zeros(40)
    (s1, a1), (s2, a2) = covariance(40, rank1, rng), covariance(40, rank2, rng)
    s1, s2 = scale * s1, scale * s2
    trace = scale * np.linalg.svd(a1 @ a2.T, compute_uv=False).sum()
    expected = np.trace(s1) + np.trace(s2) - 2 * trace
    assert metrics.frechet_distance(zero, s1, zero, s2) == pytest.approx(expected, rel=1e-12)
    assert metrics.frechet_distance(zero, s2, zero, s1) == pytest.approx(expected, rel=1e-12)
    nothing = np.zeros((40, 40))
    assert metrics.frechet_distance(zero, s1, zero, nothing) == pytest.approx(np.trace(s1))
    assert abs(metrics.frechet_distance(zero, s1, zero, s1)) < 1e-12 * np.trace(s1)


def test_images_against_themselves_are_at_distance_zero():
    def extract(x):
        features, logits = Toy()(x)
        return features[:, :500], logits
    mu, sigma = metrics.gaussian_statistics(extract(images(64))[0])
    assert abs(metrics.evaluate(images(64), (mu, sigma), extract)["fid"]) < 1e-12 * sigma.trace()


def test_foreign_covariances_are_symmetrised():
    """In float32, rounded on each side of the diagonal by itself; the exact value is known."""
    rng = np.random.default_rng(3)
    zero = np.zeros(100)
    (s1, a1), (s2, a2) = covariance(100, 20, rng), covariance(100, 30, rng)
    expected = np.trace(s1 + s2) - 2 * np.linalg.svd(a1 @ a2.T, compute_uv=False).sum()
    rounding = 1 + rng.uniform(-1, 1, s2.shape) * 2.0 ** -23
    foreign = (s2 * rounding).astype(np.float32)
    assert 0 < abs(foreign - foreign.T).max() < 1e-6
    for sigma in (foreign, foreign.T):
        assert metrics.frechet_distance(zero, s1, zero, sigma) == pytest.approx(expected, abs=1e-4)
        assert metrics.frechet_distance(zero, sigma, zero, s1) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [">f8", ">f4", np.longdouble, np.float32, ">i4"])
def test_foreign_types_of_numbers(dtype):
    mu, sigma = np.arange(4).astype(dtype), np.diag([4, 9, 16, 25]).astype(dtype)
    fid = metrics.frechet_distance(mu, sigma, np.zeros(4), np.eye(4))
    assert fid == pytest.approx(0 + 1 + 4 + 9 + 1 + 4 + 9 + 16)


@pytest.mark.parametrize("mu, sigma, message", [
    (np.zeros(2), np.diag([1, -1.0]), "no covariance.*-1"),
    (np.zeros(2), np.array([[1, 0.5], [0, 1]]), "symmetric"),
    (np.array([0, math.nan]), np.eye(2), "finite"),
    (np.zeros(2), np.diag([1, math.inf]), "finite"),
    (np.zeros(3), np.eye(2), "shapes"), (np.zeros(3), np.eye(3), "features"),
    (np.zeros(2), np.eye(2) * 1j, "real numbers, are complex"),
    (np.zeros(2).astype(str), np.eye(2), "real numbers")])
def test_what_is_no_gaussian_is_refused(mu, sigma, message):
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance(mu, sigma, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance(np.zeros(2), np.eye(2), mu, sigma)


def test_gaussian_statistics():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 100
    mu, sigma = metrics.gaussian_statistics(x)
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(mu, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.gaussian_statistics(x[:1])


# ---- Inception Score ----

def test_inception_score_of_extremes():
    one_hot = 1000 * torch.eye(40)[torch.arange(120) % 8]  # 8 of 40 classes, evenly; p underflows
    assert metrics.inception_score(one_hot, splits=1) == (pytest.approx(8), 0)
    for logits in (torch.full((100, 40), 3.0), one_hot[:1].expand(100, 40)):
        assert metrics.inception_score(logits) == pytest.approx((1, 0), abs=1e-12)
    with pytest.raises(ValueError, match="at least 10"):
        metrics.inception_score(one_hot[:9])


@pytest.mark.parametrize("n, splits", [(100, 10), (107, 10), (23, 4), (10, 10)])
def test_inception_score_against_numpy(n, splits):
    rng = np.random.default_rng(n)
    logits = 2 * rng.standard_normal((n, 15))
    logits[:, 3] += np.linspace(0, 4, n)  # so that the order matters
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = p[np.random.RandomState(2020).permutation(n)]
    scores = []
    for i in range(splits):
        part = p[i * n // splits:(i + 1) * n // splits]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    expected = np.mean(scores), np.std(scores)
    result = metrics.inception_score(torch.from_numpy(logits), splits)
    assert result == pytest.approx(expected, rel=1e-10)


# ---- evaluate ----

def test_evaluate_does_not_depend_on_the_batch_size():
    x = images(50)
    features, logits = small(x)
    reference = metrics.gaussian_statistics(small(images(60, seed=1))[0])
    results = [metrics.evaluate(x, reference, small, batch_size=b) for b in (7, 1000)]
    assert results[0] == results[1]
    assert results[0]["n"] == 50 and "warning" not in results[0]
    assert (results[0]["is_mean"], results[0]["is_std"]) == metrics.inception_score(logits)
    statistics = metrics.gaussian_statistics(features)
    assert results[0]["fid"] == metrics.frechet_distance(*statistics, *reference) > 0
    with pytest.raises(ValueError, match="uint8"):
        metrics.evaluate(x / 255, reference, small)
    few = [metrics.evaluate(images(n), reference, small).get("warning") for n in (16, 17)]  # of 16 features
    assert few == ["no more images than features: a singular covariance, and too high a FID", None]


@pytest.mark.parametrize("where, value", [
    ("features", math.nan), ("logits", math.nan), ("logits", math.inf), ("logits", -math.inf)])
def test_what_is_not_finite_is_no_score(where, value):
    def extract(x):
        features, logits = small(x)
        {"features": features, "logits": logits}[where][3:5, 0] = value
        return features, logits
    reference = torch.zeros(16), torch.eye(16)
    with pytest.raises(metrics.Refused, match="of 2 of 20 images are not finite"):
        metrics.evaluate(images(20), reference, extract)
    with pytest.raises(metrics.Refused, match="overflows"):
        metrics.evaluate(images(20), (torch.full((16,), 1e200, dtype=torch.float64), torch.eye(16)), small)


@pytest.fixture
def restored():
    """Torch's settings afterwards as they are when it starts."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "none"


def ambient():
    """Torch's settings; "contradicted": an old one that the new ones contradict cannot be read."""
    b = torch.backends
    state = [torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]
    for switch in (b, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.matmul,
                   b.mkldnn.conv, b.mkldnn.rnn):
        state.append(switch.fp32_precision)
    for old in (lambda: b.cudnn.allow_tf32, lambda: b.cuda.matmul.allow_tf32,
                torch.get_float32_matmul_precision):
        try:
            state.append(old())
        except RuntimeError:
            state.append("contradicted")
    return state


@pytest.mark.parametrize("setting", [
    "", "set_default_dtype(torch.bfloat16)", "set_float32_matmul_precision('medium')",
    "set_float32_matmul_precision('high')", "backends.cudnn.allow_tf32 = False",
    "backends.fp32_precision = 'tf32'", "backends.fp32_precision = 'bf16'",
    "backends.cudnn.conv.fp32_precision = 'ieee'", "backends.cuda.matmul.fp32_precision = 'tf32'",
    "backends.mkldnn.conv.fp32_precision = 'bf16'"])
def test_evaluate_is_exact_inside_and_restores_everything(setting, restored):
    exact = [torch.float32, False, False, *["ieee"] * 8, False, False, "highest"]

    def extract(x):
        assert ambient() == exact
        with torch.backends.cudnn.flags(enabled=True):
            features, logits = small(x)
        assert ambient() == exact
        if fails:
            raise ZeroDivisionError
        return features, logits

    exec(f"torch.{setting}" if setting else "")
    reference = np.zeros(16), np.eye(16)
    for fails in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = ambient()
            with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
                metrics.evaluate(images(20), reference, extract, batch_size=10)
            assert ambient() == before
    if "backends.fp32_precision" in setting:  # the general switch still rules the special
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.conv.fp32_precision == "ieee"


def test_the_networks_type_is_its_own(net, weights, restored):
    expected, _ = metrics.extract_features(images(1), net)
    torch.set_default_dtype(torch.bfloat16)
    features, _ = metrics.extract_features(images(1), metrics.load_inception(weights))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected)


def test_a_part_in_training_mode_is_refused():
    extract = torch.nn.Sequential(torch.nn.Dropout(), Toy()).eval()
    extract[0].train()
    with pytest.raises(ValueError, match="eval"):
        metrics.evaluate(images(20), None, extract)


@pytest.mark.cuda
def test_cuda_equals_cpu_whatever_the_caller_set(net, restored):
    x = images(20)
    on_cpu = metrics.extract_features(x, net)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        on_cuda = metrics.extract_features(x, net.cuda(), batch_size=8)
    net.cpu()
    for a, b in zip(on_cuda, on_cpu):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)
    mu, sigma = metrics.gaussian_statistics(small(x.cuda())[0])
    assert metrics.frechet_distance(mu, sigma, mu.cpu() + 1, sigma.cpu()) == pytest.approx(16)
    score = metrics.inception_score(on_cuda[1].cpu())
    assert metrics.inception_score(on_cuda[1]) == pytest.approx(score)


# ---- the reference and its cache ----

@pytest.fixture
def fids(monkeypatch):
    """Toy in the network's place; frechet_distance's arguments kept, covariances not rooted (both take seconds)."""
    arguments = []

    def frechet_distance(*args):
        arguments.append(args)
        return 1.5
    monkeypatch.setattr(metrics, "load_inception", lambda path, device: Toy().eval())
    monkeypatch.setattr(metrics, "frechet_distance", frechet_distance)
    monkeypatch.setattr(metrics, "covariance_root", lambda sigma: None)
    return arguments


@pytest.fixture
def sample(tmp_path):
    return write(tmp_path / "sample.npz", arr_0=nhwc(images(10)))


def test_reference_file_with_statistics_or_images(tmp_path, sample, fids, capsys):
    mu, sigma = metrics.gaussian_statistics(Toy()(images(30))[0])
    path = write(tmp_path / "images.npz", arr_0=nhwc(images(30)))
    list(metrics.score([sample], reference=path))
    assert f"{path}: no more images than features" in capsys.readouterr().err
    noise = 1 + torch.randn(2048, 2048, dtype=torch.float64) * 1e-8
    foreign = (sigma * noise).numpy().astype(">f8")
    path = write(tmp_path / "statistics.npz", mu=mu.numpy().astype(np.longdouble), sigma=foreign)
    list(metrics.score([sample], reference=path))
    assert "images.npz" not in capsys.readouterr().err
    for _, _, their_mu, their_sigma in fids:  # of each
        torch.testing.assert_close(their_mu, mu)
        torch.testing.assert_close(their_sigma, sigma, rtol=1e-6, atol=1e-6)
    assert torch.equal(fids[1][3], fids[1][3].T)


MU, SIGMA = np.zeros(2048), np.eye(2048)
SKEW, NAN = SIGMA.copy(), SIGMA.copy()
SKEW[0, 1], NAN[5, 5] = 1, math.nan


@pytest.mark.parametrize("arrays, message", [
    ({"mean": MU, "cov": SIGMA}, "must hold mu and sigma, or arr_0; holds mean, cov$"),
    ({"mu": MU}, "must hold mu and sigma, or arr_0; holds mu$"),
    ({}, "holds nothing"),
    ({"mu": MU, "sigma": SKEW}, "symmetric"), ({"mu": MU, "sigma": NAN}, "finite"),
    ({"mu": MU, "sigma": MU}, "shapes"), ({"mu": MU.astype(str), "sigma": SIGMA}, "real numbers"),
    ({"mu": MU[:64], "sigma": SIGMA[:64, :64]}, "2048 features, are of 64")])
def test_bad_reference_files(tmp_path, sample, fids, arrays, message):
    path = write(tmp_path / "reference.npz", **arrays)
    with pytest.raises(metrics.Refused, match=f"{path}: .*{message}"):
        next(metrics.score([sample], reference=path))


def test_a_reference_that_is_no_covariance_is_refused_by_its_name(tmp_path):
    path = write(tmp_path / "reference.npz", mu=np.zeros(2), sigma=np.diag([1, -1.0]))
    with pytest.raises(metrics.Refused, match=f"{path}: sigma is no covariance"):
        metrics.load_reference(path, None, None)


def test_foreign_files_are_told_what_is_wanted(tmp_path, sample, fids):
    torch.save({"mu": torch.zeros(3)}, tmp_path / "reference.pt")
    with pytest.raises(metrics.Refused, match="must hold mu and sigma, or arr_0; holds .*data.pkl"):
        next(metrics.score([sample], reference=tmp_path / "reference.pt"))


def test_reference_is_computed_once_and_kept(tmp_path, fids, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "cifar10_train", lambda data: images(40))
    net, calls = Toy().eval(), []
    net.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *paths: raised(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            metrics.cifar10_statistics(net, tmp_path, batch_size=16)
    assert calls == [16, 16, 8] and not list(tmp_path.iterdir())
    assert "CIFAR-10 train: 40/40 images" in capsys.readouterr().err
    mu, sigma = metrics.cifar10_statistics(net, tmp_path)
    x = images(40).flatten(1)[:, :2048].double().numpy()
    np.testing.assert_allclose(mu, x.mean(0))
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), atol=1e-8)
    (cache,) = tmp_path.glob("*0123abcd.npz")
    again = metrics.cifar10_statistics(net, tmp_path)
    assert len(calls) == 4 and torch.equal(again[0], mu)
    assert torch.equal(again[1], (sigma + sigma.T) / 2)
    net.weights_hash = "ffffffff"  # other weights: computed again
    metrics.cifar10_statistics(net, tmp_path)
    assert len(calls) == 5 and len(list(tmp_path.glob("*.npz"))) == 2
    net.weights_hash = "0123abcd"
    cache.write_bytes(cache.read_bytes()[:1000])
    with pytest.raises(metrics.Refused, match=f"{cache}.*delete this file"):
        metrics.cifar10_statistics(net, tmp_path)
    metrics.cifar10_statistics(net, tmp_path / "absent")
    assert "not kept" in capsys.readouterr().err


@pytest.mark.data
def test_cifar10_train():
    x = metrics.cifar10_train(os.environ["CIFAR10_ROOT"])
    assert x.shape == (50000, 3, 32, 32) and x.dtype == torch.uint8
    # the pixel means that every CIFAR-10 script carries
    mean = x.double().mean((0, 2, 3)) / 255
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=1e-4)


# ---- the command ----

GOOD = np.zeros((12, 32, 32, 3), np.uint8)


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        metrics.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert err.startswith("metrics.py: error: ") and err.count("\n") == 1, err
    return err


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("content, message", [
    (npz(images=GOOD), "must hold arr_0; holds images"), (npz(arr_0=GOOD / 255), "is float64"),
    (npz(arr_0=GOOD.transpose(0, 3, 1, 2)), "is uint8 [12, 3, 32, 32]"),
    (npz(arr_0=np.uint8(3)), "is uint8 []"), (npz(arr_0=GOOD[:9]), "N >= 10"),
    (npz(arr_0=np.array([GOOD, None], object)), "not a readable"),
    (npz(arr_0=GOOD)[:-30], "or a part of one: it begins with b'PK"), (pickle.dumps(GOOD), "not an .npz file"),
    (npz(arr_0=GOOD)[:999] + b"x" + npz(arr_0=GOOD)[1000:], "not a readable .npz file (BadZipFile: Bad CRC-32"),
    (b"<!DOCTYPE html>\n<html>", "not an .npz file, or a part of one: it begins with b'<!DOCTYPE html>"),
    (b"\x93NUMPY\x01\x00", "not an .npz file"), (b"", "not an .npz file"), (None, "No such file")])
def test_bad_samples_are_refused(content, message, sample, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(metrics, "load_inception")  # before anything that takes time
    bad = tmp_path / "bad.npz"
    if content is not None:
        bad.write_bytes(content)
    error = error_of(capsys, sample, bad)
    assert str(bad) in error and message in error and "pickled" not in error


def test_a_line_of_json_per_file_and_labels_are_not_read(sample, tmp_path, fids, capsys):
    np.savez(tmp_path / "labels.npz", nhwc(images(2049)), None)  # arr_1 is an object
    paths = [str(sample), str(tmp_path / "labels.npz"), str(sample)]
    metrics.main([*paths, "--reference", str(write(tmp_path / "r.npz", mu=MU, sigma=SIGMA))])
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [r["file"] for r in results] == paths and results[0] == results[2]
    assert [r["n"] for r in results] == [10, 2049, 10]
    assert "warning" not in results[1] and err.count("no more images than features") == 2


def test_bad_flags_are_refused(tmp_path, sample, fids, capsys):
    assert "--device" in error_of(capsys, sample, "--device", "nonsense")
    assert "--batch-size" in error_of(capsys, sample, "--batch-size", 0)
    assert "--dev" in error_of(capsys, sample, "--dev", "cpu")
    assert "absent" in error_of(capsys, sample, "--reference", tmp_path / "absent")


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(2 ** 60, dtype=torch.uint8), lambda: np.empty(2 ** 60, np.uint8),
    lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 9 GiB.")),
    lambda: raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas"))])
def test_out_of_memory_is_one_line_and_a_hint(fail, sample, tmp_path, fids, capsys, monkeypatch):
    monkeypatch.setattr(Toy, "forward", lambda self, x: fail())
    error = error_of(capsys, sample, "--reference", sample)
    assert "error: out of memory (" in error and "try a smaller --batch-size" in error


@pytest.mark.parametrize("bug, kind", [(lambda x: x @ x[0, 0, :3], RuntimeError), (lambda x: x[:, 7], IndexError),
                                       (lambda x: x.numpy().reshape(7, -1), ValueError)])
def test_a_bug_in_a_copy_keeps_its_traceback(bug, kind, sample, fids, monkeypatch):
    monkeypatch.setattr(Toy, "forward", lambda self, x: bug(x))
    with pytest.raises(kind, match="shape|index") as e:
        metrics.main([str(sample), "--reference", str(sample)])
    assert e.type is kind and e.traceback[-1].name in ("<lambda>", "reshape")


@pytest.fixture
def bytes_path(tmp_path):
    """A good sample whose name has an umlaut and a byte that is no UTF-8."""
    return os.path.join(tmp_path, os.fsdecode("\N{LATIN SMALL LETTER U WITH DIAERESIS}".encode() + b"\xe4.npz"))


class Plain:
    """What some put in a stream's place: it has no isatty and no encoding."""
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def ascii_stream():
    return io.TextIOWrapper(io.BytesIO(), "ascii")


def text_of(stream):
    return stream.text if isinstance(stream, Plain) else stream.buffer.getvalue().decode("ascii")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def full():
    return open("/dev/full", "w")


@pytest.mark.parametrize("stdout, stderr", [
    (Plain, Plain), (ascii_stream, ascii_stream), (Plain, closed), (Plain, full), (Plain, lambda: None)])
def test_no_letter_and_no_stderr_costs_a_result(stdout, stderr, bytes_path, fids, monkeypatch):
    np.savez(bytes_path, arr_0=GOOD)
    out, err = stdout(), stderr()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    metrics.main([bytes_path, bytes_path, "--reference", bytes_path])
    with pytest.raises(SystemExit) as e:
        metrics.main([bytes_path, bytes_path + "absent"])
    monkeypatch.undo()
    assert e.value.code == 2
    results = [json.loads(line) for line in text_of(out).splitlines()]
    assert [result["file"] for result in results] == [bytes_path] * 2  # nothing of stderr's among them
    if stderr in (Plain, ascii_stream):
        text = text_of(err)
        assert "\\udce4.npz: 12/12 images" in text and "No such file" in text.splitlines()[-1]


@pytest.mark.parametrize("stdout, reason", [(closed, "closed"), (full, "No space left"), (lambda: None, "None")])
def test_what_stdout_does_not_take_goes_to_stderr(stdout, reason, sample, fids, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout())
    with pytest.raises(SystemExit) as e:
        metrics.main([str(sample), "--reference", str(sample)])
    monkeypatch.undo()
    *_, result, last = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and json.loads(result)["fid"] == 1.5
    assert last.startswith("metrics.py: error: stdout took no result (") and reason in last


def test_progress_on_a_clock_that_stands_still(capsys, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    assert len(list(metrics.progress(images(40).split(20), "x"))) == 2
    assert capsys.readouterr().err.startswith("x: 40/40 images")


def test_progress_without_a_terminal_is_a_line_every_half_minute(capsys, monkeypatch):
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    list(metrics.progress(images(12).split(1), "x"))
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["4/12", "8/12", "12/12"]


def test_help_without_docstrings(capsys, monkeypatch):  # python -OO
    monkeypatch.setattr(metrics, "__doc__", None)
    with pytest.raises(SystemExit) as e:
        metrics.main(["--help"])
    assert e.value.code == 0 and "--batch-size" in capsys.readouterr().out


def test_a_full_disk_costs_the_cache_alone(tmp_path, fids, monkeypatch, capsys):
    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", savez)
    monkeypatch.setattr(metrics, "cifar10_train", lambda data: images(40))
    mu, sigma = metrics.cifar10_statistics(Toy().eval(), tmp_path)
    assert mu.isfinite().all() and "not kept (OSError: [Errno 28] No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_interrupt(sample, fids, monkeypatch, capsys):
    monkeypatch.setattr(Toy, "forward", lambda self, x: raised(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as e:
        metrics.main([str(sample), "--reference", str(sample)])
    assert e.value.code == 130 and capsys.readouterr().err == "metrics.py: interrupted\n"


def test_what_is_scored_before_an_interrupt_is_put_out(sample, tmp_path, fids, monkeypatch, capsys):
    """Each file may take hours."""
    evaluate, second = metrics.evaluate, write(tmp_path / "second.npz", arr_0=nhwc(images(11)))

    def one(x, *args):
        return evaluate(x, *args) if len(x) == 10 else raised(KeyboardInterrupt())
    monkeypatch.setattr(metrics, "evaluate", one)
    with pytest.raises(SystemExit) as e:
        metrics.main([str(sample), str(second), "--reference", str(sample)])
    assert e.value.code == 130 and json.loads(capsys.readouterr().out)["file"] == str(sample)


@pytest.mark.filterwarnings("error")
def test_the_command_end_to_end(sample, tmp_path, weights, monkeypatch, capsys):
    def extract_features(*args):
        outputs.append(extract(*args))
        return outputs[-1]
    outputs, extract = [], metrics.extract_features
    monkeypatch.setattr(metrics, "extract_features", extract_features)
    monkeypatch.setattr(metrics, "frechet_distance", lambda mu, *_: mu.square().sum().item())
    monkeypatch.setattr(metrics, "covariance_root", lambda sigma: None)  # this, too, takes seconds
    reference = write(tmp_path / "reference.npz", mu=MU, sigma=SIGMA)
    metrics.main([str(sample), "--reference", str(reference), "--device", "cpu",
                  "--inception-weights", str(weights), "--batch-size", "7"])
    out, err = capsys.readouterr()
    (features, logits), = outputs
    assert features.shape == (10, 2048) and logits.shape == (10, 1008)
    is_mean, is_std = metrics.inception_score(logits)
    assert json.loads(out) == {
        "file": str(sample), "n": 10, "is_mean": is_mean, "is_std": is_std,
        "fid": features.double().mean(0).square().sum().item(),
        "warning": metrics.TOO_FEW,
        "weights": metrics.load_inception(weights).weights_hash}
    assert metrics.TOO_FEW in err and "not the FID weights" in err
