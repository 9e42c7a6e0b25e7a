"""Every attack and every sampler of the project: one update rule, and the scores that it ascends.

    x_{k+1} = P [ x_k + step_size * u(grad_x score(x_k)) + noise * xi_k ],     xi_k ~ N(0, I)

P projects onto the ball |x - x_0| <= eps and the box [0, 1]; u is the direction of steepest ascent:
g / |g|_2 per sample ("l2"), sign(g) ("linf"), or g itself ("none": Langevin). The attacks and
samplers of three papers, Wang et al., ICLR 2022 (CEM), Zhu et al., ICCV 2021 (JEAT), and Yin et
al., ECCV 2022 (AT-EBM), differ in the score, the start x_0, u, P and (step_size, noise, steps), in
nothing else.

Conventions: images are float32 [B, C, H, W] in [0, 1]; eps, step_size and noise are in that space;
logits f(x) are [B, K], labels y [B]; E(x, y) = -f(x)[y] and E(x) = -log sum_k exp f(x)[k]. A score
maps x [B, ...] to [B] and is *increased*: a log-density up to a constant. "Recalled": from memory
of the CEM paper, whose text was not at hand. Errors: ValueError for a wrong call; its subclass
Refused for input that cannot be used (a flag, a file, a data set), and for a NaN or infinity on the
way; a label of no class is a device assert on CUDA.
"""
import argparse
import hashlib
import io
import math
import os
import re
import shutil
import socket
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.utils import make_grid, save_image


ROUNDING = 1e-5  # an image that was normalised and back may lie this far outside [0, 1]


class Refused(ValueError):
    """What was given cannot be used: a flag, a file, a data set, a training that diverged."""


# ---------------------------------------------------------------- the update rule
def ascend(score, x, steps, step_size, *, eps=math.inf, norm="l2", noise=0.0, random_start=False,
           clamp=(0.0, 1.0), generator=None, callback=None):
    """Ascend `score` from x: PGD, Langevin dynamics and all between (the formula above).

    score         maps x [B, ...] to [B]
    x             float [B, ...]: the start, and the centre x_0 of the ball
    steps         number of steps; 0 returns x unmoved, without a random start
    step_size     a step's l2 length ("l2"), a pixel's change ("linf"), a gradient's factor ("none")
    eps           radius of the ball: linf for "linf", l2 for "l2" and "none"; inf: no ball
    noise         standard deviation of the Gaussian noise of each step, inside the projection
    random_start  from a point of the ball: uniform direction and radius (l2), uniform (linf)
    clamp         (low, high), the box, applied last; None: no box
    callback      callback(k, x_k, score_k) before each step k = 0 ... steps - 1; read only

    Returns the last iterate, detached. A zero gradient gives a zero step. The gradient is taken of
    x only: x, the parameters (.grad, requires_grad) and the modules' modes stay as they are.
    ValueError: a wrong argument; a start outside the box where eps is finite (the box would move it
    further than eps). Refused: a start, a score or a gradient that is not finite. While a CUDA
    graph is recorded, neither pixels nor gradients are checked.
    """
    _check_arguments(x, steps, step_size, eps, norm, noise, random_start)
    x_0 = x.detach().clone()
    low, high = _box(clamp)
    finite = x_0.flatten(1).isfinite().all(1)
    inside = ((x_0 >= low - ROUNDING) & (x_0 <= high + ROUNDING)).flatten(1).all(1)
    if not recording(x):  # these wait for the device
        if not finite.all():
            raise Refused(f"ascend: {_share(~finite)} start at NaN or infinity")
        if eps < math.inf and not inside.all():
            raise ValueError(f"ascend: {_share(~inside)} start outside the box {low} ... {high}")
    if steps == 0:
        return x_0
    x_k = x_0
    if random_start:
        x_k = (x_0 + _random_offset(x_0, eps, norm, generator)).clamp(low, high)
    for k in range(steps):
        score_k, g = _value_and_gradient(score, x_k)
        finite &= g.flatten(1).isfinite().all(1) & score_k.isfinite()
        if callback is not None:
            callback(k, x_k, score_k)
        x_k = x_k + step_size * steepest(g, norm)
        if noise > 0:
            xi = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x_k = x_k + noise * xi
        x_k = project(x_k, x_0, eps, norm).clamp(low, high)
    finite &= x_k.flatten(1).isfinite().all(1)
    if not recording(x) and not finite.all():  # waits once more, whatever the number of steps
        raise Refused(f"ascend: {_share(~finite)} met a score or a gradient that is NaN or "
                      f"infinite, or left the finite numbers, in {steps} steps: has the "
                      "training diverged, or is step_size too large?")
    return x_k


def langevin(score, x, steps, step_size, *, temperature=1.0, clamp=None, generator=None,
             callback=None):
    """Langevin: x + step_size * grad score(x) + sqrt(2 * step_size * temperature) * xi (the slides
    of the CEM authors' talk), with no box by default. After many small steps x has the density
    exp(score / temperature), up to a constant. Otherwise as `ascend`."""
    _check_numbers(step_size=step_size, temperature=temperature)
    noise = math.sqrt(2 * step_size * temperature)
    return sgld(score, x, steps, step_size, noise, clamp=clamp, generator=generator,
                callback=callback)


def sgld(score, x, steps, step_size, noise, *, clamp=None, generator=None, callback=None):
    """SGLD with a noise of its own (JEM, JEAT), x + step_size * grad score(x) + noise * xi, with no
    box by default: `ascend` by the raw gradient."""
    return ascend(score, x, steps, step_size, norm="none", noise=noise, clamp=clamp,
                  generator=generator, callback=callback)


