"""What makes the scripts fast, as far as it can be seen without a GPU: operations; how often a training step waits for
the device: once for each attack or chain, which says whether all was finite; and that recorded updates and chains are
the updates and chains themselves."""
import json
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import binary_at_ebm
import cem_sup
import cem_unsup
import jeat
import samplers
from samplers import Recorded, ReplayBuffer, crop_flip, entropy


def waits(packet, args):
    """Whether this call makes the host wait for the device."""
    masks = packet is torch.ops.aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
    return masks or packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class Count(TorchDispatchMode):
    """Operations of convolutions and products, and the calls that make the host wait for the device."""
    operations, waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, packet = function(*args, **(kwargs or {})), function._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        self.waits += waits(packet, args)
        return out


@contextmanager
def counting(monkeypatch):
    with Count() as count, monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "tolist"):
            method = getattr(torch.Tensor, name)

            def counted(*args, method=method, **kwargs):
                count.waits += 1
                return method(*args, **kwargs)
            patch.setattr(torch.Tensor, name, counted)
        yield count


def forward_operations(f, x):
    with Count() as count, torch.no_grad():
        f(x)
    return count.operations / len(x)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


ATTACK = dict(step_size=0.1, eps=0.5, norm="l2")


def cem_sup_step(f, x, K):
    cem_sup.at_loss(f, x, torch.arange(len(x)) % 10, steps=K, **ATTACK).backward()


def cem_unsup_step(g, x, K, views="one"):
    cem_unsup.cem_loss(g, x, x.flip(3), tau=0.5, views=views, steps=K, **ATTACK).backward()


def jeat_step(f, x, K, buffer=True):
    buffer = ReplayBuffer(20, x.shape[1:]) if buffer else None
    jeat.jeat_loss(f, x, torch.arange(len(x)) % 10, buffer, steps=1, sgld_steps=K, **ATTACK)[0].backward()


def binary_at_ebm_step(f, x, K):
    x_pos, x_neg = binary_at_ebm.adversaries(f, x, x.flip(3), K=K, J=2)
    loss, f_pos, f_neg = binary_at_ebm.at_ebm_loss(f, x_pos, x_neg)
    loss.backward()
    binary_at_ebm.auc(f_pos, f_neg)


# a training step with K attack steps; per image and in forwards of one image: its operations, and how many of the
# training pass's forwards are of images (whose gradient, at the stem, is not computed)
STEPS = {"cem_sup": (cem_sup, cem_sup_step, lambda K: 2 * K + 3, 1),
         "cem_unsup, one view": (cem_unsup, cem_unsup_step, lambda K: 2 * K + 7, 2),
         "cem_unsup, both views": (cem_unsup, partial(cem_unsup_step, views="both"), lambda K: 4 * K + 6, 2),
         "jeat": (jeat, jeat_step, lambda K: 2 + 2 * K + 6, 2),
         "prejeat": (jeat, partial(jeat_step, buffer=False), lambda K: 2 + 3, 1),
         "binary_at_ebm": (binary_at_ebm, binary_at_ebm_step, lambda K: 2 * K + 2 * 2 + 9.3, 0)}


SMALL = {cem_sup: "small-16", cem_unsup: "small-32", jeat: "small-24", binary_at_ebm: "small-32"}


@pytest.mark.parametrize("name", STEPS)
def test_operations_of_a_training_step(name, images):
    """The attack does not compute the parameters' gradients (3 forwards a step instead of 2); no forward is wasted."""
    script, step, expected, passes = STEPS[name]
    arch, images = ("resnet50", images[:1, :, :8, :8]) if name == "binary_at_ebm" else (SMALL[script], images)
    f = script.make_model(arch).train()  # R1's part, 9.3 - 6, depends on the net, not on the size of images
    forward = forward_operations(f, images)
    stem = forward_operations(next(m for m in f.modules() if isinstance(m, nn.Conv2d)), images) / forward
    for K in (0, 1, 4):
        with Count() as count:
            step(f, images, K)
        assert count.operations / forward / len(images) == pytest.approx(expected(K) - passes * stem, rel=0.005)


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_waits_for_its_attacks_only(name, images, monkeypatch):
    """Whatever the number of their steps. Labels are looked at on a CPU only."""
    script, step, *_ = STEPS[name]
    f = script.make_model(SMALL[script]).train()
    monkeypatch.setattr(samplers, "check_labels", lambda y, logits: y)
    waits = []
    for K in (1, 3):
        with counting(monkeypatch) as count:
            step(f, images, K)
        waits.append(count.waits)
    assert waits[0] == waits[1] <= 6  # a call with a finite eps also looks at its start


