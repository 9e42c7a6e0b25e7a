"""samplers.py against closed forms: steps, projections, laws, scores and the statements that CEM rests on."""
import copy
import gc
import math
import pickle
import warnings
import weakref
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cem_unsup import augment
from samplers import (Refused, ReplayBuffer, accuracy, ascend, colour_fields, crop_flip, cross_entropy, entropy,
                      eval_mode, fit_gaussians, frozen, info_nce, joint_energy_score, langevin, load_images, log_p_x,
                      log_p_x_given_y, log_p_y_given_x, logit, project, reinforced, save_samples, sgld, starts,
                      steepest, to_float, to_uint8, worst_case)

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
free = partial(ascend, clamp=None)  # no box
SHAPES, NORMS = [(4, 3, 5, 5), (4, 2)], ["l2", "linf", "none"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def linear(w):  # a score with gradient w
    return lambda x: (w * x).flatten(1).sum(1)


flat = linear(0)  # a score with gradient 0


def spread(shape):  # vectors of four sizes, one of them zero
    return randn(*shape, seed=1) * torch.tensor([1, 30, 0.01, 0]).view(4, *[1] * (len(shape) - 1))


def length(v):  # [B, 1, ...]
    return v.flatten(1).norm(dim=1).view(-1, *[1] * (v.ndim - 1))


def assert_uniform(values, low, high):  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1 % level
    u = ((values.flatten() - low) / (high - low)).sort().values
    assert (u - torch.linspace(0, 1, len(u))).abs().max() < 1.95 / len(u) ** 0.5


def mlp(inputs=6, classes=4):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def image_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))


# ---- steps and projections ----

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1, 1e-12])
def test_step_directions(shape, scale):
    x, w = randn(*shape), spread(shape)
    for norm, u in {"l2": w / length(w).clamp_min(1e-9), "linf": w.sign(), "none": w * scale}.items():
        close(steepest(w * scale, norm), u, atol=1e-6 * scale)
        close(free(linear(w * scale), x, 3, 0.3, norm=norm), x + 0.9 * u)
        exact(free(linear(w * scale), x, 3, 0.3, norm=norm)[3], x[3])  # no gradient, no step


def test_a_step_has_length_one_at_every_scale():
    """Where squares underflow or overflow, too; in float16 as well."""
    w = randn(1, 12)
    for size in 10.0 ** torch.arange(-37, 38):
        close(steepest(w * size, "l2"), w / length(w), atol=1e-5)
    assert steepest(torch.full((1, 12), 1e-5, dtype=torch.float16), "l2").norm() > 0.99
    assert steepest(torch.full((1, 12), 1e-44), "l2").norm() > 0.99  # subnormal


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [0, 0.3, 2, math.inf])
def test_projections(shape, eps):
    x_0, d = randn(*shape), spread(shape)
    ball = torch.where(length(d) <= eps, d, d / length(d) * min(eps, 9))
    cube = torch.where(d.abs() <= eps, d, d.sign() * min(eps, 9))
    for norm, nearest in {"l2": ball, "none": ball, "linf": cube}.items():
        close(project(x_0 + d, x_0, eps, norm), x_0 + nearest)
    close(free(linear(d), x_0, 1, 1.0, norm="none", eps=eps), x_0 + ball)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random_start", [False, True])
def test_the_ball_is_around_the_start(norm, random_start):
    x, w = 0.3 + 0.1 * randn(5, 3, 2, 2), randn(5, 3, 2, 2, seed=1)
    x_hat = free(linear(w), x, 30, 0.15, norm=norm, eps=0.2, random_start=random_start)
    close(x_hat, x + 0.2 * (w.sign() if norm == "linf" else w / length(w)), atol=1e-5)


def test_the_box_comes_after_the_ball():
    x, w = torch.tensor([[0.9, 0.5]]), torch.tensor([[0.8, 0.6]])
    close(ascend(linear(w), x, 1, 1.0, eps=0.5), torch.tensor([[1.0, 0.8]]))
    close(ascend(linear(-w), x, 1, 2.0, norm="linf", eps=0.6), torch.tensor([[0.3, 0.0]]))
    close(ascend(linear(w), x, 1, 2.0, clamp=(-1, 2)), torch.tensor([[2.0, 1.7]]))
    close(free(linear(w), x, 1, 2.0), torch.tensor([[2.5, 1.7]]))
    close(ascend(linear(w), 1 + x, 1, 1.0), torch.ones(1, 2))
    with pytest.raises(ValueError, match="outside the box"):  # it would be moved by more than eps
        ascend(linear(w), 1 + x, 1, 1.0, eps=0.1)


@pytest.mark.parametrize("norm", NORMS)
def test_noise(norm):
    x = torch.rand(4000, 3, 2, generator=rng())
    for steps, deviation in ((1, 0.3), (4, 0.6)):  # independent at each step, sample and pixel
        d = free(flat, x, steps, 1.0, norm=norm, noise=0.3, generator=rng(1)) - x
        close(d.mean(0), torch.zeros(3, 2), rtol=0, atol=0.03)
        close(d.flatten(1).T.cov() / deviation ** 2, torch.eye(6), rtol=0, atol=0.1)
        assert ((d / deviation) ** 4).mean().item() == pytest.approx(3, rel=0.05)  # Gaussian, not uniform
    for clamp in (None, (0, 1)):  # inside the projection
        x_hat = ascend(flat, x, 2, 0.1, norm=norm, eps=0.3, noise=50.0, clamp=clamp, generator=rng(1))
        size = (x_hat - x).abs().flatten(1).amax(1) if norm == "linf" else length(x_hat - x)
        assert size.max() <= 0.3 + 1e-6
        assert size.min() > 0.29 if clamp is None else x_hat.aminmax() == (0, 1)


@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("shape", [(3, 2, 2), (2,)])
def test_random_start_in_the_l2_ball(norm, shape):
    x = randn(20000, *shape)
    d = free(flat, x, 1, 1.0, eps=0.7, norm=norm, random_start=True, generator=rng(1)) - x
    radius, u, dim = length(d), (d / length(d)).flatten(1), d[0].numel()
    assert_uniform(radius, 0, 0.7)
    close(u.mean(0), torch.zeros(dim), rtol=0, atol=0.03)
    close(u.T @ u / len(u), torch.eye(dim) / dim, rtol=0, atol=0.05 / dim)
    close((u ** 4).mean(0), torch.full((dim,), 3 / (dim * (dim + 2))), rtol=0.06, atol=0)  # a cube's differ
    assert abs(torch.corrcoef(torch.stack([radius.flatten(), u[:, 0]]))[0, 1]) < 0.03


