"""Nuisances and the data sets that draw them: priors, randomness, forms, what is refused."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Cauchy,
    Gamma,
    HalfNormal,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.categorical import Categorical
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

import flowpost as fp
from flowpost.simulators import LinearGaussian, Telescope
from flowpost.systematics import (
    EpochEvents,
    Mixed,
    Nuisances,
    Perturbed,
    Simulated,
    Weighted,
    at,
)

N = 60
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 4.0]])
JOINT = MultivariateNormal(torch.tensor([1.0, -1.0]), COVARIANCE)

# prior, then mean, σ, and the points at −1σ and +2σ
PRIORS = {
    "normal": (Normal(1.0, 0.1), 1.0, 0.1, 0.9, 1.2),
    "double": (Normal(torch.tensor(1.0).double(), 0.1), 1.0, 0.1, 0.9, 1.2),
    "vector of one": (Normal(torch.tensor([1.0]), torch.tensor([0.1])), 1.0, 0.1, 0.9, 1.2),
    "uniform": (Uniform(1.0, 3.0), 2.0, 3**-0.5, 1.31731, 2.95450),
    "log-normal": (LogNormal(0.0, 0.5), math.exp(0.125), None, math.exp(-0.5), math.exp(1.0)),
    "half-normal": (HalfNormal(1.0), (2 / math.pi) ** 0.5, None, 0.20028, 2.27749),
    "gamma": (Gamma(4.0, 4.0), 1.0, 0.5, 0.52187, 2.21259),
    "beta": (Beta(2.0, 2.0), 0.5, 0.05**0.5, 0.25571, 0.90948),
    "student": (StudentT(5.0), 0.0, (5 / 3) ** 0.5, -1.11047, 2.64876),
    "cauchy": (Cauchy(2.0, 1.0), 2.0, 1.83726, 2 - 1.83726, 2 + 13.96774),
    "shifted": (
        TransformedDistribution(Uniform(0.0, 1.0), AffineTransform(1.0, 2.0)),
        2.0,
        None,
        1.31731,
        2.95450,
    ),
    "two modes": (
        MixtureSameFamily(
            Categorical(torch.ones(2)), Normal(torch.tensor([-1.0, 1.0]), torch.tensor(0.1))
        ),
        0.0,
        1.01**0.5,
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_moments_and_points_of_a_prior(name):
    prior, mean, width, low, high = PRIORS[name]
    nuisances = Nuisances(a=prior)
    assert nuisances.names == ("a",)
    assert nuisances.nominal.shape == nuisances.stddev.shape == (1,)
    assert nuisances.nominal.item() == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert nuisances.at("a", 0).item() == nuisances.nominal.item()
    if width is not None:
        assert nuisances.stddev.item() == pytest.approx(width, rel=1e-4)
    if low is not None:
        scale = 0.02 * nuisances.stddev.item()
        assert nuisances.at("a", -1).item() == pytest.approx(low, abs=scale)
        assert nuisances.at("a", 2).item() == pytest.approx(high, abs=5 * scale)


@pytest.mark.parametrize("name", PRIORS)
def test_draws_follow_their_prior(name):
    prior, mean, *_ = PRIORS[name]
    nuisances = Nuisances(a=prior)
    nu = nuisances.sample(20_000, seed=1)
    assert nu.shape == (20_000, 1)
    assert torch.equal(nu, nuisances.sample(20_000, seed=1))
    assert not torch.equal(nu, nuisances.sample(20_000, seed=2))
    if name != "cauchy":
        error = nu.std().item() / 20_000**0.5
        assert nu.mean().item() == pytest.approx(mean, abs=4 * error)
    torch.testing.assert_close(nuisances.log_prob(nu[:10]), prior.log_prob(nu[:10, 0]).reshape(10))


def test_sampling_leaves_the_global_generator_alone():
    nuisances, state = Nuisances(a=Normal(0.0, 1.0), b=Gamma(2.0, 1.0)), torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = nuisances.sample(4, generator), nuisances.sample(4, generator)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, nuisances.sample(4, seed=3))
    torch.manual_seed(5)
    third = nuisances.sample(4)
    torch.manual_seed(5)
    assert torch.equal(third, nuisances.sample(4))


def test_joint_and_single_priors_together():
    nuisances = Nuisances({("a", "b"): JOINT, "light yield": Uniform(0.0, 1.0)}, c=Normal(0.0, 2.0))
    assert nuisances.names == ("a", "b", "light yield", "c")
    assert nuisances.size == 4
    torch.testing.assert_close(nuisances.nominal, torch.tensor([1.0, -1.0, 0.5, 0.0]))
    torch.testing.assert_close(nuisances.stddev, torch.tensor([1.0, 2.0, 12**-0.5, 2.0]))
    nu = nuisances.sample(50_000, seed=0)
    assert np.cov(nu[:, :2].T.numpy()) == pytest.approx(COVARIANCE.numpy(), abs=0.06)
    expected = JOINT.log_prob(nu[:, :2]) + Normal(0.0, 2.0).log_prob(nu[:, 3])
    torch.testing.assert_close(nuisances.log_prob(nu), expected)
    torch.testing.assert_close(nuisances.at("b", -2), torch.tensor([1.0, -5.0, 0.5, 0.0]))
    parts = nuisances.unpack(nu)
    assert list(parts) == list(nuisances.names)
    assert torch.equal(nuisances.pack(parts), nu)
    assert "MultivariateNormal" in repr(nuisances)


def test_columns_of_one_distribution_are_independent_nuisances():
    prior = Normal(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 2.0]))
    nuisances = Nuisances({("a", "b"): (prior, [0.5, 4.0])})
    assert nuisances.nominal.tolist() == [0.5, 4.0]
    assert nuisances.at("b", 1).tolist() == [0.5, 6.0]
    value = torch.tensor([[0.0, 5.0]])
    torch.testing.assert_close(nuisances.log_prob(value)[0], prior.log_prob(value).sum())


def test_a_nominal_value_at_the_edge():
    nuisances = Nuisances(noise=(Uniform(1.0, 3.0), 1.0))
    assert nuisances.nominal.item() == 1.0
    points = [nuisances.at("noise", t).item() for t in (-2, -1, 0, 1, 2)]
    assert points[2] == 1.0
    assert all(1 <= p <= 3 for p in points)
    assert points[0] < points[1] < points[3] < points[4]


def test_density_outside_the_support_is_zero():
    nuisances = Nuisances(a=Uniform(0.0, 1.0), b=Gamma(2.0, 1.0))
    log_prob = nuisances.log_prob(torch.tensor([[0.5, 1.0], [1.5, 1.0], [0.5, -1.0]]))
    assert log_prob[0] == pytest.approx(-1.0)
    assert (log_prob[1:] == -torch.inf).all()


def test_pack_fills_in_nominal_values():
    nuisances = Nuisances(a=Normal(1.0, 0.1), b=Uniform(0.0, 2.0))
    nu = nuisances.pack({"b": torch.linspace(0, 2, 3)})
    torch.testing.assert_close(nu, torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))
    assert nuisances.pack({}).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="nuisances a, b; got 'c'"):
        nuisances.pack({"c": 1.0})
    with pytest.raises(ValueError, match="of one shape; got"):
        nuisances.pack({"a": torch.ones(2), "b": torch.ones(3)})


def test_packed_numbers_have_the_type_of_the_nominal_values():
    nuisances = Nuisances(a=Normal(1.0, 0.1), b=Uniform(0.0, 2.0))
    for values in ({"b": 0.3}, {"a": [1.0, 2.0], "b": 0.5}, {}):
        assert nuisances.pack(values).dtype == torch.float32
    assert nuisances.pack({"a": 1.0, "b": torch.zeros(3).double()}).dtype == torch.float64


def test_priors_are_printed_with_their_parameters():
    nuisances = Nuisances(
        {("a", "b"): Normal(torch.tensor([0.0, 5.0]), 0.1)},
        c=HalfNormal(0.7),
        d=LogNormal(0.0, 0.3),
    )
    assert str(nuisances) == (
        "Nuisances((a, b)=Normal(loc=[0, 5], scale=[0.1, 0.1]), nominal 0, 5; "
        f"c=HalfNormal(scale=0.7), nominal {nuisances.nominal[2]:g}; "
        f"d=LogNormal(loc=0, scale=0.3), nominal {nuisances.nominal[3]:g})"
    )
    assert "covariance_matrix=[[" in str(Nuisances({("a", "b"): JOINT}))


def test_data_sets_print_what_they_are():
    simulated = Simulated(simulate, PRIOR, N, seed=3, condition=True)
    simulated.set_epoch(2)
    told = "condition=True, seed=3, epoch"
    assert repr(simulated) == f"Simulated(60 items of shift, noise, {told} 2)"
    assert repr(Simulated(simulate, None, N)) == "Simulated(60 items, seed=0, epoch 0)"
    assert repr(simulated.fixed()) == f"Simulated(60 items of shift, noise, {told} -1 for good)"
    assert repr(Mixed(SETS)) == "Mixed(60 items of nominal, up, down, seed=0, epoch 0)"


def test_label_space_of_nuisances():
    nuisances = Nuisances(
        {("a", "b"): JOINT}, c=Uniform(1.0, 3.0), d=Gamma(2.0, 1.0), e=LogNormal(0.0, 1.0)
    )
    kinds = [type(b.space).__name__ for b in nuisances.space.blocks]
    assert kinds == ["Real", "Real", "Interval", "Positive", "Positive"]
    assert nuisances.space.names == nuisances.names
    nuisances.space.validate(nuisances.sample(5000, seed=0))


class Implicit(Normal):
    def log_prob(self, value):
        raise NotImplementedError


REFUSED = {
    "nothing": (lambda: Nuisances(), "at least one nuisance"),
    "a number": (lambda: Nuisances(a=1.0), "torch distribution as the prior of 'a'"),
    "discrete": (lambda: Nuisances(a=Bernoulli(0.5)), "density as the prior of 'a'"),
    "implicit": (lambda: Nuisances(a=Implicit(0.0, 1.0)), "density as the prior of 'a'"),
    "twice": (lambda: Nuisances({("a", "a"): JOINT}), "'a' twice"),
    "twice by name": (lambda: Nuisances({"a": Normal(0.0, 1.0)}, a=Normal(0.0, 1.0)), "'a' twice"),
    "too few names": (lambda: Nuisances(a=JOINT), "1 numbers for 'a'"),
    "too many": (lambda: Nuisances({("a", "b"): Normal(0.0, 1.0)}), r"2 numbers for \(a, b\)"),
    "a matrix": (lambda: Nuisances({("a", "b"): Normal(torch.zeros(1, 2), 1.0)}), "2 numbers"),
    "outside": (lambda: Nuisances(a=(Uniform(1.0, 3.0), 0.5)), "nominal value of 'a' in the supp"),
    "not finite": (lambda: Nuisances(a=(Normal(0.0, 1.0), math.nan)), "finite nominal value of"),
    "two values": (lambda: Nuisances(a=(Normal(0.0, 1.0), [0.0, 1.0])), "1 nominal values of 'a'"),
    "a number as name": (lambda: Nuisances({1: Normal(0.0, 1.0)}), "a tuple of names"),
    "a dotted name": (lambda: Nuisances({"a.b": Normal(0.0, 1.0)}), "without dots"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_priors_that_are_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build()


def test_points_that_are_refused():
    nuisances = Nuisances({("a", "b"): Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)})
    assert nuisances.at("a", 1)[0] == pytest.approx(0.5 + 12**-0.5)
    with pytest.raises(ValueError, match=r"'a' in the support of its joint prior; got 1\.07"):
        nuisances.at("a", 2)
    with pytest.raises(ValueError, match="one of the nuisances a, b; got 'c'"):
        nuisances.at("c", 1)
    with pytest.raises(ValueError, match="finite number of sigmas"):
        nuisances.at("a", math.inf)
    with pytest.raises(ValueError, match="Ask for fewer σ"):
        Nuisances(a=Normal(0.0, 1.0)).at("a", 50)
    with pytest.raises(ValueError, match=r"nu of shape \(\.\.\., 2\), the columns a, b; got \(3,"):
        nuisances.log_prob(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="finite nu; got nan in row 1, column 0"):
        nuisances.log_prob(torch.tensor([[0.5, 0.5], [math.nan, 0.5]]))
    with pytest.raises(ValueError, match="generator or a seed; got both"):
        nuisances.sample(3, torch.Generator(), seed=1)


# ------------------------------------------------------------------------------------ data sets

PRIOR = Nuisances(shift=Normal(0.0, 0.5), noise=(Uniform(1.0, 3.0), 1.0))


def simulate(nu, generator):
    z = torch.randn(len(nu), 1, generator=generator)
    return torch.cat([z + nu[:, :1], nu[:, 1:]], 1), z


def hits(nu, generator):
    """Padded events of a length that depends on the batch."""
    lengths = torch.randint(1, 9, (len(nu),), generator=generator)
    x = torch.randn(len(nu), int(lengths.max()), 2, generator=generator) + nu[:, None]
    return {"x": (x, lengths), "z": nu[:, :1], "weight": nu[:, 1]}


def by_name(nu, generator):
    z = torch.randn(len(nu), 1, generator=generator)
    return {"x": {"x": z + nu, "lengths": torch.ones(len(nu))}, "z": z, "reference": z + 1}


X = torch.arange(float(N)).reshape(N, 1)
Z = X + 100


def shift(x, nu, generator):
    return x + nu[:, :1] + torch.rand(len(nu), 1, generator=generator)


def global_noise(x, nu, generator):
    return x + torch.rand(len(nu), 1)


class Single(Dataset):
    """One event at a time, as users have them."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": {"a": X[i], "b": X[i]}, "z": Z[i]}


