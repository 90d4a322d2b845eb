"""Fast supernets: what must survive beyond equal numbers (those are in the notebook): precision, layouts, copies, compilation,
second derivatives, a search."""
import copy
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
import nas_nb.space.fast as fast_module
from nas_nb.core.check import broken_laws
from nas_nb.core.data import load_task
from nas_nb.ops.conv import NB201_OPS
from nas_nb.ops.winograd import can_compile, normalised_convs, winograd_lanes
from nas_nb.relax.paths import BinaryGate
from nas_nb.search.driver import Budget, run_search
from nas_nb.space.cells import CellSpace, MixedCell, nb201_space
from nas_nb.space.darts import darts_space, robust_space
from nas_nb.space.fast import (CompiledCellSupernet, CompiledMixedCell, FastDartsMixedCell, FastMixedCell, accelerate, compile_cells,
                               compile_network, decelerate)

SPACES = {'darts': lambda: darts_space((3, 8, 8), 10, C=4, cells=3, nodes=2),
          'nb201': lambda: nb201_space((1, 8, 8), 10, C=4, stages=2, cells=1),
          's4': lambda: robust_space('s4', (3, 8, 8), 10, C=4, cells=3, nodes=2)}
spaces = pytest.mark.parametrize('name', SPACES)

def pair(name, dtype=torch.float32):
    space = SPACES[name]()
    plain = space.supernet(0).to(dtype, memory_format=torch.channels_last)
    return space, plain, accelerate(copy.deepcopy(plain)), space.example(8).to(dtype, memory_format=torch.channels_last)

def relative(a, b): return float(((a - b).norm()/b.norm().clamp_min(1e-6)).detach())

def flat(tensors): return torch.cat([t.flatten() for t in tensors])

@spaces
def test_float32_agrees_in_one_layout(name):
    space, plain, fast, x = pair(name)
    y = torch.arange(8)
    out = [net(x) for net in (plain, fast)]
    grads = [flat(torch.autograd.grad(cross_entropy(o, y), [*net.weight_parameters(), *net.arch_parameters()], allow_unused=True,
                                      materialize_grads=True))
             for o, net in zip(out, (plain, fast))]
    assert relative(out[1], out[0]) < 1e-5 and relative(grads[1], grads[0]) < 1e-4

@spaces
def test_laws_of_spaces(name, monkeypatch):
    space = SPACES[name]()
    monkeypatch.setattr(space, 'supernet', lambda seed=0: accelerate(type(space).supernet(space, seed)))
    broken = broken_laws('space', space)
    if name == 's4': broken = {k: v for k, v in broken.items() if 'compile' not in k and 'autocast' not in k}   # fresh noise in each call
    assert not {k: v for k, v in broken.items() if k != 'space_only_chosen_run'}, broken   # grouped operations are computed, not called

def test_only_chosen_operations_are_computed():
    "At one-hot weights an operation that is not chosen gets no gradient, not even zeros."
    space, _, fast, x = pair('darts')
    g = space.from_darts('Genotype(normal=[("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("skip_connect", 0), ("dil_conv_5x5", 2)], '
                         'normal_concat=[2, 3], reduce=[("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), '
                         '("sep_conv_5x5", 1)], reduce_concat=[2, 3])')
    fast(x, space.one_hot(g)).sum().backward()
    for cell in fast.cells:
        chosen = {e: op for *e, op in [c for c in g.cells if c.group == cell.group][0].edges for e in [tuple(e)]}
        for edge, choice in zip(cell.edges, cell.choices):
            for op_name, op in choice.ops.items():
                if op_name != chosen.get(edge): assert all(p.grad is None for p in op.parameters()), (edge, op_name)

@spaces
def test_state_copies_and_back(name):
    space, plain, fast, x = pair(name)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert any(type(m) in (FastMixedCell, FastDartsMixedCell) for m in copy.deepcopy(fast).modules())
    fast.load_state_dict(plain.state_dict())
    back = decelerate(copy.deepcopy(fast)).eval()
    if name != 's4': assert torch.equal(back(x), plain.eval()(x))
    assert not any(type(m) in (FastMixedCell, FastDartsMixedCell) for m in back.modules())

@pytest.mark.parametrize('name', ['darts', 'nb201'])
def test_second_derivatives(name):
    space, plain, fast, x = pair(name, torch.float64)
    def mixed(net):
        grads = torch.autograd.grad(cross_entropy(net(x), torch.arange(8)), net.weight_parameters(), create_graph=True, allow_unused=True)
        return flat(torch.autograd.grad(sum(g.square().sum() for g in grads if g is not None), net.arch_parameters()))
    assert relative(mixed(fast), mixed(plain)) < 1e-8

