"""Spaces as a user meets them: laws over whole spaces, the published tables, networks that leave Python,
and the mini table remade in part."""
import io, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from nas_nb.core.data import data_home
from nas_nb.ops.conv import NB201_OPS
from nas_nb.relax.choice import Softmax
from nas_nb.space.cells import CellSpace, TooManyStages, nb201_space
from nas_nb.space.core import Choice, Genotype
from nas_nb.space.mini import mini_space, mini_truth, train_mini

ROOT = Path(__file__).resolve().parent.parent

def small(in_shape=(1, 8, 8), **size): return nb201_space(in_shape, 10, **(dict(C=4, stages=2, cells=1) | size))

@pytest.fixture(scope='module')
def table():
    home = data_home()
    if not home or not (home/'nasbench201.npz').exists(): pytest.skip('no nasbench201.npz in the data folder (NAS_NB_DATA)')
    return np.load(home/'nasbench201.npz', allow_pickle=False)

@pytest.fixture(scope='module')
def genotypes(table):
    space = nb201_space()
    return [space.from_str(text.decode()) for text in table['arch']]

# --- supernet and discretised network -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', (True, False), ids=('train', 'eval'))
@pytest.mark.parametrize('space', (small(), small((3, 12, 10), cells=2), mini_space()), ids=('digits', 'colour', 'mini'))
def test_one_hot_supernet_is_the_network(space, mode):
    net, x, rng = space.supernet().double(), space.example(5).double(), np.random.default_rng(1)
    with torch.no_grad():
        for _ in range(3): net(x)
        for _ in range(10):
            g = space.sample(rng, connected=False)
            plain = net.train(mode).discretize(g)
            torch.testing.assert_close(plain(x), net(x, space.one_hot(g, torch.float64)), atol=1e-9, rtol=0)

def test_gradients_reach_weight_zero_and_skip_it_otherwise():
    space = small()
    net, x, g = (space.supernet(), space.example(4),
                 space.from_str('|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|skip_connect~2|'))
    calls = []
    for m in net.modules():
        if isinstance(m, Choice):
            for name, op in m.ops.items(): op.register_forward_hook(lambda *_, key=(m.key[1], name): calls.append(key))
    with torch.no_grad(): net(x, space.one_hot(g))
    assert sorted(calls) == sorted(2*[(0, 'nor_conv_3x3'), (2, 'skip_connect'), (5, 'skip_connect')])
    calls.clear()
    W = {'cell': space.one_hot(g)['cell'].requires_grad_()}
    net(x, W).square().sum().backward()
    assert len(calls) == 2*6*4 and (W['cell'].grad[:, 1:] != 0).any(1).sum() >= 3 and (W['cell'].grad[:, 0] == 0).all()

def test_discretize_copies_and_leaves_the_supernet_alone():
    space = small()
    net, g = space.supernet(), space.sample(np.random.default_rng(0))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    plain = net.discretize(g)
    with torch.no_grad():
        for p in plain.parameters(): p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    fresh = net.discretize(g, copy_weights=False)
    assert not torch.equal(fresh.stem[0].weight, net.stem[0].weight)

def test_all_none_is_zero_and_a_constant_answer():
    space = small()
    g = space.genotype({'cell': [0]*6})
    net = space.supernet().eval()
    with torch.no_grad():
        out = net(space.example(3), space.one_hot(g))
        assert torch.equal(out, out[:1].expand_as(out)) and out.isfinite().all()
        built = space.build(g).eval()(space.example(3))
        assert torch.equal(built, built[:1].expand_as(built))

SLOW = pytest.mark.skipif('slow' not in os.environ.get('NAS_NB_FLAGS', '').split(),
                          reason="slow: the compiler makes C++ (NAS_NB_FLAGS=slow)")

@pytest.mark.parametrize('backend', ('aot_eager', pytest.param('inductor', marks=SLOW)))
def test_compiled_is_the_same(backend):
    """Value, gradients of weights and architecture, and running statistics of a compiled supernet in training mode;
    then the network handed back."""
    space, x, y, found = mini_space(), mini_space().example(8), torch.arange(8), []
    torch._dynamo.reset()
    for compiled in (False, True):
        net = space.supernet()
        out = (torch.compile(net, backend=backend) if compiled else net)(x, net.arch.weights(Softmax()))
        nn.functional.cross_entropy(out, y).backward()
        found.append([out.detach(), *(p.grad for p in net.parameters()), *net.buffers()])
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    plain = net.eval().discretize(space.sample(np.random.default_rng(0)))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(plain, backend=backend, fullgraph=True)(x), plain(x), atol=1e-5, rtol=1e-4)

