"""The batch from nothing to tables, in the smoke preset: what it runs, what it does not run again, and what a kill leaves."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detrdistill.checkpoints.locate import weights_hash
from detrdistill.recipes.identity import parents, run_id
from detrdistill.recipes.parts import Folder
from detrdistill.recipes.presets import coco, get_preset, get_presets, smoke
from detrdistill.recipes.tables import make_table
from detrdistill.runs.pinned import pinned
from detrdistill.runs.plan import missing_runs, takable
from detrdistill.runs.store import Store
from tests.checkpoints import test_locate
from tests.checkpoints.test_pretrained import of_classes
from tests.folders import write_folder
from tests.runs.test_published import write_model
from tests.warm import python_m

ROOT = Path(__file__).parents[2]
COMMIT, hub = test_locate.COMMIT, test_locate.hub
TABLE = "self_distillation"  # the smallest: a student beside a teacher, and what it learns from it


def snakemake(folder: Path, *words: str) -> list[str]:
    return [
        *("snakemake", "--snakefile", "workflow/Snakefile", "--cores", "1", "--directory", str(folder)),
        *("--config", "preset=smoke", "seeds=0", f"tables={TABLE}", "detectors=deformable_detr", *words),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("clone"))


def workplace(folder: Path) -> Path:
    """A folder to work in, with the sources of the batch."""
    for name in ("workflow", "notebooks"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "results" / "published").mkdir(parents=True)
    return folder


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if ".venv" not in p))  # as under make
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DETRDISTILL_RESULTS", raising=False)


def kill_at(folder: Path, records: int) -> dict[Path, int]:
    """Start the batch, kill all of it when so many runs are complete; returns when each of these was written."""
    runs = folder / "results" / "smoke" / "runs"
    words = [sys.executable, "-m", *snakemake(folder)]
    batch = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 600
    while len(list(runs.glob("*/record.json"))) < records and batch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(batch.pid, signal.SIGKILL)
    batch.wait()
    written = {path: path.stat().st_mtime_ns for path in runs.glob("*/record.json")}
    assert len(written) >= records, "the batch ended before it could be killed"
    return written


@pytest.mark.timeout(1500)
def test_killed_at_any_moment_it_ends_well_when_called_again(folder: Path, environment: None) -> None:
    """After the first run, and between the last run and the notebooks."""
    results = folder / "results" / "smoke"
    before: dict[Path, int] = {}
    for records in (1, 4):
        written = kill_at(folder, records)
        assert {path: written[path] for path in before} == before, "complete runs were run again"
        before = written
        assert python_m(*snakemake(folder, "--unlock"), cwd=ROOT).returncode == 0
    again = python_m(*snakemake(folder), cwd=ROOT, timeout=600)
    assert again.returncode == 0, again.stderr
    after = {path: path.stat().st_mtime_ns for path in results.glob("runs/*/record.json")}
    assert len(after) == 4, "backbone, teacher, student, distilled student"
    assert {path: after[path] for path in before} == before, "complete runs were run again"
    for name in (f"tables/{TABLE}.csv", f"tables/{TABLE}.md", f"tables/{TABLE}.tex", f"figures/{TABLE}.pdf"):
        assert (results / name).stat().st_size > 0
    assert [path.name for path in (results / "notebooks").iterdir()] == [f"05_{TABLE}.ipynb"]
    assert f"notebooks/05_{TABLE}.ipynb" in (results / "index.html").read_text()


def test_a_second_call_computes_nothing(folder: Path, environment: None) -> None:
    again = python_m(*snakemake(folder, "--dry-run"), cwd=ROOT)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_one_table_asks_for_its_own_runs_and_notebook(folder: Path, environment: None) -> None:
    plan = python_m(*snakemake(folder, "tables=components", "--dry-run"), cwd=ROOT)
    jobs = plan.stdout + plan.stderr
    assert jobs.count("rule train:") == 6, "eight rows; student and DETRDistill are stored, as is the teacher"
    assert "notebooks/06_components.ipynb" in jobs and "00_quickstart" not in jobs and "tables/components.csv" in jobs


def test_a_published_teacher_teaches_in_every_job(tmp_path: Path, environment: None) -> None:
    of_classes("deformable", 91, tmp_path / "model.pth")
    place, teacher = workplace(tmp_path / "clone"), str(tmp_path / "model.pth")
    words = snakemake(place, "detectors=", "tables=", f"teacher={teacher}", "--dry-run", "--printshellcmds")
    plan = python_m(*words, cwd=ROOT)
    jobs = plan.stdout + plan.stderr
    commands = [line for line in jobs.splitlines() if " -m detrdistill " in line]
    assert {re.search(r"-m detrdistill (\w+)", line)[1] for line in commands} == {"train", "notebook", "report"}, jobs
    assert all(f"--teacher {teacher}" in line or f"teacher={teacher}" in line for line in commands)
    of_teacher = f"results/smoke/published-taught-{weights_hash(Path(teacher))[:8]}/"
    for name in ("index.html", "tables/main_results.csv", "notebooks/01_main_results.ipynb"):
        assert of_teacher + name in jobs and f"results/smoke/{name}" not in jobs, "beside the preset's own"
    assert len(set(re.findall(r"runs/(\S+-published-\S+)/record.json", jobs))) == 1 and "adamixer-" not in jobs
    assert "06_components" in jobs and "05_self_distillation" not in jobs and "tables/full_schedule" not in jobs
    assert "preset smoke for deformable_detr alone" in jobs


def test_a_hub_id_is_looked_up_once(hub, tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job gets the commit."""
    endpoint, _, files, _ = hub
    model = write_model("hugging face", tmp_path / "theirs")
    files.clear()
    files.update({path.name: path.read_bytes() for path in model.iterdir()})
    for name, value in {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    place = workplace(tmp_path / "clone")
    with (place / "workflow" / "Snakefile").open("a") as file:
        file.write("\nprint('handed on:', *workflow.config_settings.config_args)\n")
    words = snakemake(place, "detectors=", "tables=main_results", "teacher=org/name", "--dry-run", "--printshellcmds")
    words[words.index("workflow/Snakefile")] = str(place / "workflow" / "Snakefile")
    plan = python_m(*words, cwd=ROOT)
    jobs = plan.stdout + plan.stderr
    commands = [line for line in jobs.splitlines() if " -m detrdistill " in line]
    assert commands and all(f"teacher org/name@{COMMIT}" in line or f"teacher=org/name@{COMMIT}" in line for line in commands), jobs
    (handed,) = [line for line in jobs.splitlines() if line.startswith("handed on:")]
    assert f"teacher=org/name@{COMMIT}" in handed.split() and "preset=smoke" in handed.split()


def test_nothing_stated_is_the_preset_s_own_choice(tmp_path: Path, environment: None) -> None:
    """As make calls it, with every variable empty."""
    words = [*snakemake(workplace(tmp_path), "preset=quick", "tables=", "detectors=", "--dry-run")]
    plan = python_m(*words, cwd=ROOT)
    jobs = plan.stdout + plan.stderr
    assert plan.returncode == 0, jobs
    assert "notebooks/10_query_masks.ipynb" in jobs and "06_components" not in jobs and "15_your_own_data" not in jobs


@pytest.mark.parametrize("detector", ["adamixer", "deformable_detr"])
def test_a_named_detector_is_that_of_all_notebooks(tmp_path: Path, environment: None, detector: str) -> None:
    """Also of those that make no table: none trains another one. The quickstart has no choice. Who shows one seed gets one."""
    words = [
        word.replace("seeds=0", "seeds=0 1") for word in snakemake(workplace(tmp_path), "tables=", f"detectors={detector}", "--dry-run")
    ]
    plan = python_m(*words, cwd=ROOT)
    jobs = plan.stdout + plan.stderr
    assert plan.returncode == 0, jobs
    calls = {line.split("notebooks/")[1][:2]: line for line in jobs.splitlines() if " notebook notebooks/" in line}
    assert (
        {"01", "10", "11", "12"} <= calls.keys() and not {"15", "18"} & calls.keys() and ("00" in calls) == (detector == "deformable_detr")
    )
    assert {number for number, call in calls.items() if "seeds='0'" in call} == {"00", "10", "11", "19"} & calls.keys()
    assert "--parameters detector" not in calls.pop("00", "")
    assert all(f"detector={detector}" in call or f"detectors='{detector}'" in call for call in calls.values())


def test_unknown_tables_are_refused(folder: Path, environment: None) -> None:
    plan = python_m(*snakemake(folder, "tables=tabel7", "--dry-run"), cwd=ROOT)
    assert plan.returncode != 0 and "table 'tabel7' is unknown; known: main_results, prior_methods" in plan.stdout + plan.stderr


def test_a_cluster_gets_every_run_as_a_job(tmp_path: Path, environment: None) -> None:
    place = workplace(tmp_path)
    words = [*snakemake(place, "gpus=2", "tables=components", "--workflow-profile", "workflow/profiles/slurm", "--dry-run")]
    plan = python_m(*words, cwd=ROOT)
    jobs = plan.stdout + plan.stderr
    assert plan.returncode == 0, jobs
    assert jobs.count("rule train:") == 10 and "runtime=2880" in jobs and "gpu=2" in jobs
    assert "-m torch.distributed.run --standalone --nproc-per-node 2 -m detrdistill train smoke" in jobs and "--device cuda" in jobs


RUN = """#!/bin/sh
# In the place of `detrdistill train PRESET RUN --seed SEED --results ROOT ...`
sleep 3 && mkdir -p "$7/runs/$3" && echo "{}" > "$7/runs/$3/record.json"
"""


def test_on_one_machine_runs_with_gpus_of_their_own_take_turns(environment: None, finished: Path, tmp_path: Path) -> None:
    """Teacher and student, which train side by side otherwise, once there is a backbone."""
    place, train = workplace(tmp_path), tmp_path / "train.sh"
    train.write_text(RUN)
    source, real = place / "workflow" / "Snakefile", 'CLI = f"{sys.executable} -m detrdistill"'
    content = source.read_text()
    assert content.count(real) == 1
    source.write_text(content.replace(real, f'CLI = "sh {train}"'))
    runs = place / "results" / "smoke" / "runs"
    for backbone in map(run_id, parents(smoke().student).values()):
        shutil.copytree(finished / "runs" / backbone, runs / backbone)
    wanted = [runs / run_id(recipe) / "record.json" for recipe in (smoke().teacher, smoke().student)]
    starts, ends = "rule train:", "Finished jobid"
    for given, order in ((("gpus=1", "device=cpu"), [starts, ends] * 2), ((), [starts] * 2 + [ends] * 2)):
        words = [*snakemake(place, *given, "--cores", "10"), *map(str, wanted)]
        words[words.index("workflow/Snakefile")] = str(source)
        done = python_m(*words, cwd=ROOT)
        told = done.stdout + done.stderr
        assert done.returncode == 0, told
        assert re.findall(r"rule train:|Finished jobid", told) == order, told
        for path in wanted:
            shutil.rmtree(path.parent)


def test_other_seeds_make_table_and_notebooks_again(folder: Path, environment: None) -> None:
    words = [word.replace("seeds=0", "seeds=0 1") for word in snakemake(folder, "--dry-run")]
    plan = python_m(*words, cwd=ROOT)
    jobs = plan.stdout + plan.stderr
    assert "rule notebook" in jobs and "rule report" in jobs and jobs.count("rule train:") == 1, "the student of seed 1 is smoke's teacher"


def test_a_stored_teacher_asks_for_nothing(folder: Path, environment: None, tmp_path: Path) -> None:
    """As after a fresh clone: the teacher's record is there, the backbone it started from is not."""
    (teacher,) = (folder / "results" / "smoke" / "runs").glob("*plain-seed1-*")
    shutil.copytree(teacher, tmp_path / "results" / "smoke" / "runs" / teacher.name)
    wanted = f"{tmp_path}/results/smoke/runs/{teacher.name}/record.json"
    plan = python_m(*snakemake(tmp_path, "--dry-run"), wanted, cwd=ROOT)
    assert plan.returncode == 0 and "Nothing to be done" in plan.stdout + plan.stderr, plan.stderr


def plan(folder: Path, **config: str) -> subprocess.CompletedProcess:
    command = ["snakemake", "--snakefile", "workflow/Snakefile", "--cores", "1", "--dry-run", "--directory", folder]
    return python_m(*command, "--config", *(f"{name}={value}" for name, value in config.items()), cwd=ROOT)


def test_the_batch_waits_for_runs_by_their_data_s_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("DETRDISTILL_RESULTS", str(tmp_path / "results"))
    data = Folder(path=write_folder(tmp_path / "data" / "coco"))
    done = plan(tmp_path, preset="coco", seeds="0")
    assert done.returncode == 0, done.stderr
    for setting in ("teacher", "student", "detrdistill"):
        recipe = pinned(coco().recipe(setting).replace(data=data, **({"teacher.data": data} if setting == "detrdistill" else {})))
        assert f"/runs/{run_id(recipe)}/record.json" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("preset", "seeds", "message"),
    [
        ("coco", "0", "data folder data/coco: does not exist; expected there: instances_train.json"),
        ("smok", "0", "preset 'smok' is unknown; known: smoke, quick, mini, bccd, coco"),
        ("smoke", "a", "seeds 'a': whole numbers, such as SEEDS='0 1 2'"),
    ],
)
def test_a_batch_that_cannot_be(tmp_path, preset, seeds, message):
    done = plan(tmp_path, preset=preset, seeds=seeds)
    told = done.stdout + done.stderr
    assert done.returncode and message in told and "Traceback" not in told


