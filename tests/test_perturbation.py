"""Selection by perturbation from outside: killed in its middle, on the cells of DARTS, with other relaxations, and with bad input."""
import copy
from dataclasses import replace
import pytest
import torch
from torch import nn
from kill import KillAt, Killed
from nas_nb.core.run import Checkpoints
from nas_nb.relax.choice import Gumbel
from nas_nb.relax.core import Exponential
from nas_nb.relax.paths import BinaryGate
from nas_nb.relax.sparse import MaxW, NodeSigmoid
from nas_nb.search.driver import Budget, SearchRecipe, run_search
from nas_nb.search.perturbation import BlankArchitecture, Perturbation, discretization_accuracy, op_influence
from nas_nb.search.rarts import Split
from nas_nb.search.select import Magnitude
from nas_nb.space.darts import darts_space, robust_space
from nas_nb.space.gold import gold_space

BUDGET = Budget(epochs=1, batch_size=20)

@pytest.fixture(scope='module')
def cells(): return robust_space('s3', (1, 8, 8), C=2, cells=3, nodes=2)

def same(a, b):
    for (name, x), y in zip(a.state.net.state_dict().items(), b.state.net.state_dict().values()): assert torch.equal(x, y), name
    assert a.genotype == b.genotype and a.state.selection == b.state.selection and a.state.step == b.state.step
    assert all(torch.equal(p, q) for x, y in zip(a.state.w_opt.state.values(), b.state.w_opt.state.values())
               for p, q in zip(x.values(), y.values()))

# --- killed and resumed ----------------------------------------------------------------------------------------------------------------

SEARCHES = {'first order': dict(), 'gumbel': dict(relax=Gumbel(), schedules=dict(temperature=Exponential(2., .5))),
            'blank': dict(blank=True), 'gates': dict(relax=BinaryGate()), 'two gates': dict(relax=BinaryGate('two')),
            'split': dict(hyper=True), 'max-w': dict(relax=MaxW()),
            'noise per sample': dict(relax=Gumbel(), recipe=SearchRecipe(per_sample=True))}

@pytest.mark.parametrize('where, name', [*[('space', name) for name in SEARCHES], ('cells', 'first order'), ('cells', 'gates')])
def test_a_selection_killed_in_its_middle_resumes_bitwise(name, where, task, request, tmp_path):
    space, how = request.getfixturevalue(where), dict(SEARCHES[name])
    blank, hyper = how.pop('blank', False), how.pop('hyper', False)
    def run(kill, seed=3, **k):
        plugins = [KillAt(kill), *([BlankArchitecture()] if blank else [])]
        return run_search(space.supernet(seed), task, select=Perturbation(tune_epochs=1), budget=BUDGET, seed=3, plugins=plugins,
                          **(dict(hyper=Split()) if hyper else {}), **how, **k)
    whole = run(-1)
    assert whole.state.selection['round'] == dict(space=3, cells=6)[where]
    # 2 steps an epoch: in the first and second step of round 1, and in round 2
    for kill in (2, 3, 5) if where == 'space' else (5,):
        folder = tmp_path/str(kill)
        with pytest.raises(Killed): run(kill, ckpt=folder)
        assert Checkpoints(folder, 'search').latest()[1]['state'].get('selection', {}).get('round', 0) == (kill - 2) // 2
        same(whole, run(-1, seed=8, ckpt=folder, resume=True))
    same(whole, run(-1, seed=9, ckpt=folder, resume=True))                     # resuming what is finished changes nothing

def test_another_selector_or_other_settings_do_not_go_on(space, task, tmp_path):
    def run(select, **k): return run_search(space.supernet(0), task, select=select, budget=BUDGET, ckpt=tmp_path, **k)
    run(Perturbation(tune_epochs=1))
    with pytest.raises(ValueError, match="select: 'Perturbation' there, 'Magnitude' now"): run(Magnitude(), resume=True)
    with pytest.raises(ValueError, match='was begun by'): run(Perturbation(tune_epochs=2), resume=True)

# --- what is selected ------------------------------------------------------------------------------------------------------------------

