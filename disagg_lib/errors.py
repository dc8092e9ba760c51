"""The one base of this project's errors: a message says where, what was found, what is needed, what to do.

DisaggError
├── ParameterError      experiment.py      a parameter has the wrong name, type or value
│   └── TopologyError   experiment.py      servers, GPUs, nodes and tasks do not add up
├── PreflightError      preflight.py       a requirement is not met
├── LogError            mlperf_logs.py     a LoadGen log is missing, cut short or contradicts itself
├── ModelError          model_store.py     the checkpoint is absent, damaged or another one
├── JobError            launch.py          a job cannot be submitted, found or followed
└── RunFolderError      run_folder.py      a run folder is not what it should be
"""


class DisaggError(Exception):
    """Base of every error that this project raises on purpose."""
