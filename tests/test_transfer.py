"""Latency transfer: what a prior over devices promises, on small made-up devices."""
import numpy as np, pytest, torch
from nas_nb.cost.encoding import encode
from nas_nb.cost.predictor import spearman
from nas_nb.cost.transfer import DevicePrior, TransferCost, factor_analysis
from nas_nb.ops.conv import NB201_OPS
from nas_nb.space.cells import CellSpace

def devices(n=200, families=4, each=3, seed=0):
    "`(known [n, D], groups, new [n])`: devices in families, and one more of the first."
    r = np.random.default_rng(seed)
    hidden, centers = r.normal(size=(n, 3)), r.normal(size=(families, 3))
    def one(f): return np.exp(1 + .3*(hidden @ (centers[f] + .05*r.normal(size=3)) + .1*r.normal(size=n)))
    groups = np.repeat(np.arange(families), each)
    return np.stack([one(f) for f in groups], 1), groups, one(0)

def test_same_seed_same_prior_and_order_of_measurements_does_not_matter():
    known, groups, new = devices()
    a, b = (DevicePrior.fit(known, groups=groups, seed=3) for _ in range(2))
    assert a.spread == b.spread and a.left_out.equals(b.left_out)
    m = a.choose(8)
    np.testing.assert_array_equal(m, b.choose(8))
    np.testing.assert_array_equal(a.choose(5), m[:5])
    p, q = a.adapt(m, new[m]), a.adapt(m[::-1], new[m[::-1]])
    np.testing.assert_allclose(p.median, q.median, rtol=1e-9)
    np.testing.assert_allclose(p.deviation, q.deviation, rtol=1e-6, atol=1e-9)

def test_units_do_not_matter():
    "A device in microseconds, or 1000 times slower, is the same device."
    known, _, new = devices()
    prior = DevicePrior.fit(known, rank=3)
    m = prior.choose(8)
    scaled = DevicePrior.fit(known*10.**np.arange(-3, 9), rank=3)
    np.testing.assert_allclose(scaled.adapt(m, 1e3*new[m]).median, 1e3*prior.adapt(m, new[m]).median, rtol=1e-6)
    np.testing.assert_allclose(scaled.adapt(m, 1e3*new[m]).std, 1e3*prior.adapt(m, new[m]).std, rtol=1e-4, atol=1e-6)

def test_a_known_device_is_recognised():
    known, groups, _ = devices()
    prior = DevicePrior.fit(known, groups=groups)
    m = prior.choose(10)
    for d in (0, 5, 11):
        p = prior.adapt(m, known[m, d])
        assert p.resemblance[groups == groups[d]].sum() > .8
        assert spearman(p.median, known[:, d]) > .97

def test_near_zero_latencies_do_not_spoil_the_prior():
    known, groups, new = devices()
    known[:10, 0] = 1e-9
    prior = DevicePrior.fit(known, groups=groups)
    m = np.arange(20, 40)
    p = prior.adapt(m, new[m])
    assert np.isfinite(p.mean).all() and np.isfinite(p.std).all()
    assert spearman(p.median[40:], new[40:]) > .9

def test_near_zero_latencies_keep_their_order_and_size():
    "Forty dead architectures take 1e-4 of the usual time, some of them twice as long as others: ten measurements of such a device."
    known, groups, new = devices()
    size = np.geomspace(1e-4, 2e-4, 40)
    for y in (known[:, 0], known[:, 1], new): y[:40] *= size
    prior = DevicePrior.fit(known, groups=groups)
    m = np.r_[np.arange(0, 40, 8), np.arange(40, 60)]
    p = prior.adapt(m, new[m])
    np.testing.assert_allclose(p.median[m], new[m], rtol=1e-9)
    dead = np.setdiff1d(np.arange(40), m)
    assert p.median[dead].max() < .01*np.median(new)
    low, high = p.interval(.9)
    assert (low <= p.median).all() and (p.median <= high).all() and np.isfinite(p.std).all()

