"""The spaces of DARTS, GOLD and recurrent cells where they meet the rest: searches through the driver, per-sample weights,
published networks."""
import numpy as np
import pytest
import torch
from nas_nb.core.data import load_task
from nas_nb.ops.conv import FactorizedReduce, Skip
from nas_nb.ops.separable import Noise
from nas_nb.relax.choice import Gumbel, Softmax
from nas_nb.relax.sparse import NodeSigmoid
from nas_nb.search.driver import run_search
from nas_nb.search.plugin import Budget
from nas_nb.search.select import Magnitude, MagnitudeTop2
from nas_nb.space.core import Choice, Genotype
from nas_nb.space.darts import darts_space, robust_space
from nas_nb.space.gold import gold_space, operation_costs
from nas_nb.space.recurrent import darts_rnn_space

SMALL = dict(in_shape=(1, 8, 8), n_classes=10, C=2, cells=3)
SPACES = {'darts': lambda: darts_space(**SMALL, nodes=2), 'own cells': lambda: darts_space(**SMALL, nodes=2, shared=False),
          's1': lambda: robust_space('s1', **SMALL), 's4': lambda: robust_space('s4', **SMALL, nodes=2),
          'gold': lambda: gold_space(**SMALL, nodes=2), 'rnn': lambda: darts_rnn_space(nodes=3, hidden=8, in_shape=(1, 8, 8), n_classes=10)}

class Switched:
    "The genotype of the largest weights, as `space.genotype` reads them."
    def __call__(self, s):
        with torch.no_grad(): return s.net.space.genotype(s.net.arch.weights(s.relax, training=False))

@pytest.mark.parametrize('name', SPACES)
def test_the_driver_searches_it(name):
    space = SPACES[name]()
    select = {'gold': Switched(), 'rnn': MagnitudeTop2(1)}.get(name, MagnitudeTop2())
    relax = NodeSigmoid() if name == 'gold' else Softmax()
    net = space.supernet(0)
    before = [a.detach().clone() for a in net.arch_parameters()]
    with torch.random.fork_rng():
        result = run_search(net, load_task('digits'), relax=relax, select=select, budget=Budget(epochs=1, batch_size=128))
    moved = [not torch.equal(a, b) for a, b in zip(net.arch_parameters(), before)]
    assert all(moved) and all(a.isfinite().all() for a in net.parameters())
    space.chosen(result.genotype)
    assert Genotype.from_json(result.genotype.to_json()) == result.genotype
    with torch.no_grad():
        net.eval()
        x = space.example(4)
        torch.testing.assert_close(net.discretize(result.genotype)(x), net(x, space.one_hot(result.genotype)), atol=1e-4, rtol=1e-4)
    if name not in ('gold', 'rnn'):
        inputs = [sum(t == node and op != 'none' for _, t, op in c.edges) for c in result.genotype.cells
                  for node in range(2, space.nodes + 2)]
        assert inputs.count(2) == space.nodes*len(space.groups)

def test_forbidden_operations_stay_out():
    space = SPACES['s1']()
    net = space.supernet(0)
    for relax in (Softmax(), Gumbel(), Gumbel(hard=True)):
        for w, rows in zip(net.arch.weights(relax, .5, generator=torch.Generator().manual_seed(0)).values(), space.table.values()):
            allowed = torch.tensor([[n in row for n in space.op_names] for row in rows])
            assert (w[~allowed] == 0).all() and torch.allclose(w.sum(-1), torch.ones(14))
    g = Magnitude()(type('State', (), dict(net=net, relax=Softmax())))
    assert space.chosen(g) and len(g.cells[0].edges) == 14
    assert not any(isinstance(m, Choice) and len([op for op in m.ops.values() if sum(p.numel() for p in op.parameters())]) > 2
                   for m in net.modules())

@pytest.mark.parametrize('name', ('darts', 's1', 'gold', 'rnn'))
def test_weights_of_each_sample_are_those_of_the_sample(name):
    space = SPACES[name]()
    net, x, rng = space.supernet(0).double().eval(), space.example(3).double(), np.random.default_rng(0)
    W = [space.one_hot(space.sample(rng), torch.float64) for _ in range(3)]
    with torch.no_grad():
        together = net(x, {k: torch.stack([w[k] for w in W]) for k in W[0]})
        alone = torch.cat([net(x[i:i + 1], {k: w[k].expand(1, *w[k].shape) for k in w}) for i, w in enumerate(W)])
    torch.testing.assert_close(together, alone, atol=1e-8, rtol=1e-6)      # an operation that only another sample wants adds exactly 0

def test_published_networks():
    "DARTS's first-order cells: 3,169,414 parameters in its evaluation network, the auxiliary head not counted."
    space = darts_space()
    v1 = ("Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), ('skip_connect', 0), "
          "('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5], "
          "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0), "
          "('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])")
    g = space.from_darts(v1)
    net = space.build(g, C=36, cells=20)
    assert sum(p.numel() for p in net.parameters()) == 3_169_414
    assert [cell.reduction for cell in net.cells] == [i in (6, 13) for i in range(20)]
    assert all(isinstance(cell.preprocess0, FactorizedReduce) == (i in (7, 14)) for i, cell in enumerate(net.cells))
    assert sum(isinstance(m, Skip) for m in net.modules()) == 18*3 + 2*3

def test_live_network_is_the_full_one_without_the_dead():
    """Where nothing dead feeds a live node, both compute the same: every parameter of the live network is
    one of the full network's that has a gradient."""
    space = darts_space((1, 8, 8), 10, C=2, cells=5, nodes=2, shared=False)
    rng, lean = np.random.default_rng(0), 0
    for _ in range(30):
        kept = {g: [(s, t, ('skip_connect', 'sep_conv_3x3')[rng.integers(2)]) for s, t in edges if rng.random() < .45]
                for g, edges in space.groups.items()}
        g = space.with_edges(kept)
        live = space.live_edges(g)
        if not live[-1]:
            with pytest.raises(ValueError, match='no path'): space.build(g)
            continue
        net = space.build(g)
        out = net(space.example(4))
        out.square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())           # nothing in it is without use
        assert sum(len(c.ops) for c in net.cells if hasattr(c, 'ops')) == sum(map(len, live))
        lean += not all(live)
    assert lean >= 5

def test_costs_of_shared_cells_are_summed():
    shared, own = darts_space(**SMALL, nodes=2), darts_space(**SMALL, nodes=2, shared=False)
    a, b = operation_costs(shared), operation_costs(own)
    assert torch.equal(a['normal'], b['cell0']) and torch.equal(a['reduce'], b['cell1'] + b['cell2'])

def test_noise_resumes_and_does_not_repeat():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        op, x = Noise(2, 2), torch.zeros(2, 2, 4, 4)
        seen = [op(x) for _ in range(50)]
        assert len({float(y[0, 0, 0, 0]) for y in seen}) == 50
        state = op.state_dict()
        following = [op(x) for _ in range(3)]
        other = Noise(2, 2)
        other.load_state_dict(state)
        assert all(torch.equal(other(x), y) for y in following)
