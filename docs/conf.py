"""Sphinx configuration. `tools/build_docs.py` writes the pages into docs/_src and calls Sphinx with this file."""
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

project, author, version = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
language = 'en'
extensions = ['myst_nb', 'sphinx.ext.viewcode']
html_theme = 'furo'
html_title = f'{project} {version}'
html_baseurl = settings['doc_host'].rstrip('/') + settings['doc_baseurl'] + '/'
html_static_path = [str(root/'docs'/'static'), str(root/'docs'/'_build'/'vendored')]
html_css_files = ['site.css']
html_favicon = str(root/'docs'/'static'/'favicon.svg')
html_copy_source = html_show_sourcelink = False
html_theme_options = {'source_repository': '', 'top_of_page_buttons': []}
html_last_updated_fmt = None

nb_execution_mode = 'off'            # stored outputs are shown, nothing runs
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_inline', 'attrs_block', 'deflist']
myst_heading_anchors = 4
add_module_names = False
toc_object_entries_show_parents = 'hide'
python_use_unqualified_type_names = True
viewcode_line_numbers = True
viewcode_follow_imported_members = False

mathjax_path = 'mathjax/tex-svg.js'   # one file, no fonts to load, no other host
mathjax3_config = mathjax4_config = {'options': {'enableMenu': False}}

kept = {}     # (folder, options) -> HTML

def share_navigation(app, pagename, templatename, context, doctree):
    "The navigation of pages that do not stand in it (papers, code) is the same for all of a folder: it is made once."
    if context.get('parents') or context.get('prev') or context.get('next') or pagename == app.config.root_doc: return
    make, folder = context['toctree'], pagename.rpartition('/')[0]
    def toctree(**options):
        key = (folder, *sorted(options.items()))
        if key not in kept: kept[key] = make(**options)
        return kept[key]
    context['toctree'] = toctree

def setup(app): app.connect('html-page-context', share_navigation, priority=400)     # before the theme's