# --- NAS-Bench-201 ------------------------------------------------------------------------------------------------------------------

def test_strings_and_operations_of_the_whole_table(table, genotypes):
    space = nb201_space()
    assert [list(e) for e in space.groups['cell']] == table['edges'].tolist() and list(space.op_names) == table['op_names'].tolist()
    for text, ops, g in zip(table['arch'], table['ops'].tolist(), genotypes):
        assert space.to_str(g) == text.decode() and space.indices(g)['cell'] == ops
    assert len(set(genotypes)) == space.size() == 15625

def counts(space, g, live=False):
    "Parameters, and multiply-adds with the bias of the classifier, by torch's own counter."
    net = space.build(g, live=live).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter: net(space.example())
    return np.array([sum(p.numel() for p in net.parameters()), counter.get_total_flops()//2 + space.n_classes])

def stored(number): return (number/1e6).astype('f4')

@pytest.mark.parametrize('data,shape,n_classes', (('cifar10', (3, 32, 32), 10), ('cifar100', (3, 32, 32), 100), ('in16', (3, 16, 16), 120)))
def test_counts_of_all_cells(table, genotypes, data, shape, n_classes):
    """Bit for bit in float32 for all 15,625 cells: what one edge adds is counted on built networks, and so is a sample of whole ones.

    The table counts dead edges; live networks have as many or fewer."""
    space, published = nb201_space(shape, n_classes), np.stack([table[f'{key}_M_{data}'] for key in ('params', 'flops')], 1)
    single = np.array([counts(space, space.genotype({'cell': [op, 0, 0, 0, 0, 0]})) for op in range(5)])
    every = single[0] + np.stack([(table['ops'] == op).sum(1) for op in range(5)], 1) @ (single - single[0])
    assert np.array_equal(stored(every), published)
    for i in [0, 11, 284, 1835, 9930, *np.random.default_rng(2).choice(15625, 5, replace=False)]:
        assert np.array_equal(counts(space, genotypes[i]), every[i])
        assert sum(p.numel() for p in space.build(genotypes[i]).parameters()) <= every[i, 0]

def test_rows_of_the_table(table, genotypes):
    space = nb201_space()
    rows = space.table_rows(table['ops'])
    assert rows[[space.position(g) for g in genotypes]].tolist() == list(range(15625))
    assert all(space.at(p) == genotypes[rows[p]] for p in range(0, 15625, 7))
    published = '|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|'
    assert rows[space.position(space.from_str(published))] == 9930

def published_rule(g, flat=False, drop=False):
    "The text by which the table's authors tell cells apart; `flat`: sums within sums merged, `drop`: zero terms left out."
    nodes = {0: ['0']}
    for t in range(1, 4):
        terms = []
        for s, target, op in g.cells[0].edges:
            if target != t: continue
            text = '+'.join(sorted(nodes[s]))
            if op == 'none' or text in ('', '#'): terms += [] if drop else ['#']
            elif op == 'skip_connect': terms += nodes[s] if flat else [text]
            else: terms.append(f'({text})@{op}')
        nodes[t] = sorted(terms) if flat else ['+'.join(sorted(terms))]
    return '+'.join(nodes[3])

def test_expression_against_the_published_classes(table, genotypes):
    """6,466 functions by the published rule; ours is that rule with zero terms dropped and sums flattened,
    and never divides one of its classes."""
    first = {}
    assert [first.setdefault(published_rule(g), i) for i, g in enumerate(genotypes)] == table['rep'].tolist()
    counts = [len({published_rule(g, flat, drop) for g in genotypes})
              for flat, drop in ((False, False), (False, True), (True, False), (True, True))]
    assert counts == [6466, 5390, 5755, 4930]
    ours = [g.expression() for g in genotypes]
    assert len(set(ours)) == 4930 and len(set(zip(ours, table['rep'].tolist()))) == 6466
    assert len(set(zip(ours, (published_rule(g, True, True) for g in genotypes)))) == 4930
    assert len({g.canonical() for g in genotypes}) == 9445

# --- built networks -----------------------------------------------------------------------------------------------------------------

def test_state_dict_travels_without_pickle():
    from safetensors.torch import load, save
    space, g = small(), Genotype.from_json(small().sample(np.random.default_rng(3)).to_json())
    a, b = space.build(g, seed=0).eval(), space.build(g, seed=1).eval()
    b.load_state_dict(load(save(a.state_dict())))
    assert torch.equal(a(space.example(2)), b(space.example(2)))
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer); buffer.seek(0)
    torch.load(buffer, weights_only=True)

def test_every_mini_network_exports_as_a_graph():
    space = mini_space()
    for g in list(space.enumerate())[::31]:
        net, x = space.build(g).eval(), space.example(2)
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))

