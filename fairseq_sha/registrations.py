"""Names that two plug-ins have registered.

fairseq's main branch keeps the first model or task and says nothing. fairseq 0.12.2 raises an
error, as both do for optimisers and criterions.
"""

import ast
import inspect
import logging
import sys
from types import ModuleType

from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY

logger = logging.getLogger(__name__)

PACKAGE = __name__.partition(".")[0]


def taken_names(models, tasks):
    """Which of this package's names another plug-in registered before: a dict of name to the
    other's module.

    Args:
        models, tasks (iterable of str): names that this package registers
    """
    registered = [(name, MODEL_REGISTRY[name]) for name in models]
    registered += [(name, TASK_REGISTRY[name]) for name in tasks]
    return {
        name: cls.__module__
        for name, cls in registered
        if cls.__module__.partition(".")[0] != PACKAGE
    }


def lost_names():
    """Names that another plug-in tried to register after this package: a dict of name to the
    other's module."""
    lost = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] == PACKAGE or not isinstance(module, ModuleType):
            continue
        for name, cls in _registered_classes_in(module):
            ours = cls.__module__.partition(".")[0] == PACKAGE
            if ours and not _imports_it(module, cls):
                lost[name] = module_name
    return lost


def _registered_classes_in(module):
    """Pairs of name and class."""
    registered = {id(cls): (name, cls) for name, cls in _all_registered()}
    # A list: modules may change while they are looked at. Lazy ones must not be woken.
    held = list(vars(module).values())
    return [registered[id(value)] for value in held if id(value) in registered]


def _all_registered():
    return [*MODEL_REGISTRY.items(), *TASK_REGISTRY.items()]


def _imports_it(module, cls):
    """Whether a module holds a class because it imports it, and not in the place of its own."""
    attributes = {name for name, value in list(vars(module).items()) if value is cls}
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return True
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return not attributes & defined


def warn_of_taken_names(taken):
    """Log what :func:`taken_names` returned."""
    for name, module in taken.items():
        logger.warning(
            "%s: %s has registered this name before, so fairseq uses that one; to use the one of "
            "fairseq_sha, do not import the other",
            name,
            module,
        )


def warn_of_lost_registrations():
    """Log each of :func:`lost_names`."""
    for name, module in lost_names().items():
        logger.warning(
            "%s: %s registers this name too, but fairseq_sha came first, so fairseq uses that one",
            name,
            module,
        )