def worst_case(score, x, steps, step_size, *, eps, restarts=1, norm="l2", generator=None):
    """The best of `score` over x itself, all iterates and all restarts -> (x_best [B, ...], value
    [B]): AT-EBM's worst-case OOD detection. The first restart starts from x, the others from random
    points of the ball. Otherwise as `ascend`. Refused: a NaN among the scores."""
    if restarts < 1:
        raise ValueError(f"restarts must be >= 1, not {restarts}")
    if restarts > 1 and eps == math.inf:
        raise ValueError("restarts begin at random points of the ball: they need a finite eps")
    best, value = x.detach().clone(), torch.full((len(x),), -math.inf, device=x.device)

    def keep(k, x_k, score_k):
        nonlocal best, value
        taken = (score_k > value) | score_k.isnan()  # a NaN is kept, to be seen below
        best = torch.where(taken.view(-1, *[1] * (x.ndim - 1)), x_k, best)
        value = torch.where(taken, score_k, value)

    for restart in range(restarts):
        x_k = ascend(score, x, steps, step_size, eps=eps, norm=norm, random_start=restart > 0,
                     generator=generator, callback=keep)
        with torch.no_grad():
            keep(steps, x_k, score(x_k))
    if value.isnan().any():
        raise Refused(f"worst_case: {_share(value.isnan())} met a score that is NaN")
    return best, value


def steepest(g, norm):
    """u(g): the direction of steepest ascent under `norm`, for g [B, ...]; zero where g is zero."""
    if norm == "linf":
        return g.sign()
    if norm == "none":
        return g
    largest = g.abs().amax(tuple(range(1, g.ndim)), keepdim=True)
    g = g / torch.where(largest > 0, largest, 1)  # so that no square underflows or overflows
    return g / _l2(g).clamp_min(1)  # by now |g|_2 >= 1, unless g is zero


def project(x, x_0, eps, norm):
    """The point of the eps-ball around x_0 nearest to x, per sample: linf for "linf", else l2."""
    if eps == math.inf:
        return x
    d = x - x_0
    if norm == "linf":
        return x_0 + d.clamp(-eps, eps)
    length = _l2(d).clamp_min(torch.finfo(d.dtype).tiny)  # d may be zero
    return x_0 + d * (eps / length).clamp_max(1)  # inside the ball nothing changes


@contextmanager
def eval_mode(*modules):
    """Eval mode inside the `with`; afterwards each submodule has its own mode again. A callable
    that is no module has none."""
    modules = _modules(modules)
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


def _modules(nets):
    return [net for net in nets if isinstance(net, nn.Module)]


@contextmanager
def frozen(*nets):
    """eval_mode, and each batch norm folded into the convolution before it: the same function to
    rounding, 1.1 to 1.3 times as fast on a CPU. For attacks and samplers: parameters are constants
    inside. A pair is left as it is if anything else reads the convolution's output; a net, if it
    has hooks, if a module's forward was replaced, or if torch.fx cannot trace it, for which its
    forward runs once. Call the net as f(x) only: another argument, or another method, may read a
    folded convolution. A list or a dict on which a forward branches must not change after the first
    call."""
    folded = []
    with eval_mode(*nets):
        try:
            for net in _modules(nets):
                for conv, norm in _conv_norm_pairs(net):
                    conv.forward = _folded(conv, norm)
                    norm.forward = lambda x: x
                    folded += [conv, norm]
            yield
        finally:
            for module in folded:
                del module.forward


def _folded(conv, norm):
    """The forward of a convolution that does both; its weights are constants."""
    weights = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var,
                                   norm.eps, norm.weight, norm.bias)
    weights = [t.detach() for t in weights]
    cast = weights
    device = conv.weight.device.type
    if torch.is_autocast_enabled(device):  # cast here once, not in each forward; where a layer
        # turns autocast off, the float32 weights serve
        cast = [t.to(torch.get_autocast_dtype(device)) for t in weights]

    def forward(input):
        if torch.is_autocast_enabled(device):  # a net may disable it for some of its layers
            return conv._conv_forward(input, *cast)
        return conv._conv_forward(input, *weights)
    return forward


_traced = WeakKeyDictionary()  # net: its state when it was traced, its pairs' names


def _conv_norm_pairs(net):
    """(convolution, batch norm) of each norm that alone reads its convolution's output."""
    modules = dict(net.named_modules(prefix="0"))  # "0.conv1": as in _names_of_pairs' Sequential
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or "forward" in vars(m)
           for m in modules.values()):  # a forward in vars: replaced; of a folded net, for one
        return []
    # traced anew where a module, or one of its numbers or flags, has changed: a forward may branch
    # on it. ref: so that a net can be freed
    plain = int, float, str, type(None)
    state = [(name, ref(m), {k: v for k, v in vars(m).items() if isinstance(v, plain)})
             for name, m in modules.items()]
    if net not in _traced or _traced[net][0] != state:
        _traced[net] = state, _names_of_pairs(net)
    pairs = [(modules[conv], modules[norm]) for conv, norm in _traced[net][1]]
    return [pair for pair in pairs if _can_fold(*pair)]


def _names_of_pairs(net):
    try:
        # one level up, so that the net is called as scores call it, with one argument
        nodes = fx.Tracer().trace(nn.Sequential(net)).nodes
    except Exception:  # its forward asks for values: eval mode alone, then
        return []
    calls = [node for node in nodes if node.op == "call_module"]
    uses = Counter(node.target for node in calls)
    names = []
    for call in calls:
        source = call.args[0] if call.args else None
        called_once = uses[call.target] == 1 and source in calls and uses[source.target] == 1
        if called_once and len(source.users) == 1:
            names.append((source.target, call.target))
    return names


