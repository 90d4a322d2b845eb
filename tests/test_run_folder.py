"""Run folders and checkpoints under real kills, real second processes, damaged files and folders that cannot be written."""
import errno, json, multiprocessing as mp, os, pickle, random, signal, subprocess, sys, time, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from nas_nb.core import run as core_run
from nas_nb.core.run import (Checkpoints, DamagedFile, FolderBusy, RunFolder, atomic_write, check_device, environment, load_state,
                             rng_state, save_state, seeded, set_rng_state, threads)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = dict(data='digits', seed=0, search=dict(epochs=3, lambdas=[0, 0.5]))
fork = mp.get_context('fork')

def tree(step): return dict(step=step, w=torch.full((200_000,), float(step)), history=[dict(epoch=i) for i in range(step % 7)])
def check(step, found): assert found['step'] == step and (found['w'] == step).all() and len(found['history']) == step % 7

# ---- kill -9 ---------------------------------------------------------------------------------------------------------------------
def _save_for_ever(folder, first, keep, ready):
    kept = Checkpoints(folder, keep=keep)
    for step in range(first, 10**9):
        kept.save(step, tree(step))
        if step == first: ready.set()

@pytest.mark.parametrize('keep', [1, 2])
def test_kill_while_saving_leaves_a_good_checkpoint(tmp_path, keep):
    pauses, last = random.Random(keep), 0
    Checkpoints(tmp_path, keep=keep).save(0, tree(0))
    for _ in range(12):
        ready = fork.Event()
        child = fork.Process(target=_save_for_ever, args=(tmp_path, last + 1, keep, ready))
        child.start(); assert ready.wait(30)
        time.sleep(pauses.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL); child.join()
        kept = Checkpoints(tmp_path, keep=keep)
        with warnings.catch_warnings():
            warnings.simplefilter('error')                    # nothing is even damaged
            step, found = kept.latest()
        assert step > last                                    # a save that returned is never lost
        check(step, found)
        last = step
    assert len(kept.steps) <= keep + 1                        # at most one that the kill kept from being pruned

def _work(path, ready):
    with RunFolder(path, CONFIG, resume=True) as folder:
        kept, i = folder.checkpoints('search'), 0
        found = kept.latest()
        step = 0 if found is None else found[0]
        while True:
            step, i = step + 1, i + 1
            kept.save(step, tree(step))
            folder.write_json('report.json', dict(step=step))
            if i == 2: ready.set()

def test_kill_a_run_and_resume_it(tmp_path):
    last = 0
    for pause in (0, 0.013, 0.031, 0.047):
        ready = fork.Event()
        child = fork.Process(target=_work, args=(tmp_path/'run', ready))
        child.start(); assert ready.wait(30)
        time.sleep(pause)
        with pytest.raises(FolderBusy, match=f'process {child.pid}'): RunFolder(tmp_path/'run', CONFIG, resume=True)
        os.kill(child.pid, signal.SIGKILL); child.join()
        with RunFolder(tmp_path/'run', CONFIG, resume=True) as folder:     # the lock went with its process
            step, found = folder.checkpoints('search').latest()
            check(step, found)
            assert folder.read_json('report.json')['step'] in (step - 1, step) and step >= last + 2
            assert not list(folder.path.glob('.*.partial'))                # what the kill left half written is swept away
            last = step

def _hold_with_worker(path, ready, worker_pid):
    with RunFolder(path, CONFIG, resume=True):
        worker = fork.Process(target=time.sleep, args=(60,)); worker.start()
        worker_pid.value = worker.pid
        time.sleep(0.1); ready.set(); time.sleep(60)

def test_an_orphaned_worker_does_not_hold_the_folder(tmp_path):
    ready, worker = fork.Event(), fork.Value('i', 0)
    child = fork.Process(target=_hold_with_worker, args=(tmp_path/'run', ready, worker))
    child.start(); assert ready.wait(30)
    os.kill(child.pid, signal.SIGKILL); child.join()
    try:
        os.kill(worker.value, 0)                              # it lives
        RunFolder(tmp_path/'run', CONFIG, resume=True).close()
    finally: os.kill(worker.value, signal.SIGKILL)