def both(x, nu, generator):
    return {"a": x["a"] + nu[:, :1], "b": x["b"]}


SETS = {
    "nominal": (X, Z),
    "up": (X + 1000, Z),
    "down": (torch.cat([X, X]) - 1000, torch.cat([Z, Z])),
}
SHARES = {"nominal": 0.5, "up": 0.3, "down": 0.2}
SIGNED = {"nominal": torch.ones(N), "up": torch.linspace(-0.5, 2.5, N), "down": 2 * torch.ones(N)}

EVENTS = {
    "simulated": lambda **o: Simulated(simulate, PRIOR, N, **o),
    "simulated hits": lambda **o: Simulated(hits, PRIOR, N, **o),
    "simulated without nuisances": lambda **o: Simulated(LinearGaussian(2).sample, None, N, **o),
    "simulated by name": lambda **o: Simulated(by_name, PRIOR, N, **o),
    "perturbed": lambda **o: Perturbed((X, Z), shift, PRIOR, **o),
    "perturbed, global noise": lambda **o: Perturbed((X, Z), global_noise, PRIOR, **o),
    "perturbed, weights": lambda **o: Perturbed((X, Z, torch.ones(N)), shift, PRIOR, **o),
    "perturbed Dataset": lambda **o: Perturbed(Single(), both, PRIOR, **o),
    "perturbed TensorDataset": lambda **o: Perturbed(TensorDataset(X, Z), shift, PRIOR, **o),
    "perturbed Subset": lambda **o: Perturbed(
        Subset(TensorDataset(X, Z), range(N)), shift, PRIOR, **o
    ),
    "perturbed simulation": lambda **o: Perturbed(
        Simulated(simulate, PRIOR, N, seed=3), lambda x, nu, g: x + nu, PRIOR, **o
    ),
    "mixed": lambda **o: Mixed(SETS, SHARES, **o),
    "mixed, drawn": lambda **o: Mixed(SETS, SHARES, draw=True, **o),
    "weighted": lambda **o: Weighted((X, Z), SIGNED, SHARES, **o),
    "weighted, drawn": lambda **o: Weighted((X, Z), SIGNED, SHARES, draw=True, **o),
}
RANDOM = [n for n in EVENTS if n not in ("mixed", "weighted")]


