"""Width search (`search.width`): factors on the channels of any network, what is cut out of it, whole searches, killed and resumed."""
import copy
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from nas_nb.core.check import check_space
from nas_nb.core.data import load_task
from nas_nb.core.run import seeded
from nas_nb.ops.mbconv import multiply_adds
from nas_nb.search.driver import Budget, SearchRecipe, run_search
from nas_nb.search.hypergrad import FirstOrder, Unrolled
from nas_nb.search.rarts import Split
from nas_nb.search.retrain import Recipe, train_from_scratch
from nas_nb.search.width import ChannelSpace, Factors, Strongest, WidthSearch, filter_norms, strongest_channels, uniform_scores

class Odd(nn.Module):
    "Depthwise and dense convolutions, a concatenation, a sum, a linear layer on a flattened map, biases."
    def __init__(self, affine=True):
        super().__init__()
        self.a, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, affine=affine)
        self.deep, self.point = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 3, 1)
        self.side, self.hidden, self.head = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(6*16, 5), nn.Linear(5, 10)
    def forward(self, x):
        x = self.bn(self.a(x)).relu()
        x = torch.cat([F.silu(self.point(self.deep(x))), self.side(x).relu()], 1)
        return self.head(self.hidden(torch.flatten(F.avg_pool2d(x, 2), 1)).relu())

def chain(affine=True):
    def convolution(a, b, stride): return nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b, affine=affine), nn.ReLU()
    return nn.Sequential(*convolution(1, 6, 1), *convolution(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

@pytest.fixture(scope='module')
def task(): return load_task('digits', val=.1, test=.5)

@pytest.fixture(scope='module')
def space(): return ChannelSpace(chain, (1, 8, 8), 10)

def search(space, task, mu=.03, epochs=2, **how):
    usual = dict(relax=Factors(), constraint=WidthSearch(mu), budget=Budget(epochs, 50), select=Strongest(.4),
                 recipe=SearchRecipe(a_lr=.02, a_decay=0.))
    return run_search(space.supernet(0), task, **(usual | how))

@pytest.mark.parametrize('make', (Odd, chain), ids=('odd', 'chain'))
def test_laws(make): check_space(ChannelSpace(make, (1, 8, 8), 10), skip=('space_only_chosen_run', 'space_compile'))

@pytest.mark.parametrize('make', (Odd, chain), ids=('odd', 'chain'))
def test_folded_is_the_supernet_at_its_factors(make):
    space = ChannelSpace(make, (1, 8, 8), 10)
    net, x, rng = space.supernet(0).double(), space.example(5).double(), np.random.default_rng(0)
    for _ in range(5):
        with torch.no_grad():
            net.train()(x)
            net.arch['channels'].copy_(torch.from_numpy(rng.random((space.n, 1))*rng.integers(2, size=(space.n, 1))))
            for layer in space.layers: net.arch['channels'][layer[-1]] = .7
            g, before = space.genotype(net.arch.logits), copy.deepcopy(net.state_dict())
            for mode in (True, False):
                net.train(mode)
                torch.testing.assert_close(net.folded(g)(x), net(x), atol=1e-9, rtol=0)
                net.load_state_dict(before)
        assert multiply_adds(net.folded(g).float(), space.in_shape) == round(float(space.expected(space.one_hot(g))))

def test_one_set_of_factors_for_all_samples(space):
    net = space.supernet()
    with pytest.raises(ValueError, match='one set of factors'): net(space.example(2), {'channels': torch.ones(2, space.n, 1)})

def test_an_emptied_layer_keeps_one_channel(space):
    empty = space.kept(())
    assert space.widths(empty) == [1, 1] and space.build(empty)(space.example(2)).shape == (2, 10)
    first = space.kept([layer[0] for layer in space.layers])
    with torch.no_grad(): assert torch.equal(space.build(empty).eval()(space.example(2)), space.build(first).eval()(space.example(2)))

def test_factors_stay_relative_to_the_strongest_and_prices_count(space, task):
    cheap, dear = (search(space, task, mu, 10, level='one').state.net.arch['channels'].detach()[:, 0] for mu in (0., .03))
    for factors in (cheap, dear):
        assert (factors >= 0).all() and all(float(factors[list(layer)].max()) == 1. for layer in space.layers)
    assert dear[list(space.layers[-1])].mean() < cheap[list(space.layers[-1])].mean() - .05
    by_work, plain = WidthSearch(1., by_work=True), WidthSearch(1.)
    state = type('State', (), dict(net=space.supernet(), device='cpu'))
    for c in (by_work, plain): c.start(state)
    assert float(by_work.prices.mean()) == pytest.approx(1.) and (plain.prices == 1).all()
    a, b = (by_work.prices[list(layer), 0] for layer in sorted(space.layers, key=len))
    assert a.unique().numel() == b.unique().numel() == 1 and float(a[0]/b[0]) == pytest.approx((9*64 + 9*16*8)/(9*16*6 + 10))

HOW = {'split': dict(hyper=Split()), 'jacobi': dict(hyper=Split(order='jacobi')), 'first order': dict(hyper=FirstOrder()),
       'unrolled': dict(hyper=Unrolled()), 'one level': dict(level='one')}

@pytest.mark.parametrize('how', HOW.values(), ids=HOW)
def test_killed_and_resumed_is_the_same(space, task, how, tmp_path):
    whole = search(space, task, epochs=3, **copy.deepcopy(how))
    class Killed(Exception): pass
    def stopping(epoch):
        constraint = WidthSearch(.03)
        def end(s):
            if s.epoch == epoch: raise Killed
        constraint.epoch_start = end
        return constraint
    with pytest.raises(Killed): search(space, task, epochs=3, ckpt=tmp_path/'run', constraint=stopping(2), **copy.deepcopy(how))
    resumed = search(space, task, epochs=3, ckpt=tmp_path/'run', resume=True, **copy.deepcopy(how))
    assert resumed.genotype == whole.genotype
    for a, b in zip(whole.state.net.state_dict().values(), resumed.state.net.state_dict().values(), strict=True): assert torch.equal(a, b)

def test_split_owns_its_copy_of_the_statistics(space, task):
    split = Split(beta=.1)
    s = search(space, task, hyper=split).state
    named = dict(s.net.named_buffers())
    assert any(not torch.equal(v, named[k]) for k, v in split.buffers.items() if 'running_mean' in k)
    assert not any('arch' in k for k in split.tensors())

def test_found_network_trains(space, task):
    g = search(space, task, level='one').genotype
    assert float(space.expected(space.one_hot(g))) <= .4*multiply_adds(chain(), (1, 8, 8))
    history = train_from_scratch(space.build(g), task, Recipe(epochs=6, batch_size=50)).history
    assert history[-1]['loss'] < history[0]['loss'] - .1

def test_scores():
    space = ChannelSpace(Odd, (1, 8, 8), 10)
    with seeded(0): net = Odd()
    before = copy.deepcopy(net.state_dict())
    scores = filter_norms(space, net)
    assert (scores > 0).all() and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for share in (.3, .6, 1.):
        for s in (scores, uniform_scores(space)):
            g = strongest_channels(space, s, share)
            assert float(space.expected(space.one_hot(g))) <= share*multiply_adds(net, space.in_shape) and min(space.widths(g)) >= 1
    with pytest.raises(ValueError, match='scores'): strongest_channels(space, scores*float('nan'), .5)
