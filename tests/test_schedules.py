"""Schedules in a search and in a training loop: resumed in the middle, refused where they cannot work."""
import math
import pytest
import torch
from kill import KillAt, Killed
from nas_nb.relax.choice import Softmax
from nas_nb.relax.core import Constant, Cosine, Exponential, Linear, Schedule
from nas_nb.relax.sparse import SparseNoisySoftmax
from nas_nb.search.driver import Budget, run_search
from nas_nb.search.schedules import CosinePower, CosinePowerLR, cosine_power, supernet_gap

def test_a_search_on_a_cosine_power_resumes_bitwise(space, task, tmp_path):
    schedules = dict(w_lr=CosinePower(.05, .001, 10., warmup=.2), temperature=Exponential(1., .01))
    def run(kill, seed=0, schedules=schedules, **k):
        return run_search(space.supernet(seed), task, relax=SparseNoisySoftmax(Linear(1., 0.)), schedules=schedules, budget=Budget(4, 20),
                          plugins=[KillAt(kill)], **k)
    whole = run(-1)
    assert [row['w_lr'] for row in whole.history] == [schedules['w_lr'].value((2 * e - 1) / 8) for e in (1, 2, 3, 4)]
    with pytest.raises(Killed): run(5, ckpt=tmp_path)
    with pytest.raises(ValueError, match='schedules'):
        run(-1, schedules=dict(schedules, w_lr=CosinePower(.05, .001, 2., .2)), ckpt=tmp_path, resume=True)
    resumed = run(-1, seed=7, ckpt=tmp_path, resume=True)
    for a, b in zip(whole.state.net.state_dict().values(), resumed.state.net.state_dict().values()): assert torch.equal(a, b)

@pytest.mark.parametrize('p', [1., 1 + 1e-15, 1 + 1e-12, 1.5, 2., 10., 1e6])
def test_the_curve_falls_from_end_to_end_and_never_leaves_its_range(p):
    values = [cosine_power(e / 7, 100, .01, .5, p, warmup=3) for e in range(21, 701)]
    assert values[0] == .5 and values[-1] == .01 and all(.01 <= b <= a <= .5 for a, b in zip(values, values[1:]))
    assert isinstance(CosinePower(1., 0., p), Schedule) and hash(CosinePower(1., 0., p)) == hash(CosinePower(1., 0., p))

def test_it_works_with_any_optimizer_and_in_a_chain():
    w = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=.5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [torch.optim.lr_scheduler.ConstantLR(optimizer, 1., 3),
                                                                  CosinePowerLR(optimizer, 10)], [3])
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]['lr']); optimizer.step(); scheduler.step()
    assert rates[:3] == [.5] * 3 and rates[3:] == [cosine_power(e, 10, 0., .5) for e in range(10)]

def test_bad_numbers_are_named():
    for bad, name in [(dict(p=.5), 'p='), (dict(p=math.nan), 'p='), (dict(p=math.inf), 'p='), (dict(warmup=-1), 'warmup='),
                      (dict(warmup=10), 'warmup='), (dict(epoch=-1), 'epoch=')]:
        with pytest.raises(ValueError, match=name): cosine_power(**(dict(epoch=1, total=10, lo=0., hi=1.) | bad))
    with pytest.raises(ValueError, match='total='): CosinePowerLR(torch.optim.SGD([torch.zeros(1)], .1), 0)

def test_the_gap_is_the_fall_in_accuracy_and_looks_only(space, task):
    result = run_search(space.supernet(0), task, schedules=dict(temperature=Constant(1e-4)), budget=Budget(1, 20))
    before = {k: v.clone() for k, v in result.state.net.state_dict().items()}
    soft, hard = supernet_gap(result.state, space.genotype({'cell': result.state.net.arch['cell'].argmax(-1)}))
    assert soft == hard and result.state.net.training                        # at so small a temperature the supernet is that network
    for k, v in result.state.net.state_dict().items(): assert torch.equal(v, before[k])
    one = run_search(space.supernet(0), task, level='one', budget=Budget(1, 20))
    assert all(0 <= a <= 1 for a in supernet_gap(one.state, one.genotype))

def test_p_of_one_is_the_cosine_of_the_driver():
    assert all(math.isclose(CosinePower(.3, .1, 1.).value(t / 50), Cosine(.3, .1).value(t / 50), rel_tol=1e-13) for t in range(51))
    assert Softmax()(torch.zeros(2), CosinePower(1., .1).value(.5)).tolist() == [.5, .5]
