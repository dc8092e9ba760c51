"""Five seconds of LoadGen, from one folder, with a server that answers at once: versions and verdict as JSON.

check_client.py LOGS FOLDER; it ends with status 1 if a module comes from elsewhere than FOLDER, or LoadGen says INVALID.
"""

import json
import os
import platform
import sys

import mlperf_loadgen as lg
import numpy
import uvloop

logs, folder = sys.argv[1], os.path.realpath(sys.argv[2])
for module in (lg, numpy, uvloop):
    if not os.path.realpath(module.__file__).startswith(folder + os.sep):
        sys.exit(f"{module.__name__} comes from {module.__file__}, not from {folder}")
os.makedirs(logs)
settings = lg.TestSettings()
settings.scenario, settings.mode = lg.TestScenario.Server, lg.TestMode.PerformanceOnly
settings.server_target_qps, settings.min_duration_ms, settings.server_target_latency_ns = 200.0, 5000, 10**9
output, log = lg.LogOutputSettings(), lg.LogSettings()
output.outdir = logs
log.log_output, log.enable_trace = output, False
sut = lg.ConstructSUT(
    lambda queries: lg.QuerySamplesComplete([lg.QuerySampleResponse(q.id, 0, 0) for q in queries]),
    lambda: None,
)
qsl = lg.ConstructQSL(100, 100, lambda samples: None, lambda samples: None)
lg.StartTestWithLogSettings(sut, qsl, settings, log)
lg.DestroyQSL(qsl)
lg.DestroySUT(sut)
with open(os.path.join(logs, "mlperf_log_summary.txt")) as file:
    verdict = [line.split()[-1] for line in file if line.startswith("Result is")]
found = {"result": verdict[0] if verdict else "none", "python": platform.python_version()}
found.update(machine=platform.machine(), numpy=numpy.__version__, uvloop=uvloop.__version__)
print(json.dumps(found))
sys.exit(verdict != ["VALID"])
