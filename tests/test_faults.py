"""Searches that die. Every method of the registry is killed by SIGKILL, in real processes at random
moments, and resumed to the bitwise result of the undisturbed run; losses that are not finite, full disks,
unwritable folders and second processes end with an error that loses nothing.

A server (this file run as a script) imports torch, with one thread, and forks a process for every search: it computes nothing itself,
so its children start clean. A child says by a shared byte what it is doing; the server waits until it is in a step, a write or the
selection, waits for a random part of the time that this took undisturbed, and kills. What the child was doing when it died is counted;
where that was something else, the moment is tried again, sooner. Three moments a method; NAS_NB_FLAGS=slow: 20.
NAS_NB_FAULT_JOBS: servers at work at once (default 2)."""
import hashlib, json, mmap, os, random, resource, signal, subprocess, sys, time, traceback, warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = 20 if 'slow' in os.environ.get('NAS_NB_FLAGS', '').split() else 3
JOBS = int(os.environ.get('NAS_NB_FAULT_JOBS', 2))
PHASES = ('start', 'step', 'write', 'selection', 'end')
TRIES = 3                                                       # kills for a moment, until one hits the phase that it was aimed at
FAULTS = ('nan', 'full', 'unwritable')

def method_names():
    from nas_nb.search.registry import METHODS
    return list(METHODS)

# --- the server and its children ----------------------------------------------------------------------------------------------------

class Watch:
    "Shared memory in which a child says what it does (byte 0) and how often it began to (a byte for each phase); `log`: with times."
    def __init__(self): self.memory, self.log = mmap.mmap(-1, 1 + len(PHASES)), []
    def now(self): return PHASES[self.memory[0]]
    def begun(self, phase): return self.memory[1 + PHASES.index(phase)]
    def enter(self, phase, count=True):
        i = PHASES.index(phase)
        self.memory[0] = i
        if count: self.memory[1 + i] += 1
        self.log.append((phase, self.begun(phase) if count else 0, time.perf_counter()))
    def around(self, cls, name, phase, stay=False):
        "Let the method `name` of `cls` enter `phase`, and come back to the phase before unless `stay`. In a child only."
        plain = getattr(cls, name)
        def watched(*args, **kwargs):
            before = self.now()
            if before == 'selection' and phase == 'step': return plain(*args, **kwargs)      # a selector that tunes
            self.enter(phase)
            result = plain(*args, **kwargs)
            if not stay: self.enter(before, count=False)
            return result
        setattr(cls, name, watched)

def small_search(name, watch=None, plugins=(), **how):
    "Three epochs of the method on the mini space, with what the method adds of its own plug-ins."
    from nas_nb.core.run import Checkpoints
    from nas_nb.search.driver import SearchState, run_search
    from nas_nb.search.plugin import Budget
    from nas_nb.search.registry import method_settings
    from nas_nb.space.mini import mini_space
    settings = method_settings(name, mini_space(), Budget(3, 20))
    settings['plugins'] = (*settings.get('plugins', ()), *plugins)
    if watch:
        watch.around(SearchState, 'begin_step', 'step', stay=True)
        watch.around(Checkpoints, 'save', 'write')
        watch.around(type(settings['select']), '__call__', 'selection', stay=True)
    result = run_search(mini_space().supernet(3), small_task(), **settings, seed=3, **how)
    if watch: watch.enter('end')
    return result

def small_task(kept=[]):   # noqa: B006  made once, in the server
    from nas_nb.space.mini import mini_task
    if not kept: kept.append(replace(mini_task(), train=mini_task().train.subset(range(120))))
    return kept[0]

def digest(result):
    "A number for everything that the search leaves behind: genotype, weights, statistics, optimizers, parts, history."
    from nas_nb.core.run import save_state
    # outside of the search the generators are the process's own
    tree = {k: v for k, v in result.state.snapshot().items() if k != 'rng'}
    path = save_state(Path(os.environ['NAS_NB_SCRATCH'])/f'digest-{os.getpid()}', dict(genotype=str(result.genotype), **tree))
    try: return hashlib.sha256(path.read_bytes()).hexdigest()
    finally: path.unlink()

def forked(work):
    "(pid, pipe): a child that writes the JSON of `work()`, or what it raised."
    read, write = os.pipe()
    pid = os.fork()
    if pid: os.close(write); return pid, read
    os.close(read)
    try: said = dict(result=work())
    except BaseException: said = dict(error=traceback.format_exc())
    with os.fdopen(write, 'w') as pipe: json.dump(said, pipe)
    os._exit(0)

def answer(child):
    "What a child that was not killed has to say; RuntimeError with its traceback where it failed."
    pid, read = child
    with os.fdopen(read) as pipe: text = pipe.read()
    os.waitpid(pid, 0)
    said = json.loads(text)
    if 'error' in said: raise RuntimeError(said['error'])
    return said['result']

