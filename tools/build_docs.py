"""Build the docs site into _docs/ from the notebooks, without internet.

    python tools/build_docs.py [--serve] [--draft]

Warnings and dead links inside the site are errors. --draft takes notebooks that nbs/sidebar.yml
does not list yet leaves out those it lists in vain, and only reports warnings."""
import argparse, functools, http.server, importlib.util, shutil, sys, time, webbrowser
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_pages import ROOT, pages

def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def write(folder, texts):
    "Write the texts that changed, remove files that are no longer among them."
    for path in [p for p in folder.rglob('*') if p.is_file()]:
        if path.relative_to(folder).as_posix() not in texts: path.unlink()
    for name, text in texts.items():
        path = folder/name
        if path.exists() and path.read_text(encoding='utf-8') == text: continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')

def vendor(folder):
    "Copy MathJax, one file, from the Python package that ships it."
    spec = importlib.util.find_spec('sphinx-mathjax-offline')
    if spec is None: raise SystemExit("the docs need the packages of settings.ini's docs_requirements: pip install -e '.[docs]'")
    source = Path(spec.origin).parent/'static'/'mathjax'/'tex-svg.js'
    (folder/'mathjax').mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder/'mathjax'/source.name)

class _Links(HTMLParser):
    def __init__(self):
        super().__init__(); self.links, self.ids, self.bare = [], set(), []
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for key in ('id', 'name'):
            if attrs.get(key): self.ids.add(attrs[key])
        for key in ('href', 'src'):
            if attrs.get(key) is not None and tag != 'base': self.links.append((tag, key, attrs[key]))
        if tag == 'img' and not (attrs.get('alt') or '').strip(): self.bare.append(attrs.get('src', ''))

def dead_links(site):
    "Faults of a built site: links and anchors that lead nowhere, things loaded from another host, pictures without alternative text."
    site, read, faults = Path(site).resolve(), {}, []
    for page in sorted(site.rglob('*.html')):
        parsed = _Links(); parsed.feed(page.read_text(encoding='utf-8')); read[page] = parsed
    for page, parsed in read.items():
        where = page.relative_to(site).as_posix()
        faults += [f'{where}: picture {src[:60]} has no alternative text' for src in parsed.bare]
        for tag, key, link in parsed.links:
            parts = urlsplit(link)
            if parts.scheme in ('http', 'https') or link.startswith('//'):
                if key == 'src' or tag == 'link' and not link.startswith(settings()['doc_host']): faults.append(f'{where}: loads {link}')
                continue
            if parts.scheme: continue
            target = (page.parent/unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir(): target = target/'index.html'
            if not target.exists(): faults.append(f'{where}: {link} does not exist')
            elif parts.fragment and target in read and unquote(parts.fragment) not in read[target].ids and parts.fragment != 'top':
                faults.append(f'{where}: {link} has no such anchor')
    return faults

def build(out=ROOT/'_docs', draft=False):
    "Write pages, run Sphinx with warnings as errors, check links; raises SystemExit where something is wrong."
    from sphinx.cmd.build import build_main
    start, source, work = time.time(), ROOT/'docs'/'_src', ROOT/'docs'/'_build'
    texts = pages(settings(), draft)
    write(source, texts)
    vendor(work/'vendored')
    shutil.rmtree(out, ignore_errors=True)
    strict = [] if draft else ['-W', '--keep-going']
    status = build_main(['-q', '-E', *strict, '-b', 'html', '-c', str(ROOT/'docs'), '-d', str(work/'doctrees'), str(source), str(out)])
    if status: raise SystemExit(f'sphinx: exit status {status}')
    faults = dead_links(out)
    if faults:
        report = '\n'.join(faults[:50] + [f'{len(faults)} faults in the built site'])
        if not draft: raise SystemExit(report)
        print(report)
    size = sum(f.stat().st_size for f in Path(out).rglob('*') if f.is_file())
    print(f'{out}: {len(texts)} pages, {size/2**20:.1f} MB, {time.time() - start:.0f} s')

def serve(out=ROOT/'_docs', port=8000):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(out))
    with http.server.ThreadingHTTPServer(('127.0.0.1', port), handler) as server:
        url = f'http://127.0.0.1:{server.server_port}/'
        print(f'serving {url} (stop with Ctrl-C)')
        webbrowser.open(url)
        try: server.serve_forever()
        except KeyboardInterrupt: pass

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--serve', action='store_true', help='serve the site on this machine after the build')
    parser.add_argument('--port', type=int, default=8000)
    parser.add_argument('--draft', action='store_true', help='build although nbs/sidebar.yml and the notebooks differ')
    args = parser.parse_args()
    build(draft=args.draft)
    if args.serve: serve(port=args.port)
