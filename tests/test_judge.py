"""tests/judge.py on random nets: its figures by hand. On real images: the committed judge's."""
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import cem_sup
import judge
import metrics
from conftest import error


def spread(net, images):
    """net, its last layer such that its logits differ from image to image, and its features and logits of them."""
    net.eval().linear.weight.data *= 50
    _, logits = metrics.extract_features(images, net)
    net.linear.bias.data -= logits.mean(0)
    return net, *metrics.extract_features(images, net)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    colour = torch.rand(40, 3, 1, 1, generator=generator)
    return (255 * colour * torch.rand(40, 3, 32, 32, generator=generator)).to(torch.uint8)


@pytest.fixture(scope="module")
def robust(images):
    torch.manual_seed(0)
    return spread(judge.Robust(cem_sup.make_model("small-16")), images)


@pytest.fixture(scope="module")
def public(images):
    torch.manual_seed(0)
    return spread(judge.ResNet(56), images), spread(judge.ResNet(32), images)


# ---------------------------------------------------------------- the robust judge


@pytest.mark.parametrize("arch, features", [("small-32", 128), ("resnet18-half", 256)])
def test_the_robust_judge_is_cem_sups_net_with_the_weights_of_the_repository(arch, features, images, tmp_path,
                                                                             monkeypatch):
    f = cem_sup.make_model(arch)
    x = images[:4] / 255
    f(x)  # in training mode: its batch norms get statistics that are not those of eval mode
    path = tmp_path / ".github" / "weights" / judge.ROBUST[arch]
    path.parent.mkdir(parents=True)
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in f.state_dict().items()},
               path)
    f.eval().load_state_dict(torch.load(path, weights_only=True))  # rounded
    pooled = []
    f.net[-1].register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    monkeypatch.setattr(judge, "ROOT", tmp_path)
    net = judge.load_robust(arch)
    out = metrics.extract_features(images[:4], net)
    with torch.no_grad():
        torch.testing.assert_close(out[1], f(x))
    torch.testing.assert_close(out[0], pooled[0])
    assert out[0].shape == (4, features)
    assert net.weights_hash == hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def test_share_distance_and_counts_by_hand(images, robust):
    net, features, logits = robust
    labels = torch.arange(40) % 10
    mu, sigma = metrics.gaussian_statistics(features)
    figures = judge.judge(images, labels, net, (mu + 0.5, sigma))
    seen = logits.argmax(1).tolist()
    assert figures["distance"] == pytest.approx(64 / 4)
    assert figures["counts"] == [seen.count(k) for k in range(10)] and len(set(seen)) > 1
    assert figures["share"] == np.mean([seen[i] == i % 10 for i in range(40)]) > 0
    i = seen.index(min(seen))  # then no sample is seen as the last class
    two = judge.judge(images[[i, i]], None, net, (mu, sigma))
    assert two.keys() == {"distance", "counts"} and two["counts"] == [2 * (k == seen[i]) for k in range(10)]