def test_cells_of_darts_get_two_inputs_for_every_node_and_no_none(cells, task):
    result = run_search(cells.supernet(0), task, select=Perturbation(tune_epochs=1), budget=BUDGET)
    chosen = cells.decided(result.genotype)
    assert set(chosen) == {'normal', 'reduce'}
    for edges in chosen.values(): assert [t for _, t, _ in edges] == [2, 2, 3, 3]
    found = result.state.selection
    by_node = [d for d in found['decisions'] if 'node' in d]
    assert [sum('op' in d for d in found['decisions']), len(by_node)] == [10, 2]
    assert found['evaluations'] == 10 * 2 + 2 * 3                             # 2 operations besides 'none'; node 3 has three edges
    assert found['tuning_steps'] == 5 * 2 and result.state.step == 2 + 10     # six rounds, no tuning after the last
    for d in by_node: assert d['acc'][d['dropped']] == max(d['acc'].values()) and found['rows'][d['group']][d['dropped']] == -2
    for d in found['decisions']: assert 'node' in d or list(d['acc']) == [1, 2]
    three = run_search(cells.supernet(0), task, select=Perturbation(tune_epochs=0, inputs=3), budget=BUDGET)
    assert [len(edges) for edges in cells.decided(three.genotype).values()] == [5, 5] and three.state.step == 2

def test_the_space_of_darts_itself(task):
    space = darts_space((1, 8, 8), C=2, cells=3, nodes=2)
    result = run_search(space.supernet(0), replace(task, train=task.train.subset(range(16))), select=Perturbation(tune_epochs=0),
                        budget=Budget(1, 8))
    assert [len(edges) for edges in space.decided(result.genotype).values()] == [4, 4]
    assert result.state.selection['evaluations'] == 10 * 7 + 2 * 3

def test_tables_of_operations_are_respected(task):
    space = robust_space('s1', (1, 8, 8), C=2, cells=3)
    result = run_search(space.supernet(0), replace(task, train=task.train.subset(range(16))), select=Perturbation(tune_epochs=0),
                        budget=Budget(1, 8))
    assert [len(edges) for edges in space.decided(result.genotype).values()] == [8, 8]
    assert result.state.selection['evaluations'] == 2 * (14 * 2 + 3 + 4 + 3 + 5 + 4 + 3)

def test_the_network_is_connected_even_where_none_looks_best(space, task):
    "A head without weights: all accuracies and losses are equal, so the first operation wins, and that is 'none'"
    net = space.supernet(0)
    with torch.no_grad(): net.head[-1].weight.zero_()
    result = run_search(net, task, select=Perturbation(tune_epochs=0), budget=BUDGET, recipe=SearchRecipe(w_lr=1e-30))
    assert result.genotype.connected and all(len(set(d['acc'].values())) == 1 for d in result.state.selection['decisions'])
    assert sum(op == 'none' for _, _, op in result.genotype.cells[0].edges) == 2

def test_ties_in_accuracy_are_broken_by_the_loss():
    select = Perturbation()
    tried = {0: (.5, 1.), 1: (.4, 1.2), 2: (.4, 1.3)}
    assert min(tried, key=lambda k: select.goodness(tried[k])) == 2 and max(tried, key=lambda k: select.goodness(tried[k])) == 0
    by_loss = Perturbation('loss')
    tried = {0: (.3, 1.), 1: (.4, 1.3), 2: (.2, 1.3)}
    assert min(tried, key=lambda k: by_loss.goodness(tried[k])) == 2

# --- what is left alone ----------------------------------------------------------------------------------------------------------------

def test_evaluation_moves_nothing_and_judging_leaves_the_state(space, task):
    s = run_search(space.supernet(0), task, budget=BUDGET).state
    before, random_state = copy.deepcopy(s.snapshot()), torch.get_rng_state()
    influence = op_influence(s, ('cell', 1), 'loss')
    first = discretization_accuracy(s, ('cell', 1), 3, epochs=1)
    assert torch.equal(influence, op_influence(s, ('cell', 1), 'loss')) and first == discretization_accuracy(s, ('cell', 1), 3, epochs=1)
    after = s.snapshot()
    for name, value in before['net'].items(): assert torch.equal(value, after['net'][name]), name
    assert (before['step'], before['sources'], before['selection']) == (after['step'], after['sources'], after['selection'])
    assert torch.equal(random_state, torch.get_rng_state()) and s.net.training and all(m.track_running_stats for m in s.norms)
    W = {'cell': s.net.arch['cell'].detach().softmax(-1)}
    assert s.decide(W) is W

