"""Pages of the docs site: notebooks in the flavour that MyST reads, an API reference, a page for each paper.

Everything is read from text (notebooks, exported modules, `docs/papers.csv`, `nbs/sidebar.yml`):
no cell runs and the package is not imported."""
import ast, csv, html, inspect, json, os, re
from collections import defaultdict
from pathlib import Path
import yaml

ROOT = Path(__file__).resolve().parent.parent

class Symbol:
    "An exported name or a public method of one: where it is defined, how it is called, what it says."
    def __init__(self, module, name, kind, signature='', doc=''):
        self.module, self.name, self.kind, self.signature, self.doc, self.members = module, name, kind, signature, doc, []
    @property
    def full(self): return f'{self.module}.{self.name}'

# --- the package, read as text -----------------------------------------------------------------------------------------------------

def _arguments(node, drop_self):
    "The signature of a function as written, without `self`."
    a = ast.parse(ast.unparse(node)).body[0].args
    for arg in (a.posonlyargs or a.args)[:1] if drop_self else []: (a.posonlyargs or a.args).remove(arg)
    return f'({ast.unparse(a)})' + (f' -> {ast.unparse(node.returns)}' if node.returns else '')

def _decorators(node): return [ast.unparse(d) for d in node.decorator_list]

def _fields(node):
    "The signature of a dataclass or a NamedTuple."
    out = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and not ast.unparse(item.annotation).startswith('ClassVar'):
            out.append(f'{ast.unparse(item.target)}: {ast.unparse(item.annotation)}'
                       + (f' = {ast.unparse(item.value)}' if item.value else ''))
    return f'({", ".join(out)})'

def _method(module, owner, node):
    decorators = _decorators(node)
    is_property = any(d in ('property', 'cached_property') or 'as_prop' in d for d in decorators)
    kind = ('property' if is_property else 'staticmethod' if 'staticmethod' in decorators else 'classmethod'
            if 'classmethod' in decorators else 'method')
    signature = '' if is_property else _arguments(node, kind != 'staticmethod')
    return Symbol(module, f'{owner}.{node.name}', kind, signature, ast.get_docstring(node) or '')

def _public(node):
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (not node.name.startswith('_')
                                                                          or (node.name == '__call__' and ast.get_docstring(node)))

def _class(module, node, classes):
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in ('__init__', '__new__')), None)
    plain = any('dataclass' in d for d in _decorators(node)) or any('NamedTuple' in ast.unparse(b) for b in node.bases)
    signature = _arguments(init, True).split(' -> ')[0] if init else _fields(node) if plain else None
    for base in node.bases if signature is None else []:    # inherited from a class of the package
        if ast.unparse(base) in classes: signature = classes[ast.unparse(base)].signature
    symbol = Symbol(module, node.name, 'class', signature or '', ast.get_docstring(node) or (init and ast.get_docstring(init)) or '')
    symbol.members = [_method(module, node.name, n) for n in node.body if _public(n)]
    return symbol

def _patched(node):
    "The classes that a function decorated with fastcore's `patch` becomes a method of."
    if not isinstance(node, ast.FunctionDef) or not any(d.startswith('patch') for d in _decorators(node)) or not node.args.args: return []
    note = node.args.args[0].annotation
    return re.findall(r'\w+', ast.unparse(note)) if note is not None else []

def read_package(modules):
    "`{module: [Symbol, ...]}` of the exported names, in the order of the source."
    trees, classes, found = {}, {}, {}
    for module in modules:
        trees[module] = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
    for module, tree in trees.items():
        names = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == '__all__'),
                     [])
        symbols = {}
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = symbols[node.name] = _class(module, node, classes)
            elif owners := _patched(node):
                for owner in owners:
                    if owner in classes and _public(node): classes[owner].members.append(_method(classes[owner].module, owner, node))
            elif isinstance(node, ast.FunctionDef):
                symbols[node.name] = Symbol(module, node.name, 'function', _arguments(node, False), ast.get_docstring(node) or '')
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name): symbols[target.id] = Symbol(module, target.id, 'data')
        found[module] = [s for name, s in symbols.items() if name in names]
    _tell_apart(found, trees)
    return found

