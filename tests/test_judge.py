"""tests/judge.py on random nets: its figures by hand."""
import json

import numpy as np
import pytest
import torch

import judge
import metrics


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    colour = torch.rand(40, 3, 1, 1, generator=generator)
    return (255 * colour * torch.rand(40, 3, 32, 32, generator=generator)).to(torch.uint8)


@pytest.fixture(scope="module")
def nets(images):
    torch.manual_seed(0)
    nets = judge.ResNet(56).eval(), judge.ResNet(32).eval()
    for net in nets:  # logits that differ from image to image
        net.linear.weight.data *= 50
        _, logits = metrics.extract_features(images, net)
        net.linear.bias.data -= logits.mean(0)
    return nets


@pytest.fixture(scope="module")
def outputs(nets, images):
    return [metrics.extract_features(images, net) for net in nets]


def test_the_nets_are_those_of_the_paper(nets, outputs):
    counts = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts == [853_018, 464_154]  # He et al., table 6: 0.85M and 0.46M
    for features, logits in outputs:
        assert features.shape == (40, 64) and logits.shape == (40, 10)
    convolutions = [m for m in nets[0].modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 55


def test_pixels_are_normalised_as_in_training(nets):
    seen = []
    hook = nets[1].conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    metrics.extract_features(torch.full((1, 3, 32, 32), 51, dtype=torch.uint8), nets[1])
    hook.remove()
    expected = [(0.2 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]  # ImageNet's
    assert seen[0][0, :, 5, 5].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_shortcut_drops_pixels_and_pads_channels():
    block = judge.Block(16, 32, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2].relu())
    assert y[:, :8].abs().max() == y[:, 24:].abs().max() == 0


def test_figures_by_hand(nets, images, outputs):
    (features, logits56), (_, logits32) = outputs
    labels = torch.arange(40) % 10
    mu, sigma = metrics.gaussian_statistics(features)
    figures = judge.judge(images, labels, *nets, (mu + 0.5, sigma))
    assert figures["n"] == 40 and figures["cfd"] == pytest.approx(64 / 4)
    by56, by32 = logits56.argmax(1), logits32.argmax(1)
    assert figures["acc56"] == np.mean(by56.numpy() == labels.numpy())
    assert figures["acc32"] == np.mean(by32.numpy() == labels.numpy())
    assert figures["counts"] == [int((by56 == k).sum()) for k in range(10)]
    assert figures["hit"] == len(set(by56.tolist())) > 1

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


def test_the_command(images, outputs, tmp_path, monkeypatch, capsys):
    x, labels = images.permute(0, 2, 3, 1).numpy(), np.arange(40, dtype=np.uint8) % 10
    np.savez(tmp_path / "labelled.npz", x, labels)
    np.savez(tmp_path / "bare.npz", x)
    reference = metrics.gaussian_statistics(outputs[0][0])
    monkeypatch.setattr(judge, "load_net", lambda *args: torch.nn.Identity().eval())
    monkeypatch.setattr(judge, "train_statistics", lambda net, data: reference)
    monkeypatch.setattr(metrics, "extract_features", lambda images, net, label: outputs[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = [str(tmp_path / "labelled.npz"), str(tmp_path / "bare.npz"), "--data=", "--weights="]
    judge.main([*command, "--json"])
    labelled, bare = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert labelled["cfd"] == pytest.approx(0, abs=1e-9) and "acc56" in labelled
    assert sorted(bare) == ["cfd", "cis", "counts", "file", "hit", "n"]
    judge.main(command)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[:6] == ["n", "acc56", "acc32", "cis", "cfd", "diversity"]
    assert rows[0][5] == f"{labelled['diversity']:.3f}" and rows[1][:3] == ["40", "-", "-"]


@pytest.mark.parametrize("labels", [np.arange(39) % 10, np.arange(40), np.full(40, 0.5)])
def test_wrong_labels_are_refused(images, labels, tmp_path):
    np.savez(tmp_path / "x.npz", images.permute(0, 2, 3, 1).numpy(), labels)
    with pytest.raises(ValueError, match="40 labels in 0..9"):
        judge.load_samples(tmp_path / "x.npz", None)


def test_wrong_weights_are_refused(nets, tmp_path, capsys):
    name = "resnet32-d509ac18.th"
    torch.save({"state_dict": nets[1].state_dict()}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: its sha256"):
        judge.load_net(tmp_path, name, 32)
    with pytest.raises(OSError, match="resnet56"):
        judge.load_net(tmp_path, "resnet56-4bfd9763.th", 56)


def test_the_files_names_for_the_parameters_are_read(nets, tmp_path, monkeypatch):
    name = "resnet32-d509ac18.th"
    state = {f"module.{key}": value for key, value in nets[1].state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 92.6}, tmp_path / name)
    sha256 = judge.hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    monkeypatch.setitem(judge.SHA256, name, sha256)
    net = judge.load_net(tmp_path, name, 32)
    assert not net.training and torch.equal(net.linear.weight, nets[1].linear.weight)