def test_cost_of_a_network_is_its_prediction_on_both_sides_of_the_floor():
    space = CellSpace('tiny', {o: NB201_OPS[o] for o in ('none', 'skip_connect', 'nor_conv_3x3')}, nodes=3, in_shape=(1, 8, 8), stages=1)
    networks = list(space.enumerate())
    x = torch.stack([encode(space, g) for g in networks]).double().numpy()
    r = np.random.default_rng(0)
    times = np.exp(x @ r.uniform(0, 4, (9, 1)) + .3*x @ r.normal(size=(9, 6)))
    fitted = DevicePrior.fit(times[:, :5], x).adapt(np.arange(0, 27, 2), times[::2, 5])
    cost, median = TransferCost(fitted, space), fitted.at(x)['median'].values
    assert (np.log(median) < fitted.floor).any() and (np.log(median) > fitted.floor).any()
    for g, value in zip(networks, median):
        np.testing.assert_allclose(cost.of(g), value, rtol=1e-4)
        np.testing.assert_allclose(float(cost(space.one_hot(g))), cost.of(g), rtol=1e-6)

def test_features_learn_a_stranger_and_leave_a_relative_alone():
    known, groups, new = devices()
    r = np.random.default_rng(1)
    x = r.normal(size=(200, 5))
    stranger = np.exp(x @ r.normal(size=5)*.3 + .02*r.normal(size=200))
    plain, rich = (DevicePrior.fit(known, f, groups=groups) for f in (None, x))
    m, rest = np.arange(30), np.arange(30, 200)
    def reached(prior, y): return spearman(prior.adapt(m, y[m]).median[rest], y[rest])
    assert reached(rich, stranger) > .95 > .5 > reached(plain, stranger)
    assert abs(reached(rich, new) - reached(plain, new)) < .01

@pytest.mark.parametrize('power', (0., 1.))
def test_the_scale_on_which_devices_are_sums_is_found(power):
    "Devices that add up the costs of what runs, or multiply by them; the new one has costs of its own."
    r = np.random.default_rng(4)
    x, costs = r.integers(0, 2, (400, 8)).astype(float), r.uniform(.1, 1.2, (8, 7))
    y = np.exp(x @ costs) if power == 0 else .3 + x @ costs
    y = y*np.exp(.01*r.normal(size=y.shape))
    prior, m, rest = DevicePrior.fit(y[:, :6], x), np.arange(30), np.arange(30, 400)
    p = prior.adapt(m, y[m, 6])
    assert p.power == power and spearman(p.median[rest], y[rest, 6]) > .98

def test_two_devices_are_enough_and_one_is_not():
    known, _, new = devices()
    prior = DevicePrior.fit(known[:, :2])
    assert prior.rank == 2 and prior.left_out is None
    m = np.arange(10)
    assert np.isfinite(prior.adapt(m, new[m]).mean).all()
    with pytest.raises(ValueError, match='2 devices'): DevicePrior.fit(known[:, :1])

def test_more_measurements_narrow_the_intervals():
    known, groups, new = devices()
    prior = DevicePrior.fit(known, groups=groups)
    order = np.random.default_rng(0).permutation(len(new))
    def width(p): return np.median(np.log(p.interval(.9)[1]/p.interval(.9)[0])[order[100:]])
    width = [width(prior.adapt(order[:k], new[order[:k]])) for k in (3, 10, 50)]
    assert width[0] > width[1] > width[2]

def test_features_reach_architectures_outside_the_table():
    r = np.random.default_rng(0)
    x = r.normal(size=(300, 4))
    slopes = r.normal(size=(4, 3))[:, np.repeat(np.arange(3), 3)] + .1*r.normal(size=(4, 9))
    latencies = np.exp(1 + .2*x @ slopes + .01*r.normal(size=(300, 9)))
    prior = DevicePrior.fit(latencies[:200, :8], x[:200])
    m = prior.choose(10)
    out = prior.adapt(m, latencies[m, 8]).at(x[200:])
    assert spearman(out['median'], latencies[200:, 8]) > .97
    assert (out['std'] > 0).all() and (out['mean'] >= out['median']).all()

def test_factor_analysis_refuses():
    for S, rank, text in ((np.eye(3), 0, 'rank'), (np.eye(3), 4, 'rank=4'), (np.ones((2, 3)), 1, 'S has shape')):
        with pytest.raises(ValueError, match=text): factor_analysis(S, rank)
