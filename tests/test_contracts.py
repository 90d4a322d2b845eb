"""The public contracts of `nas_nb.core.check`, run on everything that exists: one registry and one test for each kind of part.

A new part joins by one line in its registry: a name, and a function that makes the part, so that collecting the tests imports
and builds nothing."""
import importlib
import numpy as np
import pytest
import torch
from nas_nb.core.check import LAWS, broken_laws, check_cost, check_op, check_relax, check_space

def part(path):
    "The object at 'module:name' in nas_nb."
    module, name = path.split(':')
    return getattr(importlib.import_module(f'nas_nb.{module}'), name)

# --- the registries -----------------------------------------------------------------------------------------------------------------

def with_entmax(name):
    pytest.importorskip('entmax', reason="needs the extra: pip install 'nas_nb[sparse]'")
    return part(f'relax.sparse:{name}')()

RELAXATIONS = {
    'Softmax': lambda: part('relax.choice:Softmax')(),
    'Gumbel': lambda: part('relax.choice:Gumbel')(),
    'Gumbel-hard': lambda: part('relax.choice:Gumbel')(hard=True),
    'SparseNoisySoftmax': lambda: part('relax.sparse:SparseNoisySoftmax')(),
    'SparseNoisySoftmax-gumbel': lambda: part('relax.sparse:SparseNoisySoftmax')(.5, noise='gumbel'),
    'SparseNoisySoftmax-hard': lambda: part('relax.sparse:SparseNoisySoftmax')(hard=True),
    'MaxW': lambda: part('relax.sparse:MaxW')(),
    'NodeSigmoid': lambda: part('relax.sparse:NodeSigmoid')(),
    **{f'BinaryGate-{mode}': lambda mode=mode: part('relax.paths:BinaryGate')(mode) for mode in ('full', 'recompute', 'two')},
    'Entmax': lambda: with_entmax('Entmax'),
    'Sparsemax': lambda: with_entmax('Sparsemax'),
}

ANY, REDUCING = ((4, 4, 1), (4, 6, 1), (4, 4, 2), (4, 6, 2)), ((4, 4, 2), (4, 7, 2))   # C_in, C_out, stride
OPERATIONS = {
    **{f'NB201-{name}': (lambda name=name: part('ops.conv:NB201_OPS')[name], ANY)
       for name in ('none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3')},
    **{name: (lambda name=name: part(f'ops.conv:{name}'), ANY) for name in ('Zero', 'Skip', 'AvgPool', 'PoolBN', 'ResidualReduction')},
    'ReLUConvBN-5x5': (lambda: lambda C_in, C_out, stride=1, affine=True: part('ops.conv:ReLUConvBN')(C_in, C_out, 5, stride, affine), ANY),
    'FactorizedReduce': (lambda: part('ops.conv:FactorizedReduce'), REDUCING),
    **{f'FBNet-{name}': (lambda name=name: part('ops.mbconv:FBNET_OPS')[name], ANY)
       for name in (f'k{k}_{block}' for k in (3, 5) for block in ('e1', 'e1_g2', 'e3', 'e6'))},
    'MBConv-k7-se': (lambda: part('ops.mbconv:mbconv')(7, 3, se=.25), ANY),
    **{f'DARTS-{name}': (lambda name=name: part('ops.separable:DARTS_OPS')[name], ANY)
       for name in ('none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3', 'sep_conv_5x5',
                    'dil_conv_3x3', 'dil_conv_5x5')},
    **{name: (lambda name=name: part(f'ops.separable:{name}'), ANY) for name in ('MaxPool', 'MaxPoolBN', 'Noise')},
    **{f'{name}-7x7': (lambda name=name: lambda C_in, C_out, stride=1, affine=True:
                       part(f'ops.separable:{name}')(C_in, C_out, 7, stride, affine), ANY)
       for name in ('SepConv', 'DilConv')},
}

def two_operations():
    "A user's own space: other operations, more nodes, missing edges."
    ops = {name: part('ops.conv:NB201_OPS')[name] for name in ('skip_connect', 'nor_conv_3x3')}
    return part('space.cells:CellSpace')('own', ops, nodes=4, edges=((0, 1), (1, 2), (0, 3), (2, 3)), in_shape=(1, 8, 8), n_classes=3,
                                         C=4, stages=1)

def narrow_chain(make, *args, **kwargs):
    "A chain for pictures of 8 x 8 pixels, with few channels."
    return part(f'space.chains:{make}')(*args, **dict(stem=(4, 1), head=8, in_shape=(1, 8, 8), n_classes=4) | kwargs)

def marked_network():
    "A user's own network with two open choices of different candidates."
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
                              torch.nn.Linear(144, 3))
    choose = part('space.markup:choose')
    choose(net, '0', {'k3': None, 'k1': lambda old: torch.nn.Sequential(torch.nn.MaxPool2d(3, 1), torch.nn.Conv2d(1, 4, 1)),
                      'k3twice': torch.nn.Conv2d(1, 4, 3)})
    return choose(net, '2', {'relu': None, 'identity': torch.nn.Identity()})

