"""Two processes that share a batch (torch's DistributedDataParallel over gloo) must train a
supernet as one process does with the whole batch.

The comparison is made in evaluation mode. In training mode batch norm normalises by the batch it sees: two halves have two means where
the whole has one, so the gradients differ by design (and `SyncBatchNorm`, which would join the statistics, exists on GPUs only)."""
import os, subprocess, sys
from functools import partial
from pathlib import Path
import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from nas_nb.ops.conv import NB201_OPS
from nas_nb.relax.choice import Softmax
from nas_nb.space.cells import CellSpace, nb201_space
from nas_nb.space.darts import darts_space
from nas_nb.space.markup import MarkedSpace, choose
from nas_nb.space.mini import mini_space

def marked():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    choose(net, '0', {'k1': nn.Sequential(nn.MaxPool2d(3, 1), nn.Conv2d(1, 4, 1)), 'k3': None})
    return choose(net, '2', {'relu': None, 'gelu': nn.GELU()})

SPACES = {
    'nb201': partial(nb201_space, (1, 8, 8), 10, C=4, stages=2, cells=1),
    'mini': mini_space,
    'darts': partial(darts_space, (1, 8, 8), 10, C=4, cells=3, nodes=2),
    'marked': lambda: MarkedSpace(marked, torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 'marked'),
    'own': partial(CellSpace, 'own', {k: NB201_OPS[k] for k in ('nor_conv_1x1', 'nor_conv_3x3')}, nodes=3, in_shape=(3, 6, 6),
                   n_classes=3, C=4, stages=1),
}
CASES = [(name, how) for name in SPACES for how in ('inside', 'outside', 'one path')]
BATCH = 8

def supernet(name, seed):
    "A supernet in float64 with running statistics that have seen data, in evaluation mode."
    space = SPACES[name]()
    net = space.supernet(seed).double()
    with torch.no_grad(): net.train()(space.example(16).double())
    return space, net.eval()

def weights(space, net, how):
    "What is given to `forward`: nothing (softmax inside), relaxed weights with a gradient, or the one-hot weights of one network."
    if how == 'inside': return None
    if how == 'outside': return net.arch.weights(Softmax(), t=.7)
    sizes = {group: (len(edges), len(space.candidates[group])) for group, edges in space.groups.items()}
    return {group: torch.eye(n, dtype=torch.float64)[[(2*row + 1) % n for row in range(rows)]] for group, (rows, n) in sizes.items()}

def batch(space):
    x = torch.randn(BATCH, *space.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x, torch.arange(BATCH) % space.n_classes

def gradients(net): return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}

def train_half(rank, folder):
    "One process of two: the gradients of its half of the batch, after the exchange, and the parameters after a step; for all cases."
    distributed.init_process_group('gloo', init_method=(folder/'meeting').as_uri(), rank=rank, world_size=2)
    found = {}
    for name, how in CASES:
        space, net = supernet(name, seed=rank)             # process 1 starts from other weights: it must be given those of process 0
        both = nn.parallel.DistributedDataParallel(net, find_unused_parameters=how == 'one path')
        (x, y), W = batch(space), weights(space, net, how)
        mine = slice(rank*BATCH//2, (rank + 1)*BATCH//2)
        cross_entropy(both(x[mine], W), y[mine]).backward()
        grads = gradients(net)
        torch.optim.SGD(net.parameters(), .1).step()
        found[name, how] = grads, {k: v.clone() for k, v in net.state_dict().items()}
    torch.save(found, folder/f'{rank}.pt')
    distributed.destroy_process_group()

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What the two processes found, a pair."
    if not distributed.is_available() or not distributed.is_gloo_available(): pytest.skip('this torch has no gloo')
    folder = tmp_path_factory.mktemp('ddp')
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True,
                                  env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}) for rank in range(2)]
    try: said = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes: p.kill()
    assert not any(p.returncode for p in processes), '\n'.join(said)
    return [torch.load(folder/f'{rank}.pt', weights_only=True) for rank in range(2)]

@pytest.mark.parametrize('name,how', CASES, ids=map('-'.join, CASES))
def test_two_processes_are_one(two, name, how):
    space, net = supernet(name, seed=0)
    x, y = batch(space)
    cross_entropy(net(x, weights(space, net, how)), y).backward()
    want = gradients(net)
    for grads, state in (two[0][name, how], two[1][name, how]):
        for key, g in want.items():
            if g is None: assert grads[key] is None, f'{key}: a gradient for what did not run'
            else: torch.testing.assert_close(grads[key], g, atol=1e-9, rtol=0, msg=lambda m: f'{key}: {m}')
        assert all(torch.equal(v, two[0][name, how][1][key]) for key, v in state.items()), 'the processes have drifted apart'
    arch = [g for key, g in want.items() if key.startswith('arch.')]
    if how == 'one path': assert all(g is None for g in arch) and any(g is None for key, g in want.items() if not key.startswith('arch.'))
    else: assert arch and all(g.abs().max() > 1e-5 for g in arch)       # the tolerance would not hide a gradient that is left out

def test_batch_norm_in_training_mode_is_why_evaluation_mode_is_compared():
    "The mean of the gradients of two halves is not the gradient of the whole where statistics are the batch's."
    def gap(mode):
        space, net = supernet('mini', seed=0)
        (x, y), found = batch(space), []
        for parts in ([slice(0, BATCH)], [slice(0, BATCH//2), slice(BATCH//2, BATCH)]):
            net.train(mode).zero_grad()
            for part in parts: (cross_entropy(net(x[part]), y[part])/len(parts)).backward()
            found.append(torch.cat([g.flatten() for g in gradients(net).values()]))
        return float((found[0] - found[1]).norm()/found[0].norm())
    assert gap(False) < 1e-12 and gap(True) > .1

if __name__ == '__main__': train_half(int(sys.argv[1]), Path(sys.argv[2]))
