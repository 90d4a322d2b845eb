"""Sharp operations (`ops.sharp`) and the grid that they stand on (`space.hypercuboid`): shapes, laws, the heaviest path, a whole search."""
import itertools
import numpy as np
import pytest
import torch
from nas_nb.core.check import check_op, check_space
from nas_nb.cost.expected import LUTCost
from nas_nb.ops.mbconv import multiply_adds
from nas_nb.ops.sharp import SHARP_OPS, ResizablePool, SharpSepConv
from nas_nb.relax.choice import Softmax
from nas_nb.relax.sparse import MaxW
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.plugin import Soft
from nas_nb.search.select import Magnitude
from nas_nb.space.hypercuboid import HypercuboidSpace, LongestPath, hypercuboid_space
from nas_nb.space.mini import mini_task

def grid(channels=(2, 3, 5), blocks=1, **how): return hypercuboid_space(channels, blocks, **(dict(in_shape=(1, 12, 12)) | how))

SOFTMAX = Softmax()

def weights(space, seed, relax=SOFTMAX):
    generator = torch.Generator().manual_seed(seed)
    return {g: relax(3*torch.randn(1, len(space.grid), dtype=torch.float64, generator=generator)) for g in space.groups}

def weight(space, g, W): return sum(float(W[k][0, i]) for k, (i,) in space.indices(g).items())

