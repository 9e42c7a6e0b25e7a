"""What makes the scripts fast, as far as it can be counted without a GPU: operations, and how often a training step
waits for the device: once for each attack or chain, which says whether all was finite."""
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import binary_at_ebm
import cem_sup
import cem_unsup
import jeat
import samplers
from samplers import ReplayBuffer, crop_flip, entropy


class Count(TorchDispatchMode):
    """Operations of convolutions and products, and the calls that make the host wait for the device."""
    operations, waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, packet = function(*args, **(kwargs or {})), function._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        masks = packet is torch.ops.aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += masks or packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
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
    monkeypatch.setattr(jeat, "check_labels", lambda y, logits: y)
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