def test_onnx(tmp_path):
    pytest.importorskip('onnx'); pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    space = small()
    net, x = (space.build(space.from_str('|nor_conv_3x3~0|+|skip_connect~0|avg_pool_3x3~1|+|none~0|nor_conv_1x1~1|skip_connect~2|')).eval(),
              space.example(2))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(net, (x,), tmp_path/'net.onnx', dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path/'net.onnx', providers=['CPUExecutionProvider'])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), net(x).detach(),
                               atol=1e-4, rtol=1e-4)

def test_own_operation_and_too_many_stages():
    class Sharpen(nn.Module):
        def __init__(self, C_in, C_out, stride=1, affine=True):
            super().__init__(); self.mix = nn.Conv2d(C_in, C_out, 1, stride)
        def forward(self, x): return self.mix(x - x.mean((2, 3), keepdim=True))
    space = CellSpace('own', {'skip_connect': NB201_OPS['skip_connect'], 'sharpen': Sharpen}, nodes=3, edges=((0, 1), (1, 2)),
                      in_shape=(2, 10, 6), n_classes=3, C=4)
    g = space.from_str('|sharpen~0|+|sharpen~1|')
    net = space.supernet()
    with torch.no_grad(): torch.testing.assert_close(net.discretize(g)(space.example(2)), net(space.example(2), space.one_hot(g)))
    assert space.build(g.canonical())(space.example(2)).shape == (2, 3) and not any(isinstance(m, Choice) for m in space.build(g).modules())
    with pytest.raises(TooManyStages, match='stages .* 5 stages over 8 x 8'): small(stages=5)
    with pytest.raises(TooManyStages, match='4 stages'): small().build(small().sample(np.random.default_rng(0)), stages=4)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_agrees():
    space = small()
    net, x, g = space.supernet().eval(), space.example(4), space.sample(np.random.default_rng(0))
    with torch.no_grad():
        want = [net(x), net(x, space.one_hot(g)), net.discretize(g)(x)]
        net, x = net.cuda(), x.cuda()
        got = [net(x), net(x, {k: w.cuda() for k, w in space.one_hot(g).items()}), net.discretize(g)(x)]
    for a, b in zip(want, got): torch.testing.assert_close(a, b.cpu(), atol=1e-4, rtol=1e-3)

# --- the mini table -----------------------------------------------------------------------------------------------------------------

def test_mini_classes():
    everything = list(mini_space().enumerate())
    assert (len(everything), len({g.canonical() for g in everything}), len({g.expression() for g in everything})) == (125, 85, 60)

def test_members_of_a_class_are_one_computation():
    "What tools/make_mini_truth.py relies on: same canonical form and seed, then the same modules, weights and result."
    space = mini_space()
    members = [g for g in space.enumerate() if g.canonical() == space.from_str('|none~0|+|nor_conv_1x1~0|none~1|').canonical()]
    assert len(members) == 9
    nets = [space.build(g, seed=1) for g in members]
    for net in nets[1:]:
        assert str(net) == str(nets[0]) and net.body[0].plan == nets[0].body[0].plan
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), nets[0].state_dict().values()))
    assert train_mini(members[0], 1) == train_mini(members[-1], 1)

def test_one_training_reproduces_the_table():
    truth = mini_truth().set_index('genotype')
    text = '|nor_conv_1x1~0|+|avg_pool_3x3~0|nor_conv_3x3~1|'
    assert abs(train_mini(mini_space().from_str(text), 2) - truth.seed2[text]) <= .03

def test_the_script_resumes(tmp_path):
    "With all trainings but one in the partial file, the script does that one and writes the table that is in the package."
    space, truth = mini_space(), mini_truth().set_index('genotype')
    first = {}
    for g in space.enumerate(): first.setdefault(g.canonical(), space.to_str(g))
    lines = [json.dumps(dict(genotype=t, seed=s, accuracy=truth[f'seed{s}'][t])) for s in range(3) for t in first.values()]
    (tmp_path/'new.csv.partial').write_text('\n'.join(lines[1:]) + '\n')
    done = subprocess.run([sys.executable, ROOT/'tools'/'make_mini_truth.py', '--out', tmp_path/'new.csv'], capture_output=True, text=True)
    assert done.returncode == 0 and '254 trainings done, 1 to do' in done.stdout, done.stdout + done.stderr
    import pandas as pd
    new = pd.read_csv(tmp_path/'new.csv').set_index('genotype')
    assert list(new.index) == list(truth.index) and (new - truth).abs().to_numpy().max() <= .03
    assert not (tmp_path/'new.csv.partial').exists()
