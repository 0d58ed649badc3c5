"""Checkers for the book's exercises: properties on random inputs; the first that fails is named, with a hint.

The exercise labelled ``inv-ex-1`` is checked by ``odlkit.check.inv_1(your_function)``, whose docstring says what the
function takes and returns; tensors are ``(B, C, H, W)``.  It prints one line when every property holds and raises `NotYet`,
an ``AssertionError``, when one does not.  Passing says that no draw refuted a property, not that the function is proved.
"""

from odlkit.check.base import NotYet as NotYet
from odlkit.check.beyond import *  # noqa: F403
from odlkit.check.dgunet import *  # noqa: F403
from odlkit.check.fewshot import *  # noqa: F403
from odlkit.check.foundations import *  # noqa: F403
from odlkit.check.gdc import *  # noqa: F403
from odlkit.check.hodl import *  # noqa: F403
from odlkit.check.padnet import *  # noqa: F403
from odlkit.check.pipelines import *  # noqa: F403
from odlkit.check.podm import *  # noqa: F403
from odlkit.check.synthesis import *  # noqa: F403