def undisturbed(name):
    "(digest, [(phase, number, seconds)]) of a run that nobody kills."
    def work():
        watch = Watch()
        with scratch_folder() as folder: found = digest(small_search(name, watch, ckpt=folder))
        ends = {'selection': watch.log[-1][-1]}                 # with what it writes in between
        return found, [(phase, number, ends.get(phase, later) - at)
                       for (phase, number, at), (_, _, later) in zip(watch.log, watch.log[1:]) if number]
    return answer(forked(work))

def scratch_folder():
    from tempfile import TemporaryDirectory
    return TemporaryDirectory(dir=os.environ['NAS_NB_SCRATCH'])

def killed(name, folder, phase, number, delay):
    "Kill a search `delay` seconds after it began `phase` for the `number`-th time; what it was doing then."
    watch = Watch()
    def work():
        small_search(name, watch, ckpt=folder)
        signal.pause()                                          # the search is over: wait for the end
    pid, read = forked(work)
    deadline = time.perf_counter() + 120
    while watch.begun(phase) < number:
        if os.waitpid(pid, os.WNOHANG)[0] or time.perf_counter() > deadline:
            raise RuntimeError(f'{name}: never came to {phase} {number}: {os.fdopen(read).read()}')
        time.sleep(0 if phase != 'step' else 2e-4)
    if delay > 1e-3: time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    os.close(read)
    return watch.now()

def resumed(name, folder):
    def work():
        warnings.filterwarnings('error', message='checkpoint')  # nothing is even damaged
        return digest(small_search(name, ckpt=folder, resume=True))
    return answer(forked(work))

def moments(name, log, n):
    "`n` random moments (phase, number, delay): steps, writes and the selection in turn."
    draw = random.Random(name)
    kinds = ['step', 'write', 'selection']
    for i in range(n):
        phase, number, seconds = draw.choice([row for row in log if row[0] == kinds[i % 3]])
        yield phase, number, draw.random()*seconds

def survive(name, n):
    whole, log = undisturbed(name)
    rows = []
    for phase, number, delay in moments(name, log, n):
        for k in range(TRIES):                                  # what it was doing when it died may be over already: then at once
            with scratch_folder() as folder:
                died = killed(name, folder, phase, number, delay/(k + 1)**3)
                half = any(Path(folder).glob('.*.partial'))
                rows.append(dict(aimed=phase, died=died, half=half, survived=resumed(name, folder) == whole))
            if died == phase: break
    return rows

# --- faults that raise ---------------------------------------------------------------------------------------------------------------

def fault(kind):
    """A search that meets the fault at the end of epoch 2, or in epoch 3: what it said, what is in its folder,
    and whether it resumes to the undisturbed result."""
    from nas_nb.core.run import Checkpoints
    from nas_nb.search.driver import Plugin, SearchDiverged
    folder, small = Path(), resource.getrlimit(resource.RLIMIT_FSIZE)
    class Trouble(Plugin):
        on = False
        def after_a(self, s):
            if self.on and kind == 'nan' and (s.epoch, s.step % 3) == (2, 1): s.w[0].data.fill_(float('nan'))
        def epoch_end(self, s):
            if not self.on or s.epoch != 2: return
            if kind == 'full': resource.setrlimit(resource.RLIMIT_FSIZE, (1000, small[1]))      # the disk takes 1,000 bytes more
            if kind == 'unwritable': folder.chmod(0o500)
    def run(on, **how):
        trouble = Trouble()
        trouble.on = on
        return small_search('gumbel', plugins=(trouble,), **how)
    # root may write anywhere
    if kind == 'unwritable' and os.geteuid() == 0: os.chmod('.', 0o700); os.chown('.', 65534, 65534); os.seteuid(65534)
    whole = run(False).state.snapshot()
    try: run(True, ckpt=folder)
    except (SearchDiverged, OSError) as e: said = f'{type(e).__name__}: {e}'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, small)
        folder.chmod(0o700)
    files = sorted(p.name for p in folder.iterdir())
    epoch = Checkpoints(folder, 'search').latest()[1]['state']['epoch']
    again = run(False, ckpt=folder, resume=True).state.snapshot()
    import torch
    same = all(torch.equal(v, again['net'][k]) for k, v in whole['net'].items())
    return dict(said=said, files=files, epoch=epoch, same=same)

def trouble(kind):
    def work():
        with scratch_folder() as folder:
            os.chdir(folder)                                   # by its relative name: another user may not walk here from the root
            try: return fault(kind)
            finally: os.seteuid(0) if os.getuid() == 0 else None
    return answer(forked(work))