def flat(value):
    """All numbers of a batch in one tensor."""
    if isinstance(value, dict):
        value = [value[k] for k in sorted(value)]
    if isinstance(value, (tuple, list)):
        return torch.cat([flat(v) for v in value if v is not None])
    return value.double().reshape(-1)


def epoch(events, number=None, workers=0, batch=16, **options):
    if number is not None:
        events.set_epoch(number)
    generator = torch.Generator().manual_seed(number or 0)
    loader = DataLoader(
        events, batch, shuffle=True, generator=generator, num_workers=workers, **options
    )
    return list(loader)


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(flat(u), flat(v)) for u, v in pairs)


@pytest.mark.parametrize("name", EVENTS)
def test_a_loader_gives_what_a_batch_holds(name):
    events = EVENTS[name]()
    assert isinstance(events, EpochEvents)
    assert len(events) == N
    (whole,) = DataLoader(events, N)
    expected = events.batch(range(N))
    given = [v for v in expected if v is not None]
    if isinstance(whole, dict):
        assert all(torch.equal(flat(whole[k]), flat(getattr(expected, k))) for k in whole)
        assert len(whole) == len(given)
    else:
        assert len(whole) == len(given)
        assert all(torch.equal(flat(a), flat(b)) for a, b in zip(whole, given, strict=True))