# ---- one process, one configuration ------------------------------------------------------------------------------------------------
def test_a_second_interpreter_is_refused_and_told_by_whom(tmp_path):
    code = f'from nas_nb.core.run import RunFolder; RunFolder({str(tmp_path/"run")!r}, {CONFIG!r}, resume=True)'
    call = lambda: subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    with RunFolder(tmp_path/'run', CONFIG):
        refused = call()
        assert refused.returncode != 0 and f'in use by process {os.getpid()}' in refused.stderr and 'run' in refused.stderr
    assert call().returncode == 0

def test_used_folder(tmp_path):
    with RunFolder(tmp_path/'a', CONFIG) as folder: folder.write_text('rows.csv', 'x\n1\n')
    with pytest.raises(ValueError, match=r'earlier run.*resume=True.*overwrite=True'): RunFolder(tmp_path/'a', CONFIG)
    assert (tmp_path/'a'/'rows.csv').read_text() == 'x\n1\n'
    with RunFolder(tmp_path/'a', CONFIG, resume=True) as folder: assert folder.file('rows.csv').exists()
    with RunFolder(tmp_path/'a', CONFIG, overwrite=True) as folder: assert not folder.file('rows.csv').exists()

def test_another_configuration_names_keys_and_both_values(tmp_path):
    RunFolder(tmp_path/'a', CONFIG).close()
    other = dict(data='digits', seed=1, search=dict(epochs=3, lambdas=[0, 1.5]), device='cpu')
    with pytest.raises(ValueError) as e: RunFolder(tmp_path/'a', other, resume=True)
    for said in ('seed: 0 there, 1 now', 'search.lambdas: [0, 0.5] there, [0, 1.5] now', "device: '(absent)' there, 'cpu' now"):
        assert said in str(e.value)
    assert 'epochs' not in str(e.value)
    assert json.loads((tmp_path/'a'/'config.json').read_text())['config'] == json.loads(json.dumps(CONFIG))     # untouched
    RunFolder(tmp_path/'a', {**CONFIG, 'search': dict(epochs=3, lambdas=(0, 0.5))}, resume=True).close()        # a tuple is JSON's list

def test_a_kill_before_the_config_was_written_is_a_new_run(tmp_path):
    (tmp_path/'a').mkdir(); (tmp_path/'a'/'.lock').write_text('process 1 on x'); (tmp_path/'a'/'.config.json.1-a.partial').write_text('{')
    with RunFolder(tmp_path/'a', CONFIG): assert sorted(p.name for p in (tmp_path/'a').iterdir()) == ['.lock', 'config.json']

@pytest.mark.parametrize('content', [None, '', '{"format": "nas_nb run fol', '[]', '{"config": {}}', '{"format": "nas_nb run folder 1"}'])
@pytest.mark.parametrize('flag', ['resume', 'overwrite'])
def test_what_is_not_ours_is_never_touched(tmp_path, content, flag):
    (tmp_path/'thesis.txt').write_text('years')
    if content is not None: (tmp_path/'config.json').write_text(content)
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='no readable config.json'): RunFolder(tmp_path, CONFIG, **{flag: True})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before

def test_overwrite_does_not_follow_links(tmp_path):
    (tmp_path/'precious').mkdir(); (tmp_path/'precious'/'x').write_text('1')
    with RunFolder(tmp_path/'a', CONFIG) as folder: (folder.path/'link').symlink_to(tmp_path/'precious')
    RunFolder(tmp_path/'a', CONFIG, overwrite=True).close()
    assert (tmp_path/'precious'/'x').read_text() == '1' and not (tmp_path/'a'/'link').exists()

