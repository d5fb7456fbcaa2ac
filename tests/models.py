"""What some tests still import of the zoo by its former name: see :mod:`tests.zoo`."""

from tests.zoo import ZOO as ZOO
from tests.zoo import Awkward as Awkward
from tests.zoo import InplaceBody as InplaceBody
from tests.zoo import noise as noise