def test_running_statistics_play_no_part(space, task):
    "The same influence after the statistics have been spoiled"
    s = run_search(space.supernet(0), task, budget=BUDGET).state
    before = op_influence(s, ('cell', 0), 'loss')
    for m in s.norms: m.running_mean.add_(5.)
    assert torch.equal(before, op_influence(s, ('cell', 0), 'loss'))

def test_dropout_is_off_while_influence_is_measured(space, task):
    net = space.supernet(0)
    net.head = nn.Sequential(*net.head[:-1], nn.Dropout(.9), net.head[-1])
    s = run_search(net, task, budget=BUDGET).state
    assert torch.equal(op_influence(s, ('cell', 0), 'loss'), op_influence(s, ('cell', 0), 'loss')) and s.net.head[-2].training

def test_a_decided_edge_gets_no_gradient_and_only_its_operation_runs(space, task):
    calls = []
    result = run_search(space.supernet(0), task, select=Perturbation(tune_epochs=0), plugins=[BlankArchitecture()], budget=BUDGET)
    s, rows = result.state, result.state.selection['rows']['cell']
    assert float(s.net.arch['cell'].abs().sum().detach()) == 0                # blank: the logits never moved
    from nas_nb.search.perturbation import _put
    W = _put({'cell': s.net.arch['cell'].softmax(-1)}, {'cell': [rows[0], -1, rows[2]]})
    grad, = torch.autograd.grad((W['cell'] * torch.randn(3, 5)).sum(), [s.net.arch['cell']])
    assert not grad[0].any() and grad[1].any() and not grad[2].any()
    for i, choice in enumerate(s.net.body[0].choices):
        for name, op in choice.ops.items(): op.register_forward_hook(lambda *_, i=i, name=name: calls.append((i, name)))
    with torch.no_grad(): s.net(task.train.x[:2], _put({'cell': s.net.arch['cell'].softmax(-1)}, s.selection['rows']))
    assert set(calls) == {(i, space.op_names[op]) for i, op in enumerate(rows) if space.op_names[op] != 'none'}

# --- bad input -------------------------------------------------------------------------------------------------------------------------

def test_bad_arguments_are_named(space, task):
    for bad in (dict(criterion='f1'), dict(order='sorted'), dict(lr_scale=0.), dict(lr_scale=2.), dict(tune_epochs=-1),
                dict(tune_epochs=1.5), dict(inputs=0)):
        with pytest.raises(ValueError, match=next(iter(bad))): Perturbation(**bad)
    s = run_search(space.supernet(0), task, budget=BUDGET).state
    for edge in (('cell', 3), ('cell', -1), ('reduce', 0), 1, ('cell', 0, 0)):
        with pytest.raises(ValueError, match='edge='): op_influence(s, edge)
    with pytest.raises(ValueError, match='criterion'): op_influence(s, ('cell', 0), 'f1')
    with pytest.raises(ValueError, match='op='): discretization_accuracy(s, ('cell', 0), 5)
    with pytest.raises(ValueError, match='epochs='): discretization_accuracy(s, ('cell', 0), 1, epochs=-1)

def test_no_images_for_validation_is_said_before_the_search(space, task):
    with pytest.raises(ValueError, match="level='one' with Perturbation"):
        run_search(space.supernet(0), task, level='one', select=Perturbation(), budget=BUDGET)
    s = run_search(space.supernet(0), task, level='one', budget=BUDGET).state
    with pytest.raises(ValueError, match="level='one'"): op_influence(s, ('cell', 0))
    with pytest.raises(ValueError, match="level='one'"): discretization_accuracy(s, ('cell', 0), 0)

def test_a_supernet_that_is_one_hot_already_is_refused(space, task):
    net = space.supernet(0)
    with torch.no_grad(): net.arch['cell'][:, 3] = 50.
    with pytest.raises(ValueError, match='one-hot on every edge already'): run_search(net, task, select=Perturbation(), budget=BUDGET)

def test_spaces_with_several_operations_on_an_edge_are_refused(task):
    space = gold_space((1, 8, 8), C=2, cells=3, nodes=1)
    with pytest.raises(TypeError, match='several operations'):
        run_search(space.supernet(0), task, relax=NodeSigmoid(), select=Perturbation(), budget=BUDGET)