def _tell_apart(found, trees):
    "Where two modules export a class of one name, say in signatures which of them is meant: the one that the module imports or defines."
    homes = defaultdict(list)
    for module, symbols in found.items():
        for s in symbols:
            if s.kind == 'class': homes[s.name].append(module)
    for module, symbols in found.items():
        imported = {alias.name: node.module for node in ast.walk(trees[module]) if isinstance(node, ast.ImportFrom) for alias in node.names}
        for name in (n for n, modules in homes.items() if len(modules) > 1):
            home = next((m for m in homes[name] if m == module or name in imported and m.endswith('.' + imported[name])), None)
            for s in (entry for symbol in symbols for entry in (symbol, *symbol.members)) if home else ():
                s.signature = re.sub(rf'(?<![\w.]){name}\b(?!\s*[(=:])', f'{home}.{name}', s.signature)

# --- words: links to names and papers ------------------------------------------------------------------------------------------------

_code = re.compile(r'(```.*?```|~~~.*?~~~)', re.S)
_paper_link = re.compile(r'\[([^\]\[]*\bpapers?\s+(\d{1,3})\b[^\]\[]*)\]\((?:[^()]|\([^()]*\))*\)', re.I)
_paper_bare = re.compile(r'(?<![\[\w`])papers?\s+(\d{1,3})\b(?!\])', re.I)
_tick = re.compile(r'(?<![`\[\w{}])`([A-Za-z_][\w.]*)(\([^`<>{}]*\))?`(?!`|\])')

def read_papers():
    "`{number: row of docs/papers.csv}`"
    with open(ROOT/'docs'/'papers.csv', newline='', encoding='utf-8') as f: return {int(r['number']): r for r in csv.DictReader(f)}

def papers_in(text, papers):
    "Numbers of the papers that a text cites, as `paper 40` or by their arXiv number."
    text, number = _code.sub('', text), {row['arxiv']: n for n, row in papers.items() if row['arxiv']}
    found = [int(n) for n in re.findall(r'\bpapers?\s+(\d{1,3})\b', text, re.I)]
    found += [number[a] for a in re.findall(r'(?i:arxiv)\S*?[\s:/]+(?:abs/|pdf/)?(\d{4}\.\d{4,5})', text) if a in number]
    return [n for n in dict.fromkeys(found) if n in papers]

class Words:
    "Turns names in backticks and `paper N` into links that Sphinx resolves."
    def __init__(self, package, papers):
        self.papers, self.by_name = papers, defaultdict(list)
        for symbols in package.values():
            for s in symbols:
                for entry in [s, *s.members]: self.by_name[entry.name].append(entry.full); self.by_name[entry.full].append(entry.full)

    def target(self, name, module):
        hits = self.by_name.get(name, [])
        own = [h for h in hits if module and h == f'{module}.{name}']
        return own[0] if own else hits[0] if len(set(hits)) == 1 else None

    def _name(self, match, module):
        target = self.target(match[1], module)
        return f'{{py:obj}}`{match[1]}{match[2] or ""} <{target}>`' if target else match[0]

    def _paper(self, text, number):
        return f'[{text}](/papers/{int(number):03d}.md)' if int(number) in self.papers else text

    def __call__(self, text, module=''):
        "`text` in Markdown with links; code blocks, headings and texts of links stay."
        parts = _code.split(text)
        for i in range(0, len(parts), 2):
            lines = parts[i].split('\n')
            for j, line in enumerate(lines):
                line = _paper_link.sub(lambda m: self._paper(m[1], m[2]), line)
                line = re.sub(r'(\[[^\]]*\]\([^)]*\))|' + _paper_bare.pattern, lambda m: m[1] or self._paper(m[0], m[2]), line, flags=re.I)
                lines[j] = line if line.startswith('#') else _tick.sub(lambda m: self._name(m, module), line)
            parts[i] = '\n'.join(lines)
        return ''.join(parts)

# --- notebooks -----------------------------------------------------------------------------------------------------------------------

def directives(source):
    "nbdev and Quarto directives at the top of a cell, and the rest of the cell."
    found, lines = {}, source.split('\n')
    while lines and re.match(r'\s*#\s*\|', lines[0]):
        key, _, value = re.sub(r'^\s*#\s*\|\s*', '', lines.pop(0)).partition(' ')
        found[key.strip().rstrip(':')] = value.strip()
    return found, '\n'.join(lines).strip('\n')

def plain(text):
    "Markdown without its marks, for the alternative text of a picture."
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text)
    text = re.sub(r'\\(\w+)', r'\1', text.replace('$', ''))
    return re.sub(r'\s+', ' ', re.sub(r'[*`#>{}]', '', text)).strip()

