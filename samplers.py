"""Every attack and every sampler of the project: one update rule and the scores it ascends.

    x_{k+1} = P [ x_k + step_size * u(grad_x score(x_k)) + noise * xi_k ],     xi_k ~ N(0, I)

P projects onto the ball |x - x_0| <= eps and the box [0, 1]; u is the direction of steepest ascent: g / |g|_2
per sample ("l2"), sign(g) ("linf"), or g itself ("none": Langevin). Attacks and samplers differ in the score,
the start x_0 and (step_size, eps, noise, steps), in nothing else: the general form of Wang et al., ICLR 2022
(CEM), which covers Zhu et al., ICCV 2021 (JEAT), and Yin et al., ECCV 2022 (AT-EBM), too.

Conventions: images are float32 [B, C, H, W] in [0, 1]; eps, steps, noise are in that space; logits f(x) are
[B, K]; energies are E(x, y) = -f(x)[y] and E(x) = -log sum_k exp f(x)[k]. A score maps x [B, ...] to [B] and
is *increased*: a log-density up to a constant. Attacks and samplers run inside `with eval_mode(f)`.
"""
import io
import math
import os
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision

# ---------------------------------------------------------------- the update rule
def ascend(score, x, steps, step_size, *, eps=math.inf, norm="l2", noise=0.0, random_start=False,
           clamp=(0.0, 1.0), generator=None, callback=None):
    """Ascend `score` from x: PGD, Langevin dynamics and everything between (the module's formula).

    score         maps x [B, ...] to [B]; x  float [B, ...], the start and the centre x_0 of the ball
    steps         number of steps; 0 returns x unmoved, without a random start
    step_size     a step's l2 length ("l2"), the change of each pixel ("linf"), the gradient's factor ("none")
    eps           radius of the ball around x: linf for "linf", l2 for "l2" and "none"; inf = no ball
    noise         standard deviation of the Gaussian noise added at each step, inside the projection
    random_start  start in the ball: uniform direction and uniform radius (l2), uniform (linf)
    clamp         (low, high) box, applied last; None = no box
    callback      callback(k, x_k, score_k) for each step k = 0..steps-1, with the score [B] at x_k; read only

    Returns the last iterate, detached. A zero gradient gives a zero step. Leaves x, the parameters (.grad and
    requires_grad) and every module's mode alone; the gradient is taken with respect to x only. ValueError: an
    unknown norm; negative steps, step_size, eps, noise; random_start with infinite eps; x not float [B, ...].
    """
    _check(x, steps, step_size, eps, norm, noise, random_start)
    x_0, clamp = x.detach(), tuple(clamp or (-math.inf, math.inf))
    if steps == 0:
        return x_0.clone()
    x_k = (x_0 + _random_offset(x_0, eps, norm, generator)).clamp(*clamp) if random_start else x_0
    step = partial(_step, score, x_0, step_size, eps, norm, noise, clamp)
    step = _graphed(step) if ascend.cuda_graphs and callback is None else step
    for k in range(steps):
        xi = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) if noise else x_0
        x_next, s = step(x_k, xi)
        if callback is not None:
            callback(k, x_k, s)
        x_k = x_next
    return x_k


def _step(score, x_0, step_size, eps, norm, noise, clamp, x_k, xi):
    """The module's formula -> x_{k+1}, and the score at x_k."""
    s, g = _value_and_gradient(score, x_k)
    x = x_k + step_size * steepest(g, norm)
    x = x + noise * xi if noise else x
    return project(x, x_0, eps, norm).clamp(*clamp), s


# ---------------------------------------------------------------- the same step from a CUDA graph
ascend.cuda_graphs = False  # a program may set it: small batches are bound by kernel launches
_graphs, _pool = {}, cache(torch.cuda.graph_pool_handle)  # {what capture bakes in: graph}; they take turns


