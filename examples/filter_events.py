r"""Cut on the goodness of fit of each event: train, calibrate, filter a file of events.

    python examples/filter_events.py              # some minutes
    python examples/filter_events.py --fast

The telescope's images get a posterior of position, energy and direction, and a likelihood of the
image given them. A calibrated p-value per event then says how well the event fits what was
simulated: a cut at 1 % loses 1 % of good events. The file that is filtered holds good events, and
pairs of coincident ones that no simulation contained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import flowpost as fp
from flowpost.goodness import Calibrator, Filter
from flowpost.likelihood import ExtendedModel, PoissonCounts
from flowpost.simulators import Telescope, anomalies

SPACE = fp.Product(position=fp.Real(2), energy=fp.Positive(), angle=fp.Circle())


def labels(events):
    return SPACE.pack(
        {"position": events.z[:, :2], "energy": events.z[:, 2], "angle": events.angle}
    )


def train(telescope, events, epochs):
    """The posterior first, then the likelihood of an image given its labels."""
    torch.manual_seed(0)
    likelihood = PoissonCounts(
        SPACE,
        telescope.image_shape,
        sensors=telescope.sensors,
        position="position",
        direction="angle",
    )
    model = ExtendedModel(fp.encoders.CNN(4, 64), fp.PosteriorHead(64, SPACE), likelihood)
    data = (events.images, labels(events))
    model.likelihood.requires_grad_(False)
    print(fp.fit(model, data, epochs=epochs, progress=False))
    model.requires_grad_(False)
    model.likelihood.requires_grad_(True)
    print(fp.fit(model, data, epochs=2 * epochs, progress=False))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("filtered"))
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--fast", action="store_true", help="little training, for tests")
    args = parser.parse_args()
    size, epochs, held, draws = (2000, 2, 400, 20) if args.fast else (30_000, 12, 4000, 100)
    telescope = Telescope()
    model = train(telescope, telescope.sample(size, seed=1), epochs)

    calibrator = Calibrator(model, draws=draws).fit(telescope.sample(held, seed=2).images)
    cut = Filter(calibrator, args.threshold)
    args.out.mkdir(parents=True, exist_ok=True)
    fp.save(cut, args.out / "filter.safetensors")

    # a file from the detector: half of it good events, half coincident pairs
    good = telescope.sample(held // 4, seed=3)
    pairs = anomalies.overlay(
        telescope.sample(held // 4, seed=4), telescope.sample(held // 4, seed=5)
    )
    torch.save(torch.cat([good.images, pairs.images]), args.out / "events.pt")

    cut = fp.load(args.out / "filter.safetensors")
    images = torch.load(args.out / "events.pt", weights_only=True)
    p = cut.calibrator.p_value(images, progress=False).p
    kept = p >= cut.threshold
    torch.save({"kept": kept, "p": p}, args.out / "decisions.pt")
    p_good, p_bad = p[: len(good)], p[len(good) :]
    print(f"good events: {cut.efficiency(good.images)}")
    print(
        f"coincident pairs: {100 * float((p_bad < cut.threshold).double().mean()):.1f} % rejected"
    )
    parts = {"good events": p_good, "coincident pairs": p_bad}
    ax = fp.plots.plot_p_values(parts, threshold=cut.threshold)
    ax.figure.savefig(args.out / "p_values.png", dpi=150)
    print(f"wrote {args.out}/filter.safetensors, decisions.pt and p_values.png")


if __name__ == "__main__":
    main()