def alternative(cells, i, options):
    "What a picture shows: its own caption, else the paragraph beside its cell."
    text = options.get('fig-alt') or options.get('fig-cap') or ''
    for near in (i - 1, i + 1) if not text else ():
        if 0 <= near < len(cells) and cells[near]['cell_type'] == 'markdown':
            blocks = [b for b in re.split(r'\n\s*\n', ''.join(cells[near]['source'])) if not re.match(r'\s*(#|\||```|\$\$)', b)]
            if blocks: text = blocks[-1 if near < i else 0]; break
    if not text:
        above = [''.join(c['source']) for c in cells[:i] if c['cell_type'] == 'markdown']
        text = above[-1].strip().split('\n\n')[-1] if above else 'Picture'
    text = plain(text).strip('"\' ')
    return text if len(text) <= 300 else text[:300].rsplit(' ', 1)[0] + ' …'

def _widget(model, state, seen):
    "Controls (label, value) and stored outputs of a widget and its children."
    if model in seen or model not in state: return [], []
    seen.add(model)
    entry, values = state[model], state[model].get('state', {})
    controls, outputs, kind = [], [], entry.get('model_name', '')
    if kind == 'OutputModel': outputs += values.get('outputs', [])
    elif kind == 'ImageModel':
        outputs += [dict(output_type='display_data', metadata={}, data={'image/' + values.get('format', 'png'): b['data']})
                    for b in entry.get('buffers', [])]
    elif kind in ('HTMLModel', 'HTMLMathModel', 'LabelModel'):
        if values.get('value'): outputs.append(dict(output_type='display_data', metadata={}, data={'text/html': values['value']}))
    elif 'value' in values or 'index' in values:
        shown = values.get('value')
        if shown is None and values.get('_options_labels') and values.get('index') is not None:
            shown = values['_options_labels'][values['index']]
        controls.append((values.get('description') or 'value', shown))
    for child in values.get('children', []):
        c, o = _widget(child.removeprefix('IPY_MODEL_'), state, seen)
        controls += c; outputs += o
    return controls, outputs

def still(output, state):
    "A widget as a still: one line that names its controls, then the outputs stored with it."
    controls, outputs = _widget(output['data']['application/vnd.jupyter.widget-view+json']['model_id'], state, set())
    names = ', '.join(f'<b>{html.escape(str(k))}</b> = {html.escape(f"{v:g}" if isinstance(v, float) else str(v))}' for k, v in controls)
    line = f'<p class="widget">A still of a widget{": " + names if names else ""}. Run this notebook in Jupyter to move it.</p>'
    return [dict(output_type='display_data', metadata={}, data={'text/html': line}), *outputs]

def outputs_of(cell, state, alt):
    out = []
    for output in cell['outputs']:
        data = output.get('data', {})
        out += still(output, state) if 'application/vnd.jupyter.widget-view+json' in data else [output]
    for output in out:
        if output['output_type'] in ('display_data', 'execute_result'): output.setdefault('metadata', {})
        data = output.get('data', {})
        for key in [k for k in data if k.startswith('application/') and k != 'application/json']: del data[key]
        if any(k.startswith('image/') for k in data): data.pop('text/plain', None)
    return [o for o in out if o.get('data') or o['output_type'] not in ('display_data', 'execute_result')]