@pytest.mark.parametrize('name', ['darts', 'nb201'])
def test_frozen_statistics_stay(name):
    space, _, fast, x = pair(name)
    norms = [m for m in fast.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms: m.track_running_stats = False
    before = copy.deepcopy(list(fast.buffers()))
    fast(x)
    assert all(torch.equal(a, b) for a, b in zip(before, fast.buffers()))

@pytest.mark.parametrize('name', ['nb201'])
def test_a_search_goes_the_same_way(name):
    task, space = load_task('digits', seed=0), SPACES[name]()
    nets = [space.supernet(0).to(memory_format=torch.channels_last), accelerate(space.supernet(0))]
    a, b = (run_search(net, task, budget=Budget(epochs=1), seed=0, progress=False) for net in nets)
    assert b.history[0]['train_loss'] == pytest.approx(a.history[0]['train_loss'], rel=1e-3)
    assert (a.history[0]['weights']['cell'] - b.history[0]['weights']['cell']).abs().max() < 1e-4

@pytest.mark.parametrize('mode', ['full', 'recompute', 'two'])
def test_binary_gates_go_their_own_way(mode):
    space, plain, fast, x = pair('nb201', torch.float64)
    def gradient(net):
        W = net.arch.weights(BinaryGate(mode), generator=torch.Generator().manual_seed(0))
        return flat(torch.autograd.grad(cross_entropy(net(x, W), torch.arange(8)), net.arch_parameters()))
    assert relative(gradient(fast), gradient(plain)) < 1e-12

@pytest.mark.skipif(not can_compile(), reason='no C++ compiler')
def test_a_compiled_cell_agrees():
    "One edge of all operations, in float64: output, gradients of both kinds of step, statistics; zeros take the plain cell."
    source = next(m for m in SPACES['nb201']().supernet(0).modules() if isinstance(m, MixedCell))
    class OneCell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = MixedCell([(0, 1)], 2, lambda row: copy.deepcopy(source.choices[0]))
    plain = OneCell().double().to(memory_format=torch.channels_last).train()
    compiled = compile_cells(copy.deepcopy(plain)).train()
    assert type(compiled.cell) is CompiledMixedCell
    x, active = torch.randn(4, 4, 6, 6, dtype=torch.float64), [tuple(range(5))]
    w = torch.rand(1, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for net in (plain, compiled):
        out = net.cell(x, w, active)
        results.append([out, *torch.autograd.grad(out.square().mean(), [w, *net.parameters()]), *(b.double() for b in net.buffers())])
    assert max(relative(a, b) for a, b in zip(*results)) < 1e-9
    hard = torch.eye(5, dtype=torch.float64)[3:4]
    assert torch.equal(compiled.cell(x, hard, [(3,)]), plain.cell(x, hard, [(3,)])) and type(decelerate(compiled).cell) is MixedCell

@pytest.mark.skipif(not can_compile(), reason='no C++ compiler')
@pytest.mark.parametrize('C, nodes, stages, ops', [(4, 2, 2, tuple(NB201_OPS)), (16, 3, 1, ('none', 'skip_connect', 'nor_conv_3x3'))])
def test_a_network_compiled_whole_agrees(C, nodes, stages, ops, monkeypatch):
    "Float64: losses and gradients of a step of the architecture and of the weights, statistics; hard weights; and by which kernels."
    space = CellSpace('small', {k: NB201_OPS[k] for k in ops}, nodes=nodes, in_shape=(3, 8, 8), C=C, stages=stages)
    calls = []
    monkeypatch.setattr(fast_module, 'normalised_convs', lambda x, *args: calls.append(x.shape[1]) or normalised_convs(x, *args))
    nets = [space.supernet(0).double().train(), compile_network(space.supernet(0).double()).train()]
    assert type(nets[1]) is CompiledCellSupernet
    x, results = space.example(4).double(), []
    for net in nets:
        arch, weights, found = net.arch_parameters(), net.weight_parameters(), []
        for wanted, others in ((arch, weights), (weights, arch)):                # two programs, for other gradients are needed
            for p in wanted: p.requires_grad_(True)
            for p in others: p.requires_grad_(False)
            loss = cross_entropy(net(x), torch.arange(4))
            found += [loss, *torch.autograd.grad(loss, wanted)]
        results.append([*found, *(b.double() for b in net.buffers())])
    assert max(relative(a, b) for a, b in zip(*results)) < 1e-9
    hard = space.one_hot(space.sample(np.random.default_rng(0)))
    assert relative(*(net(x, {k: w.double() for k, w in hard.items()}) for net in nets)) < 1e-12
    assert type(decelerate(nets[1])) is type(nets[0])
    lanes = winograd_lanes(torch.float64)
    assert set(calls) == {C*2**stage for stage in range(stages) if lanes and C*2**stage % lanes == 0}
