"""Likelihoods of every kind, filled with numbers, and a Gaussian model whose answers are known."""

import math

import torch
from scipy import stats

import flowpost as fp
from flowpost.likelihood import ExtendedModel, FlowLikelihood, PointProcess, PoissonCounts

SPACE = fp.Product(vertex=fp.Real(2), energy=fp.Positive(), angle=fp.Circle())
GRID = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(2.0), indexing="ij"), -1)
SENSORS = GRID.reshape(-1, 2) - torch.tensor([1.0, 0.5])
SEEN_FROM = {"sensors": SENSORS, "position": "vertex", "direction": "angle"}


class Pixels(torch.nn.Module):
    """A decoder of a user's own: labels (M, 4) to (M, 2, 3)."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 6)

    def forward(self, z):
        return (self.net(z[:, :2]) + z[:, 2:3].log()).unflatten(-1, (2, 3))


CASES = {
    "diagonal": lambda: FlowLikelihood(SPACE, 3, "diagonal"),
    "spline": lambda: FlowLikelihood(SPACE, 3, "spline", hidden=16),
    "coupling": lambda: FlowLikelihood(SPACE, 4, "spline", coupling=True),
    "bounded": lambda: FlowLikelihood(
        SPACE, fp.Product(a=fp.Positive(), b=fp.Interval(0.0, 2.0)), "affine"
    ),
    "on a grid": lambda: FlowLikelihood(SPACE, 2, "affine", dequantize=0.5),
    "counts": lambda: PoissonCounts(SPACE, (2, 3), hidden=16, layers=1),
    "decoder": lambda: PoissonCounts(SPACE, (2, 3), Pixels()),
    "sensors": lambda: PoissonCounts(SPACE, (3, 2), hidden=8, **SEEN_FROM),
    "channels": lambda: PoissonCounts(SPACE, (4, 3, 2), hidden=8, **SEEN_FROM),
    "hits": lambda: PointProcess(SPACE, window=(-1.0, 3.0), components=2, hidden=8, **SEEN_FROM),
}


def labels(n, seed=0):
    """Labels of `SPACE`, of order one."""
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(n, 4, generator=g)
    return torch.cat([0.5 * r[:, :2], (0.3 * r[:, 2:3]).exp(), torch.atan2(r[:, 3:], r[:, :1])], 1)


def filled(name, seed=0, dtype=torch.float32):
    """A likelihood whose networks depend on the labels, as after some training."""
    torch.manual_seed(seed)
    likelihood = CASES[name]().to(dtype)
    z = labels(500).to(dtype)
    likelihood.fit_scale(likelihood.sample(z, torch.Generator().manual_seed(0)), z)
    return stirred(likelihood).eval()


def stirred(module, size=0.3):
    """The module with random numbers added to its parameters, by which outputs move by `size`."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p) / (p.shape[-1] if p.ndim > 1 else 1) ** 0.5)
    return module


def set_normal(head, weight, bias, sigma):
    """Make a `"diagonal"` head on the line N(weight · context + bias, sigma²)."""
    d = head.space.dof
    with torch.no_grad():
        head.flow.weight.zero_()
        head.flow.bias.zero_()
        head.flow.weight[:d] = torch.as_tensor(weight)
        head.flow.bias[:d] = bias
        head.flow.bias[d:] = 14 * math.atanh(math.log(sigma) / 14)


def pass_on(labels):
    """Make a `LabelEncoder` of real labels give them as they are."""
    with torch.no_grad():
        # a label of forty is not yet squashed
        labels.net.squash.scale.fill_(10.0)
        labels.net.skip.weight.copy_(10.0 * torch.eye(*labels.net.skip.weight.shape))
        labels.net.skip.bias.zero_()


def normal_likelihood(size, noise=1.0, weight=None, space=None):
    """x = weight · z + N(0, noise²) of `size` values; each is the label plus noise by default."""
    space = space or fp.Real(1)
    context = space.label_size
    likelihood = FlowLikelihood(space, size, "diagonal", context=context, hidden=2, layers=1)
    pass_on(likelihood.labels)
    weight = torch.ones(size, context) if weight is None else torch.as_tensor(weight)
    set_normal(likelihood.head, weight, 0.0, noise)
    return likelihood


def gaussian_model(size):
    """The exact model of z ~ N(0, 1), x_k = z + N(0, 1), for k up to `size`."""
    head = fp.PosteriorHead(size, fp.Real(1), "diagonal")
    set_normal(head, torch.full((1, size), 1 / (size + 1)), 0.0, (size + 1) ** -0.5)
    return ExtendedModel(None, head, normal_likelihood(size)).eval()


def gaussian_events(n, size, noise=1.0, seed=0, shift=0.0):
    """Events (n, size) of the same, with other noise or another prior if asked for."""
    g = torch.Generator().manual_seed(seed)
    z = shift + torch.randn(n, 1, generator=g)
    return z + noise * torch.randn(n, size, generator=g)


def gaussian_p(x):
    """Its posterior-predictive p by quadrature over the posterior (N,)."""
    size = x.shape[1]
    x = x.double()
    nodes = torch.linspace(-8, 8, 801, dtype=torch.float64)
    weight = torch.exp(-(nodes**2) / 2)
    z = x.mean(1, keepdim=True) * size / (size + 1) + nodes / math.sqrt(size + 1)
    square = ((x[:, None] - z[..., None]) ** 2).sum(-1)
    p = torch.as_tensor(stats.chi2.sf(square.numpy(), size))
    return (p * weight).sum(1) / weight.sum()


def own_model(name):
    """A likelihood as the truth, with a posterior of sorts, and events of it."""
    likelihood = filled(name)
    columns = {"hits": 8, "channels": 24, "on a grid": 2}.get(name, 6)
    encoder = fp.encoders.DeepSets(3, 8, hidden=16) if name == "hits" else torch.nn.Flatten()
    head = fp.PosteriorHead(columns, SPACE, "affine").fit_scale(labels(500))
    return ExtendedModel(encoder, head, likelihood).eval()


def own_events(model, n, seed):
    """Events of the likelihood of a model, at fresh labels."""
    return model.likelihood.sample(labels(n, seed), torch.Generator().manual_seed(seed + 1000))


def broken(model):
    """The model with cells or sensors whose rates are a tenth or three times what they were."""
    likelihood = model.likelihood
    with torch.no_grad():
        if hasattr(likelihood, "rates"):
            # the first coordinate of sensors, from −1 to 1
            place = likelihood.features.shared
            likelihood.rates.skip.weight[0, place] += 1.7 * likelihood.rates.scale[place]
        else:
            change = torch.tensor([0.1, 3.0]).log()
            likelihood.log_mean += change.repeat(len(likelihood.log_mean) // 2)
    return model


def uniform(p, held):
    """KS p-value of calibrated p (N,): the n held-out events are a sample themselves."""
    distance = stats.kstest(p.numpy(), "uniform").statistic
    return stats.kstwobign.sf(distance * (len(p) * held / (len(p) + held)) ** 0.5)
