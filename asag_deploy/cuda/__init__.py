"""The GPU through NVIDIA's `cuda-python`: memory, one stream, events, captured graphs, foreign arrays.

Nothing of it is imported before a GPU backend asks for it.
"""

from asag_deploy.cuda.device import Device
from asag_deploy.cuda.interchange import is_device_array
from asag_deploy.cuda.memory import DeviceArray
from asag_deploy.cuda.runtime import Cuda, open_cuda, why_no_cuda

__all__ = ["Cuda", "Device", "DeviceArray", "is_device_array", "open_cuda", "why_no_cuda"]