def _graphed(step):
    """`step`, a partial of _step, from a CUDA graph that is captured once; or itself, where it cannot be."""
    score, x_0, *settings = step.args
    f, *args = getattr(score, "args", ()) or [None]
    ours = isinstance(score, partial) and score.func.__module__ == __name__
    if not (ours and x_0.is_cuda and isinstance(f, torch.nn.Module)) or any(m.training for m in f.modules()):
        return step
    tensors, others = [x_0, *filter(torch.is_tensor, args)], [a for a in args if not torch.is_tensor(a)]
    amp = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    key = (score.func, f, *settings, *amp, *others,
           *((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
           *(t.data_ptr() for t in (*f.parameters(), *f.buffers())))  # moved weights: another graph
    if key not in _graphs:
        def same(x_k, xi, x_0, *tensors):  # a score's tensors come before its other arguments
            return _step(partial(score.func, f, *tensors, *others), x_0, *settings, x_k, xi)
        # without the cache of casts, which would keep the weights of this moment
        with torch.cuda.device(x_0.device), torch.autocast("cuda", *amp, cache_enabled=False):
            copies = tuple(t.clone() for t in (x_0, x_0, *tensors))
            _graphs[key] = torch.cuda.make_graphed_callables(same, copies, pool=_pool())
    return lambda x_k, xi: [t.clone() for t in _graphs[key](x_k, xi, *tensors)]


def langevin(score, x, steps, step_size, *, temperature=1.0, clamp=None, generator=None, callback=None):
    """Langevin: x + step_size * grad score(x) + sqrt(2 * step_size * temperature) * xi (CEM, the slides). Its
    law tends to exp(score / temperature) as step_size -> 0. Arguments and errors as in `ascend`."""
    noise = math.copysign(math.sqrt(2 * abs(step_size * temperature)), temperature)  # refused where negative
    return sgld(score, x, steps, step_size, noise, clamp=clamp, generator=generator, callback=callback)


def sgld(score, x, steps, step_size, noise, *, clamp=None, generator=None, callback=None):
    """SGLD with a noise of its own, x + step_size * grad score(x) + noise * xi (JEM; JEAT): `ascend` with the
    raw gradient; arguments and errors as there."""
    return ascend(score, x, steps, step_size, norm="none", noise=noise, clamp=clamp, generator=generator,
                  callback=callback)


def worst_case(score, x, steps, step_size, *, eps, restarts=1, norm="l2", generator=None):
    """The best of `score` over x itself, all iterates and all restarts -> (x_best [B, ...], value [B]), for
    AT-EBM's worst-case OOD detection. The first restart starts from x, the others from random points of the
    ball; arguments and errors as in `ascend`."""
    best, value = x.detach().clone(), torch.full((len(x),), -math.inf, device=x.device)

    def keep(_, x_k, s):
        best[:] = torch.where((s > value).view(-1, *[1] * (x.ndim - 1)), x_k, best)
        value[:] = torch.where(s > value, s, value)
    for restart in range(restarts):
        x_k = ascend(score, x, steps, step_size, eps=eps, norm=norm, random_start=restart > 0,
                     generator=generator, callback=keep)
        keep(steps, x_k, score(x_k).detach())
    return best, value


def steepest(g, norm):
    """u(g): the direction of steepest ascent under `norm`, for g [B, ...]; zero where g is zero."""
    if norm == "l2":
        return g / _l2(g).clamp_min(torch.finfo(g.dtype).tiny ** 0.5)  # below it, squares underflow
    return g.sign() if norm == "linf" else g


def project(x, x_0, eps, norm):
    """The point of the eps-ball around x_0 that is nearest to x, per sample: linf for "linf", else l2."""
    if eps == math.inf:
        return x
    d = x - x_0
    if norm == "linf":
        return x_0 + d.clamp(-eps, eps)
    return x_0 + d * (eps / _l2(d).clamp_min(max(eps, torch.finfo(d.dtype).tiny)))


def _l2(v):
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def _random_offset(x, eps, norm, generator):
    new = dict(generator=generator, dtype=x.dtype, device=x.device)
    if norm == "linf":
        return eps * (2 * torch.rand(x.shape, **new) - 1)
    radius = torch.rand((len(x),) + (1,) * (x.ndim - 1), **new)
    return eps * radius * steepest(torch.randn(x.shape, **new), "l2")


def _value_and_gradient(score, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        s = score(x)
        if s.shape != x.shape[:1]:
            raise ValueError(f"a score must return one number per sample, [{len(x)}], not {list(s.shape)}")
        (g,) = torch.autograd.grad(s.sum(), x)  # x only: the parameters' gradients are never computed
    return s.detach(), g


def _check(x, steps, step_size, eps, norm, noise, random_start):
    if norm not in ("l2", "linf", "none"):
        raise ValueError(f'norm must be "l2", "linf" or "none", not {norm!r}')
    for name, value in dict(steps=steps, step_size=step_size, eps=eps, noise=noise).items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, not {value}")
    if random_start and eps == math.inf:
        raise ValueError("random_start needs a finite eps")
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"x must be float [B, ...], not {x.dtype} {list(x.shape)}")


@contextmanager
def eval_mode(*modules):
    """Eval mode inside the `with`; then every submodule has its own mode again, after an exception too."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


# ---------------------------------------------------------------- scores
# Each constructor returns functools.partial of a module-level function: its tensors are visible (score.args).
# f maps x to logits [B, K]; y is int64 [B]; p_k = softmax(f)_k. The supervised scores are a f_y + b LSE f, of
# gradient a grad f_y + b sum_k p_k grad f_k; LSE f = log sum_k exp f_k.
def _supervised_score(a, b, doc):
    def score(f, y=None):
        if a and y is None:
            raise ValueError("this score needs the labels y")
        return partial(_supervised, f, y, a, b)
    score.__doc__ = doc
    return score


log_p_y_given_x = _supervised_score(1, -1, "TA (Santurkar et al., 2019): log p(y|x) = f_y - LSE f, (f, y).")
log_p_x = _supervised_score(0, 1, "Langevin (CEM), SGLD (JEM): log p(x) + const = LSE f = -E(x), (f).")
log_p_x_given_y = _supervised_score(1, 0, "CS (CEM, by memory): log p(x|y) + const = f_y = -E(x, y), (f, y).")
reinforced = _supervised_score(1, 1, "RCS (CEM, by memory): f_y + LSE f, (f, y).")
cross_entropy = _supervised_score(-1, 1, "The supervised attack: CE = -log p(y|x) = LSE f - f_y, (f, y).")
joint_energy_score = _supervised_score(-1, 0, "JEAT's attack: raises E(x, y) = -f_y, (f, y).")


def logit(f, sign=1):
    """sign * f(x) for a net with one logit [B, 1] (AT-EBM): +1 moves towards the data, -1 away from it."""
    return partial(_logit, f, sign)


def info_nce(g, positive, temperature, other_positives=True):
    """The contrastive attack (CEM, by memory): unit z = g(x), z' = g(positive); f_ij = z_i.z_j / temperature:
    -f_ii' + log [exp f_ii' + sum_{j != i} exp f_ij + (other_positives) sum_{j != i} exp f_ij'], z_j not held.

    x's rows of NT-Xent. z' is computed here, once, without gradient: build the score inside eval_mode.
    positive None: x [2B, ...] holds both views, i and i + B. CEM's PGD sampler: x_0, other_positives False.
    """
    if positive is not None:
        with torch.enable_grad():  # no_grad: an older autocast caches weights that pass no gradient on
            positive = torch.nn.functional.normalize(g(positive), dim=1).detach()
    return partial(_info_nce, g, positive, temperature, other_positives)


def entropy(g, temperature):
    """MaxEnt (CEM, by memory): -log sum_{j != i} exp(z_i . sg[z_j] / temperature), unit z = g(x): the part
    of the batch's entropy that belongs to i; sg: the others are held. ValueError: a batch of one."""
    return partial(_entropy, g, temperature)


def _supervised(f, y, a, b, x):
    logits = f(x)
    f_y = logits[torch.arange(len(logits), device=logits.device), y] if a else 0
    return a * f_y + b * logits.logsumexp(1) if b else a * f_y


def _logit(f, sign, x):
    return sign * f(x).squeeze(1)


def _similarity(z, others, temperature):
    """z_i . others_j / temperature, [B, M], with autocast off; -inf where j = i: self is left out."""
    with torch.autocast(z.device.type, enabled=False):
        s = z @ others.T / temperature
    return s.masked_fill(torch.eye(*s.shape, dtype=torch.bool, device=s.device), -math.inf)


def _info_nce(g, z_prime, temperature, other_positives, x):
    z = torch.nn.functional.normalize(g(x), dim=1)
    other_view = z.unflatten(0, (2, -1)).flip(0).flatten(0, 1) if z_prime is None else z_prime
    positive = (z * other_view).sum(1, keepdim=True) / temperature
    terms = [_similarity(z, z, temperature)]
    if z_prime is not None:  # else among z
        terms += [positive] + [_similarity(z, z_prime, temperature)] * other_positives
    return (torch.cat(terms, 1).logsumexp(1, keepdim=True) - positive).squeeze(1)


def _entropy(g, temperature, x):
    if len(x) < 2:
        raise ValueError("the entropy of a batch needs at least two samples")
    z = torch.nn.functional.normalize(g(x), dim=1)
    return -_similarity(z, z.detach(), temperature).logsumexp(1)


# ---------------------------------------------------------------- starts
class Gaussians(NamedTuple):
    """What fit_gaussians returns, with sample()."""
    mean: torch.Tensor  # float64 [C, ...] per class; pooled: C = 1
    rows: list  # of each class (X - mean) / sqrt(n), [n, D]
    jitter: float

    def sample(self, n_or_labels, generator=None):
        """float32 samples, clamped to [0, 1]: n of a pooled fit, or one per label (int64 [B]) of another.
        ValueError: a number for a class-wise fit, or a label that it has not seen."""
        device, classes, pooled = self.mean.device, len(self.rows), isinstance(n_or_labels, int)
        labels = torch.zeros(n_or_labels, dtype=torch.long) if pooled else n_or_labels.cpu()
        if pooled and classes > 1 or not set(labels.tolist()) <= set(range(classes)):
            raise ValueError(f"a fit of {classes} classes samples labels below that, a pooled fit a number")
        x = self.mean.float()[labels.to(device)].flatten(1)
        for c in labels.unique().tolist():
            i = (labels == c).nonzero().squeeze(1).to(device)
            z = torch.randn(len(i), len(self.rows[c]), generator=generator, device=device)
            x[i] += z @ self.rows[c]
        x += math.sqrt(self.jitter) * torch.randn(x.shape, generator=generator, device=device)
        return x.unflatten(1, self.mean.shape[1:]).clamp_(0, 1)


def fit_gaussians(x, y=None, jitter=1e-4):
    """Class-wise Gaussians N(mu_c, Sigma_c + jitter * I) over the pixels, or one pooled (y = None).
    x: uint8, or float in [0, 1], [N, ...]; y: int64 [N], every class 0..max(y) present. Sigma divides by n.
    Santurkar et al., 2019 (their notebook). Sampled without a factorisation: mu + (X - mu)^T z / sqrt(n)
    + sqrt(jitter) * xi has that law. Keeps a float32 copy of x, on its device. ValueError: an empty class."""
    scale = 255 if x.dtype == torch.uint8 else 1
    groups = [x] if y is None else [x[y == c] for c in range(int(y.max()) + 1)]
    if min(map(len, groups)) == 0:
        raise ValueError("fit_gaussians: a class without images")
    means = [g.mean(0, dtype=torch.float64) / scale for g in groups]
    rows = [((g / scale - m.float()) / math.sqrt(len(g))).flatten(1).float() for g, m in zip(groups, means)]
    return Gaussians(torch.stack(means), rows, jitter)


class ReplayBuffer(torch.nn.Module):
    """x, float32 [size, *shape], ends of SGLD chains (JEM); a chain starts afresh with probability reinit."""

    def __init__(self, size, shape, reinit=0.05, device="cpu", generator=None):
        super().__init__()
        self.reinit, self.random = reinit, dict(device=device, generator=generator)
        self.register_buffer("x", torch.rand(size, *shape, **self.random))

    def sample(self, n):
        """Starts x_0 [n, *shape], fresh ones uniform in [0, 1], and their distinct idx [n], n <= size."""
        idx = torch.randperm(len(self.x), **self.random)[:n]
        x_0, noise = self.x[idx], torch.rand(n, *self.x.shape[1:], **self.random)
        fresh = torch.rand(n, *[1] * (x_0.ndim - 1), **self.random) < self.reinit
        return torch.where(fresh, noise, x_0), idx

    def update(self, idx, x):
        """Write the chains' ends x [n, *shape] back."""
        self.x[idx] = x.detach()


# ---------------------------------------------------------------- evaluation and files
def accuracy(f, x, y, score=None, *, batch_size=250, progress=None, **ascend_args):
    """Share of x that f classifies as y, in eval mode; under attack where a score constructor is given.
    x: uint8, or float in [0, 1], [N, C, H, W]; y: int64 [N]; score: e.g. cross_entropy, used as score(f, y);
    ascend_args: of `ascend` (steps, step_size, ...); progress(done). ValueError: N = 0, y not [N]."""
    if len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"accuracy: no images, or labels {list(y.shape)} for {len(x)} images")
    correct = torch.zeros((), dtype=torch.long, device=x.device)
    with eval_mode(f), torch.no_grad():
        for i in range(0, len(x), batch_size):
            x_i, y_i = to_float(x[i:i + batch_size]), y[i:i + batch_size]
            if score is not None:
                x_i = ascend(score(f, y_i), x_i, **ascend_args)
            correct += (f(x_i).argmax(1) == y_i).sum()
            if progress is not None:
                progress(min(i + batch_size, len(x)))
    return correct.item() / len(x)


def to_float(x):
    """uint8 0..255 -> float32 in [0, 1]; a float tensor is returned as it is."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def to_uint8(x):
    """float -> uint8: x * 255 to the nearest integer, clipped to 0..255; a uint8 tensor stays as it is."""
    return x if x.dtype == torch.uint8 else x.mul(255).round().clamp(0, 255).to(torch.uint8)


def save_samples(prefix, x, labels=None):
    """Write prefix.npz and prefix.png, under temporary names first, so that an old file is replaced whole.
    x: [N, C, H, W], uint8, or float in [0, 1] (rounded to nearest). npz: arr_0 uint8 [N, H, W, C], and arr_1
    int64 [N] for labels: guided-diffusion's form. png: at most 10 x 10; with labels, a row per class."""
    x = to_uint8(x.detach()).cpu()
    arrays, shown, columns = [x.permute(0, 2, 3, 1).contiguous().numpy()], torch.arange(min(len(x), 100)), 10
    if labels is not None:
        arrays.append((labels := labels.cpu().long()).numpy())
        rows = [(labels == c).nonzero().squeeze(1)[:10] for c in labels.unique().tolist()[:10]]
        columns = min(map(len, rows))
        shown = torch.cat([r[:columns] for r in rows])  # equally long rows
    grid = torchvision.utils.make_grid(x[shown], nrow=columns, padding=2, pad_value=255)
    picture = torchvision.transforms.functional.to_pil_image(grid)
    npz, png = io.BytesIO(), io.BytesIO()
    np.savez(npz, *arrays)
    picture.save(png, "png")
    replace_files({f"{prefix}.npz": npz.getbuffer(), f"{prefix}.png": png.getbuffer()})


def replace_files(files):
    """Write {path: bytes} under temporary names, then rename: the old files stay until all new are whole."""
    for path, data in files.items():
        Path(f"{path}.tmp").write_bytes(data)
    for path in files:
        os.replace(f"{path}.tmp", path)
