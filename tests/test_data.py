"""Every source of `load_task`, every bad input, and that no split learns from another."""
import io, json, sys
import numpy as np
import pytest
import torch
from PIL import Image
from nas_nb.core import data as core_data
from nas_nb.core.data import Batches, Sealed, Source, SOURCES, Split, Task, data_home, from_arrays, load_task, stratified, translated_digits
from nas_nb.core.run import DamagedFile

rng = np.random.default_rng(0)

def refused(*args, said, error=ValueError, **kw):
    "`load_task` refuses with `error`, whose text holds each of `said`."
    with pytest.raises(error) as e: load_task(*args, **kw)
    for s in [said] if isinstance(said, str) else said: assert s in str(e.value), str(e.value)

def npz(path, **arrays):
    np.savez(path, **arrays)
    return path

def arrays(n=60, shape=(5, 5), k=3): return rng.integers(0, 256, (n, *shape)).astype('uint8'), np.arange(n) % k

def picture(path, level=0, shape=(9, 7, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((level + rng.integers(0, 40, shape)).astype('uint8')).save(path)

def pets(root, n=10, classes=('cat', 'dog'), **kw):
    for j, c in enumerate(classes):
        for i in range(n): picture(root/c/f'{i}.png', 60 * j, **kw)
    return root

def assert_sound(task):
    "Laws of every task: shapes, types, classes in every part, standardised by the training part."
    parts = dict(train=task.train, val=task.val, test=task.test.open())
    for name, s in parts.items():
        assert s.x.shape[1:] == task.shape and s.x.dtype == torch.float32 and s.y.dtype == torch.int64 and torch.isfinite(s.x).all()
        assert set(s.y.tolist()) == set(range(task.n_classes)), name
    if task.mean:
        assert len(task.mean) == len(task.std) == task.shape[0]
        assert task.train.x.mean((0, 2, 3)).abs().max() < 1e-4
        assert (task.train.x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3

def unstandardised(task):
    "All images of the task as they were before the standardisation."
    images = torch.cat([part.x for part in (task.train, task.val, task.test.open())])
    return images * torch.tensor(task.std)[:, None, None] + torch.tensor(task.mean)[:, None, None]

# ---- bundled -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', SOURCES)
def test_bundled(name):
    task = load_task(name)
    assert_sound(task)
    again, other = load_task(name), load_task(name, seed=1)
    assert torch.equal(task.train.x, again.train.x) and torch.equal(task.test.open().y, again.test.open().y)
    assert not torch.equal(task.train.x, other.train.x)

def test_digits_are_the_images_of_scikit_learn():
    from sklearn.datasets import load_digits
    task, images = load_task(), load_digits().images
    restored = torch.cat([p.x * task.std[0] + task.mean[0] for p in (task.train, task.val, task.test.open())])[:, 0] * 16
    rows = lambda a: sorted(map(tuple, np.round(np.asarray(a)).reshape(len(a), -1).astype(int).tolist()))
    assert rows(restored) == rows(images)                     # every image once: the parts are disjoint and complete

def test_translated_digits_recipe():
    from sklearn.datasets import load_digits
    x, y = translated_digits()
    assert (y == load_digits().target[np.random.default_rng(0).permutation(1797)]).all()
    task = load_task('translated_digits')
    both = {bytes(i.numpy()) for i in torch.cat([task.train.x, task.val.x])}
    assert both == {i.tobytes() for i in x[:800]} and torch.equal(task.test.open().x, torch.from_numpy(x[800:])) and task.mean == ()

# ---- no leak -------------------------------------------------------------------------------------------------------------------------
def test_standardisation_sees_the_training_part_only(monkeypatch):
    x, y = rng.random((90, 1, 4, 4)).astype('float32'), np.arange(90) % 3
    monkeypatch.setitem(SOURCES, 'mine', lambda: from_arrays(x, y))
    first = load_task('mine')
    back = lambda s: [int(np.abs(x.reshape(90, -1) - (v * first.std[0] + first.mean[0]).flatten().numpy()).sum(1).argmin()) for v in s.x]
    train, val, test = back(first.train), back(first.val), back(first.test.open())
    assert sorted(train + val + test) == list(range(90))
    assert abs(first.mean[0] - x[train].mean()) < 1e-6 and abs(first.std[0] - x[train].std()) < 1e-6
    x[val + test] = x[val + test] * 100 + 7
    second = load_task('mine')
    assert torch.equal(first.train.x, second.train.x) and first.mean == second.mean and first.std == second.std
    assert not torch.equal(first.val.x, second.val.x)

def test_parts_depend_on_labels_and_seed_only(monkeypatch):
    x, y = rng.random((90, 1, 4, 4)).astype('float32'), rng.integers(0, 3, 90)
    monkeypatch.setitem(SOURCES, 'a', lambda: from_arrays(x, y))
    monkeypatch.setitem(SOURCES, 'b', lambda: from_arrays(-x, y))
    assert torch.allclose(load_task('a').train.x, -load_task('b').train.x, atol=1e-5)

@pytest.mark.parametrize('seed', range(5))
def test_stratified_is_disjoint_complete_exact(seed):
    generator = np.random.default_rng(seed)
    y = generator.choice(7, size=generator.integers(1, 200), p=generator.dirichlet(np.ones(7)))
    for m in {0, 1, len(y) // 3, len(y)} - {len(y) + 1}:
        if m > len(y): continue
        part, rest = stratified(y, m, generator)
        assert len(part) == m and sorted([*part, *rest]) == list(range(len(y)))
        assert (np.abs(np.bincount(y[part], minlength=7) - m * np.bincount(y, minlength=7) / len(y)) < 1).all()

def test_halves():
    task = load_task()
    for seed in (0, 1):
        a, b = task.halves(seed)
        rows = lambda s: {bytes(v.numpy()) for v in s.x}
        assert len(a) + len(b) == len(task.train) and len(a) - len(b) in (0, 1)
        assert not rows(a) & rows(b) and rows(a) | rows(b) == rows(task.train)
        assert (a.y.bincount() - b.y.bincount()).abs().max() <= 1
    assert not torch.equal(task.halves(0)[0].y, task.halves(1)[0].y) and torch.equal(task.halves(0)[0].x, task.halves(0)[0].x)
    assert task.test.opened == 0

def test_constant_channel_becomes_zero(tmp_path):
    x, y = arrays(shape=(4, 4, 3)); x[..., 1] = 9
    task = load_task(npz(tmp_path/'a.npz', x=x, y=y))
    assert torch.isfinite(task.train.x).all() and (task.train.x[:, 1].abs() < 1e-5).all()

def test_sealed_counts_across_devices():
    task = load_task(limit=200)
    moved = task.to('cpu')
    moved.test.open(); task.test.open()
    assert task.test.opened == moved.test.opened == 2 and len(task.test) == len(moved.test)

# ---- npz -----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape, expected', [
    ((5, 6), (1, 5, 6)), ((5, 6, 1), (1, 5, 6)), ((5, 6, 3), (3, 5, 6)), ((3, 5, 6), (3, 5, 6)), ((1, 5, 6), (1, 5, 6)),
    ((4, 6, 6), (4, 6, 6)), ((2, 6, 6), (2, 6, 6)), ((3, 3, 4), (4, 3, 3))])
def test_npz_layouts(tmp_path, shape, expected):
    x, y = arrays(shape=shape)
    task = load_task(npz(tmp_path/'a.npz', x=x, y=y))
    assert_sound(task); assert task.shape == expected
    got = unstandardised(task)
    flat = lambda a: sorted(np.round(np.asarray(a).reshape(-1)).astype(int).tolist())
    assert flat(got * 255) == flat(x)

@pytest.mark.parametrize('parts', [('train', 'test'), ('train', 'val', 'test'), ('train', 'val'), ('train',)])
def test_npz_parts_are_kept(tmp_path, parts):
    named, sizes = {}, dict(train=60, val=12, test=18)
    for p in parts: named[f'x_{p}'], named[f'y_{p}'] = arrays(sizes[p])
    task = load_task(npz(tmp_path/'a.npz', **named), val=0.1, test=0.2)
    assert_sound(task)
    if 'val' in parts: assert len(task.val) == 12
    else: assert len(task.val) == 6
    assert len(task.test) == (18 if 'test' in parts else 12)
    assert len(task.train) == 60 - (0 if 'val' in parts else 6) - (0 if 'test' in parts else 12)

def test_npz_labels(tmp_path):
    x, y = arrays()
    assert load_task(npz(tmp_path/'a.npz', x=x, y=np.array(['b', 'a', 'c'])[y])).classes == ('a', 'b', 'c')
    assert load_task(npz(tmp_path/'a.npz', x=x, y=y * 10 - 5)).classes == ('-5', '5', '15')
    assert load_task(npz(tmp_path/'a.npz', x=x, y=y.astype('float32'))).classes == ('0', '1', '2')
    assert load_task(npz(tmp_path/'a.npz', x=x, y=y, classes=np.array(['p', 'q', 'r']))).classes == ('p', 'q', 'r')
    assert load_task(npz(tmp_path/'a.npz', x=x > 99, y=y)).shape == (1, 5, 5)

def test_npz_of_encoded_images(tmp_path):
    def encoded(n):
        blobs = []
        for i in range(n):
            f = io.BytesIO(); Image.fromarray(np.full((8, 8, 3), i % 3 * 100, 'uint8')).save(f, 'JPEG'); blobs.append(f.getvalue())
        return np.frombuffer(b''.join(blobs), 'uint8'), np.cumsum([0] + [len(b) for b in blobs]), np.arange(n) % 3
    (a, ao, ay), (b, bo, by) = encoded(30), encoded(9)
    path = npz(tmp_path/'a.npz', train_jpeg=a, train_offset=ao, y_train=ay, test_jpeg=b, test_offset=bo, y_test=by)
    task = load_task(path)
    assert_sound(task); assert task.shape == (3, 8, 8) and len(task.test) == 9
    assert task.train.x[task.train.y == 2].mean() > task.train.x[task.train.y == 0].mean()
    refused(npz(tmp_path/'b.npz', train_jpeg=a, train_offset=ao[:-1], y_train=ay), said='train_offset=30 entries')

def test_limit_and_size(tmp_path):
    x, y = arrays(600, (10, 14, 3)); xt, yt = arrays(300, (10, 14, 3))
    task = load_task(npz(tmp_path/'a.npz', x_train=x, y_train=y, x_test=xt, y_test=yt), limit=90, size=6)
    assert_sound(task)
    assert (len(task.train), len(task.val), len(task.test), task.shape) == (72, 18, 90, (3, 6, 6))
    assert task.train.y.bincount().tolist() == [24, 24, 24]

BAD_NPZ = dict(
    nan=(lambda x, y: dict(x=np.where(np.arange(60)[:, None, None] == 7, np.nan, x), y=y), ['x of ', 'of', 'NaN', 'index 7']),
    infinite=(lambda x, y: dict(x=np.where(np.arange(60)[:, None, None] == 7, np.inf, x), y=y), 'infinite'),
    nan_label=(lambda x, y: dict(x=x, y=np.where(y == 0, np.nan, y)), ['y of train', 'nan']),
    fraction_label=(lambda x, y: dict(x=x, y=y + 0.5), ['y of train', '0.5']),
    lengths=(lambda x, y: dict(x=x, y=y[1:]), ['60 images', '59 labels']),
    one_hot=(lambda x, y: dict(x=x, y=np.eye(3)[y]), '(60, 3)'),
    one_class=(lambda x, y: dict(x=x, y=y * 0 + 4), 'one class only (4)'),
    one_named_class=(lambda x, y: dict(x=x, y=y * 0 + 1, classes=np.array(['a', 'b'])), 'one class only (b)'),
    no_examples=(lambda x, y: dict(x=x[:0], y=y[:0]), 'no examples'),
    flat=(lambda x, y: dict(x=x.reshape(60, -1), y=y), 'shape (60, 25)'),
    two_readings=(lambda x, y: dict(x=np.zeros((60, 3, 7, 3)), y=y), 'shape (60, 3, 7, 3)'),
    no_pixels=(lambda x, y: dict(x=np.zeros((60, 0, 5)), y=y), 'at least one pixel'),
    complex_numbers=(lambda x, y: dict(x=x * 1j, y=y), 'complex128'),
    names=(lambda x, y: dict(images=x, labels=y), ["holds ['images', 'labels']", 'x_train']),
    objects=(lambda x, y: dict(x=np.array([{}] * 60), y=y), 'allow_pickle=False'),
    strange_label=(lambda x, y: dict(x_train=x, y_train=y, x_test=x, y_test=y + 1), ['y of test', 'label 3']),
    few_names=(lambda x, y: dict(x=x, y=y, classes=np.array(['a', 'b'])), ['label 2', '0, 1']),
    empty_test=(lambda x, y: dict(x_train=x, y_train=y, x_test=x[:0], y_test=y[:0]), ["part 'test' of the source", 'left empty']),
    class_without_test=(lambda x, y: dict(x_train=x, y_train=y, x_test=x[y > 0], y_test=y[y > 0]),
                        ["part 'test' of the source", "none of class '0'"]),
    rare_class=(lambda x, y: dict(x=x, y=np.where(np.arange(60) == 0, 9, y)), "none of class '9'"),
    shapes=(lambda x, y: dict(x_train=x, y_train=y, x_test=x[:, :4], y_test=y), ['several shapes', 'size=N']),
)
@pytest.mark.parametrize('case', BAD_NPZ)
def test_bad_npz(tmp_path, case):
    make, said = BAD_NPZ[case]
    refused(npz(tmp_path/'a.npz', **make(*arrays())), said=said)

def test_damaged_npz(tmp_path):
    x, y = arrays()
    path = npz(tmp_path/'a.npz', x=x, y=y)
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, said=[str(path), 'cannot be read'], error=DamagedFile)
    (tmp_path/'b.txt').write_text('x'); refused(tmp_path/'b.txt', said='.npz files and folders')

# ---- folders -------------------------------------------------------------------------------------------------------------------------
def test_folder(tmp_path):
    task = load_task(pets(tmp_path/'a'))
    assert_sound(task); assert task.classes == ('cat', 'dog') and task.shape == (3, 9, 7)
    (tmp_path/'a'/'cat'/'notes.txt').write_text('no image'); (tmp_path/'a'/'.cache').mkdir(); (tmp_path/'a'/'cat'/'._0.png').write_text('x')
    assert torch.equal(load_task(tmp_path/'a').train.x, task.train.x)
    assert load_task(str(tmp_path/'a'), size=4).shape == (3, 4, 4)

def test_folder_with_parts(tmp_path):
    for part, n in (('train', 10), ('validation', 3), ('test', 4)): pets(tmp_path/'a'/part, n)
    task = load_task(tmp_path/'a')
    assert_sound(task); assert (len(task.train), len(task.val), len(task.test)) == (20, 6, 8)
    pets(tmp_path/'b'/'train'); pets(tmp_path/'b'/'test', 4)
    task = load_task(tmp_path/'b', val=0.3)
    assert (len(task.train), len(task.val), len(task.test)) == (14, 6, 8)
    pets(tmp_path/'b'/'test', 1, ('cow',)); refused(tmp_path/'b', said=['y of test', 'label cow', 'cat, dog'])

def test_folder_colours(tmp_path):
    assert load_task(pets(tmp_path/'grey', shape=(6, 6))).shape == (1, 6, 6)
    assert load_task(pets(tmp_path/'alpha', shape=(6, 6, 4))).shape == (3, 6, 6)
    root = pets(tmp_path/'mixed', shape=(6, 6)); picture(root/'cat'/'colour.png', shape=(6, 6, 3))
    for seed in range(4): assert load_task(root, seed=seed).shape == (3, 6, 6)      # in whichever part the colour image falls
    Image.fromarray(np.zeros((6, 6), 'uint16')).save(root/'cat'/'deep.png')
    refused(root, said=['deep.png', 'more than 8 bits'])

def test_folder_is_upright(tmp_path):
    root = pets(tmp_path/'a', shape=(8, 6, 3))
    exif = Image.Exif(); exif[0x0112] = 6                       # 'rotate by 90 degrees to see it'
    Image.fromarray(np.zeros((6, 8, 3), 'uint8')).save(root/'cat'/'phone.jpg', exif=exif)
    assert load_task(root).shape == (3, 8, 6)

def test_limit_reads_no_more_files(tmp_path, monkeypatch):
    root, read = pets(tmp_path/'a', 50), []
    original = core_data._decode_image
    monkeypatch.setattr(core_data, '_decode_image', lambda *a: read.append(a) or original(*a))
    load_task(root, limit=20)
    assert len(read) == 20

def test_bad_folders(tmp_path):
    (tmp_path/'empty').mkdir(); refused(tmp_path/'empty', said=['empty', 'no subfolders'])
    picture(tmp_path/'flat'/'0.png'); refused(tmp_path/'flat', said='no subfolders')
    refused(pets(tmp_path/'one', classes=('cat',)), said='one class only (cat)')
    root = pets(tmp_path/'a'); (root/'fox').mkdir(); refused(root, said=['fox', 'holds no image'])
    (root/'fox').rmdir(); picture(root/'dog'/'big.png', shape=(20, 20, 3)); refused(root, said=['size=None', '(20, 20)', 'size=N'])
    for content in ((root/'dog'/'0.png').read_bytes()[:60], b'hello', b''):
        (root/'dog'/'big.png').write_bytes(content)
        refused(root, said=['big.png', 'cannot be read as an image'])

# ---- Hugging Face --------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1'); monkeypatch.setenv('HF_HOME', str(tmp_path/'hf'))
    return pytest.importorskip('datasets', reason='the library datasets is an extra')

def hub_like(datasets, n=30, level=0):
    images = [Image.fromarray((level + rng.integers(0, 90, (6, 5, 3))).astype('uint8')) for _ in range(n)]
    label = datasets.ClassLabel(names=['cat', 'dog', 'fox'])
    features = datasets.Features(image=datasets.Image(), label=label, note=datasets.Value('string'))
    return datasets.Dataset.from_dict(dict(image=images, label=[i % 3 for i in range(n)], note=['x'] * n), features=features)

def test_hugging_face_folder(datasets, tmp_path):
    data = hub_like(datasets)
    data.save_to_disk(tmp_path/'one')
    task = load_task(tmp_path/'one')
    assert_sound(task); assert (task.shape, task.classes, len(task.train)) == ((3, 6, 5), ('cat', 'dog', 'fox'), 18)
    pixels = {np.asarray(i).transpose(2, 0, 1).tobytes() for i in data['image']}
    back = unstandardised(task)
    assert {np.round(v.numpy() * 255).astype('uint8').tobytes() for v in back} == pixels
    parts = dict(train=data, validation=hub_like(datasets, 6), test=hub_like(datasets, 9), extra=data)
    datasets.DatasetDict(parts).save_to_disk(tmp_path/'three')
    task = load_task(tmp_path/'three', size=4, limit=24)
    assert_sound(task); assert (len(task.train), len(task.val), len(task.test), task.shape) == (24, 6, 9, (3, 4, 4))

def test_hugging_face_arrays(datasets, tmp_path):
    x, y = arrays(30)
    features = datasets.Features(x=datasets.Array2D((5, 5), 'uint8'), y=datasets.Value('int64'))
    datasets.Dataset.from_dict(dict(x=list(x), y=y), features=features).save_to_disk(tmp_path/'a')
    task = load_task(tmp_path/'a')
    assert_sound(task); assert task.shape == (1, 5, 5) and task.classes == ('0', '1', '2')

def test_hugging_face_by_name(datasets, tmp_path):
    hub_like(datasets).to_parquet(tmp_path/'repo'/'train.parquet')
    task = load_task(f'hf:{tmp_path/"repo"}')                  # load_dataset itself, on a local repository
    assert_sound(task); assert len(task.train) == 18

def test_bad_hugging_face(datasets, tmp_path):
    data = hub_like(datasets)
    data.remove_columns('label').save_to_disk(tmp_path/'a'); refused(tmp_path/'a', said=['label column', 'note'])
    data.remove_columns('image').save_to_disk(tmp_path/'b'); refused(tmp_path/'b', said=['image column'])
    datasets.DatasetDict(test=data).save_to_disk(tmp_path/'c'); refused(tmp_path/'c', said=["has the splits ['test']"])
    (tmp_path/'d').mkdir(); (tmp_path/'d'/'dataset_dict.json').write_text('{'); refused(tmp_path/'d', said='cannot be loaded')
    refused('hf:no-such-owner-of-anything/nothing', said=["source='no-such-owner-of-anything/nothing'", 'cannot be loaded'])

def test_without_the_library_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    for source in ('hf:mnist', 'owner/name'): refused(source, said='pip install nas_nb[data]')
    (tmp_path/'a').mkdir(); (tmp_path/'a'/'dataset_info.json').write_text('{}'); refused(tmp_path/'a', said='pip install nas_nb[data]')

# ---- names ---------------------------------------------------------------------------------------------------------------------------
def test_data_home(tmp_path, monkeypatch):
    monkeypatch.setenv('NAS_NB_DATA', str(tmp_path))
    assert data_home() == tmp_path
    x, y = arrays(); npz(tmp_path/'mine.npz', x=x, y=y)
    assert load_task('mine').name == 'mine'
    refused('mime', said=["source='mime': unknown", 'digits', 'translated_digits', str(tmp_path), 'mine', 'hf:NAME'])
    monkeypatch.setenv('NAS_NB_DATA', str(tmp_path/'no'))
    refused('mine', said=['NAS_NB_DATA=', 'no such folder'])
    load_task('digits', limit=300)                             # needs no such folder

def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); pets(tmp_path/'data'/'pets')
    monkeypatch.setattr(core_data, '_hugging_face', lambda *a, **k: pytest.fail('asked the hub'))
    for name in ('data/pest', './pest', str(tmp_path/'pest'), 'digitz', 'pest.npz', '~/no_such_folder_here'): refused(name, said='unknown')
    assert load_task('data/pets').n_classes == 2