def _can_fold(conv, norm):
    plain = type(conv).forward is nn.Conv2d.forward and type(norm).forward is nn.BatchNorm2d.forward
    return plain and not norm.training and norm.running_var is not None


def _l2(v):
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def _random_offset(x, eps, norm, generator):
    new = dict(generator=generator, dtype=x.dtype, device=x.device)
    if norm == "linf":
        return eps * (2 * torch.rand(x.shape, **new) - 1)
    radius = torch.rand(len(x), *[1] * (x.ndim - 1), **new)
    return eps * radius * steepest(torch.randn(x.shape, **new), "l2")


def _value_and_gradient(score, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        s = score(x)
        if s.shape != x.shape[:1]:
            raise ValueError(f"a score is one number per sample, [{len(x)}], not {list(s.shape)}")
        (g,) = torch.autograd.grad(s.sum(), x)  # of x only: the parameters' are never computed
    return s.detach(), g


def _check_arguments(x, steps, step_size, eps, norm, noise, random_start):
    if torch.is_inference_mode_enabled():
        raise ValueError("attacks and samplers need gradients: no_grad, not inference_mode")
    if norm not in ("l2", "linf", "none"):
        raise ValueError(f'norm must be "l2", "linf" or "none", not {norm!r}')
    _check_numbers(steps=steps, step_size=step_size, eps=eps, noise=noise)
    if random_start and eps == math.inf:
        raise ValueError("random_start needs a finite eps")
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"x must be float [B, ...], not {x.dtype} {list(x.shape)}")


def _check_numbers(**values):
    for name, value in values.items():
        if not _is_number(value) or not value >= 0 or (value == math.inf and name != "eps"):
            raise ValueError(f"{name} must be a number >= 0, not {value!r}")


def _is_number(value):
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float, np.number))


def _box(clamp):
    """low, high"""
    if clamp is None:
        return -math.inf, math.inf
    pair = isinstance(clamp, (tuple, list)) and len(clamp) == 2 and all(map(_is_number, clamp))
    if not pair or not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be None or numbers (low, high), not {clamp!r}")
    return float(clamp[0]), float(clamp[1])


def _share(marked):
    return f"{int(marked.sum())} of {len(marked)} samples"


# ---------------------------------------------------------------- one launch for many kernels
class Recorded:
    """fn(*tensors, **constants) -> tensors. On CUDA its kernels become one launch, a CUDA graph:
    of small batches, thousands of kernels take longer to launch than to run. Elsewhere, and where
    `on` is False, it is fn itself.

    The first calls with tensors of some shapes run as they are, the next is recorded, and from then
    on the same kernels are replayed on the same memory. Hence: a result is overwritten by the next
    call; fn does not wait for the device (`recording`); what it reads besides its arguments stays
    in place, as parameters and buffers do; a number that changes is one of the constants. If
    the constants change, all graphs are let go and recorded anew.

    Where recording fails, one line says so, and fn runs as it is from then on.
    """

    device = "cuda"  # a test has another

    def __init__(self, fn, on=True, warmup=3):
        self.fn, self.on, self.warmup = fn, on, warmup
        self.constants, self.calls, self.graphs = {}, Counter(), {}

    def __call__(self, *inputs, **constants):
        if not self.on or inputs[0].device.type != self.device:
            return self.fn(*inputs, **constants)
        if constants != self.constants:
            self.constants, self.calls, self.graphs = constants, Counter(), {}
        shapes = tuple(x.shape for x in inputs)
        self.calls[shapes] += 1
        if self.calls[shapes] <= self.warmup:  # cuDNN chooses its kernels, and so on
            with _side_stream():
                return self.fn(*inputs, **constants)
        if shapes not in self.graphs:
            try:
                self.graphs[shapes] = self._record(inputs)
            except RuntimeError as e:
                reason = e.__context__ or e  # ending a failed recording fails as well
                say(f"--record: the run goes on without ({one_line(reason)})")
                self.on, self.graphs = False, {}
        if not self.on:
            return self.fn(*inputs, **constants)
        graph, held, results = self.graphs[shapes]
        for mine, x in zip(held, inputs):
            mine.copy_(x)
        graph.replay()
        return results

    def _record(self, inputs):
        """The graph, the inputs that it reads, the results that it writes."""
        held, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its stream only where it succeeds, _side_stream in any case
        with _side_stream() as stream, torch.cuda.graph(graph, stream=stream):
            results = self.fn(*held, **self.constants)
        return graph, held, results


def recording(x):
    """Whether a CUDA graph is being recorded: then nothing may wait for x's device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@cache
def _stream():
    return torch.cuda.Stream()


@contextmanager
def _side_stream():
    """One stream for all first calls and recordings: the libraries' workspaces, and autograd's
    nodes, belong to a stream, and nothing can be recorded on the default one."""
    _stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream()):
        yield _stream()
    torch.cuda.current_stream().wait_stream(_stream())


# ---------------------------------------------------------------- scores
# f maps x to logits [B, K]; f_y = f(x)[y]; LSE f = log sum_k exp f_k. In float32 or better.
def log_p_y_given_x(f, y):
    """TA, targeted attack (Santurkar et al., 2019): log p(y|x) = f_y - LSE f, without cancellation.
    CEM's TA (recalled)."""
    ce = cross_entropy(f, y)
    return lambda x: -ce(x)


