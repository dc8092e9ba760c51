"""The one base of this project's errors: a message says where, what was found, what is needed, what to do.

DisaggError
├── ParameterError      experiment.py       a parameter has the wrong name, type or value
│   └── TopologyError   experiment.py       servers, GPUs, nodes and tasks do not add up
├── PreflightError      preflight.py        a requirement is not met
├── RunFolderError      run_folder.py       a run folder is not what it should be
├── JobError            launch.py           a job cannot be submitted, found or followed
│   └── NoAnswer        launch.py           Slurm did not answer; nothing is known
├── ModelError          model_store.py      the checkpoint is absent, damaged or another one
│   └── HubError        model_store.py      the hub refuses or is out of reach
├── SetupError          setup_jobs.py       a probe, image or client job went wrong
├── LogError            mlperf_logs.py      a LoadGen log is missing, cut short or contradicts itself
├── ClaimError          validity.py         a run claims a round that is not known
├── EvaluationError     evaluate.py         an accuracy log cannot be scored
├── ExportError         export.py           a run cannot be shared in this form
├── SecretError         redaction.py        something like a secret remains
└── serving/            LengthsError, LatencyTableError, ServeConfigError, SimulationError, CalibrationError, PlanError
"""


class DisaggError(Exception):
    """Base of every error that this project raises on purpose."""
