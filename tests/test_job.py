"""The main job end to end, as a user's shell runs it: exit statuses, the run folder, kill and resume, interruption.

A server (this file run as a script) imports what the command imports, once, and forks a process for every command line: a start without
the seconds of imports. The undisturbed run and all that are killed or interrupted are processes of their own, as from a shell."""
import csv, json, os, re, shutil, signal, subprocess, sys, time, traceback
from pathlib import Path
import pytest, torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
TINY = ['--samples', '40', '--epochs', '2', '--retrain-epochs', '2', '--channels', '4', '--lambdas', '0,0.5']

def command(*args): return [sys.executable, '-c', 'from nas_nb.search.cli import main; main()', *map(str, args)]
def environment(): return {**os.environ, 'PYTHONPATH': str(ROOT), 'NAS_NB_PROGRESS': '0', 'OMP_NUM_THREADS': '1'}

# --- the server

def serve():
    "Read [arguments, folder, file for stdout, file for stderr] as JSON lines; run `nas_search` in a fork and print its exit status."
    from nas_nb.search import job, report   # noqa: F401  what the command imports when it has read its arguments
    from nas_nb.search.cli import main
    for line in sys.stdin:
        args, cwd, *files = json.loads(line)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.chdir(cwd)
                for fd, name in zip((1, 2), files): os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
                sys.argv = ['nas_search', *args]
                main()
            except SystemExit as e: status = e.code or 0
            except BaseException: traceback.print_exc()
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