@pytest.mark.parametrize('name, shape', [('mnist', (1, 28, 28)), ('fashion_mnist', (1, 28, 28)), ('cifar10_exact4k', (3, 32, 32)),
                                         ('cifar10_jpeg', (3, 32, 32))])
def test_larger_sets(name, shape):
    home = data_home()
    if home is None or not (home/f'{name}.npz').exists(): pytest.skip(f'{name}.npz is in no data folder (NAS_NB_DATA)')
    task = load_task(name, limit=400)
    assert_sound(task); assert task.shape == shape and task.n_classes == 10
    assert len(task.train) + len(task.val) + (0 if name != 'cifar10_exact4k' else len(task.test)) == 400
    if (home/'cora.npz').exists(): refused('cora', said='holds')      # a set that is no images

# ---- arguments -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw, said', [
    (dict(val=0), 'val=0'), (dict(val=1), 'val=1'), (dict(val=-0.1), 'val=-0.1'), (dict(test=float('nan')), 'test=nan'),
    (dict(test=2), 'test=2'),
    (dict(val=0.6, test=0.4), 'sum below 1'), (dict(val=1e-5), ['val=1e-05', 'val part is left empty']), (dict(test=0.0004), 'test'),
    (dict(val=0.004), 'none of class'), (dict(val=0.49, test=0.5, limit=20), 'leave 0 of 20 examples'), (dict(limit=1), 'limit=1'),
    (dict(limit=15), 'none of class'), (dict(seed=-1), 'seed=-1'), (dict(seed=0.5), 'seed=0.5'),
    (dict(size=0), 'size=0'), (dict(size='8'), "size='8'"),
    (dict(device='cuda:99'), 'cuda:99'), (dict(device='gpu'), "device='gpu'"), (dict(source='nothing'), "source='nothing'")])
