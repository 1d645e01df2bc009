"""The extended supervised loss against closed forms, and models that train by it."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
from likelihoods import (
    SPACE,
    filled,
    gaussian_events,
    gaussian_model,
    labels,
    normal_likelihood,
    pass_on,
    set_normal,
)

import flowpost as fp
from flowpost import losses
from flowpost.likelihood import ExtendedModel, FlowLikelihood, Latent, PoissonCounts, with_latents

W = torch.tensor([[0.5], [1.0], [-2.0]])
NOISE = 0.8
DRAWS = 40000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_log_prob(x, mean, covariance):
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)


# ------------------------------------------------------------------ without latents


def test_without_latents_it_is_joint_kl_and_likelihood():
    likelihood, z = filled("counts"), labels(40)
    x = likelihood.sample(z, seeded())
    head = fp.PosteriorHead(6, SPACE, "affine").fit_scale(z)
    q = head(x.flatten(1))
    weight = torch.rand(40, generator=seeded())
    for w in (None, weight):
        found = losses.extended(q, likelihood, x, z, w)
        expected = losses.joint_kl(q, z, w) - losses.weighted_mean(likelihood.log_prob(x, z), w)
        torch.testing.assert_close(found, expected)
    by_hand = (weight * (-q.log_prob(z) - likelihood.log_prob(x, z))).sum() / weight.sum()
    torch.testing.assert_close(losses.extended(q, likelihood, x, z, weight), by_hand)
    torch.testing.assert_close(
        losses.extended(None, likelihood, x, z), -likelihood.log_prob(x, z).mean()
    )


def test_weights_are_those_of_joint_kl():
    likelihood, z = filled("counts"), labels(4)
    x = likelihood.sample(z, seeded())
    signed = torch.tensor([1.0, -0.5, 1.0, 1.0])
    with pytest.raises(ValueError, match="Expected weights of at least 0"):
        losses.extended(None, likelihood, x, z, signed)
    found = losses.extended(None, likelihood, x, z, signed, signed_weights=True)
    torch.testing.assert_close(found, -(signed * likelihood.log_prob(x, z)).sum() / 2.5)


def test_at_the_truth_it_is_the_entropy():
    """The exact posterior and likelihood of the Gaussian model: both terms in closed form."""
    size, n = 3, 20000
    model = gaussian_model(size)
    z = torch.randn(n, 1, generator=seeded())
    x = z + torch.randn(n, size, generator=seeded(1))
    posterior = math.log(2 * math.pi * math.e / (size + 1)) / 2
    likelihood = size * math.log(2 * math.pi * math.e) / 2
    found = losses.extended(model(x), model.likelihood, x, z)
    assert found.item() == pytest.approx(posterior + likelihood, abs=4 * (size / 2 / n) ** 0.5)


# ------------------------------------------------------------------ without labels: the VAE


def vae(mean, sigma):
    """Latents z ~ N(0, 1), x = W z + noise, and q(z|x) = N(mean · x, sigma²)."""
    likelihood = normal_likelihood(3, NOISE, W)
    latent = Latent(None, 1, context=3, flow="diagonal")
    set_normal(latent.head, mean, 0.0, sigma)
    return likelihood, latent


def exact_latent():
    precision = 1 + (W**2).sum() / NOISE**2
    return (W.T / NOISE**2) / precision, float(precision**-0.5)


def evidence(x):
    return normal_log_prob(x, torch.zeros(3), W @ W.T + NOISE**2 * torch.eye(3))


def bound(x, mean, sigma):
    """The evidence lower bound of the linear model in closed form (N,)."""
    centre = x @ torch.as_tensor(mean).T
    residual = (x - centre @ W.T).square().sum(1) + sigma**2 * (W**2).sum()
    fit = -residual / (2 * NOISE**2) - 1.5 * math.log(2 * math.pi * NOISE**2)
    kl = (sigma**2 + centre[:, 0] ** 2 - 1) / 2 - math.log(sigma)
    return fit - kl


X = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.0, 0.0]])


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("wide", [0.7, 1.0, 1.4])
def test_without_labels_it_is_the_bound_of_a_vae(scale, wide):
    mean, sigma = exact_latent()
    mean, sigma = scale * mean, wide * sigma
    likelihood, latent = vae(mean, sigma)
    found = torch.stack(
        [
            losses.extended(
                None,
                likelihood,
                x.expand(DRAWS, -1),
                None,
                latent=latent,
                context=x.expand(DRAWS, -1),
                generator=seeded(),
            )
            for x in X
        ]
    ).detach()
    expected = -bound(X, mean, sigma)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    exact = -evidence(X)
    if (scale, wide) == (1.0, 1.0):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    else:
        assert (expected > exact + 0.01).all()


def test_the_exact_posterior_has_no_variance():
    """ln p(x) from every single draw."""
    likelihood, latent = vae(*exact_latent())
    x = X.repeat(50, 1)
    value = losses.likelihood_loss(likelihood, x, None, latent=latent, context=x)
    assert value.shape == (100,)
    torch.testing.assert_close(value.detach(), -evidence(x), rtol=1e-4, atol=1e-4)


def test_gradients_reach_likelihood_and_latents():
    """Those of the closed form, for location and width of the posterior of the latents."""
    mean, sigma = exact_latent()
    likelihood, latent = vae(0.5 * mean, 1.4 * sigma)
    x = X[:1].expand(DRAWS, -1)
    losses.extended(None, likelihood, x, None, latent=latent, context=x).backward()
    slope, width = (0.5 * mean).requires_grad_(), torch.tensor(1.4 * sigma, requires_grad=True)
    centre = X[:1] @ slope.T
    residual = (X[:1] - centre @ W.T).square().sum() + width**2 * (W**2).sum()
    kl = (width**2 + centre[0, 0] ** 2 - 1) / 2 - torch.log(width)
    (residual / (2 * NOISE**2) + kl).backward()
    torch.testing.assert_close(latent.head.flow.weight.grad[:1], slope.grad, rtol=0.02, atol=0.02)
    # of ln σ, which a tanh bounds
    inner = 1 - (math.log(1.4 * sigma) / 14) ** 2
    found = latent.head.flow.bias.grad[1] / inner
    torch.testing.assert_close(found, width.grad * 1.4 * sigma, rtol=0.02, atol=0.02)
    assert likelihood.head.flow.weight.grad.abs().sum() > 0


def test_draws_of_latents_repeat():
    likelihood, latent = vae(0.5 * exact_latent()[0], 1.0)

    def one(seed):
        return losses.extended(
            None, likelihood, X, None, latent=latent, context=X, generator=seeded(seed)
        )

    state = torch.get_rng_state()
    assert torch.equal(one(0), one(0))
    assert not torch.equal(one(0), one(1))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------ labels and latents

A, B = torch.tensor([[1.0], [0.5]]), torch.tensor([[0.3], [-1.0]])
RHO, SIGMA = 0.7, 0.6


def labels_and_latents(prior, wide=1.0, shift=0.0):
    """x = A z_o + B z_u + noise, z_u ~ N(0, 1) or N(RHO z_o, SIGMA²), and q(z_u|x, z_o)."""
    space = with_latents(fp.Real(1), 1)
    likelihood = normal_likelihood(2, NOISE, torch.cat([A, B], 1), space)
    latent = Latent(fp.Real(1), 1, context=2, flow="diagonal", prior=prior, hidden=1)
    pass_on(latent.labels)
    rho, sigma = (RHO, SIGMA) if prior == "learned" else (0.0, 1.0)
    if prior == "learned":
        set_normal(latent.prior_head, torch.tensor([[RHO]]), 0.0, SIGMA)
    precision = sigma**-2 + float((B**2).sum()) / NOISE**2
    # mean (x − A z_o) · B / noise² + rho z_o / sigma², over the precision
    slope = rho / sigma**2 - float((A * B).sum()) / NOISE**2
    weight = torch.cat([B.T / NOISE**2, torch.tensor([[slope]])], 1) / precision
    set_normal(latent.head, weight, shift, wide * precision**-0.5)
    return likelihood, latent, (rho, sigma)


@pytest.mark.parametrize("prior", ["normal", "learned"])
def test_labels_and_latents_against_the_closed_form(prior):
    likelihood, latent, (rho, sigma) = labels_and_latents(prior)
    x, z = torch.tensor([[0.5, -1.0], [2.0, 1.0]]), torch.tensor([[0.3], [-1.2]])
    covariance = sigma**2 * B @ B.T + NOISE**2 * torch.eye(2)
    exact = -normal_log_prob(x, z @ (A + rho * B).T, covariance)
    found = losses.likelihood_loss(likelihood, x, z, latent=latent, context=x).detach()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    head = fp.PosteriorHead(2, fp.Real(1), "diagonal")
    set_normal(head, torch.tensor([[0.2, 0.1]]), 0.3, 0.9)
    q, w = head(x), torch.tensor([1.0, 3.0])
    total = losses.extended(q, likelihood, x, z, w, latent=latent, context=x)
    expected = ((exact - q.log_prob(z)) * w).sum() / 4
    torch.testing.assert_close(total.detach(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prior", ["normal", "learned"])
def test_another_posterior_of_the_latents_costs_its_divergence(prior):
    """Above −ln p(x|z_o) by KL(q ‖ p(z_u|x, z_o))."""
    wide, shift = 1.5, 0.2
    x, z = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3]])
    values = []
    for options in ({}, {"wide": wide, "shift": shift}):
        likelihood, latent, (_, sigma) = labels_and_latents(prior, **options)
        many = {"latent": latent, "context": x.expand(DRAWS, -1), "generator": seeded()}
        value = losses.likelihood_loss(likelihood, x.expand(DRAWS, -1), z.expand(DRAWS, -1), **many)
        values.append(value.detach().mean())
    precision = sigma**-2 + float((B**2).sum()) / NOISE**2
    kl = (wide**2 - 1 + shift**2 * precision) / 2 - math.log(wide)
    assert (values[1] - values[0]).item() == pytest.approx(kl, abs=0.03)


def test_latents_of_many_draws_of_labels():
    """Posteriors of labels (S, N, D) and contexts (N, L), as goodness of fit asks for them."""
    _, latent, _ = labels_and_latents("learned")
    x, z = torch.randn(4, 2), torch.randn(3, 4, 1)
    q = latent.posterior(x, z)
    assert q.batch_shape == (3, 4)
    u = torch.randn(3, 4, 1)
    torch.testing.assert_close(q.log_prob(u)[1], latent.posterior(x, z[1]).log_prob(u[1]))
    assert latent.prior_log_prob(u, z).shape == (3, 4)
    alone = Latent(fp.Real(1), 2, context=0)
    assert alone.posterior(None, z).batch_shape == (3, 4)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Latent(fp.Real(1), 1, 2, prior="flat"), "Expected prior as 'normal' or 'learned'"),
        (lambda: Latent(None, 1, 2, prior="learned"), "where there are no labels"),
        (lambda: Latent(fp.Real(1), 0, 2), "Expected size as a whole number"),
        (lambda: Latent(fp.Real(1), 1, 2, flow="cubic"), "Expected flow as one of"),
        (lambda: Latent(3, 1, 2), "Expected the label space first"),
        (
            lambda: losses.extended(None, normal_likelihood(2), torch.zeros(1, 2), None),
            "Expected labels, latents or both; got neither",
        ),
        (
            lambda: losses.extended(None, normal_likelihood(2), torch.zeros(3, 2), torch.ones(2)),
            "Expected x of one event for each label",
        ),
        (
            lambda: losses.extended(
                None, normal_likelihood(2), torch.zeros(3, 2), torch.ones(3, 1), torch.ones(2)
            ),
            "Expected weight of shape",
        ),
    ],
)
def test_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


# ------------------------------------------------------------------ models


class Counting(torch.nn.Module):
    """A linear encoder that knows how often it ran."""

    def __init__(self, size, context=4):
        super().__init__()
        self.net, self.calls = torch.nn.Linear(size, context), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def small_model(latent=False):
    torch.manual_seed(0)
    space = fp.Real(1)
    of = with_latents(space, 1) if latent else space
    latents = Latent(space, 1, context=4, hidden=4) if latent else None
    head = fp.PosteriorHead(4, space, "diagonal")
    return ExtendedModel(Counting(3), head, FlowLikelihood(of, 3, "diagonal"), latents)


def frozen(model, posterior, likelihood):
    for part, free in (("encoder", posterior), ("head", posterior), ("likelihood", likelihood)):
        getattr(model, part).requires_grad_(free)
    if model.latent is not None:
        model.latent.requires_grad_(likelihood)
    return model


@pytest.mark.parametrize("latent", [False, True])
def test_frozen_parts_are_left_out(latent):
    x, z = torch.randn(20, 3), torch.randn(20, 1)
    model = small_model(latent).eval()
    with torch.no_grad():
        posterior = -model(x).log_prob(z)

        def extra():
            torch.manual_seed(5)
            return losses.likelihood_loss(
                model.likelihood, x, z, latent=model.latent, context=model.encode(x)
            )

        likelihood = extra()

    def loss(*parts, base=False):
        torch.manual_seed(5)
        return frozen(model, *parts).event_loss(x, z, base=base)

    for parts, expected in (
        ((True, True), posterior + likelihood),
        ((True, False), posterior),
        ((False, True), likelihood),
        ((False, False), posterior + likelihood),
    ):
        for base in (False, True):
            found = loss(*parts, base=base)
            value, u = found.value, found.base
            held = (found.posterior is not None, found.data is not None)
            assert held == (parts if any(parts) else (True, True))
            shares = [t for t in (found.posterior, found.data) if t is not None]
            torch.testing.assert_close(sum(shares), value)
            torch.testing.assert_close(value.detach(), expected)
            assert (u is not None) == base
            if base:
                torch.testing.assert_close(u, model(x).to_base(z))
    value = loss(False, True).value
    value.mean().backward()
    assert all(p.grad is None for p in (*model.head.parameters(), *model.encoder.parameters()))
    assert any(p.grad is not None for p in model.likelihood.parameters())
    if not latent:
        calls = model.encoder.calls
        loss(False, True)
        assert model.encoder.calls == calls, "the encoder is not needed"


def test_what_a_model_is_made_of():
    model = small_model(latent=True)
    assert model.own_parts() == [model.head, model.likelihood, model.latent]
    custom = ExtendedModel(
        None,
        fp.PosteriorHead(3, fp.Real(1)),
        PoissonCounts(fp.Real(1), 3, torch.nn.Linear(1, 3)),
    )
    assert custom.own_parts() == [custom.head]
    assert model.unscaled
    x, z = torch.randn(200, 3) + 5, torch.randn(200) - 7
    model.fit_scale(x, z)
    assert not model.unscaled
    torch.testing.assert_close(model.likelihood.head.loc, x.mean(0))
    torch.testing.assert_close(model.likelihood.head.scale, x.std(0), rtol=0.01, atol=0)
    squash = model.likelihood.labels.net.squash
    torch.testing.assert_close(squash.loc, torch.tensor([-7.0, 0.0]), rtol=0, atol=0.3)
    assert torch.allclose(model.latent.labels.net.squash.loc, z.median(), atol=0.1)
    assert model.loss(x, z).isfinite()


@pytest.mark.parametrize("latent", [False, True])
def test_all_scales_in_one_call(latent):
    """What `fit` does before it trains, for a loop of one's own."""
    space = fp.Real(1)
    x, z = 5 + 3 * torch.randn(200, 3), torch.randn(200, 1) - 7
    weight = torch.rand(200)

    def build():
        torch.manual_seed(0)
        of = with_latents(space, 1) if latent else space
        return ExtendedModel(
            fp.encoders.Tabular(3, 4, hidden=4, layers=1),
            fp.PosteriorHead(4, space, "diagonal"),
            FlowLikelihood(of, 3, "diagonal"),
            Latent(space, 1, context=4, hidden=4) if latent else None,
        )

    model, like = build(), build()
    assert model.set_scales(x.numpy(), z, weight) is model
    like.fit_scale(x, z)
    like.head.fit_scale(z, weight)
    like.encoder.fit_scale(x)
    for a, b in zip(model.state_dict().values(), like.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not model.unscaled
    assert model.encoder.fitted
    # what is set stays
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.set_scales(2 * x, 2 * z)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plain = fp.PosteriorModel(None, fp.PosteriorHead(3, space)).set_scales(x, z)
    assert bool(plain.head.fitted)


def test_a_loop_without_scales_is_told_once():
    model, x, z = small_model(), torch.randn(20, 3), torch.randn(20, 1)
    with pytest.warns(UserWarning, match=r"has no scales.*Call model.set_scales\(x, z\)"):
        model.loss(x, z)
    model.loss(x, z)
    small_model().eval().loss(x, z)
    small_model().set_scales(x, z).loss(x, z)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_the_data_may_differ_from_what_the_encoder_sees(kind):
    class Pair(torch.nn.Module):
        def forward(self, a, b=None):
            return a[:, :3] if b is None else a + b

    head = fp.PosteriorHead(3, fp.Real(1), "diagonal")
    a, b, z = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 1)
    x = {"tensor": torch.cat([a, b], 1), "tuple": (a, b), "dict": {"b": b, "a": a}}[kind]
    model = ExtendedModel(Pair(), head, normal_likelihood(3), data=Pair()).eval()
    expected = a if kind == "tensor" else a + b
    torch.testing.assert_close(model.measured(x), expected)
    value = model.loss(x, z)
    torch.testing.assert_close(
        value, losses.extended(head(expected), model.likelihood, expected, z)
    )


