"""Marked networks of other people's kinds: torch's own layers, several inputs, ties, trained weights,
and a whole search that is stopped and resumed."""
import copy, io
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from nas_nb.core.check import check_cost, check_space
from nas_nb.core.data import load_task
from nas_nb.cost.expected import LUTCost
from nas_nb.relax.choice import Gumbel
from nas_nb.relax.paths import BinaryGate
from nas_nb.search.driver import Budget, Soft, run_search
from nas_nb.search.select import Within
from nas_nb.space.core import Choice, Genotype
from nas_nb.space.markup import MarkedSpace, choose, markup

class Perceptron(nn.Module):
    "Images to ten classes by three linear layers."
    def __init__(self, width=16):
        super().__init__()
        self.first, self.last = nn.Linear(144, width), nn.Linear(width, 10)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2)))
    def forward(self, x): return self.last(self.blocks(self.first(x.flatten(1)).relu()))

class Gated(nn.Module):
    "An operator of another kind than a linear layer: a product of two."
    def __init__(self, n): super().__init__(); self.a, self.b = nn.Linear(n, n), nn.Linear(n, n)
    def forward(self, x): return self.a(x)*self.b(x).sigmoid()

def perceptron():
    net = choose(Perceptron(), 'blocks.*', {'block': None, 'identity': nn.Identity(), 'gated': lambda old: Gated(old[0].out_features)})
    return choose(net, 'first', {'linear': None, 'deep': nn.Sequential(nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 16))})

X = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))

def marked(): return MarkedSpace(perceptron, X, 'perceptron')

def test_laws_with_mixed_types_and_depth():
    space = marked()
    assert space.size() == 3*3*2 and list(space.groups) == ['first', 'blocks/0', 'blocks/1']
    check_space(space)
    check_cost(LUTCost(space.table(lambda op, x: sum(p.numel() for p in op.parameters())), space, 'params'), space)

def test_depth_by_identity_is_counted():
    space = marked()
    table, kept = space.table(lambda op, x: sum(p.numel() for p in op.parameters())), 16*10 + 10
    cost = LUTCost(table, space, 'params', constant=kept)
    for g in space.enumerate(): assert cost.of(g) == sum(p.numel() for p in space.build(g).parameters())

@pytest.mark.parametrize('relax', (Gumbel(), Gumbel(hard=True), BinaryGate('recompute'), BinaryGate('full'), BinaryGate('two')), ids=str)
def test_search_with_a_cost_and_a_limit(relax):
    task, space = load_task('translated_digits'), marked()
    cost = LUTCost(space.table(lambda op, x: sum(p.numel() for p in op.parameters())), space, 'params', constant=170.)
    limit = cost.quantity(space.from_str('first=deep, blocks/0=block, blocks/1=identity'))
    found = run_search(space.supernet(), task, relax=relax, objective=Soft(cost, lam=1e-5), select=Within(cost, limit),
                       budget=Budget(epochs=2, batch_size=64))
    assert cost.of(found.genotype) <= limit.value and Genotype.from_json(found.genotype.to_json()) == found.genotype
    net = found.state.net.discretize(found.genotype)
    assert type(net) is Perceptron and not any(isinstance(m, Choice) for m in net.modules()) and net(X).shape == (8, 10)

def test_a_search_resumes_bit_for_bit(tmp_path):
    task, whole = load_task('translated_digits'), marked().supernet()
    run_search(whole, task, relax=Gumbel(), budget=Budget(epochs=2, batch_size=64))
    class Killed(Exception): pass
    first, second = marked().supernet(), marked().supernet(seed=1)
    def stop(*_): raise Killed
    saved = first.state_dict
    calls = []
    first.state_dict = lambda *args, **kwargs: (calls.append(1), saved(*args, **kwargs))[1] if not calls else stop()
    with pytest.raises(Killed): run_search(first, task, relax=Gumbel(), budget=Budget(epochs=2, batch_size=64), ckpt=tmp_path)
    run_search(second, task, relax=Gumbel(), budget=Budget(epochs=2, batch_size=64), ckpt=tmp_path, resume=True)
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True): assert torch.equal(a, b)