def test_augmentation_does_not_wait(images, monkeypatch):
    with counting(monkeypatch) as count:
        crop_flip(images)
        orders = torch.randperm(4).tolist()  # of the colour changes: on the CPU
        own = count.waits
        cem_unsup.augment(images)
    assert len(orders) == 4 and own == 1 and count.waits == 2


def test_the_counters_count(images, monkeypatch):
    """The two tests above would pass if nothing were counted."""
    with counting(monkeypatch) as count:
        images.sum().item()
        images[images > 0.5]
        images.nonzero()
        images.cpu()
        images.tolist()
        images.numpy()
        bool((images > 2).any())
    assert count.waits == 7
    f = nn.Conv2d(3, 4, 3)
    assert forward_operations(f, images) == 2 * 27 * 4 * 30 * 30


def test_similarities_are_a_small_part_of_a_maxent_step(images):
    """N x N products at N = 512 beside 512 images through a ResNet-18."""
    g = cem_unsup.make_model("resnet18").eval()
    forward = forward_operations(g, images[:1])
    z = torch.randn(512, 512)
    with Count() as count:
        torch.autograd.grad(entropy(nn.Identity(), 0.5)(z.requires_grad_()).sum(), z)
    assert count.operations >= 2 * 512 ** 3 and count.operations < 0.01 * 512 * 2 * forward


# ---------------------------------------------------------------- one launch for many kernels
class Tape(TorchDispatchMode):
    """A stand-in for a CUDA graph on a CPU: notes the kernels of its body down, and does them again on the same memory.
    What a CUDA graph cannot hold, it refuses. Recording runs the kernels, where CUDA only notes them down: so the first
    replay has nothing left to do."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet, kwargs = function._overloadpacket, kwargs or {}
        # lift_fresh: a tensor made of Python's numbers is copied from the host
        if waits(packet, args) or packet in (torch.ops.aten._unique2, torch.ops.aten.lift_fresh):
            raise RuntimeError(f"{function} waits for the device")
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        for function, args, kwargs, out in self.calls:
            new = function(*args, **kwargs)
            for a, b in zip(tree_leaves(new), tree_leaves(out)):
                if torch.is_tensor(a) and a.data_ptr() != b.data_ptr():
                    b.detach().copy_(a)


@pytest.fixture
def tapes(monkeypatch):
    """Recorded works on a CPU, with tapes for graphs; these are all of them."""
    tapes, running = [], []

    @contextmanager
    def graph(tape, stream):
        tapes.append(tape)
        running.append(tape)
        try:
            with tape:
                yield
        finally:
            running.pop()

    monkeypatch.setattr(Recorded, "device", "cpu")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(samplers, "_side_stream", nullcontext)
    monkeypatch.setattr(samplers, "recording", lambda x: len(running) > 0)
    monkeypatch.setattr(samplers, "check_labels", lambda y, *args, **kwargs: y.long())  # on CUDA it does not wait
    return tapes


TRAININGS = {
    "cem_sup": (cem_sup, 20, "--epochs 5 --attack-steps 2"),
    "cem_sup, bfloat16": (cem_sup, 20, "--epochs 3 --amp"),
    "cem_unsup": (cem_unsup, 20, "--epochs 3 --attack-views both"),
    "cem_unsup, one view": (cem_unsup, 20, "--epochs 3 --attack-views one"),
    "jeat": (jeat, 44, "--epochs 2 --sgld-steps 2 --buffer-size 20"),
    "at": (jeat, 44, "--epochs 2 --method at --attack-steps 2"),
    # K = 0, 1, 2, of nine updates each
    "binary_at_ebm": (binary_at_ebm, 20, "--epochs 9 --attack-steps 2 --auc-window 9 --auc-threshold 0"),
    "binary_at_ebm, ood": (binary_at_ebm, 20, "--epochs 3 --mode ood --attack-steps 2")}


def train(name, out, record, device="cpu"):
    """Some updates of script.train, the last of each epoch with fewer images -> the weights and buffers, end to end,
    and each epoch's figures."""
    script, n, flags = TRAININGS[name]
    args = script.parse_args(["--smoke", "--batch-size", "8", "--device", device, "--out", str(out),
                              "--record" if record else "--no-record", *flags.split()])
    args.amp = "--amp" in flags
    out.mkdir()
    torch.manual_seed(0)
    f = script.make_model(args.arch).to(device, memory_format=torch.channels_last)
    x, y = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8).to(device), (torch.arange(n) % 10).to(device)
    data = {cem_sup: (x, y), cem_unsup: (x,), jeat: (x, y), binary_at_ebm: (x, x.flip(0))}[script]
    if script is jeat:
        buffer = ReplayBuffer(args.buffer_size, x.shape[1:], device=device) if args.method == "jeat" else None
        data = buffer, *data
    script.train(f, *data, args)
    for p in f.parameters():  # in another memory format, an optimizer on CUDA takes one parameter after the other
        assert all(n == 1 or a == b for n, a, b in zip(p.shape, p.stride(), p.grad.stride()))
    figures = [json.loads(line) for line in open(out / "log.jsonl")]
    for row in figures:
        del row["time"]
    return torch.cat([t.detach().flatten().double() for t in f.state_dict().values()]), figures


