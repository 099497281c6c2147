"""Child of the doctor: imports the libraries one by one and says what torch sees."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from typing import Any

from raycomplete.doctor.child import tell

# torchaudio and torchcodec are none of ours, but where they are installed transformers imports them.
_OPTIONAL = ("torchaudio", "torchcodec")
_LIBRARIES = ("torch", *_OPTIONAL, "transformers", "datasets", "peft", "ray", "deepspeed", "vllm")


def main(quick: bool) -> None:
    for name in _LIBRARIES:
        if (name in _OPTIONAL and importlib.util.find_spec(name) is None) or (quick and name == "vllm"):
            continue
        tell({"begins": name})
        started = time.perf_counter()
        try:
            module = importlib.import_module(name)
            seconds = round(time.perf_counter() - started, 2)
            stats = _torch(module) if name == "torch" else {}
        except BaseException as error:  # some libraries exit
            tell({name: {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}})
            continue
        tell({name: {"seconds": seconds, **stats}})


def _torch(torch: Any) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"cuda_build": torch.version.cuda, "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        devices.append({"name": name, "capability": list(capability), "free_bytes": free, "total_bytes": total})
    return {"cuda_build": torch.version.cuda, "devices": devices}


if __name__ == "__main__":
    main("--quick" in sys.argv)