@pytest.mark.parametrize("name", EVENTS)
def test_runs_repeat(name):
    first, second = EVENTS[name](), EVENTS[name]()
    for number in (0, 3):
        assert same(epoch(first, number), epoch(second, number))
    assert first.epoch == 3
    assert same(epoch(first, 0), epoch(EVENTS[name](), 0))


@pytest.mark.parametrize("name", RANDOM)
def test_epochs_and_seeds_differ(name):
    items = list(range(N))
    events, other = EVENTS[name](seed=0), EVENTS[name](seed=1)
    first = flat(events.batch(items))
    events.set_epoch(1)
    assert not torch.equal(first, flat(events.batch(items)))
    assert not torch.equal(first, flat(other.batch(items)))


@pytest.mark.parametrize("name", EVENTS)
def test_fixed_events_follow_no_epoch(name):
    events = EVENTS[name]()
    held = events.fixed()
    before = flat(held.batch(range(9)))
    events.set_epoch(4)
    held.set_epoch(5)
    assert events.epoch == 4
    assert held.epoch == -1
    assert torch.equal(before, flat(held.batch(range(9))))
    if name in RANDOM:
        assert not torch.equal(before, flat(events.batch(range(9))))


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_change_nothing(persistent):
    plain, parallel = Simulated(hits, PRIOR, N), Simulated(hits, PRIOR, N)
    loaders = [
        DataLoader(plain, batch_size=16),
        DataLoader(parallel, batch_size=16, num_workers=2, persistent_workers=persistent),
    ]
    seen = []
    for number in range(3):
        plain.set_epoch(number)
        parallel.set_epoch(number)
        one, two = (list(loader) for loader in loaders)
        assert same(one, two)
        seen.append(one)
    assert not same(seen[0], seen[1])
    assert not same(seen[1], seen[2])