@pytest.mark.parametrize("name", TRAININGS)
def test_recorded_updates_are_the_updates(name, tapes, tmp_path):
    """The scripts' training loops, bit for bit."""
    weights, figures = train(name, tmp_path / "eager", record=False)
    assert len(tapes) == 0
    recorded, recorded_figures = train(name, tmp_path / "recorded", record=True)
    assert torch.equal(recorded, weights) and recorded_figures == figures
    assert sum(tape.replays - 1 for tape in tapes) >= 2  # those that did something


@pytest.mark.cuda
@pytest.mark.parametrize("name", TRAININGS)
def test_recorded_updates_on_cuda(name, tmp_path, monkeypatch, capsys):
    """The same numbers, up to rounding, which grows along the updates."""
    replays, replay = [], torch.cuda.CUDAGraph.replay

    def counted(graph):
        replays.append(1)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights, figures = train(name, tmp_path / "eager", record=False, device="cuda")
    assert len(replays) == 0
    recorded, recorded_figures = train(name, tmp_path / "recorded", record=True, device="cuda")
    assert "goes on without" not in capsys.readouterr().out and len(replays) >= 3
    assert (recorded - weights).norm() < 0.01 * weights.norm()
    assert recorded_figures[0]["loss"] == pytest.approx(figures[0]["loss"], rel=0.02)


def chains(script, device, *flags):
    """script.sample with a random net: its uint8 images."""
    args = script.parse_args(["--smoke", "--device", device, "--num-samples", "60", "--sample-batch-size", "10",
                              "--sample-steps", "3", "--sample-step-size", "0.1", "--sample-norm", "l2",
                              "--sample-noise", "0.01", *flags])
    args.amp = False
    torch.manual_seed(0)
    f = script.make_model(args.arch).to(device, memory_format=torch.channels_last).eval()
    if script is binary_at_ebm:
        return script.sample(f, "ascent", torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8).to(device), args)[0]
    sampler = {cem_sup: "rcs", cem_unsup: "pgd", jeat: "gaussian"}[script]
    return script.sample(f, sampler, lambda y: torch.rand(len(y), 3, 32, 32, device=device), args)[0]