def test_weights_are_tuned_when_asked_for_by_name_a_job_a_row(folder, environment):
    asked = plan(folder, preset="smoke", seeds="0", tables="weights", detectors="deformable_detr")
    told = asked.stdout + asked.stderr
    assert asked.returncode == 0, told
    rows = ("fgd", "mgd", "fitnet", "detrdistill", "kd_detr", "d3etr", "pkd", "cwd")
    assert all(f"tune smoke '{row}' --detector deformable_detr" in told for row in rows) and "notebooks/17_weights.ipynb" in told
    usual = plan(folder, preset="smoke", seeds="0", detectors="deformable_detr")
    assert usual.returncode == 0 and "rule tune" not in usual.stdout + usual.stderr
    both = plan(folder, preset="smoke", seeds="0", tables="weights main_results", detectors="deformable_detr")
    assert both.returncode == 0 and all(word in both.stdout + both.stderr for word in ("tune smoke", "01_main_results", "17_weights"))


def test_the_batch_asks_for_a_run_with_the_seed_of_a_student_that_needs_it(folder, environment):
    done = plan(folder, preset="mini", seeds="0 3", tables="main_results", detectors="adamixer")
    told = done.stdout + done.stderr
    preset = get_preset("mini", "adamixer")
    wanted = {run_id(preset.teacher_of(3)): 3, run_id(preset.teacher): 0, run_id(preset.recipe("fgd", 3)): 3}
    assert done.returncode == 0 and all(f"train mini {name} --seed {seed} " in told for name, seed in wanted.items())


def test_a_fresh_clone_trains_what_the_plan_says(tmp_path: Path, environment: None) -> None:
    """What the committed reference has is taken: its teacher's own backbone is not trained first."""
    words = [
        "preset=quick" if word == "preset=smoke" else word for word in snakemake(workplace(tmp_path), "tables=main_results", "--dry-run")
    ]
    listed = python_m(*words, cwd=ROOT).stdout
    batch = {run for run in re.findall(r"wildcards: run=(\S+)", listed)}
    presets, store = get_presets("quick"), Store(tmp_path / "results" / "quick")
    taken = takable(presets, (0,))
    missing = set(missing_runs(make_table("main_results", presets, (0,)).recipes(), store, taken))
    assert missing and missing <= batch and batch - missing <= taken
    assert len(taken & batch) == 2, "the teacher and the students' backbone are copied, the teacher's own backbone is not wanted"