@pytest.fixture(scope='module')
def shell(tmp_path_factory):
    "`shell(*arguments, cwd=folder)`: what `nas_search` with these arguments printed, and its exit status."
    server = subprocess.Popen([sys.executable, __file__], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = tmp_path_factory.mktemp('said')
    def run(*args, cwd):
        files = [str(said/name) for name in ('stdout', 'stderr')]
        print(json.dumps([[*map(str, args)], str(cwd), *files]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(args, status, *(Path(name).read_text() for name in files))
    yield run
    server.stdin.close(); server.wait()

# --- the tests

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The folder of a small finished run, undisturbed, and what the command printed."
    folder = tmp_path_factory.mktemp('job')
    done = subprocess.run(command(*TINY, '--out', 'run'), cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder/'run', done

def measured(finished, out, **changed):
    "Make `out` the folder of a run with the configuration `changed` that has measured its networks and died: those of the finished run."
    out.mkdir()
    for name in ('measurements.csv', 'measure.json'): shutil.copy(finished[0]/name, out)
    config = json.loads((finished[0]/'config.json').read_text())
    config['config'] |= changed
    (out/'config.json').write_text(json.dumps(config))
    return out

def report(folder): return json.loads((folder/'report.json').read_text())

def test_report_has_what_was_promised(finished):
    folder, done = finished
    r = report(folder)
    assert {'n_train', 'n_test', 'mean_rel_err', 'spearman', 'linear_mean_rel_err'} <= r['predictor'].keys()
    assert r['predictor']['n_train'] + r['predictor']['n_test'] == 40
    for n in r['networks']: assert {'lambda', 'genotype', 'params', 'latency_ms', 'latency_iqr_ms', 'val_acc', 'test_acc'} <= n.keys()
    assert [n['lambda'] for n in r['networks']] == [0., .5]
    assert sum(n['role'] == 'equal latency' for n in r['random']) == 5
    assert r['winner'] in [n['name'] for n in r['networks']]
    assert {'measure', 'predict', 'retrain', 'compare', 'total'} <= r['seconds'].keys()
    assert {'python', 'torch', 'threads', 'cpu'} <= r['env'].keys()
    assert r['task']['test_opened'] == 1
    for word in ('latency ms', 'winner', 'predictor error'): assert word in done.stdout
    assert done.stdout.count('\n') < 25

def test_page_is_self_contained(finished):
    page = (finished[0]/'report.html').read_text()
    assert page.count('<img alt="') == page.count('<img') >= 5
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page) and '<script' not in page

def test_measurements_are_rows_of_distinct_networks(finished):
    rows = list(csv.DictReader((finished[0]/'measurements.csv').open()))
    assert len(rows) == len({r['genotype'] for r in rows}) == 40
    assert all(float(r['latency_ms']) > 0 for r in rows)

def test_winner_is_a_plain_network_with_the_reported_accuracy(finished):
    from nas_nb.core.data import load_task
    from nas_nb.search.report import load_network
    network, task = load_network(finished[0]/'winner'), load_task('digits', seed=0)
    with torch.no_grad(): acc = (network(task.val.x).argmax(1) == task.val.y).float().mean().item()
    r = report(finished[0])
    assert abs(acc - next(n['val_acc'] for n in r['networks'] if n['name'] == r['winner'])) < 1e-6
    assert not any(type(m).__name__ in ('Choice', 'MixedCell') for m in network.modules())

def test_nothing_in_the_folder_executes_when_read(finished):
    assert not [p for p in finished[0].rglob('*') if p.suffix in ('.pt', '.pth', '.pkl', '.pickle', '.joblib')]
    with safe_open(finished[0]/'winner'/'weights.safetensors', 'pt') as f: assert list(f.keys())

def bits(folder):
    "Genotypes, accuracies and the winner's weights of a finished run: all that must not depend on an interruption."
    r = report(folder)
    facts = [(n['name'], n['genotype'], n['val_acc'], n['test_acc']) for n in r['networks'] + r['random']]
    with safe_open(folder/'winner'/'weights.safetensors', 'pt') as f: weights = {k: f.get_tensor(k) for k in f.keys()}
    return facts, r['winner'], weights

def same(a, b):
    assert a[:2] == b[:2]
    assert a[2].keys() == b[2].keys() and all(torch.equal(a[2][k], b[2][k]) for k in a[2])

def kill_when(out, there):
    "Start the job on `out` and SIGKILL it as soon as `there()`; False where it ended before."
    process = subprocess.Popen(command(*TINY, '--out', out, '--resume'), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not there() and process.poll() is None: time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL

def test_killed_and_resumed_is_bitwise_the_undisturbed_run(finished, shell, tmp_path):
    """SIGKILL in the second epoch of the second search, in the retraining and in the comparison, of one run that is resumed each time;
    measured rows are kept, everything after them is equal bit for bit."""
    out = measured(finished, tmp_path/'run')
    assert kill_when(out, lambda: any((out/'checkpoints').glob('search-lambda-0_5*.safetensors')))
    assert (out/'search-lambda-0.json').exists() and not (out/'retrain.json').exists()
    assert kill_when(out, lambda: (out/'search-lambda-0_5.json').exists())
    assert not (out/'randoms.json').exists()
    assert kill_when(out, lambda: (out/'retrain.json').exists())
    assert not (out/'report.json').exists()
    resumed = shell(*TINY, '--out', out, '--resume', cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    same(bits(out), bits(finished[0]))
    assert (out/'measurements.csv').read_bytes() == (finished[0]/'measurements.csv').read_bytes()

def test_measured_rows_survive_a_kill(shell, tmp_path):
    "With a budget that nothing can meet, the job ends when it has measured."
    out, args = tmp_path/'run', [*TINY, '--samples', '80', '--budget', '0.0001ms']
    process = subprocess.Popen(command(*args, '--out', out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    table, deadline = out/'measurements.csv', time.time() + 120
    while time.time() < deadline and not (table.exists() and table.read_text().count('\n') > 25): time.sleep(.01)
    process.send_signal(signal.SIGKILL); process.wait()
    before = table.read_text().splitlines()[1:]
    assert 25 <= len(before) < 80, 'the job was not killed while it measured'
    done = shell(*args, '--out', out, '--resume', cwd=tmp_path)
    assert done.returncode == 2 and 'reachable' in done.stderr, done.stderr
    after = table.read_text().splitlines()[1:]
    whole = before if before[-1].count(',') == after[0].count(',') else before[:-1]
    assert after[:len(whole)] == whole and len(after) == 80

def test_interrupt_says_how_to_go_on(tmp_path):
    # a shell's background jobs ignore the signal, and so would their children
    def interactive(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command(*TINY, '--out', 'my run'), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=interactive)
    while not (tmp_path/'my run'/'config.json').exists(): time.sleep(.05)
    time.sleep(1); process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--out 'my run' --resume" in err and 'Traceback' not in err

def test_second_run_needs_resume_or_overwrite(finished, shell):
    folder, _ = finished
    again = shell(*TINY, '--out', folder, cwd=folder.parent)
    assert again.returncode == 2 and '--resume' in again.stderr.replace('resume=True', '--resume') and again.stderr.count('\n') == 1
    resumed = shell(*TINY, '--out', folder, '--resume', cwd=folder.parent)
    assert resumed.returncode == 0 and 'winner' in resumed.stdout
    other = shell(*TINY, '--seed', '1', '--out', folder, '--resume', cwd=folder.parent)
    assert other.returncode == 2 and 'seed' in other.stderr

def test_impossible_budget_names_the_interval_before_the_search(finished, shell, tmp_path):
    out = measured(finished, tmp_path/'run', budget='0.0001ms')
    done = shell(*TINY, '--budget', '0.0001ms', '--out', out, '--resume', cwd=tmp_path)
    assert done.returncode == 2 and re.search(r'reachable are [\d.]+ to [\d.]+ ms', done.stderr) and done.stderr.count('\n') == 1
    assert not list(out.glob('search-*')), 'the search had begun'

def test_budget_is_kept_by_prediction(finished, shell, tmp_path):
    "A budget in microseconds; the one that nothing can meet is in milliseconds."
    reach = [float(r['latency_ms']) for r in csv.DictReader((finished[0]/'measurements.csv').open())]
    limit = sorted(reach)[len(reach)//2]
    budget = f'{1000*limit:.1f}us'
    out = measured(finished, tmp_path/'run', budget=budget)
    done = shell(*TINY, '--budget', budget, '--out', 'run', '--resume', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = report(out)['networks']
    assert [n['name'].split('=')[0] for n in found] == ['lambda', 'budget'] and found[1]['predicted_ms'] <= limit*1.001

def test_the_faster_path_is_measured_once_a_folder(tmp_path):
    from nas_nb.search.job import Job, JobConfig
    from nas_nb.space.cells import MixedCell
    from nas_nb.space.fast import FastMixedCell
    with Job(JobConfig(path='auto'), tmp_path/'run') as job:
        net, file = job.supernet(), tmp_path/'run'/'autotune.json'
        (key, (path, threads)), = json.loads(file.read_text()).items()
        kinds = dict(plain=MixedCell, fast=FastMixedCell)
        assert {type(m) for m in net.body if isinstance(m, MixedCell)} == {kinds.pop(path)}
        (other, kind), = kinds.items()
        file.write_text(json.dumps({key: [other, threads]}))                   # as if an earlier part of the run had found this
        assert {type(m) for m in job.supernet().body if isinstance(m, MixedCell)} == {kind}

def test_a_path_that_the_space_does_not_have_is_refused_before_the_folder_is_made(tmp_path):
    from nas_nb.search.job import Job, JobConfig
    from nas_nb.space.darts import darts_space
    with pytest.raises(ValueError, match="path='whole': net must be a CellSupernet"):
        Job(JobConfig(path='whole'), tmp_path/'run', space=darts_space((1, 8, 8), 10, C=4, cells=3))
    assert not (tmp_path/'run').exists()

def one_class(path):
    from PIL import Image
    (path/'only').mkdir(parents=True)
    for i in range(12): Image.new('L', (8, 8), i*20).save(path/'only'/f'{i}.png')

def npz(path, **arrays):
    import numpy as np
    np.savez(path, **arrays)

BAD = {
    'unknown data set': (['--data', 'no_such_set'], 'no_such_set'), 'unknown space': (['--space', 'elsewhere'], 'elsewhere'),
    'unknown device': (['--device', 'abacus'], 'abacus'), 'budget without unit': (['--budget', '0.8'], 'unit'),
    'budget not positive': (['--budget', '0ms'], '0ms'), 'budget of another kind': (['--budget', '3MB'], '3MB'),
    'lambda not a number': (['--lambdas', '0,much'], 'much'), 'lambda negative': (['--lambdas', '0,-1'], '-1'),
    'too few samples': (['--samples', '7'], 'samples=7'), 'no epochs': (['--epochs', '0'], 'epochs=0'),
    'too many stages': (['--stages', '9'], 'stages'), 'folder without classes': (['--data', 'empty'], 'empty'),
    'one class': (['--data', 'one'], 'class'), 'NaN in data': (['--data', 'nan.npz'], 'NaN|nan|finite'),
    'part without images': (['--data', 'few.npz'], 'part|class|least'), 'folder not writable': (['--out', 'file/run'], 'file')}
if not torch.cuda.is_available(): BAD['no CUDA'] = (['--device', 'cuda'], 'cuda')

@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_status_2(shell, name, tmp_path):
    import numpy as np
    (tmp_path/'empty').mkdir(); (tmp_path/'file').write_text('not a folder'); one_class(tmp_path/'one')
    x = np.random.default_rng(0).random((40, 8, 8)).astype('float32'); x[3, 2, 1] = np.nan
    npz(tmp_path/'nan.npz', x=x, y=np.arange(40) % 2); npz(tmp_path/'few.npz', x=np.ones((3, 8, 8), 'float32'), y=np.array([0, 1, 1]))
    args, named = BAD[name]
    args = args if '--out' in args else [*args, '--out', 'run']
    done = shell(*args, cwd=tmp_path)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert re.search(named, done.stderr), done.stderr
    assert 'Traceback' not in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr
    assert not (tmp_path/'run'/'measurements.csv').exists(), 'work was done before the input was checked'

def test_damaged_checkpoint_is_named_and_the_last_good_one_used(finished, shell, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(finished[0], out)
    for p in [*out.glob('search-lambda-0_5.json'), *out.glob('retrain*.json'), *out.glob('randoms.json'), *out.glob('compare.json'),
              *out.glob('report.*')]:
        p.unlink()
    newest = sorted((out/'checkpoints').glob('search-lambda-0_5*.safetensors'))[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    done = shell(*TINY, '--out', out, '--resume', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert newest.name in done.stderr
    same(bits(out), bits(finished[0]))

if __name__ == '__main__': serve()
