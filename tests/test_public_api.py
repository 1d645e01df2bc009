"""The public surface, frozen: a change here is a change for users, and belongs in CHANGELOG.md."""

import importlib
import inspect

import pytest
import torch

import flowpost as fp

NAMES = """
Circle Interval Positive Posterior PosteriorHead PosteriorModel Product Real Sphere
coverage fit load save
calibration diagnostics directions encoders generators goodness inferno likelihood losses metrics
simulators skymap systematics
"""

MODULES = {
    "flowpost.spaces": "Block Circle Interval Placement Positive Product Real Scale Space "
    "SpaceConstraint Sphere space_from_config",
    "flowpost.encoders": "CNN DeepSets Encoder LSTM Squash Tabular",
    "flowpost.flows": "BoundFlow RUNGS ResidualFlow",
    "flowpost.posterior": "BlockPosterior DirectionMoments Posterior Summary",
    "flowpost.losses": "extended joint_kl likelihood_loss weighted_mean",
    "flowpost.likelihood": "BoundLikelihood ExtendedModel FlowLikelihood LabelEncoder Latent "
    "Likelihood PointProcess PoissonCounts with_latents",
    "flowpost.goodness": "CalibratedP Calibrator ContextDensity Efficiency Filter PredictiveP "
    "p_value typicality",
    "flowpost.simulators": "Crescents Directions DirectionsPosterior FourModes InfernoToy "
    "LinearGaussian NoisyIdentity Ring Shower Telescope Telescope3D Telescope3DEvents "
    "Telescope3DPosterior TelescopeEvents TelescopePosterior WidthMixture anomalies",
    "flowpost.simulators.anomalies": "dead_string overlay track_like",
    "flowpost.systematics": "ConditionedEncoder EpochEvents Marginal MarginalModel Mixed Nuisances "
    "Perturbed Point Price Simulated SystematicsReport Weighted at marginal report",
    "flowpost.generators": "Critic GeneratorEpoch GeneratorHistory GroupSums Library NoiseNetwork "
    "Sampler Student Teacher TwoStep WeightedDraws distill "
    "effective_size energy_score fit fit_critic fit_energy gradient_penalty weighted_draws",
    "flowpost.calibration": "Align Conformal Recalibrator conformal_levels",
    "flowpost.diagnostics": "Coverage CoverageAccumulator LevelAccumulator LevelCoverage "
    "LocalCoverage LocalRegion SBC Sharpness anderson_darling_pvalue anderson_darling_uniform c2st "
    "coverage hpd_coverage hpd_levels ks_pvalue ks_uniform level_coverage local_coverage sbc "
    "sbc_ranks sharpness tarp tarp_levels",
    "flowpost.plots": "Region draws_region grid_region mass_threshold plot_corner "
    "plot_correlations plot_coverage plot_cross_table plot_downstream plot_gallery "
    "plot_history plot_impacts "
    "plot_local_coverage plot_memorisation plot_nuisances plot_p_values "
    "plot_pulls plot_ranks plot_ratio plot_recombination plot_reliability plot_roc plot_scan "
    "plot_showers plot_skymap plot_statistics plot_summary_history plot_systematics plot_tails "
    "plot_templates plot_zoom",
    "flowpost.metrics": "ClassifierScore ClassifierTest CorrelationTest CrossTable DensityRatio "
    "DownstreamComparison DownstreamRow Independence MemorisationTest Recombination "
    "StatisticScore StatisticsTest TailGain TailReport TailRow auc bootstrap_tails "
    "classifier_test compare_correlations cross_table distance_correlation downstream "
    "energy_distance held_out_statistics independence_test leave_one_out memorisation recombine "
    "sliced_wasserstein symmetric_kl tails wasserstein_1d",
    "flowpost.inferno": "Alternative Batches Binning CountingModel CrossEntropyLoss FitResult "
    "Impacts "
    "InfernoLoss Information InformationAccumulator Normalisation Process PyhfFit "
    "Reweighting Sample Scan SoftBins SummaryEpoch SummaryHistory SummaryModel "
    "Templates Transform fit hard_assign hard_information information optimised "
    "pyhf_fit score signal_order templates toy_model",
    "flowpost.training": "Epoch History fit",
    "flowpost.io": "FORMAT_VERSION load save",
}