SPACES = {
    'nb201': lambda: part('space.cells:nb201_space')(in_shape=(1, 8, 8), n_classes=10, C=4, stages=2, cells=1),
    'own': two_operations,
    'mini': lambda: part('space.mini:mini_space')(),
    'fbnet': lambda: narrow_chain('fbnet_space', 'small', widths=(4, 6), repeats=(1, 2), strides=(1, 2)),
    'fbnet-everywhere': lambda: narrow_chain('fbnet_space', 'small', 'everywhere', widths=(4, 6), repeats=(1, 1), strides=(1, 2),
                                             in_shape=(3, 9, 7)),
    'proxyless': lambda: narrow_chain('proxyless_chain', (4, 6), (2, 1), (1, 2), (3, 5), (1, 2), first=4),
    'elastic': lambda: narrow_chain('elastic_chain', ((4, 1), (6, 2)), (1, 2), (1, 2), (3,), first=4),
    'width': lambda: part('space.width:WidthSpace')([(2, 4), (3, 5, 8)], (1, 2), (1, 8, 8), 3),
    'marked': lambda: part('space.markup:MarkedSpace')(marked_network,
                                                       torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 'marked'),
    'darts': lambda: part('space.darts:darts_space')((1, 8, 8), 10, C=4, cells=3, nodes=2),
    'darts-own-cells': lambda: part('space.darts:darts_space')((3, 9, 7), 3, C=2, cells=4, nodes=1, shared=False),
    'gold': lambda: part('space.gold:gold_space')((1, 8, 8), 10, C=4, cells=3, nodes=2),
    'rnn-tokens': lambda: part('space.recurrent:darts_rnn_space')(nodes=2, hidden=6, tokens=5, length=3),
    'rnn-images': lambda: part('space.recurrent:darts_rnn_space')(nodes=3, hidden=6, in_shape=(1, 4, 5), n_classes=3),
    **{f'darts-{which}': (lambda which=which, nodes=nodes: part('space.darts:robust_space')(which, (1, 8, 8), C=2, cells=3, nodes=nodes))
       for which, nodes in (('s1', 4), ('s2', 1), ('s4', 1))},
}

def lookup_table(space, seed=0):
    "A made-up price in ms for each operation on each row."
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.rand(len(rows), len(space.candidates[group]), generator=generator) for group, rows in space.groups.items()}

def joint_table(space):
    "A made-up price in ms of each whole cell, in which operations interact."
    (rows,) = space.groups.values()
    return torch.rand([len(space.op_names)]*len(rows), generator=torch.Generator().manual_seed(0)) + .5

def predictor_cost(space, mode):
    "A predictor of made-up latencies: linear in the operations, and dead edges are free."
    generator = np.random.default_rng(0)
    genotypes = list(dict.fromkeys(space.sample(generator) for _ in range(120)))[:60]
    table = lookup_table(space)
    latencies = [.5 + sum(float((w*table[k]).sum()) for k, w in space.one_hot(g.canonical()).items()) for g in genotypes]
    fit = part('cost.predictor:fit_predictor')(space, genotypes, latencies, hidden=(16,), seed=0)
    extra = {'generator': torch.Generator().manual_seed(0)} if mode == 'sample' else {}
    return part('cost.predictor:PredictorCost')(fit, space, mode=mode, **extra)

def transfer_cost(space):
    "Four made-up devices, one of them known by ten measurements only."
    generator, networks = np.random.default_rng(0), list(space.enumerate())
    x = torch.cat([part('cost.predictor:encode')(space, {k: w.double() for k, w in space.one_hot(g).items()})[None]
                   for g in networks]).numpy()
    known = np.exp(.1*x @ generator.random((x.shape[1], 4)) + .01*generator.standard_normal((len(x), 4)))
    prior = part('cost.transfer:DevicePrior').fit(known[:, :3], x, rank=2)
    rows = prior.choose(10)
    return part('cost.transfer:TransferCost')(prior.adapt(rows, known[rows, 3]), space)

COSTS = {
    'LUTCost': lambda space: part('cost.expected:LUTCost')(lookup_table(space), space, 'ms', constant=.3),
    'DepthCost': lambda space: part('cost.expected:DepthCost')(lookup_table(space), space, 'ms', constant=.3),
    'Multilinear': lambda space: part('cost.expected:Multilinear')(joint_table(space), space, 'ms'),
    'Affine': lambda space: part('cost.core:Affine')(part('cost.expected:LUTCost')(lookup_table(space), space, 'ms'), 2., .1),
    'Sum': lambda space: (part('cost.expected:LUTCost')(lookup_table(space), space, 'ms')
                          + part('cost.expected:LUTCost')(lookup_table(space, seed=1), space, 'ms')),
    'MaxCost': lambda space: part('cost.core:MaxCost')(*(part('cost.expected:LUTCost')(lookup_table(space, seed=s), space, 'ms')
                                                         for s in (0, 1))),
    'TransferCost': transfer_cost,
    **{f'PredictorCost-{mode}': lambda space, mode=mode: predictor_cost(space, mode) for mode in ('exact', 'sample', 'mean')},
}