def test_every_event_has_its_own_nuisances():
    nu = flat(Simulated(simulate, PRIOR, 5000, target="nuisances").batch(range(5000)).z)
    first, second = nu.reshape(-1, 2).unbind(1)
    assert first.std() == pytest.approx(0.5, rel=0.05)
    assert second.min() >= 1
    assert second.max() <= 3
    assert len(first.unique()) > 4990


def test_simulations_of_the_global_generator_repeat_and_leave_it_alone():
    def careless(nu, generator):
        return torch.randn(len(nu), 1), torch.randn(len(nu), 1)

    events, state = Simulated(careless, PRIOR, N), torch.get_rng_state()
    assert same([events.batch([0, 1])], [events.batch([0, 1])])
    assert torch.equal(torch.get_rng_state(), state)


def test_one_item():
    events = EVENTS["simulated"]()
    x, z = events[3]
    assert x.shape == (2,)
    assert z.shape == (1,)
    assert torch.equal(events[-1][1], events[N - 1][1])
    with pytest.raises(IndexError, match=f"index below {N}; got {N}"):
        events[N]


@pytest.mark.parametrize("name", ["simulated", "simulated hits", "simulated by name", "perturbed"])
def test_nuisances_beside_the_inputs(name):
    plain, told = EVENTS[name](), EVENTS[name](condition=True)
    a, b = plain.batch(range(8)), told.batch(range(8))
    learn = EVENTS[name](target="nuisances").batch(range(8))
    nu = b.x["nu"] if isinstance(b.x, dict) else b.x[-1]
    assert nu.shape == (8, 2)
    assert torch.equal(nu, learn.z)
    assert torch.equal(flat(learn.x), flat(a.x))
    assert torch.equal(flat(at(a.x, nu)), flat(b.x))


