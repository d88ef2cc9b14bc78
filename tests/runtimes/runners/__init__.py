"""The runtimes, a file each."""

from __future__ import annotations

from tests.runtimes.runners import (
    browser,
    coreml,
    executorch,
    iree,
    litert,
    mnn,
    ncnn,
    nncf,
    onnxruntime,
    onnxsim,
    onnxslim,
    opencv,
    openvino,
    quantizers,
    reference,
    tinygrad,
    tract,
    tvm,
)
from tests.runtimes.runners.runtime import Runtime

RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": onnxruntime.RUNTIME,
    "reference": reference.RUNTIME,
    "openvino": openvino.RUNTIME,
    "tract": tract.RUNTIME,
    "opencv": opencv.RUNTIME,
    "mnn": mnn.RUNTIME,
    "ncnn": ncnn.RUNTIME,
    "coreml": coreml.RUNTIME,
    "onnxslim": onnxslim.RUNTIME,
    "onnxsim": onnxsim.RUNTIME,
    "static": quantizers.STATIC,
    "dynamic": quantizers.DYNAMIC,
    "nncf": nncf.RUNTIME,
    "wasm": browser.WASM,
    "webgpu": browser.WEBGPU,
    "jsep": browser.JSEP,
    "tvm": tvm.RUNTIME,
    "iree": iree.RUNTIME,
    "executorch": executorch.RUNTIME,
    "litert": litert.RUNTIME,
    "tinygrad": tinygrad.RUNTIME,
}
"""By the name of the file"""