# --- one test for each kind ---------------------------------------------------------------------------------------------------------

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'))]

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', RELAXATIONS)
def test_relax(name, device): check_relax(RELAXATIONS[name](), device=device)

@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', OPERATIONS)
def test_op(name, device):
    make, cases = OPERATIONS[name]
    check_op(make(), cases=cases, device=device)

# one convolution serves all widths, so at one-hot weights there is no operation that could be left out
# noise in training cannot agree with itself under autocast, nor be compiled as one graph;
# the compiler, the slowest law, reads each class of spaces once
NOT_FOR = {'width': ('space_only_chosen_run',), 'darts-s4': ('space_autocast', 'space_compile')}
NOT_FOR |= dict.fromkeys(('own', 'fbnet-everywhere', 'darts-own-cells', 'darts-s1', 'darts-s2'), ('space_compile',))

@pytest.mark.parametrize('name', SPACES)
def test_space(name): check_space(SPACES[name](), skip=NOT_FOR.get(name, ()))

@pytest.mark.parametrize('name', COSTS)
def test_cost(name):
    space = SPACES['elastic' if name == 'DepthCost' else 'mini']()
    check_cost(COSTS[name](space), space)

# --- the registries are complete, and the contracts can fail ------------------------------------------------------------------------

def test_every_relaxation_is_registered():
    base = part('relax.choice:Relax')
    for module in ('sparse', 'paths'): importlib.import_module(f'nas_nb.relax.{module}')
    # channel factors, in search.width, are no choices
    exist = {c.__name__ for c in base.__subclasses__() if c.__module__.startswith('nas_nb.relax.')}
    missing = exist - {type(make()).__name__ for make in RELAXATIONS.values()}
    assert not missing, f'add to RELAXATIONS: {sorted(missing)}'

def test_every_operation_is_registered():
    conv, separable = (importlib.import_module(f'nas_nb.ops.{name}') for name in ('conv', 'separable'))
    modules = {n for m in (conv, separable) for n in m.__all__ if isinstance(getattr(m, n), type)
               and issubclass(getattr(m, n), torch.nn.Module)}
    missing = {n for n in modules if not any(k.split('-')[0] == n for k in OPERATIONS)}
    missing |= {n for n in conv.NB201_OPS if f'NB201-{n}' not in OPERATIONS}
    missing |= {n for n in separable.DARTS_OPS if f'DARTS-{n}' not in OPERATIONS}
    assert not missing, f'add to OPERATIONS: {sorted(missing)}'

def test_every_cost_is_registered():
    base, names = part('cost.core:Cost'), ' '.join(COSTS)
    for module in ('cost.expected', 'cost.predictor', 'cost.transfer'): importlib.import_module(f'nas_nb.{module}')
    missing = {c.__name__ for c in base.__subclasses__() if c.__module__.startswith('nas_nb.') and not c.__name__.startswith('_')
               and c.__name__ not in names}
    assert not missing, f'add to COSTS: {sorted(missing)}'

def test_contracts_can_fail():
    "One faulty part of each kind, made from a real one; the notebook core/check does this for every law."
    class Unnormalised(part('relax.choice:Softmax')):
        def weights(self, alpha, t, training, generator): return 2*super().weights(alpha, t, training, generator)
    assert 'relax_simplex' in broken_laws('relax', Unnormalised())
    with pytest.raises(AssertionError, match='op_input_unchanged'):
        class InPlace(part('ops.conv:Skip')):
            def forward(self, x): return super().forward(torch.relu_(x))
        check_op(InPlace)
    space = SPACES['mini']()
    class Dishonest(part('cost.expected:LUTCost')):
        def of(self, g): return super().of(g)*1.01
    assert 'cost_one_hot' in broken_laws('cost', Dishonest(lookup_table(space), space, 'ms'), space)
    class OneTooMany(type(space)):
        def size(self): return super().size() + 1
    space.__class__ = OneTooMany
    assert 'space_size' in broken_laws('space', space)

def test_contracts_leave_the_global_rng_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_relax(RELAXATIONS['Gumbel']())
    check_op(part('ops.conv:Skip'))
    assert torch.equal(before, torch.get_rng_state())

def test_messages_name_law_and_part():
    with pytest.raises(AssertionError, match=r"object breaks 12 of 13 laws of relax:\n- relax_simplex: TypeError"): check_relax(object())
    with pytest.raises(ValueError, match="'colour'"): broken_laws('colour', 1)
    assert all(f.__doc__ for laws in LAWS.values() for f in laws.values())