def test_random_start_in_the_linf_ball():
    x = randn(20000, 2, 2)
    d = (free(flat, x, 1, 1.0, eps=0.7, norm="linf", random_start=True, generator=rng(1)) - x).flatten(1).T
    for coordinate in d:
        assert_uniform(coordinate, -0.7, 0.7)
    close(d.corrcoef(), torch.eye(4), rtol=0, atol=0.03)


@pytest.mark.parametrize("norm", NORMS)
def test_the_start_is_in_the_box_and_no_steps_leave_x(norm):
    x, seen = torch.rand(30, 3, 4, 4, generator=rng()), []
    ascend(flat, x, 1, 0.1, eps=9.0, norm=norm, random_start=True, callback=lambda *args: seen.append(args))
    assert seen[0][1].aminmax() == (0, 1)
    for arguments in ({}, dict(random_start=True, noise=1.0, eps=1.0)):
        same = ascend(flat, x, 0, 0.1, norm=norm, **arguments)
        exact(same, x)
        assert same.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("arguments", [dict(noise=0.1), dict(eps=1.0, random_start=True),
                                       dict(eps=1.0, random_start=True, norm="linf")])
def test_the_generator_is_the_only_source_of_chance(arguments):
    run, state = partial(free, linear(randn(3, 4)), randn(3, 4), 3, 0.1, **arguments), torch.get_rng_state()
    exact(run(generator=rng(0)), run(generator=rng(0)))
    assert not torch.equal(run(generator=rng(0)), run(generator=rng(1)))
    exact(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm", NORMS)
def test_callback(norm):
    x, forwards, seen = torch.rand(3, 6, dtype=torch.float64, generator=rng()), [], []

    def score(x):
        forwards.append(x)
        return -((x - 0.4) ** 4).sum(1)

    x_hat = ascend(score, x, 4, 0.02, norm=norm, callback=lambda *args: seen.append(args))
    ks, xs, scores = zip(*seen)
    assert ks == (0, 1, 2, 3) and len(forwards) == 4  # the score comes from the step's own forward
    exact(xs[0], x)
    for x_k, s_k, x_next in zip(xs, scores, [*xs[1:], x_hat]):
        exact(s_k, -((x_k - 0.4) ** 4).sum(1))
        close(x_next, ascend(score, x_k, 1, 0.02, norm=norm))
        assert not s_k.requires_grad and not x_k.requires_grad


@pytest.mark.parametrize("norm, step, eps", [("none", 0.2, 0.8), ("l2", 0.05, 0.8), ("linf", 0.05, 0.4)])
def test_pgd_reaches_the_constrained_maximum_of_a_quadratic(norm, step, eps):
    h = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)  # the Hessian's diagonal
    x, d = randn(20, 3, dtype=torch.float64), randn(20, 3, seed=1, dtype=torch.float64)
    d = eps * (d.sign() if norm == "linf" else d / length(d))
    centre, scores = x + d + 2 * d / h, []  # the gradient at x + d is 2 d: the maximum, by Kuhn-Tucker
    x_hat = free(lambda z: -(h * (z - centre) ** 2).sum(1) / 2, x, 200, step, eps=eps, norm=norm,
                 callback=lambda k, x_k, s: scores.append(s))
    close(x_hat, x + d)
    rise = torch.stack(scores).diff(dim=0)
    assert rise[:3].min() > 1e-5 and rise.min() > -1e-12


@pytest.mark.parametrize("changes, message", [
    (dict(norm="l1"), "norm must"), (dict(steps=-1), "steps must"), (dict(step_size=-0.1), "step_size must"),
    (dict(step_size=math.nan), "step_size"), (dict(eps=-1.0), "eps must"), (dict(noise=-0.1), "noise must"),
    (dict(eps="0.5"), "eps must"), (dict(eps=None), "eps must"), (dict(step_size=torch.ones(2)), "step_size must"),
    (dict(steps="7"), "steps must"), (dict(noise=[0.1]), "noise must"), (dict(clamp=0), "clamp must"),
    (dict(clamp="01"), "clamp must"), (dict(clamp=(0, 1, 2)), "clamp must"), (dict(clamp=(None, 1)), "clamp must"),
    (dict(clamp=(1, 0)), "clamp must"), (dict(clamp=np.array([0, 1])), "clamp must"),
    (dict(random_start=True), "finite eps"), (dict(x=torch.zeros(2, 3, dtype=torch.uint8)), "float"),
    (dict(x=torch.zeros(2)), "float"), (dict(score=torch.sum), r"\[2\], not \[\]"),
    (dict(score=lambda x: x[:, :1]), r"not \[2, 1\]"), (dict(score=lambda x: x[0]), r"not \[3\]")])
def test_ascend_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ascend(**{**dict(score=flat, x=torch.zeros(2, 3), steps=1, step_size=0.1), **changes})


def test_numbers_of_numpy_and_tensors_of_one_are_numbers():
    x, w = torch.rand(4, 3, generator=rng()), randn(4, 3)
    run = partial(ascend, linear(w), x, generator=rng())
    expected = ascend(linear(w), x, 3, 0.25, eps=0.5, noise=0.0, clamp=(-0.25, 1))
    assert expected.min() == -0.25
    for number in (np.float64, np.float32, torch.tensor, lambda v: torch.tensor([v])):
        close(run(np.int64(3), number(0.25), eps=number(0.5), noise=number(0.0), clamp=[number(-0.25), 1]), expected)


# ---- no side effects ----

def test_no_side_effects():
    f, x = image_net(), torch.rand(5, 3, 8, 8, generator=rng()).requires_grad_()
    x.grad, f[0].weight.grad = torch.ones_like(x), torch.full_like(f[0].weight, 7.0)
    f[4].bias.requires_grad_(False)
    for p in list(f.parameters())[:-1]:
        p.register_hook(lambda g: pytest.fail("a parameter's gradient was computed"))
    run = partial(ascend, cross_entropy(f, torch.arange(5)), x, 3, 0.1, eps=0.5)
    values, state = x.detach().clone(), {k: v.clone() for k, v in f.state_dict().items()}
    with eval_mode(f):
        x_hat = run()
        with torch.no_grad():
            exact(run(), x_hat)
            assert not torch.is_grad_enabled()
        assert not any(m.training for m in f.modules())
    assert not x_hat.requires_grad and not torch.equal(x_hat, x)
    assert torch.equal(x, values) and x.requires_grad and (x.grad == 1).all()
    assert (f[0].weight.grad == 7).all() and all(p.grad is None for p in list(f.parameters())[1:])
    assert [p.requires_grad for p in f.parameters()] == [True] * 5 + [False]
    assert all(torch.equal(v, state[k]) for k, v in f.state_dict().items())  # the running statistics, too
    run()
    assert all(m.training for m in f.modules()) and f[1].num_batches_tracked == 3  # `ascend` leaves the mode


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_eval_mode_restores_each_module(error):
    f, g, h = image_net(), nn.Dropout(), nn.Dropout().eval()
    f[1].eval()  # a frozen BatchNorm in a net that trains
    for fails in (False, True):
        try:
            with eval_mode(f, g, h), eval_mode(f):
                assert not any(m.training for m in [*f.modules(), g, h])
                if fails:
                    raise error
        except error:
            assert fails
        assert [m.training for m in f.modules()] == [True, True, False, True, True, True]
        assert g.training and not h.training


