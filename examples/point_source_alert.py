"""A neutrino telescope sees a track: where on the sky did it come from, and how sure is that?

    python examples/point_source_alert.py --out alert          # four minutes on two cores
    python examples/point_source_alert.py --out alert --fast   # does it run?

A network learns energy, position and arrival direction of simulated tracks. Coverage on fresh
events says whether its regions can be trusted; then one bright event becomes an alert: areas, a
multi-order sky map in equatorial coordinates, and pictures with the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from astropy.coordinates import EarthLocation

import flowpost as fp

SPACE = fp.Product(energy=fp.Positive(), position=fp.Real(3), direction=fp.Sphere())
SITE = EarthLocation.from_geodetic(lon=6.17, lat=42.8, height=-2475)  # off Toulon, in the sea
TIME = "2026-03-20 22:15:00"
LIGHT, CONE = 0.299792458, 0.926  # m/ns, tangent of the Cherenkov angle


def data(telescope: fp.simulators.Telescope3D, count: int, seed: int) -> dict[str, Any]:
    """Events as a line fit sees them: the network has only to refine that first guess."""
    events = telescope.sample(count, seed=seed)
    guess = telescope.first_guess(events.hits, events.lengths)
    size = (-1, events.hits.shape[1], -1)
    at, travel = (guess[k][:, None].expand(size) for k in ("position", "direction"))
    offset = events.hits[..., :3] - at
    along = (offset * travel).sum(-1, keepdim=True)
    across = offset - along * travel
    distance = across.norm(dim=-1, keepdim=True)
    late = events.hits[..., 3:] - (along + CONE * distance) / LIGHT
    seen = torch.cat([events.hits, across, along, distance, late, at, travel], -1)
    guess["direction"] = -travel[:, 0]  # a source lies opposite to the direction of travel
    z = torch.cat([events.z[:, :4], -events.z[:, 4:]], 1)
    return {"x": (seen, events.lengths), "z": z, "reference": guess}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("alert"), help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--events", type=int, default=50_000, help="simulated for the training")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count, epochs, tests = (600, 2, 300) if args.fast else (args.events, args.epochs, 4000)
    args.out.mkdir(parents=True, exist_ok=True)

    telescope = fp.simulators.Telescope3D(kind="track")
    train, fresh = (data(telescope, n, 2 * args.seed + i) for i, n in ((1, count), (2, tests)))
    torch.manual_seed(args.seed)
    # no dropout: with so many events nothing is learned by heart, and regions are less wide
    encoder = fp.encoders.DeepSets(features=16, context=64, hidden=64, dropout=0.0)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(64, SPACE, dropout=0.0))
    fp.fit(model, train, epochs=epochs, batch_size=512, seed=args.seed)
    fp.save(model, args.out / "model")

    with torch.no_grad():
        q = model(fresh["x"], reference=fresh["reference"])  # the network runs once for all below
    arrival = SPACE.unpack(fresh["z"])["direction"]
    u, names = q.to_base(fresh["z"]), q.space.base_names
    print(fp.coverage(u, log_prob=q.log_prob(fresh["z"]), names=names))
    some = slice(0, 2000)
    print(fp.diagnostics.hpd_coverage(q["direction"][some], arrival[some]))

    bright = int((fresh["x"][1] >= 80).nonzero()[0])
    alert, truth = q["direction"][bright], arrival[bright]
    half, most = alert.hpd_area((0.5, 0.9)).tolist()
    print(f"event {bright}: {fresh['x'][1][bright]} hits, {fresh['z'][bright, 0]:.0f} TeV")
    print(f"50 % area {half:.2f} deg², 90 % area {most:.2f} deg²")
    print(f"angular resolution {float(alert.angular_resolution(0.5).rad2deg()):.2f}° (50 %)")

    rotation = fp.skymap.detector_rotation(SITE, TIME)
    sky = fp.skymap.multiorder(alert, rotation=rotation)
    source = rotation @ truth.double().numpy()
    print(f"searched probability of the truth {100 * sky.searched_probability(source):.1f} %")
    print(sky)
    path = args.out / "alert.multiorder.fits"
    sky.write(path, name=f"track {bright}", time=TIME, origin="simulation", overwrite=True)
    sky.plot(truth=source).figure.savefig(args.out / "sky.png", dpi=150)
    sky.plot_zoom(truth=source).figure.savefig(args.out / "zoom.png", dpi=150)
    print(f"model, {path.name}, sky.png and zoom.png are in {args.out}")


if __name__ == "__main__":
    main()
