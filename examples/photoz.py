"""Redshift posteriors of galaxies from their magnitudes.

    python examples/photoz.py --data FILE.hdf5                     # train, test on a held-out fifth
    python examples/photoz.py --data FILE.hdf5 --score OTHER.hdf5   # and score another catalogue
    python examples/photoz.py --model photoz_model --score OTHER.hdf5

A catalogue is an HDF5 file with a group `photometry` of columns `mag_{u,g,r,i,z,y}_lsst`,
`mag_err_{…}_lsst` and `redshift`, as those of the DESC DC2 sky. A non-detection (a magnitude that
is flagged above 50 or not finite) and a missing error are information, not a reason to drop a
galaxy.
"""

from __future__ import annotations

import argparse
import time

import h5py
import numpy as np
import torch

import flowpost as fp

BANDS = "ugrizy"


def read(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, 16), NaN where missing, and redshifts (N, 1)."""
    with h5py.File(path) as file:
        try:
            group = file["photometry"]
            mag = np.stack([group[f"mag_{b}_lsst"][:] for b in BANDS], 1).astype(float)
            err = np.stack([group[f"mag_err_{b}_lsst"][:] for b in BANDS], 1).astype(float)
            redshift = group["redshift"][:].astype(float)
        except KeyError as error:
            raise ValueError(f"Expected photometry and its columns in {path}: {error}") from error
    seen = np.isfinite(mag) & (mag < 50)
    mag = np.where(seen, mag, np.nan)
    err = np.where(seen & np.isfinite(err) & (err > 0), err, np.nan)
    colours = mag[:, :-1] - mag[:, 1:]
    features = np.concatenate([mag[:, 3:4], colours, np.log(err), mag[:, [0, 1, 4, 5]]], 1)
    return torch.tensor(features).float(), torch.tensor(redshift).float()[:, None]


def cde_loss(q: fp.Posterior, z: torch.Tensor) -> float:
    """Mean of ∫p² dz − 2 p(z_true), the integral on a grid of redshifts."""
    grid = torch.linspace(1e-3, 4, 2000)
    with torch.no_grad():
        square = torch.cat(
            [
                q[i : i + 500].log_prob(grid[:, None, None]).mul(2).exp().sum(0)
                for i in range(0, len(q), 500)
            ]
        )
        return float((square * (grid[1] - grid[0]) - 2 * q.log_prob(z).exp()).mean())


def score(model: fp.PosteriorModel, x: torch.Tensor, z: torch.Tensor) -> dict[str, float]:
    """NLL in nats, χ² and PIT uniformity, and CDE loss of galaxies with known redshift."""
    with torch.no_grad():
        q = model(x)
        u, log_prob = q.to_base_and_log_prob(z)
    cov = fp.coverage(u)
    return {
        "NLL": -float(log_prob.mean()),
        "KS p": cov.ks_pvalue,
        "PIT KS": float(fp.diagnostics.ks_uniform(q.cdf(z).detach())[0]),
        "68 %": float((q.credibility(z) < 0.6827).float().mean()),
        "90 %": float((q.credibility(z) < 0.9).float().mean()),
        "CDE loss": cde_loss(q, z),
    }


def train(
    x: torch.Tensor, z: torch.Tensor, seed: int, epochs: int, progress: bool
) -> fp.PosteriorModel:
    """Train one model; labels above zero, one flow on 16 features."""
    torch.manual_seed(seed)
    encoder = fp.encoders.Tabular(x.shape[1], 64, missing=True)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(64, fp.Product(z=fp.Positive())))
    fp.fit(model, (x, z), val=0.1, epochs=epochs, seed=seed, progress=progress)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="catalogue to train on; a fifth of it is held out")
    parser.add_argument("--score", help="another catalogue, scored with the trained model")
    parser.add_argument("--model", default="photoz_model", help="where the model is kept")
    parser.add_argument("--seeds", type=int, default=1, help="trainings with seeds 0, 1, …")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if not args.data and not args.score:
        parser.error("give --data to train, or --score with a trained --model")
    rows = []
    if args.data:
        x, z = read(args.data)
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
        test, rest = order[: len(z) // 5], order[len(z) // 5 :]
        for seed in range(args.seeds):
            start = time.process_time()
            model = train(x[rest], z[rest], seed, args.epochs, not args.quiet)
            rows.append((f"held out, seed {seed}", score(model, x[test], z[test])))
            print(f"seed {seed}: {time.process_time() - start:.0f} CPU-seconds")
            if seed == 0:
                fp.save(model, args.model)
    if args.score:
        rows.append((args.score, score(fp.load(args.model), *read(args.score))))
    print(f"{'':<24}" + "".join(f"{name:>10}" for name in rows[0][1]))
    for title, numbers in rows:
        print(f"{title[-24:]:<24}" + "".join(f"{v:>10.3g}" for v in numbers.values()))


if __name__ == "__main__":
    main()