# ---- scores ----

TABLE = {log_p_y_given_x: (1, -1), log_p_x_given_y: (1, 0), reinforced: (1, 1), cross_entropy: (-1, 1),
         joint_energy_score: (-1, 0), lambda f, y: log_p_x(f): (0, 1)}  # (a, b)
# score a f_y + b LSE f, gradient a grad f_y + b sum_k p_k grad f_k


def gradient(score, x):  # as the sampler sees it
    return free(score, x, 1, 1.0, norm="none") - x


@pytest.mark.parametrize("make", TABLE)
def test_scores_have_the_gradients_of_the_table(make):
    (a, b), f, i = TABLE[make], mlp(), torch.arange(5)
    x, y = randn(5, 6, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    score = make(f, y)
    close(score(x), a * f(x)[i, y] + b * f(x).exp().sum(1).log())
    jacobian = torch.func.vmap(torch.func.jacrev(f))(x)  # [B, K, D]
    expected = a * jacobian[i, y] + b * torch.einsum("bk,bkd->bd", F.softmax(f(x), 1).detach(), jacobian)
    close(gradient(score, x), expected, atol=1e-12)
    for direction in torch.eye(6, dtype=torch.float64):
        slope = (score(x + 1e-5 * direction) - score(x - 1e-5 * direction)) / 2e-5
        close(slope.detach(), expected @ direction, atol=1e-8)
    close(make(lambda x: f(x) + 1e4, y)(x), score(x) + (a + b) * 1e4, rtol=1e-12, atol=1e-9)  # no overflow


def test_adversarial_training_is_a_biased_maximum_likelihood_step():
    f, x, i, y = mlp(), randn(5, 6, dtype=torch.float64), torch.arange(5), torch.tensor([0, 3, 1, 1, 2])
    close(gradient(cross_entropy(f, y), x),  # inner: Langevin's gradient on log p(x), with the bias -grad f_y
          gradient(log_p_x(f), x) - gradient(lambda z: f(z)[i, y], x), atol=1e-12)

    def by_parameters(values):
        return torch.cat([g.flatten() for g in torch.autograd.grad(values.mean(), list(f.parameters()))])

    x_hat = free(cross_entropy(f, y), x, 7, 0.1, eps=0.5)
    p = F.softmax(f(x_hat), 1).detach()
    consistency = by_parameters(f(x)[i, y] - f(x_hat)[i, y])
    contrastive = sum(by_parameters(p[:, k] * (f(x_hat)[i, y] - f(x_hat)[:, k])) for k in range(4))
    close(contrastive, -by_parameters(cross_entropy(f, y)(x_hat)), atol=1e-12)  # outer: E over y_hat ...
    close(contrastive, -by_parameters(F.cross_entropy(f(x_hat), y)[None]), atol=1e-12)  # ... is AT's descent;
    likelihood = by_parameters(log_p_x_given_y(f, y)(x)) - by_parameters(log_p_x(f)(x_hat))
    close(consistency + contrastive, likelihood, atol=1e-12)  # maximum likelihood has one more term,
    assert consistency.norm() > 0.1 * likelihood.norm()  # the one that AT omits


# ---- numbers that cannot be fooled ----

@pytest.mark.parametrize("margin", [0.5, 20.0, 60.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_net_that_is_sure_of_its_label_is_attacked_as_well_as_any_other(margin, dtype):
    """x are the logits. The gradient of CE points to (-2, 1, 1) / sqrt 6 whatever the margin; TA's the other way. A net
    whose logits come in bfloat16 has the same."""
    x, y = torch.tensor([[margin, 0, 0], [0, 0, margin]]), torch.tensor([0, 2])
    up = torch.tensor([[-2, 1, 1], [1, 1, -2]]) / 6 ** 0.5
    for make, direction in ((cross_entropy, up), (log_p_y_given_x, -up)):
        close(free(make(lambda x: x.to(dtype), y), x, 1, 1.0) - x, direction, atol=0.002 * max(1, margin / 2))
    exact_gradient = F.softmax(x.double(), 1) - F.one_hot(y, 3)
    close(gradient(cross_entropy(lambda x: x, y), x.double()), exact_gradient, atol=1e-8)


@pytest.mark.parametrize("make", [*TABLE, lambda f, y: logit(lambda x: f(x)[:, :1]), lambda f, y: entropy(f, 0.5),
                                  lambda f, y: info_nce(f, randn(5, 6, seed=2), 0.5)])
def test_scores_are_float32_of_a_net_in_bfloat16(make):
    f, x, y = mlp().float(), randn(5, 6), torch.tensor([0, 3, 1, 1, 2])
    half = lambda x: f(x).to(torch.bfloat16)  # noqa: E731
    assert make(half, y)(x).dtype == torch.float32
    close(make(half, y)(x), make(lambda x: half(x).float(), y)(x))


LABELLED = (log_p_y_given_x, log_p_x_given_y, reinforced, cross_entropy, joint_energy_score)


@pytest.mark.parametrize("make", LABELLED)
def test_labels_are_numbers_of_classes(make):
    f, x, y = mlp(), randn(4, 6, dtype=torch.float64), torch.tensor([1, 0, 1, 3])
    for dtype in (torch.uint8, torch.int32, torch.int8):  # as many images as classes: no mask
        exact(make(f, y.to(dtype))(x), make(f, y)(x))
    for other in (y.tolist(), y.numpy(), y.numpy().astype(np.uint8)):
        exact(make(f, other)(x), make(f, y)(x))
    for bad in (y - 1, y + 1, y - 100, y.float(), y > 0, y[:3], y[:, None], [0, 1, 2, 4], np.zeros(4)):
        with pytest.raises(ValueError, match="labels must be"):
            make(f, bad)(x)


@pytest.mark.parametrize("returned, message", [
    (lambda z: (z, z), "not a tuple"), (lambda z: {"logits": z}, "not a dict"), (lambda z: z[:, :, None, None], "not"),
    (lambda z: z[:, 0], r"not \[4\]"), (lambda z: z[:3], r"not \[3, 5\]"), (lambda z: z[None], r"not \[1, 4, 5\]")])
def test_a_net_that_returns_something_else_is_named(returned, message):
    """Where its numbers are used: in each score, and in the accuracy."""
    x, y = torch.rand(4, 3, 8, 8, generator=rng()), torch.arange(4)
    f = lambda x: returned(x.flatten(1)[:, :5])  # noqa: E731
    scores = [*(make(f, y) for make in LABELLED), log_p_x(f), logit(f), entropy(f, 1.0)]
    for use in [*scores, lambda x: info_nce(f, x, 1.0), lambda x: accuracy(f, x, y)]:
        with pytest.raises(ValueError, match=r"a net must return .*\[4, K\].*" + message):
            use(x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clamp", [None, (0, 1)])
def test_no_nan_and_no_infinity_leaves_unnoticed(norm, clamp):
    x = torch.rand(4, 3, 2, 2, generator=rng())
    run = partial(ascend, steps=2, step_size=0.1, norm=norm, clamp=clamp)
    for bad in (math.nan, math.inf, -math.inf):
        w = torch.ones_like(x)
        w[2, 1, 0, 1] = bad  # in a single pixel
        with pytest.raises(ValueError, match="ascend: 1 of 4 samples"):
            run(linear(w), x)
        with pytest.raises(ValueError, match="ascend: 1 of 4 samples"):  # a score alone
            run(lambda x: flat(x) + torch.tensor([0, 0, 0, bad]), x)
    with pytest.raises(ValueError, match="ascend: 1 of 4 samples"):
        run(flat, x.index_fill(0, torch.tensor([1]), math.nan))


def test_worst_case_accuracy_and_files_refuse_nan(tmp_path):
    x = torch.rand(4, 3, 8, 8, generator=rng())
    with pytest.raises(ValueError, match="1 of 4"):  # a NaN score whose gradient is finite
        worst_case(lambda x: x.flatten(1).sum(1) + torch.tensor([0, math.nan, 0, 0]), x, 2, 0.1, eps=1.0)
    f = image_net()
    f[4].bias.data[3] = math.nan
    for score in ({}, dict(score=log_p_x_given_y, steps=1, step_size=0.1)):
        with pytest.raises(ValueError, match="of 4 samples"):
            accuracy(f, x, torch.arange(4), **score)
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="labels must be integers"):
        save_samples(tmp_path / "a", x[:1], [0.7])
    for write in (to_uint8, partial(save_samples, tmp_path / "a")):
        with pytest.raises(ValueError):
            write(x)
    assert not list(tmp_path.iterdir())


def test_contracts_of_files_and_buffers(tmp_path):
    x = torch.rand(12, 3, 4, 4, generator=rng())
    for images, labels in ((x, torch.arange(5)), (x, torch.arange(24).view(12, 2)), (255 * x, None), (x - 1, None)):
        with pytest.raises(ValueError):
            save_samples(tmp_path / "a", images, labels)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="distinct"):
        ReplayBuffer(3, (2,)).sample(4)
    with pytest.raises(ValueError, match="two samples"):
        entropy(nn.Flatten(), 0.5)(x[:1])


def test_inference_mode_is_refused_in_one_line():
    x = torch.rand(4, 3, 8, 8)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="no_grad, not inference_mode"):
            ascend(log_p_x(image_net()), x, 1, 0.1)
        made_inside = x + 0
    ascend(linear(x), made_inside, 1, 0.1)


# ---- Langevin and Gaussian starts ----

@pytest.mark.parametrize("arguments, temperature", [({}, 1.0), (dict(temperature=0.25), 0.25)])
def test_langevin_on_a_gaussian(arguments, temperature):
    # the discretised chain's own law: covariance T Sigma (I - a Sigma^-1 / 2)^-1, here 1.2 and 2.5 T Sigma
    a, mean, rotation = 0.3, torch.tensor([3.0, -1.0]), torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    precision = rotation @ torch.diag(torch.tensor([1.0, 4.0])) @ rotation.T
    x = langevin(lambda x: -((x - mean) @ precision * (x - mean)).sum(1) / 2, torch.zeros(40000, 2), 40, a,
                 generator=rng(), **arguments)
    close(x.mean(0), mean, rtol=0, atol=0.03)
    law = temperature * precision.inverse() @ (torch.eye(2) - a * precision / 2).inverse()
    close(x.T.cov(), law, rtol=0, atol=0.04 * temperature)
    exact(*(langevin(flat, x, 1, a, generator=rng(1)) for _ in range(2)))
    for bad in (-1, math.nan, "1"):
        with pytest.raises(ValueError, match="temperature must"):
            langevin(flat, x, 1, 0.1, temperature=bad)


def test_sgld_in_the_unit_box_is_jems_in_its_own():
    """[0, 1] with 2x - 1 inside the net, step 0.25, noise 0.005: JEM's chain in [-1, 1] with 1.0 and 0.01."""
    f, x = mlp(), 2 * randn(5, 6, dtype=torch.float64)  # beyond the box: nothing is clamped
    ours = sgld(log_p_x(lambda x: f(2 * x - 1)), (x + 1) / 2, 7, 0.25, 0.005, generator=rng(3))
    xi = torch.Generator().manual_seed(3)
    for _ in range(7):
        x = x.detach().requires_grad_()
        x = x + torch.autograd.grad(f(x).logsumexp(1).sum(), x)[0] + 0.01 * torch.randn(
            5, 6, dtype=x.dtype, generator=xi)
    close(2 * ours - 1, x.detach(), rtol=1e-9)
    seen = []
    inside = langevin(log_p_x(f), randn(5, 6, dtype=torch.float64), 3, 0.1, clamp=(0, 0.5), generator=rng(),
                      callback=lambda *a: seen.append(a))
    assert inside.min() == 0 and inside.max() == 0.5 and len(seen) == 3


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_worst_case_is_the_best_of_all_that_it_saw(norm):
    """A rugged score: the best point is seldom the last. Against ascend with every iterate kept; differences that
    float32 would not see."""
    x, seen = 0.3 + 0.4 * torch.rand(400, 1, 2, 3, dtype=torch.float64, generator=rng(2)), []

    def score(x):
        return 1 + 1e-9 * (x.flatten(1) * torch.arange(1, 7)).mul(20).sin().sum(1)
    with pytest.raises(ValueError, match="restarts .* need a finite eps"):
        worst_case(score, x, 5, 0.05, eps=math.inf, restarts=2)
    best, value = worst_case(score, x, 5, 0.05, eps=0.1, restarts=3, norm=norm, generator=rng(4))
    g = rng(4)
    for restart in range(3):
        end = ascend(score, x, 5, 0.05, eps=0.1, norm=norm, random_start=restart > 0, generator=g,
                     callback=lambda k, x_k, s: seen.append((x_k, s)))
        seen.append((end, score(end)))
    points, values = torch.stack([p for p, _ in seen]), torch.stack([v for _, v in seen])
    winner = values.argmax(0)
    exact(value, values.amax(0))
    exact(best, points[winner, torch.arange(400)])
    exact(score(best), value)
    assert len(set(winner.tolist())) > 8 and (winner == 0).any() and ((winner + 1) % 6 == 0).any()
    exact(worst_case(score, x, 0, 0.05, eps=0.1), (x, score(x)))
    assert not any(t.requires_grad for t in worst_case(score, x.clone().requires_grad_(), 1, 0.05, eps=0.1))
    few = worst_case(score, x, 5, 0.05, eps=0.1, norm=norm)[1]
    assert (few >= score(x)).all() and (value >= few).all() and (value > few).any()


@pytest.mark.parametrize("whole", [True, False])
def test_float16_is_refused_where_gradients_are_wanted(whole):
    """Where the net is sure, they are zero in it, and it would look robust: half of its output, or under autocast."""
    x, y = torch.rand(4, 3, 8, 8, generator=rng()), torch.arange(4)
    f = image_net().eval()
    net = (lambda x: f(x).half()) if whole else (lambda x: f(x).float())
    with torch.autocast("cpu", torch.float16, enabled=not whole):
        accuracy(net, x, y)  # no gradient
        with pytest.raises(ValueError, match="float16"):
            accuracy(net, x, y, cross_entropy, steps=1, step_size=0.1, eps=0.5)


def test_replay_buffer():
    torch.manual_seed(0)
    buffer = ReplayBuffer(1000, (2, 3), reinit=0.2)
    assert 0 <= buffer.x.min() and buffer.x.max() < 1 and abs(buffer.x.mean() - 0.5) < 0.02
    fresh, counts = 0, torch.zeros(1000)
    for k in range(50):
        before = buffer.x.clone()
        x_0, idx = buffer.sample(200)
        assert x_0.shape == (200, 2, 3) and len(idx.unique()) == 200
        counts[idx] += 1
        new = (x_0 != before[idx]).flatten(1)
        assert torch.equal(new.any(1), new.all(1)) and (k == 0 or x_0[new.all(1)].max() < 1)
        fresh += new.all(1).sum().item()
        exact(buffer.x, before)  # sampling changes nothing
        buffer.update(idx, (x_0 + k + 1).requires_grad_())
        exact(buffer.x[idx], x_0 + k + 1)
        untouched = torch.ones(1000, dtype=torch.bool).index_fill(0, idx, False)
        exact(buffer.x[untouched], before[untouched])
        assert not buffer.x.requires_grad
    assert abs(fresh / 10000 - 0.2) < 0.02  # five standard errors
    assert counts.min() > 0 and counts.max() < 30


def tiny_images():  # three classes of 1 x 2 x 2, few and unequally many: 1/n is not 1/(n-1)
    y = torch.tensor([0, 1, 2, 1, 0, 2, 1, 2, 1, 0, 1])
    return (128 + 10 * (y - 1)[:, None, None, None] + 12 * randn(11, 1, 2, 2)).round().to(torch.uint8), y


@pytest.mark.parametrize("pooled", [False, True])
def test_gaussians_have_the_law_of_the_images(pooled):
    x, y = tiny_images()
    classes, n, state = 1 if pooled else 3, 120000, torch.get_rng_state()
    labels = torch.randint(classes, (n,), generator=rng())
    fit, same = (fit_gaussians(images, None if pooled else y, jitter=5e-4) for images in (x, to_float(x)))
    samples, again, other = (g.sample(labels, rng(s)) for g, s in ((fit, 1), (same, 1), (fit, 2)))
    close(again, samples)  # uint8 and float agree, and the generator decides
    assert not torch.equal(other, samples) and torch.equal(torch.get_rng_state(), state)
    assert samples.dtype == torch.float32 and samples.shape == (n, 1, 2, 2)
    for c in range(classes):
        data = (x if pooled else x[y == c]).double().flatten(1) / 255
        drawn = samples[labels == c].double().flatten(1)
        law = data.T.cov(correction=0) + 5e-4 * torch.eye(4)
        close(fit.mean[c], data.mean(0).view(1, 2, 2), atol=1e-12)
        close(drawn.mean(0), data.mean(0), rtol=0, atol=2e-3)
        close(drawn.T.cov(), law, rtol=0, atol=0.05 * law.diagonal().max().item())


def test_gaussians_jitter_and_clamp_and_refuse():
    ten = torch.arange(10)  # a pooled fit counts them
    dark = fit_gaussians(torch.zeros(3, 1, 40, 40)).sample(ten, generator=rng())  # N(0, 1e-4), clamped
    assert dark.min() == 0 and (dark == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert dark.square().mean().item() == pytest.approx(1e-4 / 2, rel=0.05)
    assert fit_gaussians(torch.ones(3, 1, 4, 4)).sample(ten, generator=rng()).max() == 1
    x, y = tiny_images()
    with pytest.raises(ValueError, match="class without images"):
        fit_gaussians(x, torch.where(y == 1, 2, y))
    for images, labels in ((x, y[:5]), (x, y - 1), (x.float(), None)):
        with pytest.raises(ValueError, match="labels must be integers|images must be in"):
            fit_gaussians(images, labels)
    fit = fit_gaussians(x, y)
    exact(fit.sample(y.to(torch.uint8), rng()), fit.sample(y, rng()))  # a number, not a mask
    exact(fit_gaussians(x, y.tolist()).sample(y.numpy(), rng()), fit.sample(y, rng()))
    exact(fit_gaussians(x).sample(y.tolist(), rng()), fit_gaussians(x).sample(y, rng()))
    for labels in (torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="labels must be"):
            fit.sample(labels)


def test_starts(tmp_path):
    """Of class and pooled Gaussians, of colour fields and of a file's images: the spread of the mean over an image."""
    y = torch.arange(400) % 10
    x = (0.4 + 0.02 * y.view(-1, 1, 1, 1) + 0.01 * randn(400, 3, 32, 32)).clamp(0, 1)
    images = torch.full((7, 32, 32, 3), 51, dtype=torch.uint8)
    np.save(tmp_path / "a.npy", images.numpy())
    np.savez(tmp_path / "b.npz", arr_0=images.numpy())
    labels = torch.tensor([0, 9]).repeat(300)
    torch.manual_seed(0)
    mean = {kind: starts(kind, x, y)(labels).mean((1, 2, 3)).view(300, 2)
            for kind in ("class", "pooled", "fields", str(tmp_path / "a.npy"), str(tmp_path / "b.npz"))}
    close(mean["class"].mean(0), torch.tensor([0.4, 0.58]), rtol=0, atol=0.005)
    close(mean["pooled"].mean(0), torch.tensor([0.49, 0.49]), rtol=0, atol=0.02)
    close(mean["fields"].mean(0), torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)
    assert mean["fields"].std().item() == pytest.approx(0.6 / 12 ** 0.5 / 48 ** 0.5, rel=0.3)  # 48 colours
    close(mean[str(tmp_path / "a.npy")], torch.full((300, 2), 0.2))
    close(mean[str(tmp_path / "b.npz")], torch.full((300, 2), 0.2))
    with pytest.raises(ValueError, match="all ten classes, not of 9: raise --limit"):
        starts("class", x[y < 9], y[y < 9])
    with pytest.raises(ValueError, match="clas: no such file, and no start; these are class, pooled"):
        starts("clas", x, y)


@pytest.mark.parametrize("content, message", [
    (np.zeros((0, 32, 32, 3), np.uint8), "must be uint8"), (np.zeros((2, 32, 32, 3)), "must be uint8"),
    (np.array([None]), "no .npy or .npz of images"), (b"<html>Not found</html>", "no .npy or .npz of images"),
    (b"PK\3\4, an archive cut short", "no .npy or .npz of images"), (b"", "no .npy or .npz of images"),
    (None, "No such file")])
def test_load_images_says_what_a_file_is_not(tmp_path, content, message):
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(Refused, match=message) as error:
        load_images(path)
    assert "bad.npy" in str(error.value) and "pickle" not in str(error.value)


def test_load_images_says_that_a_data_set_is_not_whole(tmp_path, monkeypatch):
    """The images are there, a small file beside them is not: torchvision downloads nothing."""
    (tmp_path / "cifar-100-python").mkdir()
    batch = {"data": np.zeros((1, 3072), np.uint8), "fine_labels": [0]}
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(batch))
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    with pytest.raises(Refused, match="cifar100 is not whole in .*: delete it there, and it is downloaded anew$"):
        load_images("cifar100", tmp_path)


def test_colour_fields_are_smooth():
    field = colour_fields(50, cells=2, generator=rng())
    assert field.shape == (50, 3, 32, 32) and field.min() >= 0 and field.max() <= 1
    assert field.diff(dim=3).abs().max() < 0.06 and field.std((2, 3)).mean() > 0.1  # colours, and no fine grain
    exact(field, colour_fields(50, cells=2, generator=rng()))


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_flip_gives_crops_of_the_padded_image(mode):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 6)
    padded = F.pad(x, (4,) * 4, mode=mode)[0]
    where = [(i, j, flip) for i in range(9) for j in range(9) for flip in (0, 1)]
    crops = [padded[:, i:i + 8, j:j + 6].flip(2) if flip else padded[:, i:i + 8, j:j + 6] for i, j, flip in where]
    found = (crop_flip(x.expand(1200, 3, 8, 6), mode=mode)[:, None] == torch.stack(crops)).flatten(2).all(2)
    assert found.any(1).all()
    if mode == "constant":  # (a reflected window can equal the flip of another)
        seen = np.array([where[row.nonzero()[0]] for row in found]).T  # each uniform, independent of the others
        for values in seen:
            share = np.bincount(values) / 1200
            assert len(share) in (2, 9) and np.abs(share - 1 / len(share)).max() < 0.05
        assert np.abs(np.corrcoef(seen) - np.eye(3)).max() < 0.12


