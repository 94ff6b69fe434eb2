from mpt_trt.api.engine import Engine as Engine
from mpt_trt.errors import MptTrtError as MptTrtError

__version__: str
