"""Files: recorded loads in, plans in and out. One module per format; `arrays` reads what they share."""

from eplb_triton.formats.atomic import check_writable, write_whole
from eplb_triton.formats.errors import FormatError
from eplb_triton.formats.loads import read_loads
from eplb_triton.formats.maps import NEED_GPUS, SUFFIXES_OF, check_map_path, read_map, write_map
from eplb_triton.formats.plans import PlanFile, check_plan_path, read_plan, write_plan
from eplb_triton.formats.recordings import LoadSeries, Recording, RoutingTrace
from eplb_triton.formats.slot_map import SlotMap
from eplb_triton.formats.streaming import StepStream, open_steps

__all__ = [
    "NEED_GPUS",
    "SUFFIXES_OF",
    "FormatError",
    "LoadSeries",
    "PlanFile",
    "Recording",
    "RoutingTrace",
    "SlotMap",
    "StepStream",
    "check_map_path",
    "check_plan_path",
    "check_writable",
    "open_steps",
    "read_loads",
    "read_map",
    "read_plan",
    "write_map",
    "write_plan",
    "write_whole",
]