def test_augment_refuses_images_that_are_not_square():
    for shape in ((2, 3, 8, 6), (2, 3, 6, 8)):
        with pytest.raises(ValueError, match="augment: images must be square"):
            augment(torch.rand(shape))


def test_starts_are_float32_whatever_the_default():
    """Under torch.set_default_dtype(torch.float64), too."""
    x, y = tiny_images()
    torch.set_default_dtype(torch.float64)
    try:
        buffer, fit = ReplayBuffer(4, (3, 2), reinit=0.5), fit_gaussians(x, y)
        starts_now = [colour_fields(2), buffer.x, buffer.sample(4)[0], fit.sample(y), fit_gaussians(x).sample(y)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x_0.dtype == torch.float32 for x_0 in starts_now)


# ---- frozen: no batch norms ----

def net_of(forward=lambda self, x: self.norm(self.conv(x)), **parts):
    """A net with this forward, float64, in training mode; none of its batch norms is trivial."""
    torch.manual_seed(0)
    f = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), **parts}.items():
        setattr(f, name, part)
    for m in f.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                if t is not None:
                    nn.init.normal_(t)
            if m.running_var is not None:
                nn.init.uniform_(m.running_var, 0.3, 3)
    return f.double()


IMAGES = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=rng())


def assert_frozen_is_eval_mode(f, left):
    """In values and gradients. `left` batch norms are run nevertheless, and afterwards f is what it was."""
    score = lambda x: f(x).square().flatten(1).sum(1)  # noqa: E731
    modes, state = [m.training for m in f.modules()], {k: v.clone() for k, v in f.state_dict().items()}
    with eval_mode(f):
        y, slope = f(IMAGES), gradient(score, IMAGES)
    with frozen(f), mock.patch.object(F, "batch_norm", wraps=F.batch_norm) as batch_norm:
        close(f(IMAGES), y, rtol=1e-10, atol=1e-10)
        assert batch_norm.call_count == left
        close(gradient(score, IMAGES), slope, rtol=1e-9, atol=1e-9)
    assert [m.training for m in f.modules()] == modes and f.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in f.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in f.parameters())
    with eval_mode(f):
        exact(f(IMAGES), y)