def test_trained_weights_stay_and_leave():
    "Load, mark, search, hand back with the original candidates: the class as it was written loads what comes out."
    net = Perceptron()
    file = io.BytesIO(); torch.save(net.state_dict(), file); file.seek(0)
    loaded = Perceptron(); loaded.load_state_dict(torch.load(file, weights_only=True))
    supernet = markup(choose(choose(loaded, 'blocks.0', {'block': None, 'identity': nn.Identity()}), 'first', {'linear': None,
                      'deep': nn.Sequential(nn.Linear(144, 4), nn.Linear(4, 16))}), X)
    g = supernet.space.from_str('first=linear, blocks/0=block')
    assert torch.equal(supernet(X, supernet.space.one_hot(g)), net(X))
    out = supernet.discretize(g)
    again = Perceptron(); again.load_state_dict(out.state_dict())
    assert torch.equal(again(X), net(X))
    with torch.no_grad(): out.first.weight.zero_()
    assert torch.equal(supernet(X, supernet.space.one_hot(g)), net(X))          # a copy, not a view

def test_ties_are_kept_also_among_candidates():
    "Two candidates that share a layer share it in the supernet and in its copies; a tied module is one place."
    shared = nn.Linear(6, 6)
    net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(shared, nn.Tanh()), shared)
    choose(net, '0', {'old': None, 'shared': shared})
    supernet = markup(net, torch.randn(4, 6))
    plain = supernet.discretize(supernet.space.from_str('0=shared'))
    assert plain[0] is plain[1][0] is plain[2] and plain[0] is not shared and len(list(plain.parameters())) == 2
    assert len(list(supernet.discretize(supernet.space.from_str('0=old')).parameters())) == 4
    twin = copy.deepcopy(supernet)
    assert twin.net[0].now is twin.now is not supernet.now and torch.equal(twin(torch.ones(2, 6)), supernet(torch.ones(2, 6)))

def test_several_inputs_and_recurrent_outputs():
    class Pair(nn.Module):
        def __init__(self): super().__init__(); self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(5, 2)
        def forward(self, x, y):
            h, state = self.cell(x)
            return self.head(torch.cat([h[:, -1] + state[0], y], 1))
    x = torch.randn(4, 5, 3), torch.randn(4, 1)
    space = MarkedSpace(choose(Pair(), 'cell', {'gru': None, 'rnn': nn.RNN(3, 4, batch_first=True)}), x, 'pair')
    net = space.supernet().eval()
    w = torch.tensor([[.3, .7]])
    with torch.no_grad():
        ops = net.net.cell.ops
        (h, s), (k, t) = ops['gru'](x[0]), ops['rnn'](x[0])
        want = net.net.head(torch.cat([.3*h[:, -1] + .7*k[:, -1] + .3*s[0] + .7*t[0], x[1]], 1))
        torch.testing.assert_close(net(x, {'cell': w}), want)
        for g in space.enumerate(): torch.testing.assert_close(net.discretize(g)(*x), net(x, space.one_hot(g)))
    check_space(space, skip=('space_compile',))

def test_torchs_own_layers_are_marked_or_refused():
    """In evaluation a TransformerEncoderLayer reads the weights of its parts: such a place is refused when it is marked,
    not when the search is over."""
    x = torch.randn(4, 5, 8)
    def layer(): return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(AttributeError, match="'linear1' is an open choice and has no 'weight'"):
        markup(choose(layer(), 'linear1', {'one': None, 'two': nn.Sequential(nn.Linear(8, 16))}), x)
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.attend, self.head = layer(), nn.Linear(8, 3)
        def forward(self, x): return self.head(self.attend(x).mean(1))
    net = markup(choose(Block(), 'attend', {'attention': None, 'gru': nn.Identity(), 'norm': nn.LayerNorm(8)}), x)
    cross_entropy(net(x), torch.arange(4) % 3).backward()
    assert net.arch['attend'].grad.abs().min() > 0

def test_a_choice_knows_where_it_is_wrong():
    with pytest.raises(ValueError, match=r"path='blocks.2': Perceptron has no such submodule; near are .*'blocks.\d'"):
        choose(Perceptron(), 'blocks.2', {'a': None, 'b': nn.Identity()})
    with pytest.raises(ValueError, match=r"candidates at 'first' differ in their output: 'linear' gives \(8, 16\), 'wide' gives \(8, 17\)"):
        markup(choose(Perceptron(), 'first', {'linear': None, 'wide': nn.Linear(144, 17)}), X)
    with pytest.raises(ValueError, match=r"candidate 'narrow' at 'first' cannot take \(8, 144\)"):
        markup(choose(Perceptron(), 'first', {'linear': None, 'narrow': nn.Linear(14, 16)}), X)
    with pytest.raises(ValueError, match='W must hold weights'): marked().supernet()(X, {})