def test_telescope_hits():
    telescope = Telescope()
    prior = Nuisances(**telescope.nuisances())
    assert prior.names == ("light_yield", "scattering", "noise")
    assert prior.nominal.tolist() == [1.0, 1.0, 1.0]

    def events(nu, generator):
        z, angle = telescope.sample_prior(len(nu), generator)
        seen = telescope.simulate(z, angle, generator, nuisance=prior.unpack(nu))
        return (seen.hits, seen.lengths), seen.z

    (hit, lengths), z = next(iter(DataLoader(Simulated(events, prior, 20), batch_size=10)))
    assert hit.shape == (10, int(lengths.max()), 3)
    assert z.shape == (10, 3)
    encoder = fp.encoders.LSTM(3, 4, hidden=4)
    assert encoder(hit, lengths).shape == (10, 4)


# ------------------------------------------------------------------------------------- mixtures


def test_all_events_of_all_sets_have_the_weights_of_the_mixture():
    events = Mixed(SETS, SHARES)
    batch = events.batch(range(N))
    assert len(batch.z) == 4 * N
    kind = torch.where(batch.x < -500, 2, torch.where(batch.x >= 1000, 1, 0))[:, 0]
    shares = [float(batch.weight[kind == k].sum() / batch.weight.sum()) for k in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], rel=1e-5)
    assert batch.weight.mean() == pytest.approx(1.0, rel=1e-5)
    assert (kind == 2).sum() == 2 * N


def test_weights_inside_a_set_are_kept_and_sums_count_if_asked():
    w = torch.linspace(-0.2, 3.0, N)
    sets = {"a": (X, Z, w), "b": (X + 1000, Z, 3 * torch.ones(N))}
    both = Mixed(sets).batch(range(N))
    a = both.x[:, 0] < 500
    torch.testing.assert_close(both.weight[a] / both.weight[a].sum(), w / w.sum())
    assert both.weight[a].sum() == pytest.approx(float(both.weight[~a].sum()), rel=1e-5)
    raw = Mixed(sets, normalise=False).batch(range(N))
    torch.testing.assert_close(raw.weight[~a].sum() / raw.weight[a].sum(), 3 * N / w.sum())
    drawn = Mixed(sets, normalise=False, draw=True)
    assert drawn.probability.tolist() == pytest.approx([1.4 / 4.4, 3 / 4.4])


def test_drawn_events_come_from_the_sets_by_their_probabilities():
    events, counts, rows = Mixed(SETS, SHARES, draw=True), torch.zeros(3), set()
    for number in range(200):
        events.set_epoch(number)
        batch = events.batch(range(N))
        assert batch.weight is None
        assert torch.equal(batch.z, Z)
        x = batch.x[:, 0]
        kind = torch.where(x < -500, 2, torch.where(x >= 1000, 1, 0))
        counts += torch.bincount(kind, minlength=3)
        rows |= set(x[kind == 0].tolist())
    assert (counts / counts.sum()).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    assert len(rows) == N