# --- operations ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('k', (1, 3, 5, 7))
@pytest.mark.parametrize('stride', (1, 2, 3))
@pytest.mark.parametrize('dilation', (1, 2, 3))
def test_every_shape_is_kept(k, stride, dilation):
    for h, w in ((9, 8), (5, 12), (1, 2)):
        for mid in (dict(), dict(C_mid=1), dict(mid_mult=4), dict(mid_mult=.2)):
            assert SharpSepConv(2, 3, k, stride, dilation, **mid)(torch.zeros(2, 2, h, w)).shape == (2, 3, -(-h//stride), -(-w//stride))
        for pool, C in itertools.product(('max', 'avg'), (2, 3)):
            assert ResizablePool(2, C, k, stride, pool)(torch.zeros(2, 2, h, w)).shape == (2, C, -(-h//stride), -(-w//stride))

def test_dilation_reaches_further_by_the_formula():
    "The support of a block's impulse response: k - 1 more pixels for the second kernel, dilation*(k - 1) for the first."
    for k, dilation in itertools.product((3, 5), (1, 2, 3)):
        op, x = SharpSepConv(8, 8, k, dilation=dilation).eval(), torch.zeros(1, 8, 31, 31)
        x[..., 15, 15] = 1
        with torch.no_grad(): seen = (op(x) - op(0*x)).abs().sum((0, 1)).any(0).nonzero()
        assert int(seen.max() - seen.min()) == (k - 1)*(1 + dilation)

@pytest.mark.parametrize('name', SHARP_OPS)
def test_laws_of_operations(name): check_op(SHARP_OPS[name], cases=((2, 2, 1), (2, 3, 2)))

# --- space --------------------------------------------------------------------------------------------------------------------------

OWN = HypercuboidSpace((2, 4), (1, 1, 2), {k: SHARP_OPS[k] for k in ('flood_conv_3x3', 'avg_pool_3x3')}, (3, 7, 6), 4)

@pytest.mark.parametrize('space', (grid(blocks=2), grid((3,)), OWN), ids=('two blocks', 'one width', 'own strides'))
def test_laws(space): check_space(space, skip=('space_compile',))

@pytest.mark.parametrize('relax', (Softmax(), MaxW()), ids=str)
def test_heaviest_path_is_brute_force(relax):
    for space in (grid(), grid((2, 3), 2)):
        paths = list(space.enumerate())
        for seed in range(30):
            W = weights(space, seed, relax)
            assert space.longest_path(W) == max(paths, key=lambda g: weight(space, g, W))

def test_heaviest_path_agrees_with_networkx():
    nx = pytest.importorskip('networkx')
    space = grid(blocks=3)
    for seed in range(5):
        W, G = weights(space, seed), nx.DiGraph()
        for layer, group in enumerate(space.groups):
            for (a, b, _), w in zip(space.grid, W[group][0].tolist()):
                key = (layer, a), (layer + 1, b)
                if not G.has_edge(*key) or G.edges[key]['weight'] < w: G.add_edge(*key, weight=w)
        channels = [C for _, C in nx.dag_longest_path(G)]
        path = space.path(space.longest_path(W))
        assert channels == [path[0][0], *(b for _, b, _ in path)]

def test_what_is_no_path_is_refused():
    space = grid()
    rows = dict(zip(space.groups, ([space.grid.index((2, 3, 'sharp_conv_3x3'))], [space.grid.index((2, 5, 'sharp_conv_3x3'))])))
    with pytest.raises(ValueError, match='layer2 reads 2 channels'): space.genotype(rows)
    with pytest.raises(ValueError, match='among'): space.along((2, 3, 4), ('sharp_conv_3x3',)*2)
    for text in ('2|sharp_conv_3x3_3', '2|sharp_conv_3x3_3|sharp_conv_3x3_4', '²|sharp_conv_3x3_3|sharp_conv_3x3_3', '2|x_3|y_3'):
        with pytest.raises(ValueError): space.from_str(text)

def test_weights_of_each_sample_and_dead_ends():
    space = grid()
    net, x = space.supernet().eval(), space.example(3)
    one, two = (space.one_hot(space.along((2, C, 5), ('sharp_conv_3x3',)*2)) for C in (2, 3))
    own = {k: torch.stack([one[k], two[k], one[k]]) for k in one}
    with torch.no_grad():
        torch.testing.assert_close(net(x, own), torch.stack([net(x, W)[i] for i, W in enumerate((one, two, one))]), atol=1e-5, rtol=1e-4)
        broken = {'layer1': one['layer1'], 'layer2': two['layer2']}
        assert torch.equal(net(x, broken), net.bias.expand(3, -1))

def test_skipping_changes_little_and_saves_calls():
    space, calls = grid(), []
    net, skipping = space.supernet(0).eval(), space.supernet(0, skip=True).eval()
    for layer in skipping.layers.values():
        for op in layer.ops.values(): op.register_forward_hook(lambda *_: calls.append(1))
    W, x = {k: (8*v.log()/v.log().abs().amax()).softmax(-1).float() for k, v in weights(space, 0).items()}, space.example(4)
    with torch.no_grad(): a, b = net(x, W), skipping(x, W)
    assert len(calls) < 2*len(space.grid) and float((a - b).norm()/a.norm()) < .1

def test_table_is_the_networks_own_work():
    space = grid(blocks=2)
    cost, rng = LUTCost(space.table(), space, 'MACs'), np.random.default_rng(0)
    for g in (space.sample(rng) for _ in range(10)): assert round(cost.of(g)) == multiply_adds(space.build(g), space.in_shape)

# --- search -------------------------------------------------------------------------------------------------------------------------

def test_search_and_price():
    "A whole search ends in a path, the same again for the same seed; a high price on the work leads to a cheap one."
    space, task = grid(), mini_task()
    cost = LUTCost(space.table(), space, 'MACs').to('MMACs')
    how = dict(relax=MaxW(), budget=Budget(1, 40), select=LongestPath())
    found = run_search(space.supernet(0), task, **how)
    assert space.from_str(space.to_str(found.genotype)) == found.genotype
    again = run_search(space.supernet(0), task, **how)
    assert again.genotype == found.genotype and all(torch.equal(a, b) for a, b in zip(found.state.a, again.state.a))
    net, g, x = found.state.net.eval(), found.genotype, task.val.x[:4]
    with torch.no_grad(): torch.testing.assert_close(net.discretize(g)(x), net(x, space.one_hot(g)), atol=1e-5, rtol=1e-4)
    cheap = run_search(space.supernet(0), task, **(how | dict(relax=Softmax())), objective=Soft(cost, 1e6)).genotype
    assert cost.of(cheap) < np.mean([cost.of(g) for g in space.enumerate()])

def test_strongest_rows_are_seldom_a_path():
    space = grid()
    net = space.supernet(0)
    with torch.no_grad():
        for k, v in weights(space, 0).items(): net.arch[k].copy_(v.log())
        net.arch['layer1'][0, space.grid.index((2, 3, 'sharp_conv_3x3'))] = 9.
        net.arch['layer2'][0, space.grid.index((5, 5, 'sharp_conv_3x3'))] = 9.
    state = type('State', (), dict(net=net, relax=Softmax(), values={}))
    with pytest.raises(ValueError, match='longest_path'): Magnitude()(state)
    assert LongestPath()(state) == space.longest_path({k: a.softmax(-1) for k, a in net.arch.logits.items()})