def resnet(block):
    """A norm, and two blocks of a ResNet with it, the first of stride 2."""
    width = 4 * block.expansion
    shortcut = nn.Sequential(nn.Conv2d(4, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), block(4, 4, 2, shortcut), block(width, 4))


@pytest.mark.parametrize("parts", [
    {}, dict(conv=nn.Conv2d(3, 4, 3, bias=False)), dict(norm=nn.BatchNorm2d(4, affine=False, momentum=None)),
    dict(norm=nn.BatchNorm2d(4, eps=0.5).eval()), dict(conv=nn.Conv2d(3, 4, 3, 2, 2, padding_mode="reflect")),
    dict(conv=nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2))),
    dict(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    dict(norm=resnet(BasicBlock)), dict(norm=resnet(Bottleneck)), dict(norm=nn.ReLU())])
def test_frozen_needs_no_batch_norm(parts):
    assert_frozen_is_eval_mode(net_of(**parts), left=0)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def by_value(self, x):
    h = self.conv(x)
    return self.norm(h if h.sum() > 1e9 else -h)


def optional(self, x, y=None):
    h = self.conv(x)
    return h if y is None else self.norm(h)


def plus_itself(self, x):
    h = self.conv(x)
    return self.norm(h) + h


def two_norms(self, x):
    h = self.conv(x)
    return self.norm(h) * self.other(h)