def test_larger_sets_are_used_in_full():
    big = torch.arange(float(150)).reshape(-1, 1)
    events = Mixed({"a": (X, X), "b": (big, big)}, {"a": 0.0, "b": 1.0}, draw=True)
    seen = set()
    for number in range(60):
        events.set_epoch(number)
        batch = events.batch(range(N))
        assert torch.equal(batch.z[:, 0] % N, torch.arange(float(N)))
        seen |= set(batch.z[:, 0].tolist())
    assert seen == set(range(150))


@pytest.mark.parametrize("draw", [False, True])
def test_no_truth_is_in_training_and_validation(draw):
    events = Mixed(SETS, SHARES, draw=draw)
    parts = random_split(events, [40, 20], torch.Generator().manual_seed(0))
    labels = [{float(z) for batch in DataLoader(p, 8) for z in batch[1]} for p in parts]
    assert not labels[0] & labels[1]
    assert len(labels[0] | labels[1]) == N


def test_padded_events_of_different_length_are_mixed():
    def cloud(longest, offset):
        lengths = torch.full((5,), longest)
        return (torch.ones(5, longest, 2) + offset, lengths), torch.zeros(5, 1)

    events = Mixed({"short": cloud(3, 0), "long": cloud(7, 1)})
    (x, lengths), *_ = events.batch(range(5))
    assert x.shape == (10, 7, 2)
    assert sorted(lengths.tolist()) == [3] * 5 + [7] * 5
    assert torch.equal((x != 0).all(-1).sum(1), lengths)


def test_the_mean_of_the_weights_is_the_mixture():
    weight = Weighted((X, Z), SIGNED, SHARES).batch(range(N)).weight
    expected = 0.5 + 0.3 * SIGNED["up"] + 0.2 * 1
    torch.testing.assert_close(weight, expected)
    raw = Weighted((X, Z), SIGNED, SHARES, normalise=False).batch(range(N)).weight
    mixed = 0.5 + 0.3 * SIGNED["up"] + 0.2 * 2
    torch.testing.assert_close(raw, mixed / mixed.mean())
    drawn, total = Weighted((X, Z), SIGNED, SHARES, draw=True), torch.zeros(N)
    for number in range(2000):
        drawn.set_epoch(number)
        total += drawn.batch(range(N)).weight / 2000
    torch.testing.assert_close(total, weight, rtol=0, atol=0.1)


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("kind", ["mixed", "weighted"])
def test_the_alternative_beside_the_inputs(kind, draw):
    build = Mixed if kind == "mixed" else Weighted
    first = (SETS,) if kind == "mixed" else ((X, Z), SIGNED)
    told = build(*first, SHARES, draw=draw, condition=True).batch(range(N))
    x, known = told.x
    assert known.shape == (len(told.z), 3)
    assert (known.sum(1) == 1).all()
    weight = torch.ones(len(x)) if told.weight is None else told.weight
    share = (weight[:, None] * known).sum(0) / weight.sum()
    if not draw:
        assert share.tolist() == pytest.approx([0.5, 0.3, 0.2], rel=1e-4)
    if kind == "mixed":
        assert torch.equal(known[:, 1] == 1, x[:, 0] >= 1000)


# -------------------------------------------------------------------------------- what is refused