class Notebook:
    "One notebook: its title, its module, and its cells for MyST."
    def __init__(self, path):
        self.path, self.raw = path, json.loads((ROOT/'nbs'/path).read_text(encoding='utf-8'))
        self.cells = self.raw['cells']
        for c in self.cells: c['source'] = ''.join(c['source'])
        head = next((c['source'] for c in self.cells if c['cell_type'] == 'markdown'), '')
        title = re.match(r'\s*#\s+(.+)', head)
        if not title: raise SystemExit(f'nbs/{path}: the first cell has no title "# ..."')
        self.title = title[1].strip()
        lead = re.search(r'^>\s*(.+?)(?:\n\s*\n|\Z)', head, re.M | re.S)
        self.lead = re.sub(r'\n>?\s*', ' ', lead[1]).strip() if lead else ''
        exp = [re.search(r'#\s*\|\s*default_exp\s+(\S+)', c['source']) for c in self.cells if c['cell_type'] == 'code']
        self.module = next((f'nas_nb.{m[1]}' for m in exp if m), '')
        self.defined, self.cited = {}, []       # name -> heading; (paper number, heading, whether it is the section of sources)

    @property
    def page(self): return self.path.removesuffix('.ipynb')

    def scan(self, papers):
        "Where names are defined and papers cited."
        heading = self.title
        for cell in self.cells:
            if cell['cell_type'] == 'markdown':
                for part in re.split(r'^(#+ .*)$', _code.sub('', cell['source']), flags=re.M):
                    if part.startswith('#'): heading = plain(part)
                    self.cited += [(n, heading, 'source' in heading.lower()) for n in papers_in(part, papers)]
            else:
                options, code = directives(cell['source'])
                if 'export' in options or 'exports' in options:
                    for node in ast.parse(code).body:
                        names = [f'{o}.{node.name}' for o in _patched(node)] or ([node.name] if hasattr(node, 'name') else [])
                        if isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
                        for name in names: self.defined.setdefault(name, heading)

    def _code_cell(self, i, cell, state):
        options, code = directives(cell['source'])
        code = '\n'.join(l for l in code.split('\n') if not re.search(r'#\s*\|\s*hide_line', l))
        if {'hide', 'default_exp', 'exporti'} & options.keys() or options.get('include') == 'false': return []
        tags = [name for key, name in (('export', 'exported'), ('exports', 'exported')) if key in options]
        tree = ast.parse(code) if tags else None
        if tree and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body): tags.append('hide-input')
        if options.get('echo') == 'false' or 'hide_input' in options: tags.append('remove-input')
        if 'code-fold' in options: tags.append('hide-input')
        if options.get('output') == 'false' or 'hide_output' in options: tags.append('remove-output')
        if not code and not cell['outputs']: return []
        anchors = ''.join(f'<a class="anchor" id="{n}"></a>' for node in (tree.body if tree else [])
                          for n in ([f'{o}.{node.name}' for o in _patched(node)] or ([node.name] if hasattr(node, 'name') else
                                    [t.id for t in getattr(node, 'targets', []) if isinstance(t, ast.Name)])) if not n.startswith('_'))
        alt = alternative(self.cells, i, options)
        metadata = {'tags': tags, 'mystnb': {'code_prompt_show': 'Imports' if tree else 'Show code', 'image': {'alt': alt}}}
        out = [dict(cell_type='code', id=cell['id'], execution_count=None, metadata=metadata, source=code,
                    outputs=outputs_of(cell, state, alt))]
        return ([dict(cell_type='markdown', id=cell['id'] + 'a', metadata={}, source=anchors)] if anchors else []) + out

    def _relative(self, match, git):
        "A link to a file of the repository that is no page leads to the repository."
        text, target = match[1], match[2]
        if re.match(r'(\w+:|#|/)', target): return match[0]
        path = Path(os.path.normpath(Path('nbs')/Path(self.path).parent/target.split('#')[0]))
        if path.suffix == '.ipynb' and path.parts[0] == 'nbs': return match[0]
        return f'[{text}]({git}/blob/main/{path.as_posix()})'

    def convert(self, words, git):
        state = self.raw['metadata'].get('widgets', {}).get('application/vnd.jupyter.widget-state+json', {}).get('state', {})
        links = [f'[the file of this notebook]({git}/blob/main/nbs/{self.path})']
        if self.module: links = [f'module {{py:mod}}`{self.module}`', *links]
        top = f'# {self.title}\n\n' + (f'{{.lead}}\n{words(self.lead, self.module)}\n\n' if self.lead
                                       else '') + f'{{.where}}\n{" · ".join(links)}\n'
        cells, first = [dict(cell_type='markdown', id='top', metadata={}, source=top)], True
        for i, cell in enumerate(self.cells):
            if cell['cell_type'] == 'code': cells += self._code_cell(i, cell, state)
            elif cell['cell_type'] == 'markdown':
                text = cell['source']
                if first:
                    text = re.sub(r'\A\s*#\s+.+\n?', '', text)
                    text, first = re.sub(r'\A\s*>\s*(.+?)(\n\s*\n|\Z)', '', text, flags=re.S) if self.lead else text, False
                if not text.strip(): continue
                text = re.sub(r'^(:{3,})\s*\{\s*\.callout-(\w+)[^}]*\}\s*$', r'\1{\2}', text, flags=re.M)
                text = re.sub(r'\[([^\]]*)\]\(([^)\s]+)\)', lambda m: self._relative(m, git), text)
                cells.append(dict(cell_type='markdown', id=cell['id'], metadata={}, source=words(text, self.module)))
        kernel = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}, 'language_info': {'name': 'python'}}
        return dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)