# ---- not writable: must hold for root too ------------------------------------------------------------------------------------------
def test_under_a_regular_file(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(ValueError, match=r"path='.*file/run': cannot be written"): RunFolder(tmp_path/'file'/'run', CONFIG)
    with pytest.raises(ValueError, match='is a file'): RunFolder(tmp_path/'file', CONFIG)
    assert (tmp_path/'file').read_text() == 'x'

@pytest.mark.parametrize('code', [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_failing_write_is_found_before_work(tmp_path, monkeypatch, code):
    RunFolder(tmp_path/'a', CONFIG).close()
    def fails(*a): raise OSError(code, os.strerror(code))
    with monkeypatch.context() as patched:
        patched.setattr(core_run.os, 'replace', fails)
        for kw in (dict(resume=True), dict(overwrite=True)):
            with pytest.raises(ValueError, match=f'cannot be written .{os.strerror(code)}'): RunFolder(tmp_path/'a', CONFIG, **kw)
            assert (tmp_path/'a'/'config.json').exists()       # nothing was deleted
    RunFolder(tmp_path/'a', CONFIG, resume=True).close()       # and the refused folder was given free

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_without_permission(tmp_path):
    (tmp_path/'a').mkdir(mode=0o500)
    with pytest.raises(ValueError, match='cannot be written'): RunFolder(tmp_path/'a', CONFIG)
    with pytest.raises(ValueError, match='cannot be written'): RunFolder(tmp_path/'a'/'b', CONFIG)

@pytest.mark.parametrize('bad, said', [([], 'config=list'), (dict(a=float('nan')), 'not JSON'), (dict(a={1}), 'not JSON')])
def test_bad_config(tmp_path, bad, said):
    with pytest.raises(TypeError, match=said): RunFolder(tmp_path/'a', bad)
    assert not (tmp_path/'a').exists()

def test_names_stay_inside(tmp_path):
    with RunFolder(tmp_path/'a', CONFIG) as folder:
        for name in ('../x', '/etc/x', 'a/../../x'):
            with pytest.raises(ValueError, match='inside the run folder'): folder.write_text(name, 'x')
        folder.write_json('deep/er/report.json', dict(a=[float('inf'), np.float64(1), torch.tensor([1, 2])], p=Path('x')))
        assert folder.read_json('deep/er/report.json') == dict(a=[None, 1.0, [1, 2]], p='x')
        folder.write_text('cut.json', '{"a": ')
        with pytest.raises(DamagedFile, match='cut.json'): folder.read_json('cut.json')

def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path/'a', 'old')
    def fails(*a): raise OSError(errno.ENOSPC, 'full')
    monkeypatch.setattr(core_run.os, 'fsync', fails)
    with pytest.raises(OSError): atomic_write(tmp_path/'a', 'new')
    assert (tmp_path/'a').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1

# ---- damaged checkpoints -----------------------------------------------------------------------------------------------------------
def _cut(where): return lambda b: b[:int(len(b) * where)]
def _flip(where):
    def damage(b):
        i = min(int(len(b) * where), len(b) - 1)
        return b[:i] + bytes([b[i] ^ 4]) + b[i + 1:]
    return damage
DAMAGE = dict(empty=_cut(0), header_cut=_cut(1e-4), half=_cut(0.5), last_byte=lambda b: b[:-1], longer=lambda b: b + b'\0',
              first_bit=_flip(0), header_bit=_flip(2e-4), middle_bit=_flip(0.5), last_bit=_flip(1), zeros=lambda b: b'\0' * len(b),
              other=lambda b: b'PK\3\4 not ours')

@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, damage):
    kept = Checkpoints(tmp_path, 'search')
    for step in (3, 8): kept.save(step, tree(step))
    newest = kept.path(8)
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    with pytest.warns(UserWarning) as told: step, found = Checkpoints(tmp_path, 'search').latest()
    check(3, found); assert step == 3 and len(told) == 1
    said = str(told[0].message)
    assert str(newest) in said and f'using {kept.path(3)} instead' in said
    with pytest.warns(UserWarning): kept.latest()
    assert [e.path for e in kept.damaged] == [newest]
    kept.save(4, tree(4))                                      # repeated work may end at a step before the damaged one
    assert kept.steps == [3, 4] and kept.latest()[0] == 4

def test_all_damaged(tmp_path):
    kept = Checkpoints(tmp_path)
    for step in (1, 2): kept.save(step, tree(step)); kept.path(step).write_bytes(b'x')
    with pytest.warns(UserWarning, match='starting from nothing') as told: assert kept.latest() is None
    assert len(told) == 2

def test_other_names_are_left_alone(tmp_path):
    a, b = Checkpoints(tmp_path, 'search', keep=1), Checkpoints(tmp_path, 'search-2', keep=1)
    for step in (1, 2, 3): a.save(step, 1); b.save(step, 2)
    assert a.latest() == (3, 1) and b.latest() == (3, 2) and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match='step=2'): a.save(2, 1)
    a.clear(); assert a.latest() is None and b.latest() == (3, 2)
    for bad in (-1, 1.0, True, 'x'):
        with pytest.raises(ValueError, match='step='): a.save(bad, 1)

# ---- state files -------------------------------------------------------------------------------------------------------------------
class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))