def log_p_x(f):
    """Langevin (CEM), SGLD (JEM): log p(x) + const = LSE f = -E(x)."""
    return lambda x: outputs(f, x).logsumexp(1)


def log_p_x_given_y(f, y):
    """CS, conditional sampling (CEM, recalled): log p(x|y) + const = f_y = -E(x, y)."""
    return lambda x: take(outputs(f, x), y)


def reinforced(f, y):
    """RCS, reinforced CS (CEM, recalled): f_y + LSE f."""
    def score(x):
        logits = outputs(f, x)
        return take(logits, y) + logits.logsumexp(1)
    return score


def cross_entropy(f, y):
    """The supervised attack: CE = -log p(y|x) = LSE f - f_y, as softplus(LSE_{k != y} f - f_y).

    LSE f - f_y has lost grad f_y once float32 rounds p(y|x) to 1, where f_y leads by 17, and all of
    its gradient where it leads by 104: a net that is sure of its label would look robust. There
    softplus underflows as well; -1e-30 * lead, too small to change any loss, keeps the direction.
    """
    def score(x):
        logits = outputs(f, x)
        if logits.shape[1] < 2:
            raise ValueError("cross-entropy needs logits of at least two classes")
        labels = check_labels(y, logits.shape).to(logits.device)
        others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
        lead = logits.gather(1, labels[:, None]).squeeze(1) - others
        return F.softplus(-lead) - 1e-30 * lead
    return score


def joint_energy_score(f, y):
    """JEAT's attack: raises E(x, y) = -f_y."""
    return lambda x: -take(outputs(f, x), y)


def logit(f, sign=1):
    """sign * f(x) of a net with one logit [B, 1] (AT-EBM): +1 moves to the data, -1 away."""
    return lambda x: sign * outputs(f, x).squeeze(1)


