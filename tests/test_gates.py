"""Gates that prune (`relax.gates`) and feature selection (`relax.features`): what a user of the exported names may count on."""
import copy, pickle, sys
from unittest.mock import patch
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from nas_nb.core.protocol import Protocol
from nas_nb.relax.gates import GatedModel, GateLayer, HeadAttention, gate
from nas_nb.relax.features import EmptySelection, FeatureGate, FeatureSelector, binary_concrete

class Residual(nn.Module):
    "Two residual blocks with batch norm and a stride, a concatenation, and a head behind average pooling."
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Hardswish(),
                                   nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.deep = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width, stride=2), nn.Sigmoid(), nn.Conv2d(width, 2*width, 1))
        self.skip, self.head = nn.Conv2d(width, 2*width, 1, stride=2), nn.Linear(4*width, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)
    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        x = torch.cat([self.deep(x) + self.skip(x), F.silu(self.skip(x))], dim=1)
        return self.head(torch.flatten(self.pool(x), 1))

class Transformer(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.embed, self.norm, self.attention = nn.Linear(5, d), nn.LayerNorm(d), nn.MultiheadAttention(d, 4, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 20), nn.GELU(), nn.Linear(20, d)), nn.Linear(d, 3)
    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(dim=1))

class Shared(nn.Module):
    "One layer called twice, two layers with one weight, and channels that are sliced."
    def __init__(self):
        super().__init__()
        self.first, self.twice, self.tied, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 8)
        self.tied.weight = self.twice.weight
        self.sliced, self.out = nn.Linear(4, 6), nn.Linear(8, 2)
    def forward(self, x):
        y = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(x))))))
        return self.out(torch.relu(self.last(self.tied(y)))) + self.sliced(torch.relu(x))[:, :2]

INPUTS = {Residual: (2, 3, 8, 8), Transformer: (2, 6, 5), Shared: (3, 4)}

def made(kind, seed=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind().to(dtype)
        x = torch.randn(INPUTS[kind], dtype=dtype)
        if kind is Residual:
            for _ in range(3): model(torch.randn(16, 3, 8, 8, dtype=dtype))      # running statistics that are not trivial
    return model.eval(), x

def parameters(m): return sum(p.numel() for p in m.parameters())

@pytest.mark.parametrize('kind', INPUTS)
@pytest.mark.parametrize('seed', range(4))
def test_harden_is_the_gated_network_made_smaller(kind, seed):
    model, x = made(kind, seed)
    before = copy.deepcopy(model.state_dict())
    gated = GatedModel(model, x, target=.5).eval()
    torch.testing.assert_close(gated(x), model(x), rtol=0, atol=1e-5)
    assert gated.full['parameters'] == parameters(model)
    with torch.no_grad(): gated.logits.copy_(torch.randn(gated.n_gates, generator=torch.Generator().manual_seed(seed)))
    small = gated.harden()
    torch.testing.assert_close(small(x), gated(x), rtol=0, atol=1e-5)
    assert type(small) is kind and parameters(small) == round(gated.cost('parameters').item()) < parameters(model)
    assert gated.cost('multiply_adds').item() < gated.full['multiply_adds']
    again = GatedModel(small, x)                     # counted on the small network itself: the predicted cost was right
    assert again.full['multiply_adds'] == pytest.approx(gated.cost('multiply_adds').item(), abs=1e-6)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), "the user's model was changed"

def test_multiply_adds_are_those_of_the_layers():
    "By hand: stem, two convolutions of the block, depthwise, pointwise, the skip called twice, the head."
    model, x = made(Residual)
    want = 64*27*8 + 2*64*9*64 + 16*9*8 + 16*8*16 + 2*16*8*16 + 32*5
    assert GatedModel(model, x).full['multiply_adds'] == want

