"""The table of methods from outside: every row gives fresh arguments, keeps to its level, goes together with a cost or says
why not, and is run by the main job."""
import os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from nas_nb.core.data import load_task
from nas_nb.cost.expected import LUTCost
from nas_nb.search.driver import run_search
from nas_nb.search.job import RECIPE, Job, JobConfig
from nas_nb.search.plugin import Budget, SearchRecipe
from nas_nb.search.registry import METHODS, check_keeps_limit, method_settings, register_method, search_methods, with_cost
from nas_nb.space.cells import nb201_space
from nas_nb.space.darts import darts_space
from nas_nb.space.mini import mini_space, mini_task

ROOT, BUDGET = Path(__file__).resolve().parent.parent, Budget(1, 20)
OWN_SELECTION = {'darts-pt', 'blank-pt'}

def settings(name, space, *args, **kwargs):
    if METHODS[name].extra == 'sparse': pytest.importorskip('entmax', reason="needs the extra: pip install 'nas_nb[sparse]'")
    return method_settings(name, space, *args, **kwargs)

@pytest.fixture(scope='module')
def task(): return replace(mini_task(), train=mini_task().train.subset(range(80)))

@pytest.fixture(scope='module')
def price():
    "The mean operation costs 1 ms."
    return LUTCost({'cell': torch.tensor([0., .2, 1., 2., 1.8]).repeat(3, 1)}, mini_space(), 'ms', .1)

@pytest.mark.parametrize('name', METHODS)
def test_a_row_keeps_its_word(name):
    one, two = (settings(name, mini_space(), BUDGET, recipe=SearchRecipe(a_lr=.05), seed=3) for _ in range(2))
    assert (one['seed'], one['budget'], one.get('level', 'bi')) == (3, BUDGET, METHODS[name].level)
    for key in ('hyper', 'relax', 'select', 'constraint'):
        if one.get(key) is not None: assert one[key] is not two[key], f'two searches share {key}'
    for a, b in zip(one.get('plugins', ()), two.get('plugins', ())): assert a is not b
    assert one['recipe'].a_lr == .05 or name not in ('darts', 'gumbel')
    import re
    assert re.fullmatch(r'\d{4}\.\d{4,5}', METHODS[name].paper) and METHODS[name].challenge
    assert settings(name, mini_space(), select=None)['select'] is None            # the caller has the last word

def test_the_row_of_the_main_job_is_what_the_job_always_did():
    s = method_settings('gumbel', mini_space(), BUDGET, RECIPE)
    assert (repr(s['relax']), type(s['select']).__name__, s['recipe'], s['schedules'], set(s)) == (
        'Gumbel(hard=False)', 'Magnitude', RECIPE, {}, {'relax', 'select', 'recipe', 'schedules', 'budget'})
    assert JobConfig().method == 'gumbel' and RECIPE == SearchRecipe(w_lr=.05, a_lr=.1)

@pytest.mark.parametrize('name', METHODS)
def test_a_method_goes_with_a_cost_or_says_why_not(name, task, price):
    own = lambda: settings(name, mini_space(), BUDGET, SearchRecipe(a_lr=.1))
    search = lambda **how: run_search(mini_space().supernet(0), task, **with_cost(name, own(), price, **how))
    result = search(lam=0.)
    least, most = price.bounds()
    assert least <= result.history[-1]['cost'] <= most, 'the expected cost of no distribution'
    cheap = search(lam=20.).history[-1]['cost']
    assert cheap < result.history[-1]['cost'] or name == 'blank-pt'               # its architecture does not move
    if name in OWN_SELECTION:
        with pytest.raises(ValueError, match=f"method='{name}'.*Perturbation keeps no limit.*lambdas"): search(limit='1ms')
    else: assert price.of(search(limit='1ms').genotype) <= 1

def test_selection_follows_the_space():
    reduced = darts_space((1, 12, 12), 10, C=2, cells=3, nodes=2)
    assert type(method_settings('darts', reduced)['select']).__name__ == 'MagnitudeTop2'
    check_keeps_limit('darts', method_settings('darts', reduced))                  # a limit may take its place

def test_a_method_of_a_user_is_one_call(tmp_path):
    register_method('mine', lambda space, budget: dict(level='one'), level='one', challenge='an example')
    try:
        assert search_methods().name.tolist()[-1] == 'mine'
        with Job(JobConfig(method='mine', samples=20, budget='1ms'), tmp_path/'run') as job: assert job.settings()['level'] == 'one'
    finally: del METHODS['mine']

@pytest.mark.parametrize('how, message', [(dict(method='evolution'), "method='evolution': unknown; allowed are darts"),
                                          (dict(method='darts-pt', budget='1ms'), 'Perturbation keeps no limit')])
def test_the_job_refuses_before_any_work(tmp_path, how, message):
    with pytest.raises(ValueError, match=message): Job(JobConfig(**how), tmp_path/'run')
    assert not (tmp_path/'run').exists()

@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    "A job of one search, as far as the predictor, from which the others start."
    folder = tmp_path_factory.mktemp('job')/'run'
    with Job(config('gumbel'), folder) as job: job.predictor()
    return folder

def config(method):
    return JobConfig(method=method, samples=24, epochs=1, retrain_epochs=1, channels=2, lambdas=(.5,), randoms=1, background=0)

@pytest.mark.parametrize('method', ['darts', 'maxw', 'darts-pt', 'r-darts'])
def test_the_job_runs_a_method_and_its_report_names_it(measured, tmp_path, method):
    import json, shutil
    shutil.copytree(measured, tmp_path/'run')
    described = json.loads((tmp_path/'run'/'config.json').read_text())
    described['config']['method'] = method
    (tmp_path/'run'/'config.json').write_text(json.dumps(described))
    with Job(config(method), tmp_path/'run', resume=True) as job: report = job.run()
    assert report['config']['method'] == method and f'Search method: {method}.' in (tmp_path/'run'/'report.html').read_text()
    with pytest.raises(ValueError, match=f"method: '{method}' there, 'rarts' now"): Job(config('rarts'), tmp_path/'run', resume=True)

def test_list_is_a_table_for_a_terminal():
    command = [sys.executable, '-c', 'from nas_nb.search.cli import main; main()', '--list']
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].split()[:4] == ['name', 'paper', 'challenge', 'level'] and len(lines) == 1 + len(METHODS)
    assert max(map(len, lines)) <= 120 and not done.stderr

def test_the_command_line_is_light():
    code = "import sys, nas_nb.search.cli; assert not {'torch', 'pandas', 'nas_nb.search.registry'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | {'PYTHONPATH': str(ROOT)})

def test_the_default_space_of_the_job_has_the_row():
    digits = load_task('digits', limit=100)
    space = nb201_space(in_shape=digits.shape, n_classes=digits.n_classes, C=2)
    assert run_search(space.supernet(0), digits, **method_settings('gumbel', space, BUDGET)).genotype.connected
