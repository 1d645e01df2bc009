"""Split-conformal levels: the finite-sample guarantee, over splits and in bins."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

import flowpost as fp
from flowpost.calibration import Conformal, Recalibrator, conformal_levels
from flowpost.diagnostics import hpd_levels
from flowpost.systematics import ConditionedEncoder, MarginalModel, Nuisances


def head(width=1.0):
    """The exact head of z ~ N(0, I₂), x = z + N(0, ¼ I), or one of another width."""
    head = fp.PosteriorHead(2, fp.Real(2), flow="diagonal")
    with torch.no_grad():
        head.flow.weight[:2] = 0.8 * torch.eye(2)
        head.flow.bias[2:4] = math.log(width * math.sqrt(0.2))
    return head


def measured(n, seed, noisy=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 2, generator=generator)
    x = z + 0.5 * torch.randn(n, 2, generator=generator)
    far = noisy * torch.randn(n, 2, generator=generator) * math.sqrt(0.2) + 0.8 * x
    return x, torch.where(x[:, :1] > 0.5, far, z)


def mixture():
    """The exact head of z ~ N(0, 1), x = z + ν + N(0, 1), with ν ~ N(0, 0.1²) marginalised."""
    head = fp.PosteriorHead(2, fp.Real(1), "affine")
    with torch.no_grad():
        head.flow.weight.zero_()
        head.flow.bias.zero_()
        head.flow.weight[0] = torch.tensor([0.5, -0.05])
        head.flow.bias[1] = math.log(math.sqrt(0.5))
    prior = Nuisances(shift=torch.distributions.Normal(0.0, 0.1))
    model = fp.PosteriorModel(ConditionedEncoder(None, prior, context=1, hidden=0), head)
    return MarginalModel(model, prior.sample(16, seed=0))


def test_rule_of_n_plus_one():
    """The smallest level whose rank is at least (n + 1)(1 − α), whatever the order."""
    levels = torch.rand(1000).double()[:999]
    for alpha in (0.5, 0.1, 0.01, 1 / 3):
        k = math.ceil((len(levels) + 1) * (1 - alpha) - 1e-9)
        assert conformal_levels(levels, alpha) == levels.sort().values[k - 1]
    assert conformal_levels(torch.arange(1.0, 10.0), 0.1) == 9
    assert conformal_levels(torch.arange(1.0, 9.0), 0.1) == math.inf
    assert conformal_levels(torch.zeros(0), 0.1) == math.inf
    assert conformal_levels(levels, [0.5, 0.001]).shape == (2,)
    assert conformal_levels(levels, torch.tensor(0.5)).shape == ()


@pytest.mark.parametrize("n", [1, 9, 10, 37])
@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.1])
def test_guarantee_for_any_number_of_events(n, alpha):
    """Over calibration draws and new events: between 1 − α and 1 − α + 1/(n + 1)."""
    generator = torch.Generator().manual_seed(n)
    trials = 1000
    held = torch.rand(trials, n, generator=generator, dtype=torch.float64).square()
    new = torch.rand(trials, generator=generator, dtype=torch.float64).square()
    used = torch.stack([conformal_levels(row, alpha) for row in held])
    share = float((new <= used).double().mean())
    k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    exact = k / (n + 1)
    assert 1 - alpha - 1e-9 <= exact < 1 - alpha + 1 / (n + 1) + 1e-9
    assert abs(share - exact) < 4 * (exact * (1 - exact) / trials) ** 0.5 + 1e-12


@pytest.mark.parametrize("kind", ["base", "hpd"])
@pytest.mark.parametrize("width", [0.7, 1.4])
def test_regions_of_a_posterior(kind, width):
    x, z = measured(1000, 0)
    conformal = Conformal(head(width), kind, draws=64).fit(x, z)
    assert conformal.held == (1000,)
    level = float(conformal.level(0.9))
    assert (level > 0.9) == (width < 1)
    new = measured(4000, 1)
    inside = conformal.contains(*new, level=0.9)
    assert inside.shape == (4000,)
    assert abs(float(inside.double().mean()) - 0.9) < 0.04
    if kind == "base":
        q = head(width)(new[0])
        assert torch.equal(inside, q.credibility(new[1]).double() <= level)
    assert "for 50, 68, 90, 95, 99 %" in str(conformal)


@pytest.mark.parametrize("width", [0.3, 0.1])
def test_regions_of_a_head_that_is_far_too_narrow(width):
    """Levels that round to 1 still have an order: that of the radius, here N(0, 1/width²)."""
    (x, z), (new_x, new_z) = measured(2000, 0), measured(10_000, 1)
    conformal = Conformal(head(width)).fit(x, z)
    inside = conformal.contains(new_x, new_z, 0.9)
    assert abs(float(inside.double().mean()) - 0.9) < 0.02
    radius = conformal.radius(0.9)
    assert torch.equal(inside, head(width)(new_x).to_base(new_z).double().norm(dim=-1) <= radius)
    ratio = math.sqrt(0.2) / float(head(width)(x[:1]).stddev[0, 0])
    assert float(radius) == pytest.approx(math.sqrt(-2 * math.log(0.1)) * ratio, rel=0.05)
    with pytest.warns(UserWarning, match=r"round to 1.*contains, or .*radius"):
        level = conformal.level(0.9)
    exact = stats.chi2(2).cdf(float(radius) ** 2)
    assert float(level) == pytest.approx(exact, abs=1e-15)
    # a level as such is a coin for labels that no draw is further out than, but no more often
    hpd = Conformal(head(width), "hpd", draws=32).fit(x, z)
    assert abs(float(hpd.contains(new_x, new_z).double().mean()) - 0.9) < 0.02
    with pytest.raises(ValueError, match="Expected base-ordered regions; got kind='hpd'"):
        hpd.radius()


def test_radius_in_bins_and_of_the_whole_space():
    x, z = measured(2000, 0, noisy=2.0)
    conformal = Conformal(head(), bins=[0.5]).fit(x, z, by=lambda x: x[:, 0])
    radius = conformal.radius(0.9, x)
    assert radius.shape == (2000,)
    assert torch.equal(
        conformal.contains(x, z), head()(x).to_base(z).double().norm(dim=-1) <= radius
    )
    assert Conformal(head()).fit(*measured(8, 0)).radius(0.9) == math.inf


def test_failed_fit_leaves_the_first():
    x, z = measured(1000, 0)
    conformal = Conformal(head(), bins=[0.0]).fit(x, z, by=lambda x: x[:, 0])
    before, held = conformal.level(0.9, x), conformal.held
    with pytest.raises(ValueError, match="none with by < 0"):
        conformal.fit(x, z, by=lambda x: x[:, 1] + 100)
    assert conformal.held == held
    assert torch.equal(conformal.level(0.9, x), before)


def test_values_of_an_unconditional_head():
    alone = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(2000, generator=generator)
    z = torch.where(v[:, None] < 0.5, 1.0, 1.5) * torch.randn(2000, 2, generator=generator)
    conformal = Conformal(alone, bins=[0.5]).fit(None, z, by=v)
    level = conformal.level(0.9, None, by=v[:5])
    assert torch.equal(level > 0.95, v[:5] > 0.5)
    assert abs(float(conformal.contains(None, z, by=v).double().mean()) - 0.9) < 0.01
    binned = Recalibrator(alone, bins=[0.5]).fit(None, z, by=v)
    both = Conformal(binned, bins=[0.5]).fit(None, z, by=v)
    assert abs(both.level(0.9, by=v[:5]) - 0.9).max() < 0.05


def test_levels_of_a_mixture_over_nuisances():
    """z ~ N(0, 1), x = z + ν + N(0, 1) and a model that believes in ν of a tenth the size."""
    generator = torch.Generator().manual_seed(0)
    z, nu, noise = torch.randn(3, 3000, 1, generator=generator)
    q = mixture()(z + nu + noise)
    levels, _ = hpd_levels(q, z, 64, generator)
    assert float((levels <= 0.9).double().mean()) < 0.87
    used = conformal_levels(levels[:1000], 0.1)
    assert abs(float((levels[1000:] <= used).double().mean()) - 0.9) < 0.03


def test_of_a_recalibrated_posterior():
    model, (x, z) = head(0.7), measured(3000, 0)
    recalibrated = Recalibrator(model).fit(x[:2000], z[:2000])
    conformal = Conformal(recalibrated).fit(x[2000:], z[2000:])
    assert abs(float(conformal.level(0.9)) - 0.9) < 0.05
    given = Recalibrator(model, bins=2).fit(x[:2000], z[:2000], by=x[:2000, 0])
    both = Conformal(given, bins=2).fit(x[2000:], z[2000:], by=x[2000:, 0])
    assert both.contains(x[:50], z[:50], by=x[:50, 0]).shape == (50,)
    # one level for all, of a recalibrator that wants values
    whole = Conformal(given, bins=1).fit(x[2000:], z[2000:], by=x[2000:, 0])
    assert whole.held == (1000,)
    assert abs(float(whole.level(0.9)) - 0.9) < 0.05
    with pytest.raises(ValueError, match="Expected by=… with the values"):
        Conformal(given).fit(x[2000:], z[2000:])


def test_a_recalibrated_posterior_is_encoded_once():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x

    x, z = measured(1200, 0)
    encoder = Counting()
    recalibrated = Recalibrator(fp.PosteriorModel(encoder, head(0.7)), bins=[0.0])
    recalibrated.fit(x, z, by=x[:, 0])
    before = encoder.calls
    conformal = Conformal(recalibrated, bins=[0.0]).fit(x, z, by=x[:, 0])
    assert encoder.calls == before + 1
    x, z = measured(500, 1)
    q = recalibrated(x, by=x[:, 0])
    inside = q.credibility(z).double() <= conformal.level(0.8, x, by=x[:, 0])
    assert torch.equal(conformal.contains(x, z, 0.8, by=x[:, 0]), inside)


def test_levels_of_bins_want_to_know_the_bin():
    x, z = measured(1000, 0)
    for by, wanted in (
        (x[:, 0], "x of the events and their values of by"),
        (lambda x: x[:, 0], "x of the events"),
    ):
        conformal = Conformal(head()).fit(x, z, by=by)
        for ask in (conformal.level, conformal.radius):
            with pytest.raises(ValueError, match=f"Expected {wanted}; got None. There are 4 bins"):
                ask(0.9)
    assert Conformal(head()).fit(x, z).level(0.9).shape == ()
    # without context, the values are enough
    free = Conformal(fp.PosteriorHead(0, fp.Real(2), flow="diagonal")).fit(None, z, by=x[:, 0])
    assert free.level(0.9, by=x[:5, 0]).shape == (5,)
    with pytest.raises(ValueError, match="Expected by=… with the values"):
        free.level(0.9)


@pytest.mark.parametrize("how", ["function", "values"])
def test_bins_hold_as_much_each(how):
    """A head that is too narrow only where x0 > 0.5."""
    x, z = measured(6000, 0, noisy=2.0)
    new_x, new_z = measured(20_000, 1, noisy=2.0)
    by = (lambda x: x[:, 0]) if how == "function" else x[:, 0]
    given = None if how == "function" else new_x[:, 0]
    conformal = Conformal(head(), bins=[0.5]).fit(x, z, by=by)
    assert sum(conformal.held) == 6000
    level = conformal.level(0.9, new_x, by=given)
    assert level.shape == (20_000,)
    inside = conformal.contains(new_x, new_z, 0.9, by=given)
    assert torch.equal(inside, head()(new_x).credibility(new_z).double() <= level)
    plain = Conformal(head()).fit(x, z).contains(new_x, new_z)
    for rows, few in ((new_x[:, 0] >= 0.5, True), (new_x[:, 0] < 0.5, False)):
        assert abs(float(inside[rows].double().mean()) - 0.9) < 0.02
        assert abs(float(plain[rows].double().mean()) - 0.9) > 0.03
        assert (float(plain[rows].double().mean()) < 0.9) == few
    # events that are edges do not count
    quarters = Conformal(head(), bins=4).fit(x, z, by=x[:, 0])
    assert quarters.held == (1500, 1499, 1499, 1499)


def test_too_few_events_are_the_whole_space():
    x, z = measured(8, 0)
    conformal = Conformal(head()).fit(x, z)
    assert conformal.level(0.9) == math.inf
    assert conformal.level(0.8) < 1
    assert conformal.contains(*measured(100, 1)).all()


def test_mistakes():
    x, z = measured(100, 0)
    with pytest.raises(ValueError, match="Expected kind as one of base, hpd; got 'tarp'"):
        Conformal(head(), "tarp")
    with pytest.raises(ValueError, match=r"got Linear\. conformal_levels takes"):
        Conformal(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Expected a fitted Conformal"):
        Conformal(head()).level()
    with pytest.raises(ValueError, match="Expected a fitted Conformal"):
        Conformal(head()).contains(x, z)
    fitted = Conformal(head()).fit(x, z)
    for level in (0, 1, 90):
        with pytest.raises(ValueError, match=r"Expected level between 0 and 1; got .*0\.9"):
            fitted.level(level)
    with pytest.raises(ValueError, match="Expected alpha between 0 and 1"):
        conformal_levels(torch.rand(10), 90)
    with pytest.raises(ValueError, match="without NaN"):
        conformal_levels(torch.tensor([0.5, math.nan]))
    for use in (fitted.level, lambda **k: fitted.contains(x, z, **k)):
        with pytest.raises(ValueError, match=r"Expected by as values .* got a function"):
            use(by=lambda x: x[:, 0])
    with pytest.raises(ValueError, match="Expected levels of the truth of shape"):
        conformal_levels(torch.rand(10, 2))
    with pytest.raises(ValueError, match=r"none with by < -100"):
        Conformal(head(), bins=[-100.0]).fit(x, z, by=x[:, 0])
    with pytest.raises(ValueError, match="as many events as there are labels"):
        Conformal(head()).fit(x[:50], z)
    with pytest.raises(ValueError, match=r"by of as many events .* 100; got \[99\]"):
        Conformal(head()).fit(x, z, by=x[1:, 0])
    with pytest.raises(ValueError, match=r"Expected labels as a tensor .* got a dict"):
        Conformal(head()).fit(x, {"a": z[:, 0], "b": z[:, 1]})
    for by in (None, x[:0, 0]):
        with pytest.raises(ValueError, match="labels of at least one event"):
            Conformal(head()).fit(x[:0], z[:0], by=by)
    assert str(Conformal(head())) == "Conformal base levels, not fitted"
