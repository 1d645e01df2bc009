"""The main job: put a posterior in the place of an MSE head, train, and check its coverage.

    python examples/replace_mse_head.py --out demo          # four minutes on two cores
    python examples/replace_mse_head.py --out demo --fast   # does it run?

The events are those of a toy neutrino telescope: images for a CNN, sequences of hits for an LSTM.
The same network is trained once with an MSE head and twice with a flow in its place; the table
compares them with the exact posterior, which this simulator knows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import flowpost as fp
from flowpost import plots
from flowpost.report import write_report

SPACE = fp.Product(
    position=fp.Interval(-80.001, 80.001, size=2), energy=fp.Interval(0.999, 100.001)
)
HEADS = ("mse", "diagonal", "spline")
MAX_HITS = 48
EPOCHS = {"CNN": 20, "LSTM": 10}
STAGES = (1, 4)
ENCODERS = {
    "CNN": lambda: fp.encoders.CNN(channels=4, context=64, width=16),
    "LSTM": lambda: fp.encoders.LSTM(features=3, context=64, hidden=32),
}


def views(events: fp.simulators.TelescopeEvents) -> dict[str, object]:
    """The input of each network; the LSTM reads the first hits of bright events."""
    hits = events.hits[:, :MAX_HITS] / torch.tensor([80.0, 80.0, 150.0])
    return {"CNN": torch.log1p(events.images), "LSTM": (hits, events.lengths.clamp(max=MAX_HITS))}


def row(name: str, q: fp.Posterior, z: torch.Tensor) -> tuple[dict[str, str], torch.Tensor]:
    """Numbers of the table, and the NLL of each event."""
    u, log_prob = q.to_base_and_log_prob(z)
    cov = fp.coverage(u, log_prob=log_prob)
    error = q.mean - z
    return {
        "head": name,
        "RMSE position [m]": f"{error[:, :2].square().sum(1).mean().sqrt():.1f}",
        "RMSE energy [TeV]": f"{error[:, 2].square().mean().sqrt():.1f}",
        "NLL [nats]": f"{-log_prob.mean():.3f}",
        "68 % coverage": f"{100 * cov.coverage_at(0.68):.1f} %",
        "90 % coverage": f"{100 * cov.coverage_at(0.9):.1f} %",
        "KS p": f"{cov.ks_pvalue:.2g}",
    }, -log_prob


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--fast", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    count, tests, truths = (400, 200, 8) if args.fast else (16_000, 4000, 300)
    args.out.mkdir(parents=True, exist_ok=True)

    telescope = fp.simulators.Telescope()
    train, test = telescope.sample(count, seed=1), telescope.sample(tests, seed=2)
    print(f"exact posterior of {truths} test events …")
    true = telescope.true_posterior_images(test.images[:truths])
    true_nll, several = true.nll(test.z[:truths]), true.n_modes() > 1

    table, coverages, posteriors, stages = [], {}, {}, {}
    for network, encoder in ENCODERS.items():
        x, x_test = views(train)[network], views(test)[network]
        for head in HEADS:
            name = f"{network}, {head}"
            print(f"training {name} …", flush=True)
            torch.manual_seed(0)
            # before: torch.nn.Sequential(encoder(), torch.nn.Linear(64, 3)) and F.mse_loss
            model = fp.PosteriorModel(encoder(), fp.PosteriorHead(64, SPACE, flow=head))
            options = {"epochs": 4 if args.fast else EPOCHS[network], "snapshots": STAGES}
            history = fp.fit(model, (x, train.z), progress=not args.quiet, **options)
            with torch.no_grad():
                q = model(x_test)
                numbers, nll = row(name, q, test.z)
                coverages[name] = fp.coverage(q.to_base(test.z))
            if network == "CNN":
                gap = nll[:truths] - true_nll
                posteriors[head] = q[:truths]
                numbers["gap to truth"] = f"{gap.mean():.2f}"
                numbers["where unimodal"] = f"{gap[~several].mean():.2f}"
                numbers["multimodal"] = f"{gap[several].mean():.2f}"
            table.append(numbers)
            history.plot()[0].figure.savefig(args.out / f"history_{network}_{head}.png")
            if head == "spline":
                fp.save(model, args.out / f"model_{network}")
            for epoch, state in history.snapshots.items() if name == "CNN, spline" else ():
                model.load_state_dict(state)
                stages[f"epoch {epoch}"] = model(x_test[:truths]).detach()
    write_figures(args.out, coverages, posteriors, stages, test, true, several)
    print(write_report(args.out, "Replacing an MSE head", {"Test events": table}))


def write_figures(out, coverages, posteriors, stages, test, true, several) -> None:
    """Coverage of all heads, a gallery of events, and the corner of one."""
    plots.plot_coverage(coverages).figure.savefig(out / "coverage.png")
    plots.plot_pulls(coverages["CNN, spline"]).figure.savefig(out / "pulls.png")
    shown = torch.cat([several.nonzero()[:3, 0], (~several).nonzero()[:2, 0]]).tolist()
    some = {k: q for k, q in posteriors.items() if k != "mse"}
    truth, regions, corner = test.z[: len(several)], true.position_map, None
    axes = plots.plot_gallery(shown, some, truth, true_regions=regions, stages=stages, equal=True)
    axes[0, 0].figure.savefig(out / "gallery.png")
    for name, q in some.items():
        corner = plots.plot_corner(q, truth, event=shown[0], axes=corner, label=name)
    corner[0, 0].figure.savefig(out / "corner.png")


if __name__ == "__main__":
    main()
