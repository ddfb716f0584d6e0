"""Files: recorded loads in, plans in and out. One module per format; `arrays` reads what they share."""

from eplb_triton.formats.atomic import check_writable, write_whole
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.loads import read_loads
from eplb_triton.formats.plans import PlanFile, check_plan_path, read_plan, write_plan
from eplb_triton.formats.recordings import LoadSeries, Recording, RoutingTrace

__all__ = [
    "FormatError",
    "LoadSeries",
    "PlanFile",
    "Recording",
    "RoutingTrace",
    "check_plan_path",
    "check_writable",
    "read_loads",
    "read_plan",
    "write_plan",
    "write_whole",
]