SIGNATURES = """
Real(size=1)
Positive(size=1, *, clip=0.0)
Interval(low, high, size=None, *, clip=0.0)
Circle(*, vector=False)
Sphere()
Product(*unnamed, **spaces)
PosteriorHead(context, space, flow='spline', *, layers=None, bins=8, hidden=64, coupling=False, \
dropout=None, warps=0, wait=None, reference=None)
PosteriorHead.fit_scale(self, z, weight=None, reference=None)
PosteriorHead.forward(self, context, *, reference=None, validate_args=True)
PosteriorHead.loss(self, context, z, weight=None, mask=None, *, reference=None, \
signed_weights=False)
PosteriorHead.log_prob(self, context, z, mask=None, *, reference=None)
PosteriorModel(encoder, head)
PosteriorModel.forward(self, x, *, reference=None)
PosteriorModel.loss(self, x, z, weight=None, mask=None, *, reference=None, signed_weights=False)
PosteriorModel.set_scales(self, x, z, weight=None, *, reference=None)
Posterior(flow, validate_args=None)
Posterior.log_prob(self, value)
Posterior.sample(self, sample_shape=(), generator=None)
Posterior.rsample(self, sample_shape=(), generator=None)
Posterior.sample_and_log_prob(self, sample_shape=(), generator=None)
Posterior.to_base(self, value)
Posterior.from_base(self, u)
Posterior.to_base_and_log_prob(self, value)
Posterior.credibility(self, value)
Posterior.cdf(self, value)
Posterior.icdf(self, value)
Posterior.quantile(self, levels, draws=1024, generator=None)
Posterior.interval(self, level=0.6827, draws=1024, generator=None)
Posterior.entropy(self, draws=1024, generator=None)
Posterior.summary(self, draws=1024, generator=None)
Posterior.angular_resolution(self, levels=(0.5, 0.68, 0.9), about=None, draws=4096, generator=None)
Posterior.hpd_area(self, levels=(0.5, 0.9), draws=8192, generator=None)
Posterior.direction_moments(self, draws=4096, generator=None)
Posterior.block(self, name, draws=512)
Posterior.to(self, *args, **kwargs)
Posterior.detach(self)
Posterior.expand(self, batch_shape, _instance=None)
losses.joint_kl(posterior, z, weight=None, *, signed_weights=False)
losses.extended(posterior, likelihood, x, z, weight=None, *, latent=None, context=None, \
signed_weights=False, generator=None)
losses.likelihood_loss(likelihood, x, z, *, latent=None, context=None, generator=None)
likelihood.FlowLikelihood(space, data, flow='spline', *, context=64, hidden=64, layers=2, \
coupling=False, dequantize=0.0)
likelihood.PoissonCounts(space, shape, decoder=None, *, sensors=None, position=None, \
direction=None, hidden=None, layers=None)
likelihood.PointProcess(space, sensors, window, *, position=None, direction=None, components=4, \
hidden=32, layers=2)
likelihood.Likelihood.forward(self, z)
likelihood.Likelihood.log_prob(self, x, z)
likelihood.Likelihood.sample(self, z, generator=None)
likelihood.Likelihood.fit_scale(self, x, z)
likelihood.BoundLikelihood.log_prob(self, x, generator=None)
likelihood.BoundLikelihood.sample(self, generator=None)
likelihood.BoundLikelihood.sample_and_log_prob(self, generator=None)
likelihood.BoundLikelihood.replica(self, generator=None)
likelihood.BoundLikelihood.measured(self, x)
likelihood.BoundLikelihood.residuals(self, x, generator=None)
likelihood.LabelEncoder(space, outputs, hidden=128, layers=3)
likelihood.Latent(space, size, context, flow='affine', *, prior='normal', hidden=32)
likelihood.with_latents(space, size)
likelihood.ExtendedModel(encoder, head, likelihood, latent=None, data=None)
likelihood.ExtendedModel.measured(self, x)
goodness.p_value(model, x, draws=200, *, max_draws=None, reference=None, seed=0, progress=False)
goodness.typicality(model, x, draws=16, *, reference=None, seed=0, progress=False)
goodness.ContextDensity(size)
goodness.ContextDensity.fit(self, context)
goodness.ContextDensity.log_prob(self, context)
goodness.Calibrator(model, statistics=('p',), draws=200, *, max_draws=None, by=None, bins=4)
goodness.Calibrator.forward(self, x, **options)
goodness.Calibrator.fit(self, x, *, reference=None, seed=0, progress=False)
goodness.Calibrator.p_value(self, x, *, reference=None, seed=1, progress=False)
goodness.Filter(calibrator, threshold=0.01)
goodness.Filter.forward(self, x, *, reference=None, seed=1)
goodness.Filter.efficiency(self, x, *, level=0.68, reference=None, seed=1)
directions.from_zenith_azimuth(zenith, azimuth, *, degrees=False)
directions.to_zenith_azimuth(vector, *, degrees=False)
directions.from_ra_dec(ra, dec, *, degrees=False)
directions.to_ra_dec(vector, *, degrees=False)
directions.separation(a, b, *, degrees=False)
encoders.Tabular(features, context, hidden=128, layers=3, dropout=0.2, missing=False)
encoders.CNN(channels, context, width=32, blocks=2, dropout=0.1)
encoders.LSTM(features, context, hidden=64, layers=1, dropout=0.1)
encoders.DeepSets(features, context, hidden=128, dropout=0.1)
simulators.Telescope.nuisances()
simulators.Telescope.sample(self, n, generator=None, seed=None, nuisance=None)
simulators.Telescope.simulate(self, z, angle, generator=None, seed=None, nuisance=None)
simulators.Telescope3D.nuisances()
simulators.Telescope3D.sample(self, n, generator=None, seed=None, dtype=None, nuisance=None)
simulators.Telescope3D.simulate(self, z, generator=None, seed=None, nuisance=None)
simulators.InfernoToy(benchmark=4, *, signal=50.0, background=1000.0)
simulators.InfernoToy.sample(self, process, n, *, r=0.0, rate=3.0, generator=None, seed=None, \
dtype=None)
simulators.InfernoToy.log_prob(self, process, x, *, r=0.0, rate=3.0)
simulators.InfernoToy.shift(x, r)
simulators.InfernoToy.stretch(x, rate)
simulators.InfernoToy.log_likelihood_ratio(self, x)
simulators.InfernoToy.signal_probability(self, x)
simulators.InfernoToy.information(self)
simulators.InfernoToy.expected_counts(self, edges)
simulators.InfernoToy.binned_information(self, edges)
simulators.InfernoToy.limit(self, edges=None)
simulators.anomalies.overlay(events, others)
simulators.anomalies.dead_string(telescope, events, string='random', generator=None, seed=None)
simulators.anomalies.track_like(telescope, z, angle, length=100.0, pieces=10, generator=None, \
seed=None, nuisance=None)
systematics.Nuisances(priors=None, /, **named)
systematics.Nuisances.sample(self, n, generator=None, seed=None)
systematics.Nuisances.log_prob(self, nu)
systematics.Nuisances.at(self, name, sigmas)
systematics.Nuisances.pack(self, values)
systematics.Nuisances.unpack(self, nu)
systematics.Simulated(simulate, prior, size, *, seed=0, condition=False, target='labels')
systematics.Perturbed(data, perturb, prior, *, seed=0, condition=False, target='labels', \
collate=None)
systematics.Mixed(sets, probabilities=None, *, draw=False, normalise=True, condition=False, seed=0)
systematics.Weighted(data, weights, probabilities=None, *, draw=False, normalise=True, \
condition=False, seed=0)
systematics.EpochEvents.set_epoch(self, epoch)
systematics.EpochEvents.fixed(self, epoch=-1)
systematics.EpochEvents.batch(self, indices)
systematics.ConditionedEncoder(encoder, nuisances, context, hidden=64)
systematics.at(x, nu)
systematics.marginal(model, x, nu, *, draws=128, reference=None, generator=None)
systematics.MarginalModel(model, nuisances, draws=128)
systematics.report(model, make_events, prior, at=(-2, -1, 0, 1, 2), *, without=None, events=None, \
levels=(0.682689, 0.9), draws=None, seed=0, chunk=2048, progress=False)
systematics.Marginal(model, context, nu, reference=None)
systematics.Marginal.quantile(self, levels, draws=1024, generator=None)
systematics.Marginal.interval(self, level=0.6827, draws=1024, generator=None)
systematics.Marginal.entropy(self, draws=128, generator=None)
calibration.Recalibrator(model, *, radial=True, coordinates=False, bins=4, smooth=0.0)
calibration.Recalibrator.fit(self, x, z, weight=None, by=None, *, reference=None, seed=0, \
progress=False)
calibration.Recalibrator.forward(self, x, *, by=None, reference=None)
calibration.Conformal(model, kind='base', *, draws=256, bins=4)
calibration.Conformal.fit(self, x, z, by=None, *, reference=None, seed=0, progress=False)
calibration.Conformal.level(self, level=0.9, x=None, *, by=None, reference=None)
calibration.Conformal.contains(self, x, z, level=0.9, *, by=None, reference=None, seed=1, \
progress=False)
calibration.Conformal.radius(self, level=0.9, x=None, *, by=None, reference=None)
calibration.conformal_levels(levels_of_truth, alpha=0.1)
diagnostics.local_coverage(u, context, *, names=None, classifier='hist-gradient-boosting', \
trials=200, stop=20, folds=3, depth=2, smallest=0.05, seed=0, progress=False)
diagnostics.c2st(model, x, z, *, reference=None, summary=None, weight=None, features=None, \
seed=0, **options)
diagnostics.coverage(u, *, log_prob=None, weight=None, levels=20, by=None, bins=None, names=None)
diagnostics.hpd_levels(posterior, z, draws=256, generator=None)
metrics.classifier_test(x, y, *, weight_x=None, weight_y=None, classifiers=('logistic', \
'boosting', 'mlp'), features=None, test=0.5, calibration='auto', permutations=1000, \
retrainings=3, paired=False, seed=0, progress=False)
metrics.held_out_statistics(true, generated, statistics=None, weight_true=None, \
weight_generated=None, *, null='auto', permutations=1000, seed=0, progress=False)
metrics.leave_one_out(train, statistics, true, weight_true=None, *, null='auto', \
permutations=1000, seed=0, progress=False)
metrics.compare_correlations(true, generated, statistics=None, weight_true=None, \
weight_generated=None, *, ranks=False, permutations=1000, bootstraps=200, seed=0, progress=False)
metrics.tails(generated, thresholds=None, *, true=None, weight_true=None, probabilities=None, \
statistic=None, training_size=None, bootstraps=1000, seed=0)
metrics.bootstrap_tails(generators, training, thresholds=None, *, true=None, weight_true=None, \
probabilities=None, statistic=None, resamplings=20, seed=0, progress=False)
metrics.memorisation(generated, training, held_out, *, scale=None, permutations=1000, seed=0, \
progress=False)
metrics.recombine(events, components, count=None, *, thresholds=None, statistic=None, \
permutations=199, bootstraps=200, max_events=1000, seed=0, progress=False)
metrics.independence_test(events, components, *, permutations=199, max_events=1000, seed=0, \
progress=False)
metrics.downstream(estimator, true, generated, weight_true=None, weight_generated=None, *, \
residual=None, names=None, bootstraps=500, seed=0)
metrics.cross_table(true, generated, *, classifier='boosting', test=0.5, permutations=99, \
retrainings=5, seed=0, progress=False)
generators.Teacher(space, data, *, layers=2, bins=8, hidden=128, depth=2, context=64, \
label_hidden=64, label_layers=2)
generators.Student(teacher, *, hidden=None, depth=None)
generators.Student.weighted(self, z, draws=256, *, minimum_ess=0.0, generator=None)
generators.TwoStep(first, second, groups)
generators.TwoStep.student(self, *, first=False, **options)
generators.TwoStep.teacher(space, groups, first=None, second=None)
generators.GroupSums(sizes, threshold=0.0, noise='smooth')
generators.fit(model, x, z, weight=None, *, val=0.1, epochs=20, batch_size=512, lr=0.002, \
weight_decay=0.0001, seed=0, gradient_clip=10.0, checkpoint=None, progress=True)
generators.distill(student, x, z, weight=None, *, terms=None, val=0.1, epochs=20, batch_size=512, \
lr=0.002, weight_decay=0.0, seed=0, gradient_clip=10.0, checkpoint=None, progress=True)
generators.weighted_draws(target, proposal, z, draws=256, *, minimum_ess=0.0, together=False, \
generator=None)
generators.NoiseNetwork(space, data, *, noise=32, hidden=128, layers=3, output=None)
generators.fit_energy(network, x, z, val=0.1, *, views=(), draws=2, epochs=50, batch_size=256, \
lr=0.001, weight_decay=0.0, seed=0, gradient_clip=5.0, progress=True)
generators.fit_critic(network, x, z, val=0.1, *, critic=None, views=(), every=3, penalty=0.1, \
epochs=50, batch_size=256, lr=0.001, critic_lr=0.004, seed=0, gradient_clip=None, progress=True)
generators.Library(x, z, k=1, *, interpolate=False)
generators.Library.sample(self, z, generator=None)
simulators.Shower(half_width=2.0, energy_range=(1.0, 100.0), scale=0.02, threshold=0.002)
simulators.Shower.sample(self, n, generator=None, seed=None)
simulators.Shower.marginal_log_prob(self, x, energy, nodes=64)
save(model, path)
load(path, encoder=None, *, decoder=None, data=None)
fit(model, train, val=0.1, *, epochs=100, batch_size=256, lr=0.001, seed=0, weight_decay=0.1, \
schedule='one-cycle', patience=None, gradient_clip=5.0, signed_weights=False, checkpoint=None, \
snapshots=(), precision='32-true', logger=None, callbacks=(), workers=0, progress=True, \
trainer=None)
"""

