"""A real Slurm cluster on this machine: munge, slurmdbd on MariaDB, slurmctld, and a slurmd for each virtual node.

It differs from a cluster in that all nodes share one network stack and one file system. Each node has a loopback
address of its own (127.0.1.k), a name that resolves within its namespace, its own host name and its own /tmp of
PMIx; GPUs are four harmless device files. pyxis, enroot and real GPUs are not here.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = (
    "munged",
    "mariadbd",
    "mariadb-install-db",
    "slurmdbd",
    "slurmctld",
    "slurmd",
    "sbatch",
    "unshare",
    "runuser",
)
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins slurm-wlm-mysql-plugin slurmdbd mariadb-server munge libpmix2 libpmix-dev"
NODES = {  # partition -> node names; the last two styles broke the original's node-list parser
    "batch": [f"gb{k:02d}" for k in range(1, 19)],
    "r1": [f"gb200-r1-{k:02d}" for k in range(1, 6)],
    "nvl": ["nvl101", "nvl102", "nvl103", "nvl201", "nvl202"],
}
PORTS = {"slurmctld": 26817, "slurmdbd": 26818, "mariadb": 26819, "slurmd": 26820}  # slurmd: + node number
SBIN = "/usr/sbin:/sbin"
ONLY_ONE = (Path(tempfile.gettempdir()) / "disagg_lib_test_cluster.lock").open(
    "a"
)  # held until this process ends


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of its own needs root (mount namespaces); run `sudo make test-slurm`"
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} absent; on Debian: apt install {PACKAGES}"
    try:
        fcntl.flock(ONLY_ONE, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            f"another test cluster is up on this machine (it holds {ONLY_ONE.name}), and its ports are fixed"
        )
    return None


class Cluster:
    """Start with `with Cluster() as cluster:`; `cluster.environment` makes every Slurm command talk to it."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [node for nodes in NODES.values() for node in nodes]
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:{SBIN}",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_):
        self._stop()

    def run(self, *command: str, check: bool = True, timeout_s: float = 60.0) -> str:
        """Standard output of a Slurm command."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
        return done.stdout

    def idle_nodes(self, partition: str = "batch") -> int:
        """Nodes that nobody holds."""
        return int(self.run("sinfo", "-h", "-p", partition, "-t", "idle", "-o", "%D").strip() or 0)

    def stop_node(self, node: str) -> None:
        """End a node's daemon; the controller finds out after SlurmdTimeout."""
        self._end(f"slurmd-{node}")

    def start_node(self, node: str) -> None:
        place = self.folder / "nodes" / node
        place.mkdir(parents=True, exist_ok=True)
        script = (
            f"mount --bind {place} {self.folder}/tmpfs && mount --bind {self.folder}/hosts /etc/hosts && "
            f"hostname {node} && exec slurmd -D -N {node}"
        )
        self._launch(
            f"slurmd-{node}", "unshare", "--mount", "--uts", "--propagation", "private", "bash", "-c", script
        )

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def start_controller(self) -> None:
        self._launch("slurmctld", "slurmctld", "-D")

    def wait(self, what: str, condition, timeout_s: float = 60.0):
        """Wait for condition() to be true."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {timeout_s} s. Logs: {self._tails()}")
            time.sleep(0.2)

    def _tails(self) -> str:
        return "\n".join(
            f"{p.name}: {p.read_text()[-500:]}"
            for p in sorted(self.folder.glob("*.log"))
            if "slurmd-" not in p.name
        )

    def _launch(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def _end(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _stop(self) -> None:
        if (self.folder / "slurm.conf").exists() and "slurmctld" in self.processes:
            self.run("scancel", "--user=root", check=False)
            time.sleep(1)
        for name in reversed(list(self.processes)):
            self._end(name)
        subprocess.run(["umount", "--lazy", self.folder / "small"], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("munge", "mysql", "spool", "state", "tmpfs", "nodes", "small"):
            (folder / name).mkdir()
        # A small disk that can be filled; mounted before the nodes' namespaces are made of what is there.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder / "small"], check=True)
        for node in self.nodes:
            (folder / "spool" / node).mkdir()
        (folder / "munge/key").write_bytes(os.urandom(128))
        (folder / "munge/key").chmod(0o400)
        for name in ("munge", "mysql"):
            shutil.chown(folder / name, name, name)
        shutil.chown(folder / "munge/key", "munge", "munge")
        hosts = "".join(f"127.0.1.{k} {node}\n" for k, node in enumerate(self.nodes, 1))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        self._write_conf()
        place = folder / "munge"
        self._launch(
            "munged", "runuser", "-u", "munge", "--", "munged", "--foreground", f"--key-file={place}/key",
            f"--socket={place}/socket", f"--pid-file={place}/pid", f"--log-file={place}/log", f"--seed-file={place}/seed",
        )  # fmt: skip
        self.run(
            "mariadb-install-db",
            "--user=mysql",
            f"--datadir={folder}/mysql",
            "--auth-root-authentication-method=normal",
        )
        self._launch(
            "mariadbd", "mariadbd", "--no-defaults", "--user=mysql", f"--datadir={folder}/mysql", f"--socket={folder}/mysql/socket",
            "--bind-address=127.0.0.1", f"--port={PORTS['mariadb']}", f"--pid-file={folder}/mysql/pid",
            "--innodb-buffer-pool-size=64M",
        )  # fmt: skip
        client = ("mariadb", "--no-defaults", f"--socket={folder}/mysql/socket")
        self.wait("MariaDB answers", lambda: "1" in self.run(*client, "-e", "select 1", check=False))
        self.run(
            *client,
            "-e",
            "create user slurm@127.0.0.1 identified by 'slurm'; grant all on *.* to slurm@127.0.0.1",
        )
        self.wait("munge answers", (place / "socket").exists)
        self._launch("slurmdbd", "slurmdbd", "-D")
        self.wait(
            "slurmdbd answers",
            lambda: "Cluster" in self.run("sacctmgr", "-P", "list", "cluster", check=False),
        )
        self.start_controller()
        self.wait("the controller is up", lambda: "is UP" in self.run("scontrol", "ping", check=False))
        self.wait(
            "the cluster is registered",
            lambda: "test" in self.run("sacctmgr", "-nP", "list", "cluster", check=False),
        )
        for words in (("account", "mlperf"), ("account", "other"), ("user", "root", "account=mlperf")):
            self.run("sacctmgr", "-i", "add", *words, check=False)
        for node in self.nodes:
            self.start_node(node)
        self.wait(
            "all nodes are idle",
            lambda: all(self.idle_nodes(p) == len(nodes) for p, nodes in NODES.items()),
            120,
        )

    def _write_conf(self) -> None:
        folder = self.folder
        lines = [
            "ClusterName=test",
            "SlurmctldHost=localhost(127.0.0.1)",
            f"SlurmctldPort={PORTS['slurmctld']}",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"AuthInfo=socket={folder}/munge/socket",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"TmpFS={folder}/tmpfs",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",
            "GresTypes=gpu",
            "ReturnToService=2",
            "SlurmdTimeout=10",
            "KillWait=5",
            "MinJobAge=300",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "TreeWidth=50",
            "SlurmctldDebug=info",
            "SlurmdDebug=info",
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={PORTS['slurmdbd']}",
            f"AccountingStoragePass={folder}/munge/socket",
            "AccountingStorageEnforce=associations,limits",
        ]
        for number, node in enumerate(self.nodes, 1):
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr=127.0.1.{number} Port={PORTS['slurmd'] + number} CPUs=8 Gres=gpu:4 State=UNKNOWN"
            )
        for partition, nodes in NODES.items():
            default = " Default=YES" if partition == "batch" else ""
            lines.append(
                f"PartitionName={partition} Nodes={','.join(nodes)}{default} MaxTime=8:00:00 State=UP"
            )
        lines.append(f"PartitionName=short Nodes={NODES['batch'][0]} MaxTime=0:10:00 State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        devices = ",".join(f"/dev/{name}" for name in ("full", "null", "random", "zero"))
        (folder / "gres.conf").write_text(
            "AutoDetect=off\n"
            + "".join(
                f"NodeName={node} Name=gpu File={d}\n" for node in self.nodes for d in devices.split(",")
            )
        )
        (folder / "plugstack.conf").write_text("")
        (folder / "slurmdbd.conf").write_text(
            f"AuthInfo=socket={folder}/munge/socket\nDbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={PORTS['slurmdbd']}\n"
            f"SlurmUser=root\nPidFile={folder}/slurmdbd.pid\nStorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
            f"StoragePort={PORTS['mariadb']}\nStorageUser=slurm\nStoragePass=slurm\nStorageLoc=slurm_acct\n"
        )
        (folder / "slurmdbd.conf").chmod(0o600)
