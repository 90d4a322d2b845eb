"""Build nas_nb from the metadata in settings.ini (the file nbdev itself reads)."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def words(key): return cfg.get(key, '').split()

readme = here/'README.md'
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    url=cfg['git_url'], author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
    project_urls={'Documentation': cfg['doc_host'].rstrip('/') + cfg['doc_baseurl'] + '/', 'Source': cfg['git_url']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: ' + cfg['audience'],
                 'Natural Language :: ' + cfg['language'], 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    keywords=words('keywords'), python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=['nas_nb', 'nas_nb.*']), package_data={'nas_nb': ['space/*.csv']},
    install_requires=words('requirements'),
    extras_require={k: words(f'{k}_requirements') for k in ('data', 'export', 'sparse', 'cluster', 'energy', 'parquet', 'dev', 'docs')},
    entry_points={'console_scripts': words('console_scripts'),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False,
)
