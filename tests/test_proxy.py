"""Scores without training: contracts, faults, and networks of several spaces end to end."""
import copy, math
import numpy as np
import pytest
import torch
from torch import nn
from nas_nb.lens.layer_factors import sample_gradients
from nas_nb.lens.proxy import PROXIES, aggregate_ranks, ndcg, score_networks, with_batch_statistics
from nas_nb.lens.vkdnw import decile_entropy, kaiming_fan_in_, sampled_jacobian, vkdnw, weight_fisher
from nas_nb.space.cells import nb201_space
from nas_nb.space.darts import darts_space
from nas_nb.space.mini import mini_space
from nas_nb.space.pooled import pooled_space

SPACES = {'mini': mini_space, 'pooled': pooled_space, 'nb201': lambda: nb201_space(in_shape=(3, 12, 12), C=4, cells=1),
          'darts': lambda: darts_space(in_shape=(3, 8, 8), C=4, cells=3)}

def batch(shape, n=8, classes=10):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, *shape, generator=g), torch.arange(n) % classes

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5), nn.ReLU(), nn.Linear(5, 4))

@pytest.mark.parametrize('name', SPACES)
def test_every_space_is_scored_in_one_call(name):
    space = SPACES[name]()
    genotypes = [space.sample(np.random.default_rng(s)) for s in range(2)]
    x, y = batch(space.in_shape, classes=space.n_classes)
    frame = score_networks(space.build, genotypes, x, y)
    assert list(frame) == list(PROXIES) and len(frame) == 2 and not frame.isna().any(axis=None)
    assert np.isfinite(frame[['vkdnw', 'synflow', 'snip', 'grad_norm', 'flops', 'params']]).all(axis=None)
    assert frame.equals(score_networks(space.build, genotypes, x, y)), 'the same seed gives the same scores'
    assert set(frame.attrs['seconds']) == set(PROXIES)

@pytest.mark.parametrize('name', PROXIES)
def test_a_proxy_changes_nothing(name):
    net = plain()
    net[0].weight.requires_grad_(False)
    x, y = batch((3, 8, 8), classes=4)
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad(): score = PROXIES[name](net, x, y, torch.Generator().manual_seed(1))
    assert math.isfinite(score) and score == PROXIES[name](net, x, y, torch.Generator().manual_seed(1))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in net.parameters()) and not net[0].weight.requires_grad and not x.requires_grad

def test_an_error_says_which_network():
    def build(g, seed): return g
    with pytest.raises(ValueError, match='nn.ReLU') as caught: score_networks(build, [plain(), nn.Linear(3, 2)], *batch((3, 8, 8), classes=2), ['nwot'])
    assert 'genotypes[1]' in caught.value.__notes__[0] and 'seed 0' in caught.value.__notes__[0]

def test_no_network_is_an_empty_table():
    assert score_networks(lambda g, seed: None, [], *batch((3, 8, 8))).columns.tolist() == list(PROXIES)

def test_norms_hold_the_statistics_of_the_batch():
    net, (x, _) = plain(), batch((3, 8, 8), 64)
    held = with_batch_statistics(net, x)
    out = held[:2](x)
    assert out.mean((0, 2, 3)).abs().max() < 1e-5 and (out.var((0, 2, 3)) - 1).abs().max() < 1e-4
    assert int(net[1].num_batches_tracked) == 0 and net[1].running_mean.abs().max() == 0

def test_a_shared_layer_counts_once():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    net, x = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(5, 6, dtype=torch.float64)
    J = sampled_jacobian(net, x)[1]
    want = torch.cat([g.flatten(2)[..., :1] for g in sample_gradients(net, x).values()], -1)
    assert J.shape == (5, 3, 4) and torch.allclose(J, want, atol=1e-12)

def test_an_unreached_parameter_knows_nothing():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)
        def forward(self, x): return self.used(x)
    F = weight_fisher(Half(), torch.randn(6, 4))
    assert F.shape == (4, 4) and F[2:].abs().max() == 0 and F[:2, :2].diagonal().min() > 0

def test_confident_networks_keep_a_spectrum():
    torch.manual_seed(0)
    layers = [m for _ in range(5) for m in (nn.Linear(8, 8), nn.Tanh())]
    net = kaiming_fan_in_(nn.Sequential(*layers, nn.Linear(8, 4)), torch.Generator().manual_seed(0))
    with torch.no_grad(): net[-1].weight.mul_(1e3)
    x = torch.randn(16, 8)
    assert float(weight_fisher(net, x).trace()) > 100*float(weight_fisher(net, x, smoothing=0.).trace())
    known = vkdnw(net, x)
    assert 0 < known.entropy < math.log(9) and known.n_layers == 12 and known.eigenvalues.min() >= 0

def test_cut_network_has_no_entropy():
    space = nb201_space(in_shape=(3, 8, 8), C=4, cells=1)
    none = space.build(space.at(0), live=False).eval()
    known = vkdnw(none, batch((3, 8, 8))[0])
    assert known.entropy == decile_entropy(known.eigenvalues) == 0 and known.single == known.n_layers

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_gives_the_same_score():
    net, x = plain().eval(), batch((3, 8, 8))[0]
    here, there = vkdnw(net, x), vkdnw(copy.deepcopy(net).cuda(), x.cuda())
    assert abs(here.entropy - there.entropy) < 1e-3 and there.eigenvalues.device.type == 'cpu'

def test_judges():
    rng = np.random.default_rng(1)
    a = rng.uniform(50, 94, 40)
    assert ndcg(a, a) == ndcg(3*a - 7, a) == 1 and ndcg(-a, a, 5) < ndcg(rng.normal(size=40), a, 5) < 1
    order = rng.permutation(40)
    s = rng.integers(0, 4, 40)
    assert ndcg(s, a, 7) == pytest.approx(ndcg(s[order], a[order], 7), rel=1e-12), 'ties do not depend on the order of rows'
    assert (aggregate_ranks(dict(p=a)).argsort() == a.argsort()).all()
    with pytest.raises(ValueError, match='NaN'): ndcg(np.r_[np.nan, a[1:]], a)
    with pytest.raises(ValueError, match='>= 0'): ndcg(a, -a)
