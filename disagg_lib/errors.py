"""All errors that this project raises on purpose: a message says where, what was found, what is needed, what to do.

DisaggError
├── ParameterError          a parameter has the wrong name, type or value
│   └── TopologyError       servers, GPUs, nodes and tasks do not add up
├── PreflightError          a requirement is not met
├── RunFolderError          a run folder is not what it should be
├── JobError                a job cannot be submitted, found or followed
│   └── NoAnswer            Slurm did not answer; nothing is known
├── SetupError              a probe, image or client job went wrong
├── ModelError              the checkpoint is absent, damaged or another one
│   └── HubError            checkpoint/hub.py: the hub refuses or is out of reach
├── LogError                results/logs.py: a LoadGen log is missing, cut short or contradicts itself
├── ClaimError              a run claims a round that is not known
├── EvaluationError         an accuracy log cannot be scored
├── LengthsError, LatencyTableError, SimulationError, CalibrationError, PlanError    the serving model
├── ServeConfigError        what the stand-in server refuses, as the real one does
├── ExportError             a run cannot be shared in this form
└── SecretError             something like a secret remains
"""


class DisaggError(Exception):
    """Base of every error that this project raises on purpose."""


class PreflightError(DisaggError):
    """A requirement is not met."""


class RunFolderError(DisaggError):
    """A run folder is absent, taken or not what it should be."""


class ParameterError(DisaggError):
    """A parameter has an unknown name, a wrong type or an impossible value."""


class TopologyError(ParameterError):
    """Servers, GPUs, nodes and tasks do not add up."""


class ClaimError(DisaggError):
    """A run claims a round that data/rounds.yaml does not know."""


class EvaluationError(DisaggError):
    """An accuracy run that cannot be evaluated: what is missing and where it comes from."""


class CalibrationError(DisaggError):
    """Runs that cannot be fitted, or a calibration file that cannot be used."""


class LatencyTableError(DisaggError):
    """No table for what was asked, or a table file that cannot be read."""


class LengthsError(DisaggError):
    """A lengths file cannot be used, or lengths were asked for that cannot exist."""


class PlanError(DisaggError):
    """No topology fits, or a QPS is beyond what a topology can serve."""


class SimulationError(DisaggError):
    """A deployment that cannot serve a request, or parameters that make no sense."""


class ServeConfigError(DisaggError):
    """A file or command line that `trtllm-serve` would refuse."""


class ModelError(DisaggError):
    """The checkpoint is absent, damaged or another one than the experiment assumes."""


class JobError(DisaggError):
    """A job cannot be submitted, found or followed."""


class NoAnswer(JobError):
    """Slurm did not answer; nothing is known of the job, least of all that it has ended."""


class SetupError(DisaggError):
    """A setup job failed, or cannot be made from these parameters."""


class SecretError(DisaggError):
    """Something that must not be shared is still in what would be shared."""


class ExportError(DisaggError):
    """A run cannot be shared in the wanted form: why, and what to do."""
