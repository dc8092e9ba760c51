"""The container image: built by a job, checked, its digest recorded."""

import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..checks import Check
from ..errors import JobError, SetupError
from ..experiment.parameters import Experiment
from ..files import sha256
from ..run.made_with import cite_image, image_record
from .probe import ELF_MACHINES, last_probe, probe_script, read_probe
from .setup_job import failed_row, job_header, require_given, run_setup_job


def image_script(e: Experiment, arch: str = "aarch64") -> str:
    """The job that builds `container_image` with the harness's makefile, and leaves `<image>.sha256` beside it.

    From the v5.1 code: the makefile lies in closed/NVIDIA itself (the original's README says one folder below),
    needs --container-remap-root and a writable root file system, and asks: for the account, if none is given, then whether to go on.

    Raises
    ------
    SetupError : a parameter is not given or not a plain path, or the makefile is not there.
    """
    require_given(e, "image", "harness_dir", "container_image", "partition")
    if not (Path(e.harness_dir) / "Makefile.pyxis").is_file():
        needed = "the v5.1 tree's closed/NVIDIA"
        raise SetupError(f"harness_dir: {e.harness_dir} has no Makefile.pyxis. Needed: {needed}")
    if not e.container_image.endswith(".sqsh"):
        needed = "the path of the .sqsh file to make"
        raise SetupError(f"container_image: found {e.container_image!r}, needed {needed}")
    for key in ("harness_dir", "container_image", "scratch_dir"):
        if not re.fullmatch(r"[\w./+@=-]+", getattr(e, key)):
            why = "make and its recipes would split or expand it. Use a path of letters, digits and ./_+@=-"
            raise SetupError(f"{key}: found {getattr(e, key)!r}; {why}")
    values = {
        "ARCH": arch,
        "SLURM_MODE": "srun",
        "SBATCH_PARTITION": e.partition,
        "SBATCH_ACCOUNT": e.account or "",
        "INSTALL_TRTLLM": "1",
        "INSTALL_LOADGEN": "1",
        "MLPERF_SCRATCH_PATH": e.scratch_dir,
        # enroot's default is a root file system that is read-only.
        "EXTRA_SRUN_FLAGS": "--container-remap-root --container-writable",
    }
    answers = "y\\n" if e.account else "\\ny\\n"
    return (
        job_header(e, "image", e.time_limit, exclusive="", mem="0")
        + f"""image={shlex.quote(e.container_image)}
[[ -e $image ]] && fail "$image is there already, and nothing is overwritten"
draft=${{image%.sqsh}}.draft-${{SLURM_JOB_ID:-$$}}.sqsh # it gets its name when it is whole
cd -- {shlex.quote(e.harness_dir)} || exit 1
printf '{answers}' | make -f Makefile.pyxis build_base_sqsh "SBATCH_CONTAINER_SAVE=$draft" \\
  {shlex.join(f"{key}={value}" for key, value in values.items())} || exit 1
[[ $(head -c 4 -- "$draft") == hsqs ]] || fail "$draft is no squashfs image"
digest=$(sha256sum <"$draft") || exit 1
mv -n -- "$draft" "$image"
[[ -e $draft ]] && fail "$image came from elsewhere meanwhile"
[[ -e $image.sha256 ]] || printf '%s  %s\\n' "${{digest%% *}}" "${{image##*/}}" >"$image.sha256"
"""
    )


def _image_arch(image: Path) -> str:
    """Architecture of a program in the image, from its ELF header; or why it is not known."""
    if shutil.which("unsquashfs") is None:
        return "not looked at: unsquashfs (package squashfs-tools) is absent here"
    with tempfile.TemporaryDirectory() as place:
        command = ["unsquashfs", "-no-xattrs", "-d", f"{place}/root", str(image), "usr/bin/env"]
        try:
            subprocess.run(command, capture_output=True, timeout=120)
        except subprocess.TimeoutExpired:
            return "not looked at: unsquashfs took more than 120 s"
        program = Path(place) / "root/usr/bin/env"
        # A link would lead to a program of this machine.
        head = program.read_bytes()[:20] if program.is_file() and not program.is_symlink() else b""
    if head[:4] != b"\x7fELF":
        return "not known: no program usr/bin/env in it"
    machine = int.from_bytes(head[18:20], "little")
    return ELF_MACHINES.get(machine, f"ELF machine {machine}")


def image_checks(image: str | Path, arch: str = "aarch64", min_gb: float = 1.0) -> list[Check]:
    """Whether a file is an enroot image for this architecture."""
    image, fix = Path(image), "build it (00_setup), or set container_image to one that is"
    if not image.is_file():
        return [Check("container_image is there", f"no file {image}", False, fix)]
    with image.open("rb") as file:
        magic = file.read(4)
    squashfs, size_gb = magic == b"hsqs", image.stat().st_size / 1e9
    found = _image_arch(image) if squashfs else "no squashfs image"
    see, level = (f"see that it is for {arch}", "warning") if found.startswith("not ") else (fix, "error")
    size = (f"container_image has {min_gb} GB or more", f"{size_gb:.2f} GB", size_gb >= min_gb)
    return [
        Check("container_image is a squashfs image", repr(magic), squashfs, fix),
        Check(*size, f"it was cut short: {fix}"),
        Check(f"container_image is for {arch}", found, found == arch, see, level=level),
    ]


def build_image(e: Experiment, arch: str = "aarch64", out=print, min_gb: float = 1.0) -> list[Check]:
    """Build container_image unless it is there, and check it."""
    if not (e.container_image and Path(e.container_image).exists()):
        run_setup_job(e, "image", image_script(e, arch), out=out)
    return image_checks(e.container_image, arch, min_gb)


def record_image(e: Experiment, out=print) -> dict:
    """Make an image that was brought along citable, too; its own folder is not touched.

    Raises
    ------
    SetupError : scratch_dir cannot be written.
    """
    image, record = Path(e.container_image), image_record(e)
    if cite_image(e) is None:
        out(f"SHA-256 of {image}, once: {image.stat().st_size / 1e9:.2f} GB")
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(f"{sha256(image)}  {image}\n")
        except OSError as error:
            raise SetupError(f"{record}: {error.strerror}. Set scratch_dir to a folder of yours") from None
    return cite_image(e)


def image_rows(e: Experiment, out=print) -> list[Check]:
    """The image's rows; `setup_jobs: all` builds an absent one first. Empty without a container, or for a registry's name."""
    image = e.container_image or ""
    if e.container == "none" or (image and not image.endswith(".sqsh")):
        return []
    looked_at = last_probe(e, probe_script(e))
    arch = read_probe(looked_at)["arch"] if looked_at else "aarch64"  # a GB200's
    if e.setup_jobs == "all":
        try:
            rows = build_image(e, arch, out)
        except (SetupError, JobError) as error:
            return failed_row("image", error)
    else:
        rows = image_checks(image or "container_image, which is not given", arch)
    if Path(image).is_file():
        rows.append(Check("container_image's SHA-256 is recorded", record_image(e, out)["sha256"], True))
    return rows
