"""metrics.py on random weights and closed forms: none of the numbers here is an IS or an FID of anything."""
import copy
import io
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torchvision.models import inception_v3

import metrics

SCRIPT = Path(metrics.__file__)


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


def toy(x):  # 2,048 "features" and 7 "logits" of uint8 images
    x = x.flatten(1).double()
    return x[:, :2048], x[:, -7:] / 50


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


@pytest.mark.parametrize("h, w, size", [(32, 32, 299), (7, 12, 20), (12, 7, 5), (9, 9, 9), (1, 4, 6)])
def test_resize_is_tf1_bilinear(h, w, size):
    x = 255 * torch.rand(1, 2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = metrics.resize_tf1(x, size)
    for c in range(2):
        np.testing.assert_allclose(y[0, c].numpy(), tf1_loop(x[0, c].numpy(), size), atol=1e-10)
    np.testing.assert_allclose(metrics.resize_tf1(x.float(), size), y, atol=2e-4)  # 2e-4 of 255: float32
    if h == w == 32:
        other = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        assert (other - y).abs().max() > 10


# ---- the network ----

@pytest.fixture(scope="module")
def net():
    """Random in every tensor, activations of order 1 throughout, so that each detail reaches the output."""
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
        return F.batch_norm(F.conv2d(x, w, None, stride, pad), *bn, training=False, eps=1e-3).clamp(min=0)

    def chain(x, block, *names):
        for name in names:
            x = conv(x, f"{block}.{name}", pad="SAME")
        return x

    def mean3(x):  # the mean over those of 3 x 3 that lie inside
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    def a(x, n):
        return torch.cat([chain(x, n, "branch1x1"), chain(x, n, "branch5x5_1", "branch5x5_2"),
                          chain(x, n, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                          chain(mean3(x), n, "branch_pool")], 1)

    def c(x, n):
        return torch.cat([chain(x, n, "branch1x1"), chain(x, n, *(f"branch7x7_{i}" for i in (1, 2, 3))),
                          chain(x, n, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
                          chain(mean3(x), n, "branch_pool")], 1)

    def e(x, n, pool):
        u, v = chain(x, n, "branch3x3_1"), chain(x, n, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat([chain(x, n, "branch1x1"), chain(u, n, "branch3x3_2a"), chain(u, n, "branch3x3_2b"),
                          chain(v, n, "branch3x3dbl_3a"), chain(v, n, "branch3x3dbl_3b"),
                          chain(pool(x), n, "branch_pool")], 1)

    dtype = p["fc.weight"].dtype
    x = np.stack([[tf1_loop(plane, 299) for plane in image] for image in x.double().numpy()])
    x = torch.from_numpy(x).to(dtype) / 128 - 1
    x = conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", pad="SAME"), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    x = a(a(a(x, "Mixed_5b"), "Mixed_5c"), "Mixed_5d")
    n = "Mixed_6a"
    x = torch.cat([conv(x, f"{n}.branch3x3", 2),
                   conv(chain(x, n, "branch3x3dbl_1", "branch3x3dbl_2"), f"{n}.branch3x3dbl_3", 2),
                   F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(x, n)
    n = "Mixed_7a"
    x = torch.cat([conv(chain(x, n, "branch3x3_1"), f"{n}.branch3x3_2", 2),
                   conv(chain(x, n, *(f"branch7x7x3_{i}" for i in (1, 2, 3))), f"{n}.branch7x7x3_4", 2),
                   F.max_pool2d(x, 3, 2)], 1)
    x = e(x, "Mixed_7b", mean3)
    x = e(x, "Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))
    pool3 = x.mean((2, 3))
    return pool3, F.linear(pool3, p["fc.weight"])


def test_inception_equals_an_independent_forward(net):
    x = images(1)
    p = net.state_dict()
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
    theirs = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    assert ours == {k: v.shape for k, v in theirs.items()}
    assert sum(k.endswith("conv.weight") for k in ours) == 94
    # Inception-v3: 21,785,568 in its trunk without the head (27,161,264 - auxiliary 3,326,696 - fc 2,049,000)
    assert sum(p.numel() for p in net.parameters()) == 21_785_568 + 2048 * 1008 + 1008
    assert ours["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert ours["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert ours["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert ours["Mixed_7c.branch3x3_2b.conv.weight"] == (384, 384, 3, 1)
    assert ours["fc.weight"] == (1008, 2048) and ours["fc.bias"] == (1008,)
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def test_load_inception(net, weights, tmp_path, capsys, monkeypatch):
    loaded = metrics.load_inception(weights)
    assert not loaded.training and len(loaded.weights_hash) == 8
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    assert "not the FID weights" in capsys.readouterr().err
    monkeypatch.setattr(metrics, "WEIGHTS_HASH", loaded.weights_hash)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, weights.parent / "old.pth")  # as before PyTorch 0.4.1
    assert torch.equal(metrics.load_inception(weights.parent / "old.pth").fc.bias, net.fc.bias)
    metrics.load_inception(weights)
    assert capsys.readouterr().err.count("not the FID weights") == 1  # old.pth only


class Malice:
    def __reduce__(self):
        return os.system, ("touch " + str(Path(os.environ["MALICE"])),)


@pytest.mark.parametrize("case", "garbage empty pickle list missing unexpected shape absent".split())
def test_broken_weights_are_refused(net, tmp_path, monkeypatch, case):
    monkeypatch.setenv("MALICE", str(tmp_path / "touched"))
    state = dict(net.state_dict())
    path = tmp_path / "weights.pth"
    if case == "missing":
        del state["Mixed_5b.branch_pool.bn.bias"]
    elif case == "unexpected":
        state["AuxLogits.fc.bias"] = torch.zeros(1)
    elif case == "shape":
        state["fc.weight"] = torch.zeros(1000, 2048)
    elif case == "pickle":
        state["fc.bias"] = Malice()
    if case in ("garbage", "empty"):
        path.write_bytes(b"not a network" * (case == "garbage"))
    elif case != "absent":
        torch.save([1] if case == "list" else state, path)
    with pytest.raises(OSError if case == "absent" else ValueError, match=r"weights\.pth") as e:
        metrics.load_inception(path)
    assert "\n" not in str(e.value) and not (tmp_path / "touched").exists()


def test_weights_download_is_checked_and_ends(tmp_path, monkeypatch):
    def download(url, path, hash_prefix, progress):
        assert url.endswith("6726825d.pth") and hash_prefix == "6726825d" and path.startswith(str(tmp_path))
        assert socket.getdefaulttimeout() == 10
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    before = socket.getdefaulttimeout()
    with pytest.raises(OSError, match="--inception-weights"):
        metrics.load_inception()
    assert socket.getdefaulttimeout() == before


# ---- Frechet distance ----

def random_covariance(d, rank, rng):
    a = rng.standard_normal((rank, d))
    return a.T @ a / rank


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    d = 12
    mu1, mu2, s1, s2 = *rng.standard_normal((2, d)), *rng.uniform(0.1, 3, (2, d))
    diagonal = ((mu1 - mu2) ** 2 + (s1 - s2) ** 2).sum()  # standard deviations s
    assert metrics.frechet_distance(mu1, np.diag(s1 ** 2), mu2, np.diag(s2 ** 2)) == pytest.approx(diagonal)
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]  # covariances that commute: the same in their basis
    rotated = metrics.frechet_distance(q @ mu1, (q * s1 ** 2) @ q.T, q @ mu2, (q * s2 ** 2) @ q.T)
    assert rotated == pytest.approx(diagonal)
    sigma = random_covariance(d, 20, rng)
    assert metrics.frechet_distance(mu1, sigma, mu1, sigma) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(mu1, sigma, mu1 + 2, sigma) == pytest.approx(4 * d)
    assert metrics.frechet_distance(mu1, sigma, mu1, 9 * sigma) == pytest.approx(4 * np.trace(sigma))


def test_frechet_against_sqrtm():
    rng = np.random.default_rng(1)
    for d in (2, 9, 30):
        mu1, mu2 = rng.standard_normal((2, d))
        s1, s2 = (random_covariance(d, 3 * d, rng) for _ in range(2))
        root = scipy.linalg.sqrtm(s1 @ s2)
        expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
        tensors = (torch.from_numpy(a) for a in (mu1, s1, mu2, s2))
        assert metrics.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-8)
        assert metrics.frechet_distance(*tensors) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_singular_covariances():
    rng = np.random.default_rng(2)
    d = 40
    low = random_covariance(d, 5, rng)
    zero = np.zeros(d)
    assert metrics.frechet_distance(zero, low, zero, low) == pytest.approx(0, abs=1e-5)
    assert metrics.frechet_distance(zero, low, zero, np.zeros((d, d))) == pytest.approx(np.trace(low))
    other = random_covariance(d, 7, rng)
    basis = np.linalg.svd(low)[0][:, :5]
    inner = scipy.linalg.sqrtm((basis.T @ low @ basis) @ (basis.T @ other @ basis))  # of full rank
    expected = np.trace(low) + np.trace(other) - 2 * np.trace(inner).real
    assert metrics.frechet_distance(zero, low, zero, other) == pytest.approx(expected, abs=1e-5)


def test_gaussian_statistics():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 100
    mu, sigma = metrics.gaussian_statistics(x)
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(mu, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    for bad in (x[:1], x * math.nan, x * math.inf):
        with pytest.raises(ValueError):
            metrics.gaussian_statistics(bad)


# ---- Inception Score ----

def test_inception_score_of_extremes():
    one_hot = 1000 * torch.eye(40)[torch.arange(120) % 8]  # 8 of 40 classes, evenly; p underflows to 0
    mean, std = metrics.inception_score(one_hot, splits=1)
    assert mean == pytest.approx(8) and std == 0
    for logits in (torch.full((100, 40), 3.0), one_hot[:1].expand(100, 40)):  # all equal, all one class
        assert metrics.inception_score(logits) == pytest.approx((1, 0), abs=1e-12)
    with pytest.raises(ValueError, match="at least 10"):
        metrics.inception_score(one_hot[:9])


@pytest.mark.parametrize("n, splits", [(100, 10), (107, 10), (23, 4), (10, 10)])
def test_inception_score_against_numpy(n, splits):
    rng = np.random.default_rng(n)
    logits = 2 * rng.standard_normal((n, 15)) + np.linspace(0, 4, n)[:, None] * np.eye(15)[3]  # order matters
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = p[np.random.RandomState(2020).permutation(n)]
    scores = []
    for i in range(splits):
        part = p[i * n // splits:(i + 1) * n // splits]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    expected = np.mean(scores), np.std(scores)
    assert metrics.inception_score(torch.from_numpy(logits), splits) == pytest.approx(expected, rel=1e-10)


# ---- evaluate ----

def small(x):  # few enough features for a quick eigh
    features, logits = toy(x)
    return features[:, :16], logits


def switches():
    return (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision,
            torch.is_autocast_enabled("cpu"), torch.is_grad_enabled())


def test_evaluate_does_not_depend_on_the_batch_size():
    x = images(50)
    reference = metrics.gaussian_statistics(small(images(60, seed=1))[0])
    results = [metrics.evaluate(x, reference, small, batch_size=b) for b in (7, 50, 1000)]
    assert results[0] == results[1] == results[2]
    assert results[0]["n"] == 50 and "2,048" in results[0]["warning"]
    features, logits = small(x)
    assert (results[0]["is_mean"], results[0]["is_std"]) == metrics.inception_score(logits)
    statistics = metrics.gaussian_statistics(features)
    assert results[0]["fid"] == metrics.frechet_distance(*statistics, *reference) > 0
    with pytest.raises(ValueError, match="uint8"):
        metrics.evaluate(x / 255, reference, small)
    assert "warning" not in metrics.evaluate(images(2048), reference, small)


@pytest.mark.parametrize("fails", [False, True])
def test_evaluate_is_exact_inside_and_restores_everything(fails):
    class Extract(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Dropout()

        def forward(self, x):
            assert switches() == ("ieee", "ieee", False, False)
            if fails:
                raise ZeroDivisionError
            return small(x)

    extract = Extract()
    with pytest.raises(ValueError, match="eval"):
        metrics.evaluate(images(20), None, extract)
    extract.eval()
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision, matmul.fp32_precision = "tf32", "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outside = switches()
            try:
                metrics.evaluate(images(20), metrics.gaussian_statistics(small(images(30))[0]), extract)
            except ZeroDivisionError:
                assert fails
            assert switches() == outside == ("tf32", "tf32", True, True)
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


@pytest.mark.cuda
def test_cuda_equals_cpu_whatever_the_caller_set(net):
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outputs = metrics.extract_features(images(20), copy.deepcopy(net).cuda(), batch_size=8)
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
    for a, b in zip(outputs, metrics.extract_features(images(20), net)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)
    statistics = [metrics.gaussian_statistics(small(images(60, seed).cuda())[0]) for seed in (0, 1)]
    on_gpu = [x for pair in statistics for x in pair]
    on_cpu = [x.cpu() for x in on_gpu]
    assert metrics.frechet_distance(*on_gpu) == pytest.approx(metrics.frechet_distance(*on_cpu))
    assert metrics.inception_score(outputs[1]) == pytest.approx(metrics.inception_score(outputs[1].cpu()))


# ---- the reference and its cache ----

@pytest.fixture
def train(monkeypatch):
    x = images(40)
    monkeypatch.setattr(metrics, "_cifar10_train", lambda data: x)
    return x


def test_reference_is_computed_once_and_kept(train, tmp_path, capsys):
    calls = []

    def extract(x):
        calls.append(len(x))
        return toy(x)

    mu, sigma = metrics.reference_statistics(extract, "0123abcd", tmp_path, batch_size=16)
    assert calls == [16, 16, 8]
    x = train.flatten(1)[:, :2048].double().numpy()
    np.testing.assert_allclose(mu, x.mean(0))
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), atol=1e-8)
    (cache,) = tmp_path.iterdir()  # no temporary file left
    assert "0123abcd" in cache.name and "CIFAR-10 train: 40/40 images" in capsys.readouterr().err
    with np.load(cache) as file:
        assert set(file) == {"mu", "sigma"}
    again = metrics.reference_statistics(extract, "0123abcd", tmp_path)
    assert len(calls) == 3 and torch.equal(again[0], mu) and torch.equal(again[1], sigma)
    metrics.reference_statistics(extract, "ffffffff", tmp_path)  # other weights: computed again
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 2


def test_reference_cache_appears_whole_or_not_at_all(train, tmp_path, monkeypatch):
    def killed(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(np, "savez", killed)
        with pytest.raises(KeyboardInterrupt):
            metrics.reference_statistics(toy, "0123abcd", tmp_path)
    assert not list(tmp_path.glob("*.npz"))
    metrics.reference_statistics(toy, "0123abcd", tmp_path)
    (cache,) = tmp_path.glob("*.npz")
    for broken in (b"", b"junk", cache.read_bytes()[:1000]):
        cache.write_bytes(broken)
        with pytest.raises(ValueError, match="delete this file") as e:
            metrics.reference_statistics(toy, "0123abcd", tmp_path)
        assert str(cache) in str(e.value) and cache.read_bytes() == broken


def test_reference_survives_a_folder_that_cannot_be_written(train, tmp_path, capsys):
    mu, _ = metrics.reference_statistics(toy, "0123abcd", tmp_path / "absent")
    assert mu.shape == (2048,) and "not kept" in capsys.readouterr().err


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_reference_file_with_statistics_or_images(tmp_path):
    x = images(30).permute(0, 2, 3, 1).numpy()
    mu, sigma = metrics.reference_statistics(toy, "", reference=write(tmp_path / "a.npz", arr_0=x))
    expected = metrics.gaussian_statistics(toy(images(30))[0])
    assert torch.equal(mu, expected[0]) and torch.equal(sigma, expected[1])
    path = write(tmp_path / "b.npz", mu=mu.numpy(), sigma=sigma.numpy())
    assert torch.equal(metrics.reference_statistics(None, "", reference=path)[1], sigma)


def test_bad_reference_files(tmp_path):
    mu, sigma = np.zeros(2048), np.eye(2048)
    nan, skew = sigma.copy(), sigma.copy()
    nan[5, 5], skew[0, 1] = math.nan, 1
    for arrays in ({"mu": mu}, {"sigma": sigma}, {"other": mu},
                   {"mu": mu + math.inf, "sigma": sigma}, {"mu": mu, "sigma": nan}, {"mu": mu, "sigma": skew},
                   {"mu": mu[:64], "sigma": sigma[:64, :64]}, {"mu": mu, "sigma": mu},
                   {"mu": mu.astype(str), "sigma": sigma}):
        with pytest.raises(ValueError, match=r"ref\.npz"):
            metrics.reference_statistics(toy, "", reference=write(tmp_path / "ref.npz", **arrays))


def test_cifar_is_not_downloaded_over_a_damaged_copy(tmp_path, monkeypatch):
    def download(self):
        assert socket.getdefaulttimeout() == 10
        raise urllib.error.URLError("no network")
    before = socket.getdefaulttimeout()
    monkeypatch.setattr(metrics.CIFAR10, "download", download)
    with pytest.raises(OSError, match="--data") as e:
        metrics._cifar10_train(tmp_path)
    assert "cannot download" in str(e.value) and socket.getdefaulttimeout() == before
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cifar-10-batches-py is damaged.*delete"):
        metrics._cifar10_train(str(tmp_path))


@pytest.mark.data
def test_reference_of_real_images(tmp_path, monkeypatch):
    x = metrics._cifar10_train(os.environ["CIFAR10_ROOT"])
    assert x.shape == (50000, 3, 32, 32) and x.dtype == torch.uint8
    # the pixel means that every CIFAR-10 script carries: .4914 .4822 .4465
    np.testing.assert_allclose(x.double().mean((0, 2, 3)) / 255, (0.4914, 0.4822, 0.4465), atol=1e-4)
    monkeypatch.setattr(metrics, "_cifar10_train", lambda data: x[:256])
    mu, sigma = metrics.reference_statistics(toy, "0123abcd", tmp_path, batch_size=100)
    pixels = x[:256].flatten(1)[:, :2048].double().numpy()
    np.testing.assert_allclose(mu, pixels.mean(0))
    np.testing.assert_allclose(sigma, np.cov(pixels, rowvar=False), atol=1e-8)


# ---- the command ----

GOOD = np.zeros((12, 32, 32, 3), np.uint8)


def bad_sample(case, path):
    if case == "absent":
        return
    buffer = io.BytesIO()
    np.savez(buffer, **{
        "no arr_0": {"images": GOOD}, "floats": {"arr_0": GOOD / 255.0}, "no images": {"arr_0": GOOD[:0]},
        "NCHW": {"arr_0": GOOD.transpose(0, 3, 1, 2)}, "one image": {"arr_0": GOOD[0]},
        "few": {"arr_0": GOOD[:9]}, "scalar": {"arr_0": np.uint8(3)},
        "objects": {"arr_0": np.array([GOOD, None], dtype=object)},
        "object labels": {"arr_0": GOOD, "arr_1": np.array([{}], dtype=object)},
    }.get(case, {"arr_0": GOOD}))
    good = buffer.getvalue()
    contents = {"empty": b"", "not a zip": b"hello" * 100, "pickle": pickle.dumps([1, 2]),
                "truncated": good[:-100], "cut": good[:2000]}.get(case, good)
    if case == "flipped":  # a bit inside the stored array: the zip's checksum notices
        contents = contents[:5000] + bytes([contents[5000] ^ 1]) + contents[5001:]
    path.write_bytes(contents)
    if case == "npy":
        with open(path, "wb") as file:
            np.save(file, GOOD)
    if case == "folder":
        path.unlink()
        path.mkdir()


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as e:
        metrics.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert err.startswith("metrics.py: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("case", [
    "no arr_0", "floats", "no images", "NCHW", "one image", "few", "scalar", "objects", "object labels",
    "empty", "not a zip", "pickle", "truncated", "cut", "flipped", "npy", "folder", "absent"])
def test_bad_samples_end_before_anything_else_happens(case, tmp_path, capsys, monkeypatch):
    def touched(*_):
        raise AssertionError("the network was touched")
    monkeypatch.setattr(metrics, "load_inception", touched)
    good, bad = write(tmp_path / "good.npz", arr_0=GOOD), tmp_path / "bad.npz"
    bad_sample(case, bad)
    assert str(bad) in error_of([good, bad], capsys)


def test_other_errors_of_the_command(tmp_path, weights, capsys, monkeypatch):
    def offline(self):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(metrics.CIFAR10, "download", offline)
    monkeypatch.setattr(metrics, "WEIGHTS_HASH", metrics.load_inception(weights).weights_hash)
    capsys.readouterr()
    good, broken = write(tmp_path / "good.npz", arr_0=GOOD), tmp_path / "broken"
    broken.write_bytes(b"broken")
    known = ["--inception-weights", weights]
    assert "broken" in error_of([good, "--inception-weights", broken], capsys)
    assert "No such file" in error_of([good, "--inception-weights", tmp_path / "absent"], capsys)
    assert "device" in error_of([good, *known, "--device", "cuda:99"], capsys)
    assert "device" in error_of([good, *known, "--device", "nonsense"], capsys)
    assert "--dev" in error_of([good, *known, "--dev", "cpu"], capsys)
    assert "--data" in error_of([good, *known, "--data", tmp_path], capsys)
    assert str(broken) in error_of([good, *known, "--reference", broken], capsys)
    nan = write(tmp_path / "nan.npz", mu=np.full(2048, math.nan), sigma=np.eye(2048))
    assert "finite" in error_of([good, *known, "--reference", nan], capsys)


def test_interrupt(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(metrics, "score", interrupted)
    with pytest.raises(SystemExit) as e:
        metrics.main(["x.npz"])
    assert e.value.code == 130 and capsys.readouterr().err == "metrics.py: interrupted\n"


def test_score_warns_and_names_its_weights(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "frechet_distance", lambda *_: 1.5)  # the real ones take seconds
    monkeypatch.setattr(metrics.InceptionV3, "forward", lambda self, x: toy(x))
    reference = write(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    x, labels = images(10), np.arange(10)
    arrays = {"arr_0": x.permute(0, 2, 3, 1).numpy(), "arr_1": labels}
    paths = [write(tmp_path / name, **arrays) for name in ("0.npz", "1.npz")]
    loaded = metrics.load_samples(paths[0])
    assert torch.equal(loaded[0], x) and loaded[1].tolist() == labels.tolist()
    metrics.main([*map(str, paths), "--reference", str(reference), "--inception-weights", str(weights),
                  "--device", "cpu"])
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first.pop("file") == str(paths[0]) and second.pop("file") == str(paths[1]) and first == second
    assert first["n"] == 10 and first["fid"] == 1.5
    assert (first["is_mean"], first["is_std"]) == metrics.inception_score(toy(x)[1])
    assert first["weights"] == metrics.load_inception(weights).weights_hash
    assert err.count("fewer than 2,048 images") == 2 and err.count("not the FID weights") == 1


def run(*argv):
    command = [sys.executable, "-W", "error", SCRIPT, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_no_traceback_from_the_command(tmp_path):
    bad_sample("cut", tmp_path / "bad.npz")
    done = run(tmp_path / "bad.npz")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("metrics.py: error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_the_command_end_to_end(tmp_path, net, weights, capsys):
    x = images(10)
    sample = write(tmp_path / "x.npz", arr_0=x.permute(0, 2, 3, 1).numpy())
    point = write(tmp_path / "point.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    metrics.main([str(sample), "--reference", str(point), "--inception-weights", str(weights), "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    features, logits = metrics.extract_features(x, net)
    mu, sigma = metrics.gaussian_statistics(features)
    assert result["fid"] == pytest.approx((mu @ mu + sigma.trace()).item(), rel=1e-5)  # to the origin
    assert (result["is_mean"], result["is_std"]) == pytest.approx(metrics.inception_score(logits), rel=1e-5)
