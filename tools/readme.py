"""README.md from nbs/index.ipynb: no cell runs and Quarto is not needed.

    python tools/readme.py [--check]

Hidden cells stay out, links to notebooks lead into nbs/, stored pictures go to docs/images/, a widget becomes one line.
--check only compares."""
import argparse, base64, json, re, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_pages import ROOT, alternative, directives

def _links(text):
    return re.sub(r'\]\((?!\w+:|#|/)([^)\s]+)\)', lambda m: f'](nbs/{m[1]})' if not m[1].startswith('../') else f']({m[1][3:]})', text)

def _output(output, alt, images):
    "One stored output as Markdown; pictures are added to `images`."
    data = output.get('data', {})
    join = lambda x: x if isinstance(x, str) else ''.join(x)
    if 'application/vnd.jupyter.widget-view+json' in data: return '*(a widget: run the notebook in Jupyter to move it)*'
    if 'image/png' in data:
        name = f'docs/images/index_{len(images) + 1}.png'
        images[name] = base64.b64decode(join(data['image/png']))
        return f'![{alt.replace("[", "(").replace("]", ")")}]({name})'
    if 'text/markdown' in data: return _links(join(data['text/markdown']))
    text = join(output.get('text') or data.get('text/plain') or '').rstrip()
    return f'```text\n{text}\n```' if text else ''

def make():
    "`(text, {path: bytes})`: the README and its pictures."
    cells = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    for c in cells: c['source'] = ''.join(c['source'])
    parts, images = ['<!-- Made from nbs/index.ipynb by tools/readme.py: change it there. -->'], {}
    for i, cell in enumerate(cells):
        if cell['cell_type'] == 'markdown': parts.append(_links(cell['source']))
        if cell['cell_type'] != 'code': continue
        options, code = directives(cell['source'])
        if {'hide', 'export', 'exporti', 'default_exp'} & options.keys() or options.get('include') == 'false': continue
        if code and options.get('echo') != 'false' and 'hide_input' not in options: parts.append(f'```python\n{code}\n```')
        if options.get('output') == 'false': continue
        parts += [_output(o, alternative(cells, i, options), images) for o in cell['outputs']]
    return '\n\n'.join(p.strip() for p in parts if p.strip()) + '\n', images

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--check', action='store_true', help='exit status 1 where README.md differs, change nothing')
    check = parser.parse_args().check
    text, images = make()
    files = {'README.md': text.encode(), **images}
    old = sorted((ROOT/'docs'/'images').glob('index_*.png')) if (ROOT/'docs'/'images').exists() else []
    stale = [p for p in old if p.relative_to(ROOT).as_posix() not in files]
    differ = [n for n, data in files.items() if not (ROOT/n).exists() or (ROOT/n).read_bytes() != data] + [str(p) for p in stale]
    if check:
        if differ: sys.exit(f'not those of nbs/index.ipynb: {", ".join(differ)}')
        return
    for path in stale: path.unlink()
    for name, data in files.items():
        (ROOT/name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/name).write_bytes(data)
    print(f'README.md: {len(text.splitlines())} lines, {len(images)} pictures')

if __name__ == '__main__': main()