def test_hardened_network_trains_and_loads():
    model, x = made(Residual)
    gated = GatedModel(model, x)
    with torch.no_grad(): gated.logits[::2] = -1.
    small, twin = gated.harden().train(), gated.harden().train()
    optimizer = torch.optim.SGD(small.parameters(), lr=.1)
    F.cross_entropy(small(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in small.parameters())
    optimizer.step()
    twin.load_state_dict(small.state_dict())
    torch.testing.assert_close(twin(x), small(x))
    pickle.loads(pickle.dumps(small))
    assert small.stem[0].weight.is_contiguous()

def test_training_closes_gates_to_the_target():
    model, x = made(Residual)
    gated = GatedModel(model, x, target=.3, strength=5.).train()
    optimizer, speech = torch.optim.Adam(gated.parameters(), lr=.01), Protocol(gated)
    for _ in range(60):
        optimizer.zero_grad()
        speech.penalty(F.cross_entropy(gated(x), torch.tensor([0, 1]))).backward()
        assert gated.logits.grad.isfinite().all()
        optimizer.step()
    assert abs(gated.share().item() - .3) < .1
    assert 0 < int(gated.gates().sum()) < gated.n_gates

def test_state_dict_copies_and_pickles():
    model, x = made(Transformer)
    gated, other = GatedModel(model, x), GatedModel(made(Transformer, 1)[0], x)
    with torch.no_grad(): gated.logits[::3] = -1.
    assert set(gated.state_dict()) == {'logits', *(f'model.{k}' for k in gated.model.state_dict())}
    other.load_state_dict(gated.state_dict())
    for twin in (other, copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        torch.testing.assert_close(twin.eval()(x), gated.eval()(x))
        torch.testing.assert_close(twin.harden()(x), gated(x), rtol=0, atol=1e-5)

def test_no_layer_closes():
    model, x = made(Transformer)
    gated = GatedModel(model, x)
    with torch.no_grad(): gated.logits.fill_(-1.)
    small = gated.harden()
    assert small.attention.heads == 1 and small.mlp[1].out_features == 1
    assert gated(x).isfinite().all() and small(x).isfinite().all()

def test_gates_leave_no_hook_behind():
    model, x = made(Residual)
    gated = GatedModel(model, x)
    with pytest.raises(RuntimeError): gated(x[:, :1])
    assert not any(m._forward_pre_hooks for m in gated.modules())

def test_gate_gradient_reaches_every_gate():
    model, x = made(Residual)
    gated = GatedModel(model, x)
    (gated(x).square().sum()).backward()
    assert gated.logits.grad.isfinite().all() and (gated.logits.grad != 0).float().mean() > .9

def test_global_rng_and_modes_are_left_alone():
    model, x = made(Residual)
    model.train(); model.block.eval()
    state = torch.get_rng_state()
    gated = GatedModel(model, x)
    gated.harden()
    assert torch.equal(state, torch.get_rng_state())
    assert gated.model.training and not gated.model.block.training and not gated.harden().block.training

class Branching(nn.Module):
    def __init__(self): super().__init__(); self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.layer(x) if x.sum() > 0 else -self.layer(x))

@pytest.mark.parametrize('error, word, make', [
    (TypeError, 'nn.Module', lambda: GatedModel(len, torch.zeros(1, 3))),
    (ValueError, 'traceable', lambda: GatedModel(Branching(), torch.zeros(1, 3))),
    (ValueError, 'found none', lambda: GatedModel(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.zeros(1, 3))),
    (ValueError, 'target', lambda: GatedModel(*made(Residual), target=1.5)),
    (ValueError, 'strength', lambda: GatedModel(*made(Residual), strength=-1.)),
    (ValueError, 'slope', lambda: GatedModel(*made(Residual), slope='two')),
    (ValueError, 'batch_first', lambda: HeadAttention.of(nn.MultiheadAttention(4, 2))),
    (ValueError, 'NaN', lambda: gate(torch.tensor([float('nan')]))),
    (ValueError, 'at least 1', lambda: GateLayer(0)),
    (ValueError, 'tau', lambda: binary_concrete(torch.zeros(2), float('nan'))),
    (ValueError, 'each', lambda: FeatureGate(2, each='column')),
])
def test_bad_input(error, word, make):
    with pytest.raises(error, match=word): make()

# --- features -----------------------------------------------------------------------------------------------------------------------

def additive(rows=300, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 8))
    return X, 2*X[:, 1] - 2*X[:, 4]

def test_selector_is_a_scikit_learn_selector():
    from sklearn.base import clone
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline
    import pandas as pd
    X, y = additive()
    selector = FeatureSelector('reg', balance=.3, epochs=80)
    assert clone(selector).get_params() == selector.get_params()
    pipe = make_pipeline(selector, LinearRegression()).fit(X, y)
    assert selector.get_support(indices=True).tolist() == [1, 4] and pipe.score(X, y) > .999
    frame = pd.DataFrame(X, columns=list('abcdefgh'))
    assert clone(selector).fit(frame, y).get_feature_names_out().tolist() == ['b', 'e']
    restored = pickle.loads(pickle.dumps(selector))
    assert np.array_equal(restored.transform(X), selector.transform(X))

def test_selector_leaves_the_global_rng_alone_and_follows_its_seed():
    X, y = additive(100)
    torch.manual_seed(3); np.random.seed(3)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    fits = [FeatureSelector('reg', balance=.001, epochs=3, seed=s).fit(X, y).scores_ for s in (0, 0, 1)]
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    assert np.array_equal(fits[0], fits[1]) and not np.array_equal(fits[0], fits[2])

def test_three_classes_of_very_different_size():
    rng = np.random.default_rng(0)
    y = rng.choice(['many', 'some', 'few'], p=[.8, .15, .05], size=500)
    X = rng.normal(size=(500, 6))
    X[:, 2] += 3*(y == 'few')
    X[:, 5] += 3*(y == 'some')
    assert FeatureSelector(balance=.1, epochs=60).fit(X, y).get_support(indices=True).tolist() == [2, 5]

def test_an_empty_mask_is_an_error_and_never_a_result():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 5)), rng.integers(0, 2, 200)      # nothing to be found
    with pytest.raises(EmptySelection, match='balance=5'): FeatureSelector(balance=5., epochs=30).fit(X, y)
    with patch('nas_nb.relax.features.PRICES', (5.,)), pytest.raises(EmptySelection, match='any price'):
        FeatureSelector(epochs=30).fit(X, y)

def test_constant_columns_are_harmless():
    X, y = additive(200)
    X[:, 0] = 7.
    assert FeatureSelector('reg', balance=.3, epochs=80).fit(X, y).scores_.shape == (8,)

def test_missing_entmax_names_the_extra():
    from nas_nb.relax.sparse import Entmax
    with patch.dict(sys.modules, {'entmax': None}), pytest.raises(ImportError, match=r"nas_nb\[sparse\]"): Entmax()