def test_loading_executes_nothing(tmp_path):
    (tmp_path/'a').write_bytes(pickle.dumps(Bomb(tmp_path/'exploded')))
    with pytest.raises(DamagedFile): load_state(tmp_path/'a')
    torch.save(Bomb(tmp_path/'exploded'), tmp_path/'b')
    with pytest.raises(DamagedFile): load_state(tmp_path/'b')
    with pytest.raises(TypeError, match=r"tree\['x'\]=Bomb"): save_state(tmp_path/'c', dict(x=Bomb(tmp_path/'exploded')))
    assert not (tmp_path/'exploded').exists() and not (tmp_path/'c').exists()

def test_a_well_formed_file_with_a_wrong_tree_is_damaged(tmp_path):
    import safetensors.torch
    for text in ('{"$call": "os.system"}', '{"$tensor": 5}', '{"$dict": 3}', 'null null'):
        about = json.dumps({'format': core_run._FORMAT, 'sha256': core_run._digest(text, []), 'tree': text})
        (tmp_path/'a').write_bytes(safetensors.torch.save({}, {'nas_nb': about}))
        with pytest.raises(DamagedFile): load_state(tmp_path/'a')
    with pytest.raises(FileNotFoundError): load_state(tmp_path/'none')

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
                                   torch.int32, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize('shape', [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_dtypes_and_shapes(tmp_path, dtype, shape):
    t = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    save_state(tmp_path/'a', [t, t])
    a, b = load_state(tmp_path/'a')
    assert a.dtype == dtype and a.shape == t.shape and torch.equal(a, t)
    a.fill_(1); assert torch.equal(b, t)                       # each owns its memory

def test_dtypes_that_cannot_be_stored_are_named(tmp_path):
    for bad in (torch.zeros(2).to_sparse(), torch.empty(2, device='meta'), np.array([None]), np.array(['a']),
                np.array(['2020'], 'datetime64[D]'), np.zeros(2, [('a', 'f4')])):
        with pytest.raises(TypeError, match=r"tree\['a'\]\[1\]"): save_state(tmp_path/'x', dict(a=[0, bad]))
    with pytest.raises(TypeError, match='dtype'): save_state(tmp_path/'x', dict(a=torch.zeros(2, dtype=torch.complex128)))
    assert not list(tmp_path.iterdir())

def test_training_state_comes_back_bitwise(tmp_path):
    def begin():
        nn = torch.nn
        with seeded(0): net = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 2))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    def steps(parts, n):
        net, optimizer, schedule = parts
        for _ in range(n):
            optimizer.zero_grad(); net(torch.randn(8, 5)).square().mean().backward(); optimizer.step(); schedule.step()
    before = rng_state()
    try:
        torch.manual_seed(1)
        whole = begin(); steps(whole, 20)
        torch.manual_seed(1)
        part = begin(); steps(part, 7)
        save_state(tmp_path/'a', dict(parts=[p.state_dict() for p in part], rng=rng_state()))
        torch.manual_seed(99); random.random(); np.random.rand()
        found, again = load_state(tmp_path/'a'), begin()
        for p, state in zip(again, found['parts']): p.load_state_dict(state)
        set_rng_state(found['rng']); steps(again, 13)
        for a, b in zip(whole[0].state_dict().values(), again[0].state_dict().values()): assert torch.equal(a, b)
    finally: set_rng_state(before)

# ---- seeds, threads, devices ---------------------------------------------------------------------------------------------------------
def test_seeded_restores_after_an_error():
    before = rng_state()
    with pytest.raises(RuntimeError), seeded(3): torch.rand(2); raise RuntimeError
    after = rng_state()
    assert torch.equal(before['torch'], after['torch']) and before['python'] == after['python']
    assert (before['numpy']['state']['key'] == after['numpy']['state']['key']).all()
    for bad in (-1, 2**32, 1.0, None, True):
        with pytest.raises(ValueError, match='seed='), seeded(bad): pass

def test_devices_and_threads():
    for bad in ('gpu', 'cuda:77', 'cpu:x', 3.5, 'meta'):
        with pytest.raises(ValueError, match='device='): check_device(bad)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda'.*'cpu'"): check_device('cuda')
    n = torch.get_num_threads()
    with pytest.raises(KeyError), threads(3): assert torch.get_num_threads() == 3; raise KeyError
    assert torch.get_num_threads() == n
    assert json.loads(json.dumps(environment())) == environment() and environment()['cores'] >= 1