def test_refused_models():
    head, likelihood = fp.PosteriorHead(3, fp.Real(1)), normal_likelihood(3)
    latent = Latent(fp.Real(1), 1, context=3)
    for parts, text in (
        ((head, head), "Expected a Likelihood; got PosteriorHead"),
        ((likelihood, head), "Expected head as a PosteriorHead"),
        ((fp.PosteriorHead(3, fp.Real(2)), likelihood), "Build it with the space of the head"),
        ((head, likelihood, latent), r"Build it with with_latents\(space, k\)"),
        (
            (head, FlowLikelihood(with_latents(fp.Real(1), 1), 3), Latent(fp.Positive(), 1, 3)),
            "Expected latents of Real",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            ExtendedModel(None, *parts)


def test_masks_are_refused():
    model = ExtendedModel(None, fp.PosteriorHead(3, fp.Real(1)), normal_likelihood(3))
    x, z = torch.randn(5, 3), torch.randn(5, 1)
    mask = torch.ones(5, 1, dtype=torch.bool)
    for ask in (lambda: model.loss(x, z, mask=mask), lambda: model.event_loss(x, z, mask)):
        with pytest.raises(ValueError, match="Train the posterior first, with a PosteriorModel"):
            ask()


# ------------------------------------------------------------------ training

SIZE, EVENTS = 3, 3000
FIT = {"epochs": 8, "batch_size": 64, "lr": 0.005, "progress": False}
ENTROPY = (
    math.log(2 * math.pi * math.e / (SIZE + 1)) / 2,
    SIZE * math.log(2 * math.pi * math.e) / 2,
)


def training_data(n=EVENTS, seed=0):
    z = torch.randn(n, 1, generator=seeded(seed))
    return z + torch.randn(n, SIZE, generator=seeded(seed + 1)), z


def untrained():
    torch.manual_seed(0)
    likelihood = FlowLikelihood(fp.Real(1), SIZE, "diagonal", context=4, hidden=8, layers=1)
    return ExtendedModel(None, fp.PosteriorHead(SIZE, fp.Real(1), "diagonal"), likelihood)


def check_trained(model):
    x, z = training_data(20000, seed=10)
    with torch.no_grad():
        posterior = -model(x).log_prob(z).mean().item()
        likelihood = -model.likelihood.log_prob(x, z).mean().item()
    assert posterior == pytest.approx(ENTROPY[0], abs=0.02 + 4 * (0.5 / 20000) ** 0.5)
    assert likelihood == pytest.approx(ENTROPY[1], abs=0.03 + 4 * (1.5 / 20000) ** 0.5)


def test_joint_training():
    model = untrained()
    history = fp.fit(model, training_data(), **FIT)
    assert not model.unscaled
    check_trained(model)
    best = history.best
    assert best.val_nll == pytest.approx(sum(ENTROPY), abs=0.3)
    assert best.coverage68 == pytest.approx(0.683, abs=0.1)
    # both parts of every epoch, and a name that is not that of one of them
    assert best.val_posterior == pytest.approx(ENTROPY[0], abs=0.2)
    for epoch in history.epochs:
        assert epoch.val_posterior + epoch.val_data == pytest.approx(epoch.val_nll, abs=1e-5)
    name = "loss (posterior + data)"
    value = f"{best.val_nll:.4f} = {best.val_posterior:.4f} + {best.val_data:.4f} nats"
    assert f"validation {name} {value}" in str(history)
    assert history.plot()[0].get_ylabel() == f"{name} [nats]"
    plt.close("all")


def test_posterior_first():
    model, data = untrained(), training_data()
    model.likelihood.requires_grad_(False)
    before = {k: v.clone() for k, v in model.likelihood.named_parameters()}
    first = fp.fit(model, data, **FIT)
    assert first.loss_name == "NLL"
    assert first.best.val_data is None
    assert all(math.isnan(v) for v in first["val_data"])
    assert first.best.val_nll == pytest.approx(ENTROPY[0], abs=0.2)
    assert all(torch.equal(v, before[k]) for k, v in model.likelihood.named_parameters())
    model.requires_grad_(False)
    model.likelihood.requires_grad_(True)
    before = {k: v.clone() for k, v in model.head.named_parameters()}
    second = fp.fit(model, data, **FIT)
    assert second.loss_name == "NLL of the data"
    assert "validation NLL of the data" in str(second)
    assert second["val_data"] == second["val_nll"]
    assert second.best.val_nll == pytest.approx(ENTROPY[1], abs=0.3)
    assert all(torch.equal(v, before[k]) for k, v in model.head.named_parameters())
    check_trained(model)


def test_labels_and_latents_train_together():
    """x depends on more than its label: the likelihood with latents is the better one."""
    z, u = torch.randn(EVENTS, 2, generator=seeded()).split(1, 1)
    x = torch.cat([z + 2 * u, z - 2 * u], 1)
    x = x + 0.3 * torch.randn(EVENTS, 2, generator=seeded(1))
    losses_of = []
    for latents, seed in ((0, 0), (1, 0), (1, 1)):
        torch.manual_seed(seed)
        space = with_latents(fp.Real(1), 1) if latents else fp.Real(1)
        likelihood = FlowLikelihood(space, 2, "diagonal", context=4, hidden=8, layers=1)
        latent = Latent(fp.Real(1), 1, context=2, flow="diagonal", hidden=4) if latents else None
        head = fp.PosteriorHead(2, fp.Real(1), "diagonal")
        model = ExtendedModel(None, head, likelihood, latent)
        losses_of.append(fp.fit(model, (x, z), **FIT).best.val_nll)
    # x given z has width √8.09 one way and 0.3 across, which is √4.09 in each column
    gain = math.log(4.09) - math.log(8.09**0.5 * 0.3)
    for found in losses_of[1:]:
        assert losses_of[0] - found == pytest.approx(gain, abs=0.15)


def test_alternate_training():
    """A plain loop over the two losses, with an optimizer each."""
    model, (x, z) = untrained(), training_data()
    model.head.fit_scale(z)
    model.fit_scale(x, z)
    steps = [torch.optim.Adam(p.parameters(), lr=0.01) for p in (model.head, model.likelihood)]
    order = seeded()
    for i in range(600):
        rows = torch.randint(EVENTS, (256,), generator=order)
        part = i % 2
        if part:
            loss = losses.extended(None, model.likelihood, x[rows], z[rows])
        else:
            loss = losses.joint_kl(model(x[rows]), z[rows])
        steps[part].zero_grad()
        loss.backward()
        steps[part].step()
    check_trained(model)


def test_a_vae_learns_the_evidence():
    """Latents alone, in a plain loop: the bound rises to ln p(x) of the linear model."""
    torch.manual_seed(0)
    z = torch.randn(EVENTS, 1, generator=seeded())
    x = z @ W.T + NOISE * torch.randn(EVENTS, 3, generator=seeded(1))
    likelihood = FlowLikelihood(fp.Real(1), 3, "diagonal", context=4, hidden=8, layers=1)
    latent = Latent(None, 1, context=3, flow="diagonal")
    step = torch.optim.Adam([*likelihood.parameters(), *latent.parameters()], lr=0.02)
    order = seeded()
    for _ in range(500):
        some = x[torch.randint(EVENTS, (256,), generator=order)]
        loss = losses.extended(None, likelihood, some, None, latent=latent, context=some)
        step.zero_grad()
        loss.backward()
        step.step()
    with torch.no_grad():
        found = losses.extended(None, likelihood, x, None, latent=latent, context=x)
    assert -evidence(x).mean() - 0.02 < found < -evidence(x).mean() + 0.08


def test_events_of_the_gaussian_model():
    """The fixtures themselves: moments of x."""
    x = gaussian_events(20000, 2, noise=2.0)
    torch.testing.assert_close(
        torch.cov(x.T), torch.tensor([[5.0, 1.0], [1.0, 5.0]]), rtol=0.05, atol=0.1
    )