MORE = (torch.zeros(N, 3), Z)
REFUSALS = {
    "no generator": (
        lambda: Simulated(lambda nu: (nu, nu), PRIOR, N),
        r"called as simulate\(nu, generator\); got one of the arguments \(nu\)",
    ),
    "perturbed without a generator": (
        lambda: Perturbed((X, Z), lambda x, nu: x, PRIOR),
        r"called as perturb\(x, nu, generator\); got one of the arguments \(x, nu\)",
    ),
    "x alone": (
        lambda: Simulated(lambda nu, g: nu, PRIOR, N).batch([0]),
        r"simulate to return inputs and labels, \(x, z\); got one of them alone",
    ),
    "half a seed": (lambda: Simulated(simulate, PRIOR, N, seed=1.5), "seed as a whole number; got"),
    "no function": (lambda: Simulated(3, PRIOR, N), "simulate as a function; got int"),
    "no prior": (lambda: Simulated(simulate, Normal(0.0, 1.0), N), "systematics.Nuisances; got No"),
    "nuisances without a prior": (
        lambda: Simulated(simulate, None, N, target="nuisances"),
        "told or asked for them; got None",
    ),
    "told of none": (lambda: Simulated(simulate, None, N, condition=True), "got None. Name them"),
    "no number": (
        lambda: Simulated(lambda n: (X, Z), None, N),
        r"called as simulate\(n, generator\); got one",
    ),
    "no events": (lambda: Simulated(simulate, PRIOR, 0), "size as a whole number"),
    "bad target": (lambda: Simulated(simulate, PRIOR, N, target="x"), "'nuisances'; got 'x'"),
    "told what to find": (
        lambda: Simulated(simulate, PRIOR, N, target="nuisances", condition=True),
        "condition=False",
    ),
    "too few": (
        lambda: Simulated(lambda nu, g: (X[:2], Z[:2]), PRIOR, N).batch([0, 1, 2]),
        r"simulate to return 3 events, as many as asked for; got tensors of \[2\]",
    ),
    "a packed sequence": (
        lambda: Perturbed(
            (X[:, :, None], Z),
            lambda x, nu, g: torch.nn.utils.rnn.pack_sequence(list(x)),
            PRIOR,
        ).batch([0, 1]),
        "got a PackedSequence",
    ),
    "perturbed too few": (
        lambda: Perturbed((X, Z), lambda x, nu, g: x[:1], PRIOR).batch([0, 1]),
        "perturb to return 2 events",
    ),
    "a loader": (lambda: Perturbed(DataLoader(Single()), both, PRIOR), "got a DataLoader"),
    "no sets": (lambda: Mixed({}), "sets by name"),
    "sets without names": (lambda: Mixed([(X, Z)]), "sets by name.*got list"),
    "a Dataset": (lambda: Mixed({"a": TensorDataset(X, Z)}), "set 'a' as tensors"),
    "no events in a set": (lambda: Mixed({"a": (X[:0], Z[:0])}), "at least one event in set 'a'"),
    "shares of other names": (lambda: Mixed(SETS, {"up": 1.0}), "nominal, up, down; got up"),
    "shares that do not add up": (
        lambda: Mixed(SETS, dict(SHARES, up=0.4)),
        "add up to 1; got.*sum 1.1",
    ),
    "negative shares": (lambda: Mixed(SETS, dict(SHARES, up=-0.3, down=0.8)), "not negative"),
    "other columns": (lambda: Mixed({"a": (X, Z), "b": MORE}), "those of 'b' do not fit those of"),
    "other parts": (
        lambda: Mixed({"a": (X, Z), "b": {"x": X, "z": Z, "reference": Z}}),
        "x, z in every set, as in 'a'; got x, z, reference in 'b'",
    ),
    "no positive sum": (
        lambda: Mixed({"a": (X, Z), "b": (X, Z, -torch.ones(N))}),
        "positive sum in every alternative; got -1 on average for 'b'",
    ),
    "weights of other length": (
        lambda: Weighted((X, Z), {"a": torch.ones(3)}),
        r"weights of 'a' of shape \(60,\)",
    ),
    "weights not finite": (
        lambda: Weighted((X, Z), {"a": torch.full((N,), math.nan)}),
        "finite weights of 'a'",
    ),
    "weights twice": (
        lambda: Weighted((X, Z, torch.ones(N)), {"a": torch.ones(N)}),
        "Multiply them into each",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_data_sets_that_are_refused(name):
    build, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        build()