def info_nce(g, positive, temperature, other_positives=True):
    """The contrastive attack (CEM, recalled). Unit z = g(x), z' = g(positive),
    f_ij = z_i.z_j / t, f_ij' = z_i.z'_j / t. NT-Xent's loss of row i:
    -f_ii' + log [ exp f_ii' + sum_{j != i} exp f_ij + sum_{j != i} exp f_ij' ]. The gradient goes
    through all z_j; z' is held.

    positive         the other view of each x. z' is computed here, once: call it inside eval_mode.
                     None: x [2B, ...] holds both views of an image, at i and i + B; all move.
                     i' is then the other view, and j runs over all 2B rows but i
    other_positives  False drops the last sum: the PGD sampler, with positive = x_0 [assumed]
    """
    if positive is not None:
        with torch.no_grad():
            z_prime = F.normalize(outputs(g, positive), dim=1)

    def score(x):
        z = F.normalize(outputs(g, x), dim=1)
        if len(z) < 2:
            raise ValueError("contrast needs a batch of at least two samples")
        if positive is None:
            if len(z) % 2 or len(z) < 4:
                raise ValueError(f"two views of each of two images or more, not {len(z)} samples")
            other_view = torch.cat([z[len(z) // 2:], z[:len(z) // 2]])
            f_positive = (z * other_view).sum(1, keepdim=True) / temperature
            terms = [_similarity_to_others(z, z, temperature)]  # j != i: the other view, too
        else:
            if z.shape != z_prime.shape:
                raise ValueError(f"{len(z_prime)} positives for {len(z)} samples")
            f_positive = (z * z_prime).sum(1, keepdim=True) / temperature
            terms = [f_positive, _similarity_to_others(z, z, temperature)]
            if other_positives:
                # without f_ii', which is the first term already
                terms.append(_similarity_to_others(z, z_prime, temperature))
        return (torch.cat(terms, 1).logsumexp(1, keepdim=True) - f_positive).squeeze(1)
    return score


def entropy(g, temperature):
    """MaxEnt (CEM, recalled): -log sum_{j != i} exp(z_i . sg[z_j] / temperature), unit z = g(x):
    the part of the batch's entropy that belongs to i. sg, no gradient, drops the others' terms that
    contain x_i, so that this is not quite the entropy's gradient; j = i would add a constant, and
    changes the gradient's length only."""
    def score(x):
        if len(x) < 2:
            raise ValueError("the entropy of a batch needs at least two samples")
        z = F.normalize(outputs(g, x), dim=1)
        return -_similarity_to_others(z, z.detach(), temperature).logsumexp(1)
    return score


def _similarity_to_others(z, others, temperature):
    """z_i . others_j / temperature [B, M], not in bfloat16; -inf where j = i: it is left out."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, not {temperature}")
    with torch.autocast(z.device.type, enabled=False):
        s = z @ others.T / temperature
    return s.masked_fill(torch.eye(*s.shape, dtype=torch.bool, device=s.device), -math.inf)


def outputs(f, x):
    """f(x) [B, K], in float32 or better. ValueError: f returns something else, or a gradient is
    wanted of one that computes in float16."""
    f_x = f(x)
    if not isinstance(f_x, torch.Tensor):
        raise ValueError(f"a net must return a tensor [{len(x)}, K], not a {type(f_x).__name__}")
    if f_x.ndim != 2 or len(f_x) != len(x):
        raise ValueError(f"a net must return [{len(x)}, K], not {list(f_x.shape)}")
    if f_x.requires_grad and torch.float16 in (f_x.dtype, _autocast_dtype(x.device.type)):
        raise ValueError("float16 rounds small gradients to zero, so that a net would look robust: "
                         "use bfloat16 or float32")
    return at_least_float32(f_x)


def _autocast_dtype(device):
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def at_least_float32(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def check_labels(y, shape, wait=False):
    """Labels y, a tensor, an array or a list, as int64 [B], for logits of shape (B, K). ValueError:
    not integers in 0 ... K - 1.
    On CUDA the range is checked with wait=True only, because the check waits for the device.
    Without it, y must be used as an index into the logits: a wrong label is a device assert."""
    n, classes = shape
    y = torch.as_tensor(y)
    if y.is_floating_point() or y.dtype == torch.bool or y.shape != (n,):
        raise ValueError(f"labels must be integers [{n}], not {y.dtype} {list(y.shape)}")
    y = y.long()
    if (wait or not y.is_cuda) and not ((y >= 0) & (y < classes)).all():
        raise ValueError(f"labels must be in 0 ... {classes - 1}, not {y.tolist()}"[:200])
    return y


def take(logits, y):
    """f_y [B] of logits [B, K] and labels y [B]."""
    y = check_labels(y, logits.shape).to(logits.device)
    return logits.gather(1, y[:, None]).squeeze(1)


# ---------------------------------------------------------------- starts
class Gaussians(NamedTuple):
    """What fit_gaussians returns."""
    mean: torch.Tensor  # float64 [K, ...], a row per class; pooled: K = 1
    rows: list  # R = (X - mean) / sqrt(n) of each class, float32 [n, D]: R^T z has covariance Sigma
    jitter: float
    pooled: bool

    def sample(self, labels, generator=None):
        """float32 [B, ...] in [0, 1], one per label [B]; a pooled fit uses only their number."""
        new = dict(generator=generator, device=self.mean.device, dtype=torch.float32)
        labels = torch.as_tensor(labels, device=self.mean.device)
        if self.pooled:
            labels = torch.zeros_like(labels)  # one Gaussian for all
        labels = check_labels(labels, (len(labels), len(self.rows)), wait=True)
        x = self.mean.float()[labels].flatten(1)
        for c in labels.unique().tolist():
            i = (labels == c).nonzero().squeeze(1)
            z = torch.randn(len(i), len(self.rows[c]), **new)
            x[i] += z @ self.rows[c]
        x += math.sqrt(self.jitter) * torch.randn(x.shape, **new)
        return x.unflatten(1, self.mean.shape[1:]).clamp_(0, 1)


def fit_gaussians(x, y=None, jitter=1e-4):
    """Class-wise Gaussians N(mu_c, Sigma_c + jitter * I) over the pixels, or a pooled one (y None).

    x: uint8, or float in [0, 1], [N, ...]; y: labels [N], every class 0 ... max(y) present. Sigma
    divides by n. From the notebook of Santurkar et al., 2019. Sampled without a factorisation:
    mu + (X - mu)^T z / sqrt(n) + sqrt(jitter) * xi has that law. Keeps a float32 copy of x.
    ValueError: no images, a class without images, labels that are no class, jitter < 0.
    """
    x = check_images(x)
    if not 0 <= jitter < math.inf:
        raise ValueError(f"fit_gaussians: jitter must be >= 0, not {jitter}")
    x = to_float(x).float()
    groups = [x]
    if y is not None:
        y = torch.as_tensor(y, device=x.device)
        if y.shape != x.shape[:1] or y.is_floating_point() or y.min() < 0:
            raise ValueError(f"fit_gaussians: labels must be integers >= 0, [{len(x)}]")
        groups = [x[y == c] for c in range(int(y.max()) + 1)]
    if min(map(len, groups)) == 0:
        raise ValueError("fit_gaussians: a class without images")
    means = [group.mean(0, dtype=torch.float64) for group in groups]
    rows = []
    for group, mean in zip(groups, means):
        rows.append((group - mean.float()).flatten(1) / math.sqrt(len(group)))
    return Gaussians(torch.stack(means), rows, jitter, pooled=y is None)


def starts(kind, x, y, root="./data"):
    """A function from labels [B] to starts x_0, float32 [B, 3, 32, 32] in [0, 1].

    kind: "class" or "pooled", Gaussians fitted to images x with labels y; "fields", colour_fields;
    or a set as load_images takes it, of which images are drawn at random. Refused: "class", and one
    of the ten is missing; no such set."""
    if kind == "class":
        n_classes = len(torch.as_tensor(y).unique())
        if n_classes < 10:
            raise Refused(f"class starts need images of all ten classes, not of {n_classes}: raise "
                          "--limit, or take --start pooled or fields")
    if kind in ("class", "pooled"):
        return fit_gaussians(x, y if kind == "class" else None).sample
    if kind == "fields":
        return lambda labels: colour_fields(len(labels), device=x.device)
    if kind not in ("cifar100", "svhn") and not Path(kind).exists():
        raise Refused(f"{kind}: no such file, and no start; these are class, pooled, fields, "
                      "cifar100, svhn")
    images = load_images(kind, root).to(x.device)

    def draw_images(labels):
        return to_float(images[torch.randint(len(images), (len(labels),), device=x.device)])
    return draw_images


def colour_fields(n, cells=4, size=32, generator=None, device="cpu"):
    """Starts that need no data: cells x cells random colours in 0.2 to 0.8, resized bicubically,
    which overshoots -> float32 [n, 3, size, size] in [0, 1], of mean 0.5. All of it is ours."""
    colours = torch.rand(n, 3, cells, cells, generator=generator, device=device,
                         dtype=torch.float32)
    field = F.interpolate(colours, (size, size), mode="bicubic", align_corners=False)
    return (0.2 + 0.6 * field).clamp(0, 1)


class ReplayBuffer(nn.Module):
    """x, float32 [size, *shape]: ends of SGLD chains; a chain begins afresh with probability reinit
    (JEM)."""

    def __init__(self, size, shape, reinit=0.05, device="cpu"):
        super().__init__()
        if not 0 <= reinit <= 1:
            raise ValueError(f"reinit must be a probability, not {reinit}")
        self.reinit = reinit
        self.register_buffer("x", torch.rand(size, *shape, dtype=torch.float32, device=device))

    def sample(self, n):
        """Starts x_0 [n, *shape], fresh ones uniform in [0, 1], and their distinct idx [n]."""
        if n > len(self.x):
            raise ValueError(f"a buffer of {len(self.x)} has no {n} distinct samples")
        idx = torch.randperm(len(self.x), device=self.x.device)[:n]
        x_0 = self.x[idx]
        noise = torch.rand_like(x_0)
        fresh = torch.rand(n, *[1] * (x_0.ndim - 1), device=x_0.device) < self.reinit
        return torch.where(fresh, noise, x_0), idx

    def update(self, idx, x):
        """Write the chains' ends x [n, *shape] back. ValueError: another shape."""
        if x.shape != (len(idx), *self.x.shape[1:]):
            raise ValueError(f"{len(idx)} chains of {list(self.x.shape[1:])}, not {list(x.shape)}")
        self.x[idx] = x.detach()


# ---------------------------------------------------------------- images
def accuracy(f, x, y, score=None, *, batch_size=250, **ascend_args):
    """Share of x that f classifies as y, in eval mode; under attack where a score is given.

    x: uint8, or float in [0, 1], [N, C, H, W]; y: labels [N]; score: e.g. cross_entropy, used as
    score(f, y); ascend_args: of `ascend` (steps, step_size, ...). ValueError: no images, wrong
    labels, images outside [0, 1], ascend_args without a score. Refused: logits that are not finite.
    A warning, where f seems to return probabilities: an attack needs logits.
    """
    x, y = check_images(x), torch.as_tensor(y, device=x.device)
    if y.shape != x.shape[:1]:
        raise ValueError(f"accuracy: labels {list(y.shape)} for {len(x)} images")
    if score is None and ascend_args:
        raise ValueError(f"accuracy: {', '.join(ascend_args)} without a score to ascend")
    correct, finite, unit = [], [], []
    with frozen(f), torch.no_grad():
        for x_i, y_i in zip(x.split(batch_size), y.split(batch_size)):
            x_i = to_float(x_i)
            if score is not None:
                x_i = ascend(score(f, y_i), x_i, **ascend_args)
            logits = outputs(f, x_i)
            correct.append(logits.argmax(1) == check_labels(y_i, logits.shape, wait=True))
            finite.append(logits.isfinite().all(1))
            unit.append(((logits >= 0) & (logits <= 1)).all())
    if score is not None and torch.stack(unit).all():
        warnings.warn("accuracy: all outputs are in [0, 1]: if they are probabilities, f looks "
                      "more robust than it is; leave out its softmax or sigmoid", stacklevel=2)
    finite = torch.cat(finite)
    if not finite.all():
        raise Refused(f"accuracy: {_share(~finite)} have logits that are NaN or infinite")
    return torch.cat(correct).double().mean().item()


def check_images(x):
    """Images x, uint8 or float in [0, 1]; what a rounding error put beside [0, 1] is put back.
    ValueError: no images, or pixels outside [0, 1]."""
    if len(x) == 0:
        raise ValueError("no images")
    if x.dtype == torch.uint8:
        return x
    bad = ~((x >= -ROUNDING) & (x <= 1 + ROUNDING))  # NaN is bad, too
    if bad.any():
        raise ValueError(f"images must be in [0, 1]: {int(bad.sum())} of {x.numel()} pixels "
                         f"are not, they range from {x.min():.3g} to {x.max():.3g}")
    return x.clamp(0, 1)


def to_float(x):
    """uint8 0 ... 255 -> float32 in [0, 1]; floats stay."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """float -> uint8: x * 255 to the nearest integer, clipped; uint8 stays. ValueError: other
    integers. Refused: not finite."""
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise ValueError(f"images must be uint8 or float, not {x.dtype}")
    if not x.isfinite().all():
        bad = int((~x.isfinite()).sum())
        raise Refused(f"to_uint8: {bad} of {x.numel()} pixels are NaN or infinite")
    return x.mul(255).round().clamp(0, 255).to(torch.uint8)


def crop_flip(x, pad=4, mode="constant"):
    """A random crop of each padded image of x [B, C, H, W], flipped with probability 1/2."""
    (height, width), each = x.shape[2:], torch.arange(len(x), device=x.device)
    # every crop, as a view: [B, C, 2 pad + 1, 2 pad + 1, H, W]
    crops = F.pad(x, (pad,) * 4, mode).unfold(2, height, 1).unfold(3, width, 1)
    row, column = torch.randint(2 * pad + 1, (2, len(x)), device=x.device)
    x = crops[each, :, row, column]  # [B, C, H, W]
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def load_data(args):
    """CIFAR-10 from args.data, drawn digits if args.smoke: x_train, y_train, x_test, y_test, uint8
    [N, 3, 32, 32] and int64 [N], at most args.limit of each set, on args.device."""
    if args.smoke:
        tensors = [*drawn_digits(2000, seed=0), *drawn_digits(250, seed=1)]
    else:
        try:
            tensors = cifar10(args.data)
        except Refused as e:
            raise Refused(f"{e}; --smoke needs no data") from e
    return [t[:args.limit].to(args.device) for t in tensors]


def cifar10(root="./data"):
    """x_train, y_train, x_test, y_test of root/cifar-10-batches-py, downloaded if absent: uint8
    [N, 3, 32, 32], int64 [N]. Refused: a file is missing or damaged, and no download."""
    tensors = []
    try:
        with ten_seconds_of_silence():
            for train in (True, False):
                images = CIFAR10(root, train, download=True)
                tensors.append(torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous())
                tensors.append(torch.tensor(images.targets))
    except Exception as e:  # torchvision raises a dozen kinds
        folder = Path(root, CIFAR10.base_folder)
        listed = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
        listed.append(CIFAR10.meta["filename"])
        missing = [name for name in listed if not (folder / name).exists()]
        fault = f"lacks {', '.join(missing)}" if missing else "is damaged"
        raise Refused(f"{folder} {fault}, and no download ({one_line(e)})") from e
    return tensors


def load_images(name, root="./data", train=True):
    """A set of images, uint8 [N, 3, 32, 32]. name: cifar100 or svhn, of the split that train says,
    or cifar100-train, svhn-train, downloaded into root if absent (root None: refused); or a file,
    .npy or .npz (its arr_0), uint8 [N, 32, 32, 3]. Refused: no such file, no download, something
    else in it."""
    known, _, split = str(name).partition("-")
    is_known = known in ("cifar100", "svhn") and split in ("", "train")
    train = train or split == "train"
    if root is None and is_known:
        raise Refused(f"{name} would be downloaded, and --smoke downloads nothing")
    try:
        with ten_seconds_of_silence():
            fault = f"is not whole in {root}: delete it there, and it is downloaded anew"
            if is_known and known == "cifar100":
                x = CIFAR100(root, train, download=True).data
            elif is_known:
                x = SVHN(root, "train" if train else "test", download=True).data
                x = x.transpose(0, 2, 3, 1)
            else:
                fault = "is no .npy or .npz of images, or a damaged one"
                x = np.load(name, allow_pickle=False)
                x = x["arr_0"] if isinstance(x, np.lib.npyio.NpzFile) else x
    except MemoryError as e:
        raise Refused(f"{name} does not fit into memory") from e
    except (OSError, ImportError) as e:  # no file, no network, no SciPy
        raise Refused(f"{name}: {one_line(e)}") from e
    except Exception as e:  # torchvision and numpy raise a dozen kinds
        raise Refused(f"{name} {fault}") from e
    if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or len(x) == 0:
        raise Refused(f"{name} must be uint8 [N, 32, 32, 3], not {x.dtype} {list(x.shape)}")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


@contextmanager
def ten_seconds_of_silence():
    """Around a download: a connection that is silent for longer ends."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def drawn_digits(n, seed):
    """n drawn images, uint8 [n, 3, 32, 32], of the digits in turn, and their labels [n]: colours,
    place and size at random; a set to try things on that needs no download."""
    random, images = np.random.default_rng(seed), []
    for i in range(n):
        light, dark = random.integers(128, 256, 3), random.integers(0, 100, 3)
        # light on dark or dark on light, so that no single pixel tells the digits apart
        paper, ink = random.permutation([light, dark]).tolist()
        image = Image.new("RGB", (32, 32), tuple(paper))
        font, centre = ImageFont.load_default(random.integers(24, 34)), random.integers(12, 21, 2)
        ImageDraw.Draw(image).text(tuple(centre.tolist()), str(i % 10), tuple(ink), font,
                                   anchor="mm", stroke_width=1)
        images.append(np.asarray(image))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return x, torch.arange(n) % 10


def save_samples(prefix, x, labels=None):
    """Write prefix.npz and prefix.png of images x, uint8 or float in [0, 1], [N, C, H, W]. npz, as
    guided-diffusion's: arr_0 uint8 [N, H, W, C] and, with labels, arr_1 int64 [N]. png: 10 x 10
    images at most, with labels a row per class. ValueError: not one label per image, a NaN."""
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.shape != x.shape[:1] or labels.is_floating_point():
            raise ValueError(f"save_samples: labels must be integers [{len(x)}], not "
                             f"{labels.dtype} {list(labels.shape)}")
    x = to_uint8(check_images(x).detach()).cpu()
    arrays = [x.permute(0, 2, 3, 1).numpy()]
    shown, columns = torch.arange(min(len(x), 100)), 10
    if labels is not None:
        labels = labels.cpu().long()
        arrays.append(labels.numpy())
        rows = [(labels == c).nonzero().squeeze(1) for c in labels.unique()[:10]]
        columns = min(10, *map(len, rows))
        shown = torch.cat([row[:columns] for row in rows])
    content = io.BytesIO()
    np.savez(content, *arrays)
    write(f"{prefix}.npz", content.getbuffer())
    save_image(to_float(x[shown]), f"{prefix}.png", nrow=columns, pad_value=1.0)


def save_animation(path, frames):
    """Write a GIF of frames, a list of x_k [N, 3, H, W] as `ascend`'s callback sees them, each a
    grid of 10 images a row; the last one stays for two seconds."""
    grids = []
    for x in frames:
        grid = make_grid(to_uint8(x.detach()).cpu(), nrow=10, pad_value=255)
        grids.append(torchvision.transforms.functional.to_pil_image(grid))
    durations = [100] * (len(grids) - 1) + [2000]  # ms
    grids[0].save(path, save_all=True, append_images=grids[1:], duration=durations, loop=0)


# ---------------------------------------------------------------- a run's flags
def in_range(kind, low, high=math.inf):
    """A type for argparse: a number of the kind in low ... high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} ... {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse: "invalid int value"
    return parse


count, positive, radius = in_range(int, 0), in_range(int, 1), in_range(float, 0)
number, fraction = in_range(float, 0, 1e9), in_range(float, 0, 1)  # finite
seed = in_range(int, 0, 2 ** 62)  # twice the largest, and 1, is still one for torch


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the docstring as it is."""


def set_of_samples(args, sampler, *unused):
    """A set's name: the sampler, and each sampling flag that is not at its default; and its flags.
    args: of a script, whose read_flags adds the names of its sampling flags and all defaults.
    unused: flags that this sampler does not read. A name that no file can have, such as one with a
    path in it, is cut, and ends in a hash of the whole."""
    made_with = flag_values(args, [flag for flag in args.sampling if flag not in unused])
    changed = [f"{typed(flag)[2:].removeprefix('sample-')}-{value}"
               for flag, value in made_with.items() if getattr(args, flag) != args.defaults[flag]]
    whole = "_".join([sampler, *changed])
    name = re.sub(r"[^\w.-]", "-", whole)[:150]
    if name != whole:
        name += "-" + hashlib.sha256(whole.encode()).hexdigest()[:8]
    return name, made_with


def is_there(args, results, name, made_with):
    """Whether a set of samples made with these flags is there, row and file."""
    row = results["samples"].get(name, {})
    return row.get("flags") == made_with and Path(args.out, f"samples_{name}.npz").exists()


def typed(flag):
    return "--" + flag.replace("_", "-")


def flag_values(args, names):
    """The values of these flags, for JSON, which has no infinity."""
    values = {name: getattr(args, name) for name in names}
    return {name: "inf" if value == math.inf else value for name, value in values.items()}


# ---------------------------------------------------------------- a run's words and its folder
def progress(batches, what):
    """Yield the batches, a list or a tuple of tensors, and print how far it is, how fast, and how
    long it will still take: on a terminal in one line that rewrites itself, elsewhere every half
    minute."""
    begun = said = time.monotonic()
    done, total = 0, sum(map(len, batches))
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.monotonic()
        rate = done / max(now - begun, 1e-3)  # some clocks stand still for as long
        line = f"{what}: {done}/{total} images, {rate:.0f}/s, {(total - done) / rate:.0f} s left"
        if on_a_terminal():  # \x1b[K: what is left of a longer line goes
            say(line, end="\x1b[K\n" if done == total else "\x1b[K\r")
        elif done == total or now - said >= 30:
            say(line)
            said = now


def say_how_long(args, net, forwards):
    """On a CPU, print about how long the training takes, unless it has begun, and advise --amp or
    --small. forwards: of one image, that an epoch needs."""
    if args.device != "cpu" or args.smoke or Path(args.out, "checkpoint.pt").exists():
        return
    x = torch.zeros(32, 3, 32, 32)
    with eval_mode(net), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
        net(x)  # the first time is slower
        begun = time.perf_counter()
        net(x)
        seconds = (time.perf_counter() - begun) / len(x) * forwards * args.epochs
    advice = "" if args.small else "; --small is made for a CPU"
    say(f"on this CPU, {args.epochs} epochs take some {seconds / 3600:.1f} hours{advice}")
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not args.amp and (can.get("amx_bf16") or can.get("avx512_bf16")):
        say("this processor has bfloat16 units: with --amp it is 2 to 4 times faster")


@contextmanager
def in_epoch(epoch):
    """Around an epoch and its checkpoint: says what to do where the training diverges."""
    try:
        yield
    except Refused as e:  # a NaN in an attack or a chain; figures or weights that are not finite
        keeps = f"with --epochs {epoch} the last checkpoint is sampled; " if epoch > 0 else ""
        raise Refused(f"training diverged in epoch {epoch + 1} ({e}): {keeps}try a smaller --lr "
                      "or another --seed, in another --out") from e


def on_a_terminal():
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # something in its place; closed
        return False


def say(text, end="\n", stderr=False):
    """Print, on stdout by default. A character that its encoding lacks, or a closed file, costs
    nothing."""
    file = sys.stderr if stderr else sys.stdout
    if file is None:  # as where there is no console
        return
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, file=file,
              flush=True)
    except (OSError, ValueError):
        pass


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]


def write(path, content):
    """Replace a file by these bytes, or leave it as it was."""
    try:
        Path(f"{path}.tmp").write_bytes(content)
        os.replace(f"{path}.tmp", path)
    finally:
        Path(f"{path}.tmp").unlink(missing_ok=True)


@contextmanager
def claimed(folder, afresh=False):
    """A run's folder, for this process alone: created, found writable and, where the system can,
    locked. afresh: what an earlier run left there goes. Refused: another run is at work in it."""
    if not folder:
        raise Refused("--out is empty")
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Refused(f"another run is at work in {folder}") from e
        except (ImportError, OSError):  # not on every system
            pass
        if afresh:
            for name in ("checkpoint.pt", "log.jsonl", "results.json", "samples_*"):
                for path in folder.glob(name):
                    path.unlink()
        try:
            yield
        finally:
            if is_new and os.listdir(folder) == [".lock"]:  # nothing was made
                shutil.rmtree(folder, ignore_errors=True)
