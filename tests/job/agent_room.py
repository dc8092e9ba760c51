"""A run folder whose agent is called by hand, with commands of Slurm's and enroot's that a test makes up."""

import json
import os
import subprocess
import sys

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.run.writing import create_run

REHEARSAL = {"engine": "rehearsal", "launcher": "local", "container": "none"}


class AgentRoom:
    """A run folder, a folder of commands before all others, and `start` for the agent."""

    def __init__(self, folder, **given):
        self.run = create_run(load_experiment(given=REHEARSAL | given), folder / "run")
        self.commands = folder / "commands"
        self.commands.mkdir()
        (self.run / "job/exit").mkdir()
        self.command("scontrol", "exit 1")
        self.command("sinfo", "exit 1")
        self.agent("admit")

    def command(self, name, text):
        """A command of this name, in bash."""
        path = self.commands / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def settings(self, **values):
        path = self.run / "job/settings.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def start(self, *words, **environment):
        """The agent's process; what it says goes into the file `said`."""
        path = f"{self.commands}:{os.environ['PATH']}"
        command = [sys.executable, self.run / "job/program", "agent", *words]
        with (self.run / "said").open("w") as said:
            return subprocess.Popen(
                command, env={**os.environ, "PATH": path, **environment}, stdout=said, stderr=said
            )

    def agent(self, *words, **environment):
        """What it says, at its end."""
        self.start(*words, **environment).wait(60)
        return (self.run / "said").read_text()

    @property
    def reason(self):
        return (self.run / "job/reason.txt").read_text().strip()
