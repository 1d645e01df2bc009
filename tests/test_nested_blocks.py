"""Blocks of nested products keep their declared columns, whatever the order of the flow."""

import pytest
import torch
from spherical import perturbed

import flowpost as fp
from flowpost.spaces import Circle, Positive, Product, Real, Sphere

SPACES = {
    "angle second": Product(obj=Product(a=Real(), phi=Circle()), t=Real()),
    "direction second": Product(obj=Product(energy=Positive(), n=Sphere()), t=Real()),
    "later block": Product(first=Sphere(), obj=Product(a=Real(), phi=Circle())),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("reference", [False, True])
def test_columns_of_a_nested_block(name, reference):
    space = SPACES[name]
    head = perturbed(space, "spline", size=0.1)
    context = torch.randn(4, 3, dtype=torch.float64)
    guess = head(context).sample() if reference else None
    q = head(context, reference=guess)
    block = q["obj"]
    assert block.space.names == tuple(n.removeprefix("obj.") for n in space.names if "obj" in n)
    columns = [i for i, n in enumerate(space.names) if n.startswith("obj")]
    z = q.sample((5,), torch.Generator().manual_seed(0))
    drawn = block.sample((5,), torch.Generator().manual_seed(0))
    if name != "later block":
        # one flow takes fewer base coordinates than the other
        assert torch.isfinite(block.log_prob(z[..., columns])).all()
    assert drawn.shape == (5, 4, len(columns))
    assert block.space.contains(drawn).all()
    _, log_prob = block.sample_and_log_prob((5,))
    assert torch.isfinite(log_prob).all()
    # against the joint density, where only one other label is integrated over
    if name == "angle second":
        t = torch.linspace(-40, 40, 8001, dtype=torch.float64)
        row = z[0, :1, columns].expand(len(t), -1)
        joint = q[0].log_prob(torch.cat([row, t[:, None]], -1)).exp()
        expected = torch.trapezoid(joint, t).log()
        torch.testing.assert_close(block[0].log_prob(z[0, 0, columns]), expected, rtol=0, atol=1e-4)


def test_directions_come_before_angles():
    space = Product(phi=Circle(), energy=Positive(), n=Sphere())
    assert [b.name for b in space.blocks] == ["n", "phi", "energy"]
    assert type(fp.PosteriorHead(0, space)(None)["n"]) is fp.Posterior


def test_diagnostics_take_angles_on_any_branch():
    torch.manual_seed(0)
    head = fp.PosteriorHead(2, Circle())
    q = head(torch.randn(500, 2))
    z = q.sample(generator=torch.Generator().manual_seed(1))
    for diagnostic in (fp.diagnostics.sbc, fp.diagnostics.tarp):
        found = [
            diagnostic(q, some, draws=64, generator=torch.Generator().manual_seed(2))
            for some in (z, torch.remainder(z, 6.283185307179586))
        ]
        assert str(found[0]) == str(found[1])


def test_encoder_of_point_clouds_has_forward_derivatives():
    encoder = fp.encoders.DeepSets(3, 4, hidden=8).eval()
    x, lengths = torch.randn(5, 6, 3), torch.tensor([6, 0, 2, 4, 1])
    tangents = torch.randn(3, 5, 6, 3)

    def slope(tangent):
        return torch.func.jvp(lambda v: encoder(v, lengths), (x,), (tangent,))[1]

    one = torch.stack([slope(t) for t in tangents])
    assert one.abs().max() > 0