PROPERTIES = (
    "mean median mode stddev variance support space dof dtype device batch_shape event_shape"
)


def test_names():
    assert sorted(fp.__all__) == sorted(NAMES.split())
    assert all(hasattr(fp, name) for name in fp.__all__)
    assert fp.coverage is fp.diagnostics.coverage


@pytest.mark.parametrize("module", MODULES)
def test_names_of_the_modules(module):
    assert sorted(importlib.import_module(module).__all__) == sorted(MODULES[module].split())


@pytest.mark.parametrize("line", SIGNATURES.strip().splitlines())
def test_signature(line):
    item = fp
    for part in line.split("(")[0].split("."):
        item = getattr(item, part)
    signature = inspect.signature(item)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    found = signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)
    assert line.split("(")[0] + str(found) == line


@pytest.mark.parametrize("name", PROPERTIES.split())
def test_properties_of_a_posterior(name):
    assert isinstance(inspect.getattr_static(fp.Posterior, name), property)


def test_everything_public_is_documented_and_typed():
    parts = [(fp, n) for n in fp.__all__]
    parts += [(m, n) for m in (fp.likelihood, fp.goodness, fp.calibration) for n in m.__all__]
    for owner, name in parts:
        item = getattr(owner, name)
        assert inspect.getdoc(item), name
        if inspect.ismodule(item):
            continue
        members = [item] if inspect.isfunction(item) else [
            m for k, m in vars(item).items() if inspect.isfunction(m) and not k.startswith("_")
        ]  # fmt: skip
        for member in members:
            assert inspect.getdoc(member), f"{name}.{member.__name__}"
            signature = inspect.signature(member)
            assert signature.return_annotation is not inspect.Signature.empty, member
            untyped = [p for p in signature.parameters.values()
                       if p.annotation is inspect.Parameter.empty and p.name != "self"]  # fmt: skip
            assert not untyped, f"{name}.{member.__name__}"


