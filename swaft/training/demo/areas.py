"""Which modules of the standard library make up which area of the task `python_docstrings`."""

from __future__ import annotations

_MODULES = {
    "asyncio": "asyncio",
    "dates": "datetime _pydatetime calendar _strptime zoneinfo",
    "debugging": "ast bdb cProfile code codeop dis doctest inspect pdb profile pstats pyclbr symtable timeit "
    "tokenize trace traceback tracemalloc unittest",
    "email": "email imaplib mailbox mailcap nntplib poplib quopri smtplib",
    "files": "_compression _pyio bz2 filecmp fileinput genericpath glob gzip lzma ntpath pathlib posixpath "
    "shutil tarfile tempfile zipfile",
    "imports": "imp importlib modulefinder pkgutil runpy site zipimport",
    "logging": "logging",
    "numbers": "_pydecimal _pylong fractions numbers random statistics",
    "processes": "_threading_local concurrent multiprocessing queue signal subprocess threading",
    "text": "argparse codecs configparser csv difflib encodings gettext json locale optparse pprint re shlex "
    "string textwrap",
    "web": "cgi ftplib http ipaddress socket socketserver ssl telnetlib urllib webbrowser wsgiref",
    "xml": "html plistlib xml xmlrpc",
}

AREAS = {area: tuple(modules.split()) for area, modules in _MODULES.items()}
"""Area to top-level modules, packages whole. A module that this Python lacks is passed over."""
