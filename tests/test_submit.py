"""What is submitted to clusters: held to the published schemas, and to a shell."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from data_specs.cluster.needs import Stage
from data_specs.cluster.site import EXAMPLE, Machine, Site, load_site, on_gpus
from data_specs.cluster.submit import Submission
from data_specs.recipe import load_recipe
from data_specs.strict import SpecError
from pipeline.__main__ import main as pipeline_main
from pipeline.cluster import rates
from pipeline.cluster import submit as shards_submit
from pipeline.cluster.rates import Rates, cost_sha256
from tests.conftest import ROOT
from tests.kubernetes_schemas import JOB, RAY_JOB, SERVICE
from train import submit as train_submit
from train.__main__ import main as train_main

PLACES = [f"--corpus={name}=/data/{name}" for name in ("speech", "noise", "rooms")]
SHARDS = ["demo", *PLACES, "--out", "/data/out", "--samples", "100"]
TRAIN = ["--student", "v2", "--shards", "/data/out", "--out", "/data/run"]


def example() -> dict[str, Any]:
    values = yaml.safe_load(EXAMPLE.read_text())
    values["kubernetes"]["image"] = "factory:1"
    return values


def site(**changes: Any) -> Site:
    """The example with ``section__field=value``, or without a section (None)."""
    values = example()
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            values[section][field] = value
        else:
            values[section] = value
    return Site.model_validate(values)


def file(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def shards(kind: str = "slurm", at: Site | None = None, *more: str) -> Submission:
    return shards_submit.submission(kind, at or site(), [*SHARDS, *more])


def training(kind: str = "slurm", at: Site | None = None, *more: str) -> Submission:
    return train_submit.submission(kind, at or site(), [*TRAIN, *more])


Submit = Callable[..., Submission]
BOTH = pytest.mark.parametrize("submitted", [shards, training])


@BOTH
def test_the_example_lacks_an_image_and_nothing_else(submitted: Submit) -> None:
    bare = load_site(EXAMPLE)
    assert submitted("slurm", bare).file
    with pytest.raises(SpecError, match=r"kubernetes\.image: say the container image"):
        submitted("kubernetes", bare)


@BOTH
def test_an_output_on_a_pods_own_disk_is_refused(submitted: Submit) -> None:
    with pytest.raises(ValueError, match=r"--out /shared/out: a pod's own disk .*under /data"):
        submitted("kubernetes", site(), "--out", "/shared/out")


def test_only_shards_can_lie_in_a_bucket() -> None:
    bucket = ("--out", "s3://bucket/out")
    assert "s3://bucket/out" in shards("kubernetes", site(), *bucket).file
    with pytest.raises(SystemExit):
        training("kubernetes", site(), *bucket)


@BOTH
def test_every_submission_to_kubernetes_has_a_name_of_its_own(submitted: Submit) -> None:
    made = [submitted("kubernetes", site(name="a" * 40)) for _ in range(2)]
    names = {[*yaml.safe_load_all(one.file)][-1]["metadata"]["name"] for one in made}
    assert len(names) == 2 and max(map(len, names)) <= 47  # KubeRay's limit
    assert all(any(name in one.where for name in names) for one in made)


@pytest.mark.parametrize(("gpus", "share", "held"), [(4, 0.3, 12), (2, 0.4, 4), (3, 2, 1)])
def test_gpus_are_shared_within_one_gpu_only(gpus: int, share: float, held: int) -> None:
    assert on_gpus(gpus, Stage(cores=0, gpus=share)) == held


def test_workers_and_teachers_fit_into_a_machine() -> None:
    machine, teacher = Machine(cores=16, memory_gb=65), Stage(cores=1, memory_gb=4, gpus=1)
    assert machine.workers(Stage(cores=1, memory_gb=0)) == 16
    assert machine.workers(Stage(cores=1, memory_gb=8)) == 8
    assert machine.workers(Stage(cores=0.5, memory_gb=1)) == 32
    assert machine.workers(Stage(memory_gb=6), [teacher] * 4) == 8  # 64 - 16 GB
    with pytest.raises(SpecError, match="no room for a worker of cores=32"):
        machine.workers(Stage(cores=32))
    with pytest.raises(SpecError, match="no room for a teacher of cores=1,memory_gb=4,gpus=1"):
        Machine(cores=4, memory_gb=4, gpus=1).teachers(teacher)


def test_a_submission_says_what_lies_idle() -> None:
    where = shards().where
    assert "what: 100 samples of demo in 1 shards: fewer than the 84 workers" in where
    assert "note: memory allows 21 workers on a machine of 32 cores" in where


@pytest.mark.parametrize(
    ("submitted", "more", "said"),
    [
        (shards, ["--corpus=noize=/data/x"], "unknown corpus 'noize'; did you mean 'noise'"),
        (shards, ["--split", "tset"], "--split tset"),
        (shards, ["--corpus=speech=https://me:hush@host/x?sig=S"], "https://host/x: its login"),
        (shards, ["--corpus=https://me:hush@host/x"], "--corpus https://host/x: write NAME=DIR"),
        (shards, ["--part", "1/2"], "--part: leave it out"),
        (shards, ["--engine=ray"], "--engine: leave it out"),
        (shards, ["--out", "runs/x"], "--out runs/x: on a cluster"),
        (training, ["--student", "v77"], "unknown student 'v77'"),
        (training, ["--nodes", "2"], "--nodes: leave it out"),
        (training, ["--shards", "shards"], "--shards shards: on a cluster"),
    ],
)
def test_a_job_that_would_fail_there_is_refused_here(
    submitted: Submit, more: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as found:
        submitted("slurm", site(), *more)
    assert "hush" not in str(found.value)


@pytest.mark.parametrize(
    ("make", "kind", "job", "said"),
    [
        (shards_submit, "slurm", ["demo", "--out", "/o", "--samples", "1"], "the recipe needs"),
        (shards_submit, "slurm", ["demi", *SHARDS[1:]], "demi"),
        (shards_submit, "slurm", ["mine.yaml", *SHARDS[1:]], "mine.yaml"),
        (shards_submit, "ray", [*SHARDS, "--corpus", "speech=/a b"], "Ray and KubeRay pass"),
        (train_submit, "slurm", ["--student", "v2", "--out", "/data/run"], "nothing to train on"),
    ],
)
def test_other_jobs_that_would_fail_there(make: Any, kind: str, job: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make.submission(kind, site(), job)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("slurm.core", 3, "slurm.core: .*|slurm.*did you mean 'cores'"),
        ("slurm.cores", 0, "slurm.cores"),
        ("slurm.memory_gb", 0.5, "slurm.memory_gb"),
        ("slurm.time", "a day", "slurm.time"),
        ("slurm.logs", "logs", "slurm.logs: .*must be absolute"),
        ("slurm.partition", "cpu; rm", "slurm.partition: .*character"),
        ("slurm.options", ["qos=low"], "slurm.options: .*begin with --"),
        ("slurm.options", ["--qos=a\nrm -r /"], r"slurm.options\[0\]: must be one line"),
        ("project", "here", "project: here must be absolute"),
        ("name", "My_Job", "name"),
        ("kubernetes.cpu", {"cores": 1, "memory_gb": 4, "min": 3, "max": 2}, "min 3 is more"),
        (
            "kubernetes.gpu",
            {"cores": 1, "memory_gb": 4, "gpus": 1, "min": 0, "max": 2},
            "must be at least 1",
        ),
        ("ray.address", "head:6379", "ray.address"),
        ("environment", {"AWS_SECRET_ACCESS_KEY": "x"}, "AWS_SECRET_ACCESS_KEY looks like a cred"),
        ("worker", {"cores": -1}, "worker.cores"),
    ],
)
def test_a_wrong_site_names_file_and_field(
    where: str, value: Any, said: str, tmp_path: Path
) -> None:
    values = example()
    *sections, field = where.split(".")
    inner = values
    for name in sections:
        inner = inner[name]
    inner[field] = value
    with pytest.raises(SpecError, match=said) as found:
        load_site(file(tmp_path / "site.yaml", values))
    assert str(found.value).startswith(str(tmp_path / "site.yaml"))


def bash_accepts(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_slurm_script_runs_ray_over_the_allocation() -> None:
    made = shards("slurm", site(slurm__account="lab"))
    bash_accepts(made.file)
    lines = made.file.splitlines()
    assert made.command == ("sbatch",) and lines[0] == "#!/bin/bash"
    for option in ("--nodes=4", "--cpus-per-task=32", "--mem=122070M", "--requeue", "--no-kill"):
        assert f"#SBATCH {option}" in lines
    assert "#SBATCH --account=lab" in lines and "partition" not in made.file
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(directives) < first  # Slurm reads none after the first command
    # Of 127 GB, 21 workers of 6 GB a node.
    assert "--workers 84 --worker-needs cores=1,memory_gb=6" in made.file
    assert "--teacher-actors" not in made.file


def test_the_array_says_its_parts_itself() -> None:
    made = shards("slurm-array", site())
    bash_accepts(made.file)
    assert "#SBATCH --array=1-64%16\n" in made.file
    assert '--engine local --workers 5 --part "$SLURM_ARRAY_TASK_ID/64"' in made.file
    assert "#SBATCH --nodes=1\n" in made.file and "--no-kill" not in made.file


def test_gpus_of_a_site_become_teachers() -> None:
    made = shards("slurm", site(slurm__gpus=2))
    assert "#SBATCH --gpus-per-node=2" in made.file
    assert "--teacher-device cuda --teacher-actors 8" in made.file
    own = [*SHARDS, "--device", "cuda"]
    assert (
        "--teacher-actors" not in shards_submit.submission("slurm", site(slurm__gpus=2), own).file
    )
    shared = site(slurm__gpus=1, teacher={"cores": 0, "memory_gb": 4, "gpus": 0.5})
    assert "--teacher-actors 8" in shards_submit.submission("slurm", shared, SHARDS).file


def test_the_rayjob_is_what_kuberay_publishes() -> None:
    made = shards("kubernetes", site())
    job = yaml.safe_load(made.file)
    jsonschema.validate(job, RAY_JOB)
    spec = job["spec"]
    assert shlex.split(spec["entrypoint"])[:5] == ["python", "-m", "pipeline", "shards", "demo"]
    assert "--ray-address auto" in spec["entrypoint"]
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert (groups["cpu"]["minReplicas"], groups["cpu"]["maxReplicas"]) == (0, 20)
    gpu = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]
    assert gpu["limits"] == {"cpu": "4", "memory": "16000M", "nvidia.com/gpu": "1"}
    for pod in pods(spec["rayClusterSpec"]):
        container = pod["containers"][0]
        assert container["image"] == "factory:1"
        assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_everything_that_a_site_may_say_of_kubernetes_is_rendered() -> None:
    values = example()["kubernetes"] | {
        "secrets": ["bucket"],
        "service_account": "maker",
        "node_selector": {"zone": "a"},
        "folder": "/app",
        "preemptible_grace_s": 25,
        "volume": None,
        "gpu": None,
    }
    changed = site(kubernetes=values, environment={"CORPUS_SPEECH": 'a "quoted": one'})
    bucket = [*SHARDS, "--out", "s3://bucket/out"]
    job = yaml.safe_load(shards_submit.submission("kubernetes", changed, bucket).file)
    jsonschema.validate(job, RAY_JOB)
    for pod in pods(job["spec"]["rayClusterSpec"]):
        container = pod["containers"][0]
        assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
        assert container["env"] == [{"name": "CORPUS_SPEECH", "value": 'a "quoted": one'}]
        assert container["workingDir"] == "/app" and "volumes" not in pod
        assert (pod["serviceAccountName"], pod["nodeSelector"]) == ("maker", {"zone": "a"})


def test_a_ray_job_takes_the_folder_and_the_lock_along() -> None:
    from ray.runtime_env import RuntimeEnv

    changed = site(project=str(ROOT), ray__lock=True)
    made = shards("ray", changed)
    words = list(made.command)
    assert words[:3] == ["ray", "job", "submit"] and made.file == ""
    assert words[words.index("--working-dir") + 1] == str(ROOT)
    environment = json.loads(words[words.index("--runtime-env-json") + 1])
    pinned = [line for line in RuntimeEnv(**environment)["pip"]["packages"] if "==" in line]
    lock = (ROOT / "requirements.lock").read_text()
    assert len(pinned) == sum("==" in line for line in lock.splitlines())
    assert words[words.index("--") + 1 :][:5] == ["python", "-m", "pipeline", "shards", "demo"]
    assert words[-2:] == ["--ray-address", "auto"]


def test_a_section_that_is_missing_is_named() -> None:
    with pytest.raises(SpecError, match="add the section `slurm:`"):
        shards("slurm", site(slurm=None))
    with pytest.raises(SpecError, match="add the section `array:` in slurm"):
        shards("slurm-array", site(slurm__array=None))
    with pytest.raises(SpecError, match="training"):
        training("slurm", site(training=None))


def test_training_on_slurm_is_one_torchrun_a_node() -> None:
    machines = {"nodes": 2, "cores": 16, "memory_gb": 64, "gpus": 8}
    made = training("slurm", site(training=machines))
    bash_accepts(made.file)
    for option in ("--nodes=2", "--gpus-per-node=8", "--cpus-per-task=16"):
        assert f"#SBATCH {option}\n" in made.file
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=16 " in made.file
    assert "--nnodes=2" in made.file and "--nproc-per-node=8" in made.file
    assert f"-m train fit {shlex.join(TRAIN)} --device cuda" in made.file


def test_training_on_kubernetes_is_an_indexed_job_behind_a_service() -> None:
    made = training("kubernetes", site(training__nodes=3))
    service, job = yaml.safe_load_all(made.file)
    jsonschema.validate(service, SERVICE)
    jsonschema.validate(job, JOB)
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    command = spec["template"]["spec"]["containers"][0]["command"]
    name = job["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-0.{name}:29500" in command
    assert command[-len(TRAIN) - 5 :][:3] == ["-m", "train", "fit"]


def test_a_ray_job_trains_on_one_machine_only() -> None:
    made = training("ray", site())
    assert "--entrypoint-num-gpus" in made.command and "--standalone" in made.command
    with pytest.raises(SpecError, match=r"training\.nodes"):
        training("ray", site(training__nodes=2))


def test_a_dry_run_prints_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(file(tmp_path / "site.yaml", example()))
    assert pipeline_main(["submit", "slurm", "--site", path, "--dry-run", "--", *SHARDS]) == 0
    told = capsys.readouterr()
    assert told.out == shards().file
    assert "would run: sbatch" in told.err and "--workers 84" in told.err
    assert train_main(["submit", "kubernetes", "--site", path, "--dry-run", "--", *TRAIN]) == 0
    assert capsys.readouterr().out.startswith("# An indexed Job")


# --- how long and how large -----------------------------------------------------------------------


def known(**changes: Any) -> Rates:
    """A second of a core and 1 MB a sample."""
    recipe = load_recipe("demo")
    values: dict[str, Any] = {"recipe": "demo", "recipe_sha256": cost_sha256(recipe)}
    values |= {"core_s": {"read and mix": 0.75, "teacher": 0.25}, "sample_bytes": 1e6}
    return Rates(**values | {"about": "a test's machine"} | changes)


@pytest.fixture
def rates_file(tmp_path: Path) -> Path:
    rates.save(known(), tmp_path / "rates.yaml")
    return tmp_path / "rates.yaml"


SHARD = load_recipe("demo").shard_samples
MANY = 8400 * SHARD  # a hundred shards for each of 84 workers
HOURS = 100 * SHARD / 3600


def how_long(kind: str, at: Site, rates: Path | None, samples: int = MANY, *more: str) -> str:
    job = [*SHARDS[:-1], str(samples), *more]
    where = shards_submit.submission(kind, at, job, rates).where
    return next(line for line in where.splitlines() if line.startswith("how long"))


def test_a_dry_run_says_how_long_and_how_large(
    rates_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(file(tmp_path / "site.yaml", example()))
    given = ["submit", "slurm", "--site", path, "--rates", str(rates_file), "--dry-run"]
    assert pipeline_main([*given, "--", *SHARDS[:-1], str(MANY)]) == 0
    told = capsys.readouterr()
    assert "how long" not in told.out and told.out.startswith("#!/bin/bash")
    assert f"how long: {HOURS:.2f} h with 84 workers at once, bottleneck: cores" in told.err
    assert f"how large: {MANY / 1e3:.2f} GB; by rates of a test's machine" in told.err


def test_the_machines_of_every_kind_are_counted(rates_file: Path) -> None:
    whole = math.ceil(8400 / 64) * SHARD / 3600  # shards are dealt whole
    assert f"{whole:.2f} h with 64 workers" in how_long("ray", site(ray__workers=64), rates_file)
    # Of 64 tasks 16 run at once, each with 5 workers.
    assert f"{8400 / 80 * SHARD / 3600:.2f} h with 80 workers" in how_long(
        "slurm-array", site(), rates_file
    )
    # 10 of 6 GB fit into each of 20 pods.
    alone = site(kubernetes=example()["kubernetes"] | {"gpu": None})
    assert f"{42 * SHARD / 3600:.2f} h with 200 workers" in how_long(
        "kubernetes", alone, rates_file
    )
    assert "with 7 workers" in how_long("slurm", site(), rates_file, MANY, "--workers", "7")
    few = how_long("slurm", site(), rates_file, 5 * SHARD)
    assert f"{SHARD / 3600:.2f} h" in few and "bottleneck: too few shards" in few


def test_teachers_on_gpus_are_counted_apart(rates_file: Path) -> None:
    at = site(slurm__gpus=1)
    with pytest.raises(ValueError, match="the teacher on cores, and the job runs otherwise"):
        how_long("slurm", at, rates_file)
    rates.save(known(core_s={"read and mix": 0.5}, gpu_s={"teacher": 0.5}), rates_file)
    told = how_long("slurm", at, rates_file)
    assert f"{MANY * 0.5 / 4 / 3600:.2f} h" in told and "bottleneck: GPUs" in told
    with pytest.raises(ValueError, match="on a GPU, and the job runs otherwise"):
        how_long("slurm", site(), rates_file)
    with pytest.raises(ValueError, match="the machines have none"):
        how_long("slurm", site(), rates_file, MANY, "--teacher-device", "cuda")


def test_without_rates_the_user_learns_how_to_come_by_them() -> None:
    command = how_long("slurm", site(), None).partition("`")[2].partition("`")[0]
    assert command.startswith("python -m pipeline estimate demo --corpus speech=/data/speech")
    assert command.endswith("--teacher-device cpu --save rates.yaml")
    assert "--teacher-device cuda" in how_long("slurm", site(slurm__gpus=1), None)


def test_without_the_cluster_s_own_command_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = str(file(tmp_path / "site.yaml", example()))
    assert pipeline_main(["submit", "slurm", "--site", path, "--", *SHARDS]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    assert pipeline_main(["submit", "slurm", "--site", str(tmp_path / "no"), "--", *SHARDS]) == 2
    assert "no such file" in capsys.readouterr().err


def test_nothing_that_is_committed_names_an_image() -> None:
    assert yaml.safe_load(EXAMPLE.read_text())["kubernetes"]["image"] is None
    for template in (EXAMPLE.parent / "templates").iterdir():
        images = [line for line in template.read_text().splitlines() if "image:" in line]
        assert all("k.image" in line for line in images)