def test_package_is_typed_and_versioned():
    from pathlib import Path

    assert (Path(fp.__file__).parent / "py.typed").exists()
    assert all(part.isdigit() for part in fp.__version__.split("."))


def test_the_interface_of_the_design():
    """design.md §3, line by line."""
    space = fp.Product(energy=fp.Positive(), position=fp.Real(2))
    head = fp.PosteriorHead(context=8, space=space, flow="spline")
    z = torch.rand(5, 3) + 0.1
    head.fit_scale(z)
    context = torch.randn(5, 8)
    assert head.loss(context, z, weight=torch.ones(5)).shape == ()
    q = head(context)
    assert q.batch_shape == (5,)
    assert q.event_shape == (3,)
    assert q.log_prob(z).shape == (5,)
    assert q.rsample((4,)).shape == (4, 5, 3)
    assert q.from_base(q.to_base(z)).shape == (5, 3)
    assert q.credibility(z).shape == (5,)
    assert q.mean.shape == q.stddev.shape == q.mode.shape == (5, 3)
    assert q.quantile([0.16, 0.5, 0.84]).shape == (3, 5, 3)
    assert [t.shape for t in q.interval(0.68)] == [(5, 3), (5, 3)]
    assert q.entropy().shape == (5,)
    assert q["position"].event_shape == (2,)