@pytest.mark.parametrize("left, forward, parts", [
    (1, by_value, {}), (0, optional, {}), (1, plus_itself, {}), (2, two_norms, dict(other=nn.BatchNorm2d(4))),
    (2, lambda self, x: self.norm(self.conv(x)) * self.other(self.conv(x)), dict(other=nn.BatchNorm2d(4))),
    (2, lambda self, x: self.norm(self.conv(x)) * self.norm(self.other(x)), dict(other=nn.Conv2d(3, 4, 3))),
    (2, lambda self, x: self.norm(self.norm(self.conv(x))), {}),
    (1, lambda self, x: self.norm(self.conv(x).relu()), {}),
    (1, lambda self, x: self.norm(input=self.conv(x)), {}), (0, lambda self, x: self.norm(self.conv(input=x)), {})])
def test_frozen_leaves_norms_that_are_no_pair_with_a_convolution(left, forward, parts):
    assert_frozen_is_eval_mode(net_of(forward, **parts), left)


@pytest.mark.parametrize("parts", [
    dict(norm=nn.BatchNorm2d(4, track_running_stats=False)), dict(conv=Standardised(3, 4, 3)), dict(norm=Shifted(4)),
    dict(conv=nn.ConvTranspose2d(3, 4, 3)), dict(conv=nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)))])
