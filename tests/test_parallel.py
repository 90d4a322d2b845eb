"""A search on two real processes (torchrun, gloo), each with half of every batch, is the search of one process
with the whole batch: for every method of the registry, in double precision so that a gradient left out cannot
hide, and in single precision within 1e-5. And its checkpoints, and its errors.

All cases are computed in one launch of two processes (this file run as a script), and once more here, on one."""
import os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
import torch.distributed as dist
from nas_nb.core.run import Checkpoints
from nas_nb.search.driver import Plugin
from nas_nb.search.parallel import JointCheckpoints, check_replicas, parallel_search, process_group, split_batches, world_rank, world_size
from nas_nb.search.plugin import Budget, SearchRecipe
from nas_nb.search.registry import METHODS, method_settings
from nas_nb.space.cells import CellSpace, nb201_space
from nas_nb.space.darts import darts_space
from nas_nb.space.mini import mini_task

class Stop(Exception): pass

class StopIn(Plugin):
    "Raises in the middle of an epoch, on every process"
    def __init__(self, epoch): self.epoch = epoch
    def after_w(self, s):
        if s.epoch == self.epoch and s.step % 2: raise Stop

def tiny():
    "One cell with the operations of NAS-Bench-201 on the images of the mini task: few batch norms, each of which waits for the other."
    return CellSpace('tiny', nb201_space().ops, 3, None, (1, 12, 12), 10, C=2, stages=1, cells=1)

def small(n=80): return replace(mini_task(), train=mini_task().train.subset(range(n)))

SHORT = Budget(1, 20)

def search(name, budget=SHORT, double=False, space=None, task=None, **how):
    space = space or tiny()
    # process 1 starts from other weights: it must be given those of process 0
    net = space.supernet(4 + world_rank())
    if double:
        net = net.double()
        net.register_forward_pre_hook(lambda net, args: (args[0].double(), *args[1:]))
    return parallel_search(net, task or small(), **method_settings(name, space, budget, **how), seed=4)

def tensors(result): return {k: v.clone() for k, v in result.state.net.state_dict().items()}

def cases(folder):
    "name -> what is compared between one process and two."
    found = {}
    for name in METHODS:
        try: found[name] = tensors(search(name, double=True))
        except ImportError: continue
    found['single precision'] = tensors(search('gumbel', Budget(3, 20)))
    found['uneven slices'] = tensors(search('darts', Budget(1, 19), double=True))
    reduced = darts_space((1, 12, 12), 10, C=2, cells=3, nodes=2)
    found['darts space'] = tensors(search('darts', double=True, space=reduced))
    with_history = search('darts', Budget(2, 20))
    found['history'] = {k: torch.tensor([row[k] for row in with_history.history]) for k in ('train_loss', 'val_loss', 'val_acc', 'entropy')}
    return found

def said(work):
    try: return f'no error: {work()}'
    except Exception as e: return f'{type(e).__name__}: {e}'

def checkpoints(folder):
    "Stopped in epoch 2 and resumed; what is on the disk; errors on every process."
    def run(stop, **k): return search('rarts', Budget(2, 20), plugins=(StopIn(stop),), **k)
    mine = folder/f'of process {world_rank()}'                       # as on two machines: each has folders of its own
    whole = tensors(run(9))
    said(lambda: run(1, ckpt=mine))
    resumed = tensors(run(9, ckpt=mine, resume=True))
    facts = dict(bitwise=all(torch.equal(v, resumed[k]) for k, v in whole.items()),
                 files=sorted(p.name for p in mine.glob('*')) if mine.exists() else None)
    (folder/'file').write_text('')
    facts['full'] = said(lambda: JointCheckpoints(folder/'file'/'below'))
    net = split_batches(tiny().supernet(0))
    net.arch['cell'].data += world_rank()
    facts['drift'] = said(lambda: JointCheckpoints(mine/'x').save(1, dict(state=dict(net=net.state_dict()))))
    facts['data'] = said(lambda: search('darts', task=small(60 + 20*world_rank())))
    facts['tiny'] = said(lambda: net(torch.randn(1, 1, 12, 12)))
    facts['per sample'] = said(lambda: search('gumbel', recipe=SearchRecipe(per_sample=True)))
    facts['equal'] = said(lambda: check_replicas('x', dict(x=torch.ones(3))))
    return facts

def work(folder):
    torch.set_num_threads(1)
    with process_group('gloo') as device:
        assert world_size() == 2 and device.type == 'cpu'
        torch.save(dict(cases=cases(folder), facts=checkpoints(folder)), folder/f'{world_rank()}.pt')

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What the two processes found, a pair, and their folder."
    if not dist.is_available() or not dist.is_gloo_available(): pytest.skip('this torch has no gloo')
    folder = tmp_path_factory.mktemp('parallel')
    start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, str(folder)]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'NAS_NB_PROGRESS': '0',
                        'PYTHONPATH': os.pathsep.join([str(Path(__file__).resolve().parent.parent), *sys.path])}
    done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder/f'{rank}.pt', weights_only=True) for rank in range(2)], folder

@pytest.fixture(scope='module')
def one(tmp_path_factory): return cases(tmp_path_factory.mktemp('alone'))

@pytest.mark.parametrize('name', [*METHODS, 'single precision', 'uneven slices', 'darts space', 'history'])
def test_two_processes_are_one(two, one, name):
    if name not in one: pytest.skip(f'needs the extra [{METHODS[name].extra}]')
    (first, second), _ = two
    want = one[name]
    for key, v in want.items():
        assert torch.equal(first['cases'][name][key], second['cases'][name][key]), f'{key}: the processes have drifted apart'
        torch.testing.assert_close(first['cases'][name][key], v, atol=1e-9 if v.dtype == torch.float64 else 1e-5, rtol=0,
                                   msg=lambda m: f'{key}: {m}')
    if name in METHODS:
        before = tiny().supernet(4).state_dict()
        assert any(float((v - before[key]).abs().max()) > 1e-3 for key, v in want.items() if v.is_floating_point()), 'nothing was searched'

def test_only_process_0_writes_and_all_resume(two):
    (first, second), _ = two
    assert first['facts']['bitwise'] and second['facts']['bitwise']
    assert first['facts']['files'] == ['search-000000001.safetensors', 'search-000000002.safetensors'] and second['facts']['files'] is None

def test_a_checkpoint_of_two_is_continued_by_one(two, one):
    folder = two[1]/'of process 0'
    (folder/'search-000000002.safetensors').unlink()
    resumed = search('rarts', Budget(2, 20), plugins=(StopIn(9),), ckpt=folder, resume=True)
    whole = search('rarts', Budget(2, 20), plugins=(StopIn(9),))
    assert Checkpoints(folder, 'search').steps == [1, 2]
    for key, v in whole.state.net.state_dict().items():
        torch.testing.assert_close(resumed.state.net.state_dict()[key], v, atol=1e-5, rtol=0)

@pytest.mark.parametrize('what,message',
                         [('full', 'NotADirectoryError'), ('drift', r"RuntimeError: the networks of processes \[1\] differ"),
                          ('data', r'RuntimeError: the data of processes \[1\] differ'), ('tiny', 'ValueError: x holds 1 examples'),
                          ('per sample', 'ValueError: recipe.per_sample'), ('equal', 'no error')])
def test_an_error_is_one_of_all_processes(two, what, message):
    import re
    for found in two[0]: assert re.match(message, found['facts'][what]), found['facts'][what]

if __name__ == '__main__': work(Path(sys.argv[1]))
