"""The commands of `detrdistill`, a function each: its signature is the command line, its docstring the help.

What they need is imported when they run: torch takes seconds, and a mistyped parameter should not.
"""

from detrdistill.commands.models import compare, evaluate, export, predict
from detrdistill.commands.pages import check, notebook, plan, report
from detrdistill.commands.training import train, tune

COMMANDS = (train, tune, check, evaluate, predict, compare, plan, report, notebook, export)
