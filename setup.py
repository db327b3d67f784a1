"Packaging from settings.ini, the one place that names versions and requirements."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

top = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='])
parser.read(top/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
name,lib = cfg['lib_name'],cfg['lib_path']
readme = top/'README.md'
minor = int(cfg['min_python'].split('.')[1])

setup(
    name=name,
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host']+cfg['doc_baseurl'], 'Source': cfg['git_url']},
    author=cfg['author'],
    author_email=cfg['author_email'],
    license={'apache2':'Apache-2.0'}[cfg['license']],
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    classifiers=[
        {'1':'Development Status :: 1 - Planning', '2':'Development Status :: 2 - Pre-Alpha',
         '3':'Development Status :: 3 - Alpha', '4':'Development Status :: 4 - Beta',
         '5':'Development Status :: 5 - Production/Stable'}[cfg['status']],
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f'Programming Language :: Python :: 3.{m}' for m in range(minor, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    python_requires=f">={cfg['min_python']}",
    packages=[lib],
    # Weights, results and scripts beside the modules go into the wheel with them.
    package_data={lib: ['*', '**/*']},
    exclude_package_data={lib: ['__pycache__/*', '**/__pycache__/*', '*.py[co]', '.*']},
    include_package_data=False,
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev','hub','board','export')},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{lib}={lib}._modidx:d'], # lets other nbdev projects link to these names
    },
    zip_safe=False,
)