# --- the order of reading --------------------------------------------------------------------------------------------------------------

def read_sidebar(draft=False):
    "`[(section or None, [path, ...]), ...]` from nbs/sidebar.yml; every notebook stands in it once."
    contents = yaml.safe_load((ROOT/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    sections = [(None, [e]) if isinstance(e, str) else (e['section'], e['contents']) for e in contents]
    listed = [p for _, paths in sections for p in paths]
    there = [p.relative_to(ROOT/'nbs').as_posix() for p in sorted((ROOT/'nbs').rglob('*.ipynb'))
             if not any(q[0] in '._' for q in p.relative_to(ROOT/'nbs').parts)]
    missing, unlisted = [p for p in listed if p not in there], [p for p in there if p not in listed]
    twice = sorted({p for p in listed if listed.count(p) > 1})
    if not draft and (missing or unlisted or twice):
        raise SystemExit(f'nbs/sidebar.yml: missing notebooks {missing}, notebooks it does not list {unlisted}, listed twice {twice}')
    sections = [(s, [p for p in paths if p in there]) for s, paths in sections]
    return [(s, p) for s, p in sections + ([('drafts', unlisted)] if unlisted else []) if p]

# --- reference ---------------------------------------------------------------------------------------------------------------------------

def docstring(text, words, module):
    "A docstring as Markdown: code spans and formulas stay, other marks are shown as they were written."
    keep = re.split(r'(`[^`]*`|\$[^$\n]+\$)', inspect.cleandoc(text))
    keep[::2] = [re.sub(r'([*\[\]<>|\\])', r'\\\1', part) for part in keep[::2]]
    return words(''.join(keep), module)

def _entry(s, words, page, notebook, marks):
    kind = 'method' if s.kind in ('staticmethod', 'classmethod') else s.kind
    name = s.name if kind in ('function', 'class', 'data') else s.name
    lines = [f'{":"*marks}{{py:{kind}}} {name}{s.signature}', f':module: {s.module}']
    if s.kind in ('staticmethod', 'classmethod'): lines.append(f':{s.kind}:')
    lines += ['', docstring(s.doc, words, s.module) if s.doc else '', '']
    if notebook and s.name in notebook.defined:
        lines += [f'<a class="where" href="../{notebook.page}.html#{s.name}">in the notebook: '
                  f'{html.escape(notebook.defined[s.name])}</a>', '']
    for member in s.members: lines += [_entry(member, words, page, notebook, marks - 1), '']
    return '\n'.join(lines + [':'*marks])

def api_page(module, symbols, notebook, words, git):
    path = module.replace('.', '/') + '.py'
    head = [f'# {module}', '', '{.lead}', notebook.lead if notebook else '', '', f'```{{py:module}} {module}\n```', '', '{.where}']
    head.append((f'notebook [{notebook.title}](/{notebook.path}) · ' if notebook else '') + f'code [{path}]({git}/blob/main/{path})')
    return '\n'.join(head) + '\n\n' + '\n\n'.join(_entry(s, words, module, notebook, 6) for s in symbols) + '\n'

def api_index(sections, package, notebooks):
    out = ['# API reference', '', 'Every exported name, by module in reading order. Each entry links to the notebook that explains and '
                                  'tests it and to its code.', '']
    order = []
    for section, paths in sections:
        rows = [(n, package[n.module]) for n in (notebooks[p] for p in paths) if n.module in package]
        if not rows: continue
        out += [f'## {section}', '']
        for n, symbols in rows:
            order.append(n.module)
            out += [f'**[{n.module}](/api/{n.module}.md)**: {plain(n.lead)}', '',
                    ', '.join(f'{{py:obj}}`{s.name} <{s.full}>`' for s in symbols) or '(no names)', '']
    return '\n'.join(out) + '\n```{toctree}\n:hidden:\n\n' + '\n'.join(order) + '\n```\n'

# --- papers ------------------------------------------------------------------------------------------------------------------------------

def paper_uses(notebooks, package, papers):
    "`{number: ([(notebook, heading, source), ...], [Symbol, ...])}`"
    uses = defaultdict(lambda: ([], []))
    for n in notebooks.values():
        for number, heading, source in n.cited:
            if (n, heading, source) not in uses[number][0]: uses[number][0].append((n, heading, source))
    for symbols in package.values():
        for s in symbols:
            for entry in [s, *s.members]:
                for number in papers_in(entry.doc, papers): uses[number][1].append(entry)
    return uses

def _slug(heading): return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')

def paper_page(row, places, names):
    n = int(row['number'])
    arxiv = f'[arXiv:{row["arxiv"]}](https://arxiv.org/abs/{row["arxiv"]})' if row['arxiv'] else 'no arXiv number'
    out = ['---', 'orphan: true', '---', f'# Paper {n}: {row["title"]}', '', '{.where}', f'{arxiv} · [all papers](/papers/index.md)', '',
           '## Where it is used', '']
    for notebook, heading, source in places:
        out.append(f'- [{notebook.title}](/{notebook.path})' + (f': {heading}' if heading != notebook.title else '')
                   + (' (as source)' if source else ''))
    out += [f'- {{py:obj}}`{s.name} <{s.full}>`' for s in names]
    if not places and not names: out.append(f'Nowhere yet. Planned place: `nas_nb.{row["place"]}`.')
    return '\n'.join(out) + '\n'

def papers_index(papers, uses):
    rows, working = [], 0
    for n, row in papers.items():
        cited = uses[n][0] if n in uses else []
        done = any(source and p.module == f'nas_nb.{row["place"]}' for p, _, source in cited)
        state, working = 'working' if done else 'cited' if cited else 'planned', working + done
        places = {p.path: p for p, _, source in cited if source or not done}
        where = ', '.join([f'[{p.title}](/{p.path})' for p in places.values()] + ([] if done else [f'`{row["place"]}`']))
        arxiv = f'[{row["arxiv"]}](https://arxiv.org/abs/{row["arxiv"]})' if row['arxiv'] else ''
        title = row['title'].replace('|', '\\|')
        rows.append(f'| {n} | [{title}](/papers/{n:03d}.md) | {arxiv} | {"**working**" if done else state} | {where} |')
    return '\n'.join(['# Papers and systems', '', f'The {len(papers)} papers that the package turns into working systems. '
                                                  f'A system is **working** when the notebook of its module names '
                      'the paper as its source. *Cited* means that notebooks use something of it, *planned* that none does yet; '
                      'in both cases the last column names the module '
                      f'that will hold the system. Working: {working} of {len(papers)}.', '',
                      '{.systems}', '| | paper | arXiv | state | where |', '|---|---|---|---|---|', *rows]) + '\n'

# --- all of it
# -----------------------------------------------------------------------------------------------------------------------------

def pages(settings, draft=False):
    "`{path below docs/_src: text}` of the whole site."
    git, sections, papers = settings['git_url'], read_sidebar(draft), read_papers()
    notebooks = {p: Notebook(p) for _, paths in sections for p in paths}
    for n in notebooks.values(): n.scan(papers)
    package = read_package([n.module for n in notebooks.values() if n.module and (ROOT/(n.module.replace('.', '/') + '.py')).exists()])
    words, uses = Words(package, papers), paper_uses(notebooks, package, papers)
    out = {p: n.convert(words, git) for p, n in notebooks.items()}
    trees = [f'```{{toctree}}\n:hidden:\n:caption: {s}\n\n' + '\n'.join(notebooks[p].page for p in paths) + '\n```'
             for s, paths in sections if s]
    trees.append('```{toctree}\n:hidden:\n:caption: reference\n\napi/index\npapers/index\n```')
    front = out.get('index.ipynb') or dict(cells=[dict(cell_type='markdown', id='top', metadata={},
                                                       source=f'# {settings["title"]}\n\n{settings["description"]}')],
                                           metadata={}, nbformat=4, nbformat_minor=5)
    front['cells'].append(dict(cell_type='markdown', id='tree', metadata={}, source='\n\n'.join(trees)))
    out['index.ipynb'] = front
    by_module = {n.module: n for n in notebooks.values()}
    for module, symbols in package.items(): out[f'api/{module}.md'] = api_page(module, symbols, by_module.get(module), words, git)
    out['api/index.md'] = api_index(sections, package, notebooks)
    for n, row in papers.items(): out[f'papers/{n:03d}.md'] = paper_page(row, *uses[n])
    out['papers/index.md'] = papers_index(papers, uses)
    return {k: v if isinstance(v, str) else json.dumps(v, indent=1, ensure_ascii=False) for k, v in out.items()}