def test_frozen_leaves_other_layers(parts):
    assert_frozen_is_eval_mode(net_of(**parts), left=1)


def test_frozen_leaves_nets_with_a_forward_of_their_own():
    """Put there after a first use, too."""
    f = net_of()
    assert_frozen_is_eval_mode(f, left=0)
    f.forward = lambda x: plus_itself(f, x)
    assert_frozen_is_eval_mode(f, left=1)
    del f.forward
    assert_frozen_is_eval_mode(f, left=0)


def test_frozen_leaves_a_norm_that_stays_in_training_mode():
    f = net_of()
    f.norm.train = lambda mode: f.norm
    with eval_mode(f):
        y = f(IMAGES)
    with frozen(f):
        exact(f(IMAGES), y)


@pytest.mark.parametrize("path", ["conv", "conv.0", "norm", "norm.2.conv1", ""])
def test_frozen_leaves_nets_with_hooks(path):
    """A hook sees what the layer says, also where it comes after a first use."""
    f, seen = net_of(conv=nn.Sequential(nn.Conv2d(3, 4, 3)), norm=resnet(BasicBlock)), []
    assert_frozen_is_eval_mode(f, left=0)
    hook = f.get_submodule(path).register_forward_hook(lambda m, x, y: seen.append(y.clone()))
    assert_frozen_is_eval_mode(f, left=6)
    assert len(seen) == 5
    for y in seen:
        close(y, seen[0])
    hook.remove()
    hook = f.get_submodule(path).register_full_backward_hook(lambda m, dx, dy: None)
    assert_frozen_is_eval_mode(f, left=6)
    hook.remove()
    assert_frozen_is_eval_mode(f, left=0)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_frozen_restores_the_net(error):
    f, g = net_of(norm=resnet(BasicBlock)), net_of()
    before = [dict(vars(m)) for m in [*f.modules(), *g.modules()]]
    with eval_mode(f, g):
        y, z = f(IMAGES), g(IMAGES)
    with pytest.raises(error):
        with frozen(f.norm), frozen(f, g, f):
            with frozen(f):
                close(f(IMAGES), y)
            close(f(IMAGES), y)
            close(g(IMAGES), z)
            raise error
    assert [vars(m) for m in [*f.modules(), *g.modules()]] == before


def test_frozen_follows_a_net_that_changes():
    f = net_of(lambda self, x: self.head(self.norm(self.conv(x))), head=nn.Identity())
    assert_frozen_is_eval_mode(f, left=0)
    f.conv = net_of(conv=nn.Conv2d(3, 4, 5)).conv  # of the same class
    assert_frozen_is_eval_mode(f, left=0)
    f.head = net_of(lambda self, x: self.path(self, x) if self.deep else x, conv=nn.Conv2d(4, 4, 1), deep=False,
                    path=lambda self, x: self.norm(self.conv(x)))
    assert_frozen_is_eval_mode(f, left=0)
    f.head.deep = True  # a flag that its forward branches on
    assert_frozen_is_eval_mode(f, left=0)
    f.head = copy.deepcopy(f.head)
    f.head.path = plus_itself
    assert_frozen_is_eval_mode(f, left=1)
    with torch.no_grad():  # new weights
        for p in f.parameters():
            p += 1
    assert_frozen_is_eval_mode(f, left=1)
    with mock.patch("torch.fx.Tracer.trace") as trace, frozen(f):
        assert not trace.called  # once for each state


def test_frozen_nets_are_copied_saved_and_freed(tmp_path):
    f = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    assert_frozen_is_eval_mode(f, left=0)
    torch.save(f, tmp_path / "f.pt")
    for g in (copy.deepcopy(f), torch.load(tmp_path / "f.pt", weights_only=False)):
        assert_frozen_is_eval_mode(g, left=0)
        f[0].weight.data += 1  # no part of the other's
        assert_frozen_is_eval_mode(g, left=0)
    alive = [weakref.ref(m) for m in f.modules()]
    del f
    gc.collect()
    assert not any(m() for m in alive)


def test_frozen_under_no_grad_and_autocast():
    f = net_of(norm=resnet(Bottleneck)).float()
    x, errors = IMAGES.float(), []
    y = f.eval()(x)
    with torch.no_grad(), frozen(f):
        close(f(x), y, rtol=1e-4, atol=1e-4)
    with frozen(f):
        assert not f(x).requires_grad  # the parameters are constants
    for mode in (eval_mode, frozen):
        with mode(f), torch.autocast("cpu", torch.bfloat16):
            errors.append((f(x) - y).norm() / y.norm())
        with torch.autocast("cpu", torch.bfloat16), mode(f):
            errors.append((f(x) - y).norm() / y.norm())
    assert 1e-4 < min(errors) and max(errors) < 2 * errors[0] < 0.1

    def in_float32(x):
        with torch.autocast("cpu", enabled=False):
            return f(x)
    with torch.autocast("cpu", torch.bfloat16), frozen(f):
        close(in_float32(x), y, rtol=1e-4, atol=1e-4)


# ---- evaluation and files ----

def test_accuracy_counts():
    x, y = torch.eye(4).repeat(5, 1)[:17, :, None, None], torch.arange(17) % 4
    y[:3] = 3 - y[:3]  # three wrong labels of seventeen
    for size in (250, 17, 5):
        for labels in (y.to(torch.uint8), y.tolist(), y.numpy()):
            assert accuracy(nn.Flatten(), x, labels, batch_size=size) == 14 / 17
    for images, labels, message in ((x[:0], y[:0], "no images"), (x, y[:5], r"labels \[5\] for 17 images"),
                                    (x, y - 1, "labels must be in 0 ... 3"), (255 * x, y, "range from 0 to 255"),
                                    (2 * x - 1, y, "range from -1 to 1"), (1.001 * x, y, "17 of 68 pixels")):
        for size in (20, 5):
            with pytest.raises(ValueError, match=message):
                accuracy(nn.Flatten(), images, labels, batch_size=size)
    with pytest.raises(ValueError, match="without a score"):  # else a clean accuracy for an attacked one
        accuracy(nn.Flatten(), x, y, steps=3)


