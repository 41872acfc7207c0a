"""Launchers: what they would run; shell scripts in a fake cluster; the local one."""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
sys.path.insert(0, str(LAUNCH))
import gke  # noqa: E402
import local  # noqa: E402
import slurm  # noqa: E402
import tpu_vm  # noqa: E402

MAIN = ["--config=configs/quickstart.py", "--config.sample.prompts=(('a b', 1),)"]


def shown(script, *flags, code=0):
  """What a launcher prints."""
  done = subprocess.run(
    [sys.executable, LAUNCH / script, *flags],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code, done.stderr
  return done.stdout if code == 0 else done.stdout + done.stderr


# --- shell


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_pass_shellcheck(script):
  subprocess.run(["bash", "-n", script], check=True)
  checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:"
                         f"{os.environ['PATH']}")  # fmt: skip
  assert checker, 'shellcheck is missing: pip install -e ".[test]"'
  done = subprocess.run([checker, script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def fake(folder, name, text):
  """A program of this name that runs a line of shell."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)


@pytest.mark.parametrize("number, requeued", [("USR1", True), ("TERM", False)])
def test_slurm_saves_and_requeues_when_time_is_up(tmp_path, number, requeued):
  # As a run does: on SIGTERM it ends a little later, with the code it was given.
  run = 'trap "sleep 0.3; echo saved; exit 75" TERM; echo "$@"; while :; do sleep 0.1;'
  fake(tmp_path, "srun", f"{run} done")
  fake(tmp_path, "scontrol", 'echo "scontrol $*"')
  log = tmp_path / "log"
  with log.open("w") as file:
    process = subprocess.Popen(
      ["bash", LAUNCH / "slurm.sh", *MAIN],
      env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
           "SLURM_JOB_ID": "7"},
      stdout=file,
    )  # fmt: skip
  wait_for(lambda: "--config" in log.read_text())
  process.send_signal(getattr(signal, f"SIG{number}"))
  assert process.wait(20) == 75
  text = log.read_text()
  assert "-m sora_jax.main --distributed --preempted_code=75" in text
  assert MAIN[1] in text and "saved" in text
  assert ("scontrol requeue 7" in text) == requeued


def text_of(path):
  """What a file holds that may not be there yet."""
  return path.read_text() if path.exists() else ""


def wait_for(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_a_worker_of_a_tpu_vm_restarts_a_run_that_fails(tmp_path):
  # Fails twice, then succeeds; `sleep` between is not waited for.
  run = 'echo "$@" >>calls; [[ $(wc -l <calls) -ge 3 ]]'
  fake(tmp_path / ".venv" / "bin", "python", run)
  fake(tmp_path / "bin", "sleep", "true")
  start = ["bash", LAUNCH / "tpu_vm_run.sh", tmp_path, "5", *MAIN]
  path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
  subprocess.run(start, env={**os.environ, "PATH": path}, check=True, timeout=20)
  wait_for(lambda: "ended with code 0" in text_of(tmp_path / "run.log"))
  calls = (tmp_path / "calls").read_text().splitlines()
  assert len(calls) == 3 and all(MAIN[1] in call for call in calls)
  assert "attempt 1 ended with code 1" in (tmp_path / "run.log").read_text()


def test_a_worker_of_a_tpu_vm_that_is_stopped_does_not_start_again(tmp_path):
  run = 'trap "echo saved; exit 75" TERM; echo started; while :; do sleep 0.1; done'
  fake(tmp_path / ".venv" / "bin", "python", run)
  start = ["bash", LAUNCH / "tpu_vm_run.sh", tmp_path, "5", *MAIN]
  subprocess.run(start, check=True, timeout=20)
  log = tmp_path / "run.log"
  wait_for(lambda: "started" in text_of(log))
  again = subprocess.run(start, capture_output=True, text=True, check=False, timeout=20)
  assert again.returncode == 1 and "a run is under way" in again.stderr
  os.kill(int((tmp_path / "run.pid").read_text()), signal.SIGTERM)
  wait_for(lambda: "attempt 0 ended with code 75" in log.read_text())
  time.sleep(0.3)
  assert log.read_text().count("started") == 1 and "saved" in log.read_text()


# --- dry runs


def test_slurm_command():
  line = shown("slurm.py", "--nodes=2", "--gpus=4", "--partition=p", "--dry-run", "--",
               *MAIN)  # fmt: skip
  assert line.startswith("sbatch --job-name=sora_jax --nodes=2 --ntasks-per-node=4 ")
  assert "--partition=p" in line
  command = slurm.command(MAIN, name="a", nodes=1, gpus=8, cpus=8, time="1:00:00")
  assert command[-3:] == [str(slurm.SCRIPT), *MAIN]


TPU = ("--name=mine", "--zone=z", "--project=p", "--dry-run")


@pytest.mark.slow
def test_tpu_vm_commands():
  create = ("--accelerator=v5p-128", "--runtime=v2-alpha-tpuv5", "--spot", "create")
  assert shown("tpu_vm.py", *TPU, *create) == (
    "gcloud compute tpus queued-resources create mine --zone z --project p --node-id "
    "mine --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 --spot\n"
  )
  lines = shown("tpu_vm.py", *TPU, "--slices=2", "run", "--", *MAIN).splitlines()
  assert [re.search(r"ssh (\S+)", line)[1] for line in lines] == ["mine-0", "mine-1"]
  assert all("--worker=all" in line for line in lines)
  lines = shown("tpu_vm.py", *TPU, "install").splitlines()
  assert [line.split()[0] for line in lines] == ["git", "gcloud", "gcloud"]
  assert "tpu-vm scp" in lines[1] and "tpu_vm_install.sh" in lines[2]
  assert "--force --quiet" in shown("tpu_vm.py", *TPU, "delete")
  assert "state.state" in shown("tpu_vm.py", *TPU, "wait")
  assert "--worker=0" in shown("tpu_vm.py", *TPU, "logs")
  assert "kill -TERM" in shown("tpu_vm.py", *TPU, "stop")
  assert "create needs --accelerator" in shown("tpu_vm.py", *TPU, "create", code=1)
  assert "one of create, wait" in shown("tpu_vm.py", *TPU, "start", code=1)


def test_arguments_reach_the_workers_as_they_were_typed():
  *_, command = tpu_vm.run("node", [], 3, MAIN)
  line = command.removeprefix("--command=")
  words = subprocess.run(
    ["bash", "-c", f"printf '%s\\n' {line}"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert words.stdout.splitlines()[-2:] == MAIN


def test_waiting_for_tpus():
  states = iter(["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING",
                 "ACTIVE"])  # fmt: skip
  slept = []
  tpu_vm.wait(lambda: next(states), slept.append)
  assert slept == [30] * 3
  with pytest.raises(ValueError, match="is FAILED; delete it"):
    tpu_vm.wait(lambda: "FAILED", slept.append)


# --- GKE

JOB = {
  "name": "mine",
  "tpu": "v5p",
  "topology": "4x4x4",
  "slices": 2,
  "image": "r/i:1",
  "claim": "files",
  "restarts": 3,
  "grace": 120,
}
_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def check(value, schema, where="jobset"):
  """Raises for what the schema does not know or allow; "values": of a free dict."""
  if "enum" in schema:
    assert value in schema["enum"], (where, value)
    return
  assert type(value) is _TYPES[schema["type"]], (where, value)
  if "minimum" in schema:
    assert value >= schema["minimum"], (where, value)
  if "pattern" in schema:
    assert re.fullmatch(schema["pattern"], value), (where, value)
  for key in schema.get("required", ()):
    assert key in value, (where, key)
  if isinstance(value, list):
    for i, item in enumerate(value):
      check(item, schema["items"], f"{where}[{i}]")
  if isinstance(value, dict):
    for key, item in value.items():
      known = schema.get("properties", {}).get(key, schema.get("values"))
      assert known, f"{where}.{key} is unknown"
      check(item, known, f"{where}.{key}")


def test_the_jobset_fits_its_schema():
  schema = json.loads((ROOT / "tests" / "launch" / "jobset_schema.json").read_text())
  jobset = gke.jobset(MAIN, **JOB)
  check(jobset, schema)
  # The template alone has empty places, which the schema must see.
  with pytest.raises(AssertionError, match="name"):
    check(gke.yaml.safe_load(gke.TEMPLATE.read_text()), schema)
  flags = [f"--{key}={value}" for key, value in JOB.items()]
  text = shown("gke.py", *flags, "--dry-run", "--", *MAIN)
  assert gke.yaml.safe_load(text) == jobset
  (job,) = jobset["spec"]["replicatedJobs"]
  assert job["replicas"] == 2 and job["template"]["spec"]["completions"] == 16
  pod = job["template"]["spec"]["template"]["spec"]
  assert pod["terminationGracePeriodSeconds"] == 120
  assert pod["containers"][0]["command"][-2:] == MAIN
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
  "tpu, topology, expected",
  [
    ("v5p", "2x2x1", (1, 4)), ("v5p", "4x4x8", (32, 4)), ("v6e", "16x16", (64, 4)),
    ("v6e", "2x4", (1, 8)), ("v5e", "1x1", (1, 1)), ("tpu7x", "2x2x2", (2, 4)),
  ],
)  # fmt: skip
def test_hosts_of_a_slice(tpu, topology, expected):
  assert gke.hosts_of(tpu, topology) == expected


@pytest.mark.parametrize(
  "change, message",
  [
    ({"topology": "4x4"}, "v5p has 3 numbers, such as 4x4x4"),
    ({"topology": "1x1x3"}, "3 chips are not hosts of 4"),
    ({"name": "My_Run"}, "--name=My_Run"),
    ({"name": "a" * 38}, "at most 36"),
    ({"claim": None}, "--claim is missing"),
  ],
)
def test_jobs_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    gke.jobset(MAIN, **{**JOB, **change})


def test_xpk_command():
  flags = ("--name=mine", "--topology=4x4x4", "--image=r/i:1", "--xpk_cluster=c")
  line = shown("gke.py", *flags, "--xpk_type=v5p-128", "--dry-run", "--", MAIN[0])
  assert line.startswith(
    "xpk workload create --workload=mine --cluster=c --tpu-type=v5"
  )
  assert "--distributed" in line and MAIN[0] in line
  assert "--xpk_type is missing" in shown("gke.py", *flags, "--dry-run", code=1)


# --- local


def test_local_dry_run():
  flags = ("--processes=2", "--devices=4", "--dry-run", "--", *MAIN)
  lines = shown("local.py", *flags).splitlines()
  assert (
    len(lines) == 2 and len({line.split("--coordinator=")[0] for line in lines}) == 1
  )
  for i, line in enumerate(lines):
    assert "device_count=4" in line and f"--process={i}" in line


def python(code):
  return [sys.executable, "-u", "-c", code]


def run_local(*codes, grace=5.0):
  out = io.StringIO()
  return local.run([python(code) for code in codes], {}, grace, out), out.getvalue()


@pytest.mark.multiprocess
def test_processes_run_side_by_side_to_their_end():
  code, text = run_local("print('a\\nb')", "import sys; print('é', file=sys.stderr)")
  assert code == 0
  assert sorted(text.splitlines()) == ["[0] a", "[0] b", "[1] é"]


@pytest.mark.multiprocess
def test_when_one_fails_the_others_are_ended():
  begin = time.monotonic()
  code, text = run_local("import time; time.sleep(60)", "import sys; sys.exit(3)")
  assert code == 3 and "process 1 ended with code 3: ending the others" in text
  # One that does not listen is killed.
  stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf');"
  fails = "import time; time.sleep(1); raise SystemExit(4)"
  code, text = run_local(f"{stubborn} time.sleep(60)", fails, grace=0.2)
  assert code == 4 and "[0] deaf" in text
  assert time.monotonic() - begin < 30


@pytest.mark.multiprocess
def test_a_signal_goes_to_all():
  saves = (
    "import signal, sys, time\n"
    "signal.signal(15, lambda *_: (print('saved'), sys.exit(0)))\n"
    "print('ready'); time.sleep(60)"
  )
  out = io.StringIO()

  def stop():
    wait_for(lambda: out.getvalue().count("ready") == 2)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop)
  thread.start()
  code = local.run([python(saves)] * 2, {}, 5.0, out)
  thread.join()
  assert code == 0
  assert sorted(out.getvalue().splitlines())[-2:] == ["[1] ready", "[1] saved"]
  assert out.getvalue().count("saved") == 2