@pytest.mark.data
def test_the_committed_judge_on_real_images(capsys):
    judge.main(["--data", os.environ["CIFAR10_ROOT"], "test", "--limit", "500", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["share"] == pytest.approx(0.748, abs=0.004)
    assert figures["distance"] == pytest.approx(0.195, abs=0.005)


# ---------------------------------------------------------------- the train images' statistics


class Colours(nn.Module):
    """Three features, the mean colour. Counts the images that it sees."""

    def __init__(self, weights_hash="01234567"):
        super().__init__()
        self.linear, self.weights_hash, self.seen = nn.Linear(3, 10), weights_hash, 0
        self.eval()

    def forward(self, x):
        self.seen += len(x)
        features = x.float().mean((2, 3))
        return features, self.linear(features)


@pytest.fixture
def train_colours(monkeypatch):
    """In the place of CIFAR-10: 20,003 images of one colour each; the first 20,000 colours, float64."""
    colours = np.random.default_rng(0).integers(256, size=(20003, 1, 1, 3), dtype=np.uint8)

    class Train:
        data = np.broadcast_to(colours, (20003, 32, 32, 3)).copy()
    monkeypatch.setattr(judge, "cifar10", lambda data, train: Train)
    return colours[:20000, 0, 0].astype(float)


def test_statistics_are_of_the_first_20000_and_kept_beside_the_data(train_colours, tmp_path):
    mu, sigma = judge.train_statistics(Colours(), tmp_path)
    np.testing.assert_allclose(mu, train_colours.mean(0), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(train_colours.T), rtol=1e-5)
    again = Colours()
    mu_2, sigma_2 = judge.train_statistics(again, tmp_path)
    torch.testing.assert_close((mu_2, sigma_2), (mu, sigma))
    assert again.seen == 0
    other = Colours("89abcdef")  # other weights have other statistics
    judge.train_statistics(other, tmp_path)
    assert other.seen == 20000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cifar10-train-20000-01234567.npz", "cifar10-train-20000-89abcdef.npz"]


@pytest.mark.parametrize("kept", [
    b"PK\3\4", dict(mu=np.zeros(3)), dict(mu=np.zeros(4), sigma=np.eye(4)), dict(mu=np.zeros(3), sigma=np.eye(4)),
    dict(mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), dict(mu=np.full(3, np.inf), sigma=np.eye(3))])
def test_damaged_statistics_are_computed_anew(kept, train_colours, tmp_path, capsys):
    path = tmp_path / "cifar10-train-20000-01234567.npz"
    if isinstance(kept, dict):
        np.savez(path, **kept)
    else:
        path.write_bytes(kept)
    mu, _ = judge.train_statistics(Colours(), tmp_path)
    assert str(path) in capsys.readouterr().err
    np.testing.assert_allclose(mu, train_colours.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(np.load(path)["mu"], mu)  # and mended


def test_a_folder_that_cannot_be_written_costs_only_time(train_colours, tmp_path, capsys, monkeypatch):
    mu, _ = judge.train_statistics(Colours(), tmp_path / "absent")
    np.testing.assert_allclose(mu, train_colours.mean(0), rtol=1e-6)
    assert "not kept" in capsys.readouterr().err

    def full(*args):
        raise OSError("no space left")
    monkeypatch.setattr(os, "replace", full)
    judge.train_statistics(Colours(), tmp_path)
    assert "no space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the public nets


def test_the_nets_are_those_of_the_paper(public):
    counts = [sum(p.numel() for p in net.parameters()) for net, _, _ in public]
    assert counts == [853_018, 464_154]  # He et al., table 6: 0.85M and 0.46M
    for _, features, logits in public:
        assert features.shape == (40, 64) and logits.shape == (40, 10)
    convolutions = [m for m in public[0][0].modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 55


def test_pixels_are_normalised_as_in_training(public):
    seen = []
    net = public[1][0]
    hook = net.conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    metrics.extract_features(torch.full((1, 3, 32, 32), 51, dtype=torch.uint8), net)
    hook.remove()
    expected = [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]  # ImageNet's
    assert seen[0][0, :, 5, 5].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_shortcut_drops_pixels_and_pads_channels():
    block = judge.Block(16, 32, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2].relu())
    assert y[:, :8].abs().max() == y[:, 24:].abs().max() == 0


def test_the_public_nets_figures_by_hand(images, public):
    (net56, features, logits56), (net32, _, logits32) = public
    labels = torch.arange(40) % 10
    mu, sigma = metrics.gaussian_statistics(features)
    figures = judge.judge_by_public_nets(images, labels, net56, net32, (mu + 0.5, sigma))
    assert figures["cfd"] == pytest.approx(64 / 4)
    by56, by32 = logits56.argmax(1), logits32.argmax(1)
    assert figures["acc56"] == np.mean(by56.numpy() == labels.numpy())
    assert figures["acc32"] == np.mean(by32.numpy() == labels.numpy()) != figures["acc56"]

    f = features.double().numpy()
    means = []
    for k in range(10):
        own = f[k::10]
        pairs = [np.linalg.norm(own[i] - own[j]) for i in range(4) for j in range(i)]
        means.append(np.mean(pairs))
    assert figures["diversity"] == pytest.approx(np.mean(means))

    p = [np.exp(z.double().numpy()) for z in (logits56, logits32)]
    p = np.mean([e / e.sum(1, keepdims=True) for e in p], axis=0)
    p = p[torch.randperm(40, generator=torch.Generator().manual_seed(0)).numpy()]
    scores = []
    for part in np.array_split(p, 5):
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert figures["cis"] == pytest.approx(np.mean(scores)) and figures["cis"] > 1.01


def test_extremes():
    sure = 1000 * torch.eye(10).repeat(50, 1)
    assert judge.classifier_score(sure, sure, splits=1) == pytest.approx(10)
    assert judge.classifier_score(sure, torch.zeros(500, 10), splits=1) < 5  # one net alone
    assert judge.classifier_score(sure[:1].repeat(50, 1), sure[:1].repeat(50, 1)) == 1
    labels = torch.arange(20) % 10
    assert judge.diversity(torch.randn(10, 64)[labels], labels) == 0  # one image a class
    assert judge.diversity(torch.randn(10, 64), torch.arange(10)) is None


def test_wrong_weights_are_refused(public, tmp_path):
    name = "resnet32-d509ac18.th"
    torch.save({"state_dict": public[1][0].state_dict()}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: its sha256"):
        judge.load_net(tmp_path, name, 32)
    with pytest.raises(OSError, match="resnet56"):
        judge.load_net(tmp_path, "resnet56-4bfd9763.th", 56)


def test_the_files_names_for_the_parameters_are_read(public, tmp_path, monkeypatch):
    name, theirs = "resnet32-d509ac18.th", public[1][0]
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 92.6}, tmp_path / name)
    sha256 = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setitem(judge.SHA256, name, sha256)
    net = judge.load_net(tmp_path, name, 32)
    assert not net.training and torch.equal(net.linear.weight, theirs.linear.weight)
    assert net.weights_hash == sha256[:8]


# ---------------------------------------------------------------- the command


def test_the_command(images, robust, public, tmp_path, monkeypatch, capsys):
    x, labels = images.permute(0, 2, 3, 1).numpy(), np.arange(40, dtype=np.uint8) // 4
    np.savez(tmp_path / "labelled.npz", x, labels)
    np.savez(tmp_path / "bare.npz", x)
    nets, archs = {"resnet56-4bfd9763.th": public[0][0], "resnet32-d509ac18.th": public[1][0]}, []
    monkeypatch.setattr(judge, "load_robust", lambda arch: archs.append(arch) or robust[0])
    monkeypatch.setattr(judge, "load_net", lambda folder, name, layers: nets[name])
    references = {net: metrics.gaussian_statistics(features) for net, features, _ in (robust, *public)}
    monkeypatch.setattr(judge, "train_statistics", lambda net, data: references[net])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = [str(tmp_path / "labelled.npz"), str(tmp_path / "bare.npz"), "--data", "x"]

    judge.main([*command, "--json"])
    labelled, bare = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(labelled) == ["counts", "distance", "file", "n", "robust", "share"]
    assert labelled["distance"] == pytest.approx(0, abs=1e-9) and labelled["robust"] == archs[0] == "small-32"
    assert labelled.pop("share") > 0 and {**labelled, "file": bare["file"]} == bare

    judge.main([*command, "--json", "--limit", "20", "--robust", "resnet18-half"])
    first, _ = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["n"] == sum(first["counts"]) == 20 and archs[1] == first["robust"] == "resnet18-half"
    assert first["share"] == np.mean(robust[2].argmax(1)[:20].numpy() == labels[:20])

    judge.main([*command, "--weights", "y"])
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[:8] == ["n", "share", "distance", "acc56", "acc32", "cis", "cfd", "diversity"]
    assert [float(cell) for cell in rows[0][:3]] == pytest.approx([40, first["share"], 0], abs=0.5)
    accuracies = [np.mean(logits.argmax(1).numpy() == labels) for _, _, logits in public]
    assert [float(cell) for cell in rows[0][3:5]] == accuracies and accuracies[0] != accuracies[1]
    assert float(rows[0][6]) == 0  # by its own reference, not by the robust judge's
    assert [rows[1][i] for i in (1, 3, 4, 7)] == ["-"] * 4 and float(rows[1][5]) > 1


def test_errors_are_one_line(images, tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "x.npz", images.permute(0, 2, 3, 1).numpy())
    command = [tmp_path / "x.npz", "--data", tmp_path]
    assert "9 is not in 10" in error(judge, capsys, *command, "--limit", 9)
    assert "invalid int value" in error(judge, capsys, *command, "--limit", "abc")
    assert "no CIFAR-10 in --data" in error(judge, capsys, *command)
    monkeypatch.setattr(judge, "ROOT", tmp_path)
    assert "cem_sup_small-32.pt" in error(judge, capsys, *command)


@pytest.mark.parametrize("labels", [np.arange(39) % 10, np.arange(40), np.full(40, 0.5)])
def test_wrong_labels_are_refused(images, labels, tmp_path):
    np.savez(tmp_path / "x.npz", images.permute(0, 2, 3, 1).numpy(), labels)
    with pytest.raises(ValueError, match="40 labels in 0..9"):
        judge.load_samples(tmp_path / "x.npz", None)