def test_accuracy_of_a_plain_function():
    """Its modes are its own affair; under attack, too."""
    f, x, y = nn.Flatten(), torch.eye(4)[:, :, None, None], torch.arange(4)
    attack = dict(steps=2, step_size=0.3, eps=0.6, norm="linf")
    for score in ({}, dict(score=cross_entropy, **attack)):
        assert accuracy(lambda x: 9 * f(x) - 3, x, y, **score) == accuracy(nn.Sequential(f, Scaled()), x, y, **score)
        assert f.training


class Scaled(nn.Module):
    def forward(self, x):
        return 9 * x - 3


@pytest.mark.parametrize("gap", [1e-7, 1e-6])
def test_images_may_leave_their_range_by_a_rounding_error(tmp_path, gap):
    """As un-normalised ones do: they are taken, and put back."""
    x, y = torch.eye(4)[:, :, None, None].expand(4, 4, 2, 2), torch.arange(4)
    outside = (1 + 2 * gap) * x - gap
    assert outside.min() < 0 and outside.max() > 1
    f = lambda x: 9 * x.mean((2, 3)) - 3  # noqa: E731
    for attack in ({}, dict(score=cross_entropy, steps=1, step_size=0.1, eps=0.1)):
        assert accuracy(f, outside, y, **attack) == 1
    assert ascend(flat, outside, 1, 0.1, eps=0.1).aminmax() == (0, 1)
    exact(fit_gaussians(outside).mean, fit_gaussians(x).mean)
    save_samples(tmp_path / "a", outside[:, :3])
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], 255 * x[:, :3].permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid()])
def test_a_net_that_returns_probabilities_is_noticed_under_attack(end):
    """There robustness is overstated; a clean accuracy is right all the same."""
    f, x, y = nn.Sequential(image_net(), end), torch.rand(6, 3, 8, 8, generator=rng()), torch.arange(6) % 5
    attack = dict(score=cross_entropy, steps=1, step_size=0.1, eps=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accuracy(f, x, y)
        for logits in (f[0], lambda x: 20 * f(x)):
            accuracy(logits, x, y, **attack)
        assert not caught
        accuracy(f, x, y, batch_size=2, **attack)
    (warning,) = caught
    assert "more robust than it is" in str(warning.message) and warning.filename == __file__


def test_accuracy_under_attack():
    f, x = image_net(), torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8, generator=rng())
    f[1].eval()
    modes, state = [m.training for m in f.modules()], {k: v.clone() for k, v in f.state_dict().items()}
    with eval_mode(f):
        y, x_hat = f(x / 255).argmax(1), x / 255
        for _ in range(5):  # PGD by hand
            x_hat.requires_grad_()
            g, = torch.autograd.grad(F.cross_entropy(f(x_hat), y, reduction="sum"), x_hat)
            x_hat = (x_hat.detach() + 0.01 * g.sign()).clamp(x / 255 - 0.03, x / 255 + 0.03).clamp(0, 1)
        attacked = (f(x_hat).argmax(1) == y).double().mean().item()
    assert 0.1 < attacked < 0.9  # so the attack matters
    for images, size in ((x, 250), (to_float(x), 250), (x, 13)):
        assert accuracy(f, images, y, batch_size=size) == 1  # with Dropout it would not be
        assert accuracy(f, images, y, cross_entropy, batch_size=size, steps=5, step_size=0.01, eps=0.03,
                        norm="linf") == pytest.approx(attacked)
    assert [m.training for m in f.modules()] == modes and f[0].weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in f.state_dict().items())


def test_rounding():
    x = torch.tensor([-0.3, 0.0, 0.4, 0.6, 127.4, 127.6, 254.4, 254.6, 255.0, 300.0]) / 255
    exact(to_uint8(x), torch.tensor([0, 0, 0, 1, 127, 128, 254, 255, 255, 255], dtype=torch.uint8))
    every = torch.arange(256, dtype=torch.uint8)
    exact(to_float(every), torch.arange(256) / 255)
    exact(to_uint8(to_float(every)), every)
    with pytest.raises(ValueError, match="uint8 or float"):  # 0 ... 255 would become 0 and 255
        to_uint8(every.long())
    assert to_uint8(every) is every and to_float(x) is x


def cells(path, rows, columns):  # the 4 x 5 images of a grid with white lines of two pixels
    grid = np.asarray(Image.open(path)).copy()
    assert grid.shape == (6 * rows + 2, 7 * columns + 2, 3)
    images = []
    for r in range(2, 6 * rows, 6):
        for c in range(2, 7 * columns, 7):
            images.append(grid[r:r + 4, c:c + 5].copy())
            grid[r:r + 4, c:c + 5] = 255
    assert (grid == 255).all()
    return np.stack(images)


@pytest.mark.parametrize("n, labels, rows, columns, shown", [
    (23, None, 3, 10, range(23)),
    (230, None, 10, 10, range(100)),
    (25, [7] * 4 + [2] * 13 + [7] * 8, 2, 10, [*range(4, 14), *range(4), *range(17, 23)]),  # sorted; ten each
    (230, [1] * 3 + [0] * 227, 2, 3, [3, 4, 5, 0, 1, 2]),  # rows as long as the shortest
    (230, [i % 23 for i in range(230)], 10, 10, [i // 10 + 23 * (i % 10) for i in range(100)])])  # of 23
def test_save_samples(tmp_path, n, labels, rows, columns, shown):
    x = torch.randint(256, (n, 3, 4, 5), dtype=torch.uint8, generator=rng())
    nhwc, y = x.permute(0, 2, 3, 1).numpy(), None if labels is None else torch.tensor(labels)
    save_samples(tmp_path / "a.b", (x - 0.3).clamp(min=0) / 255, y)  # to the nearest; a dot in the name
    save_samples(str(tmp_path / "c"), x, labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.b.npz", "a.b.png", "c.npz", "c.png"]
    for name in ("a.b", "c"):
        with np.load(tmp_path / f"{name}.npz") as file:
            assert file.files == ["arr_0", "arr_1"][:1 if labels is None else 2]
            assert file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], nhwc)
            assert labels is None or file["arr_1"].dtype == np.int64 and file["arr_1"].tolist() == labels
        images = cells(tmp_path / f"{name}.png", rows, columns)
        assert np.array_equal(images[:len(shown)], nhwc[shown]) and (images[len(shown):] == 255).all()


