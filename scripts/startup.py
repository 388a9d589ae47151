"""Loads ringattn/runs/signals.py before the package ringattn, whose import of JAX takes seconds.

Otherwise, Ctrl-C during the import would print a traceback or be lost in a callback of JAX.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process without a traceback during the imports below

import importlib.util
import os
import sys

NAME = "ringattn.runs.signals"

package = importlib.util.find_spec("ringattn")  # does not import it
if package is None or not package.submodule_search_locations:
    raise ModuleNotFoundError("No module named 'ringattn': run pip install -e . in the repository")
path = os.path.join(package.submodule_search_locations[0], "runs", "signals.py")
spec = importlib.util.spec_from_file_location(NAME, path)
assert spec is not None
assert spec.loader is not None
signals = importlib.util.module_from_spec(spec)
sys.modules[NAME] = signals  # the package uses the same module
spec.loader.exec_module(signals)