@pytest.mark.parametrize("script", SMALL)
def test_recorded_chains_are_the_chains(script, tapes):
    images = chains(script, "cpu")
    assert len(tapes) == 0 and len(images.unique(dim=0)) == 60
    assert torch.equal(chains(script, "cpu", "--record"), images) and tapes[0].replays == 3


@pytest.mark.cuda
@pytest.mark.parametrize("script", SMALL)
def test_recorded_chains_on_cuda(script, capsys):
    images, recorded = chains(script, "cuda"), chains(script, "cuda", "--record")
    assert "goes on without" not in capsys.readouterr().out
    assert (images.int() - recorded.int()).abs().double().mean() < 0.1


def test_nothing_is_recorded_unless_asked_for(tapes, monkeypatch):
    calls, x = [], torch.ones(2)

    def fn(x):
        calls.append(x)
        return x + 1

    off = Recorded(fn, on=False)
    monkeypatch.setattr(Recorded, "device", "cuda")
    on = Recorded(fn)  # but on a CPU
    for _ in range(8):
        assert off(x)[0] == on(x)[0] == 2
    assert len(calls) == 16 and all(call is x for call in calls) and len(tapes) == 0


def test_a_recorded_program_is_of_its_shapes_and_constants(tapes):
    """Else an attack would keep its first K for ever, and a last batch of an epoch its first size."""
    weight = torch.ones(1)
    fn = Recorded(lambda x, K: K * weight * x)
    for i, (n, K) in enumerate([(3, 1), (2, 1)] * 6 + [(3, 2), (2, 2)] * 6):
        weight += 1  # in place: the graph reads it
        assert torch.equal(fn(torch.full((n,), float(i)), K=K), torch.full((n,), float(i * K * (i + 2))))
    assert len(tapes) == 4 and len(fn.graphs) == 2  # those of the first K are let go


def test_a_recorded_program_sees_new_weights(tapes):
    """load_state_dict copies in place. Folded batch norms are folded anew in each call."""
    f, other = (cem_sup.make_model("small-16") for _ in range(2))
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    attack = Recorded(lambda x, y: cem_sup.at_loss(f.eval(), x, y, steps=1, step_size=0.5, eps=0.5).detach())
    torch.manual_seed(0)
    first = [attack(x, y).item() for _ in range(6)]
    f.load_state_dict(other.state_dict())
    torch.manual_seed(0)
    second = [attack(x, y).item() for _ in range(6)]
    torch.manual_seed(0)
    expected = [cem_sup.at_loss(other.eval(), x, y, steps=1, step_size=0.5, eps=0.5).item() for _ in range(6)]
    assert tapes[0].replays == 9 and second == expected and first != expected


def test_where_recording_fails_it_goes_on_without(tapes, capsys):
    fn = Recorded(lambda x: x * x.sum().item())
    for i in range(8):
        assert torch.equal(fn(torch.full((2,), float(i))), torch.full((2,), 2.0 * i * i))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "aten._local_scalar_dense.default waits for the device" in lines[0] and len(tapes) == 1


def test_a_training_that_cannot_be_recorded_goes_on(tapes, tmp_path, monkeypatch, capsys):
    weights, figures = train("cem_sup", tmp_path / "eager", record=False)
    monkeypatch.setattr(samplers, "recording", lambda x: False)  # ascend waits
    recorded, recorded_figures = train("cem_sup", tmp_path / "recorded", record=True)
    assert torch.equal(recorded, weights) and recorded_figures == figures
    assert capsys.readouterr().out.count("goes on without") == len(tapes) == 1


def test_a_recorded_training_that_diverges_ends(tapes, tmp_path, monkeypatch):
    """ascend looks for a NaN in the first three calls only; the epoch's log does in any case."""
    rates = iter([0.0, 0.0, 0.0, 0.0, 1e30, 1e30])
    monkeypatch.setattr(cem_unsup, "learning_rate", lambda args, t: next(rates))
    with pytest.raises(ValueError, match="training diverged"):
        train("cem_unsup", tmp_path / "run", record=True)
    assert tapes[0].replays == 3 and torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 2