def test_bad_arguments(kw, said): refused(said=said, **kw)

def test_bad_types():
    for kw in (dict(val='a'), dict(test=True), dict(source=None), dict(source=''), dict(source=3)):
        refused(error=TypeError, said=next(iter(kw)) + '=', **kw)

def test_cuda_absent():
    if torch.cuda.is_available(): pytest.skip('CUDA is present')
    refused(device='cuda', said=["device='cuda'", "'cpu'"])

# ---- batches -------------------------------------------------------------------------------------------------------------------------
def numbered(n): return Split(torch.arange(float(n)).reshape(n, 1, 1, 1), torch.arange(n))

@pytest.mark.parametrize('n, size', [(10, 3), (10, 10), (10, 64), (7, 1), (1, 5)])
def test_batches_resume_bitwise_anywhere(n, size):
    whole = Batches(numbered(n), size, seed=5)
    total = 3 * len(whole) + 1
    expected, states = [], []
    for _ in range(total):
        states.append(json.loads(json.dumps(whole.state_dict())))
        expected.append(whole.next()[1].tolist())
    for at, state in enumerate(states):
        torch.rand(2); np.random.rand()
        resumed = Batches(numbered(n), size, seed=5)
        for _ in range(at % 3): resumed.next()                 # wherever it stood before
        resumed.load_state_dict(state)
        assert [resumed.next()[1].tolist() for _ in range(total - at)] == expected[at:]

