"""Arrays of Slurm against programs that refuse, die, hang, say rubbish or lose their answer; the batch script as bash
runs it. tests/cluster has the same with a real Slurm."""

import json
import os
import shlex
import signal
import subprocess
import time

import pytest
from parts import fake_slurm
from parts.fake_slurm import answers, queue_line
from parts.folders import plant, record, spec
from parts.watching import alive, until

from results.claims import CLAIM
from results.store import run_folder
from suite.launch import slurm, slurm_programs, standing, submissions
from suite.launch.places import Slurm, read_place
from suite.launch.submissions import in_queue, submit

RUNS = [spec(seed=seed) for seed in range(6)]
WORDS = ["run", "c.yaml", "--on", "slurm:array=4", "--seeds", "0-5"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    return fake_slurm.on_path(tmp_path / "programs", monkeypatch)


def submitted(folder, **options):
    return submit(Slurm(**{"array": "4", **options}), WORDS, folder, RUNS, len(RUNS))


def test_a_submission_is_a_script_a_note_and_its_runs(tmp_path, programs):
    number, noted, said = submitted(tmp_path / "out")
    own = tmp_path / "out" / "slurm" / "1"
    assert (number, noted.job, noted.elements, noted.planned, said) == (1, "12", 4, 6, [])
    assert submissions.submissions(tmp_path / "out") == {1: noted}
    assert programs.calls("sbatch") == [f"sbatch --parsable {own / 'job.sh'}"]
    assert submissions.planned_runs(tmp_path / "out", 1) == [f"{s.task}/{s.norm}/{s.key}" for s in RUNS]
    assert submitted(tmp_path / "out")[0] == 2


def test_no_more_elements_are_submitted_than_there_are_runs(tmp_path, programs):
    assert submitted(tmp_path / "out", array="100%3")[1].elements == 6
    text = (tmp_path / "out" / "slurm" / "1" / "job.sh").read_text()
    assert "#SBATCH --array=1-6%3\n" in text
    assert list(slurm.notes(Slurm(array="100"), "cpu", 6)) == ["array=100: 6 elements are enough for 6 runs"]


def test_a_cluster_and_a_banner_in_the_answer(tmp_path, programs):
    programs.set(sbatch='echo "Welcome to the cluster, 3 messages"; echo "77;big"')
    _, noted, _ = submitted(tmp_path / "out")
    assert (noted.job, noted.cluster) == ("77", "big")
    in_queue(tmp_path / "out")
    assert "--clusters=big" in programs.calls("squeue")[-1]


def test_without_slurm_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^sbatch is not here: .* --on local$"):
        submitted(tmp_path / "out")
    assert submissions.submissions(tmp_path / "out") == {}
    assert not list((tmp_path / "out" / "slurm").iterdir())


def test_a_refusal_is_shown_in_slurms_words_and_leaves_nothing(tmp_path, programs):
    programs.set(sbatch='echo "sbatch: error: invalid partition specified: nope" >&2; exit 1')
    with pytest.raises(ValueError, match=r"^sbatch refuses: invalid partition specified: nope$"):
        submitted(tmp_path / "out", partition="nope")
    assert not list((tmp_path / "out" / "slurm").iterdir())


LOST = {
    "dies": "kill -9 $$",
    "hangs": "sleep 60",
    "says rubbish": "echo 'job <12> was \x1b[2J submitted'",
    "says nothing": "",
    "times out itself": "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1",
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_answer_is_found_by_the_name_of_the_job(how, tmp_path, programs, monkeypatch):
    monkeypatch.setattr(slurm_programs, "PATIENCE", 0.3 if how == "hangs" else 10.0)
    programs.set(sbatch=LOST[how], squeue=answers(tmp_path / "out", queue_line("NAME", "31_[1-4]")))
    _, noted, said = submitted(tmp_path / "out")
    assert (noted.job, noted.found) == ("31", True)
    assert "answer was lost" in said[0]
    assert said[0].isprintable()
    assert submissions.submissions(tmp_path / "out")[1] == noted


def test_where_nobody_knows_it_is_said_and_nothing_is_submitted_twice_in_silence(tmp_path, programs):
    out = tmp_path / "out"
    programs.set(sbatch="kill -9 $$", squeue="exit 1")
    with pytest.raises(ValueError, match=r"whether the job was submitted is not known: sbatch was ended by signal 9"):
        submitted(out)
    programs.set(sbatch="echo 13")
    with pytest.raises(
        ValueError, match=r"whether slurm/1 .* was submitted is not known, and squeue ended with exit code 1"
    ):
        submitted(out)
    assert len(programs.calls("sbatch")) == 1
    programs.set(squeue="")
    number, noted, said = submitted(out)
    assert (number, noted.job) == (2, "13")
    assert "slurm/1" in said[0]
    assert "squeue knows no job of its name" in said[0]


def test_one_that_was_lost_and_waits_is_named_before_another_is_submitted(tmp_path, programs):
    out = tmp_path / "out"
    programs.set(sbatch="exit 0", squeue="exit 1")
    with pytest.raises(ValueError, match="not known"):
        submitted(out)
    rows = [queue_line("NAME", f"31_{i}", "PENDING", "Priority", "") for i in (1, 2)]
    programs.set(sbatch="echo 40", squeue=answers(out, *rows))
    first = submissions.submissions(out)[1].name  # the rows of the older one, once there is a newer one
    programs.set(squeue="cat <<END\n" + "\n".join(row.replace("NAME", first, 1) for row in rows) + "\nEND")
    _, _, said = submitted(out)
    assert said == [
        "sbatch's answer for slurm/1 was lost; squeue knows it: job 31",
        "2 elements of slurm/1 (job 31) wait or run still; the new ones share the runs with them",
    ]
    assert submissions.submissions(out)[1].job == "31"


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(slurm_programs, "PATIENCE", 0.3)
    programs.set(squeue=f"sleep 61 & echo $! >{tmp_path}/child; wait")
    begun = time.monotonic()
    with pytest.raises(slurm_programs.NotAnswered, match=r"squeue did not answer within 0\.3 s"):
        slurm_programs.queue(["a"])
    assert time.monotonic() - begun < 5
    child = int((tmp_path / "child").read_text())
    assert until(lambda: not alive(child))


def test_the_elements_command_is_the_same_without_its_place():
    words = ["run", "a b.yaml", "--on=slurm:array=4", "--seeds", "0-4", "--on", "slurm"]
    alone = slurm.element_command(words, Slurm(cpus=8), threads=2)
    assert alone == ["run", "a b.yaml", "--seeds", "0-4", "--jobs", "4", *slurm.ELEMENT]
    assert "--jobs" not in slurm.element_command(
        words, Slurm(gpus="2", cpus=8)
    )  # one on each, as the command finds them
    assert slurm.element_command([*words, "--jobs", "3"], Slurm(cpus=8))[-3:-1] == ["--jobs", "3"]
    both = slurm.element_command(words, Slurm(gpus=2, jobs=3, runs_per_device=2))
    assert shlex.join(both).endswith("--jobs 3 --runs-per-device 2 --no-wait")


def test_an_accelerator_that_nobody_uses_or_asks_for_is_named():
    assert "--device cuda uses them" in next(slurm.notes(Slurm(gpus="1"), "cpu", 9))
    assert "no gpus=NUMBER" in next(slurm.notes(Slurm(), "cuda", 9))
    assert list(slurm.notes(Slurm(gpus="1"), "cuda", 9)) == []


ODD = 'it\'s #1 $HOME `id` "q" ; %j'


@pytest.fixture
def element(tmp_path, programs, monkeypatch):
    """Starts the script of an array under bash, with a shell script in Python's place."""

    def start(body, environment=(), folder="out", words=("run",), working=None, **options):
        own = tmp_path / folder
        own.mkdir(exist_ok=True)
        stub = tmp_path / "python"
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
        monkeypatch.setattr(slurm.sys, "executable", str(stub))
        text = slurm.script(Slurm(**options), list(words), own, "name", 2, working or tmp_path)
        (own / "job.sh").write_text(text)
        env = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7"}
        with (tmp_path / "said").open("wb") as out:
            return subprocess.Popen(
                ["bash", str(own / "job.sh")], env={**env, **dict(environment)}, stdout=out, stderr=out, cwd="/"
            )

    return start


WAITS = """trap 'echo USR1 >>"$PWD/got"; sleep 0.2; exit 130' USR1
trap 'echo TERM >>"$PWD/got"; exit 130' TERM
touch "$PWD/ready"
while :; do sleep 0.02; done"""


def ended(process):
    return process.wait(20)


def test_the_command_gets_its_words_and_its_folder_whatever_they_hold(element, tmp_path):
    working = tmp_path / ODD.replace("/", "")
    working.mkdir()
    process = element(
        'pwd >"$2.txt"; printf "%s\\n" "$@" >>"$2.txt"; exit 3', words=[str(tmp_path / "w"), ODD], working=working
    )
    assert ended(process) == 3
    assert (tmp_path / "w.txt").read_text().splitlines() == [
        str(working),
        str(slurm.ROOT / "run_suite.py"),
        str(tmp_path / "w"),
        ODD,
    ]


def test_a_notice_reaches_the_command_and_the_element_is_begun_again(element, tmp_path, programs):
    process = element(WAITS)
    assert until(lambda: (tmp_path / "ready").exists())
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 130
    assert (tmp_path / "got").read_text() == "USR1\n"
    assert programs.calls("scontrol") == ["scontrol requeue 7_2"]  # 7 alone would be the whole array


def test_one_that_is_cancelled_stays_ended(element, tmp_path, programs):
    process = element(WAITS)
    assert until(lambda: (tmp_path / "ready").exists())
    process.terminate()
    assert ended(process) == 130
    assert (tmp_path / "got").read_text() == "TERM\n"
    assert not [call for call in programs.calls("scontrol") if "requeue" in call]


def test_one_whose_checkpoint_takes_longer_than_the_limit_is_begun_again(element, tmp_path, programs):
    programs.set(scontrol='[ "$1" != show ] || echo "   JobState=COMPLETING Reason=TimeLimit Dependency=(null)"')
    process = element(WAITS.replace("sleep 0.2; exit 130", ":"))
    assert until(lambda: (tmp_path / "ready").exists())
    process.send_signal(signal.SIGUSR1)
    assert until(lambda: (tmp_path / "got").exists())
    process.terminate()
    assert ended(process) == 130
    assert [call for call in programs.calls("scontrol") if "requeue" in call] == ["scontrol requeue 7_2"]


def test_nothing_is_begun_again_for_ever(element, tmp_path, programs):
    process = element(WAITS, {"SLURM_RESTART_COUNT": "5"}, requeues=5)
    assert until(lambda: (tmp_path / "ready").exists())
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 130
    assert programs.calls("scontrol") == []
    assert "requeues=5" in (tmp_path / "said").read_text()


def test_a_notice_before_the_command_is_started(element, tmp_path, programs):
    process = element(WAITS, setup=["touch early", "sleep 0.5"], working=tmp_path)
    assert until(lambda: "element 7_2" in (tmp_path / "said").read_text())
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 130
    assert not (tmp_path / "ready").exists()
    assert programs.calls("scontrol") == ["scontrol requeue 7_2"]


def test_a_finished_command_is_not_begun_again_after_a_notice(element, tmp_path, programs):
    process = element(WAITS.replace("exit 130", "exit 1"))
    assert until(lambda: (tmp_path / "ready").exists())
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 1
    assert programs.calls("scontrol") == []


def test_setup_is_run_before_and_a_folder_that_is_gone_ends_the_element(element, tmp_path):
    process = element(
        'echo "$FROM_SETUP" >"$1.txt"', words=["x"], setup=["export FROM_SETUP='a b'"], working=tmp_path / "gone"
    )
    assert ended(process) == 2
    assert "gone" in (tmp_path / "said").read_text()
    process = element('echo "$FROM_SETUP" >"$2.txt"', words=["x"], setup=["export FROM_SETUP='a b'"])
    assert ended(process) == 0
    assert (tmp_path / "x.txt").read_text() == "a b\n"


def test_every_option_is_a_line_that_sbatch_reads_as_one_value(tmp_path):
    options = read_place(
        "slurm:partition='a b#c',account=$x,time=4h,gpus=a100:2,cpus=8,memory=1.5G,array=9%2,exclude=\"n[1,2],n4\","
        "notice=300,extra.mail-type=END,extra.exclusive=true,extra.nodes=2"
    ).options
    text = slurm.script(options, ["run"], tmp_path, "name", 9)
    given = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert given == [
        "--job-name=name",
        "--array=1-9%2",
        f"--output={tmp_path}/%a.out",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@300",
        "--nodes=2",
        "--partition=a b#c",
        "--account=$x",
        "--exclude=n[1,2],n4",
        "--time=04:00:00",
        "--cpus-per-task=8",
        "--mem=1536M",
        "--gres=gpu:a100:2",
        "--mail-type=END",
        "--exclusive",
    ]


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x1bb"])
def test_a_folder_that_slurm_can_not_name_is_refused(name, tmp_path, programs):
    with pytest.raises(ValueError, match="choose another --out"):
        submitted(tmp_path / name)
    assert programs.calls("sbatch") == []


def test_where_a_folder_stands(tmp_path, programs):
    out = tmp_path / "out"
    submitted(out)
    plant(out, record(RUNS[0]), record(RUNS[1]), record(RUNS[2], status="failed"), record(spec(norm="gn", seed=9)))
    rows = [
        queue_line("NAME", "12_1", node="n1"),
        queue_line("NAME", "12_2", "PENDING", "BeginTime", "", "2026-11-29T03:00:00", 1),
        queue_line("NAME", "12_3", "PENDING", "Priority", ""),
        queue_line("somebody-else", "99_1", node="n1"),
    ]
    programs.set(squeue=answers(out, *rows))
    now = standing.standing(out)
    lines = list(standing.lines(now))
    assert "slurm/1: job 12, 4 elements: 1 running (n1), 2 waiting (" in lines[-2]
    assert "BeginTime 2026-11-29T03:00:00" in lines[-2]
    assert "Priority" in lines[-2]
    assert lines[-2].endswith("1 of them begun again, 1 ended")
    assert lines[-1] == f"6 runs planned: 3 ok, 1 failed, 3 wait in {out}; 1 records are not of this plan"
    assert [line for line in lines if line.startswith("failed: ")]
    document = json.loads(json.dumps(standing.document(now)))
    assert (document["planned"], document["waiting"], document["records"]["failed"]) == (6, 3, 1)
    assert [(e["element"], e["state"], e["restarts"]) for e in document["slurm"][0]["queue"]] == [
        (1, "RUNNING", 0),
        (2, "PENDING", 1),
        (3, "PENDING", 0),
    ]


def test_a_claim_that_is_renewed_is_a_run_that_is_made_wherever_that_is(tmp_path, programs):
    out = tmp_path / "out"
    submitted(out)
    plant(out, record(RUNS[0]))
    for run, age in zip(RUNS[:3], (0, 0, 3600), strict=True):
        claim = run_folder(out, run) / CLAIM
        claim.parent.mkdir(parents=True, exist_ok=True)
        claim.write_text("token=a\npid=7\nhost=node17\n")
        os.utime(claim, (time.time() - age,) * 2)
    now = standing.standing(out)
    assert [place[2] for place in now.starting] == [RUNS[1].key]
    lines = list(standing.lines(now))
    assert "node17" in lines[1]
    assert lines[-1].startswith("6 runs planned: 1 ok, 1 being made, 4 wait")
    assert standing.document(now)["starting"][0]["host"] == "node17"


def test_a_preview_is_the_script_and_writes_nothing(tmp_path, programs):
    text = submissions.preview(Slurm(array="4"), WORDS, tmp_path / "out", 6)
    assert not (tmp_path / "out").exists()
    submitted(tmp_path / "out")
    written = (tmp_path / "out" / "slurm" / "1" / "job.sh").read_text()
    assert [line for line in text.splitlines() if "job-name" not in line] == [
        line for line in written.splitlines() if "job-name" not in line
    ]


def test_without_an_answer_the_folder_is_shown_and_the_rest_is_a_note(tmp_path, programs):
    out = tmp_path / "out"
    submitted(out)
    for body in ("exit 1", "echo 'rubbish \x1b[2J and more'", "kill -9 $$"):
        programs.set(squeue=body)
        now = standing.standing(out)
        assert now.elements is None
        assert "what Slurm's queue holds is not known" in now.notes[0]
        assert now.notes[0].isprintable()
        assert [*standing.lines(now)][-1].startswith("6 runs planned: 6 wait")
        assert standing.document(now)["slurm"][0]["queue"] is None


def test_a_folder_without_submissions_needs_no_slurm(tmp_path, monkeypatch):
    plant(tmp_path / "out", record(RUNS[0]))
    monkeypatch.setenv("PATH", str(tmp_path))
    now = standing.standing(tmp_path / "out")
    assert now.notes == ()
    assert standing.document(now)["planned"] is None
    assert [*standing.lines(now)][-1].startswith("1 ok in ")


def test_a_damaged_note_is_named_and_the_others_count(tmp_path, programs):
    out = tmp_path / "out"
    submitted(out)
    submitted(out)
    note = out / "slurm" / "1" / "submission.json"
    for text in ("", "{}", '{"schema": 1, "name": "a,b\\n", "time": "", "elements": 1, "planned": 1, "to_do": 1}'):
        note.write_text(text)
        assert list(submissions.submissions(out)) == [2]
        assert str(note) in standing.standing(out).notes[0]


def test_secrets_stay_out_of_the_note(tmp_path, programs):
    submit(Slurm(), [*WORDS, "--token", "abc"], tmp_path / "out", RUNS, 6)
    assert "abc" not in (tmp_path / "out" / "slurm" / "1" / "submission.json").read_text()


def test_cancel_ends_the_jobs_of_the_folder_and_no_others(tmp_path, programs):
    out = tmp_path / "out"
    submitted(out)
    rows = [queue_line("NAME", "12_1"), queue_line("NAME", "12_[2-4]", "PENDING"), queue_line("other", "99")]
    programs.set(squeue=answers(out, *rows))
    found = in_queue(out)
    assert [(number, len(elements)) for number, (_, elements) in found.items()] == [(1, 2)]
    submissions.cancel(found)
    assert programs.calls("scancel") == ["scancel 12"]
    programs.set(scancel='echo "scancel: error: Kill job error on job id 12: Access/permission denied" >&2; exit 1')
    with pytest.raises(ValueError, match="Access/permission denied"):
        submissions.cancel(found)
    programs.set(squeue="")
    assert in_queue(out) == {}