def serve():
    "Read (what, name) pairs as JSON from the command line; print a JSON line for each."
    import torch
    import torch._dynamo   # noqa: F401  what the first optimizer would import in every child
    torch.set_num_threads(1)
    small_task(); method_names()
    for what, name in json.loads(sys.argv[1]):
        start = time.perf_counter()
        try: said = dict(result=survive(name, MOMENTS) if what == 'method' else trouble(name))
        except ImportError as e: said = dict(missing=str(e))
        except Exception as e: said = dict(missing=str(e)) if 'ImportError' in str(e) else dict(error=traceback.format_exc())
        print(json.dumps(dict(what=what, name=name, seconds=time.perf_counter() - start, **said)), flush=True)

# --- the tests -----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def found(request, tmp_path_factory):
    "(what, name) -> what the servers said, for the tests that were selected."
    mine = [i.callspec.params for i in request.session.items if i.fspath == request.fspath and hasattr(i, 'callspec')]
    wanted = [(p['what'], p['name']) for p in mine if 'what' in p]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'NAS_NB_PROGRESS': '0', 'NAS_NB_SCRATCH': str(tmp_path_factory.mktemp('faults')),
                        'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])}
    servers = [subprocess.Popen([sys.executable, __file__, json.dumps(wanted[i::JOBS])], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(JOBS)]
    said = {}
    for server in servers:
        out, err = server.communicate(timeout=3600)
        assert server.returncode == 0, err
        said |= {(row['what'], row['name']): row for row in map(json.loads, out.splitlines())}
    return said

def result(found, what, name):
    row = found[what, name]
    if 'missing' in row: pytest.skip(row['missing'].strip().splitlines()[-1])
    assert 'error' not in row, row['error']
    return row['result']

@pytest.mark.parametrize('what,name', [('method', name) for name in method_names()])
def test_killed_at_random_moments_and_resumed_is_bitwise_the_undisturbed_run(found, what, name):
    rows = result(found, what, name)
    assert len(rows) >= MOMENTS and all(row['survived'] for row in rows), rows

def test_how_many_were_survived(found, capsys):
    """Prints survived / tried for each method, and what the searches were doing when they died. Taken together some died in a step, some
    in a write and some in the selection; of 20 moments a method some left a file half written."""
    tried = {name: row['result'] for (what, name), row in found.items() if what == 'method' and 'result' in row}
    every = [row for rows in tried.values() for row in rows]
    def line(name, rows):
        doing = Counter(row['died'] for row in rows)
        return (f'{name:<18}{sum(row["survived"] for row in rows):>3} / {len(rows)} survived; '
                f'died in {", ".join(f"{p} {doing[p]}" for p in PHASES if doing[p])}; half written {sum(row["half"] for row in rows)}')
    with capsys.disabled():
        print()
        for name, rows in (tried | {'all': every}).items(): print(line(name, rows))
    if len(tried) <= 5: return                                 # a selection of methods: some are over too fast
    for phase, least in dict(step=len(tried)/3, write=len(tried)/3, selection=1).items():
        hit = sum(row['aimed'] == row['died'] == phase for row in every)
        assert hit >= least, f'too few died in a {phase}: {hit}'
    assert MOMENTS < 20 or any(row['half'] for row in every), 'no file was half written'

SAID = {'nan': r'SearchDiverged: the train loss is nan in epoch 3, step 2 of 3', 'full': r'OSError: .*File too large',
        'unwritable': r'PermissionError: .*Permission denied'}

@pytest.mark.parametrize('what,name', [('fault', name) for name in FAULTS])
def test_an_error_loses_nothing(found, what, name):
    """The error says what happened; the last good checkpoint is readable, nothing half written lies beside it,
    and the search resumes to the undisturbed result."""
    import re
    row = result(found, what, name)
    assert re.match(SAID[name], row['said']), row['said']
    assert row['epoch'] == (2 if name == 'nan' else 1) and row['same']
    assert row['files'] == [f'search-{i:09d}.safetensors' for i in range(1, row['epoch'] + 1)]

def test_a_second_job_on_the_folder_is_refused(tmp_path):
    """While `nas_search` is at work, another one on its folder ends with status 2 and one line that names the process;
    the first does not notice."""
    command = [sys.executable, '-c', 'from nas_nb.search.cli import main; main()', '--samples', '200', '--out', 'run']
    env = os.environ | {'PYTHONPATH': str(ROOT), 'NAS_NB_PROGRESS': '0', 'OMP_NUM_THREADS': '1'}
    first = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not (tmp_path/'run'/'config.json').exists():
            assert first.poll() is None and time.time() < deadline
            time.sleep(.02)
        for flag in ('--resume', '--overwrite'):
            second = subprocess.run([*command, flag], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert second.returncode == 2 and second.stderr.count('\n') == 1, second.stderr
            assert f'in use by process {first.pid}' in second.stderr
        assert first.poll() is None and (tmp_path/'run'/'config.json').exists()
    finally: first.kill(); first.wait()

if __name__ == '__main__': serve()