def test_batches_passes():
    b = Batches(numbered(10), 3, seed=0)
    passes = [[i for _, y in b.epoch() for i in y.tolist()] for _ in range(4)]
    assert all(len(p) == len(set(p)) == 9 for p in passes) and len({tuple(p) for p in passes}) == 4
    seen = {i for p in passes for i in p}
    assert seen == set(range(10))                              # who sits out changes from pass to pass
    x, y = b.next(); assert (x.flatten() == y).all()           # images and labels stay together
    order = lambda seed: [y.tolist() for _, y in Batches(numbered(10), 3, seed=seed).epoch()]
    assert order(0) == order(0) != order(1)

def test_batches_leave_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load_task(limit=300).halves(); list(Batches(numbered(10), 3).epoch())
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()

def test_bad_batches():
    for kw, said in ((dict(batch_size=0), 'batch_size=0'), (dict(batch_size=2.5), 'batch_size=2.5'),
                     (dict(batch_size=3, seed=-2), 'seed=-2')):
        with pytest.raises(ValueError, match=said): Batches(numbered(5), **kw)
    state = Batches(numbered(5), 2, seed=1).state_dict()
    for other, said in ((Batches(numbered(6), 2, seed=1), 'n: 5 there, 6 here'),
                        (Batches(numbered(5), 3, seed=1), 'batch_size: 2 there, 3 here'),
                        (Batches(numbered(5), 2, seed=2), 'seed: 1 there, 2 here')):
        with pytest.raises(ValueError, match=said): other.load_state_dict(state)
    with pytest.raises(ValueError, match='state='): Batches(numbered(5), 2).load_state_dict({})

def test_parts_check_themselves():
    with pytest.raises(TypeError, match='x='): Split(np.zeros((3, 1, 1, 1)), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match='y='): Split(torch.zeros(3, 1, 1, 1), torch.zeros(3))
    with pytest.raises(TypeError, match='split='): Sealed((1, 2))
    s = numbered(6)
    assert s.subset(np.array([4, 1])).y.tolist() == [4, 1] and s.subset(torch.tensor([], dtype=torch.int64)).x.shape == (0, 1, 1, 1)
    task = Task('t', s, s, Sealed(s), ('a',) * 6)
    with pytest.raises(ValueError, match='cuda:99'): task.to('cuda:99')
    assert isinstance(SOURCES['digits'](), Source)
